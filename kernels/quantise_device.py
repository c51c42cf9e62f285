"""The kernels of kernels/quantise.py: what the scales need, then every operand, from raw projections.

`_statistics` reads all of v and some tokens of k; `_operands` reads everything and writes everything. Both take tokens of
a row of the batch up to its length only: what lies beyond may be anything.

Absolute values are compared as integers: for floats without a sign the order is the same, and NaN stands above infinity
above every number, so that a maximum shows all of them. 0 * maximum then makes a scale NaN where one input was not finite.

Every tile has ELEMENTS elements, so that none of the three kinds of programs needs more registers than the others: as one
kernel they get what the greediest needs, and what is under way to memory is what all that fit on the card have asked for.

Letters: R rows of a tile, D head_dim, DP: D padded to a power of two, W: to a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from videoattn.kernels import operands
from videoattn.kernels.prologue_device import Rope, Source, begin, finish, inverse_rms, load_rows, tables, token_rows

KEYS = tl.constexpr(operands.KEYS)
GROUP = tl.constexpr(KEYS.value // 4)
SAMPLES = tl.constexpr(64)
TINY = tl.constexpr(1e-20)
LN2 = tl.constexpr(0.6931471805599453)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a number below 2^22, its last bits are the number, rounded

_SOURCE = ("tokens", "border", "sb0", "sn0", "sb1", "sn1", "sh")
_NUMBERS = [f"{x}_{name}" for x in "qkv" for name in _SOURCE] + [
    f"rope_{name}" for name in ("first", "last", "sb", "sn", "sh", "sp")
]


@triton.jit
def _bits(x):
    """The absolute values of x (fp32), as integers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(bits, LEVELS: tl.constexpr):
    """What a greatest absolute value makes of the scale and its inverse; NaN where it is not finite."""
    top = bits.to(tl.float32, bitcast=True)
    top = tl.where(top > TINY, top, TINY) + top * 0.0
    return top * (1.0 / LEVELS), LEVELS / top


@triton.jit
def _rounded(x):
    """x (fp32, up to 127) as int8: one addition, and the conversion keeps the lowest byte."""
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _length(kv_lens, b, tokens):
    length = tokens
    if kv_lens is not None:
        length = tl.minimum(tl.maximum(tl.load(kv_lens + b), 0), tokens)
    return length


