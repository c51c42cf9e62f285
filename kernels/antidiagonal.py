"""XAttention's block masses in Triton: two passes over antidiagonal scores that are never written.

    score_ab = scale / S  sum_s q[a S + S-1-s] . k[b S + s]
    mass_IJ  = sum_{a in I} w_a  sum_{b in J} p_ab,    p_ab = w_b exp(score_ab) / sum_b w_b exp(score_ab)

(Xu et al., arXiv:2503.16428, section 2; w, the live share of a group of S places, and why:
videoattn/selection/xattention.py, which has the same in plain torch.) The scores are a matrix product with an inner
size of S D, S products of strided rows: nothing is laid out anew for it. The first pass keeps the maximum and the sum
of a row as it goes (Milakov and Gimelshein, arXiv:1805.02867) and writes their log-sum-exp, T numbers a head; the
second makes the scores again and writes sums over blocks. So T x T scores (16 million a head at 65,536 tokens and S =
16) cost 2 / S of q k^T and no memory; the published code writes them.

The second pass takes whole blocks of queries and of keys, the groups of each followed by nothing up to a power of two:
192 queries at S = 16 are 12 groups and 4 that are not there. A group that reaches beyond P repeats its last place.

Scores are summed in fp32, where no product of 16-bit numbers overflows: they are scaled once, behind the sum. Programs
of a head follow one another, so that its keys stay in L2. Token and block counts are run-time integers. The tile sizes
fit into the cards' shared memory; which are the fastest has not been measured.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys, S stride, T = P / S
groups, rounded up, R groups a block, C that many and up to a power of two; M groups of queries and N of keys a tile.

Refuses: other than fp16 and bf16, head_dim other than 16 to 256 in steps of 8, compute capability below 8.0, and blocks
of other than 1 to 64 whole groups.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels.tiles import alignment, load_head, parts
from videoattn.kernels.triton_backend import LOG2_E, Launch, aligned, capability_of, on_device_of, unit_stride
from videoattn.selection.arrangement import Blocks


@functools.cache
def config(head_dim: int, capability: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for a head_dim and a card (90: Hopper).

    A stage holds M + N rows of a head. A multiprocessor has 227 KiB on Hopper and the B200, 99 KiB elsewhere at the
    least.
    """
    padded = sum(parts(head_dim))
    if padded > 128:
        return {"M": 64, "N": 64, "num_warps": 8, "num_stages": 3 if capability // 10 in (9, 10) else 2}
    if capability // 10 in (9, 10):
        return {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}
    return {"M": 64, "N": 64, "num_warps": 4, "num_stages": 4 if padded <= 64 else 3}


@triton.jit
def _scores(
    q, k, queries, keys, q_sn, k_sn, places, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] of groups, times log2(e); of a group that is not there anything."""
    all_q, all_k = tl.full([M, 1], True, tl.int1), tl.full([N, 1], True, tl.int1)
    acc = tl.zeros([M, N], tl.float32)
    for s in tl.range(0, S):
        q_at, k_at = tl.minimum(queries * S + (S - 1 - s), places - 1), tl.minimum(keys * S + s, places - 1)
        q_rows = tl.multiple_of(q_at.to(tl.int64) * q_sn, ALIGN)[:, None]
        k_rows = tl.multiple_of(k_at.to(tl.int64) * k_sn, ALIGN)[:, None]
        q0, q1 = load_head(q, q_rows, all_q, D, D0, D1)
        k0, k1 = load_head(k, k_rows, all_k, D, D0, D1)
        acc = tl.dot(q0, tl.trans(k0), acc)
        if D1:
            acc = tl.dot(q1, tl.trans(k1), acc)
    return acc * factor


@triton.jit
def _share(live, groups, total, S: tl.constexpr, R: tl.constexpr):
    """The live share of each group; 0 beyond the last."""
    places = tl.load(live + groups // R, groups < total, 0) - groups % R * S
    return tl.minimum(tl.maximum(places, 0), S).to(tl.float32) * (1.0 / S)


@triton.jit
def _groups(block, total, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The groups [SIZE] of SIZE / C blocks, each followed by C - R that are not there."""
    slots = tl.arange(0, SIZE)
    return tl.where(slots % C < R, (block + slots // C) * R + slots % C, total)


SIZES = ("places", "heads", "kv_group", "q_blocks", "k_blocks", *(f"{x}_s{axis}" for x in "qk" for axis in "bnh"))


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=SIZES)
def _log_sums(
    q, k, k_live, lse,
    factor,  # scale / S * log2(e)
    places, heads, kv_group, q_blocks, k_blocks,  # places: P; kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """lse [B, H, T], in base 2: the maximum of a row of scores and the logarithm of its sum of w exp."""
    total = tl.cdiv(places, S)
    tiles = tl.cdiv(total, M)
    pid = tl.program_id(0)
    head_of_batch = pid // tiles
    b = (head_of_batch // heads).to(tl.int64)
    h = head_of_batch % heads
    h_kv = h // kv_group
    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h.to(tl.int64) * q_sh, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * k_sh, ALIGN)
    queries = (pid % tiles) * M + tl.arange(0, M)

    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    for start in tl.range(0, total, N, num_stages=1):
        keys = start + tl.arange(0, N)
        s = _scores(q, k, queries, keys, q_sn, k_sn, places, factor, D, D0, D1, M, N, S, ALIGN)
        share = _share(k_live, keys, total, S, RK)[None, :]
        s = tl.where(share > 0, s, float("-inf"))
        # The first group of all is live: from the first tile on the maximum is above -inf.
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(share * tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(lse + head_of_batch.to(tl.int64) * total + queries, m + tl.log2(l), queries < total)


@triton.jit(do_not_specialize=SIZES)
def _block_sums(
    q, k, q_live, k_live, lse, mass,
    factor, places, heads, kv_group, q_blocks, k_blocks,
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """mass [B, H, nq, nk]: sums of w_a p_ab over tiles of blocks; arguments as in `_log_sums`."""
    CQ: tl.constexpr = triton.next_power_of_2(RQ)
    CK: tl.constexpr = triton.next_power_of_2(RK)
    total = tl.cdiv(places, S)
    q_tiles, k_tiles = tl.cdiv(q_blocks, M // CQ), tl.cdiv(k_blocks, N // CK)
    pid = tl.program_id(0)
    tile = pid // k_tiles
    head_of_batch = tile // q_tiles
    b = (head_of_batch // heads).to(tl.int64)
    h = head_of_batch % heads
    h_kv = h // kv_group
    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h.to(tl.int64) * q_sh, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * k_sh, ALIGN)
    first_q, first_k = (tile % q_tiles) * (M // CQ), (pid % k_tiles) * (N // CK)
    queries, keys = _groups(first_q, total, M, RQ, CQ), _groups(first_k, total, N, RK, CK)

    s = _scores(q, k, queries, keys, q_sn, k_sn, places, factor, D, D0, D1, M, N, S, ALIGN)
    k_share = _share(k_live, keys, total, S, RK)[None, :]
    q_share = _share(q_live, queries, total, S, RQ)[:, None]
    log_sum = tl.load(lse + head_of_batch.to(tl.int64) * total + queries, queries < total, 0.0)[:, None]
    # Chosen, not multiplied by 0: what an empty place holds may be anything.
    p = tl.where((q_share > 0) & (k_share > 0), q_share * k_share * tl.exp2(s - log_sum), 0.0)
    p = tl.sum(tl.reshape(p, [M, N // CK, CK]), 2)
    p = tl.sum(tl.reshape(p, [M // CQ, CQ, N // CK]), 1)
    rows, columns = first_q + tl.arange(0, M // CQ), first_k + tl.arange(0, N // CK)
    at = (head_of_batch.to(tl.int64) * q_blocks + rows)[:, None] * k_blocks + columns[None, :]
    tl.store(mass + at, p, (rows < q_blocks)[:, None] & (columns < k_blocks)[None, :])


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_heads: int,
    blocks: tuple[int, int],
    sizes: tuple[int, int],
    stride: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[Launch, Launch]:
    """Both launches, looked up and not worked out at every call, of one device: what is compiled is loaded there.

    blocks: nq and nk. sizes: places of each.
    """
    b, places, h, d = shape
    settings = config(d, capability_of(device))
    d0, d1 = parts(d)
    groups = [size // stride for size in sizes]
    constants = {
        "D": d,
        "D0": d0,
        "D1": d1,
        "S": stride,
        "RQ": groups[0],
        "RK": groups[1],
        "ALIGN": alignment(*strides) if aligned else 1,
        **settings,
    }
    numbers = (places, h, h // kv_heads, *blocks, *strides)
    rows = triton.cdiv(triton.cdiv(places, stride), settings["M"])
    q_tiles, k_tiles = (
        triton.cdiv(count, settings[size] // triton.next_power_of_2(of_block))
        for count, size, of_block in zip(blocks, "MN", groups, strict=True)
    )
    return Launch(rows * b * h, numbers, constants), Launch(q_tiles * k_tiles * b * h, numbers, constants)


def refuses(q: Tensor, k: Tensor, queries: Blocks, keys: Blocks, stride: int) -> str | None:
    """Why `block_mass` does not take a call, or None."""
    if capability_of(q.device) < 80 or torch.version.hip is not None:
        return "needs an NVIDIA card of compute capability 8.0"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        return f"takes q and k both in fp16 or in bf16, got {q.dtype} and {k.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 256:
        return f"takes head_dim 16 to 256 in steps of 8, got {q.shape[-1]}"
    for size in (queries.size, keys.size):
        if size % stride or size // stride > 64:
            return f"takes blocks of 1 to 64 whole groups, got blocks of {size} and a stride of {stride}"
    return None


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
    q, k = unit_stride(q), unit_stride(k)
    b, places, h, d = q.shape
    blocks, sizes = (queries.count, keys.count), (queries.size, keys.size)
    strides = (*q.stride()[:3], *k.stride()[:3])
    first, second = _plan(q.shape, k.shape[2], blocks, sizes, stride, strides, q.dtype, q.device, aligned(q, k))
    lse = torch.empty((b, h, triton.cdiv(places, stride)), dtype=torch.float32, device=q.device)
    mass = torch.empty((b, h, *blocks), dtype=torch.float32, device=q.device)
    factor = (d**-0.5 if scale is None else scale) / stride * LOG2_E
    with on_device_of(q):
        first(_log_sums, (q, k, keys.live, lse), factor)
        second(_block_sums, (q, k, queries.live, keys.live, lse, mass), factor)
    return mass
