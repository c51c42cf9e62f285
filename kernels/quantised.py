"""Attention on quantised operands in Triton: INT8 q k^T; p v in e4m3, in 16 bits or in INT8. The algorithm of SageAttention 2.

q, k and v come from the pre-pass (kernels/quantise.py). In units of log2, with one scale qs a query and ks four a block
of keys, and an offset F (log2 of what the greatest weight becomes before it is rounded: 448, 1 or 127):

    s = qs ks (q8 k8^T),  m' = max(m, rowmax s),  p = 2^(s - m' + F),  l' = 2^(m - m') l + rowsum p,
    acc' = 2^(m - m') acc + round(p) v8,          out = acc / l * vs,  lse = (m + log2 l - F) ln 2 + scale q . mean(k)

(Zhang et al., arXiv:2411.10958, sections 3.1 to 3.4, in base 2.) m is the exact maximum: with an older one p would pass
e4m3's greatest number. Products in e4m3 keep 14 bits of their sum on Hopper, so that each tile's has an accumulator of
its own, which is added to the one in fp32 (two levels, section 3.4). With INT8 p the tile's own maximum takes the place
of m' in p, so that p has its eight bits in each tile; the sum is exact, and 2^(max of the tile - m') is put on it.

A thread of a tensor core's result holds the columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of each 16, t = 0..3: of one key scale
of four. As 8-bit operand of the next product it must hold 4 t .. 4 t + 3. So the columns are renamed, not moved, and v is
stored in that order (kernels/quantise.py).

Where lists are given, each block of queries walks along its own list of key blocks, as in block_sparse.py: the index is
read one tile ahead. Lists ascend, so that the block in which the keys end is the last that counts, and the masked tile at
the end is the dense kernel's. With every block listed the tiles are too, and their order.

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim, nk blocks of keys; W what q and k are
padded to; M queries and N keys a tile.

Refuses: masks, causal, fp32, head_dim that is no multiple of 8 from 16 to 256; e4m3 below compute capability 8.9; lists of
key blocks other than the operands'.
"""

from __future__ import annotations

import functools
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.call import Call
from videoattn.kernels.block_sparse import Lists, check_lists, kinds_of
from videoattn.kernels.operands import KEYS, OFFSET, PV, Quantised
from videoattn.kernels.quantised_backend import QuantisedBackend
from videoattn.kernels.tiles import alignment, load_head, not_finite, parts, store_part
from videoattn.kernels.triton_backend import (
    Launch,
    Tile,
    Tiles,
    aligned,
    capability_of,
    on_device_of,
    readable,
    unit_stride,
)
from videoattn.selection.block_list import BlockList

LN2 = tl.constexpr(0.6931471805599453)
OFFSETS = {"fp8": OFFSET, "16bit": 0.0, "int8": 6.988684686772166}  # the last: log2(127)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: a number added to it is rounded to an integer, which its low bits are
ROUNDER_BITS = tl.constexpr(0x4B400000)
ULP = tl.constexpr(2.0**-22)
LEAST = 32  # the least inner size of tl.dot in 8 bits
COUNTED = 256  # blocks of a list at a time, where those below a row's length are counted
LIST_STRIDES = (
    *(f"counts_s{axis}" for axis in "bhq"),
    *(f"{name}_s{axis}" for name in ("indices", "keep") for axis in "bhqk"),
)


