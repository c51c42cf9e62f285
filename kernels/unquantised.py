"""What selectors read of quantised operands: the means of blocks of q and k, or q and k themselves.

Operands carry softmax's scale in q (kernels/operands.py): products of what is made here are scores in units of log2, so a
selector is to be given the scale LN2 with it. k is less its mean over the tokens, which moves all scores of a row alike.

Letters: B batch, N tokens, H heads, D head_dim, W: D up to a multiple of 16, n blocks; R rows of a tile.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels import operands
from videoattn.kernels.operands import Quantised
from videoattn.kernels.triton_backend import Launch, on_device_of

LN2 = math.log(2.0)
KEYS = tl.constexpr(operands.KEYS)
ROWS = 64  # of a tile; divides every block


@triton.jit
def _rows(x, scales, head, start, tokens, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, OF_KEYS: tl.constexpr):
    """Rows start to start + R of one head in fp32 [R, DP], 0 beyond the tokens and beyond D."""
    W: tl.constexpr = (D + 15) // 16 * 16
    rows = start + tl.arange(0, R)
    d = tl.arange(0, DP)
    there = rows < tokens
    if OF_KEYS:
        blocks = (tokens + KEYS - 1) // KEYS
        scale = tl.load(scales + (head * blocks + rows // KEYS) * 4 + rows % 8 // 2, there, 0.0)
    else:
        scale = tl.load(scales + head * tokens + rows, there, 0.0)
    places = (head * tokens + rows).to(tl.int64)[:, None] * W + d[None, :]
    return tl.load(x + places, there[:, None] & (d < D)[None, :], 0).to(tl.float32) * scale[:, None]


@triton.jit(do_not_specialize=["tokens", "heads", "blocks"])
def _means(
    x, scales, means, tokens, heads, blocks,
    BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    head, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    start = i * BLOCK
    total = tl.zeros([DP], tl.float32)
    for first in range(0, BLOCK, R):
        total += tl.sum(_rows(x, scales, head, start + first, tokens, D, DP, R, OF_KEYS), 0)
    live = tl.minimum(tokens - start, BLOCK)
    d = tl.arange(0, DP)
    b, h = head // heads, head % heads
    tl.store(means + ((b * blocks + i) * heads + h) * D + d, total / live, d < D)


@triton.jit(do_not_specialize=["tokens", "heads", "tiles"])
def _unquantised(
    x, scales, out, tokens, heads, tiles,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    head, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * R
    y = _rows(x, scales, head, start, tokens, D, DP, R, OF_KEYS)
    b, h = head // heads, head % heads
    rows, d = start + tl.arange(0, R), tl.arange(0, DP)
    places = ((b * tokens + rows) * heads + h)[:, None] * D + d[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), (rows < tokens)[:, None] & (d < D)[None, :])


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, head_dim: int, block: int, of_keys: bool, device: torch.device) -> Launch:
    """A launch of either kernel, looked up. block: 0 where rows stay as they are."""
    b, h, n, _ = shape
    constants = {"D": head_dim, "DP": triton.next_power_of_2(head_dim), "R": ROWS, "OF_KEYS": of_keys, "num_warps": 4}
    parts = -(-n // (block or ROWS))
    return Launch(b * h * parts, (n, h, parts), {"BLOCK": block, **constants} if block else constants)


def block_means(x: Quantised, head_dim: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Means of q [B, nq, H, D] and of k [B, nk, Hkv, D] over the tokens of each block, fp32; blocks are multiples of 64."""

    def means(y: Tensor, scales: Tensor, block: int, of_keys: bool) -> Tensor:
        b, h, n, _ = y.shape
        out = torch.empty((b, -(-n // block), h, head_dim), dtype=torch.float32, device=y.device)
        with on_device_of(y):
            _plan(y.shape, head_dim, block, of_keys, y.device)(_means, (y, scales, out))
        return out

    return means(x.q, x.q_scale, block_q, False), means(x.k, x.k_scale, block_k, True)


def unquantised(x: Quantised, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q [B, Nq, H, D] and k [B, Nk, Hkv, D] in `dtype`."""

    def rows(y: Tensor, scales: Tensor, of_keys: bool) -> Tensor:
        b, h, n, _ = y.shape
        out = torch.empty((b, n, h, head_dim), dtype=dtype, device=y.device)
        with on_device_of(y):
            _plan(y.shape, head_dim, 0, of_keys, y.device)(_unquantised, (y, scales, out))
        return out

    return rows(x.q, x.q_scale, False), rows(x.k, x.k_scale, True)
