"""Operands of quantised attention from one kernel: those that torch makes of finished q, k, v."""

import pytest
import torch
from kernel_checks import DEVICE
from projection_cases import FAMILIES, FP16, make, streams
from quantised_operands import assert_close, exactly, operands

from videoattn.kernels.operands import KEYS, ORDER, Quantised
from videoattn.kernels.quantise import quantise, quantise_streams
from videoattn.testing import make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # 0 * inf
PV = ("fp8", "int8", "16bit")


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def same(a, b):
    """To the last bit."""
    return all(x is y is None or torch.equal(x, y) for x, y in zip(map(bits, a), map(bits, b), strict=True))


def bits(x):
    return None if x is None else x.contiguous().view(torch.uint8)


def check_streams(case, **options):
    """Against torch in fp64 on the same projections."""
    given = streams(case)
    got = quantise_streams(case.prologue, case.heads, *given, **options)
    assert all(x is None for stream in given for x in (stream.q, stream.k, stream.v))
    assert_close(got, operands(*exactly(case.prologue, case.heads, streams(case)), **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, poisoned):
    """The border of the dual streams is inside a block, and so is the end of the keys."""
    tokens = 134 if name in ("wan", "ltx", "plain") else 123
    check_streams(make(name, tokens=tokens, head_dim=24, batch=2), pv="fp8", kv_len=lengths(131, 64))


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan", {"tokens": 19, "head_dim": 128, "heads": 5, "batch": 1, "fused": True}),
        ("hunyuan dual", {"tokens": 120, "head_dim": 24, "heads": 2, "batch": 1, "fused": True, "dtype": FP16}),
    ],
    ids=str,
)
def test_how_p_v_is_multiplied(pv, name, options, poisoned):
    check_streams(make(name, **options), pv=pv, return_lse=True, scale=0.3)


def test_the_same_bits_twice(poisoned):
    case = make("cogvideox", tokens=120, head_dim=64, heads=1, batch=1)
    once, again = (
        quantise_streams(case.prologue, case.heads, *streams(case), pv="int8", return_lse=True) for _ in range(2)
    )
    assert same(once, again)


@pytest.mark.parametrize("layout", ["BNHD", "BHND", "fused"])
@pytest.mark.parametrize(
    # B, Nq, Nk, H, Hkv, D
    "shape",
    [(2, 9, 130, 2, 1, 72), (1, 1, 1, 1, 1, 16), (1, 130, 128, 2, 2, 64), (1, 9, 127, 3, 1, 256)],
    ids=str,
)
def test_finished_tensors_of_any_strides(shape, layout, poisoned):
    batch, nq, nk, heads, kv_heads, head_dim = shape
    q, k, v = make_qkv(batch, nq, nk, heads, head_dim, kv_heads=kv_heads, dtype=FP16, layout=layout, device=DEVICE)
    assert_close(quantise(q, k, v, pv="int8", return_lse=True), operands(q, k, v, pv="int8", return_lse=True))


def test_elements_that_do_not_lie_side_by_side(poisoned):
    q, k, v = (
        x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(1, 9, 9, 3, 40, dtype=FP16, device=DEVICE)
    )
    assert_close(quantise(q, k, v, pv="fp8"), operands(q, k, v, pv="fp8"))


@pytest.mark.parametrize("pv", PV)
def test_prefix_lengths(pv, poisoned):
    """None, some, all, and more than there are; what lies beyond may be anything."""
    kv_len = lengths(0, 5, 140, 999)
    q, k, v = make_qkv(4, 3, 140, 1, 24, dtype=FP16, device=DEVICE)
    expected = quantise(q, k, v, pv=pv, kv_len=kv_len, return_lse=True)
    assert_close(expected, operands(q, k, v, pv=pv, kv_len=kv_len, return_lse=True))
    assert not expected.k[0].any() and not expected.k[1, :, 5:].any()
    beyond = torch.arange(140, device=DEVICE) >= kv_len[:, None]
    k[beyond], v[beyond] = torch.nan, torch.inf
    again = quantise(q, k, v, pv=pv, kv_len=kv_len, return_lse=True)
    assert same(again[:4], expected[:4]) and same(again[6:], expected[6:])
    if pv != "16bit":
        assert same(again[4:], expected[4:])
        assert not expected.v[0].view(torch.int8).any()


def test_projections_beyond_the_length_are_not_read_into_the_rest(poisoned):
    case = make("hunyuan dual", tokens=120, heads=1, head_dim=24)
    kv_len = lengths(125, 7)
    expected = quantise_streams(case.prologue, case.heads, *streams(case), pv="fp8", kv_len=kv_len)
    beyond = torch.arange(131, device=DEVICE) >= kv_len[:, None]
    for (_, k, v), *_ in case.parts:
        part, beyond = beyond.split([k.shape[1], beyond.shape[1] - k.shape[1]], dim=1)
        k[part], v[part] = torch.nan, torch.nan
    assert same(quantise_streams(case.prologue, case.heads, *streams(case), pv="fp8", kv_len=kv_len), expected)


