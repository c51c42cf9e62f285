"""Temporal attention: very many rows of few tokens, in one pass over memory.

out = softmax(scale q k^T) v for up to 128 queries and keys a row. A row's whole attention fits in registers, so q, k and v
are read once, the output is written once, and nothing else touches memory: the bound is the copy bandwidth. A program
takes G rows of HB heads; its products are batches of [QP, D] x [D, KP], so that no product is spent on pairs of
different rows (a tile of 64 queries by 64 keys would waste 3 of 4 at 16 frames). Loads run over heads before frames:
in the projections' layout neighbouring heads lie side by side, and a head of 40 alone would leave sectors half used.

Rows may be addressed by two strides, (b, p) -> b stride_b + p stride_p, so that [B, F, P, H, D] is read where it lies.

Letters: R = B P rows, Nq/Nk queries and keys, H heads, D head_dim; QP, KP: Nq, Nk padded to powers of two;
G rows and HB heads a program.

Refuses: masks, causal, more than 128 tokens, head_dim over 256 or no multiple of 8.
Source of the layout argument: measured on an H200, research notes of "Generative AI Beyond LLMs" (arXiv:2312.14385, section
5: temporal attention is bound by memory access, not by arithmetic).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.call import Call
from videoattn.kernels.tiles import alignment, count_not_finite, load_head, parts, store_head
from videoattn.kernels.triton_backend import TritonBackend, on_device_of, precision, scale_log2, unit_stride

MAX_TOKENS = 128


def config(q_len: int, kv_len: int, heads: int, head_dim: int) -> dict[str, int]:
    """Tile sizes and warps, as measured on an H200 (benchmarks/temporal.py)."""
    qp, kp = (max(16, triton.next_power_of_2(n)) for n in (q_len, kv_len))
    tokens = max(qp, kp)
    if tokens >= 64:  # one row of one head, its products shared by all warps
        hb, warps = 1, 8 if tokens * head_dim > 64 * 128 else 4
    elif tokens == 32:
        hb = 4 if head_dim < 64 else 1
        warps = hb
    else:
        hb = 2 if head_dim <= 64 else 4 if head_dim <= 128 else 1
        warps = max(1, hb // 2)
    while heads % hb:
        hb //= 2
    return {"QP": qp, "KP": kp, "G": 1, "HB": hb, "num_warps": min(warps, max(1, hb)) if tokens < 64 else warps}


@triton.jit
def _row_offsets(rows, P, tokens, heads, stride_b, stride_p, stride_n, stride_h, ALIGN: tl.constexpr):
    """Element offsets [G, N, HB, 1] of every (row, token, head)."""
    row = tl.multiple_of((rows // P).to(tl.int64) * stride_b, ALIGN)
    place = tl.multiple_of((rows % P).to(tl.int64) * stride_p, ALIGN)
    token = tl.multiple_of(tokens * stride_n, ALIGN)
    head = tl.multiple_of(heads * stride_h, ALIGN)
    return (row + place)[:, None, None, None] + token[None, :, None, None] + head[None, None, :, None]


@triton.jit
def _batches(x, G: tl.constexpr, N: tl.constexpr, HB: tl.constexpr, C: tl.constexpr):
    """[G, N, HB, C] -> [G HB, N, C]."""
    return tl.reshape(tl.permute(x, 0, 2, 1, 3), G * HB, N, C)


@triton.jit
def _unbatch(x, G: tl.constexpr, N: tl.constexpr, HB: tl.constexpr, C: tl.constexpr):
    """[G HB, N, C] -> [G, N, HB, C]."""
    return tl.permute(tl.reshape(x, G, HB, N, C), 0, 2, 1, 3)


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b over the batch; a single one as a plain product, which all warps share instead of doing it each."""
    if a.shape[0] == 1:
        a2 = tl.reshape(a, a.shape[1], a.shape[2])
        b2 = tl.reshape(b, b.shape[1], b.shape[2])
        acc2 = tl.reshape(acc, a.shape[1], b.shape[2])
        product = tl.reshape(tl.dot(a2, b2, acc2, input_precision=PRECISION), 1, a.shape[1], b.shape[2])
    else:
        product = tl.dot(a, b, acc, input_precision=PRECISION)
    return product


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit(do_not_specialize=[
    "R", "P", "q_len", "kv_len",
    *(f"{x}_s{axis}" for x in "qkvo" for axis in "bpnh"),
])  # fmt: skip
def _forward(
    q, k, v, out,
    lse, kv_lens, flag,  # or None
    qk_scale,  # scale * log2(e)
    R, P, q_len, kv_len,
    q_sb, q_sp, q_sn, q_sh,
    k_sb, k_sp, k_sn, k_sh,
    v_sb, v_sp, v_sn, v_sh,
    o_sb, o_sp, o_sn, o_sh,
    H: tl.constexpr,
    KV_GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    G: tl.constexpr, HB: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HEAD_TILES: tl.constexpr = (H + HB - 1) // HB
    pid = tl.program_id(0)
    rows = (pid // HEAD_TILES) * G + tl.arange(0, G)  # heads first: neighbours in memory run at the same time
    heads = (pid % HEAD_TILES) * HB + tl.arange(0, HB)
    queries, keys = tl.arange(0, QP), tl.arange(0, KP)
    here = (rows < R)[:, None, None, None] & (heads < H)[None, None, :, None]
    q_here = here & (queries < q_len)[None, :, None, None]
    k_here = here & (keys < kv_len)[None, :, None, None]

    q_rows = _row_offsets(rows, P, queries, heads, q_sb, q_sp, q_sn, q_sh, ALIGN)
    k_rows = _row_offsets(rows, P, keys, heads // KV_GROUP, k_sb, k_sp, k_sn, k_sh, ALIGN)
    v_rows = _row_offsets(rows, P, keys, heads // KV_GROUP, v_sb, v_sp, v_sn, v_sh, ALIGN)
    q0, q1 = load_head(q, q_rows, q_here, D, D0, D1)
    k0, k1 = load_head(k, k_rows, k_here, D, D0, D1)
    v0, v1 = load_head(v, v_rows, k_here, D, D0, D1)

    s = tl.zeros([G * HB, QP, KP], tl.float32)
    k0 = tl.permute(_batches(k0, G, KP, HB, D0), 0, 2, 1)
    s = _product(_batches(q0, G, QP, HB, D0), k0, s, PRECISION)
    if D1:
        k1 = tl.permute(_batches(k1, G, KP, HB, D1), 0, 2, 1)
        s = _product(_batches(q1, G, QP, HB, D1), k1, s, PRECISION)

    if kv_lens is not None:  # [G HB, 1, 1]
        lengths = tl.load(kv_lens + rows // P, rows < R, 0)
        lengths = tl.reshape(tl.broadcast_to(lengths[:, None], G, HB), G * HB)[:, None, None]
        s = tl.where(keys[None, None, :] < tl.minimum(lengths, kv_len), s, float("-inf"))
        m = tl.max(s, 2)
        m = tl.where(m == float("-inf"), 0.0, m)  # a row without a key
    else:
        s = tl.where((keys < kv_len)[None, None, :], s, float("-inf"))
        m = tl.max(s, 2)
    p = tl.exp2((s - m[:, :, None]) * qk_scale)
    total = tl.sum(p, 2)
    p = p.to(q.dtype.element_ty)
    inverse = (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]

    o_rows = _row_offsets(rows, P, queries, heads, o_sb, o_sp, o_sn, o_sh, ALIGN)
    o0 = tl.zeros([G * HB, QP, D0], tl.float32)
    o0 = _product(p, _batches(v0, G, KP, HB, D0), o0, PRECISION) * inverse
    o0 = _unbatch(o0.to(q.dtype.element_ty), G, QP, HB, D0)
    bad = count_not_finite(o0)
    o1 = o0
    if D1:
        o1 = tl.zeros([G * HB, QP, D1], tl.float32)
        o1 = _product(p, _batches(v1, G, KP, HB, D1), o1, PRECISION) * inverse
        o1 = _unbatch(o1.to(q.dtype.element_ty), G, QP, HB, D1)
        bad += count_not_finite(o1)
    store_head(out, o_rows, q_here, o0, o1, D, D0, D1)
    if flag is not None:
        tl.store(flag, 1, mask=bad > 0)  # a plain store: the flag may lie in host memory

    if lse is not None:  # [R, H, Nq]
        value = tl.where(total == 0.0, float("-inf"), (m * qk_scale + tl.log2(total)) * 0.6931471805599453)
        value = tl.reshape(value, G, HB, QP)
        places = (rows.to(tl.int64) * H)[:, None, None] + heads[None, :, None]
        keep = (rows < R)[:, None, None] & (heads < H)[None, :, None] & (queries < q_len)[None, None, :]
        tl.store(lse + places * q_len + queries[None, None, :], value, keep)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kv_len: Tensor | None,
    flag: Tensor | None,
    scale: float | None,
    **tuned: int,
) -> None:
    """Write attention of q, k, v [B, P, N, H, D] into `out` and `lse`; `tuned` replaces entries of `config`."""
    b, p, nq, h, d = q.shape
    nk, h_kv = k.shape[2:4]
    settings = config(nq, nk, h, d) | tuned
    d0, d1 = parts(d)
    programs = -(-b * p // settings["G"]) * -(-h // settings["HB"])
    with on_device_of(q):
        _forward[(programs,)](
            q, k, v, out, lse, kv_len, flag,
            scale_log2(scale, d),
            b * p, p, nq, nk,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4],
            H=h, KV_GROUP=h // h_kv, D=d, D0=d0, D1=d1,
            ALIGN=alignment(q, k, v, out),
            PRECISION=precision(q.dtype),
            **settings,
        )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of short rows, exact.

    Args:
        q: [B, Nq, H, D], or [B, P, Nq, H, D] for rows addressed by two strides; any strides but 1 along D.
        k, v: the same with Nk and Hkv; Hkv divides H.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: rows of b attend to their first kv_len[b] keys.
        return_lse: whether to return the log-sum-exp too.
        flag: int32, set to 1 where the output is not finite.

    Returns:
        out in q's shape, [B, Nq, H, D] contiguous or [B, P, Nq, H, D] in q's order in memory; and lse [B, (P,) H, Nq] fp32
        (natural logarithm) or None. A row without a key gives 0 and -inf.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    b, nq, h = q.shape[0], *q.shape[-3:-1]
    shape = (b, h, nq) if q.ndim == 4 else (b, q.shape[1], h, nq)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device) if return_lse else None
    if q.ndim == 4:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        launch(*(x.unsqueeze(1) for x in (q, k, v, out)), lse, kv_len, flag, scale)
    else:
        out = torch.empty_like(q)
        launch(q, k, v, out, lse, kv_len, flag, scale)
    return out, lse


def _refuses(call: Call) -> str | None:
    if call.mask != "none" or call.causal:
        return "takes no mask"
    tokens = max(call.q_len, call.kv_len)
    if tokens > MAX_TOKENS:
        return f"takes rows of up to {MAX_TOKENS} tokens, got {tokens}"
    if tokens > 64 and call.head_dim * call.dtype.itemsize > 256:
        return f"takes head_dim up to {256 // call.dtype.itemsize} on rows over 64 tokens, got {call.head_dim}"
    return None


BACKENDS = (TritonBackend("triton_temporal", attend, _refuses),)
