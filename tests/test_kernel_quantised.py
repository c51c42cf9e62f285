"""Triton's kernel on quantised operands against the emulation of the same algorithm, in the interpreter or on the GPU."""

import functools
import math

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE
from quantised_operands import HARD, make_hard, means
from test_kernel_sdpa import call

from videoattn.kernels import quantised, reference
from videoattn.kernels import quantised_reference as emulated
from videoattn.policy import EXACT, Dense, Sparse
from videoattn.testing import make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # log2(0), inf * 0
FP16, BF16 = torch.float16, torch.bfloat16
PVS = ("fp8", "16bit", "int8")
ATTEND = {backend.pv: backend.attend for backend in quantised.BACKENDS}
ON_GPU = torch.device("cuda")
EPS = torch.finfo(torch.float32).eps
# Tensor cores keep 14 bits of a sum of e4m3 products; the interpreter adds in fp32.
PRODUCT_EPS = {"fp8": 2.0**-13 if DEVICE == "cuda" else EPS, "16bit": EPS, "int8": EPS}


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(q, k, v, pv, *, scale=None, kv_len=None, tuned=None):
    """The kernel's answer is the emulation's but for fp32's rounding, and the flag stays down.

    A score is rounded three times on its way into 2^x, from numbers no greater than twice the greatest score and the
    offset of 9; 2^x itself is good to 2^-22. With p off by no more than that, what p is rounded to lies between what p
    (1 - e) and p (1 + e) are rounded to, as rounding is monotone. Sums over keys and over tiles add one unit each.
    """
    d, dtype = q.shape[3], q.dtype
    x = emulated.quantise(q, k, v, pv=pv, scale=scale, kv_len=kv_len, return_lse=True)
    settings = quantised.config(d, pv, quantised.capability_of(q.device)) | (tuned or {})
    flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    out, lse = quantised.attend_quantised(
        x, head_dim=d, dtype=dtype, kv_len=kv_len, return_lse=True, flag=flag, tuned=tuned
    )
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    assert flag.item() == 0

    emulate = functools.partial(
        emulated.attend_quantised, head_dim=d, dtype=dtype, kv_len=kv_len, block_n=settings["N"]
    )
    exact, exact_lse = emulate(x)
    greatest = ((x.q_scale.double() * x.q.double().abs().sum(-1)).amax() * 127 * x.k_scale.double().amax()).item()
    tiles = -(-k.shape[1] // settings["N"])
    off = (3 * greatest + 18) * EPS + 2.0**-21
    plus = x._replace(v=x.v.float().abs().to(x.v.dtype))
    most, least = (emulate(plus, nudge=1 + sign * off)[0] for sign in (1, -1))
    units = (k.shape[1] + 8) * EPS + 4 * off + tiles * off + settings["N"] / 16 * PRODUCT_EPS[pv]
    bound = (most - least) + units * most + exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"off by {excess.amax():.2e} more than it may be"

    blind = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind) and (out.transpose(1, 2)[blind] == 0).all()
    shift = x.lse_shift.abs().double() + exact_lse.abs()
    allowed = off + (k.shape[1] + tiles + 8) * EPS + shift * EPS
    assert ((lse - exact_lse).abs() <= allowed)[~blind].all()
    return out, lse


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize(
    # B, Nq, Nk, H, Hkv, D
    ("shape", "dtype", "layout"),
    [
        ((1, 1, 1, 1, 1, 64), FP16, "BNHD"),
        ((2, 7, 7, 2, 2, 40), BF16, "fused"),
        ((1, 63, 63, 2, 1, 72), FP16, "BHND"),
        ((1, 65, 65, 3, 3, 80), BF16, "fused"),
        ((2, 129, 129, 2, 1, 40), FP16, "fused"),
        ((1, 130, 300, 1, 1, 128), BF16, "BNHD"),
        ((1, 65, 129, 1, 1, 160), BF16, "BHND"),
        ((1, 65, 65, 1, 1, 256), FP16, "fused"),
        ((1, 1, 300, 4, 2, 96), BF16, "BNHD"),
        ((3, 200, 7, 1, 1, 88), FP16, "fused"),
        ((1, 33, 65, 2, 2, 16), FP16, "fused"),
    ],
    ids=str,
)
def test_it_is_the_algorithm(shape, dtype, layout, pv, poisoned):
    batch, nq, nk, heads, kv_heads, head_dim = shape
    options = {"kv_heads": kv_heads, "dtype": dtype, "layout": layout, "device": DEVICE}
    check(*make_qkv(batch, nq, nk, heads, head_dim, **options), pv)


