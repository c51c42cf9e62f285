"""The pooled remainder: what attention along lists left out stays in the softmax as block means (Sol-Attn, arXiv:2607.24027).

With kc_j and vc_j the means of the n_j tokens of key block j, over the blocks that a list leaves out, the output o of the
blocks that it holds, and m = L, the log-sum-exp of their scores, at the start:

    p_j = exp(scale q . kc_j - m),   l = 1 + sum n_j p_j,   acc = o + sum n_j p_j vc_j,   out = acc / l

as if all keys of a block had the mean score: the online softmax of FlashAttention 2 goes on where another kernel stopped.
So it serves every kernel that returns its log-sum-exp, on q as it came or in INT8, and none of them has to know of it. It
reads q and the output once more, and scores 1 / block_k of the keys. n_j goes into the exponent, as log n_j: the weights
stay below 1, and means fit into 16 bits where sums of 128 values may not.

Letters: B batch, Pq/Pk places of queries and of keys, H heads, Hkv key heads, D head_dim, W: D up to a multiple of 16, nq and
nk blocks of queries and of keys; M queries and G means a tile, R tokens at a time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels import operands
from videoattn.kernels.flash import LN2, accumulate, scores
from videoattn.kernels.operands import Quantised
from videoattn.kernels.tiles import alignment, load_head, not_finite, parts, store_part
from videoattn.kernels.triton_backend import (
    Launch,
    aligned,
    capability_of,
    on_device_of,
    precision,
    scale_log2,
    unit_stride,
)
from videoattn.selection.block_list import BlockList

LOG2_E = tl.constexpr(1.4426950408889634)
KEYS = tl.constexpr(operands.KEYS)
POOL_ROWS = 32
LIST_STRIDES = tuple(f"keep_s{axis}" for axis in "bhqk")


@functools.cache
def config(head_dim: int, itemsize: int, capability: int) -> dict[str, int]:
    """Tile sizes and warps: on Hopper what was measured fastest with Triton 3.6 of what does not spill, elsewhere the largest
    that compile and spill no more than a few bytes. M divides every block of queries."""
    if itemsize == 4:
        m, group, warps = 32 if head_dim <= 64 else 16, 16, 4
    else:
        m, group, warps = 64, 32 if head_dim <= 128 else 16, 4 if head_dim <= 160 else 8
        if capability == 90 and head_dim <= 128:
            return {"M": m, "G": 64, "num_warps": warps, "num_stages": 1 if head_dim <= 64 else 2}
    return {"M": m, "G": group, "num_warps": warps, "num_stages": 2}


@triton.jit
def _tokens(live, kv_lens, b, j, kv_len, BLOCK: tl.constexpr):
    """How many tokens of block j of row b count."""
    end = kv_len
    if kv_lens is not None:
        end = tl.minimum(end, tl.load(kv_lens + b))
    return tl.maximum(tl.minimum(tl.load(live + j), end - j * BLOCK), 0)


@triton.jit
def _store_count(counts, at, tokens):
    """The logarithm of a block's tokens, which goes into its weight's exponent; -inf of none."""
    count = tl.where(tokens > 0, tl.log2(tl.maximum(tokens, 1).to(tl.float32)), float("-inf"))
    tl.store(counts + at, count)


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=["q_len", "blocks", "heads", "kv_group", "q_sb", "q_sn", "q_sh", *LIST_STRIDES])
def _add(
    q, k_means, v_means, counts, keep,  # means [B, nk, Hkv, D]; counts [B, nk], their logarithms to base 2
    out, lse,  # [B, Pq, H, D] and [B, H, Pq]: both ways
    q_scale, lse_shift,  # of quantised q, or None
    flag,  # or None
    qk_scale,  # scale * log2(e)
    q_len, blocks, heads, kv_group,  # kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    keep_sb, keep_sh, keep_sq, keep_sk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, G: tl.constexpr, BLOCK_Q: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(q_len, M)
    pid = tl.program_id(0)
    head_of_batch = pid // tiles  # heads outermost: the means of one head stay in cache
    first = (pid % tiles) * M
    b = (head_of_batch // heads).to(tl.int64)
    h = (head_of_batch % heads).to(tl.int64)
    h_kv = h // kv_group
    kv_heads = heads // kv_group
    i = (first // BLOCK_Q).to(tl.int64)
    queries = first + tl.arange(0, M)
    here = queries < q_len
    rows = head_of_batch.to(tl.int64) * q_len + queries  # of lse, q_scale and lse_shift

    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h * q_sh, ALIGN)
    q0, q1 = load_head(q, tl.multiple_of(queries.to(tl.int64) * q_sn, ALIGN)[:, None], here[:, None], D, D0, D1)
    factor = tl.full([M], qk_scale, tl.float32)
    if q_scale is not None:
        factor *= tl.load(q_scale + rows, here, 0.0)
        # 16 bits hold 127 exactly. By way of fp32, because the interpreter makes bf16 of nothing else.
        dtype: tl.constexpr = k_means.dtype.element_ty
        q0, q1 = q0.to(tl.float32).to(dtype), q1.to(tl.float32).to(dtype)
    out += (b * q_len * heads + h) * D
    o_rows = (queries.to(tl.int64) * heads * D)[:, None]
    acc0, acc1 = load_head(out, o_rows, here[:, None], D, D0, D1)
    acc0, acc1 = acc0.to(tl.float32), acc1.to(tl.float32)
    m = tl.load(lse + rows, here, float("-inf")) * LOG2_E
    shift = tl.zeros([M], tl.float32)  # by which the scores of quantised keys, which lack their mean, are too small
    if lse_shift is not None:
        shift = tl.load(lse_shift + rows, here, 0.0) * LOG2_E
        m -= shift
    l = tl.where(m == float("-inf"), 0.0, 1.0)

    keep += b * keep_sb + h * keep_sh + i * keep_sq
    counts += b * blocks
    means_sn = kv_heads * D
    k_means += (b * blocks * kv_heads + h_kv) * D
    v_means += (b * blocks * kv_heads + h_kv) * D
    means = (tl.arange(0, G) * means_sn)[:, None]
    for start in tl.range(0, blocks, G):
        j = start + tl.arange(0, G)
        there = j < blocks
        kept = tl.load(keep + j.to(tl.int64) * keep_sk, there, 1)
        count = tl.where(kept == 0, tl.load(counts + j, there, float("-inf")), float("-inf"))
        k0, k1 = load_head(k_means + means_sn.to(tl.int64) * start, means, there[:, None], D, D0, D1)
        s = scores(q0, q1, k0, k1, D1, PRECISION) * factor[:, None] + count[None, :]
        acc0, acc1, m, l = accumulate(
            acc0, acc1, m, l, s, 1.0, v_means, start, means, means_sn, there[:, None], D, D0, D1, True, PRECISION
        )

    inverse = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    x = acc0 * inverse
    bad = not_finite(x)
    store_part(out, o_rows, here[:, None], x.to(out.dtype.element_ty), 0, D)
    if D1:
        x = acc1 * inverse
        bad = bad | not_finite(x)
        store_part(out, o_rows, here[:, None], x.to(out.dtype.element_ty), D0, D)
    if flag is not None:
        tl.store(flag, 1, mask=bad)  # a plain store: the flag may lie in host memory
    tl.store(lse + rows, tl.where(l == 0.0, float("-inf"), (m + shift + tl.log2(l)) * LN2), here)


@triton.jit(do_not_specialize=["kv_len", "heads", "x_sb", "x_sn", "x_sh"])
def _means(
    x, live, kv_lens, means, counts,  # means [B, nk, Hkv, D]; counts [B, nk] fp32, or None
    kv_len, heads,
    x_sb, x_sn, x_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)  # heads innermost, as they lie in a projection
    blocks = tl.cdiv(kv_len, BLOCK_K)
    h, j, b = pid % heads, pid // heads % blocks, pid // heads // blocks
    tokens = _tokens(live, kv_lens, b, j.to(tl.int32), kv_len, BLOCK_K)
    if counts is not None and h == 0:
        _store_count(counts, b * blocks + j, tokens)
    x += tl.multiple_of(b * x_sb, ALIGN) + tl.multiple_of(j * BLOCK_K * x_sn, ALIGN) + tl.multiple_of(h * x_sh, ALIGN)
    total0 = tl.zeros([R, D0], tl.float32)
    total1 = tl.zeros([R, D1], tl.float32) if D1 else total0
    share = 1.0 / tl.maximum(tokens, 1).to(tl.float32)  # of each before they are added: a sum may pass fp32's range
    for start in tl.range(0, tokens, R):
        rows = start + tl.arange(0, R)
        places = tl.multiple_of(rows.to(tl.int64) * x_sn, ALIGN)[:, None]
        x0, x1 = load_head(x, places, (rows < tokens)[:, None], D, D0, D1)
        total0 += x0.to(tl.float32) * share
        if D1:
            total1 += x1.to(tl.float32) * share
    store_part(means, pid * D, tokens >= 0, tl.sum(total0, 0).to(means.dtype.element_ty), 0, D)
    if D1:
        store_part(means, pid * D, tokens >= 0, tl.sum(total1, 0).to(means.dtype.element_ty), D0, D)


@triton.jit(do_not_specialize=["kv_len", "heads"])
def _quantised_means(
    k, k_scale, v, v_scale, live, kv_lens, k_means, v_means, counts,  # v: None where it is as it came
    kv_len, heads,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Of one block of KEYS tokens: k int8 [B, Hkv, Pk, W], and v in 8 bits, transposed [B, Hkv, W, blocks KEYS]."""
    W: tl.constexpr = (D + 15) // 16 * 16
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(kv_len, KEYS)
    h, j, b = pid % heads, pid // heads % blocks, pid // heads // blocks
    head = b * heads + h
    tokens = _tokens(live, kv_lens, b, j.to(tl.int32), kv_len, KEYS)
    if h == 0:
        _store_count(counts, b * blocks + j, tokens)
    share = 1.0 / tl.maximum(tokens, 1).to(tl.float32)
    d = tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    for start in tl.range(0, tokens, R):
        rows = start + tl.arange(0, R)
        there = rows < tokens
        scale = tl.load(k_scale + (head * blocks + j) * 4 + rows % 8 // 2) * share
        places = (head * kv_len + j * KEYS + rows)[:, None] * W + d[None, :]
        total += tl.sum(tl.load(k + places, there[:, None] & (d < D)[None, :], 0).to(tl.float32) * scale[:, None], 0)
    tl.store(k_means + pid * D + d, total.to(k_means.dtype.element_ty), d < D)
    if v is not None:
        place = tl.arange(0, KEYS)
        token = place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2  # operands.ORDER
        for start in tl.static_range(0, DP, R):  # a row of v at a time: R tokens of each would be read in pieces
            d = start + tl.arange(0, R)
            places = (head * W + d)[:, None] * (blocks * KEYS) + j * KEYS + place[None, :]
            x = tl.load(v + places, (d < D)[:, None] & (token < tokens)[None, :], 0.0)
            mean = tl.sum(x.to(tl.float32), 1) * share * tl.load(v_scale + head * D + d, d < D, 0.0)
            tl.store(v_means + pid * D + d, mean.to(v_means.dtype.element_ty), d < D)


@functools.lru_cache(maxsize=1024)
def _means_plan(
    shape: torch.Size, strides: tuple[int, ...], device: torch.device, aligned: bool, block_k: int
) -> Launch:
    b, p, h, d = shape
    d0, d1 = parts(d)
    align = alignment(*strides) if aligned else 1
    constants = {"D": d, "D0": d0, "D1": d1, "BLOCK_K": block_k, "R": POOL_ROWS, "ALIGN": align, "num_warps": 4}
    return Launch(b * h * -(-p // block_k), (p, h, *strides), constants)


@functools.lru_cache(maxsize=1024)
def _quantised_means_plan(shape: torch.Size, head_dim: int, device: torch.device) -> Launch:
    b, h, p, _ = shape
    constants = {"D": head_dim, "DP": triton.next_power_of_2(head_dim), "R": POOL_ROWS, "num_warps": 4}
    return Launch(b * h * -(-p // operands.KEYS), (p, h), constants)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,  # B, Pq, H, D
    means: torch.Size,  # B, nk, Hkv, D
    strides: tuple[int, ...],
    list_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    block_q: int,
) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    b, nq, h, d = shape
    settings = config(d, dtype.itemsize, capability_of(device))
    d0, d1 = parts(d)
    constants = {
        "D": d,
        "D0": d0,
        "D1": d1,
        "BLOCK_Q": block_q,
        "ALIGN": alignment(*strides) if aligned else 1,
        "PRECISION": precision(dtype),
        **settings,
    }
    numbers = (nq, means[1], h, h // means[2], *strides, *list_strides)
    return Launch(-(-nq // settings["M"]) * b * h, numbers, constants)


class Means(NamedTuple):
    """Of the key blocks of a call.

    Args:
        k, v: [B, nk, Hkv, D]; 0 for a block without tokens.
        counts: fp32 [B, nk], the logarithm of a block's tokens to base 2; -inf of none.
    """

    k: Tensor
    v: Tensor
    counts: Tensor


def _means_of(x: Tensor, live: Tensor, block_k: int, kv_len: Tensor | None, counts: Tensor | None) -> Tensor:
    x = unit_stride(x)
    b, p, h, d = x.shape
    out = torch.empty((b, -(-p // block_k), h, d), dtype=x.dtype, device=x.device)
    launch = _means_plan(x.shape, x.stride()[:3], x.device, aligned(x), block_k)
    with on_device_of(x):
        launch(_means, (x, live, kv_len, out, counts))
    return out


def means(k: Tensor, v: Tensor, live: Tensor, block_k: int, kv_len: Tensor | None = None) -> Means:
    """Of k and v [B, Pk, Hkv, D], in their dtype, summed in fp32.

    Args:
        live: int32 [nk], how many places of a block are taken, the first ones; what the others hold is not read. The last
            block may be there in part.
        kv_len: int32 [B]: the tokens of row b at or beyond kv_len[b] count for nothing.
    """
    counts = torch.empty((k.shape[0], -(-k.shape[1] // block_k)), dtype=torch.float32, device=k.device)
    live = live.contiguous()
    return Means(_means_of(k, live, block_k, kv_len, counts), _means_of(v, live, block_k, kv_len, None), counts)


def quantised_means(
    x: Quantised, head_dim: int, dtype: torch.dtype, live: Tensor, kv_len: Tensor | None = None
) -> Means:
    """As `means`, in `dtype`, of operands: of the keys less their mean over all tokens. Blocks of KEYS."""
    b, h_kv, p, _ = x.k.shape
    k_means = torch.empty((b, -(-p // operands.KEYS), h_kv, head_dim), dtype=dtype, device=x.k.device)
    counts = torch.empty(k_means.shape[:2], dtype=torch.float32, device=x.k.device)
    live = live.contiguous()
    if x.v_scale is None:
        v, v_means = None, _means_of(x.v, live, operands.KEYS, kv_len, None)
    else:
        v, v_means = x.v, torch.empty_like(k_means)
    tensors = (x.k, x.k_scale, v, x.v_scale, live, kv_len, k_means, v_means, counts)
    with on_device_of(x.k):
        _quantised_means_plan(x.k.shape, head_dim, x.k.device)(_quantised_means, tensors)
    return Means(k_means, v_means, counts)


def _launch(
    q: Tensor,
    strides: tuple[int, ...],
    of: Means,
    out: Tensor,
    lse: Tensor,
    lists: BlockList,
    of_quantised: tuple[Tensor | None, Tensor | None],
    flag: Tensor | None,
    qk_scale: float,
) -> None:
    sizes = out.shape, of.k.shape, strides, lists.keep.stride()
    launch = _plan(*sizes, of.k.dtype, q.device, aligned(q), lists.block_q)
    with on_device_of(q):
        launch(_add, (q, *of, lists.keep.view(torch.int8), out, lse, *of_quantised, flag), qk_scale)


def add(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockList,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """Take into the output of attention along lists, in place, what they left out.

    Args:
        out: [B, Pq, H, D] contiguous. lse: [B, H, Pq] fp32, contiguous. Both as the kernel along the lists returned them.
        q: [B, Pq, H, D]; k, v: [B, Pk, Hkv, D]: its arguments, and `lists`, `scale`, `kv_len` (int32 [B]) too.
        flag: int32, set to 1 where the output is not finite.
    """
    q, of = unit_stride(q), means(k, v, lists.live, lists.block_k, kv_len)
    _launch(q, q.stride()[:3], of, out, lse, lists, (None, None), flag, scale_log2(scale, q.shape[3]))


def add_quantised(
    out: Tensor,
    lse: Tensor,
    x: Quantised,
    lists: BlockList,
    *,
    kv_len: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """As `add`, from operands that were made with `return_lse`."""
    _, h, nq, w = x.q.shape
    of = quantised_means(x, out.shape[3], out.dtype, lists.live, kv_len)
    _launch(x.q, (h * nq * w, w, nq * w), of, out, lse, lists, (x.q_scale, x.lse_shift), flag, 1.0)
