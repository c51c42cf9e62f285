"""How much of exact attention a mask of blocks keeps: what selectors are judged by on recorded q and k.

    recall = mean over queries i of  sum_j kept softmax_j(scale q_i . k_j)

Letters: B batch, P places, N tokens, R sampled rows, H heads, Hkv key heads, G = H / Hkv, D head_dim, nq and nk blocks of
queries and of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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

    Raises:
        ValueError: fewer than one row.
    """
    queries = _sample(arrangement, rows, seed)
    keep = keep.expand(q.shape[0], q.shape[2], -1, -1)
    total = torch.zeros(q.shape[0], q.shape[2], dtype=torch.float64, device=q.device)
    for b, heads, blocks, mass in _masses(q, k, arrangement, queries, scale):
        total[b, heads] += (mass * keep[b, heads, blocks]).sum((-1, -2), dtype=torch.float64)
    return (total / len(queries)).float()


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    arrangement: Arrangement,
    *,
    rows: int | None = None,
    seed: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The share of the exact softmax mass from each query block to each key block, fp32 [B, H, nq, nk].

    All shares of a head are 1 together, and what a mask keeps of them is its `recall`: for many masks on the same q and k.
    Arguments, errors and memory as there, and the result. Work: 2 R P H D operations a row of the batch.
    """
    queries = _sample(arrangement, rows, seed)
    shape = q.shape[0], q.shape[2], arrangement.queries.count, arrangement.keys.count
    total = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for b, heads, blocks, mass in _masses(q, k, arrangement, queries, scale):
        total[b, heads].index_add_(1, blocks, mass)
    return total / len(queries)


def _sample(arrangement: Arrangement, rows: int | None, seed: int) -> Tensor:
    """The places of the tokens that are taken as queries, int64 [R]."""
    if rows is not None and rows < 1:
        raise ValueError(f"recall: wanted one row at least, got {rows}")
    queries = arrangement.places
    if rows is None or rows >= len(queries):
        return queries
    generator = torch.Generator().manual_seed(seed)
    return queries[torch.randperm(len(queries), generator=generator)[:rows].sort().values.to(queries.device)]


def _masses(
    q: Tensor, k: Tensor, arrangement: Arrangement, queries: Tensor, scale: float | None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """The softmax mass of queries on each key block, some at a time.

    Yields a row of the batch, heads, the query blocks int64 [r] of r queries, and their mass fp32 [G, r, nk].
    """
    batch, places, heads, head_dim = q.shape
    kv_heads, empty = k.shape[2], arrangement.empty
    group, scale = heads // kv_heads, head_dim**-0.5 if scale is None else scale
    for b, head in itertools.product(range(batch), range(kv_heads)):
        mine = slice(head * group, (head + 1) * group)
        keys = k[b, :, head].float().T
        for some in queries.split(max(1, SCORES // (group * places))):
            with torch.autocast(q.device.type, enabled=False):
                scores = (q[b, some, mine].float() * scale).transpose(0, 1) @ keys
                mass = block_sums(scores.masked_fill_(empty, -torch.inf).softmax(-1), arrangement.keys.size, -1)
            yield b, mine, some // arrangement.queries.size, mass
