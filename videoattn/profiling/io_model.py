"""The bytes that attention must move, and those that a tiling moves, by a model: nothing here is measured.

Two levels, each with a fast memory of M words (a word is an element of q, k and v) and a slow one:

    SM    an SM's shared memory   <- L2 and what lies behind it
    HBM   L2                      <- HBM

**The least.** Saha and Ye, "The I/O Complexity of Attention, or How Optimal is Flash Attention?" (ICML 2024,
arXiv:2402.07443): exact attention that computes q k^T by inner products moves Theta(min(N^2 d^2 / M, N^2 d / sqrt M)) words,
the first for M >= d^2 ("large cache", where FlashAttention is optimal), the second for M < d^2 ("small cache", where square
tiles of scores that are written out are). The paper has no constants; these follow from its way of counting. Cut a run into
segments of M transfers. A segment sees 2M words of q and k at the most: M that lay there and M that were read. Scores whose
d products it makes all itself need whole rows of both: M^2 / d^2 at the most. Every other score that it completes came begun,
as one of the words that lay there or were read: 2M at the most, of which twice as many are allowed here. So

    pairs d^2 / (M + 4 d^2) - M    words, where the last segment may be short, and for M < d^2
    pairs d / (2 sqrt(2 M)) - M    (a product's: Irony, Toledo and Tiskin, J. Parallel Distrib. Comput. 64, 2004)

with an M to be deducted for each of the SMs that work side by side; never less than inputs once and output once. The
registers of an SM, which hold more than its shared memory, are not counted in M: at the SM level this is a yardstick for
tilings rather than a law.

**What a tiling moves.** SM level: a tile of queries reads all keys and values, so bytes fall as 1 / block_m:

    q + ceil(Nq / block_m) density (k + v) + out + lse        of each head

HBM level: heads are outermost in the grid of our kernels, of FlashAttention 2 and of memory-efficient attention. The programs
that run at the same time are taken for a wave: sm_count times as many as an SM holds, all equally long, tiles in the order of
the grid. Where k and v of the heads that a wave works on, and its tiles of q and out, fit into half of L2, k and v are read
once; else each wave reads those of its heads anew, once, since its programs walk over them side by side. Half, because on
cards whose L2 has two partitions (A100, H100, H200) what all SMs read lies in both (measured: github.com/RRZE-HPC/gpu-benches,
issues 3 and 13).

Left out: masks, lists of blocks and scales of sparse and quantised kernels, padding of heads (it is never read), splits along
the keys.

Letters: B batch, H heads, Hkv key heads, Nq/Nk queries and keys, D or d head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from videoattn.backend import backends
from videoattn.call import Call
from videoattn.profiling.profile import AttentionCall, Ceilings, Io

WARPS_OF_SM = 8  # as many warps have room with all 255 registers of a thread, which attention kernels come near to
SHARED_L2 = 0.5
_WRITE_LSE = ("triton_hopper", "sdpa_flash")
_WIDTHS_FLASH2 = (32, 64, 96, 128, 160, 192, 224, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a kernel cuts a call.

    Args:
        block_m, block_n: queries and keys of a tile.
        resident: programs that an SM works on at a time.
        lse: whether the log-sum-exp is written, fp32.
    """

    block_m: int
    block_n: int
    resident: int = 1
    lse: bool = False

    def __post_init__(self) -> None:
        if min(self.block_m, self.block_n, self.resident) < 1:
            raise ValueError(f"Tiling: wanted sizes from 1 on, got {self}")


def annotate(call: AttentionCall, chip: Ceilings, device: torch.device | None = None) -> AttentionCall:
    """The call with `padding_waste` and `io`, as far as the tiling of its backend is known.

    `device` is the GPU that ran it, the current one where None.
    """
    if min(call.batch, call.heads, call.q_len, call.kv_len) < 1 or not chip.sm_count:
        return call
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = Call(
        kind=call.kind or "full",
        layout="BNHD",
        batch=call.batch,
        q_len=call.q_len,
        kv_len=call.kv_len,
        heads=call.heads,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        dtype=getattr(torch, call.dtype),
        device=device,
    )
    cut = tiling(call.backend, facts)
    if cut is None:
        return call
    waste = padding_waste(call.q_len, call.kv_len, cut.block_m, cut.block_n)
    return replace(call, padding_waste=waste, io=model(facts, cut, chip))


