"""Exact attention to chosen blocks of keys, in Triton: each block of queries walks along its own list.

Over the keys that the list names, FlashAttention 2's forward (kernels/flash.py).

Blocks of keys may be filled in part. Their empty places are read, without harm as long as they hold finite numbers, so
that loads need no compare and do not wait for a count; scores are masked, in such blocks alone. The keys may end within
their last block: the tile that would reach beyond them is read from as far in front as it takes to end with them, and what
lies in front of the block is masked like an empty place.

The next index is read one tile ahead: the loads of a tile begin without waiting for it. Programs of one head follow one
another, and each reads any of its keys, so that these stay in L2. Counts of tokens and blocks are run-time integers.

Letters: B batch, Pq/Pk places of queries and of keys, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and
of keys; M queries and N keys a tile.

Refuses: blocks of other than 64, 128 or 192 queries and 64 or 128 keys, head_dim other than 16 to 256 in steps of 8.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
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

BLOCKS_Q = (64, 128, 192)
BLOCKS_K = (64, 128)
Kind = tuple[torch.Size, torch.dtype, torch.device]
Lists = tuple[Kind, Kind, Kind, Kind, int, int]  # counts, indices, keep, live; places of a block of queries and of keys


@functools.cache
def config(head_dim: int, itemsize: int, capability: int, block_q: int, block_k: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages: those of flash.py where they fit into blocks, and nothing spills."""
    m, n, warps, stages = flash.config(head_dim, itemsize, capability, masked=False).values()
    datacenter = capability // 10 in (9, 10)
    rows = m if block_q % m == 0 else 64
    n = min(n, block_k, rows)  # 64 x 128 on four warps spills
    settings = {"M": rows, "N": n, "num_warps": max(4, warps * rows // m), "num_stages": stages}
    if rows < m and not datacenter:
        settings["maxnreg"] = 255  # the assembler would rather spill and fit three blocks on a processor
    return settings


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=[
    "q_len", "kv_len", "heads", "kv_group",
    *(f"{x}_s{axis}" for x in "qkvo" for axis in "bnh"),
    *(f"counts_s{axis}" for axis in "bhq"), *(f"indices_s{axis}" for axis in "bhqk"),
])  # fmt: skip
def _forward(
    q, k, v, out,
    counts, indices, live,
    lse, flag,  # or None
    qk_scale,  # scale * log2(e)
    q_len, kv_len, heads, kv_group,  # kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    v_sb, v_sn, v_sh,
    o_sb, o_sn, o_sh,
    counts_sb, counts_sh, counts_sq,
    indices_sb, indices_sh, indices_sq, indices_sk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(q_len, M)
    pid = tl.program_id(0)
    head_of_batch = pid // tiles  # heads outermost: all queries of a head before the next
    first = (pid % tiles) * M
    b = (head_of_batch // heads).to(tl.int64)
    h = (head_of_batch % heads).to(tl.int64)
    i = (first // BLOCK_Q).to(tl.int64)
    h_kv = h // kv_group
    queries = tl.arange(0, M)  # of the tile
    here = queries < q_len - first

    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h * q_sh, ALIGN)
    q += tl.multiple_of(first.to(tl.int64) * q_sn, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv * k_sh, ALIGN)
    v += tl.multiple_of(b * v_sb, ALIGN) + tl.multiple_of(h_kv * v_sh, ALIGN)
    q_rows = tl.multiple_of(queries * q_sn, ALIGN)[:, None]
    k_rows = tl.multiple_of(tl.arange(0, N) * k_sn, ALIGN)[:, None]
    v_rows = tl.multiple_of(tl.arange(0, N) * v_sn, ALIGN)[:, None]
    all_there = tl.full([N, 1], True, tl.int1)

    q0, q1 = load_head(q, q_rows, here[:, None], D, D0, D1)
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
        begin = tl.minimum(start, kv_len - N)  # of what is read
        k0, k1 = load_head(k + tl.multiple_of(k_sn.to(tl.int64) * begin, ALIGN), k_rows, all_there, D, D0, D1)
        s = scores(q0, q1, k0, k1, D1, PRECISION)
        if limit < start + N:
            keys = begin + tl.arange(0, N)
            s = tl.where(((keys >= start) & (keys < limit))[None, :], s, float("-inf"))
        acc0, acc1, m, l = accumulate(
            acc0, acc1, m, l, s, qk_scale, v + tl.multiple_of(v_sn.to(tl.int64) * begin, ALIGN), 0, v_rows, v_sn,
            all_there, D, D0, D1, True, PRECISION,
        )  # fmt: skip

    m *= qk_scale

    out += tl.multiple_of(b * o_sb, ALIGN) + tl.multiple_of(h * o_sh, ALIGN)
    out += tl.multiple_of(first.to(tl.int64) * o_sn, ALIGN)
    o_rows = tl.multiple_of(queries * o_sn, ALIGN)[:, None]
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
    if lse is not None:  # [B, H, Pq]
        value = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * LN2)
        tl.store(lse + head_of_batch.to(tl.int64) * q_len + first + queries, value, here)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_len: int,
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
    b, nq, h, d = shape
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
    numbers = (nq, kv_len, h, h // kv_heads, *strides, *list_strides)
    return Launch(-(-nq // settings["M"]) * b * h, numbers, constants)


def kind_of(x: Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def kinds_of(blocks: BlockList) -> Lists:
    tensors = blocks.counts, blocks.indices, blocks.keep, blocks.live
    return (*map(kind_of, tensors), blocks.block_q, blocks.block_k)


def _wanted(caller: str, what: str, got: object) -> ValueError:
    return ValueError(f"{caller}: wanted {what}, got {got}")


def check_lists(
    caller: str, lists: Lists, shape: tuple[int, int, int, int], device: torch.device, blocks_k: tuple[int, ...]
) -> None:
    """That lists are those of a call of `shape` B, H, Pq, Pk on `device`, with one of `blocks_k` as places of a key block.

    Raises:
        ValueError: they are not.
    """
    *tensors, block_q, block_k = lists
    for name, block, choices in (("block_q", block_q, BLOCKS_Q), ("block_k", block_k, blocks_k)):
        if block not in choices:
            raise _wanted(caller, f"{name} {' or '.join(map(str, choices))}", block)
    b, h, p_q, p_k = shape
    nq, nk = -(-p_q // block_q), -(-p_k // block_k)
    for (name, dtype, like), (size, is_dtype, is_on) in zip(
        (
            ("counts", torch.int32, (b, h, nq)),
            ("indices", torch.int32, (b, h, nq, nk)),
            ("keep", torch.bool, (b, h, nq, nk)),
            ("live", torch.int32, (nk,)),
        ),
        tensors,
        strict=True,
    ):
        if size != like or is_dtype != dtype:
            raise _wanted(caller, f"{name} {dtype} {like}", f"{is_dtype} {tuple(size)}")
        if is_on != device:
            raise _wanted(caller, f"{name} on q's device, {device}", is_on)


@functools.lru_cache(maxsize=1024)
def _check(q: Kind, k: Kind, v: Kind, lists: Lists) -> None:
    """Looked up, as a plan is: a call whose tensors are like those of one that was taken is taken.

    Raises:
        ValueError: what the kernel does not take.
    """
    wanted = functools.partial(_wanted, "block_sparse.attend")
    shapes = [tuple(x[0]) for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes) or 0 in shapes[0] + shapes[1]:
        raise wanted("q [B, Pq, H, D] and k, v [B, Pk, Hkv, D], none empty", shapes)
    (b, p_q, h, d), (_, p_k, h_kv, _) = shapes[:2]
    if shapes[1] != (b, p_k, h_kv, d) or shapes[2] != shapes[1] or h % h_kv:
        raise wanted("k and v [B, Pk, Hkv, D] with q's B and D, and Hkv that divides H", f"q, k, v {shapes}")
    if d % 8 or not 16 <= d <= 256:
        raise wanted("head_dim 16 to 256 in steps of 8", d)
    if not q[1] == k[1] == v[1] or q[1] not in (torch.float16, torch.bfloat16, torch.float32):
        raise wanted("q, k and v all in fp16, bf16 or fp32", f"{q[1]}, {k[1]} and {v[1]}")
    for name, x in (("k", k), ("v", v)):
        if x[2] != q[2]:
            raise wanted(f"{name} on q's device, {q[2]}", x[2])
    check_lists("block_sparse.attend", lists, (b, h, p_q, p_k), q[2], BLOCKS_K)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention to the blocks of a list.

    Args:
        q: [B, Pq, H, D], any strides. k, v: [B, Pk, Hkv, D], any strides; Hkv divides H. Pq and Pk may end within the last
            block. Empty places hold finite numbers, and so do v's last 128 keys where they end so.
        blocks: the lists, on q's device, of ceil(Pq / block_q) blocks of queries and ceil(Pk / block_k) of keys; B and H
            may be expanded.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        return_lse: whether to return the log-sum-exp too.
        flag: int32, set to 1 where the output is not finite.

    Returns:
        out [B, Pq, H, D] contiguous, and lse [B, H, Pq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: what the kernel does not take, before anything is launched.
    """
    _check(*map(kind_of, (q, k, v)), kinds_of(blocks))
    qk_scale = scale_log2(scale, q.shape[3])
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    counts, indices, live = blocks.counts, blocks.indices, blocks.live.contiguous()
    b, nq, h, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device) if return_lse else None
    missing = blocks.block_k - k.shape[1]
    if missing > 0:  # tiles are read whole
        k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
    launch = _plan(
        q.shape,
        k.shape[1],
        k.shape[2],
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        (*counts.stride(), *indices.stride()),
        q.dtype,
        q.device,
        aligned(q, k, v),
        blocks.block_q,
        blocks.block_k,
    )
    tensors = (q, k, v, out, counts, indices, live, lse, flag)
    with on_device_of(q):
        launch(_forward, tensors, qk_scale)
    return out, lse
