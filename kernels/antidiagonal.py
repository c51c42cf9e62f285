"""XAttention's block masses on a GPU: groups side by side, one matrix product, and sums over blocks.

    score_ab = scale / S  sum_s q[a S + S-1-s] . k[b S + s]
    mass_IJ  = sum_{a in I} w_a  sum_{b in J} p_ab,    p_ab = w_b exp(score_ab) / sum_b w_b exp(score_ab)

(Xu et al., arXiv:2503.16428, section 2; w, the live share of a group of S places, and why:
videoattn/selection/xattention.py, which has the same in plain torch.) The groups of q, in reverse and scaled, and those of
k become rows of S D numbers in bf16; their product, 1 / S of q k^T, is the library's, some heads at a time, so that no more
than SCORES scores stand in memory; a program then takes the rows of a block of queries, makes weights of them in fp32 and
sums these over blocks of keys. What bf16 costs a score, a part in 256 of the norms of its groups, is far below what blocks
differ by. q and k come in 16 bits or quantised (kernels/operands.py). A group that reaches beyond P repeats its last place.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys, S stride, T = P / S
groups, rounded up, R groups a block, C that many up to a power of two.

Refuses: other than fp16 and bf16, compute capability below 8.0, blocks of other than 1 to 64 whole groups, more scores a
row than a program holds.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels import operands
from videoattn.kernels.operands import Quantised
from videoattn.kernels.triton_backend import LOG2_E, Launch, capability_of, on_device_of, unit_stride
from videoattn.selection.arrangement import Blocks

KEYS = tl.constexpr(operands.KEYS)
SCORES = 2**27  # at a time: 256 MiB
MOST_GROUPS = 2**15  # of a row, with those that fill blocks up
ELEMENTS = 4096  # of a tile that is regrouped
PITCH = 64  # groups and scores of a row are padded to a multiple: the library is slow on rows that are not aligned


@triton.jit(do_not_specialize=["places", "groups", "heads", "sb", "sn", "sh"])
def _regroup(
    x, scales, out,
    factor,
    places, groups, heads, sb, sn, sh,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, OF: tl.constexpr,
):  # fmt: skip
    """out [B, H, groups S, D] of x [B, P, H, D]: of q each group in reverse. OF: "q" or "k", or either with "8" behind it,
    whose rows have scales."""
    tiles = tl.cdiv(groups * S, ROWS)
    head_of_batch, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * ROWS
    b, h = head_of_batch // heads, head_of_batch % heads
    to = start + tl.arange(0, ROWS)
    place = to
    if OF[0] == "q":
        place = to // S * S + (S - 1 - to % S)
    place = tl.minimum(place, places - 1)
    there = to < groups * S
    d = tl.arange(0, DP)
    rows = x + b * sb + h * sh + place.to(tl.int64) * sn
    y = tl.load(rows[:, None] + d[None, :], there[:, None] & (d < D)[None, :], 0).to(tl.float32)
    if OF == "q8":
        y = y * tl.load(scales + head_of_batch * places + place)[:, None]
    elif OF == "k8":
        blocks = tl.cdiv(places, KEYS)
        y = y * tl.load(scales + (head_of_batch * blocks + place // KEYS) * 4 + place % 8 // 2)[:, None]
    at = (head_of_batch * groups * S + to)[:, None] * D + d[None, :]
    tl.store(out + at, (y * factor).to(out.dtype.element_ty), there[:, None] & (d < D)[None, :])


@triton.jit
def _share(live, block, slot, there, S: tl.constexpr):
    """The live share of group `slot` of a block."""
    places = tl.load(live + block, there, 0) - slot * S
    return tl.minimum(tl.maximum(places, 0), S).to(tl.float32) * (1.0 / S)


@triton.jit(do_not_specialize=["groups", "pitch", "q_blocks", "k_blocks"])
def _block_sums(
    scores, q_live, k_live, mass,
    groups, pitch, q_blocks, k_blocks,
    S: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, CK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """mass [heads, nq, nk] of scores [heads, pitch, pitch], of which T x T count, in units of log2."""
    head, i = (tl.program_id(0) // q_blocks).to(tl.int64), tl.program_id(0) % q_blocks
    block, slot = tl.arange(0, BLOCKS)[:, None], tl.arange(0, CK)[None, :]
    group = block * RK + slot
    there = (block < k_blocks) & (slot < RK) & (group < groups)
    share = _share(k_live, block, slot, there, S)
    total = tl.zeros([BLOCKS], tl.float32)
    for r in range(RQ):
        row = i * RQ + r
        weight = _share(q_live, i, r, row < groups, S)
        s = tl.load(scores + (head * pitch + row) * pitch + group, there & (row < groups), 0.0).to(tl.float32)
        s = tl.where(share > 0, s, float("-inf"))
        p = share * tl.exp2(s - tl.max(s))
        p = tl.where(share > 0, p, 0.0)  # chosen, not multiplied by 0: what an empty place holds may be anything
        sums = tl.sum(p, 1)
        total += tl.where(weight > 0, sums * (weight / tl.sum(sums)), 0.0)
    j = tl.arange(0, BLOCKS)
    tl.store(mass + (head * q_blocks + i) * k_blocks + j, total, j < k_blocks)


def refuses(q: Tensor, k: Tensor, queries: Blocks, keys: Blocks, stride: int) -> str | None:
    """Why `block_mass` does not take a call, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        return f"takes q and k both in fp16 or in bf16, got {q.dtype} and {k.dtype}"
    return _refuses_blocks(q.device, queries, keys, stride)


