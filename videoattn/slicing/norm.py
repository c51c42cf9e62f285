"""GroupNorm whose groups reach over slices, exactly: statistics of all slices first, then each slice by itself.

The published code normalises each slice by its own statistics, which is another function (7 % off on a block with a contrast
between its halves). Sums are of fp64 of each slice's fp32 mean and squares around it, and merged by Chan's formula (Chan,
Golub and LeVeque, 1983), so that fp16 inputs with a large mean lose nothing.

Letters: B rows of the batch, C channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Statistics:
    """Of the groups of a GroupNorm, over as many slices as are added."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.count = 0
        self.mean: Tensor | None = None  # fp64 [B, G]
        self.squares: Tensor | None = None  # of what is left without the mean, summed

    def add(self, x: Tensor) -> None:
        """A slice [B, C, ...]."""
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
        norm, shape = self.norm, (x.shape[0], -1, *(1,) * (x.ndim - 2))
        deviation = (self.squares / self.count + norm.eps).sqrt()
        each = norm.num_channels // norm.num_groups
        scale, mean = (y.repeat_interleave(each, dim=1) for y in (1 / deviation, self.mean))
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        return torch.addcmul(shift.float().view(shape), x.float(), scale.float().view(shape)).to(x.dtype)


def statistics(norm: nn.GroupNorm, parts: Iterable[Tensor]) -> Statistics:
    """Of all slices."""
    of = Statistics(norm)
    for part in parts:
        of.add(part)
    return of


def _grouped(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """[B, G, n] of any layout."""
    return x.unflatten(1, (norm.num_groups, -1)).flatten(2)
