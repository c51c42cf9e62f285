"""Bands: each head attends to near frames, or to its position over all frames, whichever holds more of its attention.

    spatial   |(f T + p) - (f' T + p')| <= w                        for frames f, f' and positions p, p' of F x T tokens
    temporal  |(p F + f) - (p' F + f')| <= w
    width     w = N (1 - sqrt(1 - density)),  as a band of half width w covers 1 - (1 - w / N)^2 of a square

Of the pairs of blocks of the video those are kept that hold the largest share of a band, until they are `density` of all
their pairs of tokens: so both masks cost the same. Which one a head gets is found out at each call, on a few rows of
queries, whose exact attention is computed.

Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity"
(arXiv:2502.01776): the two kinds of heads, the two bands, the choice from sampled rows at each call.

Ours: they compare the squared error of the output, which needs v; here it is the share of the softmax's mass that a
mask keeps, with what is kept anyway. They move the tokens of temporal heads so that their band is one; here the order
is the same for all heads, and the temporal band is stripes: in raster order each as long as its part of a frame. The
rows are spread by the golden ratio and not drawn: no random numbers, and no step that a row of the video could be a
multiple of.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys, N video tokens, S
sampled rows, M masks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Order, block_sums
from videoattn.selection.selector import required

LIMIT = 2**25  # scores at a time: 128 MiB in fp32
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """A spatial or a temporal band for each head; a head with NaN in its scores keeps everything.

    Args:
        density: the share of the pairs of tokens in blocks of the video that each band covers, at least; what is tied
            with the last block is kept too.
        rows: of queries that are sampled.
        order: in which the tokens lie; raster holds most of both bands, as its blocks are short in time and in place.
    """

    dynamic: ClassVar[bool] = True

    density: float = 0.3
    rows: int = 64
    order: Order = "raster"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"Bands.density: wanted a share above 0, 1 at most, got {self.density!r}")
        if not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"Bands.rows: wanted 1 at least, got {self.rows!r}")
        if self.order not in ORDERS:
            raise ValueError(f"Bands.order: wanted one of {', '.join(ORDERS)}, got {self.order!r}")

    @torch.no_grad()
    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [B, H, nq, nk].

        Args:
            q: [B, P, H, D]. k: [B, P, Hkv, D], Hkv divides H (query head h reads key head h // (H / Hkv)).

        Raises:
            ValueError: no q or k.
        """
        if q is None or k is None:
            raise ValueError("Bands: wanted q and k, which the choice of a band goes by, got none")
        masks = bands(arrangement, self.density)
        # What is kept anyway counts for both: a band is worth what it adds.
        spatial, temporal = shares(masks | required(arrangement), arrangement, self.rows, q, k, scale)
        chosen = torch.where((spatial >= temporal)[..., None, None], masks[0], masks[1])
        return chosen | (spatial + temporal).isnan()[..., None, None]  # what cannot be judged must not be left out


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def bands(arrangement: Arrangement, density: float) -> Tensor:
    """The spatial and the temporal band, bool [2, nq, nk]; cached by the arrangement itself, which is of one grid."""
    grid, queries, keys = arrangement.tokens.grid, arrangement.queries, arrangement.keys
    masks = torch.zeros(2, queries.count, keys.count, dtype=torch.bool, device=arrangement.index.device)
    if not queries.video or not keys.video:  # a short one may share its only block with text
        return masks
    area, number = grid.height * grid.width, arrangement.index - arrangement.tokens.before
    coordinates = number, number % area * grid.frames + number // area
    for mask, coordinate in zip(masks, coordinates, strict=True):
        mask[: queries.video, : keys.video] = _band(arrangement, coordinate, density)
    return masks


def _band(arrangement: Arrangement, coordinate: Tensor, density: float) -> Tensor:
    """Video blocks that hold most of a band along a coordinate int64 [P] of the video's tokens: bool [nq, nk]."""
    total, queries, keys = arrangement.tokens.grid.tokens, arrangement.queries, arrangement.keys
    half = math.ceil(total * (1 - math.sqrt(1 - density)))
    of_queries, of_keys = (x.cut(coordinate)[: x.video] for x in (queries, keys))
    low, high = (of_keys - half).clamp(min=0).int(), (of_keys + half + 1).clamp(max=total).int()
    taken = keys.taken[: keys.video]
    inside = coordinate.new_empty(queries.video, keys.video, dtype=torch.float64)  # pairs of tokens in the band
    for row, places in zip(inside, of_queries, strict=True):
        there = torch.zeros(total, dtype=torch.int32, device=coordinate.device)
        there[places] = 1  # an empty place repeats a token of its block
        until = torch.nn.functional.pad(there.cumsum(0, dtype=torch.int32), (1, 0)).float()
        seen = until.index_select(0, high.flatten()) - until.index_select(0, low.flatten())
        row.copy_((seen.view(-1, keys.size) * taken).sum(-1))
    pairs = queries.live[: queries.video, None].long() * keys.live[: keys.video]
    # Of blocks that hold the same, the nearer ones first; the term is too small to matter between others.
    middle_q, middle_k = (
        (of_blocks * x.taken[: x.video]).sum(-1) / x.live[: x.video]
        for x, of_blocks in ((queries, of_queries), (keys, of_keys))
    )
    key = inside / pairs - 1e-9 * (middle_q[:, None] - middle_k).abs() / total
    ordered, at = key.flatten().sort(descending=True)
    last = (pairs.flatten()[at].cumsum(0) < density * pairs.sum().double()).sum().clamp(max=at.numel() - 1)
    return key >= ordered[last]


def shares(
    masks: Tensor, arrangement: Arrangement, rows: int, q: Tensor, k: Tensor, scale: float | None = None
) -> Tensor:
    """How much of the softmax's mass masks bool [M, nq, nk] keep, the mean over sampled rows: fp32 [M, B, H].

    Args:
        rows, q, k, scale: as of `Bands`.
    """
    (b, _, h, d), hkv = q.shape, k.shape[2]
    places = sampled(arrangement, rows)
    kept = masks[:, places // arrangement.queries.size].float().flatten(1)  # [M, S nk]
    empty = arrangement.empty
    step = max(LIMIT // (b * h // hkv * places.numel() * empty.numel()), 1)  # key heads at a time
    found = []
    with torch.autocast(q.device.type, enabled=False):
        grouped = q[:, places].unflatten(2, (hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, H / Hkv S, D]
        for some_q, some_k in zip(grouped.split(step, dim=1), k.split(step, dim=2), strict=True):
            scores = some_q.float() @ some_k.float().permute(0, 2, 3, 1) * (d**-0.5 if scale is None else scale)
            mass = block_sums(scores.masked_fill_(empty, -torch.inf).softmax(-1), arrangement.keys.size, -1)
            mass = mass.unflatten(2, (h // hkv, -1)).flatten(1, 2)  # [B, H, S, nk]
            found.append(mass.flatten(2) @ kept.T / places.numel())
    return torch.cat(found, dim=1).permute(2, 0, 1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def sampled(arrangement: Arrangement, rows: int) -> Tensor:
    """Places of at most `rows` video tokens, evenly spread, each once: int64 [S]."""
    first, total = arrangement.tokens.before, arrangement.tokens.grid.tokens
    numbers = range(total) if rows >= total else {int((i + 0.5) * GOLDEN % 1 * total) for i in range(rows)}
    return arrangement.places[torch.tensor(sorted(numbers), device=arrangement.places.device) + first]
