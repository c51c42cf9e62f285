"""Exact attention for Hopper (sm_90) in Gluon: one warp loads, two or three warp groups compute, as FlashAttention 3 does.

out = softmax(scale q k^T) v by the online softmax of FlashAttention 2 (Dao, arXiv:2307.08691). The schedule is that of
FlashAttention 3 (Shah et al., arXiv:2407.08608, sections 3.1 and 3.2): a warp of its own copies tiles with TMA into a
ring of shared memory; every group of four warps owns 64 queries, runs S' = q k'^T of the next tile and acc += p v of this
one on the tensor cores, and computes p' = exp(S' - m') while acc += p v is still running; a turn passed round the groups
lets one issue its products while the others compute exponentials.

This file plans and launches, flash_hopper_device.py is the kernel. Token counts are run-time integers.

A head is cut into one or two parts D0 > D1, as in kernels/tiles.py: q k^T is a sum over the parts, p v is made part by
part, and every part has tiles of its own, padded with zeros by TMA.

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim; M queries of a warp group, N keys of a
tile.

Refuses: other cards than sm_90, fp32, masks, causal. Tensors whose strides TMA cannot take are copied.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videoattn.call import Call
from videoattn.kernels.flash_hopper_device import forward
from videoattn.kernels.hopper_device import M
from videoattn.kernels.tiles import parts
from videoattn.kernels.triton_backend import (
    Tile,
    TritonBackend,
    on_device_of,
    readable,
    refuses_but_plain,
    scale_log2,
)
from videoattn.selection.block_list import BlockList

LOADER_REGISTERS = 24
REGISTERS = {2: {"maxnreg": 168, "REGISTERS": 240}, 3: {"maxnreg": 128, "REGISTERS": 160}}
"""65,536 over 2 or 3 computing warp groups: an even share at the launch, then the loader gives its own away."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built.

    Args:
        D0, D1: the parts of a head; D1 is 0 where there is one.
        N: keys of a tile. STAGES: tiles of k and of v in flight. GROUPS: computing warp groups, 2 or 3.
        TURNS: whether the groups issue their products in turn.
        K_AHEAD: whether k is loaded one tile ahead of v.
        O_IN_Q: whether the output takes the place of q in shared memory.
    """

    D0: int = 128
    D1: int = 0
    N: int = 128
    STAGES: int = 2
    GROUPS: int = 2
    TURNS: bool = True
    K_AHEAD: bool = True
    O_IN_Q: bool = False

    def __post_init__(self) -> None:
        if self.N not in (64, 128) or self.STAGES < 2 or self.GROUPS not in (2, 3):
            raise ValueError(f"Config: wanted N 64 or 128, STAGES from 2, GROUPS 2 or 3, got {self}")
        if self.D0 not in (16, 32, 64, 128, 256) or self.D1 not in (0, 16, 32, 64) or self.D1 >= self.D0:
            raise ValueError(f"Config: wanted parts D0 > D1 that are powers of two from 16 on, or D1 0, got {self}")

    @property
    def registers(self) -> dict[str, int]:
        return dict(REGISTERS[self.GROUPS])


@functools.cache
def config(head_dim: int) -> Config:
    """What was measured fastest on an H200 with Triton 3.6 among what fits into shared memory without spills."""
    d0, d1 = parts(head_dim) if head_dim > 64 or 32 < head_dim <= 48 else (64, 0)
    padded = d0 + d1
    if padded <= 64:
        tiles = {"GROUPS": 3}
    elif padded <= 96:
        tiles = {"STAGES": 3}
    elif padded <= 128:
        tiles = {"STAGES": 3, "K_AHEAD": False, "O_IN_Q": True}
    elif padded <= 160:
        tiles = {"O_IN_Q": True}
    elif padded <= 192:
        tiles = {"N": 64, "STAGES": 3, "O_IN_Q": True}
    else:
        tiles = {"N": 64, "O_IN_Q": True}
    return Config(D0=d0, D1=d1, **tiles)


def config_of_lists(head_dim: int, block_q: int) -> Config:
    """How the kernel is built for lists: of blocks as large as its own tiles, or of 128 queries."""
    built = config(head_dim)
    return built if block_q == M.value * built.GROUPS else replace(built, GROUPS=2)


class LaidTiles(NamedTuple):
    """What a launch reads of Gluon's TensorDescriptor; that checks its fields anew each time it is made, for 20 us."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: list[int]
    layout: gl.NVMMASharedLayout
    padding: str = "zero"


