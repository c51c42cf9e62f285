"""Tiles whose last dimension is a head: cut into powers of two, so that head_dim 40, 72, 80 ... need little padding.

Triton's tensors have power-of-two sizes. Padding a head of 80 to 128 wastes 38 % of every matrix product; as 64 + 16 it
wastes nothing. A head is cut into one or two parts D0 > D1 (0: no such part); products over the head are sums over the
parts, products that yield a head are made part by part. Three parts were slower than padding (112 as 64 + 32 + 16: 390
against 425 TFLOP/s as 128 on an H200).
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_PART = 16  # the least inner size of tl.dot in 16 bits


def parts(head_dim: int, least: int = MIN_PART) -> tuple[int, int]:
    """The sizes D0 > D1, none below `least`, that cover `head_dim` with the least padding; D1 = 0 where one part does.

    >>> parts(40), parts(64), parts(80), parts(112), parts(160)
    ((32, 16), (64, 0), (64, 16), (128, 0), (128, 32))
    """
    padded = -(-head_dim // least) * least
    while padded.bit_count() > 2:
        padded += padded & -padded
    first = 1 << padded.bit_length() - 1
    return first, padded - first


def alignment(*numbers: int) -> int:
    """The greatest of 8, 4, 2, 1 that divides all: strides, and addresses, in elements.

    16-bit rows that start at multiples of 8 elements are read 16 bytes at a time.
    """
    bits = 8
    for number in numbers:
        bits |= number
    return bits & -bits


@triton.jit
def load_head(ptr, rows, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The parts [..., D0] and [..., D1] at element offsets `rows` [..., 1]; 0 beyond D or where `keep` is not set."""
    d0 = tl.arange(0, D0)
    x0 = tl.load(ptr + (rows + d0), keep & (d0 < D), 0.0)
    x1 = x0  # stands for a part that is not there; never read
    if D1:
        d1 = D0 + tl.arange(0, D1)
        x1 = tl.load(ptr + (rows + d1), keep & (d1 < D), 0.0)
    return x0, x1


@triton.jit
def store_part(ptr, rows, keep, x, START: tl.constexpr, D: tl.constexpr):
    """Store a part that begins at element START of the head, where `load_head` would load it."""
    d = START + tl.arange(0, x.shape[-1])
    tl.store(ptr + (rows + d), x, keep & (d < D))


@triton.jit
def not_finite(x):
    """Whether an element of x (fp32) is NaN or infinite. Zero times either is NaN: one instruction an element."""
    return tl.sum(tl.ravel(x * 0.0)) != 0.0
