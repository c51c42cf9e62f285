"""Temporal attention: very many rows of few tokens, in one pass over memory.

out = softmax(scale q k^T) v for up to 128 queries and keys a row. A row's whole attention fits in registers, so q, k and v
are read once, the output is written once, and nothing else touches memory: the bound is the copy bandwidth (temporal
attention is bound by memory, not by arithmetic: Golden et al., arXiv:2312.14385, section 5). A program takes HB heads of
one row; its products are batches of [QP, D] x [D, KP], a warp each, so that none is spent on pairs of different rows (a
tile of 64 queries by 64 keys would waste three of four at 16 frames). Loads run over heads before tokens: in the
projections' layout neighbouring heads lie side by side, and a head of 40 alone would leave memory sectors half used.

Rows may be addressed by two strides, (b, p) -> b stride_b + p stride_p, so that [B, F, P, H, D] is read where it lies.

Letters: B P rows, Nq/Nk queries and keys, H heads, D head_dim; QP, KP: Nq, Nk padded to powers of two; HB heads a program.

Refuses: masks, causal, more than 128 tokens, wide heads on long rows.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.call import Call
from videoattn.kernels.tiles import MIN_PART, alignment, load_head, not_finite, parts, store_part
from videoattn.kernels.triton_backend import (
    Launch,
    Tile,
    TritonBackend,
    aligned,
    on_device_of,
    precision,
    scale_log2,
    unit_stride,
)

MAX_TOKENS = 128


def config(q_len: int, kv_len: int, heads: int, head_dim: int) -> dict[str, int]:
    """Tile sizes and warps, as measured on an H200 with Triton 3.6 (benchmarks/temporal.py)."""
    qp, kp = (max(16, triton.next_power_of_2(n)) for n in (q_len, kv_len))
    d0, d1 = parts(head_dim)
    tokens = max(qp, kp)
    if d0 <= 32 or tokens >= 64:  # a small second part costs more than it saves
        d0, d1 = max(MIN_PART, triton.next_power_of_2(head_dim)), 0
    hb, warps = 1, 1
    if tokens >= 64:  # one head, its products shared by all warps
        warps = 8 if min(qp, kp) == 128 and d0 == 128 else 4
    elif tokens == 16 and head_dim < 80:
        hb = 2
    elif tokens == 16 and head_dim <= 128:
        hb, warps = 4, 2
    while heads % hb:
        hb, warps = hb // 2, max(1, warps // 2)
    return {"QP": qp, "KP": kp, "D0": d0, "D1": d1, "HB": hb, "num_warps": warps}


@triton.jit
def _row(ptr, b, p, stride_b, stride_p, ALIGN: tl.constexpr):
    """The address of a row."""
    return ptr + tl.multiple_of(b.to(tl.int64) * stride_b, ALIGN) + tl.multiple_of(p.to(tl.int64) * stride_p, ALIGN)


@triton.jit
def _offsets(tokens, heads, stride_n, stride_h, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets [N, HB, 1] of every (token, head) of a row; WIDE: they may pass 2^31."""
    if WIDE:
        tokens = tokens.to(tl.int64)
    token = tl.multiple_of(tokens * stride_n, ALIGN)
    head = tl.multiple_of(heads * stride_h, ALIGN)
    return token[:, None, None] + head[None, :, None]


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b over the batch; a single one as a plain product, which all warps share instead of doing it each."""
    if a.shape[0] == 1:
        a2 = tl.reshape(a, a.shape[1], a.shape[2])
        b2 = tl.reshape(b, b.shape[1], b.shape[2])
        acc2 = tl.reshape(acc, a.shape[1], b.shape[2])
        product = tl.reshape(tl.dot(a2, b2, acc2, input_precision=PRECISION), 1, a.shape[1], b.shape[2])
    else:
        product = tl.dot(a, b, acc, input_precision=PRECISION)
    return product


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=[
    "P", "H", "q_len", "kv_len", *(f"{x}_s{axis}" for x in "qkvo" for axis in "bpnh"),
])  # fmt: skip
def _forward(
    q, k, v, out,
    lse, kv_lens, flag,  # or None
    qk_scale,  # scale * log2(e)
    P, H, q_len, kv_len,
    q_sb, q_sp, q_sn, q_sh,
    k_sb, k_sp, k_sn, k_sh,
    v_sb, v_sp, v_sn, v_sh,
    o_sb, o_sp, o_sn, o_sh,
    KV_GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HB: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // (H // HB)  # heads first: neighbours in memory run at the same time
    b, p = row // P, row % P
    heads = (pid % (H // HB)) * HB + tl.arange(0, HB)
    queries, keys = tl.arange(0, QP), tl.arange(0, KP)
    limit = kv_len
    if kv_lens is not None:
        limit = tl.minimum(limit, tl.load(kv_lens + b))
    q_here, k_here = (queries < q_len)[:, None, None], (keys < limit)[:, None, None]

    q_rows = _offsets(queries, heads, q_sn, q_sh, ALIGN, WIDE)
    k_rows = _offsets(keys, heads // KV_GROUP, k_sn, k_sh, ALIGN, WIDE)
    v_rows = _offsets(keys, heads // KV_GROUP, v_sn, v_sh, ALIGN, WIDE)
    q0, q1 = load_head(_row(q, b, p, q_sb, q_sp, ALIGN), q_rows, q_here, D, D0, D1)
    k0, k1 = load_head(_row(k, b, p, k_sb, k_sp, ALIGN), k_rows, k_here, D, D0, D1)
    v0, v1 = load_head(_row(v, b, p, v_sb, v_sp, ALIGN), v_rows, k_here, D, D0, D1)

    s = tl.zeros([HB, QP, KP], tl.float32)  # tiles come as [N, HB, D]
    s = _product(tl.permute(q0, 1, 0, 2), tl.permute(k0, 1, 2, 0), s, PRECISION)
    if D1:
        s = _product(tl.permute(q1, 1, 0, 2), tl.permute(k1, 1, 2, 0), s, PRECISION)
    s = tl.where((keys < limit)[None, None, :], s, float("-inf"))
    m = tl.max(s, 2)
    if kv_lens is not None:
        m = tl.where(m == float("-inf"), 0.0, m)  # a row without a key
    weights = tl.exp2((s - m[:, :, None]) * qk_scale)
    total = tl.sum(weights, 2)
    weights = weights.to(q.dtype.element_ty)
    inverse = (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]

    out = _row(out, b, p, o_sb, o_sp, ALIGN)
    o_rows = _offsets(queries, heads, o_sn, o_sh, ALIGN, WIDE)
    o = _product(weights, tl.permute(v0, 1, 0, 2), tl.zeros([HB, QP, D0], tl.float32), PRECISION) * inverse
    o = o.to(out.dtype.element_ty)
    bad = not_finite(o)
    store_part(out, o_rows, q_here, tl.permute(o, 1, 0, 2), 0, D)
    if D1:
        o = _product(weights, tl.permute(v1, 1, 0, 2), tl.zeros([HB, QP, D1], tl.float32), PRECISION) * inverse
        o = o.to(out.dtype.element_ty)
        bad = bad | not_finite(o)
        store_part(out, o_rows, q_here, tl.permute(o, 1, 0, 2), D0, D)
    if flag is not None:
        tl.store(flag, 1, mask=bad)  # a plain store: the flag may lie in host memory
    if lse is not None:  # [B P, H, Nq]
        value = tl.where(total == 0.0, float("-inf"), (m * qk_scale + tl.log2(total)) * 0.6931471805599453)
        places = (row.to(tl.int64) * H + heads)[:, None] * q_len + queries[None, :]
        tl.store(lse + places, value, (queries < q_len)[None, :])


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_len: int,
    kv_heads: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    *rows, q_len, heads, head_dim = shape
    settings = config(q_len, kv_len, heads, head_dim)
    extent = max(q_len, kv_len) * max(strides[2::4]) + heads * max(strides[3::4])
    constants = {
        "KV_GROUP": heads // kv_heads,
        "D": head_dim,
        "ALIGN": alignment(*strides) if aligned else 1,
        "WIDE": extent >= 2**31,
        "PRECISION": precision(dtype),
        **settings,
    }
    numbers = (1 if len(rows) == 1 else rows[1], heads, q_len, kv_len, *strides)
    return Launch(math.prod(rows) * heads // settings["HB"], numbers, constants)


def _strides(x: Tensor) -> tuple[int, ...]:
    """In elements, of b, p, n, h."""
    strides = x.stride()
    return strides[:4] if len(strides) == 5 else (strides[0], 0, strides[1], strides[2])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of short rows, exact.

    Args:
        q: [B, Nq, H, D], or [B, P, Nq, H, D] for rows addressed by two strides; any strides but 1 along D.
        k, v: the same with Nk and Hkv; Hkv divides H.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: rows of b attend to their first kv_len[b] keys.
        return_lse: whether to return the log-sum-exp too.
        flag: int32, set to 1 where the output is not finite.

    Returns:
        out in q's shape, [B, Nq, H, D] contiguous or [B, P, Nq, H, D] in q's order in memory; and lse [B, (P,) H, Nq] fp32
        (natural logarithm) or None. A row without a key gives 0 and -inf.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    *rows, nq, h, d = shape = q.shape
    nk, h_kv = k.shape[-3:-1]
    four = len(rows) == 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format if four else torch.preserve_format)
    lse = torch.empty((*rows, h, nq), dtype=torch.float32, device=q.device) if return_lse else None
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(out))
    launch = _plan(shape, nk, h_kv, strides, q.dtype, q.device, aligned(q, k, v))
    with on_device_of(q):
        launch(_forward, (q, k, v, out, lse, kv_len, flag), scale_log2(scale, d))
    return out, lse


def _refuses(call: Call) -> str | None:
    if call.mask != "none" or call.causal:
        return "takes no mask"
    tokens = max(call.q_len, call.kv_len)
    if tokens > MAX_TOKENS:
        return f"takes rows of up to {MAX_TOKENS} tokens, got {tokens}"
    if tokens > 32 and call.head_dim * call.dtype.itemsize > 256:
        return f"takes head_dim up to {256 // call.dtype.itemsize} on rows over 32 tokens, got {call.head_dim}"
    return None


def _tile_of(call: Call) -> Tile:
    settings = config(call.q_len, call.kv_len, call.heads, call.head_dim)
    return Tile(settings["QP"], settings["KP"], settings["num_warps"])


BACKENDS = (TritonBackend("triton_temporal", attend, _refuses, _tile_of),)
