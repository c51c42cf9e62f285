"""Exact attention of any length in Triton: FlashAttention 2's forward, for any head, any strides and any mask.

out = softmax(scale q k^T + mask) v, one tile of queries a program, over tiles of keys with an online softmax (Dao,
arXiv:2307.08691, algorithm 1; Milakov and Gimelshein, arXiv:1805.02867):

    m' = max(m, rowmax s),  p = exp(s - m'),  l' = exp(m - m') l + rowsum p,  acc' = exp(m - m') acc + p v

The loop runs over the full tiles without a compare and once over what is left. Programs of one head follow one another,
so that its keys stay in L2: traffic from memory falls from once a query tile to about once a head (Saha and Ye,
arXiv:2402.07443, count the transfers between two levels; L2 takes the place of the fast one). Token counts are run-time
integers: a new length needs no new kernel.

Letters: B batch, Nq/Nk queries and keys, H heads, D head_dim; M queries and N keys a tile.

Refuses: what no Triton kernel here takes (kernels/triton_backend.py).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.call import Call, Mask
from videoattn.kernels.tiles import alignment, load_head, not_finite, parts, store_part
from videoattn.kernels.triton_backend import (
    Launch,
    Tile,
    TritonBackend,
    aligned,
    capability_of,
    on_device_of,
    precision,
    scale_log2,
    unit_stride,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@functools.cache
def config(head_dim: int, itemsize: int, capability: int, masked: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for a head_dim, an element size in bytes and a card (90: Hopper).

    Hopper's are measured on an H200 (benchmarks/dense.py), with Triton 3.6; the others are the largest that compile
    without spills into the card's shared memory.
    """
    padded = sum(parts(head_dim))
    if itemsize == 4:  # products in fp32 run on the CUDA cores
        m, n, warps, stages = (32, 32, 4, 1) if padded <= 64 else (16, 16, 4, 1)
    elif capability // 10 == 9:
        if padded <= 64 or head_dim == 80:
            m, n, warps, stages = 128, 64, 4, 3
        elif padded <= 96:
            m, n, warps, stages = 64, 64, 4, 3
        elif padded <= 128:
            m, n, warps, stages = 128, 128 if head_dim == 128 and not masked else 64, 8, 3
        else:
            m, n, warps, stages = 128, 64 if padded <= 192 else 32, 8, 3
    elif capability // 10 == 10:
        if padded <= 64:
            m, n, warps, stages = 128, 32 if masked else 64, 4, 3
        elif padded <= 128:
            m, n, warps, stages = 128, 128 if head_dim == 128 and not masked else 64, 8, 3
        else:
            m, n, warps, stages = 128, 64 if padded <= 192 else 32, 8, 3
    elif padded <= 64:
        m, n, warps, stages = 128, 32 if masked else 64, 4, 2
    elif padded <= 160:
        m, n, warps, stages = 128, 16 if masked and padded > 128 else 32, 8, 2
    else:
        m, n, warps, stages = 64, 16, 8, 1
    return {"M": m, "N": n, "num_warps": warps, "num_stages": stages}