@triton.jit(do_not_specialize=["kv_heads", *_NUMBERS[len(_SOURCE) :]])
def _statistics(
    k0, k1, k_w0, k_w1, k_b0, k_b1,
    v0, v1,
    cos, sin, kv_lens,
    k_mean,  # fp32 [B, Hkv, D]
    v_max,  # int16 [B, Hkv, D, CHUNKS], or None
    eps,
    kv_heads,
    k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh,
    v_tokens, v_border, v_sb0, v_sn0, v_sb1, v_sn1, v_sh,
    rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp,
    CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr, MEAN_ELEMENTS: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """Mean of k over some tokens; greatest absolute values of v, as its own 16 bits.

    The means first, they take longest; then the heads of a chunk side by side, as in memory.
    """
    DP: tl.constexpr = FORM.DP
    d = tl.arange(0, DP)
    pid = tl.program_id(0)
    per_row = kv_heads * (CHUNKS + 1) if v_max is not None else kv_heads
    b, h, chunk = pid // per_row, pid % kv_heads, pid % per_row // kv_heads - 1
    head = (b * kv_heads + h).to(tl.int64)
    length = _length(kv_lens, b, k_tokens)
    heads = h + tl.zeros([1], tl.int32)
    if chunk < 0:
        k = Source(k0, k1, k_w0, k_w1, k_b0, k_b1, k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh)
        rope = Rope(cos, sin, rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp)
        R: tl.constexpr = min(MEAN_ELEMENTS // DP, SAMPLES)
        stride = tl.maximum((length + SAMPLES - 1) // SAMPLES, 1) | 1  # odd: not the same column of every line
        count = (length + stride - 1) // stride
        zero = h * 0
        total = tl.zeros([DP], tl.float32)
        for first in range(0, count, R):
            tokens = (first + tl.arange(0, R)).to(tl.int64) * stride  # times a stride they may pass 2^31
            here = tokens < length
            rows = token_rows(k, b, zero, tokens, FORM)
            inverse = tl.zeros([1], tl.float32)
            if FORM.ACROSS:
                inverse = inverse_rms(rows, here, eps, MEAN_ELEMENTS, FORM)
            c, s = 0.0, 0.0
            if FORM.ROTATE and not FORM.BY_HEAD:
                c, s = tables(rope, b, zero, tokens, tl.zeros([1], tl.int32), here, FORM)
            tile = load_rows(k, rows, heads, here, FORM)
            tile = finish(tile, inverse, c, s, k, rope, b, zero, tokens, heads, eps, False, FORM)
            total += tl.sum(tl.where(here[:, None], tile, 0.0), 0)
        tl.store(k_mean + head * FORM.D + d, total / tl.maximum(count, 1), d < FORM.D)
    elif v_max is not None:  # Triton 3.6 compiles both branches
        VT: tl.constexpr = ELEMENTS // DP
        v = Source(v0, v1, None, None, None, None, v_tokens, v_border, v_sb0, v_sn0, v_sb1, v_sn1, v_sh)
        r = tl.arange(0, VT)
        top = tl.zeros([VT, DP], tl.int16)
        part = load_rows(v, token_rows(v, b, chunk * VT, r, FORM), heads, chunk * VT + r < length, FORM)
        for start in range(chunk * VT, length, CHUNKS * VT):  # all chunks go through memory side by side
            after = start + CHUNKS * VT
            following = load_rows(v, token_rows(v, b, after, r, FORM), heads, after + r < length, FORM)
            top = tl.maximum(top, part.to(tl.int16, bitcast=True) & 0x7FFF)
            part = following
        tl.store(v_max + (head * FORM.D + d) * CHUNKS + chunk, tl.max(top, 0).to(tl.int16), d < FORM.D)


@triton.jit(do_not_specialize=["heads", "kv_heads", "blocks", "q_split", "k_split", *_NUMBERS])
def _operands(
    q0, q1, q_w0, q_w1, q_b0, q_b1,
    k0, k1, k_w0, k_w1, k_b0, k_b1,
    v0, v1,
    cos, sin, kv_lens, k_mean, v_max,
    q8, q_scale, k8, k_scale, v8, v_scale,
    lse_shift,
    qk_scale,  # scale * log2(e)
    heads, kv_heads, blocks, q_split, k_split,  # blocks of KEYS tokens; parts that the heads are cut into
    q_tokens, q_border, q_sb0, q_sn0, q_sb1, q_sn1, q_sh,
    k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh,
    v_tokens, v_border, v_sb0, v_sn0, v_sb1, v_sn1, v_sh,
    rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp,
    EPS: tl.constexpr,
    CHUNKS: tl.constexpr, ELEMENTS: tl.constexpr, HB: tl.constexpr, V_WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,  # of v
    FORM: tl.constexpr,
):  # fmt: skip
    """Programs of a block of tokens, q's, k's and v's, follow one another: the tables come from memory once.

    The last block first: the end of v may still be in the cache.
    """
    rope = Rope(cos, sin, rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp)
    T: tl.constexpr = min(ELEMENTS // FORM.DP // HB, KEYS)  # tokens of a tile of HB heads of q
    GROUPS: tl.constexpr = max(1, min(4, ELEMENTS // FORM.DP // GROUP))  # of a tile of k
    q_programs, k_programs = q_split * (KEYS // T), k_split * (4 // GROUPS)
    v_programs = kv_heads if v8 is not None else 0
    of_block = q_programs + k_programs + v_programs
    pid = tl.program_id(0)
    b, pid = pid // (blocks * of_block), pid % (blocks * of_block)
    block, part = blocks - 1 - pid // of_block, pid % of_block
    if part < q_programs:
        q = Source(q0, q1, q_w0, q_w1, q_b0, q_b1, q_tokens, q_border, q_sb0, q_sn0, q_sb1, q_sn1, q_sh)
        share = (heads + q_split - 1) // q_split
        low = part % q_split * share
        start = block * KEYS + part // q_split * T
        if start < q_tokens:
            _quantise_q(
                q, rope, k_mean, q8, q_scale, lse_shift, qk_scale, b, start, low, tl.minimum(low + share, heads),
                heads, kv_heads, EPS, T, HB, FORM,
            )  # fmt: skip
    elif part < q_programs + k_programs:
        k = Source(k0, k1, k_w0, k_w1, k_b0, k_b1, k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh)
        share = (kv_heads + k_split - 1) // k_split
        part -= q_programs
        low = part % k_split * share
        if block * KEYS < k_tokens:
            _quantise_k(
                k, rope, kv_lens, k_mean, k8, k_scale, b, block, part // k_split * GROUPS, low, tl.minimum(low + share, kv_heads),
                kv_heads, EPS, GROUPS, FORM,
            )  # fmt: skip
    elif v8 is not None and block * KEYS < v_tokens:
        v = Source(v0, v1, None, None, None, None, v_tokens, v_border, v_sb0, v_sn0, v_sb1, v_sn1, v_sh)
        h = part - q_programs - k_programs
        _quantise_v(v, kv_lens, v_max, v8, v_scale, b, block, h, kv_heads, CHUNKS, V_WIDTH, LEVELS, FORM)


@triton.jit
def _quantise_q(
    q, rope, k_mean, q8, q_scale, lse_shift, qk_scale, b, start, low, high, heads, kv_heads, eps,
    T: tl.constexpr, HB: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Heads low to high of T tokens: a scale each."""
    W: tl.constexpr = (FORM.D + 15) // 16 * 16
    d = tl.arange(0, FORM.DP)
    heads_of = tl.arange(0, T * HB) % HB
    tokens, here, rows, inverse, c, s = begin(q, rope, b, start, eps, T, HB, FORM)
    tile = load_rows(q, rows, low + heads_of, here & (low + heads_of < high), FORM)
    for h in range(low, high, HB):
        following = load_rows(q, rows, h + HB + heads_of, here & (h + HB + heads_of < high), FORM)
        there = tl.minimum(h + heads_of, high - 1)  # of weights and tables no more is read than there is
        x = finish(tile, inverse, c, s, q, rope, b, start, tokens, there, eps, False, FORM)
        scale, inverse_scale = _scale(tl.max(_bits(x), 1), 127.0)
        keep = here & (h + heads_of < high)
        first = (b * heads + h).to(tl.int64) * q.tokens + start
        places = heads_of * q.tokens + tokens
        tl.store(q_scale + first + places, scale * qk_scale, keep)
        if lse_shift is not None:
            kv_head = (h + heads_of) // (heads // kv_heads)
            mean = k_mean + (b * kv_heads + kv_head)[:, None] * FORM.D + d[None, :]
            mean = tl.load(mean, keep[:, None] & (d < FORM.D)[None, :], 0.0)
            tl.store(lse_shift + first + places, tl.sum(x * mean, 1) * (qk_scale * LN2), keep)
        out = q8 + first * W + (places[:, None] * W + tl.max_contiguous(d, 8)[None, :])
        tl.store(out, _rounded(x * inverse_scale[:, None]), keep[:, None] & (d < W)[None, :])
        tile = following


@triton.jit
def _quantise_k(
    k, rope, kv_lens, k_mean, k8, k_scale, b, block, group, low, high, kv_heads, eps,
    GROUPS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Heads low to high of the tokens of a block that have the scales group, group + 1, ... GROUPS of them.

    Those of one scale are pairs of neighbours, every fourth pair.
    """
    W: tl.constexpr = (FORM.D + 15) // 16 * 16
    d = tl.arange(0, FORM.DP)
    r = tl.arange(0, GROUPS * GROUP) % GROUP
    tokens = r // 2 * 8 + (group + tl.arange(0, GROUPS * GROUP) // GROUP) * 2 + r % 2
    start = block * KEYS
    length = _length(kv_lens, b, k.tokens)
    here = start + tokens < length
    rows = token_rows(k, b, start, tokens, FORM)
    zero = tl.zeros([1], tl.int32)
    inverse = tl.zeros([1], tl.float32)
    if FORM.ACROSS:
        inverse = inverse_rms(rows, here, eps, GROUPS * GROUP * FORM.DP, FORM)
    c, s = 0.0, 0.0
    if FORM.ROTATE and not FORM.BY_HEAD:
        c, s = tables(rope, b, start, tokens, zero, here, FORM)
    blocks = (k.tokens + KEYS - 1) // KEYS
    tile = load_rows(k, rows, low + zero, here & (low < high), FORM)  # the last part may have no head
    for h in range(low, high):
        following = load_rows(k, rows, h + 1 + zero, here & (h + 1 < high), FORM)
        head = (b * kv_heads + h).to(tl.int64)
        x = finish(tile, inverse, c, s, k, rope, b, start, tokens, h + zero, eps, False, FORM)
        mean = tl.load(k_mean + head * FORM.D + d, d < FORM.D, 0.0)
        x = tl.where(here[:, None], x - mean[None, :], 0.0)
        top = tl.max(tl.reshape(tl.max(_bits(x), 1), [GROUPS, GROUP]), 1)
        scale, inverse_scale = _scale(top, 127.0)
        tl.store(k_scale + (head * blocks + block) * 4 + group + tl.arange(0, GROUPS), scale)
        inverse_scale = tl.reshape(tl.broadcast_to(inverse_scale[:, None], [GROUPS, GROUP]), [GROUPS * GROUP])
        y = _rounded(x * inverse_scale[:, None])
        out = k8 + (head * k.tokens + start) * W + (tokens[:, None] * W + tl.max_contiguous(d, 8)[None, :])
        tl.store(out, y, (start + tokens < k.tokens)[:, None] & (d < W)[None, :])
        tile = following


@triton.jit
def _quantise_v(
    v, kv_lens, v_max, v8, v_scale, b, block, h, kv_heads,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """A block of one head, turned round, WIDTH channels at a time: 16 tokens of a channel become one store of 16 bytes.

    Of WIDTH = 8 channels a warp a thread gets 16 bytes of each of four rows, which are 32 apart: row r is stored position
    r % 32 * 4 + r / 32, so that it holds four neighbours of the output. Position j of 16 holds token ORDER[j] =
    8 (j / 2 % 2) + 2 (j / 4) + j % 2.
    """
    W: tl.constexpr = (FORM.D + 15) // 16 * 16
    ALIGN: tl.constexpr = FORM.ALIGN
    r = tl.arange(0, KEYS)
    position = r % 32 * 4 + r // 32
    j = position % 16
    tokens = position - j + j // 2 % 2 * 8 + j // 4 * 2 + j % 2
    start = block * KEYS
    here = start + tokens < _length(kv_lens, b, v.tokens)
    head = (b * kv_heads + h).to(tl.int64)
    rows = token_rows(v, b, start, tokens, FORM) + tl.multiple_of(h.to(tl.int64) * v.sh, ALIGN)
    tops = v_max + head * FORM.D * CHUNKS
    padded = (v.tokens + KEYS - 1) // KEYS * KEYS
    out = v8 + head * W * padded + start
    d = tl.arange(0, WIDTH)
    tile = tl.load(rows[:, None] + d[None, :], here[:, None] & (d < FORM.D)[None, :], 0.0)
    for first in range(0, W, WIDTH):
        after = first + WIDTH + tl.arange(0, WIDTH)
        following = tl.load(rows[:, None] + after[None, :], here[:, None] & (after < FORM.D)[None, :], 0.0)
        d = first + tl.arange(0, WIDTH)
        chunks = (d * CHUNKS)[:, None] + tl.arange(0, CHUNKS)[None, :]
        top = tl.max(tl.load(tops + chunks, (d < FORM.D)[:, None], 0), 1).to(tl.int16)
        top = top.to(tile.dtype, bitcast=True).to(tl.float32)
        scale, inverse_scale = _scale(_bits(top), LEVELS)
        if block == 0:
            tl.store(v_scale + head * FORM.D + d, scale, d < FORM.D)
        x = tile.to(tl.float32) * inverse_scale[None, :]
        x = tl.reshape(tl.permute(tl.reshape(x, [4, 32, WIDTH]), [2, 1, 0]), [WIDTH, KEYS])
        y = _rounded(x) if LEVELS == 127.0 else x.to(v8.dtype.element_ty)
        places = tl.multiple_of(d * padded, KEYS)[:, None] + tl.arange(0, KEYS)[None, :]
        tl.store(out + places, y, (d < W)[:, None])
        tile = following
