"""GroupNorm whose groups reach over slices, exactly: statistics of all slices first, then each slice by itself.

The published code normalises each slice by its own statistics, which is another function (7 % off on a block with a contrast
between its halves). Sums are of fp64 of each slice's fp32 mean and squares around it, and merged by Chan's formula (Chan,
Golub and LeVeque, 1983), so that fp16 inputs with a large mean lose nothing.

In torch this is some fifteen passes over memory, fp32 copies among them; on NVIDIA cards kernels/group_norm.py does it in
three. The same kernels take the place of a GroupNorm within a slice (`FewRows`): slices have few rows, and torch computes
each group of each row on one multiprocessor.

Letters: B rows of the batch, C channels, G groups.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from videoattn import guard
from videoattn.slicing.install import SlicedForward
from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups
from videoattn.testing import excess
from videoattn.verify import FACTOR

PROGRAMS = 4  # rows times groups a multiprocessor: from there on torch keeps all of them busy
LEAST = 2**20  # values: with fewer, what our launches take the host is more than the card can save


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
        if x.is_meta:  # a forecast: the kernels make next to nothing
            self.count, self.mean, self.squares = 1, *x.new_empty(2, x.shape[0], self.norm.num_groups).unbind()
            return
        kernels = _kernels(x)
        if kernels is not None:
            before = None if self.mean is None else kernels.Moments(self.count, self.mean, self.squares)
            self.count, self.mean, self.squares = kernels.moments(x, self.norm.num_groups, before)
            return
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

    def normalised(self, x: Tensor, silu: bool = False) -> Tensor:
        """A slice [B, C, ...] by the statistics of all, with the norm's weight and bias, in x's dtype.

        silu: of the fp32 value, so that there is one rounding, where an operator behind this would round twice.
        """
        if x.is_meta:
            return _room(x)
        if self._scale is None:
            self._scale, self._shift = self._affine(x)
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.normalise(x, self._scale, self._shift, silu=silu, out=_room(x))
        shape = (x.shape[0], -1, *(1,) * (x.ndim - 2))
        y = torch.addcmul(self._shift.view(shape), x.float(), self._scale.view(shape))
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, fp32 [B, C]."""
        norm = self.norm
        weight, bias = _parameters(norm, x)
        kernels = _kernels(x)
        if kernels is not None:
            of = kernels.Moments(self.count, self.mean, self.squares)
            return kernels.affine(of, weight, bias, norm.num_channels, norm.eps)
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


def activated(of: Statistics, x: Tensor, activation: nn.Module) -> Tensor:
    """`activation(of.normalised(x))`, in one pass where it is SiLU."""
    return of.normalised(x, silu=True) if type(activation) is nn.SiLU else activation(of.normalised(x))


class FewRows:
    """The GroupNorms in a module, each by our kernels while its rows are few.

    What lies under a module's call is reached in the norms' own forwards, below the hooks of offloading: a
    TorchFunctionMode around the slices would take the host 2.5 us more for every operator and every look at a shape.

    Args:
        root: all norms in it of the class nn.GroupNorm itself.
        stands_for: of a twin on the meta device, the device of what it is the twin of: there our kernels would run, and what
            they give has another layout than what torch gives.
    """

    def __init__(self, root: nn.Module, stands_for: torch.device | None = None) -> None:
        kind = Sliced(groups=("rows",), forward=functools.partial(_few_rows, stands_for=stands_for))
        norms = (each for each in root.named_modules() if type(each[1]) is nn.GroupNorm)
        self.forwards = [SlicedForward(name, norm, kind) for name, norm in norms]
        for forward in self.forwards:
            forward.groups.counts["rows"] = 2  # else `SlicedForward` runs the module's own

    def install(self) -> None:
        for forward in self.forwards:
            forward.install()

    def remove(self) -> None:
        for forward in self.forwards:
            forward.remove()


