"""The emulation of quantised attention: what each rounding does, and how far the whole may be from exact attention."""

import math

import pytest
import torch

from videoattn.kernels import quantised_reference as emulated
from videoattn.kernels import reference
from videoattn.kernels.operands import KEYS, ORDER
from videoattn.testing import make_hard_qkv, make_qkv

E4M3 = torch.float8_e4m3fn
INT8 = ("int8_qk_fp8_pv", "int8_qk_16bit_pv", "int8_qk_int8_pv")
# Root mean square of the relative error of one rounding to e4m3, whose steps are 1/8 of the power of two below: over
# mantissas spread evenly in logarithm, sqrt(mean((1/8)^2 / 12 / x^2 for x in [1, 2))) = 1/8 / sqrt(12) sqrt(3 / (8 ln 2)).
E4M3_RMS = 0.125 / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))


def relative(out, exact):
    return float((out - exact).norm() / exact.norm())


def cosine(out, exact):
    return float((out * exact).sum() / (out.norm() * exact.norm()))


@pytest.mark.parametrize(
    ("x", "dtype", "wanted"),
    [
        (0.5, torch.int8, 0.0),
        (1.5, torch.int8, 2.0),
        (-127.6, torch.int8, -127.0),
        (17.0, E4M3, 16.0),  # halves to even: steps of 2 from 16 on
        (19.0, E4M3, 20.0),
        (17.0 + 2.0**-40, E4M3, 18.0),  # past the half by less than fp32 holds
        (19.0 - 2.0**-40, E4M3, 18.0),
        (500.0, E4M3, 448.0),
        (2.0**-10, E4M3, 0.0),
        (2.0**-10 + 2.0**-50, E4M3, 2.0**-9),
        (1.0 + 2.0**-11 + 2.0**-40, torch.float16, 1.0 + 2.0**-10),
        (1.0 + 2.0**-8, torch.bfloat16, 1.0),
        (-1.0 - 2.0**-8 - 2.0**-45, torch.bfloat16, -1.0 - 2.0**-7),
        (0.0, torch.bfloat16, 0.0),
    ],
)
def test_rounded_once_to_the_nearest(x, dtype, wanted):
    assert emulated.round_to(torch.tensor([x], dtype=torch.float64), dtype).item() == wanted


