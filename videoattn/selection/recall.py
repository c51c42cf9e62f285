"""How much of exact attention a mask of blocks keeps: what selectors are judged by on recorded q and k.

    recall = mean over queries i of  sum_j kept softmax_j(scale q_i . k_j)

Letters: B batch, P places, N tokens, H heads, Hkv key heads, G = H / Hkv, D head_dim, nq and nk blocks of queries and of
keys.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from videoattn.selection.arrangement import Arrangement, block_sums

SCORES = 2**24
"""Scores held at a time, 64 MiB in fp32, unless one query of a key head's G heads has more: G * P."""


@torch.no_grad()
def recall(
    q: Tensor,
    k: Tensor,
    keep: Tensor,
    arrangement: Arrangement,
    *,
    rows: int | None = None,
    seed: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The share of the exact softmax mass that a block mask keeps, fp32 [B, H]; empty places do not count.

    Memory: SCORES scores and their softmax, and the keys of one head in fp32.

    Args:
        q: [B, P, H, D]; k: [B, P, Hkv, D], arranged.
        keep: bool, [B, H, nq, nk] or dimensions of 1 in place of B and H.
        rows: how many tokens to take as queries, at random; all where None, or where there are no more.
        seed: of that choice. scale: 1 / sqrt(D) by default.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"recall: wanted one row at least, got {rows}")
    batch, places, heads, head_dim = q.shape
    kv_heads, block_k = k.shape[2], arrangement.keys.size
    group, scale = heads // kv_heads, head_dim**-0.5 if scale is None else scale
    keep = keep.expand(batch, heads, -1, -1)
    queries = arrangement.places
    if rows is not None and rows < len(queries):
        generator = torch.Generator().manual_seed(seed)
        queries = queries[torch.randperm(len(queries), generator=generator)[:rows].sort().values.to(queries.device)]
    empty = arrangement.empty
    total = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b, head in itertools.product(range(batch), range(kv_heads)):
            mine = slice(head * group, (head + 1) * group)
            keys = k[b, :, head].float().T
            for some in queries.split(max(1, SCORES // (group * places))):
                scores = (q[b, some, mine].float() * scale).transpose(0, 1) @ keys
                mass = block_sums(scores.masked_fill_(empty, -torch.inf).softmax(-1), block_k, -1)
                kept = mass * keep[b, mine, some // arrangement.queries.size]
                total[b, mine] += kept.sum((-1, -2), dtype=torch.float64)
    return (total / len(queries)).float()
