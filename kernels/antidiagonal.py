"""XAttention's block masses in Triton: two passes over antidiagonal scores that are never written.

    score_ab = scale / S  sum_s q[a S + S-1-s] . k[b S + s]
    mass_IJ  = sum_{a in I} w_a  sum_{b in J} p_ab,    p_ab = w_b exp(score_ab) / sum_b w_b exp(score_ab)

(Xu et al., arXiv:2503.16428, section 2; w, the live share of a group of S places, and why:
videoattn/selection/xattention.py, which has the same in plain torch.) The scores are a matrix product with an inner
size of S D, S products of strided rows: nothing is laid out anew for it. The first pass keeps the maximum and the sum
of a row as it goes (Milakov and Gimelshein, arXiv:1805.02867) and writes their log-sum-exp, T numbers a head; the
second makes the scores again and writes sums over blocks. So T x T scores (16 million a head at 65,536 tokens and S =
16) cost 2 / S of q k^T and no memory; the published code writes them.

Scores are summed in fp32, where no product of 16-bit numbers overflows: they are scaled once, behind the sum. Programs
of a head follow one another, so that its keys stay in L2. Token and block counts are run-time integers. The tile sizes
fit into the cards' shared memory; which are the fastest has not been measured.

Letters: B batch, P places, H heads, Hkv key heads, D head_dim, n blocks, S stride, T = P / S groups, R groups a block;
M groups of queries and N of keys a tile.

Refuses: other than fp16 and bf16, head_dim other than 16 to 256 in steps of 8, compute capability below 8.0, and blocks
of other than 1, 2, 4 ... 64 groups.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels.tiles import alignment, load_head, parts
from videoattn.kernels.triton_backend import LOG2_E, Launch, aligned, capability_of, on_device_of, unit_stride


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
        return {"M": 128, "N": 128, "num_warps": 8, "num_stages": 4 if padded <= 64 else 3}
    return {"M": 64, "N": 64, "num_warps": 4, "num_stages": 4 if padded <= 64 else 3}


@triton.jit
def _scores(
    q, k, queries, keys, q_sn, k_sn, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] of groups, times log2(e); `queries` and `keys` are groups that are there."""
    q_rows = tl.multiple_of(queries.to(tl.int64) * S * q_sn, ALIGN)[:, None]
    k_rows = tl.multiple_of(keys.to(tl.int64) * S * k_sn, ALIGN)[:, None]
    all_q, all_k = tl.full([M, 1], True, tl.int1), tl.full([N, 1], True, tl.int1)
    acc = tl.zeros([M, N], tl.float32)
    for s in tl.range(0, S):
        q_at = q + tl.multiple_of((S - 1 - s) * q_sn.to(tl.int64), ALIGN)
        k_at = k + tl.multiple_of(s * k_sn.to(tl.int64), ALIGN)
        q0, q1 = load_head(q_at, q_rows, all_q, D, D0, D1)
        k0, k1 = load_head(k_at, k_rows, all_k, D, D0, D1)
        acc = tl.dot(q0, tl.trans(k0), acc)
        if D1:
            acc = tl.dot(q1, tl.trans(k1), acc)
    return acc * factor


