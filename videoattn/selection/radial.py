"""Radial attention: the further two frames are apart, the narrower the window between them.

For two tokens at the positions k, l (row by row) of two frames d apart, of T tokens each:

    octave    o = floor(log2(max(d, 1)))
    narrowest a = min(block of keys, T)
    window    w = T where d <= 1, max(decay_factor T / 2^o, a) elsewhere
    kept      |k - l| + 1 <= w,  and where T / 2^o < a only from frames with d mod ceil(a 2^o / T) = 0

so that the tokens seen at a distance halve as it doubles: O(N log N) in all. A pair of blocks is kept where more than
60 % of its key tokens that any query sees are seen by more than a third of its queries.

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
(arXiv:2506.19852): with blocks of one token and decay_factor 1 this is their mask, token for token. From their code:
decay_factor, a block in the place of one token as the narrowest window, and the rule for blocks, which keeps a triangle
at the edge of a band from about 0.35 of its area on; to keep each pair that is seen at all would widen each band by up
to a block on either side.

Ours: T itself, where their code takes the next power of two; frames smaller than a block (theirs sees no far frame
then); the rule for blocks over whole blocks and the queries that are there, not frame by frame, so that it holds in any
order of tokens. The first frame, a sink of theirs, is for the caller to add.

Letters: nq and nk blocks of queries and of keys, N video tokens, F frames, T tokens of a frame, L windows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Radial:
    """Windows that shrink with the distance in time.

    Args:
        decay_factor: on the windows of frames that are not neighbours. 1 is the paper's formula; their scripts take 0.2
            on Wan 2.1, 0.8 on Wan 2.2, 0.95 on HunyuanVideo.
        order: in which the tokens lie.
    """

    dynamic: ClassVar[bool] = False

    decay_factor: float = 1.0
    order: Order = "raster"

    def __post_init__(self) -> None:
        if not 0 < self.decay_factor < math.inf:
            raise ValueError(f"Radial.decay_factor: wanted a number above 0, got {self.decay_factor!r}")
        if self.order not in ORDERS:
            raise ValueError(f"Radial.order: wanted one of {', '.join(ORDERS)}, got {self.order!r}")

    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [1, 1, nq, nk]; it looks at neither q nor k."""
        queries, keys = arrangement.queries, arrangement.keys
        keep = torch.zeros(1, 1, queries.count, keys.count, dtype=torch.bool, device=arrangement.index.device)
        keep[..., : queries.video, : keys.video] = _kept(arrangement, self.decay_factor)
        return keep


def reach(distance: int, area: int, block: int, decay_factor: float) -> int:
    """How far apart in their frames two tokens may be that see one another; -1 where none does.

    Args:
        distance: of the frames. area: tokens of a frame. block: of keys.
    """
    if distance <= 1:
        return area - 1
    octave, narrowest = distance.bit_length() - 1, min(block, area)
    if area < narrowest << octave and distance % -(-(narrowest << octave) // area):
        return -1
    return min(int(max(decay_factor * area / 2**octave * (1 + 1e-12), narrowest)), area) - 1


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _kept(arrangement: Arrangement, decay_factor: float) -> Tensor:
    """The mask of the video's blocks, bool [nq, nk]; cached by the arrangement itself, which is of one grid.

    Block by block of queries: how many of them see each key token is the difference of two running sums over the
    positions of a frame, for each of the few windows.
    """
    grid, device = arrangement.tokens.grid, arrangement.index.device
    queries, keys = arrangement.queries, arrangement.keys
    frames, area = grid.frames, grid.height * grid.width
    reaches = [reach(distance, area, keys.size, decay_factor) for distance in range(frames)]
    windows = torch.tensor(sorted(set(reaches) - {-1}), device=device)  # [L]
    numbers = torch.arange(frames, device=device)
    between = torch.tensor(reaches, device=device)[(numbers - numbers[:, None]).abs()]
    uses = (between[:, None] == windows[:, None]).float()  # [F of queries, L, F of keys]
    positions = torch.arange(area, device=device)
    low, high = (positions - windows[:, None]).clamp(min=0), (positions + windows[:, None] + 1).clamp(max=area)

    number = arrangement.index - arrangement.tokens.before
    of_keys, taken = keys.cut(number)[: keys.video].flatten().int(), keys.taken[: keys.video]
    kept = torch.empty(queries.video, keys.video, dtype=torch.bool, device=device)
    of_queries = zip(kept, queries.cut(number), queries.boxes[:, 0].tolist(), queries.live.tolist(), strict=False)
    for row, tokens, (first, last), count in of_queries:
        span = last - first + 1
        there = torch.zeros(span * area, dtype=torch.int32, device=device)
        there[tokens - first * area] = 1  # an empty place repeats a token of its block
        until = torch.nn.functional.pad(there.view(span, area).cumsum(-1, dtype=torch.int32), (1, 0)).float()
        inside = until[:, high] - until[:, low]  # [span, L, T]
        seen = uses[first : last + 1].flatten(0, 1).T @ inside.flatten(0, 1)  # [F, T], queries that see each key
        seen = seen.flatten().index_select(0, of_keys).view(-1, keys.size)
        many, some = ((seen > least) & taken for least in (count / 3, 0))
        row.copy_(5 * many.sum(-1) > 3 * some.sum(-1))
    return kept