def _refuses_blocks(device: torch.device, queries: Blocks, keys: Blocks, stride: int) -> str | None:
    if capability_of(device) < 80 or torch.version.hip is not None:
        return "needs an NVIDIA card of compute capability 8.0"
    for size in (queries.size, keys.size):
        if size % stride or size // stride > 64:
            return f"takes blocks of 1 to 64 whole groups, got blocks of {size} and a stride of {stride}"
    row = triton.next_power_of_2(keys.count) * triton.next_power_of_2(keys.size // stride)
    return f"takes at most {MOST_GROUPS} groups of keys, got {row}" if row > MOST_GROUPS else None


@functools.lru_cache(maxsize=1024)
def _regroup_plan(shape: torch.Size, strides: tuple[int, ...], stride: int, of: str, device: torch.device) -> Launch:
    """Looked up, of one device: what is compiled is loaded there."""
    b, places, h, d = shape
    padded = triton.next_power_of_2(d)
    rows, groups = ELEMENTS // padded, _padded(places, stride)
    constants = {"D": d, "DP": padded, "S": stride, "ROWS": rows, "OF": of, "num_warps": 4}
    return Launch(b * h * triton.cdiv(groups * stride, rows), (places, groups, h, *strides), constants)


@functools.lru_cache(maxsize=1024)
def _sums_plan(
    heads: int,
    groups: int,
    pitch: int,
    blocks: tuple[int, int],
    per_block: tuple[int, int],
    stride: int,
    device: torch.device,
) -> Launch:
    rows, slots = triton.next_power_of_2(blocks[1]), triton.next_power_of_2(per_block[1])
    constants = {"S": stride, "RQ": per_block[0], "RK": per_block[1], "CK": slots, "BLOCKS": rows}
    return Launch(
        heads * blocks[0], (groups, pitch, *blocks), {**constants, "num_warps": max(4, min(16, rows * slots // 512))}
    )


def _padded(places: int, stride: int) -> int:
    """T up to a multiple of PITCH."""
    return triton.cdiv(triton.cdiv(places, stride), PITCH) * PITCH


def _regrouped(x: Tensor, scales: Tensor | None, stride: int, of: str, factor: float) -> Tensor:
    """bf16 [B, H, T padded, S D] of x [B, P, H, D], any strides but the last."""
    b, places, h, d = x.shape
    out = torch.empty((b, h, _padded(places, stride), stride * d), dtype=torch.bfloat16, device=x.device)
    _regroup_plan(x.shape, x.stride()[:3], stride, of, x.device)(_regroup, (x, scales, out), factor)
    return out


def _mass(q: Tensor, k: Tensor, places: int, queries: Blocks, keys: Blocks, stride: int) -> Tensor:
    """From groups of q [B, H, T padded, S D], and of k [B, Hkv, T padded, S D]."""
    (b, h, pitch, _), kv_heads, groups = q.shape, k.shape[1], triton.cdiv(places, stride)
    blocks, per_block = (queries.count, keys.count), (queries.size // stride, keys.size // stride)
    mass = torch.empty((b, h, *blocks), dtype=torch.float32, device=q.device)
    q, k = q.view(b * kv_heads, -1, q.shape[3]), k.flatten(0, 1).transpose(1, 2)
    of_heads = mass.view(b * kv_heads, -1, *blocks)
    step = max(1, SCORES // (q.shape[1] * pitch))
    for first in range(0, len(q), step):
        some = slice(first, first + step)
        scores = torch.bmm(q[some], k[some])
        plan = _sums_plan(scores.shape[0] * h // kv_heads, groups, pitch, blocks, per_block, stride, q.device)
        plan(_block_sums, (scores, queries.live, keys.live, of_heads[some]))
    return mass


def block_mass(
    q: Tensor, k: Tensor, queries: Blocks, keys: Blocks, *, stride: int, scale: float | None = None
) -> Tensor:
    """mass_IJ, fp32 [B, H, nq, nk]; a row's sum is the number of its live queries over S.

    Args:
        q: [B, P, H, D]; k: [B, P, Hkv, D], any strides. queries, keys: their blocks, on the same device.
        stride: S. scale: 1 / sqrt(D) by default.

    Raises:
        ValueError: a call that it refuses.
    """
    reason = refuses(q, k, queries, keys, stride)
    if reason is not None:
        raise ValueError(f"antidiagonal: {reason}")
    factor = (q.shape[3] ** -0.5 if scale is None else scale) / stride * LOG2_E
    with on_device_of(q):
        of_q = _regrouped(unit_stride(q), None, stride, "q", factor)
        of_k = _regrouped(unit_stride(k), None, stride, "k", 1.0)
        return _mass(of_q, of_k, q.shape[1], queries, keys, stride)


def block_mass_quantised(x: Quantised, head_dim: int, queries: Blocks, keys: Blocks, *, stride: int) -> Tensor:
    """The same from operands, whose q holds the scale.

    Raises:
        ValueError: a call that it refuses.
    """
    reason = _refuses_blocks(x.q.device, queries, keys, stride)
    if reason is not None:
        raise ValueError(f"antidiagonal: {reason}")
    q8, k8 = (y[..., :head_dim].transpose(1, 2) for y in (x.q, x.k))
    with on_device_of(x.q):
        of_q = _regrouped(q8, x.q_scale, stride, "q8", 1.0 / stride)
        of_k = _regrouped(k8, x.k_scale, stride, "k8", 1.0)
        return _mass(of_q, of_k, x.q.shape[2], queries, keys, stride)
