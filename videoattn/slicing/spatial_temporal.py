"""What the blocks of video UNets share: features of which some frames, or some places, run at a time.

Operators of one domain are a group (Zhan et al., "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference",
NeurIPS 2024): "spatial" ones see a frame by itself, "temporal" ones a place of the picture by itself in all frames. What a
group makes goes where its input lay, wherever the block itself made that input, so that a block of any number of layers has
one tensor of its own beside those that it was given.

Letters: B videos, T frames of each, N = B T, C channels, H rows, W columns, P = H W places; n of a slice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from videoattn.slicing.norm import Statistics, statistics
from videoattn.slicing.slices import Groups
from videoattn.slicing.whole import hooked, needs_host

Given = dict[str, Any]
"""Arguments of a call by their names."""


def forward(run: Callable[[nn.Module, Groups, Given], object]) -> Callable[..., object]:
    """A sliced forward from a function of the arguments' names; the host's own where slices could not do what it does."""

    @functools.wraps(run)
    def called(module: nn.Module, groups: Groups, *args, **kwargs):
        bound = _signature(type(module)).bind(module, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        deprecated = given.pop("args", ()) or given.pop("kwargs", {})
        if deprecated or needs_host(module, given["hidden_states"]):
            return type(module).forward(module, *args, **kwargs)
        return run(module, groups, given)

    return called


@functools.cache
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)


def not_of(kind: type, modules: nn.ModuleList) -> str | None:
    """Why modules cannot be taken apart as those of the class are."""
    other = next((module for module in modules if type(module) is not kind), None)
    return None if other is None else f"{type(other).__name__} is in the place of {kind.__name__}"


class Features:
    """Features on their way through a block.

    Args:
        x: [N, C, H, W], as the block is given them: not written to. frames: T.
    """

    def __init__(self, groups: Groups, x: Tensor, frames: int) -> None:
        self.groups = groups
        self.x = x
        self.frames = frames
        self._own = False  # x was made by slices of this block, and nobody else has it

    @property
    def videos(self) -> int:
        return len(self.x) // self.frames

    @property
    def places(self) -> int:
        return self.x.shape[2] * self.x.shape[3]

    def kept(self) -> Tensor:
        """x, which from now on others have too."""
        self._own = False
        return self.x

    def replace(self, x: Tensor) -> None:
        """By what a module made, which may be keeping it."""
        self.x, self._own = x, False

    def replace_video(self, video: Tensor) -> None:
        """By [B, C, T, P]."""
        self.replace(video.transpose(1, 2).flatten(0, 1).unflatten(2, self.x.shape[2:]))

    def video(self) -> Tensor:
        """x as [B, C, T, P]."""
        return _video(self.x, self.frames)

    def across_time(self, module: nn.Module) -> bool:
        """Whether a temporal module is to be taken apart."""
        self.groups.sizes["temporal"] = self.places
        return self.groups.counts["temporal"] > 1 and not hooked(module)

    def statistics(self, norm: nn.GroupNorm) -> Statistics:
        """Of a GroupNorm over [B, C, T, P]."""
        video = self.video()
        slices = self.groups.ranges("temporal", self.places)
        with self.groups.within("temporal"):
            return statistics(norm, (video[..., start:stop] for start, stop in slices))

    def spatial(self, part: Operator, *, resized: bool = False) -> None:
        """A group on frames.

        Args:
            part: (x [n, C, H, W], take) -> [n, C', H', W']; `take` gives the same rows of anything that has N of them.
            resized: its output has another shape than x where x is the block's own.
        """
        x, size = self.x, len(self.x)

        def run(start: int, stop: int) -> Tensor:
            return part(x[start:stop], Take(size, lambda y: y[start:stop]))

        self.x = self.groups.run("spatial", run, size, out=x if self._own and not resized else None)
        self._own = min(self.groups.counts["spatial"], size) > 1

    def temporal(self, part: Callable[[int, int], Tensor]) -> None:
        """A group on places: (start, stop) -> [B, C, T, n], which may depend on x at these places and no others."""
        cut = self.groups.counts["temporal"] > 1
        out = _video(self.x if self._own else torch.empty_like(self.x), self.frames) if cut else None
        self.replace_video(self.groups.run("temporal", part, self.places, dim=3, out=out))
        self._own = cut


class Take:
    """The rows of a slice, of arguments.

    Args:
        size: rows of all slices. rows: of a tensor that has so many, those of the slice.
    """

    def __init__(self, size: int, rows: Callable[[Tensor], Tensor]) -> None:
        self.size = size
        self.rows = rows

    def __call__(self, value: Any, *, named: bool = True) -> Any:
        """Of a tensor, or of all those in a tuple, list or dict: IP-Adapter's images, GLIGEN's boxes.

        named: by the host, so that its tensors have a row for each row of the features, or one for all; in a dict they may
            have anything.

        Raises:
            ValueError: they have not. A slice might happen to have as many rows, and then be wrong in silence.
        """
        if isinstance(value, Tensor):
            if value.ndim and len(value) == self.size:
                return self.rows(value)
            if named and value.ndim and len(value) != 1:
                raise ValueError(f"slicing: wanted arguments of {self.size} rows, or of 1, got {tuple(value.shape)}")
            return value
        if isinstance(value, dict):
            return {key: self(each, named=False) for key, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(each, named=named) for each in value)
        return value


Operator = Callable[[Tensor, Take], Tensor]
"""(x [n, C, H, W], the slice's rows of arguments) -> [n, C', H', W']."""


def _joined(module: nn.Module, groups: Groups, given: Given) -> Iterator[Operator]:
    """Of each layer of an up block what makes some frames of its input: x beside its skip tensor, both as FreeU (Si et al.,
    2023) scales them where it is enabled; in front of the first layer also what the block before has left to this one."""
    scales = {name: getattr(module, name, None) for name in ("s1", "s2", "b1", "b2")}
    arriving = None if groups.takes is None else given["hidden_states"]

    def join(x: Tensor, take: Take, *, skip: Tensor, first: bool) -> Tensor:
        if first and arriving is not None:
            x = groups.takes.upsampled(arriving, x)
        skip = take(skip)
        if all(scales.values()):
            x, skip = apply_freeu(module.resolution_idx, x.clone(), skip, **scales)  # it writes to x
        return torch.cat([x, skip], dim=1)

    for index, skip in enumerate(reversed(given["res_hidden_states_tuple"])):
        yield functools.partial(join, skip=skip, first=index == 0)


def down(module: nn.Module, features: Features, layer: Callable[[int], None]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A down block: (x, and all that the up blocks take from here). layer: runs the layer of a number on the features."""
    states = []
    for index in range(len(module.resnets)):
        layer(index)
        states.append(features.kept())
    if module.downsamplers is not None:
        for downsampler in module.downsamplers:
            features.spatial(lambda x, take, run=downsampler: run(hidden_states=x), resized=True)
        states.append(features.kept())
    return features.x, tuple(states)


def up(module: nn.Module, features: Features, given: Given, layer: Callable[[int, Operator], None]) -> Tensor:
    """An up block: x, or twice its size. layer: runs the layer of a number, whose input the second argument makes."""
    for index, join in zip(range(len(module.resnets)), _joined(module, features.groups, given), strict=False):
        layer(index, join)
    _upsample(module, features, given["upsample_size"])
    return features.x


def _upsample(module: nn.Module, features: Features, size: Any) -> None:
    """To (height, width), or twice the size; or not yet, where the next block does it."""
    if module.upsamplers is None or (
        features.groups.gives is not None and features.groups.gives.leave(features.x, size)
    ):
        return
    for upsampler in module.upsamplers:
        features.spatial(lambda x, take, run=upsampler: run(hidden_states=x, output_size=size), resized=True)


def mix_frames(
    module: nn.Module,
    features: Features,
    text: Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    **labels: Any,
) -> None:
    """A transformer over the frames of each place, in the place of its input: GroupNorm over (C/G, T, H, W), projection,
    blocks on [B n, T, C], projection, residual.

    Args:
        text: [B P, ...] of cross-attention. kwargs: of attention. labels: of adaptive norms.
    """
    before = features.statistics(module.norm)
    video, videos, places = features.video(), features.videos, features.places

    def part(start: int, stop: int) -> Tensor:
        x = video[..., start:stop]
        take = Take(videos * places, lambda y: y.unflatten(0, (videos, places))[:, start:stop].flatten(0, 1))
        y = before.normalised(x).permute(0, 3, 2, 1).flatten(0, 1)
        y = module.proj_in(input=y)
        for block in module.transformer_blocks:
            y = block(hidden_states=y, encoder_hidden_states=take(text), cross_attention_kwargs=take(kwargs), **labels)
        y = module.proj_out(input=y)
        return y.unflatten(0, (videos, -1)).permute(0, 3, 2, 1) + x

    features.temporal(part)


def mixing(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """Forward of such a transformer by itself."""
    x = given["hidden_states"]
    features = Features(groups, x, given["num_frames"])
    labels = {name: given[name] for name in ("timestep", "class_labels")}
    mix_frames(module, features, given["encoder_hidden_states"], given["cross_attention_kwargs"], **labels)
    return features.x


def _video(x: Tensor, frames: int) -> Tensor:
    """[N, C, H, W] as [B, C, T, P], a view."""
    return x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)