def test_zeros(poisoned):
    """Rows, whole blocks and channels of zeros give zeros and finite scales."""
    q, k, v = make_qkv(1, 10, 130, 1, 40, dtype=FP16, device=DEVICE)
    q[0, 7], v[..., 3] = 0.0, 0.0
    k[:] = 0.0
    got = quantise(q, k, v, pv="fp8", return_lse=True)
    assert all(x.isfinite().all() for x in (got.q_scale, got.k_scale, got.v_scale, got.lse_shift))
    assert not got.q[0, :, 7].any() and not got.k.any() and not got.v[:, :, 3].view(torch.int8).any()
    assert got.q[0, :, 8].any() and got.v[:, :, 4].view(torch.int8).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pv", ["fp8", "int8"])
def test_what_is_not_finite_shows_in_a_scale(bad, pv, poisoned):
    clean = make_qkv(1, 40, 40, 2, 24, dtype=FP16, device=DEVICE)
    for place, name in enumerate(("q_scale", "k_scale", "v_scale")):
        tensors = [x.clone() for x in clean]
        tensors[place][0, 33, 1, 5] = bad
        got = quantise(*tensors, pv=pv, return_lse=True)
        for other in ("q_scale", "k_scale", "v_scale"):
            nan = getattr(got, other).isnan()
            assert not nan[:, 0].any(), "of the other head"
            assert nan[:, 1].any() == (other == name)
        assert got.q_scale[0, 1].isnan().sum() == (name == "q_scale")


def test_large_and_small(poisoned):
    """From the smallest numbers of bf16 to the greatest."""
    q, k, v = (x.clamp(-3, 3) for x in make_qkv(1, 20, 150, 1, 16, dtype=torch.bfloat16, device=DEVICE))
    for factor in (1e-30, 1e30):
        got = quantise(q * factor, k * factor, v * factor, pv="int8", scale=1.0)
        assert_close(got, operands(q * factor, k * factor, v * factor, pv="int8", scale=1.0))


def test_scores_and_values_come_back(poisoned):
    """Dequantised, the operands are q and k - kbar, and v in its own order."""
    q, k, v = make_qkv(1, 20, 150, 2, 64, dtype=FP16, device=DEVICE)
    k += 3 * torch.randn(64, device=DEVICE)
    got = quantise(q, k, v, pv="fp8", scale=0.125, return_lse=True)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    groups = torch.arange(150, device=DEVICE)
    k_scale = got.k_scale[:, :, groups // KEYS, groups % 8 // 2]
    scores = (got.q.double() * got.q_scale[..., None]) @ (got.k.double() * k_scale[..., None]).mT
    lse = torch.logsumexp(scores * 0.6931471805599453, -1) + got.lse_shift
    exact = torch.logsumexp(0.125 * q @ k.mT, -1)
    # A score is a sum of 64 products, each off by half a step in q and in k: some 4 standard deviations of that.
    step = 0.125 * (q.abs().amax() * (k - k.mean(2, keepdim=True)).abs().amax() / 127) * 8
    assert (lse - exact).abs().max() < 4 * step
    assert got.lse_shift.abs().max() > 8 * step, "nothing to smooth"
    stored = torch.tensor([16 * (i // 16) + ORDER[i % 16] for i in range(256)], device=DEVICE)
    back = torch.empty(1, 2, 64, 256, device=DEVICE)
    back[..., stored] = got.v.float() * got.v_scale[..., None]
    assert ((back[..., :150] - v.mT).abs() <= v.mT.abs() * 2**-4 + got.v_scale[..., None] * 2**-9).all()
    assert not back[..., 150:].any()


def test_the_order_is_a_fragment_s():
    """Thread t of four holds columns 2t, 2t+1, 8+2t, 9+2t of 16, and is to hold 4t to 4t+3 of the next product."""
    assert [ORDER[4 * t : 4 * t + 4] for t in range(4)] == [(2 * t, 2 * t + 1, 8 + 2 * t, 9 + 2 * t) for t in range(4)]


def test_names():
    assert Quantised._fields == ("q", "q_scale", "k", "k_scale", "v", "v_scale", "lse_shift")


def test_a_scale_below_zero():
    q, k, v = make_qkv(1, 4, 4, 1, 16, dtype=FP16, device=DEVICE)
    with pytest.raises(ValueError, match="scale: wanted 0 or more, got -1"):
        quantise(q, k, v, pv="int8", scale=-1)
