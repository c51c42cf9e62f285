"""GroupNorm whose groups reach over slices, exactly: statistics of all slices first, then each slice by itself.

The published code normalises each slice by its own statistics, which is another function (7 % off on a block with a contrast
between its halves). Sums are of fp64 of each slice's fp32 mean and squares around it, and merged by Chan's formula (Chan,
Golub and LeVeque, 1983), so that fp16 inputs with a large mean lose nothing.

Letters: B rows of the batch, C channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Statistics:
    """Of the groups of a GroupNorm, over as many slices as are added."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.count = 0
        self.mean: Tensor | None = None  # fp64 [B, G]
        self.squares: Tensor | None = None  # of what is left without the mean, summed
        self._scale: Tensor | None = None  # fp32 [B, C], of all that were added
        self._shift: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """A slice [B, C, ...]."""
        self._scale = self._shift = None
        values = x.reshape(x.shape[0], self.norm.num_groups, -1) if x.is_contiguous() else _grouped(x, self.norm)
        count = values.shape[-1]
        variance, mean = torch.var_mean(values.float(), dim=-1, correction=0)
        mean, squares = mean.double(), variance.double() * count
        if self.mean is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        apart = mean - self.mean
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.count = total

    def normalised(self, x: Tensor) -> Tensor:
        """A slice [B, C, ...] by the statistics of all, with the norm's weight and bias, in x's dtype."""
        if self._scale is None:
            self._scale, self._shift = self._affine(x)
        shape = (x.shape[0], -1, *(1,) * (x.ndim - 2))
        return torch.addcmul(self._shift.view(shape), x.float(), self._scale.view(shape)).to(x.dtype)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, fp32 [B, C]."""
        norm = self.norm
        weight, bias = _parameters(norm, x)
        deviation = (self.squares / self.count + norm.eps).sqrt()
        each = norm.num_channels // norm.num_groups
        scale, mean = (y.repeat_interleave(each, dim=1) for y in (1 / deviation, self.mean))
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias.double()
        return scale.float(), shift.float()


def statistics(norm: nn.GroupNorm, parts: Iterable[Tensor]) -> Statistics:
    """Of all slices."""
    of = Statistics(norm)
    for part in parts:
        of.add(part)
    return of


def _grouped(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """[B, G, n] of any layout."""
    return x.unflatten(1, (norm.num_groups, -1)).flatten(2)


def _parameters(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as the norm's own call has them: offloading moves them in for the time of a call."""
    if "forward" not in vars(norm) and not norm._forward_pre_hooks:
        return norm.weight, norm.bias
    with _Parameters() as seen:
        norm(x[:, :, :1])
    return seen.found


class _Parameters(TorchFunctionMode):
    """Sees what a GroupNorm is called with, and does not run it."""

    found: tuple[Tensor | None, Tensor | None] = (None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "num_groups", "weight", "bias"), args, strict=False)) | (kwargs or {})
        parameters = given.get("weight"), given.get("bias")
        self.found = tuple(None if parameter is None else parameter.detach() for parameter in parameters)
        return given["input"]
