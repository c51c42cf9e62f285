"""The oracle of quantised decisions: SageAttention 2's algorithms emulated in torch, in fp64 where nothing is to be rounded.

    s = (round(q c / qs) qs) (round((k - mean k) / ks) ks)^T,   p = round(2^(s - m)),   out = p round(v / vs) vs / sum 2^(s - m)

with c = scale log2(e) and m the running maximum of a row, tile of keys by tile of keys. q and k are rounded to INT8 or
INT4, v and p to e4m3, to INT8 or to 16 bits. What kernels round in passing (scores, sums and exponentials in fp32) is
exact here, so that a kernel is off by that alone. (Zhang et al., arXiv:2411.10958, in base 2.)

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim, W D rounded up to a multiple of 16.

Refuses: causal, and masks but those of lists of key blocks, which are bool.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from videoattn.kernels.operands import KEYS, OFFSET, ORDER, PV, Quantised

PRECISIONS: dict[str, PV] = {
    "int8_qk_fp8_pv": "fp8",
    "int8_qk_16bit_pv": "16bit",
    "int8_qk_int8_pv": "int8",
    "int4_qk_fp8_pv": "fp8",  # for studies: no kernel has it
}
E4M3 = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": 127.0}
LOG2_E = math.log2(math.e)
Q_BLOCK = 128  # rows of q that share the mean which is taken off them
SCORES = 2**24  # at a time


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (fp64) to the nearest number of `dtype`, in fp64: halves to even, what INT8 and e4m3 cannot hold to their ends."""
    if dtype == torch.int8:
        return x.round().clamp(-127, 127)
    # torch rounds fp64 to fp32 first, and that to what is narrower; towards odd, the first leaves the second its halves
    near = x.float()
    bits = near.view(torch.int32)
    towards_zero = torch.where(near.double().abs() > x.abs(), bits - 1, bits)
    odd = torch.where(near.double() == x, bits, towards_zero | 1).view(torch.float32)
    odd = torch.where(x.isfinite() & near.isfinite(), odd, near)
    return (odd.clamp(-LARGEST["fp8"], LARGEST["fp8"]) if dtype == E4M3 else odd).to(dtype).double()


def _rounded(x: Tensor, group: Tensor, groups: int, levels: int, floor: float, added: float) -> tuple[Tensor, Tensor]:
    """Integers of x [B, H, N, D] (fp64), and fp32 scales [B, H, groups] of the tokens' groups [N].

    A group with a number that is not finite gets NaN as its scale.
    """
    largest = torch.zeros(*x.shape[:2], groups, dtype=torch.float64, device=x.device)
    largest.scatter_reduce_(2, group.expand(x.shape[:3]), x.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(-1), "amax")
    scale = (largest / levels + added).float().clamp_min(floor)
    scale.index_add_(2, group, (x * 0).sum(-1).float())
    return (x / scale.double()[:, :, group, None]).round().nan_to_num().clamp(-levels, levels), scale


def key_groups(tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The running number of each token's scale, and how many scales there are."""
    t = torch.arange(tokens, device=device)
    return t // KEYS * 4 + t % 8 // 2, -(-tokens // KEYS) * 4


def _valid(kv_len: Tensor | None, k: Tensor) -> Tensor:
    """[B, Nk]: which keys of k [B, Nk, ...] count."""
    tokens = torch.arange(k.shape[1], device=k.device)
    limit = torch.full((k.shape[0],), k.shape[1], device=k.device) if kv_len is None else kv_len.to(k.device)
    return tokens < limit[:, None]


def _prepared(
    q: Tensor, k: Tensor, scale: float | None, valid: Tensor, smooth_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, Nq, D] in units of log2, k [B, Hkv, Nk, D] less its mean, and log sum exp's shift for it [B, H, Nq]: fp64."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    there = valid[:, None, :, None]
    k = k.masked_fill(~there, 0.0)
    mean = k.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1) * smooth_k
    shift = scale * (q @ mean.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3))[..., 0]
    return q * (scale * LOG2_E), (k - mean).masked_fill(~there, 0.0), shift