@pytest.mark.parametrize("pv", ["fp8", "16bit", "int8"])
@pytest.mark.parametrize(("head_dim", "keys"), [(40, 70), (64, 300), (72, 128)])
def test_the_operands_are_what_they_stand_for(pv, head_dim, keys):
    q, k, v = make_qkv(2, 9, keys, 4, head_dim, kv_heads=2, dtype=torch.bfloat16, layout="fused")
    kv_len = torch.tensor([keys, keys // 3], dtype=torch.int32)
    x = emulated.quantise(q, k, v, pv=pv, kv_len=kv_len, return_lse=True)
    width, padded, blocks = -(-head_dim // 16) * 16, -(-keys // KEYS) * KEYS, -(-keys // KEYS)
    assert (x.q.shape, x.q.dtype, x.q_scale.shape) == ((2, 4, 9, width), torch.int8, (2, 4, 9))
    assert (x.k.shape, x.k.dtype, x.k_scale.shape) == ((2, 2, keys, width), torch.int8, (2, 2, blocks, 4))
    assert all(part.is_contiguous() for part in (x.q, x.k, x.q_scale, x.k_scale, x.lse_shift))
    assert not x.q[..., head_dim:].any() and not x.k[..., head_dim:].any() and not x.k[1, :, keys // 3 :].any()
    assert x.q.amax() == 127 and x.k.amin() >= -127

    scaled = q.double().transpose(1, 2) * head_dim**-0.5 * math.log2(math.e)
    off = (x.q[..., :head_dim] * x.q_scale.double()[..., None] - scaled).abs() / x.q_scale[..., None]
    assert off.amax() <= 0.5 + 1e-5
    valid = torch.arange(keys) < kv_len[:, None]
    mean = torch.stack([row[:n].double().mean(0) for row, n in zip(k, kv_len, strict=True)])
    for token in range(keys):
        scale = x.k_scale[:, :, token // KEYS, token % 8 // 2, None]
        off = (x.k[:, :, token, :head_dim] * scale.double() - (k[:, token].double() - mean)).abs() / scale
        assert off[valid[:, token]].amax() <= 0.5 + 1e-5
    shift = torch.einsum("bnhd,bhd->bhn", q.double(), mean.repeat_interleave(2, 1)) * head_dim**-0.5
    torch.testing.assert_close(x.lse_shift.double(), shift, rtol=1e-6, atol=1e-6)

    if pv == "16bit":
        assert x.v is v and x.v_scale is None
        return
    assert (x.v.shape, x.v_scale.shape) == ((2, 2, width, padded), (2, 2, head_dim))
    stored = x.v.double()
    assert not stored[:, :, head_dim:].any() and not stored[1, :, :, padded - KEYS :][..., -1:].any()
    step = 2.0**-4 if pv == "fp8" else 0.0  # half a step, of the number in e4m3, of the largest in INT8
    for token in range(keys):
        place = token // 16 * 16 + ORDER.index(token % 16)
        wanted = torch.where(valid[:, token, None, None], v[:, token].double(), 0.0)
        off = (stored[:, :, :head_dim, place] * x.v_scale.double() - wanted).abs()
        assert (off <= step * wanted.abs() + x.v_scale * (2.0**-10 if pv == "fp8" else 0.5) * (1 + 1e-5)).all()


@pytest.mark.parametrize("precision", INT8)
def test_an_error_no_larger_than_the_roundings_explain(precision):
    """Independent roundings add up in squares: of q and k in the scores, of p, of v."""
    q, k, v = make_qkv(1, 256, 1000, 2, 64)
    exact, exact_lse = reference.attend(q, k, v)
    out, lse = emulated.attend(q, k, v, precision=precision)
    x = emulated.quantise(q, k, v, pv=emulated.PRECISIONS[precision])
    # Steps of q and k are spread evenly: step^2 / 12 each, times the other's squared length; log2 to log by ln 2.
    group, _ = emulated.key_groups(1000, q.device)
    k_step, q_step = x.k_scale.flatten(2)[:, :, group].double(), x.q_scale.double()
    squared = (x.q.double() * q_step[..., None]).square().sum(-1)[..., None] * (k_step**2 / 12)[:, :, None]
    squared = squared + (x.k.double() * k_step[..., None]).square().sum(-1)[:, :, None] * (q_step**2 / 12)[..., None]
    scores = float(squared.mean() * math.log(2) ** 2)
    weights = {"fp8": E4M3_RMS**2, "16bit": 0.0, "int8": 0.0}[x_pv := emulated.PRECISIONS[precision]]
    if x_pv == "int8":  # a step of 1/127 of the tile's greatest, against the root mean square of p and v
        p = (q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3) * 64**-0.5).double().exp()
        p = torch.cat([t / t.amax(-1, keepdim=True) for t in p.split(KEYS, -1)], -1)
        weights = float((1 / 127**2 / 12) / p.square().mean() + (x.v_scale.double().square() / 12).mean())
    else:
        weights *= 2
    predicted = math.sqrt(scores + weights)
    assert relative(out, exact) <= 1.15 * predicted
    assert relative(out, exact) >= predicted / 2  # the prediction is no empty one
    assert (lse - exact_lse).abs().amax() <= 6 * math.sqrt(scores)


@pytest.mark.parametrize("precision", [*INT8, "int4_qk_fp8_pv"])
def test_a_row_without_a_key_and_tokens_beyond_the_length(precision):
    q, k, v = make_qkv(3, 5, 150, 2, 40)
    kv_len = torch.tensor([0, 33, 150], dtype=torch.int32)
    out, lse = emulated.attend(q, k, v, precision=precision, kv_len=kv_len)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    beyond = torch.arange(150) >= kv_len[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    again, _ = emulated.attend(q, k, v, precision=precision, kv_len=kv_len)
    assert torch.equal(again, out) and out.isfinite().all()


def test_what_it_does_not_compute():
    q, k, v = make_qkv(1, 4, 4, 1, 16)
    with pytest.raises(ValueError, match="precision: wanted one of int8_qk_fp8_pv, .*, got 'exact'"):
        emulated.attend(q, k, v, precision="exact")
    for given in ({"causal": True}, {"mask": torch.ones(4, 4, dtype=torch.bool)}, {"mask": torch.zeros(1, 1, 4, 4)}):
        with pytest.raises(ValueError, match="int8_qk_fp8_pv: wanted no causal attention, and no mask but bool"):
            emulated.attend(q, k, v, precision="int8_qk_fp8_pv", **given)


@pytest.mark.parametrize("pv", ["fp8", "16bit", "int8"])
def test_a_mask_is_as_if_the_other_keys_were_not_there(pv):
    q, k, v = make_qkv(2, 40, 200, 2, 64)
    x = emulated.quantise(q, k, v, pv=pv, return_lse=True)
    lengths = torch.tensor([70, 130], dtype=torch.int32)
    sizes = {"head_dim": 64, "dtype": torch.bfloat16}
    expected = emulated.attend_quantised(x, **sizes, kv_len=lengths)
    mask = (torch.arange(200) < lengths[:, None])[:, None, None]
    for a, b in zip(emulated.attend_quantised(x, **sizes, mask=mask), expected, strict=True):
        assert torch.equal(a, b)


def test_smoothing_in_the_order_of_the_papers_table():
    """SageAttention 2, table 4, for INT4: none 80 %, K 98.07 %, Q 98.30 %, Q and K 99.46 % (cosine)."""
    q, k, v = make_hard_qkv("biased channels", 1, 512, 2, 64)
    exact, _ = reference.attend(q, k, v)
    settings = {"none": (False, False), "k": (False, True), "q": (True, False), "both": (True, True)}
    got = {}
    for name, (smooth_q, smooth_k) in settings.items():
        out, _ = emulated.attend(q, k, v, precision="int4_qk_fp8_pv", smooth_q=smooth_q, smooth_k=smooth_k)
        got[name] = cosine(out, exact)
    assert got["none"] < 0.9 < got["both"] and got["both"] >= 0.99
    assert got["none"] < min(got["k"], got["q"]) and max(got["k"], got["q"]) < got["both"]
    assert cosine(emulated.attend(q, k, v, precision="int8_qk_fp8_pv")[0], exact) > got["both"]


def test_a_large_offset_of_k_costs_nothing():
    """It is taken off before k is rounded; SageAttention's reason to do it."""
    q, k, v = make_qkv(1, 64, 500, 1, 64)
    exact, exact_lse = reference.attend(q, k + 100.0, v)
    for precision in INT8:
        plain, _ = emulated.attend(q, k, v, precision=precision)
        out, lse = emulated.attend(q, k + 100.0, v, precision=precision)
        assert relative(out, exact) <= 1.01 * relative(plain, reference.attend(q, k, v)[0])
        assert (lse - exact_lse).abs().amax() < 1e-3 * exact_lse.abs().amax()


@pytest.mark.parametrize("kind", ["normal", "outlier channels", "common k offset", "heavy tails"])
def test_no_less_accurate_than_sageattention(kind):
    """A scale a token of q instead of one for two rows: the rest is the same."""
    q, k, v = make_hard_qkv(kind, 1, 1000, 2, 128)
    q = q[:, :256] * torch.logspace(-1, 1, 256)[None, :, None, None]  # rows of very different sizes
    exact, exact_lse = reference.attend(q, k, v)
    sage, sage_lse = emulated.sage2(q, k, v)
    ours, _ = emulated.attend(q, k, v, precision="int8_qk_fp8_pv")
    assert relative(ours, exact) <= 1.02 * relative(sage, exact)
    assert relative(sage, exact) < 0.15 and (sage_lse - exact_lse).abs().amax() < 0.02 * exact_lse.abs().amax()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", INT8)
def test_what_is_not_finite_stays_so(precision, name, value):
    qkv = dict(zip("qkv", make_qkv(2, 9, 140, 2, 40), strict=True))
    qkv[name][1, 3, 1, 5] = value
    out, _ = emulated.attend(**qkv, precision=precision)
    assert not out[1, 3 if name == "q" else slice(None), 1].isfinite().all(-1).any()
    assert out[0].isfinite().all() and out[1, :, 0].isfinite().all()


@pytest.mark.parametrize("scores", [1, 2**10])
def test_chunks_change_nothing(monkeypatch, scores):
    q, k, v = make_qkv(2, 33, 150, 2, 40)
    whole = emulated.attend(q, k, v, precision="int8_qk_int8_pv")
    monkeypatch.setattr(emulated, "SCORES", scores)
    for chunked, at_once in zip(emulated.attend(q, k, v, precision="int8_qk_int8_pv"), whole, strict=True):
        torch.testing.assert_close(chunked, at_once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pv", ["fp8", "16bit", "int8"])
def test_the_sum_of_rounded_weights_makes_an_average_of_values(pv):
    """With equal values the output is that value, whatever p is rounded to; the sum of p itself leaves its roundings."""
    q, k, v = make_qkv(1, 20, 300, 1, 16, dtype=torch.bfloat16)
    x = emulated.quantise(q, k, torch.full_like(v, 1.5), pv=pv, return_lse=True)
    options = {"head_dim": 16, "dtype": torch.bfloat16}
    out, lse = emulated.attend_quantised(x, **options, rounded_sum=True)
    plain, plain_lse = emulated.attend_quantised(x, **options)
    v_rounded = 1.5 if pv == "16bit" else (x.v_scale.double() * (448 if pv == "fp8" else 127)).amax().item()
    assert (out - v_rounded).abs().amax() < 1e-12 < (plain - v_rounded).abs().amax()
    assert 0 < (lse - plain_lse).abs().amax() < 2.0**-4  # a rounding of e4m3
    again, again_lse = emulated.attend_quantised(x, **options, backwards=True)
    assert 0 < (again - plain).abs().amax() < 2.0**-4 and (again_lse - plain_lse).abs().amax() < 1e-12
