"""Triton's kernel on quantised operands against the emulation of the same algorithm, in the interpreter or on the GPU."""

import dataclasses
import functools
import math

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE
from quantised_operands import HARD, make_hard, means
from test_kernel_sdpa import call

from videoattn.kernels import block_sparse_reference, quantised, reference
from videoattn.kernels import quantised_reference as emulated
from videoattn.policy import EXACT, Dense, Sparse
from videoattn.selection.block_list import BlockList
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


def pairs(first, second, third):
    """Every two values together, not every three: the third is taken in turn."""
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def check(q, k, v, pv, *, scale=None, kv_len=None, lists=None, tuned=None):
    """The kernel's answer is the emulation's but for fp32's rounding, and the flag stays down.

    A score is rounded three times on its way into 2^x, from numbers no greater than twice the greatest score and the
    offset of 9; 2^x itself is good to 2^-22. With p off by no more than that, what p is rounded to lies between what p
    (1 - e) and p (1 + e) are rounded to, as rounding is monotone. Sums over keys and over tiles add one unit each.
    """
    d, dtype = q.shape[3], q.dtype
    x = emulated.quantise(q, k, v, pv=pv, scale=scale, kv_len=kv_len, return_lse=True)
    block_q = None if lists is None else lists.block_q
    settings = quantised.config(d, pv, quantised.capability_of(q.device), block_q) | (tuned or {})
    flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    out, lse = quantised.attend_quantised(
        x, head_dim=d, dtype=dtype, kv_len=kv_len, lists=lists, return_lse=True, flag=flag, tuned=tuned
    )
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    assert flag.item() == 0

    mask = None if lists is None else block_sparse_reference.token_mask(lists, q.shape[1], k.shape[1])
    emulate = functools.partial(
        emulated.attend_quantised, head_dim=d, dtype=dtype, kv_len=kv_len, mask=mask, block_n=settings["N"]
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


@pytest.mark.parametrize(("tuned", "pv", "head_dim"), pairs(WAYS, PVS, [40, 80]), ids=str)
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


# ---------------------------------------------------------------- lists of key blocks


def make_lists(batch, heads, q_len, kv_len, *, block_q=128, density=0.5, live=None):
    """Random lists; the last block of queries of the last row keeps nothing. live: tokens of the first blocks, with gaps."""
    nq, nk = -(-q_len // block_q), -(-kv_len // 128)
    keep = torch.rand(batch, heads, nq, nk, generator=torch.Generator().manual_seed(nq * nk)) < density
    if density < 1:
        keep[-1, -1, -1] = False
    there = [128] * (nk - 1) + [kv_len - 128 * (nk - 1)]
    there[: len(live or ())] = live or ()
    return BlockList.of(keep.to(DEVICE), lengths(*there), block_q, 128, gaps=live is not None)


LISTS = [
    # B, Nq, Nk, H, Hkv, D, block_q
    ((1, 128, 128, 1, 1, 64, 128), FP16, "BNHD"),
    ((2, 130, 300, 2, 1, 72, 64), BF16, "fused"),
    ((1, 200, 520, 2, 2, 128, 192), BF16, "BHND"),
    ((2, 300, 640, 1, 1, 40, 128), FP16, "fused"),
    ((1, 70, 70, 4, 2, 16, 64), FP16, "fused"),
    ((1, 65, 257, 1, 1, 256, 128), BF16, "BNHD"),
]


@pytest.mark.parametrize(("case", "pv", "gaps"), pairs(LISTS, PVS, [False, True]), ids=str)
def test_lists(case, gaps, pv, poisoned):
    (batch, nq, nk, heads, kv_heads, head_dim, block_q), dtype, layout = case
    options = {"kv_heads": kv_heads, "dtype": dtype, "layout": layout, "device": DEVICE}
    q, k, v = make_qkv(batch, nq, nk, heads, head_dim, **options)
    live = (min(77, nk), 0, 1)[: -(-nk // 128) - 1] if gaps else None
    check(q, k, v, pv, lists=make_lists(batch, heads, nq, nk, block_q=block_q, live=live))


@pytest.mark.parametrize("pv", ["fp8"])
@pytest.mark.parametrize("tuned", [*WAYS, {"M": 64, "N": 32}], ids=str)
def test_lists_in_every_way_of_working(tuned, pv, poisoned):
    if DEVICE == "cuda" and tuned.get("TMA") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this card")
    q, k, v = make_qkv(2, 130, 460, 2, 80, kv_heads=1, dtype=BF16, layout="fused", device=DEVICE)
    check(q, k, v, pv, lists=make_lists(2, 2, 130, 460, density=0.7), tuned=tuned)
    with_gaps = make_lists(2, 2, 130, 460, density=0.7, live=(0, 100))
    check(q, k, v, pv, kv_len=lengths(460, 300), lists=with_gaps, tuned=tuned)


@pytest.mark.parametrize(
    ("kv_len", "pv", "live"),
    pairs([(0, 128, 150), (450, 256, 999), (384, 1, 449)], PVS, [None, (64, 128, 0)]),
    ids=str,
)
def test_blocks_beyond_a_length_do_not_count(kv_len, pv, live, poisoned):
    """Though lists name them all; what stands there is not read into the result."""
    q, k, v = make_qkv(3, 70, 450, 2, 64, kv_heads=1, dtype=FP16, device=DEVICE)
    beyond = torch.arange(450, device=DEVICE) >= lengths(*kv_len)[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    lists = make_lists(3, 2, 70, 450, block_q=64, density=1.0, live=live)
    check(q, k, v, pv, kv_len=lengths(*kv_len), lists=lists)


def test_more_blocks_than_are_counted_at_a_time(monkeypatch, poisoned):
    monkeypatch.setattr(quantised, "COUNTED", 2)
    quantised._plan.cache_clear()
    q, k, v = make_qkv(2, 64, 1000, 1, 16, dtype=FP16, device=DEVICE)
    check(q, k, v, "int8", kv_len=lengths(1000, 700), lists=make_lists(2, 1, 64, 1000, block_q=64, density=0.7))
    quantised._plan.cache_clear()


@pytest.mark.parametrize(("pv", "gaps", "kv_len"), pairs(PVS, [False, True], [None, (300, 133)]), ids=str)
def test_every_block_listed_is_dense_attention(pv, gaps, kv_len, poisoned):
    """Tiles, their order and the step from one to the next are the same: bit for bit in the interpreter.

    Compiled it is another loop, in which a product and the sum behind it may be one instruction or two: to rounding.
    """
    q, k, v = make_qkv(2, 200, 300, 2, 80, kv_heads=1, dtype=BF16, layout="fused", device=DEVICE)
    kv_len = None if kv_len is None else lengths(*kv_len)
    lists = make_lists(2, 2, 200, 300, density=1.0, live=(128,) if gaps else None)
    got = check(q, k, v, pv, kv_len=kv_len, lists=lists)
    expected = check(q, k, v, pv, kv_len=kv_len)
    if DEVICE == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("pv", PVS)
def test_lists_that_rows_and_heads_share(pv, poisoned):
    shared = make_lists(1, 1, 200, 300, density=0.6)
    lists = shared.expand(2, 4)
    assert lists.keep.stride()[:2] == lists.indices.stride()[:2] == lists.counts.stride()[:2] == (0, 0)
    q, k, v = make_qkv(2, 200, 300, 4, 64, kv_heads=2, dtype=BF16, device=DEVICE)
    got = check(q, k, v, pv, lists=lists)
    copied = BlockList.of(lists.keep.contiguous(), lists.live, 128, 128)
    assert all(torch.equal(a, b) for a, b in zip(got, check(q, k, v, pv, lists=copied), strict=True))


@pytest.mark.parametrize("kv_len", [None, (200, 300)], ids=str)
@pytest.mark.parametrize("pv", PVS)
def test_lists_without_a_block(pv, kv_len, poisoned):
    q, k, v = make_qkv(2, 100, 300, 2, 64, dtype=FP16, device=DEVICE)
    lists = make_lists(2, 2, 100, 300, density=0.0)
    out, lse = check(q, k, v, pv, kv_len=None if kv_len is None else lengths(*kv_len), lists=lists)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("pv", PVS)
def test_blocks_without_a_token_change_nothing(pv, poisoned):
    """First in a list, between others and last: m, l and acc stay to the bit, since 2^(m - m) is 1."""
    q, k, v = make_qkv(1, 128, 640, 2, 64, dtype=FP16, device=DEVICE)
    x = emulated.quantise(q, k, v, pv=pv, return_lse=True)
    keep = torch.ones(1, 2, 1, 5, dtype=torch.bool, device=DEVICE)
    live = lengths(0, 128, 0, 60, 0)
    named = BlockList.of(keep, live, 128, 128, gaps=True)
    left = BlockList.of(keep & (live > 0), live, 128, 128, gaps=True)
    got, expected = (
        quantised.attend_quantised(x, head_dim=64, dtype=FP16, lists=lists, return_lse=True) for lists in (named, left)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_k": 64}, "wanted block_k 128, got 64"),
        ({"block_q": 256}, "wanted block_q 64 or 128 or 192, got 256"),
        ({"block_q": 64}, r"wanted counts torch.int32 \(1, 2, 4\), got torch.int32 \(1, 2, 2\)"),
        ({"live": torch.zeros(3)}, r"wanted live torch.int32 \(3,\), got torch.float32 \(3,\)"),
        (
            {"counts": torch.empty(1, 2, 2, dtype=torch.int32, device="meta")},
            f"wanted counts on q's device, {DEVICE}.*, got meta",
        ),
    ],
)
def test_lists_that_are_not_the_operands(change, message, monkeypatch):
    q, k, v = make_qkv(1, 200, 300, 2, 64, dtype=FP16, device=DEVICE)
    x = emulated.quantise(q, k, v, pv="int8")
    lists = dataclasses.replace(make_lists(1, 2, 200, 300), **change)
    monkeypatch.setattr(quantised, "_plan", None)  # nothing gets as far as a launch
    with pytest.raises(ValueError, match=f"^attend_quantised: {message}"):
        quantised.attend_quantised(x, head_dim=64, dtype=FP16, lists=lists)


def test_tiles_that_do_not_divide_a_block_of_queries():
    q, k, v = make_qkv(1, 200, 300, 2, 64, dtype=FP16, device=DEVICE)
    x = emulated.quantise(q, k, v, pv="int8")
    with pytest.raises(ValueError, match="wanted tiles that divide 64 queries, got 128"):
        lists = make_lists(1, 2, 200, 300, block_q=64)
        quantised.attend_quantised(x, head_dim=64, dtype=FP16, lists=lists, tuned={"M": 128})


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("block_q", [64, 128, 192])
def test_tiles_divide_blocks(capability, block_q):
    for pv in PVS:
        for head_dim in range(16, 257, 8):
            settings = quantised.config(head_dim, pv, capability, block_q)
            assert block_q % settings["M"] == 128 % settings["N"] == 0


# ---------------------------------------------------------------- the backends


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
