"""2^x for softmax weights on two kinds of unit: a share by the special-function units, a share by multiply-adds.

An SM of Hopper makes 16 exponentials a clock beside 4096 floating-point operations of matrix products: at head_dim 64 the
exponentials of a tile take as long as its products. After Cody and Waite's reduction to [-1/2, 1/2] a cubic costs some
nine instructions on units that are less busy, so a share of the elements goes there (as FlashAttention 4 does on
Blackwell). The cubic's relative error is 7.5e-5; the weights are rounded to 16 bits next, by 2.4e-4 in fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

# minimax for the relative error on [-1/2, 1/2]
C0 = tl.constexpr(0.99992807)
C1 = tl.constexpr(0.69326099)
C2 = tl.constexpr(0.24261112)
C3 = tl.constexpr(0.05517166)
SHIFT = tl.constexpr(12582912.0)  # 1.5 2^23: the last bits of x + SHIFT are x rounded to an integer


@triton.jit
def cubic_exp2(x):
    """2^x for x <= 0; 2^-126 below."""
    shifted = tl.maximum(x, -126.0) + SHIFT
    f = tl.maximum(x, -126.0) - (shifted - SHIFT)
    y = ((C3 * f + C2) * f + C1) * f + C0
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (y.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def split_exp2(x, CUBIC: tl.constexpr):
    """2^x of [M, N], x <= 0; every CUBIC-th group of 8 columns by the cubic (0: none, else 2 or 4).

    Groups of 8 columns: an accumulator of Hopper's and Ampere's matrix units spreads 8 neighbouring columns over four
    threads alike, so that every thread gets the same share and nothing moves between threads.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if CUBIC == 0:
        y = tl.exp2(x)
    else:
        groups = tl.permute(tl.reshape(x, M, N // 16, 2, 8), 0, 1, 3, 2)
        even, odd = tl.split(groups)  # [M, N / 16, 8]
        if CUBIC == 4:
            quarters = tl.permute(tl.reshape(odd, M, N // 32, 2, 8), 0, 1, 3, 2)
            a, b = tl.split(quarters)
            odd = tl.join(tl.exp2(a), cubic_exp2(b))
            odd = tl.reshape(tl.permute(odd, 0, 1, 3, 2), M, N // 16, 8)
        else:
            odd = cubic_exp2(odd)
        y = tl.reshape(tl.permute(tl.join(tl.exp2(even), odd), 0, 1, 3, 2), M, N)
    return y
