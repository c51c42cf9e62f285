"""Operands of quantised attention from raw projections: norm, rotary embedding, smoothing, quantisation and layout.

    q8 = round(q c / qs),   k8 = round((k - kbar) / ks),   v8 = v / vs,   c = scale log2(e)

(SageAttention and SageAttention2: Zhang et al., arXiv:2410.02367, arXiv:2411.10958.) Softmax does not see kbar: it moves
all scores of a row alike. A scale is the greatest absolute value over 127 (int8) or 448 (e4m3): of a token and head for q,
of 32 tokens of a block and a head for k, of a channel for v.

Two launches: what the scales need, then everything else. All of v is read for its maxima. kbar is the mean of 64 evenly
strided tokens, for any vector will do that is near the mean and the same for all keys: what it leaves of the mean is an
eighth of the keys' spread, which widens the range of k so little that the error of q k^T stays within 2 % of the exact
mean's (32 tokens: 3 %). q and k are not rounded to 16 bits between norm, rotation and quantisation, as the host's are.
q, k and v are read once more than that and the operands written once; nothing else goes to memory. Sums and maxima have
one order: the same inputs give the same bits.

Letters: B batch, Nq/Nk queries and keys, H/Hkv heads, D head_dim, W: D up to a multiple of 16, P: Nk up to one of KEYS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from videoattn.kernels.operands import KEYS, PV, Quantised
from videoattn.kernels.projections import Layout, Raw, finished, read
from videoattn.kernels.prologue_device import Form
from videoattn.kernels.quantise_device import _operands, _statistics
from videoattn.kernels.triton_backend import Launch, capability_of, on_device_of, scale_log2, unit_stride
from videoattn.prologue import Prologue, Stream, split_heads

STATISTICS = {"ELEMENTS": 8192, "num_warps": 8}
"""Tiles of v and warps of the first launch."""


@functools.cache
def config(heads: int, form: Form, blocks: int, capability: int) -> dict[str, int]:
    """Tiles, and how many parts the heads are cut into. blocks: of KEYS tokens, in all rows of the batch; capability: 90
    for Hopper.

    Tiles of 4096 elements on 4 warps: every thread has four loads of 16 bytes under way. Four heads of a token of q lie
    side by side: more of a row of memory at once. Rows across heads are read twice, so few tokens a program: what all
    programs hold must stay in L2. With 128 registers a thread four programs fit on a multiprocessor. Where nothing is
    normalised or turned fewer do, and more programs fit: five, on Hopper eight of half the tile for heads up to 64,
    which elsewhere would spill, as any limit does on B200.
    """
    warps = 8 if form.D > 128 else 4
    bare = form.NORM == "none" and not form.ROTATE
    small = bare and form.DP <= 64 and capability == 90
    limit = {} if capability == 100 else {"maxnreg": 64 if small else 96 if bare else 128}
    return {
        "ELEMENTS": (512 if small else 1024) * warps,
        "HB": 4,
        "SPLIT": max(1, min(heads, 256 // blocks)),
        "num_warps": warps,
        **limit,
    }


def _chunks(programs: int, tokens: int, padded: int) -> int:
    """Parts of v, each with maxima of its own: enough programs to read it at full speed, and no more than tiles."""
    tiles = -(-tokens * padded // STATISTICS["ELEMENTS"])
    return max(4, min(32, triton.next_power_of_2(-(-384 // programs)), triton.next_power_of_2(max(1, tiles))))


class Plan(NamedTuple):
    """Both launches of a kind of call, and what they write, as torch.empty_strided makes it, which takes less time than empty."""

    statistics: Launch
    operands: Launch
    q: Callable[[], Tensor]
    q_scale: Callable[[], Tensor]
    k: Callable[[], Tensor]
    k_scale: Callable[[], Tensor]
    k_mean: Callable[[], Tensor]
    v: Callable[[], Tensor] | None
    v_scale: Callable[[], Tensor] | None
    v_max: Callable[[], Tensor] | None


@functools.lru_cache(maxsize=1024)
def _plan(layout: Layout, heads: int, kv_heads: int, batch: int, pv: PV, device: torch.device) -> Plan:
    """Looked up instead of worked out. A plan is of one device: what is compiled is loaded there."""
    form, nq, nk = layout.form, layout.q[0], layout.k[0]
    blocks, k_blocks, width = max(1, -(-max(nq, nk) // KEYS)), -(-nk // KEYS), -(-form.D // 16) * 16
    settings = dict(config(heads, form, batch * blocks, capability_of(device)))
    split = settings.pop("SPLIT")
    q_split, k_split = split, min(split, kv_heads)
    has_v = pv != "16bit"
    chunks = _chunks(batch * kv_heads, nk, form.DP) if has_v else 1
    # Smaller tiles of the mean, lest they take the registers that let three programs that read v onto a multiprocessor at a
    # time; less so where a norm reads whole tokens.
    mean_elements = 4096 if form.ACROSS else 2048
    statistics = Launch(
        batch * kv_heads * (chunks + 1 if has_v else 1),
        (kv_heads, *layout.k, *layout.v, *layout.rope),
        {"CHUNKS": chunks, **STATISTICS, "MEAN_ELEMENTS": mean_elements, "FORM": form},
    )
    rows = settings["ELEMENTS"] // form.DP
    q_programs = KEYS // min(rows // settings["HB"], KEYS) * q_split
    k_programs = 4 // max(1, min(4, rows // (KEYS // 4))) * k_split
    programs = q_programs + k_programs + (kv_heads if has_v else 0)
    constants = {"EPS": layout.eps, "CHUNKS": chunks, **settings, "V_WIDTH": 8 * settings["num_warps"]}
    operands = Launch(
        batch * blocks * programs,
        (heads, kv_heads, blocks, q_split, k_split, *layout.q, *layout.k, *layout.v, *layout.rope),
        {**constants, "LEVELS": 448.0 if pv == "fp8" else 127.0, "FORM": form},
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        strides = torch.empty(shape, device="meta").stride()
        return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)

    v_dtype = torch.float8_e4m3fn if pv == "fp8" else torch.int8
    return Plan(
        statistics,
        operands,
        q=empty(batch, heads, nq, width, dtype=torch.int8),
        q_scale=empty(batch, heads, nq),
        k=empty(batch, kv_heads, nk, width, dtype=torch.int8),
        k_scale=empty(batch, kv_heads, k_blocks, 4),
        k_mean=empty(batch, kv_heads, form.D),
        v=empty(batch, kv_heads, width, k_blocks * KEYS, dtype=v_dtype) if has_v else None,
        v_scale=empty(batch, kv_heads, form.D) if has_v else None,
        v_max=empty(batch, kv_heads, form.D, chunks, dtype=torch.int16) if has_v else None,
    )


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
    """Operands from finished q [B, Nq, H, D], k, v [B, Nk, Hkv, D], fp16 or bf16, with any strides; D 16 to 256 in steps of 8.

    Args:
        pv: how P V will be multiplied.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: the tokens of row b at or beyond kv_len[b] count for nothing, in k and v.
        return_lse: whether to make lse_shift.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return _launch(
        finished(q, k, v), q.shape[2], k.shape[2], v if pv == "16bit" else None, pv, scale, kv_len, return_lse
    )