def tiling(backend: str, call: Call) -> Tiling | None:
    """How a backend of ours or of torch's cuts a call; None where that is not known (cuDNN publishes no tiles)."""
    if call.causal:  # what is visited is another question
        return None
    if backend == "sdpa_flash":
        return _flash2(call)
    if backend == "sdpa_efficient":
        return _efficient(call)
    ours = next((known for known in backends() if known.own and known.name == backend), None)
    tile = ours.tile(call) if ours is not None and hasattr(ours, "tile") else None
    if tile is None:
        return None
    resident = max(1, WARPS_OF_SM // tile.warps)
    return Tiling(block_m=tile.block_m, block_n=tile.block_n, resident=resident, lse=backend in _WRITE_LSE)


def model(call: Call, cut: Tiling, chip: Ceilings, *, density: float = 1.0) -> Io:
    """The bytes of one call at both levels, beside the least.

    Args:
        call: kv_len is the number of keys that are attended to, padding not counted.
        chip: a GPU's; only its l2_bytes, sm_count and sm_bytes are read.
        density: share of the (query tile, key tile) pairs that a sparse kernel visits.

    Raises:
        ValueError: an empty call, a chip that is no GPU, a density not in 0..1.
    """
    if min(chip.l2_bytes, chip.sm_count, chip.sm_bytes) < 1:
        raise ValueError(f"chip: wanted l2_bytes, sm_count and sm_bytes of a GPU, got {chip}")
    if not 0 < density <= 1:
        raise ValueError(f"density: wanted above 0 and up to 1, got {density}")
    q, kv = _bytes(call)
    once = 2 * q + (4 * call.batch * call.heads * call.q_len if cut.lse else 0)
    passes = -(-call.q_len // cut.block_m) * (call.heads // call.kv_heads)  # over k and v
    return Io(
        block_m=cut.block_m,
        block_n=cut.block_n,
        sm_bytes=round(once + max(1.0, density * passes) * kv),
        sm_bound=lower_bound(call, chip.sm_bytes, units=chip.sm_count, density=density),
        hbm_bytes=round(once + _readings(call, cut, chip, density) * kv),
        hbm_bound=lower_bound(call, chip.l2_bytes, density=density),
        regime="large cache" if chip.sm_bytes // call.dtype.itemsize >= call.head_dim**2 else "small cache",
    )


def lower_bound(call: Call, memory: int, *, units: int = 1, density: float = 1.0) -> int:
    """The least bytes that exact attention moves into and out of `units` memories of `memory` bytes each."""
    words, d = max(1, memory // call.dtype.itemsize), call.head_dim
    pairs = density * call.batch * call.heads * call.q_len * call.kv_len
    moved = pairs * d * d / (words + 4 * d * d) if words >= d * d else pairs * d / math.sqrt(8 * words)
    return max(trivial_bytes(call), round((moved - units * words) * call.dtype.itemsize))


def trivial_bytes(call: Call) -> int:
    """q, k and v read once and the output written once. Raises ValueError for an empty call."""
    q, kv = _bytes(call)
    return 2 * q + kv


def unfused_bytes(call: Call, score_itemsize: int | None = None) -> int:
    """Of two products and a softmax: scores and probabilities are each written and read, in q's dtype where None."""
    itemsize = call.dtype.itemsize if score_itemsize is None else score_itemsize
    return trivial_bytes(call) + 4 * itemsize * call.batch * call.heads * call.q_len * call.kv_len


def padding_waste(q_len: int, kv_len: int, block_m: int, block_n: int) -> float:
    """Share of the tiles' pairs that no query or no key stands for, 0..1.

    >>> padding_waste(16, 16, 64, 64)
    0.9375
    """
    tiled = -(-q_len // block_m) * block_m * (-(-kv_len // block_n) * block_n)
    return 1 - q_len * kv_len / tiled if tiled else 0.0


def _bytes(call: Call) -> tuple[int, int]:
    """Of q (and of the output), and of k and v together."""
    if min(call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim) < 1:
        raise ValueError(f"wanted a call with queries and keys, got {call}")
    row = call.batch * call.head_dim * call.dtype.itemsize
    return row * call.heads * call.q_len, 2 * row * call.kv_heads * call.kv_len


def _readings(call: Call, cut: Tiling, chip: Ceilings, density: float) -> float:
    """How often k and v are read from HBM, all heads taken together: 1 where L2 holds those that are at work."""
    kv_heads = call.batch * call.kv_heads
    tiles = call.heads // call.kv_heads * -(-call.q_len // cut.block_m)  # that read the same k and v
    wave = min(chip.sm_count * cut.resident, tiles * kv_heads)
    step = math.gcd(wave, tiles)
    heads_at_work = min(kv_heads, (tiles + wave - step - 1) // tiles + 1)  # where a wave begins in the worst place
    row = call.head_dim * call.dtype.itemsize
    at_work = heads_at_work * 2 * row * call.kv_len + wave * 2 * row * min(call.q_len, cut.block_m)
    if at_work <= SHARED_L2 * chip.l2_bytes:
        return 1.0
    waves = -(-tiles * kv_heads // wave)
    aligned = (tiles * kv_heads - 1) // math.lcm(wave, tiles)  # waves that begin where a head does
    meetings = kv_heads + waves - 1 - aligned  # pairs of a wave and a head of its
    visited = min(1.0, density * tiles * kv_heads / meetings)  # by one of the wave's tiles at least
    return max(1.0, visited * meetings / kv_heads)


def _flash2(call: Call) -> Tiling | None:
    """FlashAttention 2 as torch builds it: run_mha_fwd_hdim* in flash_fwd_launch_template.h (Dao-AILab/flash-attention)."""
    width = next((width for width in _WIDTHS_FLASH2 if call.head_dim <= width), None)
    if width is None:
        return None
    capability = _capability(call.device)
    small = capability in ((8, 6), (8, 9)) or capability[0] == 12  # 100 KB of shared memory
    sm8x = capability[0] == 8 and capability[1] > 0
    block_m, block_n, warps = {
        32: (128, 128, 4),
        64: (128, 128, 4),
        96: (128, 64, 4),
        128: (128, 32 if sm8x else 64, 4),
        160: (128, 64, 8) if sm8x else (128, 32, 4),
        192: (128, 64, 8),
        224: (64, 64, 4) if small else (128, 64, 8),
        256: (128, 64, 8) if capability in ((8, 0), (8, 7)) else (64, 64, 4),
    }[width]
    return Tiling(block_m=block_m, block_n=block_n, resident=WARPS_OF_SM // warps, lse=True)


def _efficient(call: Call) -> Tiling | None:
    """Memory-efficient attention as torch builds it: cutlassF.h and kMinBlocksPerSm of kernel_forward.h (mem_eff_attention).

    None for heads over 128: the output is then gathered in memory, tile by tile, which the model does not know.
    """
    if call.head_dim > 128:
        return None
    warps_of_sm = 12 if call.dtype == torch.float32 or _capability(call.device) < (8, 0) else 16
    if call.head_dim <= 64:
        return Tiling(block_m=64, block_n=64, resident=warps_of_sm // 4)
    if _capability(call.device) < (8, 0):
        return Tiling(block_m=32, block_n=128, resident=warps_of_sm // 4)
    return Tiling(block_m=64, block_n=128, resident=warps_of_sm // 8)


def _capability(device: torch.device) -> tuple[int, int]:
    """(8, 0) where there is no GPU to ask: the card that the tiles were published for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
