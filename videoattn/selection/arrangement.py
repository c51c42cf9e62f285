"""How the tokens of a video lie in blocks: raster order, tiles of (frames, height, width), or Morton order.

Attention is local in space and time, so a block of neighbours in all three needs fewer other blocks than one of 128 tokens
of a line. Order and blocks are worked out once for a size. The video comes first, then text. Blocks of queries and of keys
may differ in size, as the tiles of kernels do.

Raster and Morton order are compact: as many places as tokens, cut into blocks of consecutive ones, of which the last may
be cut short. So one block may hold both video and text. It counts as text, which is kept whole. Morton order: by the
interleaved bits of (frame, row, column) (Morton, 1966).

Tiles: as many tokens of a box as fit into a block, so that a window of tiles needs no masks inside (Sliding Tile Attention,
Zhang et al., arXiv:2502.04507). Their box is fixed; here it is a compact one that leaves few places empty on the grid at
hand: (7, 3, 6) on Wan's 21 x 30 x 52 leaves 5 %, where (4, 4, 8) would leave 24 %. Text has blocks of its own. Every block
has all its places; the first ones are taken; an empty one holds a copy of a token, so that nothing in it can be NaN, and
kernels mask it.

Letters: N tokens, P places, n blocks.
"""

from __future__ import annotations

import functools
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
class Blocks:
    """Blocks of consecutive places, of queries or of keys.

    Args:
        size: places of a block; the last block has what is left of P.
        live: int32 [n], how many places of a block are taken, the first ones; one at least.
        video: how many of the n hold video only, the first ones; the others are text's.
        boxes: int64 [video, 3, 2], first and last frame, row and column of each of these.
    """

    size: int
    live: Tensor
    video: int
    boxes: Tensor

    @property
    def count(self) -> int:
        return self.live.shape[0]

    @property
    def taken(self) -> Tensor:
        """Which places hold a token, bool [n, size]."""
        return torch.arange(self.size, device=self.live.device) < self.live[:, None]

    def cut(self, x: Tensor) -> Tensor:
        """x [P, ...] -> [n, size, ...]; where the last block is cut short, its last place repeats."""
        return _cut(x, self.count, self.size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrangement:
    """Tokens at their places.

    Args:
        tokens, order: what was asked for. tile: (frames, height, width) of a block where the order is by tiles.
        index: int64 [P], the token at each place; an empty place repeats the last of its block, which selectors rely on.
        places: int64 [N], the place of each token.
        queries, keys: the blocks that the places are cut into.
    """

    tokens: Tokens
    order: Order
    tile: Tile | None
    index: Tensor
    places: Tensor
    queries: Blocks
    keys: Blocks

    @property
    def empty(self) -> Tensor:
        """Which places hold no token of their own, bool [P]; none outside of the order "tiles"."""
        return ~self.keys.taken.flatten()[: self.index.shape[0]]

    def arranged(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [B, P, ...]."""
        return x.index_select(1, self.index)

    def restored(self, x: Tensor) -> Tensor:
        """x [B, P, ...] -> [B, N, ...]."""
        return x.index_select(1, self.places)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be used outside of it
def arrange(
    tokens: Tokens, order: Order, device: torch.device, *, block_q: int, block_k: int, tile: Tile | None = None
) -> Arrangement:
    """Lay tokens out in blocks.

    Args:
        block_q, block_k: places of a block of queries and of keys; alike in the order "tiles".
        tile: of the order "tiles"; `best_tile` where None.

    Raises:
        ValueError: an unknown order, blocks without places, tiles in blocks of two sizes, a tile that does not fit into
            a block.
    """
    if order not in ORDERS:
        raise ValueError(f"order: wanted one of {', '.join(ORDERS)}, got {order!r}")
    if min(block_q, block_k) < 1:
        raise ValueError(f"arrange: wanted blocks of one token at least, got {block_q} queries and {block_k} keys")
    if order == "tiles" and block_q != block_k:
        raise ValueError(f"arrange: wanted blocks of one size in the order 'tiles', got {block_q} and {block_k}")
    if tile is not None and (order != "tiles" or min(tile) < 1 or math.prod(tile) > block_q):
        raise ValueError(f"tile: wanted at most {block_q} tokens, in the order 'tiles', got {tile} in {order!r}")
    if order == "tiles" and tile is None:
        tile = best_tile(tokens.grid, block_q)
    first, video = tokens.before, tokens.grid.tokens
    positions = _positions(tokens.grid)
    rank = _rank(positions, tokens.grid, order, tile)
    behind = first + video
    index = torch.cat([rank.argsort(stable=True) + first, torch.arange(first), torch.arange(behind, tokens.count)])
    if order == "tiles":
        of_tiles = rank.bincount()
        live = torch.cat([of_tiles, _sizes(tokens.count - video, block_q)])
        slots = torch.minimum(torch.arange(block_q), live[:, None] - 1)
        index = index[(live.cumsum(0) - live)[:, None] + slots].flatten()

    def blocks(size: int) -> Blocks:
        if order == "tiles":
            filled, pure = live, of_tiles.numel()
        else:
            filled = _sizes(tokens.count, size)
            pure = filled.numel() if tokens.count == video else video // size
        low, high = positions[_cut(index, pure, size) - first].aminmax(dim=1)
        boxes = torch.stack([low, high], dim=-1).to(device)
        return Blocks(size=size, live=filled.to(device, torch.int32), video=pure, boxes=boxes)

    queries = blocks(block_q)
    keys = queries if block_k == block_q else blocks(block_k)
    index = index.to(device)
    places = torch.empty(tokens.count, dtype=torch.int64, device=device)
    taken = queries.taken.flatten()[: index.shape[0]].nonzero().flatten()
    places[index[taken]] = taken
    return Arrangement(tokens=tokens, order=order, tile=tile, index=index, places=places, queries=queries, keys=keys)


def block_sums(x: Tensor, size: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sums of x over blocks of `size` along a dimension, of which the last may be shorter; nothing of x is copied."""
    length = x.shape[dim]
    whole = length // size
    sums = x.narrow(dim, 0, whole * size).unflatten(dim, (whole, size)).sum(dim + 1 if dim >= 0 else dim, dtype=dtype)
    if whole * size == length:
        return sums
    return torch.cat([sums, x.narrow(dim, whole * size, length % size).sum(dim, keepdim=True, dtype=dtype)], dim)


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


def _sizes(count: int, size: int) -> Tensor:
    """Of the blocks that `count` places are cut into, int64 [n]."""
    return (count - torch.arange(0, count, size)).clamp(max=size)


def _cut(x: Tensor, blocks: int, size: int) -> Tensor:
    """The first blocks of x [P, ...], its last place repeated beyond its end: [blocks, size, ...]."""
    at = torch.arange(blocks * size, device=x.device).clamp(max=x.shape[0] - 1)
    return x[at].unflatten(0, (blocks, size))


def _rank(positions: Tensor, grid: Grid, order: Order, tile: Tile | None) -> Tensor:
    """What the video's tokens are sorted by, int64 [N]; of tiles their number, frame by frame and row by row."""
    if order == "raster":
        return torch.arange(grid.tokens)
    if order == "morton":
        return _morton(positions)
    t, y, x = (positions // torch.tensor(tile)).unbind(1)
    return (t * math.ceil(grid.height / tile[1]) + y) * math.ceil(grid.width / tile[2]) + x


def _morton(positions: Tensor) -> Tensor:
    """The bits of frame, row and column in turn, the column's lowest."""
    code = torch.zeros(positions.shape[0], dtype=torch.int64)
    for bit in range(20):
        for axis in range(3):
            code |= (positions[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return code
