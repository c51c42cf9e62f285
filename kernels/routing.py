"""From scores or a mask of key blocks to lists, one program a row: what is kept, how much, and where it goes.

    above:  keep where score >= mean + tau std, over the row's scores      (Sol-Attn, arXiv:2607.24027)
    best:   keep the `count` greatest, and what equals the last of them
    mask:   keep what the mask says

A row with a NaN score keeps everything. To all of these comes what is required, and what lies beyond a row's length goes.
No sort: the count-th greatest of a row is found bit by bit, in 32 counts over registers. A row stands in registers whole.

Letters: B batch, H heads, nq and nk blocks of queries and of keys, of which nv hold video only.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels.triton_backend import Launch, on_device_of
from videoattn.selection.block_list import BlockList

Rule = Literal["above", "best", "mask"]
MOST_BLOCKS = 8192  # of keys: what a program's registers hold


@triton.jit
def _ranked(s):
    """Integers in the order of floats (without NaN)."""
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _least_of_best(ranks, count, there):
    """The count-th greatest of `ranks` where `there`: the greatest number that as many are not below."""
    # The sign first, then bit by bit from above; in int32 the sign's weight is negative.
    found = tl.where(tl.sum(((ranks >= 0) & there).to(tl.int32), 0) >= count, 0, -2147483648)
    for bit in tl.static_range(31):
        more = found + (1 << (30 - bit))
        found = tl.where(tl.sum(((ranks >= more) & there).to(tl.int32), 0) >= count, more, found)
    return found


@triton.jit(do_not_specialize=["nq", "nk", "nv", "heads", "count", "sb", "sh", "sq"])
def _route(
    scores,  # fp32 [B, H, nq, nv], or a mask int8 [B, H, nq, nk]
    required,  # int8 [nq, nk]
    kv_lens,  # or None
    counts, indices, keep,
    tau,
    nq, nk, nv, heads, count, sb, sh, sq,
    BLOCK_K: tl.constexpr, RULE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = row % nq
    b, h = row // nq // heads, row // nq % heads
    j = tl.arange(0, P)
    there = j < nk
    at = b * sb + h * sh + i * sq + j
    kept = tl.load(required + i * nk + j, there, 0) != 0
    if RULE == "mask":
        kept = kept | (tl.load(scores + at, there, 0) != 0)
    else:
        video = j < nv
        s = tl.load(scores + at, video, 0.0)
        unknown = tl.max((s != s).to(tl.int32), 0) > 0  # noqa: PLR0124 - NaN alone differs from itself
        if RULE == "above":
            mean = tl.sum(s, 0) / nv
            off = tl.where(video, s - mean, 0.0)
            chosen = s >= mean + tau * tl.sqrt_rn(tl.sum(off * off, 0) / nv)
        else:
            ranks = _ranked(s)
            chosen = ranks >= _least_of_best(ranks, count, video)
        kept = kept | (video & (chosen | unknown))
    if kv_lens is not None:
        kept = kept & (j * BLOCK_K < tl.load(kv_lens + b))
    rank = tl.cumsum(kept.to(tl.int32), 0)
    total = tl.sum(kept.to(tl.int32), 0)
    left = tl.cumsum((there & ~kept).to(tl.int32), 0)
    tl.store(counts + row, total)
    tl.store(indices + row * nk + tl.where(kept, rank, total + left) - 1, j, there)
    tl.store(keep + row * nk + j, kept.to(tl.int8), there)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    nv: int,
    count: int,
    strides: tuple[int, ...],
    block_k: int,
    rule: Rule,
    device: torch.device,
) -> Launch:
    b, h, nq, nk = shape
    places = triton.next_power_of_2(nk)
    constants = {"BLOCK_K": block_k, "RULE": rule, "P": places, "num_warps": max(1, min(8, places // 256))}
    return Launch(b * h * nq, (nq, nk, nv, h, count, *strides), constants)


def lists(
    x: Tensor,
    required: Tensor,
    live: Tensor,
    *,
    block_q: int,
    block_k: int,
    batch: int,
    heads: int,
    rule: Rule = "mask",
    tau: float = 0.0,
    count: int = 0,
    kv_len: Tensor | None = None,
    gaps: bool = False,
) -> BlockList:
    """Lists from what a selector thinks of blocks.

    Args:
        x: a mask bool [B or 1, H or 1, nq, nk] for the rule "mask"; else scores fp32 [B, H, nq, nv] of the video's blocks.
        required: bool [nq, nk]. live: int32 [nk].
        tau: of "above". count: of "best", one at least.
        kv_len: int32 [B]: blocks of row b that begin at or beyond kv_len[b] are in no list.
        gaps: see `BlockList`.

    Raises:
        ValueError: more key blocks than a program holds.
    """
    nq, nk = required.shape
    if nk > MOST_BLOCKS:
        raise ValueError(f"lists: wanted at most {MOST_BLOCKS} blocks of keys, got {nk}")
    if x.stride(-1) != 1:
        x = x.contiguous()
    strides = tuple(0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    counts = torch.empty((batch, heads, nq), dtype=torch.int32, device=x.device)
    indices = torch.empty((batch, heads, nq, nk), dtype=torch.int32, device=x.device)
    keep = torch.empty((batch, heads, nq, nk), dtype=torch.bool, device=x.device)
    launch = _plan((batch, heads, nq, nk), x.shape[3], count, strides, block_k, rule, x.device)
    given = x.view(torch.int8) if rule == "mask" else x
    with on_device_of(x):
        launch(_route, (given, required.view(torch.int8), kv_len, counts, indices, keep.view(torch.int8)), tau)
    return BlockList(counts=counts, indices=indices, keep=keep, live=live, block_q=block_q, block_k=block_k, gaps=gaps)
