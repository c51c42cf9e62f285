"""The operands of quantised attention by torch, as kernels/operands.py describes them, and how near a kernel's must come."""

import math

import torch

from videoattn.kernels.operands import KEYS, ORDER, Quantised

SAMPLES = 64
TINY = 1e-20


def sampled(length):
    """The tokens whose mean is taken from k."""
    return range(0, length, max(1, -(-length // SAMPLES)) | 1)


def scaled(x, dims, levels):
    """x over its scale, and the scale; a product with the inverse, for whose ties a quotient would not do."""
    top = x.abs().amax(dims, keepdim=True).clamp_min(TINY)
    return x * (levels / top), (top / levels).squeeze(dims)


def operands(q, k, v, *, pv, scale=None, kv_len=None, return_lse=False):
    """From finished q [B, Nq, H, D], k, v [B, Nk, Hkv, D]. Finite valid inputs only."""
    (b, _, h, d), (_, nk, hkv, _) = q.shape, k.shape
    c = (d**-0.5 if scale is None else scale) * math.log2(math.e)
    lengths = [nk] * b if kv_len is None else [min(max(int(n), 0), nk) for n in kv_len]
    width, blocks = -(-d // 16) * 16, -(-nk // KEYS)
    raw_v = v
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    for row, n in enumerate(lengths):
        if n < nk:
            k, v = k.clone(), v.clone()
            k[row, :, n:], v[row, :, n:] = 0.0, 0.0
    mean = torch.stack(
        [k[row][:, list(sampled(n))].mean(1) if n else k.new_zeros(hkv, d) for row, n in enumerate(lengths)]
    )
    q8, q_scale = scaled(q, -1, 127)
    k = k - mean[:, :, None]
    for row, n in enumerate(lengths):
        k[row, :, n:] = 0.0
    k = pad(k, blocks * KEYS, 2)
    grouped = k.unflatten(2, (blocks, KEYS // 8, 4, 2))
    k8, k_scale = scaled(grouped, (3, 5, 6), 127)
    k8 = k8.flatten(2, 5)[:, :, :nk]
    lse_shift = None
    if return_lse:
        keys = mean.repeat_interleave(h // hkv, 1)
        lse_shift = (q.double() @ keys.double()[..., None])[..., 0] * (c / math.log2(math.e))
    q8, k8 = (pad(x.round(), width, 3).to(torch.int8) for x in (q8, k8))
    if pv == "16bit":
        return Quantised(q8, q_scale * c, k8, k_scale, raw_v, None, lse_shift)
    levels, dtype = (448, torch.float8_e4m3fn) if pv == "fp8" else (127, torch.int8)
    v8, v_scale = scaled(v, 2, levels)
    v8 = pad(pad(v8.round() if pv == "int8" else v8.clamp(-448, 448), width, 3), blocks * KEYS, 2)
    v8 = v8.unflatten(2, (-1, 16))[:, :, :, list(ORDER)].flatten(2, 3).transpose(2, 3)
    return Quantised(q8, q_scale * c, k8, k_scale, v8.to(dtype), v_scale, lse_shift)


def pad(x, size, dim):
    """x with zeros behind it along dim."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


def assert_close(got, wanted, *, ties=1e-3):
    """Scales equal up to fp32 rounding, integers but for ties: those are few, and off by one step.

    A scale is one division, and for q two products, away from its maximum: 4 units in the last place. For k the order of
    the mean's sum counts too: up to 64 additions, whose error is that of k's elements, not of the difference.
    """
    for name, exact in (("q_scale", 4), ("k_scale", 64), ("v_scale", 4)):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, torch.float32), name
            torch.testing.assert_close(a, b, rtol=exact * torch.finfo(torch.float32).eps, atol=1e-30, msg=name)
    for name in ("q", "k", "v"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if a.dtype == torch.float8_e4m3fn:  # as integers, neighbours differ by 1; 0 has two signs
            a, b = ((x.float() + 0.0).to(x.dtype).view(torch.int8) for x in (a, b))
        if a.dtype == torch.int8:
            assert a.is_contiguous(), name
            apart = (a.int() - b.int()).abs()
            assert apart.max() <= 1, f"{name}: off by {apart.max()}"
            assert (apart > 0).float().mean() <= ties, f"{name}: {(apart > 0).float().mean():.2e} differ"
    if wanted.lse_shift is not None:
        bound = 1e-5 * wanted.lse_shift.abs().max() + 1e-6
        assert (got.lse_shift - wanted.lse_shift).abs().max() <= bound