def _few_rows(norm: nn.GroupNorm, groups: Groups, input: Tensor, *, stands_for: torch.device | None) -> Tensor:
    """`norm(input)`; in the place of its forward."""
    if stands_for is not None and _pays(norm, input, stands_for) and _module(stands_for) is not None:
        return _room(input)
    kernels = _kernels(input) if _pays(norm, input, input.device) else None
    return nn.GroupNorm.forward(norm, input) if kernels is None else kernels.group_norm(input, norm, out=_room(input))


def _room(x: Tensor) -> Tensor:
    """For a normalised x [B, C, ...]: in its layout, but of a video [B, C, T, H, W] contiguous, as torch's own GroupNorm gives
    it; a convolution over time would copy anything else first."""
    return torch.empty_like(x, memory_format=torch.contiguous_format if x.ndim == 5 else torch.preserve_format)


def _pays(norm: nn.GroupNorm, x: Tensor, device: torch.device) -> bool:
    """Whether torch would leave most of the card idle, and a norm by our kernels is the same norm."""
    if device.type != "cuda" or x.numel() < LEAST or torch.is_autocast_enabled("cuda"):
        return False
    if norm.weight is not None:
        needs_grad = torch.is_grad_enabled() and norm.weight.requires_grad
        if needs_grad or norm.weight.device != x.device or norm.weight.dtype not in (x.dtype, torch.float32):
            return False
    return x.shape[0] * norm.num_groups < PROGRAMS * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _kernels(x: Tensor) -> ModuleType | None:
    """The module of our kernels where they take x [B, C, ...], None where torch is to compute."""
    if x.device.type != "cuda" or x.numel() == 0 or torch.is_grad_enabled() and x.requires_grad:
        return None
    kernels = _module(x.device)
    if kernels is None or kernels.refuses(x) is not None or not _right(kernels, x):
        return None
    return kernels


@functools.cache
def _module(device: torch.device) -> ModuleType | None:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return importlib.import_module("videoattn.kernels.group_norm")


_found: dict[tuple, bool] = {}


def _right(kernels: ModuleType, x: Tensor) -> bool:
    """Whether the kernels are right on x's device, type and order of memory; found out once a process, before they run.

    While a CUDA graph is captured it is not found out, and torch computes.
    """
    key = (x.device, x.dtype, x.stride(1) == 1)
    if key not in _found:
        if guard.capturing(x.device):
            return False
        fault = _fault(kernels, *key)
        if fault is not None:
            warnings.warn(f"GroupNorm in slices by torch, as our kernel is wrong here: {fault}", RuntimeWarning, 3)
        _found[key] = fault is None
    return _found[key]


@torch.no_grad()
def _fault(kernels: ModuleType, device: torch.device, dtype: torch.dtype, channels_last: bool) -> str | None:
    """What is wrong on two slices of a random tensor."""
    generator = torch.Generator(device).manual_seed(0)  # nobody's random numbers change
    norm = nn.GroupNorm(8, 80, device=device, dtype=dtype)
    norm.weight.copy_(torch.linspace(-1, 2, 80))
    norm.bias.copy_(torch.linspace(3, -3, 80))
    x = 10 + 3 * torch.randn(2, 80, 3, 333, generator=generator, device=device)
    x = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    slices = x[..., :160], x[..., 160:]
    with torch.autocast(device.type, enabled=False):
        of = kernels.moments(slices[1], 8, kernels.moments(slices[0], 8))
        affine = kernels.affine(of, norm.weight, norm.bias, 80, norm.eps)
        sliced = torch.cat([kernels.normalise(part, *affine) for part in slices], dim=-1)
        whole, by_torch = kernels.group_norm(x, norm), norm(x)
        exact = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
    return excess(sliced, exact, by_torch, factor=FACTOR) or excess(whole, exact, by_torch, factor=FACTOR)


def _grouped(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """[B, G, n] of any layout."""
    return x.unflatten(1, (norm.num_groups, -1)).flatten(2)


def _parameters(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as the norm's own call has them: offloading moves them in for the time of a call."""
    if isinstance(vars(norm).get("forward", None), SlicedForward | None) and not norm._forward_pre_hooks:
        return norm.weight, norm.bias
    with _Parameters() as seen:
        norm(x[:, :, :0])  # without a value, which no kernel of ours takes
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
