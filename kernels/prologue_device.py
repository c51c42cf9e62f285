"""Norm and rotary embedding on a tile of rows in registers: what every kernel does that takes raw projections.

    rms:    y = x / sqrt(mean x^2 + eps) * w                   over a head, or over all heads of a token
    layer:  y = (x - mean x) / sqrt(var x + eps) * w + b       over a head
    pairs:  z_2i = y_2i cos_i - y_2i+1 sin_i,   z_2i+1 = y_2i sin_i + y_2i+1 cos_i

(Zhang and Sennrich, arXiv:1910.07467; Ba et al., arXiv:1607.06450; Su et al., arXiv:2104.09864, section 3.4.) Computed in
fp32. Where HOST is set, rounded to the inputs' dtype where the host's operations round: after the norm and after the
rotation, and in diffusers' RMSNorm before the weight too. What comes out then is the host's up to the order of its sums,
if products are not fused with sums (`enable_fp_fusion=False`). Otherwise nothing is rounded: what is rounded to INT8 at
once is nearer to the exact value so, and conversions to 16 bits are slow instructions.

A row is one token's head. Tokens lie in one stream or in two, one after the other (video, then text). A row's address
says which, so a tile may lie across the border.

Letters: R rows of a tile, D head_dim, DP: D padded to a power of two, C = H D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class Form:
    """What makes another kernel.

    Args:
        D, DP, C: see above; C is 0 where no norm is across heads.
        NORM: "none", "rms", "rms_rounded" (to 16 bits before the weight), "layer". ACROSS: over all heads.
        ROTATE: whether rows turn; SPANNED: not all of them. BY_HEAD: every head has its own tables.
        REPEATED: tables hold each value twice. ROUNDED: the host rounds products to 16 bits.
        ALIGN, ROPE_ALIGN: what divides all strides, in elements.
    """

    D: int
    DP: int
    C: int
    NORM: str
    ACROSS: bool
    ROTATE: bool
    SPANNED: bool
    BY_HEAD: bool
    REPEATED: bool
    ROUNDED: bool
    ALIGN: int
    ROPE_ALIGN: int


class Source(NamedTuple):
    """In a kernel: the raw projections of one or two streams.

    x, w, b: projections, norm weights, norm biases, or None; tokens: of both streams, border: of the first; sb, sn, sh:
    strides.
    """

    x0: tl.tensor
    x1: tl.tensor
    w0: tl.tensor
    w1: tl.tensor
    b0: tl.tensor
    b1: tl.tensor
    tokens: tl.tensor
    border: tl.tensor
    sb0: tl.tensor
    sn0: tl.tensor
    sb1: tl.tensor
    sn1: tl.tensor
    sh: tl.tensor


class Rope(NamedTuple):
    """In a kernel: tables, the tokens first to last that turn, strides; sp: from pair to pair."""

    cos: tl.tensor
    sin: tl.tensor
    first: tl.tensor
    last: tl.tensor
    sb: tl.tensor
    sn: tl.tensor
    sh: tl.tensor
    sp: tl.tensor


@triton.jit
def token_rows(x, b, start, tokens, FORM: tl.constexpr):
    """Where tokens start + `tokens` [R] begin, with all their heads."""
    ALIGN: tl.constexpr = FORM.ALIGN
    b, start = b.to(tl.int64), tl.cast(start, tl.int64)
    # Every product has a hint of its own: a sum's is lost where one of its terms is known to be 0.
    rows = x.x0 + tl.multiple_of(b * x.sb0, ALIGN) + tl.multiple_of(start * x.sn0, ALIGN)
    rows = rows + tl.multiple_of(tokens * x.sn0, ALIGN)
    if x.x1 is not None:
        other = x.x1 + tl.multiple_of(b * x.sb1, ALIGN) + tl.multiple_of((start - x.border) * x.sn1, ALIGN)
        rows = tl.where(start + tokens < x.border, rows, other + tl.multiple_of(tokens * x.sn1, ALIGN))
    return rows


@triton.jit
def load_rows(x, rows, heads, keep, FORM: tl.constexpr):
    """The rows [R, DP] of `heads` ([R], or [1] where all are of one head); 0 beyond D or where `keep` is not set."""
    ALIGN: tl.constexpr = FORM.ALIGN
    d = tl.arange(0, FORM.DP)
    rows = rows + tl.multiple_of(heads.to(tl.int64) * x.sh, ALIGN)
    return tl.load(rows[:, None] + d[None, :], keep[:, None] & (d < FORM.D)[None, :], 0.0)


@triton.jit
def inverse_rms(rows, keep, eps, ELEMENTS: tl.constexpr, FORM: tl.constexpr):
    """1 / sqrt(mean x^2 + eps) [R] over all heads of a token, which lie side by side; ELEMENTS are read at a time."""
    COLUMNS: tl.constexpr = ELEMENTS // rows.shape[0]
    columns = tl.arange(0, COLUMNS)
    squares = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
    x = tl.load(rows[:, None] + columns[None, :], keep[:, None] & (columns < FORM.C)[None, :], 0.0)
    for start in range(0, FORM.C, COLUMNS):
        after = start + COLUMNS + columns
        following = tl.load(rows[:, None] + after[None, :], keep[:, None] & (after < FORM.C)[None, :], 0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
        x = following
    return tl.rsqrt(tl.sum(squares, 1) / FORM.C + eps)


@triton.jit
def tables(rope, b, start, tokens, heads, keep, FORM: tl.constexpr):
    """cos and sin [R, DP / 2] of tokens start + `tokens`; 0 for tokens that do not turn."""
    ALIGN: tl.constexpr = FORM.ROPE_ALIGN
    d = tl.arange(0, FORM.DP)
    first = tl.cast(start, tl.int64) - rope.first
    base = tl.multiple_of(b.to(tl.int64) * rope.sb, ALIGN) + tl.multiple_of(first * rope.sn, ALIGN)
    rows = tl.multiple_of(tokens * rope.sn, ALIGN) + tl.multiple_of(heads * rope.sh, ALIGN)
    keep = keep & turning(rope, start, tokens)
    if FORM.REPEATED:  # read as wide as the rows that turn, so that both lie alike in registers
        places, here = rows[:, None] + d[None, :], keep[:, None] & (d < FORM.D)[None, :]
        c, _ = tl.split(tl.reshape(tl.load(rope.cos + base + places, here, 0.0), [rows.shape[0], FORM.DP // 2, 2]))
        s, _ = tl.split(tl.reshape(tl.load(rope.sin + base + places, here, 0.0), [rows.shape[0], FORM.DP // 2, 2]))
    else:
        pairs = tl.arange(0, FORM.DP // 2)
        places, here = rows[:, None] + (pairs * rope.sp)[None, :], keep[:, None] & (pairs < FORM.D // 2)[None, :]
        c, s = tl.load(rope.cos + base + places, here, 0.0), tl.load(rope.sin + base + places, here, 0.0)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def begin(x, rope, b, start, eps, T: tl.constexpr, HB: tl.constexpr, FORM: tl.constexpr):
    """Of T tokens from `start` on, HB rows of heads each [T HB]: where they lie, which are there, where they begin, and
    what all heads of a token share: 1 / RMS, cos and sin."""
    tokens = tl.arange(0, T * HB) // HB
    here = start + tokens < x.tokens
    rows = token_rows(x, b, start, tokens, FORM)
    inverse = tl.zeros([1], tl.float32)
    if FORM.ACROSS:
        t = tl.arange(0, T)
        inverse = inverse_rms(token_rows(x, b, start, t, FORM), start + t < x.tokens, eps, T * HB * FORM.DP, FORM)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [T, HB]), [T * HB])
    c, s = 0.0, 0.0
    if FORM.ROTATE and not FORM.BY_HEAD:
        c, s = tables(rope, b, start, tokens, tl.zeros([1], tl.int32), here, FORM)
    return tokens, here, rows, inverse, c, s


@triton.jit
def turning(rope, start, tokens):
    """Which of tokens start + `tokens` [R] turn."""
    return (start + tokens >= rope.first) & (start + tokens < rope.last)


@triton.jit
def finish(tile, inverse, c, s, x, rope, b, start, tokens, heads, eps, HOST: tl.constexpr, FORM: tl.constexpr):
    """Norm and rotation of rows [R, DP]: in their dtype where HOST is set, else in fp32.

    inverse: `inverse_rms` [R], where the norm is across heads. c, s: `tables`, where they are the same for all heads.
    """
    if not HOST:
        tile = tile.to(tl.float32)
    if FORM.NORM != "none":
        tile = _normalise(tile, inverse, x, start, tokens, heads, eps, HOST, FORM)
    if FORM.ROTATE:
        if FORM.BY_HEAD:
            c, s = tables(rope, b, start, tokens, heads, start + tokens < x.tokens, FORM)
        turned = _rotate(tile, c, s, HOST, FORM)
        tile = tl.where(turning(rope, start, tokens)[:, None], turned, tile) if FORM.SPANNED else turned
    return tile


@triton.jit
def _weights(w0, w1, first, places, FORM: tl.constexpr):
    """Weights [1, DP], or [R, DP] where every row has those of its own stream."""
    keep = (tl.arange(0, FORM.DP) < FORM.D)[None, :]
    if w1 is None:
        w = tl.load(w0 + places, keep, 0.0)
    else:
        w = tl.load(tl.where(first, w0, w1)[:, None] + places, keep, 0.0)
    return w.to(tl.float32)


@triton.jit
def _normalise(tile, inverse, x, start, tokens, heads, eps, HOST: tl.constexpr, FORM: tl.constexpr):
    d = tl.arange(0, FORM.DP)
    y = tile.to(tl.float32)
    if FORM.NORM == "layer":
        y = tl.where((d < FORM.D)[None, :], y - (tl.sum(y, 1) / FORM.D)[:, None], 0.0)
    if not FORM.ACROSS:
        inverse = tl.rsqrt(tl.sum(y * y, 1) / FORM.D + eps)
    y = y * inverse[:, None]
    if HOST and FORM.NORM == "rms_rounded":
        y = y.to(tile.dtype).to(tl.float32)
    places = (heads[:, None] * FORM.D + d[None, :]) if FORM.ACROSS else d[None, :]
    if x.w0 is not None:
        y = y * _weights(x.w0, x.w1, start + tokens < x.border, places, FORM)
    if x.b0 is not None:
        y = y + _weights(x.b0, x.b1, start + tokens < x.border, places, FORM)
    return y.to(tile.dtype)


@triton.jit
def _rotate(tile, c, s, HOST: tl.constexpr, FORM: tl.constexpr):
    pairs = tl.reshape(tile, [tile.shape[0], FORM.DP // 2, 2])
    even, odd = tl.split(pairs)
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    if HOST and FORM.ROUNDED:
        a = (even * c).to(tile.dtype).to(tl.float32) - (odd * s).to(tile.dtype).to(tl.float32)
        b = (even * s).to(tile.dtype).to(tl.float32) + (odd * c).to(tile.dtype).to(tl.float32)
    else:
        a = even * c - odd * s
        b = even * s + odd * c
    return tl.reshape(tl.join(a, b), [tile.shape[0], FORM.DP]).to(tile.dtype)