WAYS = [
    {"M": 64, "N": 128},
    {"M": 128, "N": 64, "MAGIC": True},
    {"M": 64, "N": 128, "TMA": True},
    {"M": 64, "N": 64, "TMA": True, "MAGIC": True},
]


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("tuned", WAYS, ids=str)
@pytest.mark.parametrize("head_dim", [40, 80])
def test_every_way_of_working(tuned, head_dim, pv, poisoned):
    if DEVICE == "cuda" and tuned.get("TMA") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this card")
    q, k, v = make_qkv(2, 70, 300, 2, head_dim, kv_heads=1, dtype=BF16, layout="fused", device=DEVICE)
    check(q, k, v, pv, kv_len=lengths(300, 133), tuned=tuned)


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("kv_len", [(0, 33, 150), (150, 150, 150), (0, 0, 0), (1, 128, 999)], ids=str)
def test_prefix_lengths(kv_len, pv, poisoned):
    """A length beyond the keys counts as all of them."""
    check(*make_qkv(3, 20, 150, 2, 64, dtype=FP16, device=DEVICE), pv, kv_len=lengths(*kv_len))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("pv", PVS)
def test_keys_beyond_the_length_are_not_read_into_the_result(pv, tma):
    if DEVICE == "cuda" and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this card")
    q, k, v = make_qkv(2, 14, 150, 2, 40, dtype=FP16, device=DEVICE)
    kv_len = lengths(3, 70)
    beyond = torch.arange(150, device=DEVICE) >= kv_len[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    check(q, k, v, pv, kv_len=kv_len, tuned={"TMA": tma})


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("scale", [1e-6, 0.3])
def test_scale(scale, pv, poisoned):
    check(*make_qkv(1, 20, 70, 2, 40, dtype=FP16, device=DEVICE), pv, scale=scale)


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("name", HARD)
def test_numbers_that_are_hard_to_round(name, pv, poisoned):
    q, k, v = make_qkv(1, 20, 200, 2, 64, dtype=BF16, device=DEVICE)
    make_hard(name, q, k, v)
    out, _ = check(q, k, v, pv)
    if name in ("constant", "zero v"):
        torch.testing.assert_close(out, v[:, :20], rtol=2.0**-7, atol=0.0)


@pytest.mark.parametrize("pv", PVS)
def test_scores_so_large_that_one_key_takes_all(pv, poisoned):
    """s * scale is rounded apart from the maximum: p must not pass what its type holds."""
    q, k, v = make_qkv(1, 20, 200, 2, 64, dtype=BF16, device=DEVICE)
    x = emulated.quantise(300 * q, 300 * k, v, pv=pv)
    out, _ = quantised.attend_quantised(x, head_dim=64, dtype=BF16)
    exact, _ = emulated.attend_quantised(x, head_dim=64, dtype=BF16)
    assert (out - exact).abs().amax() <= 2.0**-4 * exact.abs().amax()


@pytest.mark.parametrize("pv", PVS)
def test_as_near_to_exact_attention_as_the_emulation(pv):
    """But for k's mean, which is of some tokens only.

    What is left of it, the same for all keys, meets q's rounding: that moves a row's scores alike, and so its log-sum-exp.
    """
    q, k, v = make_qkv(1, 40, 200, 2, 64, dtype=BF16, device=DEVICE)
    k += 8.0 * torch.randn(2, 64, device=DEVICE)
    exact, exact_lse = reference.attend(q, k, v)
    out, lse = ATTEND[pv](q, k, v, return_lse=True)
    expected, expected_lse = emulated.attend(q, k, v, precision=f"int8_qk_{pv}_pv")
    norm = torch.linalg.vector_norm
    assert norm(out - exact) <= 1.05 * norm(expected - exact) + torch.finfo(BF16).eps / 2 * norm(exact)
    x, keys = emulated.quantise(q, k, v, pv=pv, scale=math.log(2)), k.double().transpose(1, 2)
    rounding = x.q * x.q_scale.double()[..., None] - q.double().transpose(1, 2)
    left = keys.mean(2) - means(keys, [200])
    moved = 64**-0.5 * (rounding * left[:, :, None]).sum(-1)
    assert norm(lse - exact_lse) <= 1.05 * norm(expected_lse - exact_lse) + norm(moved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("pv", PVS)
def test_the_flag_tells_of_what_is_not_finite(pv, name, value):
    qkv = dict(zip("qkv", make_qkv(2, 3, 20, 2, 24, dtype=FP16, device=DEVICE), strict=True))
    qkv[name][1, 2, 1, 23] = value
    raised = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, _ = ATTEND[pv](**qkv, flag=raised)
    assert raised.item() == 1
    rows = {"q": out[1, 2, 1], "k": out[1, :, 1], "v": out[1, :, 1, 23]}[name]
    assert not rows.isfinite().any() and (~out.isfinite()).sum() == rows.numel()


def test_head_dims_in_parts():
    assert [quantised.parts(d, quantised.LEAST) for d in (16, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)] == [
        (32, 0), (64, 0), (64, 0), (64, 32), (64, 32), (64, 32), (128, 0), (128, 0), (128, 0), (128, 32), (128, 64), (256, 0)
    ]  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    pretend(9, 0)
    return pretend


def test_three_backends_of_our_own():
    names = [backend.name for backend in quantised.BACKENDS]
    assert names == ["triton_int8_fp8", "triton_int8_16bit", "triton_int8_int8"]
    assert all(backend.own for backend in quantised.BACKENDS)


@pytest.mark.parametrize("pv", PVS)
def test_one_decision_each(pv, card):
    backends = {backend.name: backend for backend in quantised.BACKENDS}
    backend = backends.pop(f"triton_int8_{pv}")
    decision = Dense(f"int8_qk_{pv}_pv")
    assert backend.refuses(call(device=ON_GPU), decision) is None
    for other in (EXACT, Sparse("pooled", decision.precision), *(backend.decision for backend in backends.values())):
        assert backend.refuses(call(device=ON_GPU), other) == f"computes {decision} attention only, asked for {other}"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, None),
        ({"layout": "BHND", "has_kv_len": True, "kv_heads": 1, "head_dim": 256}, None),
        ({"head_dim": 16, "dtype": torch.float16}, None),
        ({"device": torch.device("cpu")}, "no GPU"),
        ({"dtype": torch.float32}, "takes fp16 and bf16, got torch.float32"),
        ({"head_dim": 8}, "takes head_dim 16 to 256 in steps of 8, got 8"),
        ({"head_dim": 20}, "takes head_dim 16 to 256 in steps of 8, got 20"),
        ({"mask": "bool"}, "takes no mask"),
        ({"causal": True}, "takes no causal attention"),
        ({"kv_len": 0}, "takes no empty tensors"),
    ],
    ids=str,
)
def test_calls(card, facts, why):
    for backend in quantised.BACKENDS:
        assert backend.refuses(call(**{"device": ON_GPU, "dtype": torch.bfloat16} | facts), backend.decision) == why


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), ["fp8"]), ((8, 6), ["fp8"]), ((8, 9), []), ((12, 0), [])])
def test_cards(card, capability, refused):
    card(*capability)
    for backend in quantised.BACKENDS:
        wanted = (
            "needs compute capability 8.9 for e4m3" if backend.name.removeprefix("triton_int8_") in refused else None
        )
        assert backend.refuses(call(device=ON_GPU), backend.decision) == wanted


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("pv", PVS)
def test_a_plan(pv, layout, poisoned):
    q, k, v = make_qkv(2, 5, 30, 2, 24, kv_heads=1, dtype=FP16, device=DEVICE)
    facts = {"batch": 2, "q_len": 5, "kv_len": 30, "heads": 2, "kv_heads": 1, "head_dim": 24, "device": q.device}
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    (backend,) = (backend for backend in quantised.BACKENDS if backend.name == f"triton_int8_{pv}")
    run = backend.plan(call(layout=layout, has_kv_len=True, **facts), backend.decision, flag)
    kv_len = lengths(30, 11)

    def swapped(x):
        return x.transpose(1, 2) if layout == "BHND" else x

    out = swapped(run(*map(swapped, (q, k, v)), None, kv_len, 0.2))
    wanted, _ = ATTEND[pv](q, k, v, scale=0.2, kv_len=kv_len)
    assert torch.equal(out, wanted) and out.is_contiguous() and flag.item() == 0
    assert not torch.equal(out, ATTEND[pv](q, k, v, kv_len=kv_len)[0])
    run(*map(swapped, (q, k, torch.full_like(v, torch.nan))), None, kv_len, 0.2)
    assert flag.item() == 1


def test_the_tile_that_the_profiler_counts_with(card):
    monkeyed = call(device=ON_GPU, head_dim=128)
    quantised.capability_of.cache_clear()
    tile = quantised.BACKENDS[0].tile(monkeyed)
    quantised.capability_of.cache_clear()
    assert tile == (64, 128, 4)