@triton.jit
def _share(live, groups, total, S: tl.constexpr, R: tl.constexpr):
    """The live share of each group; 0 beyond the last."""
    places = tl.load(live + groups // R, groups < total, 0) - groups % R * S
    return tl.minimum(tl.maximum(places, 0), S).to(tl.float32) * (1.0 / S)


SIZES = ("total", "heads", "kv_group", *(f"{x}_s{axis}" for x in "qk" for axis in "bnh"))


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=SIZES)
def _log_sums(
    q, k, live, lse,
    factor,  # scale / S * log2(e)
    total, heads, kv_group,  # total: T; kv_group: query heads a key head
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """lse [B, H, T], in base 2: the maximum of a row of scores and the logarithm of its sum of w exp."""
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
        s = _scores(
            q, k, tl.minimum(queries, total - 1), tl.minimum(keys, total - 1), q_sn, k_sn, factor,
            D, D0, D1, M, N, S, ALIGN,
        )  # fmt: skip
        share = _share(live, keys, total, S, R)[None, :]
        s = tl.where(share > 0, s, float("-inf"))
        # A tile begins with a block, whose first group is live: the maximum is above -inf.
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(share * tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(lse + head_of_batch.to(tl.int64) * total + queries, m + tl.log2(l), queries < total)


@triton.jit(do_not_specialize=SIZES)
def _block_sums(
    q, k, live, lse, mass,
    factor, total, heads, kv_group,
    q_sb, q_sn, q_sh,
    k_sb, k_sn, k_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """mass [B, H, n, n]: sums of w_a p_ab over tiles of blocks; arguments as in `_log_sums`."""
    q_tiles, k_tiles = tl.cdiv(total, M), tl.cdiv(total, N)
    pid = tl.program_id(0)
    tile = pid // k_tiles
    head_of_batch = tile // q_tiles
    b = (head_of_batch // heads).to(tl.int64)
    h = head_of_batch % heads
    h_kv = h // kv_group
    q += tl.multiple_of(b * q_sb, ALIGN) + tl.multiple_of(h.to(tl.int64) * q_sh, ALIGN)
    k += tl.multiple_of(b * k_sb, ALIGN) + tl.multiple_of(h_kv.to(tl.int64) * k_sh, ALIGN)
    first_q, first_k = (tile % q_tiles) * M, (pid % k_tiles) * N
    queries, keys = first_q + tl.arange(0, M), first_k + tl.arange(0, N)

    s = _scores(
        q, k, tl.minimum(queries, total - 1), tl.minimum(keys, total - 1), q_sn, k_sn, factor,
        D, D0, D1, M, N, S, ALIGN,
    )  # fmt: skip
    k_share = _share(live, keys, total, S, R)[None, :]
    q_share = _share(live, queries, total, S, R)[:, None]
    log_sum = tl.load(lse + head_of_batch.to(tl.int64) * total + queries, queries < total, 0.0)[:, None]
    # Chosen, not multiplied by 0: what an empty place holds may be anything.
    p = tl.where((q_share > 0) & (k_share > 0), q_share * k_share * tl.exp2(s - log_sum), 0.0)
    p = tl.sum(tl.reshape(p, [M, N // R, R]), 2)
    p = tl.sum(tl.reshape(p, [M // R, R, N // R]), 1)
    blocks = total // R
    rows, columns = first_q // R + tl.arange(0, M // R), first_k // R + tl.arange(0, N // R)
    at = (head_of_batch.to(tl.int64) * blocks + rows)[:, None] * blocks + columns[None, :]
    tl.store(mass + at, p, (rows < blocks)[:, None] & (columns < blocks)[None, :])


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    kv_heads: int,
    blocks: int,
    stride: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[Launch, Launch]:
    """Both launches, looked up and not worked out at every call, of one device: what is compiled is loaded there."""
    b, places, h, d = shape
    settings = config(d, capability_of(device))
    d0, d1 = parts(d)
    total = places // stride
    constants = {
        "D": d,
        "D0": d0,
        "D1": d1,
        "S": stride,
        "R": total // blocks,
        "ALIGN": alignment(*strides) if aligned else 1,
        **settings,
    }
    numbers = (total, h, h // kv_heads, *strides)
    programs = -(-total // settings["M"]) * b * h
    return Launch(programs, numbers, constants), Launch(programs * -(-total // settings["N"]), numbers, constants)


def refuses(q: Tensor, k: Tensor, live: Tensor, stride: int) -> str | None:
    """Why `block_mass` does not take a call, or None."""
    if capability_of(q.device) < 80 or torch.version.hip is not None:
        return "needs an NVIDIA card of compute capability 8.0"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        return f"takes q and k both in fp16 or in bf16, got {q.dtype} and {k.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 256:
        return f"takes head_dim 16 to 256 in steps of 8, got {q.shape[-1]}"
    block = q.shape[1] // live.shape[0]
    if block % stride or (block // stride).bit_count() != 1 or block // stride > 64:
        return f"takes blocks of 1, 2, 4 ... 64 groups, got blocks of {block} and a stride of {stride}"
    return None


def block_mass(q: Tensor, k: Tensor, live: Tensor, *, stride: int, scale: float | None = None) -> Tensor:
    """mass_IJ, fp32 [B, H, n, n]; a row's sum is the number of its live queries over S.

    Args:
        q: [B, P, H, D]; k: [B, P, Hkv, D], any strides, in n blocks.
        live: int32 [n], how many places of a block are taken, the first ones; one at least.
        stride: S. scale: 1 / sqrt(D) by default.

    Raises:
        ValueError: a call that it refuses.
    """
    reason = refuses(q, k, live, stride)
    if reason is not None:
        raise ValueError(f"antidiagonal: {reason}")
    q, k = unit_stride(q), unit_stride(k)
    (b, places, h, d), n = q.shape, live.shape[0]
    strides = (*q.stride()[:3], *k.stride()[:3])
    first, second = _plan(q.shape, k.shape[2], n, stride, strides, q.dtype, q.device, aligned(q, k))
    lse = torch.empty((b, h, places // stride), dtype=torch.float32, device=q.device)
    mass = torch.empty((b, h, n, n), dtype=torch.float32, device=q.device)
    factor = (d**-0.5 if scale is None else scale) / stride * LOG2_E
    with on_device_of(q):
        first(_log_sums, (q, k, live, lse), factor)
        second(_block_sums, (q, k, live, lse, mass), factor)
    return mass