def _values(v: Tensor, valid: Tensor, pv: PV, floor: float = 1e-30) -> tuple[Tensor, Tensor | None]:
    """v [B, Hkv, Nk, D] as it is multiplied, in fp64, 0 where no key counts, and its scales [B, Hkv, D]."""
    v = v.transpose(1, 2).double().masked_fill(~valid[:, None, :, None], 0.0)
    if pv == "16bit":
        return v, None
    scale = (v.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(2) / LARGEST[pv]).float().clamp_min(floor)
    scale = scale + (v * 0).sum(2).float()
    dtype = E4M3 if pv == "fp8" else torch.int8
    return round_to((v / scale.double()[:, :, None]).nan_to_num(), dtype), scale


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pv: PV,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
) -> Quantised:
    """The operands of q [B, Nq, H, D] and k, v [B, Nk, Hkv, D], any strides, as kernels/operands.py describes them."""
    (nq, _, d), nk, device = q.shape[1:], k.shape[1], q.device
    valid = _valid(kv_len, k)
    q2, k2, shift = _prepared(q, k, scale, valid, smooth_k=True)
    q8, q_scale = _rounded(q2, torch.arange(nq, device=device), nq, 127, 1e-30, 0.0)
    k8, k_scale = _rounded(k2, *key_groups(nk, device), 127, 1e-30, 0.0)
    wide = (0, -d % 16)
    v_scale = None
    if pv != "16bit":
        v8, v_scale = _values(v, valid, pv)
        v8 = F.pad(v8.transpose(2, 3), (0, -nk % KEYS, *wide))
        v8 = v8.unflatten(3, (-1, 16))[..., torch.tensor(ORDER, device=device)].flatten(3)
        v = v8.to(E4M3 if pv == "fp8" else torch.int8).contiguous()
    return Quantised(
        q=F.pad(q8, wide).to(torch.int8).contiguous(),
        q_scale=q_scale,
        k=F.pad(k8, wide).to(torch.int8).contiguous(),
        k_scale=k_scale.unflatten(2, (-1, 4)),
        v=v,
        v_scale=v_scale,
        lse_shift=shift.float() if return_lse else None,
    )


