"""Sliding windows of tiles: a tile attends to all the tiles of a box around it, whole.

    width  w = window / tile, rounded to whole tiles; all c tiles of the axis where the window is as long as the axis
    first  f = clamp(t - w // 2, 0, c - w)
    kept   f <= t' < f + w, on each of the three axes                 for a query tile t and a key tile t'

Zhang et al., "Fast Video Generation with Sliding Tile Attention" (arXiv:2502.04507): windows that move by whole tiles
leave blocks that are either full or empty, and at a border a window stays inside rather than being cut, so that every
query has as many key tiles. Their clamp(t, w // 2, c - 1 - w // 2) of the centre is the same for odd w up to c.

Ours: any grid, by the arrangement's tile, and not only multiples of (6, 8, 8); windows wider than the video; even
widths, which they would widen by one (here the odd tile lies before).

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, n blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import Arrangement, Order

Window = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingTiles:
    """Windows in tokens.

    Args:
        windows: (frames, height, width) in tokens, one for all heads or one for each. The default is theirs for
            HunyuanVideo's 30 x 48 x 80.
    """

    order: ClassVar[Order] = "tiles"
    dynamic: ClassVar[bool] = False

    windows: tuple[Window, ...] = ((18, 24, 24),)

    def __post_init__(self) -> None:
        if not isinstance(self.windows, tuple) or not self.windows or not all(map(_is_window, self.windows)):
            raise ValueError(
                f"SlidingTiles.windows: wanted tuples (frames, height, width) of 1 at least, got {self.windows!r}"
            )

    def refuses(self, heads: int, block_q: int, block_k: int) -> str | None:
        """Why it does not select for a number of heads, or None."""
        if len(self.windows) not in (1, heads):
            return f"SlidingTiles.windows: wanted 1 or {heads}, one a head, got {len(self.windows)}"
        return None

    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [1, H or 1, n, n]; it looks at neither q nor k.

        Raises:
            ValueError: another order than "tiles"; neither one window nor one for each head.
        """
        if arrangement.tile is None:
            raise ValueError(f"SlidingTiles: wanted tokens in the order 'tiles', got {arrangement.order!r}")
        if len(self.windows) not in (1, heads):
            raise ValueError(f"SlidingTiles.windows: wanted 1 or {heads}, one a head, got {len(self.windows)}")
        n, video = arrangement.keys.count, arrangement.keys.video  # those of queries are the same
        masks = {window: _inside(arrangement, window) for window in set(self.windows)}
        keep = torch.zeros(1, len(self.windows), n, n, dtype=torch.bool, device=arrangement.index.device)
        for head, window in enumerate(self.windows):
            keep[0, head, :video, :video] = masks[window]
        return keep


def _is_window(window: object) -> bool:
    return isinstance(window, tuple) and len(window) == 3 and all(isinstance(x, int) and x >= 1 for x in window)


def _inside(arrangement: Arrangement, window: Window) -> Tensor:
    """Which video blocks lie in the window of which, bool [query blocks, key blocks]."""
    grid, boxes = arrangement.tokens.grid, arrangement.keys.boxes
    inside = torch.ones((), dtype=torch.bool, device=boxes.device)
    for axis, size in enumerate((grid.frames, grid.height, grid.width)):
        step = arrangement.tile[axis]
        count = math.ceil(size / step)
        # The last tile may be cut, so that the rounded width of a window over the whole axis would miss it.
        width = count if window[axis] >= size else min(max((2 * window[axis] + step) // (2 * step), 1), count)
        at = boxes[:, axis, 0] // step
        first = (at - width // 2).clamp(0, count - width)
        offset = at - first[:, None]
        inside = inside & (offset >= 0) & (offset < width)
    return inside
