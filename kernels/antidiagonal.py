"""XAttention's block masses on a GPU: groups side by side in INT8, one matrix product, and sums over blocks as it goes.

    score_ab = scale / S  sum_s q[a S + S-1-s] . k[b S + s]
    mass_IJ  = sum_{a in I} w_a  sum_{b in J} p_ab,    p_ab = w_b exp(score_ab) / sum_b w_b exp(score_ab)

(Xu et al., arXiv:2503.16428, section 2; w, the live share of a group of S places, and why:
videoattn/selection/xattention.py, which has the same in plain torch.) The groups of q, in reverse, and those of k
become rows of S D numbers in INT8 with one scale each; that of q holds scale / S. Tiles of their product, 1 / S of q
k^T, are written as sums over key blocks alone, of weights measured from the tile's own maximum of a row:

    sums_aJ = sum_{b in J} w_b 2^(s_ab - m_a,tile),     s = score * log2(e)

A last pass puts 2^(m_a,tile - m_a) on them, divides by their sum and adds up the rows of a block of queries. So each
score is made once, and T nk numbers are written instead of T T: some heads at a time, no more than SUMS of them. That
a tile holds whole blocks, the groups of a block of keys are followed by nothing up to a power of two: 192 places at S
= 16 are 12 groups and 4 that are not there. Sums have a fixed order.

A number is rounded by half a step, a part in 254 of its group's greatest: what S D such roundings, independent of each
other, cost a score is mostly below a part in a thousand of the norms of its groups, far below what blocks differ by. q
and k come in 16 bits or quantised (kernels/operands.py). A group that reaches beyond P repeats its last place.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys, S stride, T =
P / S groups, rounded up, R groups a block, C that many up to a power of two; W what S D is padded to; M groups of
queries and N of keys a tile.

Refuses: other than fp16 and bf16, compute capability below 8.0, blocks of other than 1 to 64 whole groups, more blocks
of keys than a program holds.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels import operands
from videoattn.kernels.operands import Quantised
from videoattn.kernels.tiles import alignment
from videoattn.kernels.triton_backend import LOG2_E, Launch, Tiles, aligned, capability_of, on_device_of, unit_stride
from videoattn.selection.arrangement import Blocks

KEYS = tl.constexpr(operands.KEYS)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: a number added to it is rounded to an integer, which its low bits are
LEAST = tl.constexpr(1e-20)  # a group's greatest number, at least
SUMS = 2**26  # at a time: 256 MiB, with the maxima
MOST_BLOCKS = 2**15  # of keys
ELEMENTS = 4096  # of a tile that is regrouped, or added up


@functools.cache
def config(capability: int) -> dict[str, int]:
    """Tile sizes, inner size, warps and pipeline stages for a card (90: Hopper).

    TMA: tiles are copied by Hopper's unit for it. There Triton waits for each
    product in INT8: of the two programs of a multiprocessor the other multiplies meanwhile.
    """
    if capability // 10 == 9:
        return {"M": 128, "N": 128, "BK": 128, "num_warps": 8, "num_stages": 3, "TMA": True}
    return {"M": 128, "N": 128, "BK": 64, "num_warps": 8, "num_stages": 3, "TMA": False}


@triton.jit(do_not_specialize=["places", "groups", "rows", "heads", "sb", "sn", "sh"])
def _regroup(
    x, scales, out, out_scale,
    factor,
    places, groups, rows, heads, sb, sn, sh,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, W: tl.constexpr,
    GROUPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, OF: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out [B, H, rows, W] and out_scale [B, H, rows] of x [B, P, H, D]: of q each group in reverse.

    Of C rows the first R are groups; the others, and what of W is beyond S D, are left. OF: "q" or "k", or either with
    "8" behind it, whose places have scales. ALIGN: what divides the strides, for vector loads.
    """
    tiles = tl.cdiv(groups, GROUPS)
    head_of_batch, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * GROUPS
    b, h = head_of_batch // heads, head_of_batch % heads
    group, s = start + tl.arange(0, GROUPS * SP) // SP, tl.arange(0, GROUPS * SP) % SP
    place = group * S + (S - 1 - s if OF[0] == "q" else s)
    place = tl.minimum(tl.maximum(place, 0), places - 1)
    d = tl.arange(0, DP)
    there = ((group < groups) & (s < S))[:, None] & (d < D)[None, :]
    x += tl.multiple_of(b * sb, ALIGN) + tl.multiple_of(h * sh, ALIGN)
    y = tl.load(x + tl.multiple_of(place.to(tl.int64) * sn, ALIGN)[:, None] + d[None, :], there, 0).to(tl.float32)
    if OF == "q8":
        y = y * tl.load(scales + head_of_batch * places + place)[:, None]
    elif OF == "k8":
        blocks = tl.cdiv(places, KEYS)
        y = y * tl.load(scales + (head_of_batch * blocks + place // KEYS) * 4 + place % 8 // 2)[:, None]
    if SP != S:
        y = tl.where((s < S)[:, None], y, 0.0)

    size = tl.abs(y)
    size = tl.where(size < float("inf"), size, float("inf"))  # NaN too, which a maximum may pass over
    top = tl.max(tl.reshape(tl.max(size, 1), [GROUPS, SP]), 1)
    step = 127.0 / tl.maximum(top, LEAST)
    steps = tl.reshape(tl.broadcast_to(step[:, None], [GROUPS, SP]), [GROUPS * SP])
    y = (y * steps[:, None] + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    row = head_of_batch * rows + group // R * C + group % R
    tl.store(out + (row * W + s * D)[:, None] + d[None, :], y, there)
    scale = tl.where(top < float("inf"), tl.maximum(top, LEAST) * (1.0 / 127.0) * factor, float("nan"))
    group = start + tl.arange(0, GROUPS)
    tl.store(out_scale + head_of_batch * rows + group // R * C + group % R, scale, group < groups)


@triton.jit
def _share(live, block, slot, there, S: tl.constexpr):
    """The live share of group `slot` of a block."""
    places = tl.load(live + block, there, 0) - slot * S
    return tl.minimum(tl.maximum(places, 0), S).to(tl.float32) * (1.0 / S)


@triton.jit(do_not_specialize=["first", "groups", "q_rows", "k_rows", "kv_group", "k_blocks"])
def _tile_sums(
    q, q_scale, k, k_scale, k_live, sums, maxima,
    first, groups, q_rows, k_rows, kv_group, k_blocks,  # first: of the heads; kv_group: query heads a key head
    W: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """sums [heads, T, nk] and maxima [heads, T, tiles of keys] of q [B H, rows, W] and k [B Hkv, rows, W]."""
    q_tiles, k_tiles = q_rows // M, k_rows // N
    pid = tl.program_id(0)
    at_head, tile = pid // (q_tiles * k_tiles), pid % (q_tiles * k_tiles)
    head = first + at_head
    kv_head = head // kv_group
    start_q, start_k = tile // k_tiles * M, tile % k_tiles * N
    rows, columns = start_q + tl.arange(0, M), start_k + tl.arange(0, N)

    if not TMA:
        q_at = q + (head.to(tl.int64) * q_rows + rows)[:, None] * W + tl.arange(0, BK)[None, :]
        k_at = k + (kv_head.to(tl.int64) * k_rows + columns)[:, None] * W + tl.arange(0, BK)[None, :]
    acc = tl.zeros([M, N], tl.int32)
    for at in tl.range(0, W, BK):
        if TMA:
            q_tile, k_tile = q.load([head * q_rows + start_q, at]), k.load([kv_head * k_rows + start_k, at])
        else:
            q_tile, k_tile = tl.load(q_at + at), tl.load(k_at + at)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, out_dtype=tl.int32)

    block, slot = columns // C, columns % C
    share = _share(k_live, block, slot, (block < k_blocks) & (slot < R) & (block * R + slot < groups), S)
    row_scale = tl.load(q_scale + head.to(tl.int64) * q_rows + rows)
    column_scale = tl.load(k_scale + kv_head.to(tl.int64) * k_rows + columns)
    column_scale = tl.where(share > 0, column_scale, 0.0)  # chosen: what an empty place holds may be anything
    # w 2^s = 2^(s + log2 w), and 0 = 2^-inf.
    s = acc.to(tl.float32) * row_scale[:, None] * column_scale[None, :] + tl.log2(share)[None, :]
    m = tl.max(s, 1)
    p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
    p = tl.sum(tl.reshape(p, [M, N // C, C]), 2)
    row = at_head.to(tl.int64) * groups + rows
    tl.store(maxima + row * k_tiles + tile % k_tiles, m, rows < groups)
    block = start_k // C + tl.arange(0, N // C)
    tl.store(sums + row[:, None] * k_blocks + block[None, :], p, (rows < groups)[:, None] & (block < k_blocks)[None, :])


@triton.jit(do_not_specialize=["groups", "q_blocks", "k_blocks", "k_tiles"])
def _masses(
    sums, maxima, q_live, mass,
    groups, q_blocks, k_blocks, k_tiles,
    S: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PER_TILE: tl.constexpr,
):  # fmt: skip
    """mass [heads, nq, nk] of what `_tile_sums` writes; PER_TILE blocks of keys have one maximum."""
    head, i = (tl.program_id(0) // q_blocks).to(tl.int64), tl.program_id(0) % q_blocks
    j = tl.arange(0, BLOCKS)
    total = tl.zeros([BLOCKS], tl.float32)
    for first in range(0, R, ROWS):
        slot = first + tl.arange(0, ROWS)
        group = i * R + slot
        here = (slot < R) & (group < groups)
        weight = _share(q_live, group // R, slot, here, S)
        there = here[:, None] & (j < k_blocks)[None, :]
        row = (head * groups + group)[:, None]
        m = tl.load(maxima + row * k_tiles + j[None, :] // PER_TILE, there, float("-inf"))
        x = tl.load(sums + row * k_blocks + j[None, :], there, 0.0)
        top = tl.max(m, 1)
        x = x * tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[:, None])
        x = x * (weight / tl.sum(x, 1))[:, None]
        total += tl.sum(tl.where((weight > 0)[:, None], x, 0.0), 0)
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
    if keys.count > MOST_BLOCKS:
        return f"takes at most {MOST_BLOCKS} blocks of keys, got {keys.count}"
    return None


@functools.lru_cache(maxsize=1024)
def _regroup_plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    rows: int,
    width: int,
    stride: int,
    block: tuple[int, int],
    of: str,
    aligned: bool,
    device: torch.device,
) -> Launch:
    """Looked up, of one device: what is compiled is loaded there. block: R and C."""
    b, places, h, d = shape
    padded, slots, groups = triton.next_power_of_2(d), triton.next_power_of_2(stride), triton.cdiv(places, stride)
    of_tile = max(1, ELEMENTS // (padded * slots))
    constants = {"D": d, "DP": padded, "S": stride, "SP": slots, "W": width, "GROUPS": of_tile}
    constants |= {"R": block[0], "C": block[1], "OF": of, "ALIGN": alignment(*strides) if aligned else 1}
    constants["num_warps"] = max(4, min(16, padded * slots // 1024))
    return Launch(b * h * triton.cdiv(groups, of_tile), (places, groups, rows, h, *strides), constants)


@functools.lru_cache(maxsize=1024)
def _sums_plan(
    first: int,
    heads: int,
    groups: int,
    rows: tuple[int, int],
    kv_group: int,
    blocks: tuple[int, int],
    per_block: tuple[int, int],
    stride: int,
    width: int,
    capability: int,
    device: torch.device,
) -> tuple[Launch, Launch]:
    """Both launches for some heads."""
    settings = config(capability)
    slots = triton.next_power_of_2(per_block[1])
    tiles = [count // settings[size] for count, size in zip(rows, "MN", strict=True)]
    sums = Launch(
        heads * tiles[0] * tiles[1],
        (first, groups, *rows, kv_group, blocks[1]),
        {"W": width, "S": stride, "R": per_block[1], "C": slots, **settings},
    )
    padded = triton.next_power_of_2(blocks[1])
    at_once = max(1, min(triton.next_power_of_2(per_block[0]), ELEMENTS // padded))
    constants = {"S": stride, "R": per_block[0], "ROWS": at_once, "BLOCKS": padded, "PER_TILE": settings["N"] // slots}
    constants["num_warps"] = max(4, min(16, at_once * padded // 512))
    return sums, Launch(heads * blocks[0], (groups, *blocks, tiles[1]), constants)


def _regrouped(
    x: Tensor, scales: Tensor | None, stride: int, per_block: int, of: str, factor: float
) -> tuple[Tensor, Tensor]:
    """int8 [B, H, rows, W] and fp32 [B, H, rows] of x [B, P, H, D], any strides but the last: groups of q one after
    another, those of a block of k followed by nothing up to a power of two; rows up to whole tiles."""
    (b, places, h, d), settings = x.shape, config(capability_of(x.device))
    groups, width = triton.cdiv(places, stride), triton.cdiv(stride * d, settings["BK"]) * settings["BK"]
    block, tile = (1, 1), settings["M"]
    if of[0] == "k":
        block, tile = (per_block, triton.next_power_of_2(per_block)), settings["N"]
    rows = triton.cdiv(triton.cdiv(groups, block[0]) * block[1], tile) * tile
    make = torch.empty if width == stride * d else torch.zeros
    out = make((b, h, rows, width), dtype=torch.int8, device=x.device)
    out_scale = torch.empty((b, h, rows), dtype=torch.float32, device=x.device)
    plan = _regroup_plan(x.shape, x.stride()[:3], rows, width, stride, block, of, aligned(x), x.device)
    plan(_regroup, (x, scales, out, out_scale), factor)
    return out, out_scale


def _mass(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], places: int, queries: Blocks, keys: Blocks, stride: int
) -> Tensor:
    """From groups of q [B, H, rows, W] and of k [B, Hkv, rows, W], with their scales."""
    (q8, q_scale), (k8, k_scale) = q, k
    (b, h, q_rows, width), (_, kv_heads, k_rows, _) = q8.shape, k8.shape
    groups, capability = triton.cdiv(places, stride), capability_of(q8.device)
    settings = config(capability)
    blocks, per_block = (queries.count, keys.count), (queries.size // stride, keys.size // stride)
    tiles = k_rows // settings["N"]
    mass = torch.empty((b, h, *blocks), dtype=torch.float32, device=q8.device)
    of_heads, q_tiles, k_tiles = mass.flatten(0, 1), q8, k8
    if settings["TMA"]:
        q_tiles, k_tiles = (
            Tiles(x, (x.numel() // width, width), (width, 1), (settings[size], settings["BK"]))
            for x, size in ((q8, "M"), (k8, "N"))
        )
    step = min(b * h, max(1, SUMS // (groups * (blocks[1] + tiles))))
    sums = torch.empty((step, groups, blocks[1]), dtype=torch.float32, device=mass.device)
    maxima = torch.empty((step, groups, tiles), dtype=torch.float32, device=mass.device)
    for first in range(0, b * h, step):
        some = of_heads[first : first + step]
        tile_sums, masses = _sums_plan(
            first, len(some), groups, (q_rows, k_rows), h // kv_heads, blocks, per_block, stride, width, capability,
            mass.device,
        )  # fmt: skip
        tile_sums(_tile_sums, (q_tiles, q_scale, k_tiles, k_scale, keys.live, sums, maxima))
        masses(_masses, (sums, maxima, queries.live, some))
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
        of_q = _regrouped(unit_stride(q), None, stride, 1, "q", factor)
        of_k = _regrouped(unit_stride(k), None, stride, keys.size // stride, "k", 1.0)
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
        of_q = _regrouped(q8, x.q_scale, stride, 1, "q8", 1.0 / stride)
        of_k = _regrouped(k8, x.k_scale, stride, keys.size // stride, "k8", 1.0)
        return _mass(of_q, of_k, x.q.shape[2], queries, keys, stride)