def _emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    valid: Tensor,
    *,
    p_dtype: torch.dtype,
    block_n: int,
    nudge: float = 1.0,
    rounded_sum: bool = False,
    backwards: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, D] and lse [B, H, Nq], fp64, of q and k as their integers stand for them, in units of log2.

    q [B, H, Nq, E], k [B, Hkv, Nk, E], v [B, Hkv, Nk, D]; p is multiplied by `nudge` before it is rounded to p_dtype.
    mask: bool, broadcastable to [B, H, Nq, Nk], of four dimensions.
    """
    (b, h, nq, _), (h_kv, nk, d) = q.shape, v.shape[1:]
    out = q.new_zeros(b, h, nq, d)
    lse = q.new_zeros(b, h, nq)
    rows = max(1, SCORES // (b * block_n))
    mask = None if mask is None else mask.expand(-1, h, nq, nk)
    offset = {E4M3: OFFSET, torch.int8: math.log2(LARGEST["int8"])}.get(p_dtype, 0.0)
    for head, first in ((head, first) for head in range(h) for first in range(0, nq, rows)):
        queries = q[:, head, first : first + rows]
        keys, values = (x[:, head // (h // h_kv)] for x in (k, v))
        m = queries.new_full(queries.shape[:2], -torch.inf)
        l, acc = torch.zeros_like(m), queries.new_zeros(*queries.shape[:2], d)
        for start in sorted(range(0, nk, block_n), reverse=backwards):
            tile = slice(start, min(start + block_n, nk))
            s = (queries @ keys[:, tile].transpose(1, 2)).masked_fill(~valid[:, None, tile], -torch.inf)
            if mask is not None:
                s = s.masked_fill(~mask[:, head, first : first + rows, tile], -torch.inf)
            m_new = torch.maximum(m, s.amax(-1))
            finite = m_new.masked_fill(m_new == -torch.inf, 0.0)
            shift = finite  # what p is measured from
            if p_dtype == torch.int8:
                shift = s.amax(-1)
                shift = torch.where(shift == -torch.inf, finite, shift)
            p = round_to((s - shift[..., None] + offset).exp2() * nudge, p_dtype)
            grow, shrink = (shift - finite - offset).exp2(), (m - finite).exp2()
            acc = acc * shrink[..., None] + (p @ values[:, tile]) * grow[..., None]
            weights = p * grow[..., None] if rounded_sum else (s - finite[..., None]).exp2()
            l = l * shrink + weights.sum(-1)
            m = m_new
        out[:, head, first : first + rows] = acc / l.masked_fill(l == 0.0, 1.0)[..., None]
        lse[:, head, first : first + rows] = (m + l.log2()) / LOG2_E
    if v_scale is not None:
        out = out * v_scale.double().repeat_interleave(h // h_kv, 1)[:, :, None]
    return out.transpose(1, 2), lse


def attend_quantised(
    x: Quantised,
    *,
    head_dim: int,
    dtype: torch.dtype,
    kv_len: Tensor | None = None,
    block_n: int = KEYS,
    nudge: float = 1.0,
    rounded_sum: bool = False,
    backwards: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a kernel makes of the operands, in fp64: out [B, Nq, H, D] and lse [B, H, Nq].

    Args:
        dtype: what p is rounded to where v is in 16 bits.
        block_n: keys a tile.
        nudge: factor on p before it is rounded. Rounding is monotone: with 1 + e and 1 - e the results for |v| enclose what
            a kernel gives whose p is off by no more than e.
        rounded_sum: whether the sum of p is taken of what it is rounded to.
        backwards: whether the tiles are met from the last to the first: p is rounded by the maximum so far.
        mask: bool, broadcastable to [B, H, Nq, Nk], of four dimensions: True where a query sees a key.
    """
    nk, device = x.k.shape[2], x.k.device
    group, _ = key_groups(nk, device)
    q = x.q.double() * x.q_scale.double()[..., None]
    k = x.k.double() * x.k_scale.double().flatten(2)[:, :, group, None]
    valid = _valid(kv_len, x.k.transpose(1, 2))
    if x.v_scale is None:
        v, p_dtype = x.v.double().transpose(1, 2).masked_fill(~valid[:, None, :, None], 0.0), dtype
    else:
        tokens = torch.tensor(ORDER, device=device).argsort()  # where each token of 16 is stored
        v = x.v.double().unflatten(3, (-1, 16))[..., tokens].flatten(3)[:, :, :head_dim, :nk].transpose(2, 3)
        p_dtype = x.v.dtype
    ways = {"block_n": block_n, "nudge": nudge, "rounded_sum": rounded_sum, "backwards": backwards, "mask": mask}
    out, lse = _emulate(q, k, v, x.v_scale, valid, p_dtype=p_dtype, **ways)
    return out, lse if x.lse_shift is None else lse + x.lse_shift.double()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    precision: str,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    smooth_q: bool = True,
    smooth_k: bool = True,
    block_n: int = KEYS,
) -> tuple[Tensor, Tensor]:
    """Attention as a quantised decision computes it; the rest of the arguments, and what is returned, as in reference.py.

    Args:
        precision: one of PRECISIONS.
        smooth_q: with INT4, whether the mean of its block of rows is taken off q, whose product with k is added in fp64.
        smooth_k: with INT4, whether the mean over the tokens is taken off k; with INT8 it is.
        block_n: keys a tile.

    Raises:
        ValueError: another precision, a mask that is not bool or with INT4, or causal attention.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision!r}")
    if causal or (mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or precision.startswith("int4"))):
        raise ValueError(f"{precision}: wanted no causal attention, and no mask but bool [B, H, Nq, Nk] with INT8")
    pv, d = PRECISIONS[precision], q.shape[3]
    if not precision.startswith("int4"):
        x = quantise(q, k, v, pv=pv, scale=scale, kv_len=kv_len, return_lse=True)
        return attend_quantised(x, head_dim=d, dtype=q.dtype, kv_len=kv_len, block_n=block_n, mask=mask)

    valid, rows = _valid(kv_len, k), torch.arange(q.shape[1], device=q.device)
    q2, k2, shift = _prepared(q, k, scale, valid, smooth_k)
    block = rows // Q_BLOCK
    mean = q2.new_zeros(*q2.shape[:2], int(block[-1]) + 1, d).index_add_(2, block, q2)
    mean = (mean / block.bincount()[:, None])[:, :, block] * smooth_q
    q4, q_scale = _rounded(q2 - mean, rows, len(rows), 7, 1e-30, 0.0)
    group, groups = key_groups(k.shape[1], k.device)
    k4, k_scale = _rounded(k2, group, groups, 7, 1e-30, 0.0)
    # Side by side, so that one product is the sum of both: of the integers, and of the means with k.
    q2 = torch.cat([q4 * q_scale.double()[..., None], mean], -1)
    k2 = torch.cat([k4 * k_scale.double()[:, :, group, None], k2], -1)
    out, lse = _emulate(q2, k2, *_values(v, valid, pv), valid, p_dtype=E4M3, block_n=block_n)
    return out, lse + shift


def sage2(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SageAttention 2's own algorithm for Hopper (INT8 with a scale a thread, e4m3 p v, two levels), for comparison.

    q has a scale for the rows of 16 that are equal modulo 8, k those of kernels/operands.py; scales are absmax / 127 +
    1e-7 (thu-ml/SageAttention, triton/quant_per_thread.py; csrc/qattn/qk_int_sv_f8_cuda_sm90.cu). Arguments and results as
    in reference.py.
    """
    valid, rows = _valid(kv_len, k), torch.arange(q.shape[1], device=q.device)
    q2, k2, shift = _prepared(q, k, scale, valid, smooth_k=True)
    group = rows // 16 * 8 + rows % 8
    q8, q_scale = _rounded(q2, group, -(-len(rows) // 16) * 8, 127, 0.0, 1e-7)
    q2 = q8 * q_scale.double()[:, :, group, None]
    group, groups = key_groups(k.shape[1], k.device)
    k8, k_scale = _rounded(k2, group, groups, 127, 0.0, 1e-7)
    k2 = k8 * k_scale.double()[:, :, group, None]
    out, lse = _emulate(q2, k2, *_values(v, valid, "fp8"), valid, p_dtype=E4M3, block_n=KEYS)
    return out, lse + shift