def quantise_streams(
    prologue: Prologue,
    heads: int,
    *streams: Stream,
    pv: PV,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
) -> Quantised:
    """Operands from raw projections, where kernels/projections.py has nothing against them; empties the streams. See `quantise`."""
    raw = read(prologue, heads, *streams)
    v0, v1 = raw.v
    v = None
    if pv == "16bit":
        v = split_heads(v0 if v1 is None else torch.cat((v0, v1), dim=1), heads)
    return _launch(raw, heads, heads, v, pv, scale, kv_len, return_lse)


def _launch(
    raw: Raw,
    heads: int,
    kv_heads: int,
    v: Tensor | None,  # as it came, where it stays so
    pv: PV,
    scale: float | None,
    kv_len: Tensor | None,
    return_lse: bool,
) -> Quantised:
    x, layout = raw.q[0], raw.layout
    plan = _plan(layout, heads, kv_heads, x.shape[0], pv, x.device)
    q8, q_scale, k8, k_scale, k_mean = plan.q(), plan.q_scale(), plan.k(), plan.k_scale(), plan.k_mean()
    lse_shift = plan.q_scale() if return_lse else None
    out = v_scale = v_max = None
    if v is None:
        v = out = plan.v()
        v_scale, v_max = plan.v_scale(), plan.v_max()
    qk_scale = scale_log2(scale, layout.form.D)
    with on_device_of(x):
        plan.statistics(_statistics, (*raw.k, *raw.v, *raw.tables, kv_len, k_mean, v_max), layout.eps)
        tensors = (*raw.q, *raw.k, *raw.v, *raw.tables, kv_len, k_mean, v_max)
        plan.operands(_operands, (*tensors, q8, q_scale, k8, k_scale, out, v_scale, lse_shift), qk_scale)
    return Quantised(q8, q_scale, k8, k_scale, v, v_scale, lse_shift)