@functools.cache
def config(head_dim: int, pv: PV, capability: int, block_q: int | None = None) -> dict[str, int]:
    """Tile sizes, warps, pipeline stages and ways of working, for a head_dim, a kind of p v and a card (90: Hopper).

    TMA: tiles are copied by Hopper's unit for it, which leaves a quarter of the registers free. MAGIC: sums start at
    1.5 * 2^23 in fp32's bits, so that they need no conversion. On sm_100 Triton multiplies INT8 with Ampere's
    instruction, e4m3 and 16 bits with the card's own. What was not measured is the largest that compiles without spills.
    block_q: of the lists, if any, of which tiles are parts.
    """
    padded = sum(parts(head_dim, LEAST))
    if capability // 10 == 9:
        m, n, warps, stages = 64, 128 if padded <= 192 else 64, 4, 2
        if pv == "16bit" and padded <= 128:
            m, n, stages = 128, 64, 3
        if pv != "16bit" and padded > 192:
            warps = 8
    elif padded <= 64:
        m, n, warps, stages = 128, 64, 4, 2
    elif padded <= 128 or capability // 10 == 10 and pv != "int8":
        m, n, warps, stages = 128, 64, 8, 2
    elif padded <= 160:
        m, n, warps, stages = 128, 32, 8, 2
    elif padded <= 192 and pv == "16bit":
        m, n, warps, stages = 128, 16, 8, 2
    else:
        m, n, warps, stages = 64, 32, 8, 2
    settings = {"M": m, "N": n, "num_warps": warps, "num_stages": stages, "MAGIC": False, "TMA": capability // 10 == 9}
    if capability // 10 == 9 and pv == "fp8" and padded == 128:
        settings["maxnreg"] = 168  # three blocks a processor
    if block_q is not None and block_q % m:
        settings |= {"M": 64, "num_warps": max(4, warps // 2)}
        if capability // 10 != 9 and pv == "int8" and padded > 64:
            settings["N"] = min(n, 32)  # 64 spills where there are gaps
    return settings


@triton.jit
def _load_k(
    k, k1, b, h_kv, start, limit,
    W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, N: tl.constexpr, PARTIAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys [N, W0] and [N, W1]; 0 beyond W."""
    if TMA:
        x0 = k.load([b, h_kv, start, 0]).reshape(N, W0)
        x1 = k1.load([b, h_kv, start, W0]).reshape(N, W1) if W1 else x0
    else:
        rows = tl.arange(0, N)[:, None]
        keep = start + rows < limit if PARTIAL else tl.full([N, 1], True, tl.int1)
        x0, x1 = load_head(k + tl.full([], W, tl.int64) * start, rows * W, keep, W, W0, W1)
    return x0, x1


@triton.jit
def _load_v(
    v, v1, v_rows0, v_rows1, v_sn, b, h_kv, start, limit,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, N: tl.constexpr,
    PV: tl.constexpr, PARTIAL: tl.constexpr, LENGTHS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Values [N, D0] and [N, D1]; 0 beyond the head and the limit."""
    W: tl.constexpr = (D + 15) // 16 * 16
    if PV == "16bit":
        keep = (start + tl.arange(0, N) < limit)[:, None] if PARTIAL else tl.full([N, 1], True, tl.int1)
        if TMA:
            x0 = v.load([b, h_kv, start, 0]).reshape(N, D0)
            x1 = v1.load([b, h_kv, start, D0]).reshape(N, D1) if D1 else x0
            if PARTIAL and LENGTHS:  # what lies beyond a row's length may be anything; beyond the tensor it is 0
                x0 = tl.where(keep, x0, 0.0)
                x1 = tl.where(keep, x1, 0.0) if D1 else x0
        else:
            x0, x1 = load_head(v + v_sn.to(tl.int64) * start, v_rows0, keep, D, D0, D1)
    elif TMA:
        x0 = tl.trans(v.load([b, h_kv, 0, start]).reshape(D0, N))
        x1 = tl.trans(v1.load([b, h_kv, D0, start]).reshape(D1, N)) if D1 else x0
    else:  # stored to the end of the tile, with zeros
        columns = tl.arange(0, N)[None, :]
        d0 = tl.arange(0, D0)[:, None]
        x0 = tl.trans(tl.load(v + start + (v_rows0 + columns), d0 < W, 0.0))
        x1 = x0
        if D1:
            d1 = D0 + tl.arange(0, D1)[:, None]
            x1 = tl.trans(tl.load(v + start + (v_rows1 + columns), d1 < W, 0.0))
    return x0, x1


@triton.jit
def _offset(b, sb, h, sh, i, si):
    return b.to(tl.int64) * sb + h.to(tl.int64) * sh + i.to(tl.int64) * si


@triton.jit
def _sum_of_own(x):
    """Sums [M, 4] of [M, N / 16, 2, 4, 2]: of what one thread of four holds of a row."""
    return tl.sum(tl.sum(tl.sum(x, 4), 2), 1)


@triton.jit
def _tile(
    acc0, acc1, m, l,
    q0, q1, q_scale, k, k1, k_scale, v, v1, v_rows0, v_rows1, v_sn,
    b, h_kv, start, limit,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PV: tl.constexpr, OFFSET: tl.constexpr, KEYS: tl.constexpr,
    PARTIAL: tl.constexpr, GAPS: tl.constexpr, LENGTHS: tl.constexpr, MAGIC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of keys. PARTIAL: some of its keys count, not all. GAPS: some, all or none, those below the limit."""
    k0, k1 = _load_k(k, k1, b, h_kv, start, limit, (D + 15) // 16 * 16, W0, W1, N, PARTIAL, TMA)
    key_scale = tl.load(k_scale + start // KEYS * 4 + tl.arange(0, 4))
    if MAGIC:
        s = tl.dot(q0, tl.trans(k0), tl.full([M, N], ROUNDER_BITS, tl.int32), out_dtype=tl.int32)
    else:
        s = tl.dot(q0, tl.trans(k0), out_dtype=tl.int32)
    if W1:
        s = tl.dot(q1, tl.trans(k1), s, out_dtype=tl.int32)
    s = s.to(tl.float32, bitcast=True) - ROUNDER if MAGIC else s.to(tl.float32)

    if GAPS and limit < start + N:
        s = tl.where((start + tl.arange(0, N) < limit)[None, :], s, float("-inf"))

    # Column 16 i + 8 j + 2 t + r at [i, j, t, r]: t is the key's scale, and the thread that holds it.
    s = tl.reshape(s, [M, N // 16, 2, 4, 2])
    scale = q_scale[:, None] * key_scale[None, :]  # [M, 4]: above zero, so that it may follow the maximum
    if PARTIAL:
        keep = tl.reshape(start + tl.arange(0, N) < limit, [1, N // 16, 2, 4, 2])
        scaled = tl.where(keep, s * scale[:, None, None, :, None], float("-inf"))
        top = tl.max(tl.max(tl.max(tl.max(scaled, 4), 2), 1), 1)
    else:
        top = tl.max(tl.max(tl.max(tl.max(s, 4), 2), 1) * scale, 1)
    m_new = tl.maximum(m, top)
    base = m_new  # what weights are measured from
    if GAPS:  # without a key so far, weights are 2^-inf from any base; without one in the tile, its own is the row's
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        top = tl.where(top == float("-inf"), base, top)
    shrink = tl.exp2(m - base)
    if PV == "int8":
        shift = top + tl.abs(top) * ULP - OFFSET  # so that no p passes 127, however s * scale is rounded
        grow = tl.exp2(shift - (base - OFFSET))
    else:
        shift = base - OFFSET
    shift = shift[:, None, None, None, None]
    p = tl.exp2(scaled - shift if PARTIAL else s * scale[:, None, None, :, None] - shift)
    if PV == "int8":
        l = l * shrink[:, None] + _sum_of_own(p) * grow[:, None]
        p = (p + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        l = l * shrink[:, None] + _sum_of_own(p)
        p = p.to(tl.float8e4nv) if PV == "fp8" else p

    v0, v1 = _load_v(v, v1, v_rows0, v_rows1, v_sn, b, h_kv, start, limit, D, D0, D1, N, PV, PARTIAL, LENGTHS, TMA)
    shrink = shrink[:, None]
    if PV == "16bit":
        p = tl.reshape(p, [M, N]).to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink)
        if D1:
            acc1 = tl.dot(p, v1, acc1 * shrink)
    else:
        p = tl.reshape(tl.permute(p, 0, 1, 3, 2, 4), [M, N])
        if PV == "fp8":
            acc0 = acc0 * shrink + tl.dot(p, v0)
            if D1:
                acc1 = acc1 * shrink + tl.dot(p, v1)
        else:
            acc0 = acc0 * shrink + tl.dot(p, v0, out_dtype=tl.int32).to(tl.float32) * grow[:, None]
            if D1:
                acc1 = acc1 * shrink + tl.dot(p, v1, out_dtype=tl.int32).to(tl.float32) * grow[:, None]
    return acc0, acc1, m_new, l


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=["q_len", "kv_len", "heads", "kv_group", "v_sb", "v_sn", "v_sh", *LIST_STRIDES])
def _forward(
    q, q_scale, k, k1, k_scale, v, v1, out,  # k1, v1: the second part's tiles for TMA
    v_scale, lse_shift, lse, kv_lens, flag,  # or None
    counts, indices, keep, live,  # of the lists, or None; live: None too where all blocks but the last are full
    q_len, kv_len, heads, kv_group,  # kv_group: query heads a key head
    v_sb, v_sn, v_sh,  # of 16-bit v
    counts_sb, counts_sh, counts_sq,
    indices_sb, indices_sh, indices_sq, indices_sk,
    keep_sb, keep_sh, keep_sq, keep_sk,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PV: tl.constexpr, OFFSET: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_Q: tl.constexpr, COUNTED: tl.constexpr, MAGIC: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = (D + 15) // 16 * 16
    tiles = tl.cdiv(q_len, M)
    pid = tl.program_id(0)
    head_of_batch = pid // tiles  # heads outermost: all queries of a head before the next
    first = (pid % tiles) * M
    b = head_of_batch // heads
    h = head_of_batch % heads
    h_kv = h // kv_group
    kv_head = (b * (heads // kv_group) + h_kv).to(tl.int64)
    queries = first + tl.arange(0, M)
    here = queries < q_len
    rows = head_of_batch.to(tl.int64) * q_len + queries  # of q, q_scale, lse_shift and lse

    k_scale += kv_head * tl.cdiv(kv_len, KEYS) * 4
    if not TMA:
        k += kv_head * kv_len * W
    v_rows0, v_rows1 = None, None
    if not TMA and PV == "16bit":
        v += tl.multiple_of(b.to(tl.int64) * v_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * v_sh, ALIGN)
        v_rows0 = tl.multiple_of(tl.arange(0, N) * v_sn, ALIGN)[:, None]
    elif not TMA:
        tokens = tl.cdiv(kv_len, KEYS).to(tl.int64) * KEYS
        v += kv_head * tokens * W
        v_rows0 = (tl.arange(0, D0) * tokens)[:, None]
        if D1:
            v_rows1 = ((D0 + tl.arange(0, D1)) * tokens)[:, None]

    limit = kv_len
    if kv_lens is not None:
        limit = tl.minimum(limit, tl.load(kv_lens + b))
    whole = limit // N * N
    tail = whole
    if counts is not None:
        i = first // BLOCK_Q
        counts += _offset(b, counts_sb, h, counts_sh, i, counts_sq)
        indices += _offset(b, indices_sb, h, indices_sh, i, indices_sq)
        keep += _offset(b, keep_sb, h, keep_sh, i, keep_sq)
        last = limit // KEYS  # the block in which the keys end, if they end within one
        ends = tl.load(keep + last.to(tl.int64) * keep_sk, limit % KEYS != 0, 0).to(tl.int32)  # whether the list has it
        if kv_lens is None:
            before = tl.load(counts) - ends
        else:
            before = 0
            for j in tl.range(0, last, COUNTED):
                blocks = j + tl.arange(0, COUNTED)
                before += tl.sum(tl.load(keep + blocks.to(tl.int64) * keep_sk, blocks < last, 0).to(tl.int32))
        whole = before * KEYS + ends * (tail - last * KEYS)  # keys of the list, but for the tile at the end
        if ends == 0:
            limit = tail
        elif live is not None:
            limit = tl.minimum(limit, last * KEYS + tl.load(live + last))

    q0, q1 = load_head(q, (rows * W)[:, None], here[:, None], W, W0, W1)
    row_scale = tl.load(q_scale + rows, here, 1.0)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M, 4], tl.float32)
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1], tl.float32) if D1 else acc0
    block = tl.load(indices) if counts is not None else 0
    for at in tl.range(0, whole, N):
        start = at
        end = limit
        if counts is not None:
            start = block * KEYS + tl.multiple_of(at % KEYS, N)
            end = block * KEYS + tl.load(live + block) if live is not None else limit
            block = tl.load(indices + indices_sk.to(tl.int64) * ((at + N) // KEYS), at + N < whole, 0)
        acc0, acc1, m, l = _tile(
            acc0, acc1, m, l, q0, q1, row_scale, k, k1, k_scale, v, v1, v_rows0, v_rows1, v_sn, b, h_kv, start, end,
            D, W0, W1, D0, D1, M, N, PV, OFFSET, KEYS, False, live is not None, kv_lens is not None, MAGIC, TMA,
        )  # fmt: skip
    for start in tl.range(tail, limit, N, num_stages=1):
        acc0, acc1, m, l = _tile(
            acc0, acc1, m, l, q0, q1, row_scale, k, k1, k_scale, v, v1, v_rows0, v_rows1, v_sn, b, h_kv, start, limit,
            D, W0, W1, D0, D1, M, N, PV, OFFSET, KEYS, True, False, kv_lens is not None, MAGIC, TMA,
        )  # fmt: skip

    l = tl.sum(l, 1)
    inverse = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    out += (b.to(tl.int64) * q_len * heads + h) * D
    o_rows = (queries.to(tl.int64) * heads * D)[:, None]
    d0 = tl.arange(0, D0)
    x = acc0 * inverse
    if v_scale is not None:
        x *= tl.load(v_scale + (kv_head * D + d0), d0 < D, 0.0)[None, :]
    bad = not_finite(x)
    store_part(out, o_rows, here[:, None], x.to(out.dtype.element_ty), 0, D)
    if D1:
        d1 = D0 + tl.arange(0, D1)
        x = acc1 * inverse
        if v_scale is not None:
            x *= tl.load(v_scale + (kv_head * D + d1), d1 < D, 0.0)[None, :]
        bad = bad | not_finite(x)
        store_part(out, o_rows, here[:, None], x.to(out.dtype.element_ty), D0, D)
    if flag is not None:
        tl.store(flag, 1, mask=bad)  # a plain store: the flag may lie in host memory
    if lse is not None:  # [B, H, Nq]
        value = (m + tl.log2(l) - OFFSET) * LN2 + tl.load(lse_shift + rows, here, 0.0)
        tl.store(lse + rows, tl.where(l == 0.0, float("-inf"), value), here)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_len: int,
    kv_heads: int,
    head_dim: int,
    pv: PV,
    v_strides: tuple[int, ...],
    list_strides: tuple[int, ...],
    block_q: int | None,
    device: torch.device,
    aligned: bool,
    tuned: tuple[tuple[str, int], ...],
) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    b, h, nq, _ = shape
    settings = config(head_dim, pv, capability_of(device), block_q) | dict(tuned)
    if block_q is not None and block_q % settings["M"]:
        raise ValueError(f"attend_quantised: wanted tiles that divide {block_q} queries, got {settings['M']}")
    w0, w1 = parts(head_dim, LEAST)
    d0, d1 = parts(head_dim) if pv == "16bit" else (w0, w1)
    constants = {
        "D": head_dim,
        "W0": w0,
        "W1": w1,
        "D0": d0,
        "D1": d1,
        "PV": pv,
        "OFFSET": OFFSETS[pv],
        "KEYS": KEYS,
        "BLOCK_Q": block_q,
        "COUNTED": COUNTED,
        "ALIGN": alignment(*v_strides) if aligned else 1,
        **settings,
    }
    if not list_strides:
        constants |= dict.fromkeys(LIST_STRIDES)
    numbers = (nq, kv_len, h, h // kv_heads, *v_strides, *list_strides)
    return Launch(-(-nq // settings["M"]) * b * h, numbers, constants)


@functools.lru_cache(maxsize=1024)
def _check_lists(lists: Lists, q: torch.Size, kv_len: int, device: torch.device) -> None:
    """Looked up, as a plan is. Raises ValueError for lists that are not the operands'."""
    check_lists("attend_quantised", lists, (*q[:3], kv_len), device, (KEYS,))


def attend_quantised(
    x: Quantised,
    *,
    head_dim: int,
    dtype: torch.dtype,
    kv_len: Tensor | None = None,
    lists: BlockList | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
    tuned: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention on quantised operands.

    Args:
        x: the operands; v's dtype says in which of the three ways p v is computed.
        head_dim: D. dtype: of the output.
        kv_len: int32 [B] on q's device: row b attends to its first kv_len[b] keys; those that x was made with.
        lists: the key blocks, of KEYS places, that each block of queries attends to, on q's device; B and H may be
            expanded. Keys beyond kv_len do not count. Without gaps `live` is not read; with them, what is quantised of
            empty places is finite.
        return_lse: whether to return the log-sum-exp too; x.lse_shift is there then.
        flag: int32, set to 1 where the output is not finite.
        tuned: entries that replace those of the shipped config.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: lists that are not the operands', before anything is launched.
    """
    q, k, v = x.q, x.k, x.v
    b, h, nq, _ = q.shape
    block_q, list_strides, of_lists = None, (), (None, None, None, None)
    if lists is not None:
        _check_lists(kinds_of(lists), q.shape, k.shape[2], q.device)
        block_q = lists.block_q
        list_strides = (*lists.counts.stride(), *lists.indices.stride(), *lists.keep.stride())
        live = lists.live.contiguous() if lists.gaps else None
        of_lists = lists.counts, lists.indices, lists.keep.view(torch.int8), live
    pv: PV = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(v.dtype, "16bit")
    strides, v_aligned = (0, 0, 0), True
    if pv == "16bit":
        v = unit_stride(v)
        strides, v_aligned = v.stride()[:3], aligned(v)
    out = torch.empty((b, nq, h, head_dim), dtype=dtype, device=q.device)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device) if return_lse else None
    changes = tuple(tuned.items()) if tuned else ()
    sizes = q.shape, k.shape[2], k.shape[1], head_dim, pv
    launch = _plan(*sizes, strides, list_strides, block_q, q.device, v_aligned, changes)
    made = launch.constants
    k1 = v1 = None
    if made["TMA"]:
        n = made["N"]
        k, k1 = Tiles.of(k, n, made["W0"]), Tiles.of(k, n, made["W1"]) if made["W1"] else None
        if pv == "16bit":
            v = readable(v).transpose(1, 2)
            v, v1 = Tiles.of(v, n, made["D0"]), Tiles.of(v, n, made["D1"]) if made["D1"] else None
        else:
            v, v1 = Tiles.of(v, made["D0"], n), Tiles.of(v, made["D1"], n) if made["D1"] else None
    tensors = (
        q,
        x.q_scale,
        k,
        k1,
        x.k_scale,
        v,
        v1,
        out,
        x.v_scale,
        x.lse_shift if return_lse else None,
        lse,
        kv_len,
        flag,
        *of_lists,
    )
    with on_device_of(q):
        launch(_forward, tensors)
    return out, lse


def _tile_of(call: Call, pv: PV) -> Tile:
    settings = config(call.head_dim, pv, capability_of(call.device))
    return Tile(settings["M"], settings["N"], settings["num_warps"])


def _backend(pv: PV) -> QuantisedBackend:
    return QuantisedBackend(
        f"triton_int8_{pv}", pv, attend_quantised, lambda call: None, functools.partial(_tile_of, pv=pv)
    )


BACKENDS = tuple(_backend(pv) for pv in get_args(PV))
