"""Norm, rotary embedding and joining of streams in one pass: raw projections [B, N, H D] -> q, k [B, N, H, D].

What a Prologue does operation by operation (videoattn/prologue.py) and with its roundings (compiled without fused products
and sums, which round once where the host rounds twice), but q and k are read from memory once and written once: the
host's operations read and write them some ten times, in part in fp32. A program takes some tokens of q or of k; where the
norm is across heads, it first sums their squares over all heads and then finds the rows in the cache again. Programs of q
and of k take turns, so that the tables come from memory once.

Letters: B batch, N tokens, H heads, D head_dim; T tokens and HB heads of a tile.

Refuses: what kernels/projections.py names.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoattn.kernels.projections import Layout, read, refuses
from videoattn.kernels.prologue_device import Rope, Source, begin, finish, load_rows
from videoattn.kernels.triton_backend import Launch, on_device_of
from videoattn.prologue import Prologue, Stream, split_heads

__all__ = ["prepare", "refuses"]


@functools.cache
def config(heads: int, head_dim: int, across: bool, tokens: int) -> dict[str, int]:
    """Tile, parts that the heads are cut into, and warps. tokens: of all rows of the batch.

    Tiles of 2048 elements on 4 warps: every thread has two loads of 16 bytes under way, and two more for the next tile.
    Heads of a token lie side by side: more of a row of memory at once. Two of them where a row is read twice anyway, since
    its norm is across heads; few tokens a program there: what all programs hold must stay in L2.
    """
    rows = 2048 // triton.next_power_of_2(head_dim)
    heads_of_tile = 2 if across else 4
    t = rows // heads_of_tile
    splits = 1 if across else max(1, min(heads // 4, 1024 * t // tokens))
    return {"T": t, "HB": heads_of_tile, "SPLITS": splits, "num_warps": 4}


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. FORM says what vector loads need.
@triton.jit(do_not_specialize=[
    "heads", "splits", "tiles", "rope_first", "rope_last", *(f"rope_s{axis}" for axis in "bnhp"),
    *(f"{x}_{name}" for x in "qk" for name in ("tokens", "border", "sb0", "sn0", "sb1", "sn1", "sh")),
])  # fmt: skip
def _prepare(
    q0, q1, q_w0, q_w1, q_b0, q_b1,  # two streams: projections, norm weights, norm biases; or None
    k0, k1, k_w0, k_w1, k_b0, k_b1,
    cos, sin,  # or None
    q_out, k_out,
    eps,
    heads, splits, tiles,  # tiles: of the tokens of one row of the batch
    q_tokens, q_border, q_sb0, q_sn0, q_sb1, q_sn1, q_sh,
    k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh,
    rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp,
    T: tl.constexpr, HB: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    q = Source(q0, q1, q_w0, q_w1, q_b0, q_b1, q_tokens, q_border, q_sb0, q_sn0, q_sb1, q_sn1, q_sh)
    k = Source(k0, k1, k_w0, k_w1, k_b0, k_b1, k_tokens, k_border, k_sb0, k_sn0, k_sb1, k_sn1, k_sh)
    rope = Rope(cos, sin, rope_first, rope_last, rope_sb, rope_sn, rope_sh, rope_sp)
    pid = tl.program_id(0)
    is_k, pid = pid % 2, pid // 2
    split, pid = pid % splits, pid // splits
    b, start = pid // tiles, pid % tiles * T
    share = (heads + splits - 1) // splits
    low, high = split * share, tl.minimum(heads, split * share + share)
    if is_k:
        _rows(k, rope, k_out, b, start, low, high, heads, eps, T, HB, FORM)
    else:
        _rows(q, rope, q_out, b, start, low, high, heads, eps, T, HB, FORM)


@triton.jit
def _rows(
    x, rope, out, b, start, low, high, heads, eps,
    T: tl.constexpr, HB: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Heads low to high of T tokens."""
    d = tl.arange(0, FORM.DP)
    heads_of = tl.arange(0, T * HB) % HB if HB > 1 else tl.zeros([1], tl.int32)
    tokens, here, rows, inverse, c, s = begin(x, rope, b, start, eps, T, HB, FORM)
    places = (b.to(tl.int64) * x.tokens + start) * heads * FORM.D + tokens * heads * FORM.D
    tile = load_rows(x, rows, low + heads_of, here & (low + heads_of < high), FORM)
    for h in range(low, high, HB):
        heads_now = h + heads_of
        following = load_rows(x, rows, heads_now + HB, here & (heads_now + HB < high), FORM)
        there = tl.minimum(heads_now, high - 1)  # of weights and tables no more is read than there is
        y = finish(tile, inverse, c, s, x, rope, b, start, tokens, there, eps, True, FORM)
        keep = (here & (heads_now < high))[:, None] & (d < FORM.D)[None, :]
        tl.store(out + (places[:, None] + (heads_now[:, None] * FORM.D + d[None, :])), y, keep)
        tile = following


@functools.lru_cache(maxsize=1024)
def _plan(layout: Layout, heads: int, batch: int, device: torch.device) -> Launch:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    form = layout.form
    longest = max(layout.q[0], layout.k[0])
    settings = dict(config(heads, form.D, form.ACROSS, 2 * batch * longest))
    splits = settings.pop("SPLITS")
    tiles = -(-longest // settings["T"])
    numbers = (heads, splits, tiles, *layout.q, *layout.k, *layout.rope)
    return Launch(2 * batch * tiles * splits, numbers, {**settings, "FORM": form, "enable_fp_fusion": False})


def prepare(prologue: Prologue, heads: int, *streams: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """`prologue(heads, *streams)` where `refuses` has nothing against it; empties the streams, as it does."""
    raw = read(prologue, heads, *streams)
    layout, form = raw.layout, raw.layout.form
    q, (v0, v1) = raw.q[0], raw.v
    v = split_heads(v0 if v1 is None else torch.cat((v0, v1), dim=1), heads)
    if form.NORM == "none" and not form.ROTATE and v1 is None:
        return split_heads(q, heads), split_heads(raw.k[0], heads), v
    batch, d = q.shape[0], form.D
    q_out = torch.empty((batch, layout.q[0], heads, d), dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, layout.k[0], heads, d), dtype=q.dtype, device=q.device)
    if q_out.numel() + k_out.numel():
        launch = _plan(layout, heads, batch, q.device)
        with on_device_of(q):
            launch(_prepare, (*raw.q, *raw.k, *raw.tables, q_out, k_out), layout.eps)
    return q_out, k_out, v
