"""How the tokens of a video lie in blocks: raster order, tiles of (frames, height, width), or Morton order.

Attention is local in space and time, so a block of neighbours in all three needs fewer other blocks than one of 128 tokens
of a line. Order and blocks are worked out once for a size. Text has blocks of its own, behind the video's, so that it can
be kept whole. Every block has `block` places; `live` says how many are taken, the first ones; a place that is empty holds a
copy of a token, so that nothing in it can be NaN, and kernels mask it.

Tiles: as many tokens of a box as fit into a block, so that a window of tiles needs no masks inside (Sliding Tile Attention,
Zhang et al., arXiv:2502.04507). Their box is fixed; here it is a compact one that leaves few places empty on the grid at
hand: (7, 3, 6) on Wan's 21 x 30 x 52 leaves 5 %, where (4, 4, 8) would leave 24 %.

Morton order: by the interleaved bits of (frame, row, column) (Morton, 1966), without empty places but at the end.

Letters: N tokens, P places, n blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from videoattn.call import Grid

Order = Literal["raster", "tiles", "morton"]
ORDERS: tuple[Order, ...] = get_args(Order)
Tile = tuple[int, int, int]

SLACK = 1.05  # that many more places for a compact box


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of one sequence: text, the video frame by frame, text.

    Args:
        grid: the video's. before, after: text tokens.
    """

    grid: Grid
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if self.grid.tokens < 1 or min(self.before, self.after) < 0:
            raise ValueError(f"Tokens: wanted a video, and 0 or more tokens of text, got {self}")

    @property
    def count(self) -> int:
        return self.before + self.grid.tokens + self.after


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrangement:
    """Tokens in blocks; the video's blocks first, then the text's.

    Args:
        tokens, order, block: what was asked for. tile: (frames, height, width) of a block where the order is by tiles.
        index: int64 [P], the token at each place; an empty place repeats the last of its block, which selectors rely on.
        places: int64 [N], the place of each token.
        live: int32 [n], how many places of a block are taken.
        video_blocks: how many of the n are the video's.
        boxes: int64 [video_blocks, 3, 2], first and last frame, row and column of each block.
    """

    tokens: Tokens
    order: Order
    block: int
    tile: Tile | None
    index: Tensor
    places: Tensor
    live: Tensor
    video_blocks: int
    boxes: Tensor

    @property
    def blocks(self) -> int:
        return self.live.shape[0]

    def arranged(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [B, P, ...]."""
        return x.index_select(1, self.index)

    def restored(self, x: Tensor) -> Tensor:
        """x [B, P, ...] -> [B, N, ...]."""
        return x.index_select(1, self.places)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be used outside of it
def arrange(tokens: Tokens, order: Order, block: int, device: torch.device, tile: Tile | None = None) -> Arrangement:
    """Lay tokens out in blocks.

    Args:
        block: places of a block.
        tile: of the order "tiles"; `best_tile` where None.

    Raises:
        ValueError: an unknown order, blocks without places, a tile that does not fit into a block.
    """
    if order not in ORDERS:
        raise ValueError(f"order: wanted one of {', '.join(ORDERS)}, got {order!r}")
    if block < 1:
        raise ValueError(f"arrange: wanted blocks of one token at least, got {block}")
    if tile is not None and (order != "tiles" or min(tile) < 1 or math.prod(tile) > block):
        raise ValueError(f"tile: wanted at most {block} tokens, in the order 'tiles', got {tile} in {order!r}")
    if order == "tiles" and tile is None:
        tile = best_tile(tokens.grid, block)
    first = tokens.before
    video = [[first + at for at in group] for group in _groups(tokens.grid, order, block, tile)]
    text = [*range(first), *range(first + tokens.grid.tokens, tokens.count)]
    groups = video + [text[at : at + block] for at in range(0, len(text), block)]

    live = torch.tensor([len(group) for group in groups], dtype=torch.int32)
    index = torch.tensor([group + group[-1:] * (block - len(group)) for group in groups]).flatten()
    taken = (torch.arange(block) < live[:, None]).flatten()
    places = torch.empty(tokens.count, dtype=torch.int64)
    places[index[taken]] = taken.nonzero().flatten()
    positions = _positions(tokens.grid)
    boxes = torch.stack([_box(positions, group, first) for group in video])
    index, places, live, boxes = (x.to(device) for x in (index, places, live, boxes))
    return Arrangement(
        tokens=tokens,
        order=order,
        block=block,
        tile=tile,
        index=index,
        places=places,
        live=live,
        video_blocks=len(video),
        boxes=boxes,
    )


@functools.lru_cache(maxsize=64)
def best_tile(grid: Grid, block: int) -> Tile:
    """The most compact box of at most `block` tokens among those that need few tiles: SLACK times the fewest at most.

    >>> best_tile(Grid(frames=21, height=30, width=52), 128)
    (7, 3, 6)
    """
    found = []
    for t in range(1, min(grid.frames, block) + 1):
        for y in range(1, min(grid.height, block // t) + 1):
            for x in range(1, min(grid.width, block // (t * y)) + 1):
                tiles = math.ceil(grid.frames / t) * math.ceil(grid.height / y) * math.ceil(grid.width / x)
                surface = (t * y + y * x + t * x) / (t * y * x) ** (2 / 3)
                found.append((surface, tiles, (t, y, x)))
    few = SLACK * min(tiles for _, tiles, _ in found)
    return min(each for each in found if each[1] <= few)[2]


def _positions(grid: Grid) -> Tensor:
    """Frame, row and column of each video token, int64 [N, 3]."""
    axes = (torch.arange(size) for size in (grid.frames, grid.height, grid.width))
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def _box(positions: Tensor, group: list[int], first: int) -> Tensor:
    low, high = positions[torch.tensor(group) - first].aminmax(dim=0)
    return torch.stack([low, high], dim=1)


def _groups(grid: Grid, order: Order, block: int, tile: Tile | None) -> list[list[int]]:
    """The video's tokens, block by block, counted from its first."""
    positions = _positions(grid)
    if order == "tiles":
        counts = [
            math.ceil(size / step) for size, step in zip((grid.frames, grid.height, grid.width), tile, strict=True)
        ]
        t, y, x = (positions // torch.tensor(tile)).unbind(1)
        number = (t * counts[1] + y) * counts[2] + x
        order_of = number.argsort(stable=True).tolist()
        sizes = number.bincount(minlength=math.prod(counts)).tolist()
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return [order_of[a:b] for a, b in itertools.pairwise(starts)]
    order_of = range(grid.tokens) if order == "raster" else _morton(positions).argsort(stable=True).tolist()
    return [list(order_of[at : at + block]) for at in range(0, grid.tokens, block)]


def _morton(positions: Tensor) -> Tensor:
    """The bits of frame, row and column in turn, the column's lowest."""
    code = torch.zeros(positions.shape[0], dtype=torch.int64)
    for bit in range(20):
        for axis in range(3):
            code |= (positions[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return code