@triton.jit
def scores(q0, q1, k0, k1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T, a sum over the parts of the head; D1: 0 where there is one."""
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1:
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    return s


@triton.jit
def accumulate(
    acc0, acc1, m, l,
    s, scale, v, start, v_rows, v_sn, keep,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: scores s of a tile of keys, and its values. GUARD: a row may have met no key yet."""
    m_new = tl.maximum(m, tl.max(s, 1))
    m_scaled = m_new * scale
    if GUARD:
        m_scaled = tl.where(m_new == float("-inf"), 0.0, m_scaled)
    p = tl.exp2(s * scale - m_scaled[:, None])
    shrink = tl.exp2(m * scale - m_scaled)
    l = l * shrink + tl.sum(p, 1)
    v0, v1 = load_head(v + v_sn.to(tl.int64) * start, v_rows, keep, D, D0, D1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1:
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, m_new, l


@triton.jit
def _tile(
    acc0, acc1, m, l,
    q0, q1, k, v, mask,
    start, limit, queries, q_len, k_rows, v_rows, k_sn, v_sn, mask_rows, mask_sk, qk_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    N: tl.constexpr, PARTIAL: tl.constexpr, ADDITIVE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys. PARTIAL: not every pair of the tile counts."""
    keys = start + tl.arange(0, N)
    keep = (keys < limit)[:, None] if PARTIAL else tl.full([N, 1], True, tl.int1)
    k0, k1 = load_head(k + k_sn.to(tl.int64) * start, k_rows, keep, D, D0, D1)
    s = scores(q0, q1, k0, k1, D1, PRECISION)
    if mask is not None:
        places = mask_rows + keys.to(tl.int64)[None, :] * mask_sk
        pairs = (queries < q_len)[:, None]
        if PARTIAL:
            pairs = pairs & (keys < limit)[None, :]
        if ADDITIVE:  # scores are scaled before the maximum is taken, otherwise after
            s = s * qk_scale + tl.load(mask + places, pairs, 0.0).to(tl.float32) * LOG2_E
        else:
            s = tl.where(tl.load(mask + places, pairs, 0) != 0, s, float("-inf"))
    scale = 1.0 if ADDITIVE else qk_scale
    if PARTIAL:
        s = tl.where((keys < limit)[None, :], s, float("-inf"))
        if CAUSAL:
            s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
    return accumulate(
        acc0, acc1, m, l, s, scale, v, start, v_rows, v_sn, keep,
        D, D0, D1, PARTIAL or mask is not None, PRECISION,
    )  # fmt: skip


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=[
    "q_len", "kv_len", "heads", "kv_group",
    *(f"{x}_s{axis}" for x in "qkvo" for axis in "bnh"), *(f"mask_s{axis}" for axis in "bhqk"),
])  # fmt: skip
def _forward(
    q, k, v, out,
    lse, mask, kv_lens, flag,  # or None
    qk_scale,  # scale * log2(e)
    q_len, kv_len, heads, kv_group,  # kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    v_sb, v_sn, v_sh,
    o_sb, o_sn, o_sh,
    mask_sb, mask_sh, mask_sq, mask_sk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    ADDITIVE: tl.constexpr, CAUSAL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(q_len, M)
    pid = tl.program_id(0)
    head_of_batch = pid // tiles  # heads outermost: all queries of a head before the next
    first = (pid % tiles) * M
    b = (head_of_batch // heads).to(tl.int64)
    h = head_of_batch % heads
    h_kv = h // kv_group
    queries = first + tl.arange(0, M)
    here = (queries < q_len)[:, None]

    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h.to(tl.int64) * q_sh, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * k_sh, ALIGN)
    v += tl.multiple_of(b * v_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * v_sh, ALIGN)
    out += tl.multiple_of(b * o_sb, ALIGN) + tl.multiple_of(h.to(tl.int64) * o_sh, ALIGN)
    q_rows = tl.multiple_of(queries.to(tl.int64) * q_sn, ALIGN)[:, None]
    o_rows = tl.multiple_of(queries.to(tl.int64) * o_sn, ALIGN)[:, None]
    k_rows = tl.multiple_of(tl.arange(0, N) * k_sn, ALIGN)[:, None]
    v_rows = tl.multiple_of(tl.arange(0, N) * v_sn, ALIGN)[:, None]
    mask_rows = None
    if mask is not None:
        mask_rows = (b * mask_sb + h.to(tl.int64) * mask_sh + queries.to(tl.int64) * mask_sq)[:, None]

    limit = kv_len
    if kv_lens is not None:
        limit = tl.minimum(limit, tl.load(kv_lens + b))
    if CAUSAL:
        limit = tl.minimum(limit, first + M)
        whole = tl.minimum(limit, first + 1) // N * N  # below it every query sees every key
    else:
        whole = limit // N * N

    q0, q1 = load_head(q, q_rows, here, D, D0, D1)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1], tl.float32) if D1 else acc0
    for start in tl.range(0, whole, N):
        acc0, acc1, m, l = _tile(
            acc0, acc1, m, l, q0, q1, k, v, mask,
            start, limit, queries, q_len, k_rows, v_rows, k_sn, v_sn, mask_rows, mask_sk, qk_scale,
            D, D0, D1, N, False, ADDITIVE, CAUSAL, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, limit, N, num_stages=1):
        acc0, acc1, m, l = _tile(
            acc0, acc1, m, l, q0, q1, k, v, mask,
            start, limit, queries, q_len, k_rows, v_rows, k_sn, v_sn, mask_rows, mask_sk, qk_scale,
            D, D0, D1, N, True, ADDITIVE, CAUSAL, PRECISION,
        )  # fmt: skip

    inverse = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    x = acc0 * inverse
    bad = not_finite(x)
    store_part(out, o_rows, here, x.to(out.dtype.element_ty), 0, D)
    if D1:
        x = acc1 * inverse
        bad = bad | not_finite(x)
        store_part(out, o_rows, here, x.to(out.dtype.element_ty), D0, D)
    if flag is not None:
        tl.store(flag, 1, mask=bad)  # a plain store: the flag may lie in host memory
    if lse is not None:  # [B, H, Nq]
        m_scaled = m if ADDITIVE else m * qk_scale
        value = tl.where(l == 0.0, float("-inf"), (m_scaled + tl.log2(l)) * LN2)
        tl.store(lse + head_of_batch.to(tl.int64) * q_len + queries, value, queries < q_len)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_len: int,
    kv_heads: int,
    strides: tuple[int, ...],
    mask_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    mask: Mask,
    causal: bool,
) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    b, nq, h, d = shape
    settings = config(d, dtype.itemsize, capability_of(device), mask != "none")
    d0, d1 = parts(d)
    constants = {
        "D": d,
        "D0": d0,
        "D1": d1,
        "ADDITIVE": mask == "additive",
        "CAUSAL": causal,
        "ALIGN": alignment(*strides) if aligned else 1,
        "PRECISION": precision(dtype),
        **settings,
    }
    numbers = (nq, kv_len, h, h // kv_heads, *strides, *mask_strides)
    return Launch(-(-nq // settings["M"]) * b * h, numbers, constants)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    kv_len: Tensor | None = None,
    causal: bool = False,
    return_lse: bool = False,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention.

    Args:
        q: [B, Nq, H, D], any strides. k, v: [B, Nk, Hkv, D], any strides; Hkv divides H.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        mask: broadcastable to [B, H, Nq, Nk], any strides; bool (True: attend) or additive, any float dtype.
        kv_len: int32 [B] on q's device: row b attends to its first kv_len[b] keys.
        causal: query i sees keys 0..i only.
        return_lse: whether to return the log-sum-exp too.
        flag: int32, set to 1 where the output is not finite.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    b, nq, h, d = shape = q.shape
    _, nk, h_kv, _ = k.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device) if return_lse else None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    mask_strides, kind = (0, 0, 0, 0), "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "additive"
        mask = mask.expand(b, h, nq, nk)
        mask_strides = mask.stride()
        mask = mask.view(torch.int8) if kind == "bool" else mask
    launch = _plan(shape, nk, h_kv, strides, mask_strides, q.dtype, q.device, aligned(q, k, v), kind, causal)
    with on_device_of(q):
        launch(_forward, (q, k, v, out, lse, mask, kv_len, flag), scale_log2(scale, d))
    return out, lse


def _refuses(call: Call) -> str | None:
    return None


def _tile_of(call: Call) -> Tile:
    settings = config(call.head_dim, call.dtype.itemsize, capability_of(call.device), call.mask != "none")
    return Tile(settings["M"], settings["N"], settings["num_warps"])


BACKENDS = (TritonBackend("triton_flash", attend, _refuses, _tile_of),)
