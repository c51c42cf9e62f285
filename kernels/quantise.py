"""Operands of quantised attention from raw projections: norm, rotary embedding, smoothing, quantisation and layout.

    q8 = round(q c / qs),   k8 = round((k - kbar) / ks),   v8 = v / vs,   c = scale log2(e)

(SageAttention and SageAttention2: Zhang et al., arXiv:2410.02367, arXiv:2411.10958.) Softmax does not see kbar: it moves
all scores of a row alike. A scale is the greatest absolute value over 127 (int8) or 448 (e4m3): of a token and head for q,
of 32 tokens of a block and a head for k, of a channel for v.

Two launches: what the scales need (all of v is read; kbar is the mean of evenly strided tokens, for any vector will do
that is near the mean and the same for all keys), then everything else. q, k and v are read once more than that and the
operands written once; nothing else goes to memory. Sums and maxima have one order: the same inputs give the same bits.

Letters: B batch, Nq/Nk queries and keys, H/Hkv heads, D head_dim, W: D up to a multiple of 16, P: Nk up to one of KEYS.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from videoattn.kernels.operands import KEYS, PV, Quantised
from videoattn.kernels.projections import Raw, finished, read, refuses
from videoattn.kernels.prologue_device import Form
from videoattn.kernels.quantise_device import _operands, _statistics
from videoattn.kernels.triton_backend import Launch, on_device_of, scale_log2, unit_stride
from videoattn.prologue import Prologue, Stream, split_heads

__all__ = ["quantise", "quantise_streams", "refuses"]


@functools.cache
def config(heads: int, head_dim: int, across: bool, blocks: int) -> dict[str, int]:
    """Tiles, and how many parts the heads are cut into. blocks: of KEYS tokens, in all rows of the batch.

    Tiles of 4096 elements on 4 warps: every thread has four loads of 16 bytes under way. Four heads of a token of q lie
    side by side: more of a row of memory at once. Rows across heads are read twice, so few tokens a program: what all
    programs hold must stay in L2.
    """
    return {
        "ELEMENTS": 4096 if head_dim <= 128 else 8192,
        "HB": 4,
        "SPLIT": max(1, min(heads, 256 // blocks)),
        "num_warps": 4 if head_dim <= 128 else 8,
    }


def _chunks(programs: int) -> int:
    """Parts of v, each with maxima of its own: enough programs to read it at full speed."""
    return max(4, min(32, triton.next_power_of_2(-(-384 // programs))))


@functools.lru_cache(maxsize=1024)
def _plan(
    heads: int, kv_heads: int, batch: int, form: Form, eps: float, pv: PV,
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], rope: tuple[int, ...], device: torch.device,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """Chunks of v and both launches, looked up instead of worked out. What is compiled is loaded on one device."""
    blocks = max(1, -(-max(q[0], k[0]) // KEYS))
    settings = dict(config(heads, form.D, form.ACROSS, batch * blocks))
    split = settings.pop("SPLIT")
    q_split, k_split = split, min(split, kv_heads)
    has_v = pv != "16bit"
    chunks = _chunks(batch * kv_heads) if has_v else 1
    statistics = Launch(
        batch * kv_heads * (chunks + 1 if has_v else 1),
        (kv_heads, *k, *v, *rope),
        {"CHUNKS": chunks, "ELEMENTS": 8192, "FORM": form, "num_warps": 8},
    )
    rows = settings["ELEMENTS"] // form.DP
    q_programs = KEYS // min(rows // settings["HB"], KEYS) * q_split
    k_programs = 4 // max(1, min(4, rows // (KEYS // 4))) * k_split
    programs = q_programs + k_programs + (kv_heads if has_v else 0)
    levels = 448.0 if pv == "fp8" else 127.0
    operands = Launch(
        batch * blocks * programs,
        (heads, kv_heads, blocks, q_split, k_split, *q, *k, *v, *rope),
        {"EPS": eps, "CHUNKS": chunks, **settings, "V_WIDTH": 8 * settings["num_warps"], "LEVELS": levels, "FORM": form},
    )
    return chunks, statistics, operands


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
    """Operands from finished q [B, Nq, H, D], k, v [B, Nk, Hkv, D], fp16 or bf16, with any strides; D as `refuses` says.

    Args:
        pv: how P V will be multiplied.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: the tokens of row b at or beyond kv_len[b] count for nothing, in k and v.
        return_lse: whether to make lse_shift.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return _launch(finished(q, k, v), q.shape[2], k.shape[2], v, pv, scale, kv_len, return_lse)


def quantise_streams(
    prologue: Prologue,
    heads: int,
    *streams: Stream,
    pv: PV,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
) -> Quantised:
    """Operands from raw projections, where `refuses` has nothing against them; empties the streams. See `quantise`."""
    raw = read(prologue, heads, *streams)
    v0, v1 = raw.v.tensors[:2]
    v = None
    if pv == "16bit":
        v = split_heads(v0 if v1 is None else torch.cat((v0, v1), dim=1), heads)
    return _launch(raw, heads, heads, v, pv, scale, kv_len, return_lse)


def _launch(
    raw: Raw,
    heads: int,
    kv_heads: int,
    v: Tensor | None,
    pv: PV,
    scale: float | None,
    kv_len: Tensor | None,
    return_lse: bool,
) -> Quantised:
    x = raw.q.tensors[0]
    device, batch, d = x.device, x.shape[0], raw.form.D
    nq, nk = raw.q.numbers[0], raw.k.numbers[0]
    width = -(-d // 16) * 16
    chunks, statistics, operands = _plan(
        heads, kv_heads, batch, raw.form, raw.eps, pv, raw.q.numbers, raw.k.numbers, raw.v.numbers, raw.rope, device
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    blocks = -(-nk // KEYS)
    q8, q_scale = empty(batch, heads, nq, width, dtype=torch.int8), empty(batch, heads, nq)
    k8, k_scale = empty(batch, kv_heads, nk, width, dtype=torch.int8), empty(batch, kv_heads, blocks, 4)
    k_mean = empty(batch, kv_heads, d)
    lse_shift = empty(batch, heads, nq) if return_lse else None
    v8, v_scale, v_max = v, None, None
    if pv != "16bit":
        v8 = empty(batch, kv_heads, width, blocks * KEYS, dtype=torch.float8_e4m3fn if pv == "fp8" else torch.int8)
        v_scale = empty(batch, kv_heads, d)
        v_max = empty(batch, kv_heads, d, chunks, dtype=torch.int16)
    out = None if v_max is None else v8
    with on_device_of(x):
        statistics(_statistics, (*raw.k.tensors, *raw.v.tensors, *raw.tables, kv_len, k_mean, v_max), raw.eps)
        tensors = (*raw.q.tensors, *raw.k.tensors, *raw.v.tensors, *raw.tables, kv_len, k_mean, v_max)
        operands(_operands, (*tensors, q8, q_scale, k8, k_scale, out, v_scale, lse_shift), scale_log2(scale, d))
    return Quantised(q8, q_scale, k8, k_scale, v8, v_scale, lse_shift)
