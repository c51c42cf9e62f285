"""The operands of quantised attention by torch, as kernels/operands.py describes them, and how near a kernel's must come."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from videoattn.kernels.operands import KEYS, ORDER

SAMPLES = 64
TINY = 1e-20
EPS = torch.finfo(torch.float32).eps
UNITS = 64
"""What fp32 may be off by in q and k, in units of a head's greatest element: norms add up to 1536 squares (48 at a time in
a thread, then in a tree), products and sums of norm and rotation add one each, and so do 64 tokens' additions to a mean."""


class Wanted(NamedTuple):
    """Operands before they are rounded (fp64), and by how much each of a kernel's may be off before it is rounded."""

    q: torch.Tensor
    q_off: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_off: torch.Tensor
    k_scale: torch.Tensor
    k_scale_off: torch.Tensor
    v: torch.Tensor
    v_dtype: torch.dtype | None
    v_scale: torch.Tensor | None
    lse_shift: torch.Tensor | None
    lse_off: torch.Tensor


def sampled(length):
    """The tokens whose mean is taken from k."""
    return range(0, length, max(1, -(-length // SAMPLES)) | 1)


def means(k, lengths):
    """[B, Hkv, D] of k [B, Hkv, Nk, D]."""
    return torch.stack([k[row][:, list(sampled(n))].sum(1) / max(1, len(sampled(n))) for row, n in enumerate(lengths)])


def scaled(x, dims, levels):
    """x over its scale, and the scale."""
    top = x.abs().amax(dims, keepdim=True)
    top = torch.where(top > TINY, top, TINY)
    return x * (levels / top), (top / levels).squeeze(dims)


def exactly(prologue, heads, streams):
    """q, k, v [B, N, H, D] of streams in fp64, with nothing rounded to 16 bits."""

    def wide(norm):
        return None if norm is None else copy.deepcopy(norm).double()

    return prologue(
        heads,
        *(
            replace(
                stream,
                **{name: getattr(stream, name).double() for name in "qkv"},
                norm_q=wide(stream.norm_q),
                norm_k=wide(stream.norm_k),
                rope=None if stream.rope is None else tuple(table.double() for table in stream.rope),
            )
            for stream in streams
        ),
    )


def operands(q, k, v, *, pv, scale=None, kv_len=None, return_lse=False):
    """From finished q [B, Nq, H, D], k, v [B, Nk, Hkv, D]. Finite valid inputs only."""
    (b, _, h, d), (_, nk, hkv, _) = q.shape, k.shape
    scale = d**-0.5 if scale is None else scale
    lengths = [nk] * b if kv_len is None else [min(max(int(n), 0), nk) for n in kv_len]
    width, blocks = -(-d // 16) * 16, -(-nk // KEYS)
    raw_v = v
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    valid = torch.arange(nk, device=k.device) < torch.tensor(lengths, device=k.device)[:, None]
    k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
    mean = means(k, lengths)
    q_error = UNITS * EPS * q.abs().amax(-1)
    k_error = UNITS * EPS * k.abs().amax((2, 3))[:, :, None, None]
    q8, q_scale = scaled(q, -1, 127)
    k = pad((k - mean[:, :, None]).masked_fill(~valid[:, None, :, None], 0.0), blocks * KEYS, 2)
    k8, k_scale = scaled(k.unflatten(2, (blocks, KEYS // 8, 4, 2)), (3, 5, 6), 127)
    by_token = k_scale[:, :, :, None, :, None].expand(-1, -1, -1, KEYS // 8, 4, 2).flatten(2)[:, :, :nk]
    k8 = k8.flatten(2, 5)[:, :, :nk]
    # An element over the greatest: both are off, and the quotient is rounded.
    made = {
        "q": pad(q8, width, 3),
        "q_off": (2 * q_error / q_scale + 127 * 4 * EPS)[..., None],
        "q_scale": q_scale * scale * math.log2(math.e),
        "k": pad(k8, width, 3),
        "k_off": 2 * k_error / by_token[..., None] + 127 * 4 * EPS,
        "k_scale": k_scale,
        "k_scale_off": k_error / 127,
    }
    keys = mean.repeat_interleave(h // hkv, 1)[..., None]
    greatest = keys.abs() + k_error.repeat_interleave(h // hkv, 1) / EPS / UNITS
    made["lse_shift"] = scale * (q @ keys)[..., 0] if return_lse else None
    made["lse_off"] = UNITS * EPS * scale * (q.abs() @ greatest)[..., 0]
    if pv == "16bit":
        return Wanted(**made, v=raw_v, v_dtype=None, v_scale=None)
    levels, dtype = (448, torch.float8_e4m3fn) if pv == "fp8" else (127, torch.int8)
    v8, v_scale = scaled(v, 2, levels)
    v8 = pad(pad(v8, width, 3), blocks * KEYS, 2)
    v8 = v8.unflatten(2, (-1, 16))[:, :, :, list(ORDER)].flatten(2, 3).transpose(2, 3)
    return Wanted(**made, v=v8, v_dtype=dtype, v_scale=v_scale)


def pad(x, size, dim):
    """x with zeros behind it along dim."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


def rounded(x, dtype):
    """To the nearest of dtype, in fp64; int8 or e4m3."""
    if dtype == torch.int8:
        return x.round()
    return x.clamp(-448, 448).float().to(dtype).double()


def assert_between(got, wanted, off, dtype, name):
    """Rounding is monotone: what was off by no more than `off` before it is now between the ends, rounded."""
    assert (got.shape, got.dtype) == (wanted.shape, dtype), name
    assert got.is_contiguous(), name
    got = got.double()
    wrong = (got < rounded(wanted - off, dtype)) | (got > rounded(wanted + off, dtype))
    assert not wrong.any(), (
        f"{name}: {wrong.sum()} of {wrong.numel()}, by up to {(got - wanted).abs()[wrong].max():.3g}"
    )


def assert_close(got, wanted):
    """A kernel's operands are torch's but for fp32's rounding."""
    relative = (UNITS + 4) * EPS
    for name, off in (
        ("q_scale", relative * wanted.q_scale),
        ("k_scale", 4 * EPS * wanted.k_scale + wanted.k_scale_off),
        ("v_scale", None if wanted.v_scale is None else 4 * EPS * wanted.v_scale),
        ("lse_shift", wanted.lse_off + 1e-30),
    ):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, torch.float32), name
            excess = (a - b).abs() - off
            assert (excess <= 1e-30).all(), f"{name}: off by {excess.max():.3g} more than it may be"
    assert_between(got.q, wanted.q, wanted.q_off, torch.int8, "q")
    assert_between(got.k, wanted.k, wanted.k_off, torch.int8, "k")
    if wanted.v_dtype is None:
        assert got.v.shape == wanted.v.shape and torch.equal(got.v, wanted.v)
    else:
        assert_between(got.v, wanted.v, 4 * EPS * wanted.v.abs(), wanted.v_dtype, "v")


HARD = ("zero q", "zero k", "zero v", "zero block", "constant", "huge", "outliers", "offset")


def make_hard(name, q, k, v):
    """Change numbers into one of HARD, in place."""
    if name.startswith("zero"):
        {"q": q, "k": k, "v": v, "block": k[:, :128]}[name[5:]].zero_()
    elif name == "constant":
        q[:], k[:], v[:] = 3.0, 2.0, 1.5
    elif name == "huge":  # beyond what fp16 holds
        v *= 1e6
    elif name == "outliers":
        q[..., 5] *= 30
        k[..., 7] *= 100
        v[..., 9] *= 300
    else:
        k += 50.0
