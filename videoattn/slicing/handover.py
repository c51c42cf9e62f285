"""An up block of a UNet that leaves its upsampler to the next.

What an upsampler makes is the largest tensor of a UNet: the next level's picture with this level's channels. The next block
reads it frame by frame, as the upsampler writes it, so that both are one group (Zhan et al., NeurIPS 2024) and a few frames of
it are enough. For that the tensor between the two blocks is the one in front of the upsampler. Nobody else may see it: a
block that is hooked, compiled, or not cut into slices neither gives nor takes.

Letters: N frames, C channels, H rows, W columns.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from videoattn.slicing.install import SlicedForward
from videoattn.slicing.whole import watched


class Handover:
    """From one up block to the next."""

    def __init__(self, giver: SlicedForward, taker: SlicedForward) -> None:
        self.giver = giver
        self.taker = taker
        self._left: weakref.ref[Tensor] | None = None
        self._size: tuple[int, int] | None = None

    def leave(self, x: Tensor, size: tuple[int, int] | None) -> bool:
        """Whether x [N, C, H, W] may be returned as it is; size: (height, width) that the upsampler is to make."""
        if not (_alone(self.giver) and _alone(self.taker) and self.taker.cut):
            return False
        self._left, self._size = weakref.ref(x), size
        return True

    def upsampled(self, whole: Tensor, frames: Tensor) -> Tensor:
        """Some frames of what the taker was given."""
        if self._left is None or self._left() is not whole:
            return frames
        for upsampler in self.giver.module.upsamplers:
            frames = upsampler(hidden_states=frames, output_size=self._size)
        return frames


def connect(sites: Iterable[SlicedForward]) -> None:
    """Up blocks that follow each other hand over; sites of one model, before their first call."""
    blocks = {int(index[1]): site for site in sites if (index := re.fullmatch(r"up_blocks\.(\d+)", site.name))}
    for index, giver in blocks.items():
        taker = blocks.get(index + 1)
        if taker is not None and giver.module.upsamplers is not None:
            giver.groups.gives = taker.groups.takes = Handover(giver, taker)


def _alone(site: SlicedForward) -> bool:
    """Whether a call of the module is a call of the sliced forward, and nobody else sees what goes in and out."""
    module: nn.Module = site.module
    if module._compiled_call_impl is not None or watched(module):
        return False
    return vars(module).get("forward") is site and not any(x.requires_grad for x in module.parameters())
