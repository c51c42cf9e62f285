"""Attention on quantised operands for Hopper (sm_90) in Gluon: INT8 q k^T; p v in e4m3 or in 16 bits.

What kernels/quantised.py computes (SageAttention 2: Zhang et al., arXiv:2411.10958), on the schedule of FlashAttention 3
(Shah et al., arXiv:2407.08608), which flash_hopper.py describes. In units of log2, with one scale qs a query and ks four a
tile of keys, and an offset F (8.807 for e4m3, 0 for 16 bits):

    s = qs ks (q8 k8^T),  m' = max(m, rowmax s),  p = 2^(s - m' + F),  l' = 2^(m - m') l + rowsum round(p),
    acc' = 2^(m - m') acc + round(p) v8,          out = acc / l * vs

The exponentials bind this kernel: 16 a clock and processor, as long as both products take at head_dim 128. So all else is
taken from the units that compute them, and from those beside them:
  - Integers become floats without a conversion: sums begin at 1.5 * 2^23 in the bits of fp32, which are those of the sum.
  - Maxima are found among these integers, three at a time.
  - p is added by the tensor cores, as a product with ones. That is the sum of the rounded p: its roundings average out of
    the weights, but not of a log-sum-exp. Where one is asked for, p is added before it is rounded.

With e4m3 the products of a tile run one after the other, and each p v goes to an accumulator of its own, added to the one
in fp32: other groups compute exponentials meanwhile. With 16 bits q k^T of the next tile runs beside p v of this one.

This file plans and launches, quantised_hopper_device.py is the kernel. Token counts are run-time integers.

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim; M queries of a warp group, N keys of a
tile, as many as share scales.

Refuses: other cards than sm_90, head_dim other than 64 and 128, and what no quantised kernel takes: masks, causal, fp32.
16-bit v beyond a row's length is multiplied by 0, and so must be finite.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videoattn.call import Call
from videoattn.kernels.flash_hopper import (
    LOADER_REGISTERS,
    REGISTERS,
    LaidTiles,
    list_arguments,
    processors,
    tile_layout,
)
from videoattn.kernels.hopper_device import M
from videoattn.kernels.operands import KEYS, PV, Quantised
from videoattn.kernels.quantised_backend import QuantisedBackend
from videoattn.kernels.quantised_hopper_device import forward
from videoattn.kernels.triton_backend import Tile, on_device_of, readable
from videoattn.selection.block_list import BlockList

HEAD_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built.

    Args:
        GROUPS: computing warp groups, 2 or 3.
        STAGES: tiles of k and of v in flight.
        TURNS: whether the groups issue their products in turn; of two groups and 16 bits.
    """

    GROUPS: int = 3
    STAGES: int = 3
    TURNS: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Constants of the kernel and options of its compilation."""
        return {**asdict(self), **REGISTERS[self.GROUPS], "LOADER_REGISTERS": LOADER_REGISTERS, "num_warps": 4}


def config(head_dim: int, pv: PV, block_q: int | None = None) -> Config:
    """What was measured fastest on an H200 with Triton 3.6 among what does not spill in the loop over the keys.

    block_q: of the lists, if any; 128 where it is not the tile of the fastest.
    """
    if pv == "16bit" and head_dim == 128:
        return Config(GROUPS=2, STAGES=2, TURNS=True)
    return Config(GROUPS=2) if block_q == 2 * M.value else Config()


def _describe(x: Tensor, rows: int, width: int) -> LaidTiles:
    """Tiles [1, 1, rows, width] of x [B, H, N, D], whose strides are multiples of 16 bytes but the last."""
    shape = tuple(x.shape)
    # A dimension of size 1 is never stepped over.
    strides = tuple(step if size > 1 else shape[3] for size, step in zip(shape[:3], x.stride(), strict=False))
    return LaidTiles(x, shape, (*strides, 1), [1, 1, rows, width], tile_layout(width, 8 * x.element_size()))


_KERNELS: dict[tuple, tuple] = {}  # compiled, and its constants, by everything that makes another kernel


def attend_quantised(
    x: Quantised,
    *,
    head_dim: int,
    dtype: torch.dtype,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    rounded_sums: bool = False,
    flag: Tensor | None = None,
    lists: BlockList | None = None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention on quantised operands, to all keys or to the blocks of a list.

    Args:
        x: the operands; v's dtype says in which of the two ways p v is computed.
        head_dim: 64 or 128. dtype: of the output.
        kv_len: int32 [B] on q's device: row b attends to its first kv_len[b] keys; those that x was made with.
        return_lse: whether to return the log-sum-exp too; x.lse_shift is there then.
        rounded_sums: whether the log-sum-exp may be that of the rounded weights, as the output's sums are without one: it is
            off by their rounding, and sums take no instructions of the threads.
        flag: int32, set to 1 where the output is not finite.
        lists: the key blocks of each query block, as large as the kernel's tiles; none lies wholly beyond kv_len.
        tuned: how the kernel is built; by head_dim and the lists' blocks where None.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: lists that do not fit.
    """
    q, k, v = x.q, x.k, x.v
    (b, h, nq, d), (_, h_kv, nk, _) = q.shape, k.shape
    e4m3 = x.v_scale is not None
    built = config(d, "fp8" if e4m3 else "16bit", lists and lists.block_q) if tuned is None else tuned
    out = torch.empty((b, nq, h, d), dtype=dtype, device=q.device)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device) if return_lse else None
    has_lens, has_flag = kv_len is not None, flag is not None
    q_tiles = -(-nq // (M.value * built.GROUPS))
    pieces = b * h * q_tiles
    descs = (
        _describe(q, M.value, d),
        _describe(k, KEYS, d),
        _describe(v, d, KEYS) if e4m3 else _describe(readable(v).transpose(1, 2), KEYS, d),
        _describe(out.transpose(1, 2), M.value, d),
    )
    unused = x.q_scale
    shape = b, h, q_tiles, x.k_scale.shape[2]
    *of_lists, list_sb, list_sh, k_tiles = list_arguments(lists, unused, shape, M.value * built.GROUPS, KEYS)
    modes = {"BLOCKS": lists is not None, "LIVE": lists is not None and lists.gaps}
    numbers = (
        x.q_scale, x.k_scale,
        x.v_scale if e4m3 else unused,
        lse if return_lse else unused,
        x.lse_shift if return_lse else unused,
        kv_len if has_lens else unused,
        *of_lists,
        flag if has_flag else unused,
        nq, nk, h, h // h_kv, q_tiles, pieces, x.k_scale.shape[2], list_sb, list_sh, k_tiles,
    )  # fmt: skip
    grid = (min(pieces, processors(q.device)), 1, 1)
    add = return_lse and not rounded_sums
    key = (built, d, v.dtype, dtype, q.device, has_lens, *modes.values(), return_lse, add, has_flag)
    with on_device_of(q):
        found = _KERNELS.get(key)
        if found is None:
            asked = {"HAS_LSE": return_lse, "ADD": add, "HAS_FLAG": has_flag}
            constants = {"HAS_LENS": has_lens, **modes, **asked, **built.options}
            compiled = forward[grid](*(TensorDescriptor(*tiles) for tiles in descs), *numbers, **constants)
            _KERNELS[key] = compiled, tuple(constants[name] for name in forward.arg_names if name in constants)
        else:  # past the look-up of the kernel, which reads every argument
            compiled, constants = found
            compiled[grid](*descs, *numbers, *constants)
    return out, lse


def refuses(call: Call) -> str | None:
    """Why this kernel does not compute the call, or None; what no quantised kernel takes is said for all of them."""
    if torch.cuda.get_device_capability(call.device) != (9, 0):
        return "needs compute capability 9.0"
    if call.head_dim not in HEAD_DIMS:
        return f"takes head_dim 64 and 128, got {call.head_dim}"
    return None


def _tile_of(call: Call, pv: PV) -> Tile:
    built = config(call.head_dim, pv)
    return Tile(M.value * built.GROUPS, KEYS, 4 * (built.GROUPS + 1))  # the loader's registers are those of a group


def _backend(pv: PV) -> QuantisedBackend:
    return QuantisedBackend(
        f"triton_hopper_int8_{pv}", pv, attend_quantised, refuses, functools.partial(_tile_of, pv=pv)
    )


BACKENDS = (_backend("fp8"), _backend("16bit"))
