"""Attention of quantised operands for Hopper (sm_90) in Gluon: int8 q k^T, e4m3 or 16-bit p v.

    S = q8 k8^T * q_scale * k_scale,  p = 2^(S - m + OFFSET),  out = sum(p v8) / sum(p) * v_scale

with operands and scales as kernels/quantise.py makes them, after SageAttention 2 (Zhang et al., arXiv:2411.10958):
q scaled by log2(e), one scale for what a thread of the tensor cores' layout owns of a tile of keys, v transposed and its
tokens in the order in which a thread holds its p, and for e4m3 every tile's p v in an accumulator of its own, because the
tensor cores keep 22 bits of such a sum. The schedule is that of FlashAttention 3, as in flash_hopper.py.

The exponentials bind this kernel: 16 a clock and processor, as long as both products take at head_dim 128. Integers become
floats in the same unit, so they are not converted: 1.5 * 2^23 is added to their bits. A part of the exponentials is
computed by a polynomial (FlashAttention 4).

This file plans and launches, quantised_hopper_device.py is the kernel. Token counts are run-time integers.

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim; M queries of a warp group, N keys of a
tile.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videoattn.kernels.flash_hopper import LOADER_REGISTERS, _processors, _Tiles, readable
from videoattn.kernels.operands import OFFSET, Quantised
from videoattn.kernels.hopper_device import M
from videoattn.kernels.quantised_hopper_device import forward
from videoattn.kernels.triton_backend import on_device_of

HEAD_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built.

    Args:
        GROUPS: computing warp groups, 2 or 3. STAGES: tiles of k and of v in flight.
        TURNS: whether the groups issue their products in turn.
    """

    GROUPS: int = 3
    STAGES: int = 3
    TURNS: bool = False

    @property
    def registers(self):
        return {2: {"maxnreg": 168, "REGISTERS": 240}, 3: {"maxnreg": 128, "REGISTERS": 160}}[self.GROUPS]


def config(head_dim, pv):
    if pv == "16bit" and head_dim == 128:
        return Config(GROUPS=2, STAGES=2, TURNS=True)
    return Config()


@functools.cache
def tile_layout(width: int, bits: int) -> gl.NVMMASharedLayout:
    """How tiles of `width` elements lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width * bits // 8, 128), element_bitwidth=bits, rank=4)


def _describe(x: Tensor, rows: int, width: int) -> _Tiles:
    """Tiles [1, 1, rows, width] of x [B, H, N, D], whose strides are multiples of 16 bytes but the last."""
    strides = tuple(
        stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return _Tiles(x, tuple(x.shape), (*strides, 1), [1, 1, rows, width], tile_layout(width, 8 * x.element_size()))


_KERNELS: dict[tuple, object] = {}  # compiled, by everything that makes another kernel


def attend_quantised(
    x: Quantised,
    *,
    head_dim: int,
    dtype: torch.dtype,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of quantised operands.

    Args:
        x: what kernels/quantise.py makes.
        head_dim: 64 or 128.
        dtype: of the output, fp16 or bf16.
        kv_len: int32 [B]: row b attends to its first kv_len[b] keys.
        return_lse: whether to return the log-sum-exp too; x then holds lse_shift.
        flag: int32 [1], set to 1 where the output is not finite.
        tuned: how the kernel is built; by head_dim where None.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.
    """
    (b, h, nq, d), (_, h_kv, nk, _) = x.q.shape, x.k.shape
    if head_dim not in HEAD_DIMS or d != head_dim:
        raise ValueError(
            f"attend_quantised: head_dim is 64 or 128 and that of q, got {head_dim} and {tuple(x.q.shape)}"
        )
    v8 = x.v.element_size() == 1
    built = config(d, x.v.dtype) if tuned is None else tuned
    out = torch.empty((b, nq, h, d), dtype=dtype, device=x.q.device)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=x.q.device) if return_lse else None
    q_tiles = -(-nq // built.rows)
    tile_rows = built.rows if built.GROUPS == 1 else M.value
    pieces = b * h * q_tiles
    values = _describe(x.v, d, built.N) if v8 else _describe(readable(x.v).transpose(1, 2), built.N, d)
    descs = [
        _describe(x.q, tile_rows, d), _describe(x.k, built.N, d), values, _describe(out.transpose(1, 2), tile_rows, d),
    ]  # fmt: skip
    unused = x.q_scale
    numbers = (
        x.q_scale, x.k_scale,
        x.v_scale if v8 else unused,
        lse if return_lse else unused,
        x.lse_shift if return_lse else unused,
        unused if kv_len is None else kv_len,
        unused if flag is None else flag,
        nq, nk, h, h // h_kv, q_tiles, pieces, x.k_scale.shape[2],
    )  # fmt: skip
    kernel = forward_small if built.GROUPS == 1 else forward
    grid = (pieces if built.GROUPS == 1 else min(pieces, _processors(x.q.device)), 1, 1)
    key = (built, d, x.v.dtype, dtype, x.q.device, kv_len is None, return_lse, flag is None)
    with on_device_of(x.q):
        compiled = _KERNELS.get(key)
        if compiled is None:
            constants = {
                "HAS_LENS": kv_len is not None, "HAS_LSE": return_lse, "HAS_FLAG": flag is not None,
                "OFFSET": OFFSET if v8 else 0.0, **built.options,
            }  # fmt: skip
            compiled = kernel[grid](*(TensorDescriptor(*tiles) for tiles in descs), *numbers, **constants)
            _KERNELS[key] = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)
        else:  # past the look-up of the kernel, which reads every argument
            compiled, constants = compiled
            compiled[grid](*descs, *numbers, *constants)
    return out, lse
