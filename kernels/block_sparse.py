"""Exact attention to chosen blocks of keys, in Triton: each block of queries walks along its own list.

Over the keys that the list names, FlashAttention 2's forward (kernels/flash.py). Optionally what it leaves out stays in the
softmax as block means, the pooled remainder (Sol-Attn, arXiv:2607.24027): with kc_j and vc_j the means of the n_j tokens of
key block j,

    p_j = exp(scale q . kc_j - m),   l += n_j p_j,   acc += n_j p_j vc_j

as if all keys of a block had the mean score. n_j goes into the exponent, as log n_j: the weights stay below 1, and means
fit into 16 bits where sums of 128 values may not.

Blocks of keys may be filled in part. Their empty places are read, without harm as long as they hold finite numbers, so
that loads need no compare and do not wait for a count; scores are masked, in such blocks alone.

The next index is read one tile ahead: the loads of a tile begin without waiting for it. Programs of one head follow one
another, and each reads any of its keys, so that these stay in L2. Counts of tokens and blocks are run-time integers.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys; M queries and N
keys a tile, G means.

Refuses: blocks of other than 64 or 128 places, head_dim other than 16 to 256 in steps of 8.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels import flash
from videoattn.kernels.flash import LN2, accumulate, scores
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

BLOCKS = (64, 128)
POOL_ROWS = 32  # tokens at a time
Kind = tuple[torch.Size, torch.dtype, torch.device]


@functools.cache
def config(head_dim: int, itemsize: int, capability: int, block_q: int, block_k: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages: those of flash.py where they fit into blocks, and nothing spills."""
    m, n, warps, stages = flash.config(head_dim, itemsize, capability, masked=False).values()
    rows = min(m, block_q)
    n = min(n, block_k, rows)  # 64 x 128 on four warps spills
    widest = 160 if capability // 10 in (9, 10) else 96
    group = min(n, 32 if head_dim <= widest else 16)  # more takes registers that the walk along the list needs
    return {"M": rows, "N": n, "G": group, "num_warps": max(4, warps * rows // m), "num_stages": stages}


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=[
    "q_len", "blocks", "heads", "kv_group",
    *(f"{x}_s{axis}" for x in ("q", "k", "v", "o", "means") for axis in "bnh"),
    *(f"counts_s{axis}" for axis in "bhq"), *(f"{x}_s{axis}" for x in ("indices", "keep") for axis in "bhqk"),
])  # fmt: skip
def _forward(
    q, k, v, out,
    counts, indices, live,
    keep, k_means, v_means,  # of the pooled remainder, or None
    lse, flag,  # or None
    qk_scale,  # scale * log2(e)
    q_len, blocks, heads, kv_group,  # kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    v_sb, v_sn, v_sh,
    o_sb, o_sn, o_sh,
    means_sb, means_sn, means_sh,
    counts_sb, counts_sh, counts_sq,
    indices_sb, indices_sh, indices_sq, indices_sk,
    keep_sb, keep_sh, keep_sq, keep_sk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = q_len // M
    pid = tl.program_id(0)
    head_of_batch = pid // tiles  # heads outermost: all queries of a head before the next
    first = (pid % tiles) * M
    b = (head_of_batch // heads).to(tl.int64)
    h = (head_of_batch % heads).to(tl.int64)
    i = (first // BLOCK_Q).to(tl.int64)
    h_kv = h // kv_group
    queries = first + tl.arange(0, M)
    all_there = tl.full([M, 1], True, tl.int1)
    keys_there = tl.full([N, 1], True, tl.int1)

    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h * q_sh, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv * k_sh, ALIGN)
    v += tl.multiple_of(b * v_sb, ALIGN) + tl.multiple_of(h_kv * v_sh, ALIGN)
    out += tl.multiple_of(b * o_sb, ALIGN) + tl.multiple_of(h * o_sh, ALIGN)
    q_rows = tl.multiple_of(queries.to(tl.int64) * q_sn, ALIGN)[:, None]
    o_rows = tl.multiple_of(queries.to(tl.int64) * o_sn, ALIGN)[:, None]
    k_rows = tl.multiple_of(tl.arange(0, N) * k_sn, ALIGN)[:, None]
    v_rows = tl.multiple_of(tl.arange(0, N) * v_sn, ALIGN)[:, None]

    q0, q1 = load_head(q, q_rows, all_there, D, D0, D1)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1], tl.float32) if D1 else acc0

    TILES: tl.constexpr = BLOCK_K // N  # of a block of keys
    indices += b * indices_sb + h * indices_sh + i * indices_sq
    end = tl.load(counts + b * counts_sb + h * counts_sh + i * counts_sq) * TILES
    block = tl.load(indices)
    for t in tl.range(0, end):
        start = block * BLOCK_K + t % TILES * N
        limit = block * BLOCK_K + tl.load(live + block)
        block = tl.load(indices + indices_sk.to(tl.int64) * ((t + 1) // TILES), t + 1 < end, 0)
        k0, k1 = load_head(k + k_sn.to(tl.int64) * start, k_rows, keys_there, D, D0, D1)
        s = scores(q0, q1, k0, k1, D1, PRECISION)
        if limit < start + N:
            s = tl.where((start + tl.arange(0, N) < limit)[None, :], s, float("-inf"))
        acc0, acc1, m, l = accumulate(
            acc0, acc1, m, l, s, qk_scale, v, start, v_rows, v_sn, keys_there, D, D0, D1, True, PRECISION
        )

    m *= qk_scale
    if keep is not None:
        keep += b * keep_sb + h * keep_sh + i * keep_sq
        k_means += tl.multiple_of(b * means_sb, ALIGN) + tl.multiple_of(h_kv * means_sh, ALIGN)
        v_means += tl.multiple_of(b * means_sb, ALIGN) + tl.multiple_of(h_kv * means_sh, ALIGN)
        rows = tl.multiple_of(tl.arange(0, G) * means_sn, ALIGN)[:, None]
        for start in tl.range(0, blocks, G):
            j = start + tl.arange(0, G)
            there = j < blocks
            kept = tl.load(keep + j.to(tl.int64) * keep_sk, there, 1)
            tokens = tl.where(kept == 0, tl.load(live + j, there, 0), 0)
            k0, k1 = load_head(k_means + means_sn.to(tl.int64) * start, rows, there[:, None], D, D0, D1)
            s = scores(q0, q1, k0, k1, D1, PRECISION) * qk_scale + tl.log2(tokens.to(tl.float32))[None, :]
            acc0, acc1, m, l = accumulate(
                acc0, acc1, m, l, s, 1.0, v_means, start, rows, means_sn, there[:, None], D, D0, D1, True, PRECISION
            )

    inverse = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    x = acc0 * inverse
    bad = not_finite(x)
    store_part(out, o_rows, all_there, x.to(out.dtype.element_ty), 0, D)
    if D1:
        x = acc1 * inverse
        bad = bad | not_finite(x)
        store_part(out, o_rows, all_there, x.to(out.dtype.element_ty), D0, D)
    if flag is not None:
        tl.store(flag, 1, mask=bad)  # a plain store: the flag may lie in host memory
    if lse is not None:  # [B, H, P]
        value = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * LN2)
        tl.store(lse + head_of_batch.to(tl.int64) * q_len + queries, value)


@triton.jit
def _mean(x, x_sn, means, at, tokens, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr,
          ALIGN: tl.constexpr):  # fmt: skip
    """Store the mean of the first `tokens` rows of x at element `at` of means; 0 where there are none."""
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
    store_part(means, at, tokens >= 0, tl.sum(total0, 0).to(means.dtype.element_ty), 0, D)
    if D1:
        store_part(means, at, tokens >= 0, tl.sum(total1, 0).to(means.dtype.element_ty), D0, D)


@triton.jit(do_not_specialize=["blocks", "heads", *(f"{x}_s{axis}" for x in "kv" for axis in "bnh")])
def _pool(
    k, v, live,
    k_means, v_means,  # [B, nk, Hkv, D]
    blocks, heads,
    k_sb, k_sn, k_sh,
    v_sb, v_sn, v_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_K: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)  # heads innermost, as they lie in a projection
    h = pid % heads
    j = pid // heads % blocks
    b = pid // heads // blocks
    tokens = tl.load(live + j)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(j * BLOCK_K * k_sn, ALIGN) + tl.multiple_of(h * k_sh, ALIGN)
    v += tl.multiple_of(b * v_sb, ALIGN) + tl.multiple_of(j * BLOCK_K * v_sn, ALIGN) + tl.multiple_of(h * v_sh, ALIGN)
    _mean(k, k_sn, k_means, pid * D, tokens, D, D0, D1, R, ALIGN)
    _mean(v, v_sn, v_means, pid * D, tokens, D, D0, D1, R, ALIGN)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    blocks: int,
    kv_heads: int,
    strides: tuple[int, ...],
    list_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    block_q: int,
    block_k: int,
) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    b, p, h, d = shape
    settings = config(d, dtype.itemsize, capability_of(device), block_q, block_k)
    d0, d1 = parts(d)
    constants = {
        "D": d,
        "D0": d0,
        "D1": d1,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "ALIGN": alignment(*strides) if aligned else 1,
        "PRECISION": precision(dtype),
        **settings,
    }
    means = blocks * kv_heads * d, kv_heads * d, d
    numbers = (p, blocks, h, h // kv_heads, *strides, *means, *list_strides)
    return Launch(p // settings["M"] * b * h, numbers, constants)


@functools.lru_cache(maxsize=1024)
def _pool_plan(
    shape: torch.Size, strides: tuple[int, ...], device: torch.device, aligned: bool, block_k: int
) -> Launch:
    b, p, h, d = shape
    d0, d1 = parts(d)
    align = alignment(*strides) if aligned else 1
    constants = {"D": d, "D0": d0, "D1": d1, "BLOCK_K": block_k, "R": POOL_ROWS, "ALIGN": align, "num_warps": 4}
    return Launch(b * h * (p // block_k), (p // block_k, h, *strides), constants)


@functools.lru_cache(maxsize=1024)
def _check(
    q: Kind, k: Kind, v: Kind, counts: Kind, indices: Kind, keep: Kind, live: Kind, block_q: int, block_k: int
) -> None:
    """Looked up, as a plan is: a call whose tensors are like those of one that was taken is taken.

    Raises:
        ValueError: what the kernel does not take.
    """

    def wanted(what: str, got: object) -> ValueError:
        return ValueError(f"block_sparse.attend: wanted {what}, got {got}")

    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in BLOCKS:
            raise wanted(f"{name} 64 or 128", block)
    shapes = [tuple(x[0]) for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes) or 0 in shapes[0] + shapes[1]:
        raise wanted("q [B, P, H, D] and k, v [B, P, Hkv, D], none empty", shapes)
    (b, p_q, h, d), (_, p_k, h_kv, _) = shapes[:2]
    if shapes[1] != (b, p_k, h_kv, d) or shapes[2] != shapes[1] or h % h_kv:
        raise wanted("k and v [B, P, Hkv, D] with q's B and D, and Hkv that divides H", f"q, k, v {shapes}")
    if d % 8 or not 16 <= d <= 256:
        raise wanted("head_dim 16 to 256 in steps of 8", d)
    if not q[1] == k[1] == v[1] or q[1] not in (torch.float16, torch.bfloat16, torch.float32):
        raise wanted("q, k and v all in fp16, bf16 or fp32", f"{q[1]}, {k[1]} and {v[1]}")
    if p_q % block_q or p_k % block_k:
        raise wanted(f"whole blocks of {block_q} queries and {block_k} keys", f"{p_q} and {p_k} places")
    nq, nk = p_q // block_q, p_k // block_k
    for name, (shape, dtype, _), like, of in (
        ("counts", counts, (b, h, nq), torch.int32),
        ("indices", indices, (b, h, nq, nk), torch.int32),
        ("keep", keep, (b, h, nq, nk), torch.bool),
        ("live", live, (nk,), torch.int32),
    ):
        if shape != like or dtype != of:
            raise wanted(f"{name} {of} {like}", f"{dtype} {tuple(shape)}")
    for name, x in (("k", k), ("v", v), ("counts", counts), ("indices", indices), ("keep", keep), ("live", live)):
        if x[2] != q[2]:
            raise wanted(f"{name} on q's device, {q[2]}", x[2])


def _kind(x: Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def pool(k: Tensor, v: Tensor, live: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """The means of k and of v [B, P, Hkv, D] over the tokens of each block.

    Args:
        live: int32 [nk], how many places of a block are taken, the first ones; what the others hold is not read.

    Returns:
        Two tensors [B, nk, Hkv, D], summed in fp32; 0 for an empty block.
    """
    k, v = unit_stride(k), unit_stride(v)
    b, p, h, d = k.shape
    k_means, v_means = (torch.empty((b, p // block_k, h, d), dtype=x.dtype, device=x.device) for x in (k, v))
    launch = _pool_plan(k.shape, (*k.stride()[:3], *v.stride()[:3]), k.device, aligned(k, v), block_k)
    with on_device_of(k):
        launch(_pool, (k, v, live.contiguous(), k_means, v_means))
    return k_means, v_means


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    pooled: bool = False,
    return_lse: bool = False,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention to the blocks of a list.

    Args:
        q: [B, P, H, D], any strides. k, v: [B, P, Hkv, D], any strides; Hkv divides H. P are whole blocks, of the queries
            and of the keys. Empty places hold finite numbers.
        blocks: the lists, on q's device; B and H may be expanded.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        pooled: whether blocks that are not in a list take part by their means.
        return_lse: whether to return the log-sum-exp too.
        flag: int32, set to 1 where the output is not finite.

    Returns:
        out [B, P, H, D] contiguous, and lse [B, H, P] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: what the kernel does not take, before anything is launched.
    """
    lists = blocks.counts, blocks.indices, blocks.keep, blocks.live
    _check(*map(_kind, (q, k, v, *lists)), blocks.block_q, blocks.block_k)
    qk_scale = scale_log2(scale, q.shape[3])
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    counts, indices, keep, live = lists
    live = live.contiguous()
    b, p, h, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((b, h, p), dtype=torch.float32, device=q.device) if return_lse else None
    means = pool(k, v, live, blocks.block_k) if pooled else (None, None)
    launch = _plan(
        q.shape,
        live.shape[0],
        k.shape[2],
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        (*counts.stride(), *indices.stride(), *keep.stride()),
        q.dtype,
        q.device,
        aligned(q, k, v),
        blocks.block_q,
        blocks.block_k,
    )
    tensors = (q, k, v, out, counts, indices, live, keep.view(torch.int8) if pooled else None, *means, lse, flag)
    with on_device_of(q):
        launch(_forward, tensors, qk_scale)
    return out, lse
