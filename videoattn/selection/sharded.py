"""Shards: each head attends to its neighbourhood and to every v-th block, and other heads to other ones.

    kept   (key block + head) mod v = 0,  or the boxes of both blocks are at most `reach` apart
    v      = min(shards, heads)

Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads" (arXiv:2407.17678): together the heads
see everything, each only a share, and which blocks a head reads does not depend on the query.

That together they see everything is so only where there are as many heads as shards; the published code does not ask
for it. Here v is therefore never more than the number of heads. Theirs is causal, with a neighbourhood along the
sequence. Here nothing is causal, positions are absolute (relative ones, their default without causality, give all heads
the same blocks), and neighbours are so in the video: blocks whose boxes touch in frames, rows and columns.

Letters: H heads, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """A neighbourhood and a share of the rest.

    Args:
        shards: into how many shares the blocks are dealt; at most as many as there are heads are.
        reach: (frames, height, width), how many tokens the boxes of two blocks may be apart on each axis to be
            neighbours; 0 where they overlap on it, 1 where they touch.
        order: in which the tokens lie.
    """

    dynamic: ClassVar[bool] = False

    shards: int = 4
    reach: tuple[int, int, int] = (1, 1, 1)
    order: Order = "tiles"

    def __post_init__(self) -> None:
        if not isinstance(self.shards, int) or self.shards < 1:
            raise ValueError(f"Sharded.shards: wanted 1 at least, got {self.shards!r}")
        reach = self.reach
        if not isinstance(reach, tuple) or len(reach) != 3 or not all(isinstance(x, int) and x >= 0 for x in reach):
            raise ValueError(f"Sharded.reach: wanted a tuple (frames, height, width) of 0 at least, got {reach!r}")
        if self.order not in ORDERS:
            raise ValueError(f"Sharded.order: wanted one of {', '.join(ORDERS)}, got {self.order!r}")

    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [1, H, nq, nk]; it looks at neither q nor k."""
        queries, keys = arrangement.queries, arrangement.keys
        device = arrangement.index.device
        first_q, last_q = queries.boxes[:, None].unbind(-1)
        first_k, last_k = keys.boxes.unbind(-1)
        apart = torch.maximum(first_k - last_q, first_q - last_k)  # [nq, nk, 3], at most 0 where they overlap
        near = (apart <= torch.tensor(self.reach, device=device)).all(-1)
        share = torch.arange(keys.video, device=device) + torch.arange(heads, device=device)[:, None]
        share = share % min(self.shards, heads) == 0
        keep = torch.zeros(1, heads, queries.count, keys.count, dtype=torch.bool, device=device)
        keep[0, :, : queries.video, : keys.video] = near | share[:, None]
        return keep