@functools.cache
def tile_layout(width: int, bits: int = 16) -> gl.NVMMASharedLayout:
    """How tiles of `width` elements lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width * bits // 8, 128), element_bitwidth=bits, rank=4)


def _describe(x: Tensor, rows: int, width: int) -> LaidTiles:
    """Tiles [1, 1, rows, width] of x [B, N, H, D], read as [B, H, N, D] in whatever order it lies."""
    (b, n, h, d), (sb, sn, sh, _) = x.shape, x.stride()
    strides = (sb if b > 1 else d, sh if h > 1 else d, sn if n > 1 else d, 1)
    return LaidTiles(x, (b, h, n, d), strides, [1, 1, rows, width], tile_layout(width))


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def list_arguments(
    lists: BlockList | None, q: Tensor, shape: tuple[int, int, int, int], block_q: int, block_k: int
) -> tuple:
    """What a launch reads of lists: counts, indices, live, three strides in query blocks; anything where there are none.

    Args:
        q: on the device of the launch. shape: (B, H, nq, nk) of its tiles of block_q queries and block_k keys.

    Raises:
        ValueError: lists of other blocks, or of another shape, type or device.
    """
    if lists is None:
        return q, q, q, 0, 0, 0
    counts, indices, live = lists.counts, lists.indices, lists.live
    if (lists.block_q, lists.block_k) != (block_q, block_k):
        raise ValueError(
            f"lists: wanted blocks of {block_q} queries and {block_k} keys, got {lists.block_q} and {lists.block_k}"
        )
    if tuple(indices.shape) != shape or counts.shape != indices.shape[:3] or live.shape != indices.shape[3:]:
        raise ValueError(
            f"lists: wanted [B, H, nq, nk] {shape}, got counts {tuple(counts.shape)}, indices {tuple(indices.shape)}, "
            f"live {tuple(live.shape)}"
        )
    for name, x in (("counts", counts), ("indices", indices), ("live", live)):
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(f"lists: wanted {name} int32 on {q.device}, got {x.dtype} on {x.device}")
    nk = shape[3]
    # A dimension of size 1 is never stepped over; others may be expanded.
    sb, sh, sq = (
        step if size > 1 else other for size, step, other in zip(shape[:3], counts.stride(), (0, 0, 1), strict=True)
    )
    of_indices = (
        step if size > 1 else other for size, step, other in zip(shape, indices.stride(), (0, 0, nk, 1), strict=True)
    )
    if sq != 1 or tuple(of_indices) != (sb * nk, sh * nk, nk, 1):
        counts, indices = counts.contiguous(), indices.contiguous()
        sb, sh = shape[1] * shape[2], shape[2]
    return counts, indices, live.contiguous(), sb, sh, nk


_KERNELS: dict[tuple, object] = {}  # compiled, by everything that makes another kernel


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
    lists: BlockList | None = None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention, to all keys or to the blocks of a list.

    Args:
        q: [B, Nq, H, D], fp16 or bf16. k, v: [B, Nk, Hkv, D]; Hkv divides H.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: row b attends to its first kv_len[b] keys.
        return_lse: whether to return the log-sum-exp too.
        flag: int32 [1], set to 1 where the output is not finite.
        lists: the key blocks of each query block, as large as the kernel's tiles; none lies wholly beyond kv_len.
        tuned: how the kernel is built; by head_dim and the lists' blocks where None.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: a scale below 0, lists that do not fit.
    """
    q, k, v = readable(q), readable(k), readable(v)
    (b, nq, h, d), (_, nk, h_kv, _) = q.shape, k.shape
    built = tuned
    if tuned is None:
        built = config(d) if lists is None else config_of_lists(d, lists.block_q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device)
    q_tiles = -(-nq // (M.value * built.GROUPS))
    pieces = b * h * q_tiles
    has_lens, has_flag = kv_len is not None, flag is not None
    shape = b, h, q_tiles, -(-nk // built.N)
    *of_lists, list_sb, list_sh, k_tiles = list_arguments(lists, q, shape, M.value * built.GROUPS, built.N)
    modes = {"BLOCKS": lists is not None, "LIVE": lists is not None and lists.gaps}
    descs = [_describe(x, rows, built.D0) for x, rows in ((q, M.value), (k, built.N), (v, built.N), (out, M.value))]
    if built.D1:
        descs += [
            tiles._replace(block_shape=[*tiles.block_shape[:3], built.D1], layout=tile_layout(built.D1))
            for tiles in descs
        ]
    else:
        descs += [None] * 4
    numbers = (
        lse,
        kv_len if has_lens else lse,
        *of_lists,
        flag if has_flag else lse,
        scale_log2(scale, d),
        nq, nk, h, h // h_kv, q_tiles, pieces, list_sb, list_sh, k_tiles,
    )  # fmt: skip
    grid = (min(pieces, processors(q.device)), 1, 1)
    key = (built, q.dtype, q.device, has_lens, *modes.values(), has_flag)
    with on_device_of(q):
        kernel = _KERNELS.get(key)
        if kernel is None:
            registers = built.registers
            maxnreg = registers.pop("maxnreg")
            constants = {"HAS_LENS": has_lens, **modes, "HAS_FLAG": has_flag, **asdict(built), **registers}
            constants["LOADER_REGISTERS"] = LOADER_REGISTERS
            checked = [tiles and TensorDescriptor(*tiles) for tiles in descs]
            kernel = forward[grid](*checked, *numbers, **constants, num_warps=4, maxnreg=maxnreg)
            _KERNELS[key] = kernel, tuple(constants[name] for name in forward.arg_names if name in constants)
        else:  # past the look-up of the kernel, which reads every argument
            kernel, constants = kernel
            kernel[grid](*descs, *numbers, *constants)
    return out, lse if return_lse else None


def refuses(call: Call) -> str | None:
    """Why this kernel does not compute the call, or None."""
    if call.device.type != "cuda":
        return "no GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(call.device) != (9, 0):
        return "needs compute capability 9.0"
    return refuses_but_plain(call)


def _tile_of(call: Call) -> Tile:
    built = config(call.head_dim)
    return Tile(M.value * built.GROUPS, built.N, 4 * (built.GROUPS + 1))  # the loader's registers are those of a group


BACKENDS = (TritonBackend("triton_hopper", attend, refuses, _tile_of),)
