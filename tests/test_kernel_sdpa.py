"""Torch's SDPA on the CPU against the oracle: "sdpa" and "sdpa_math"; the GPU's kernels are in test_gpu.py."""

import pytest
import torch
import torch.nn.functional as F
from test_kernel_reference import masks

from videoattn.backend import UnsupportedCall, backends, select
from videoattn.call import Call
from videoattn.policy import EXACT, Dense, Sparse
from videoattn.runner import Runner
from videoattn.testing import assert_close_to_oracle, make_qkv

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ON_CPU = ["sdpa", "sdpa_math"]


@pytest.fixture(params=ON_CPU)
def attend(request):
    return Runner("full", EXACT, request.param)


def assert_close(out, q, k, v, **options):
    """Where inputs are not rounded, what is left is exp: the blocked kernel's vectorised one is a few units off."""
    assert_close_to_oracle(out, q, k, v, factor=2 if q.dtype.itemsize == 2 else 4, **options)


def call(**facts):
    standard = {"kind": "full", "layout": "BNHD", "batch": 1, "q_len": 64, "kv_len": 64, "heads": 2, "kv_heads": 2}
    standard |= {"head_dim": 64, "dtype": torch.float16, "device": torch.device("cpu")}
    return Call(**standard | facts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["BNHD", "BHND", "fused"])
@pytest.mark.parametrize(("nq", "nk"), [(130, 130), (1, 70), (65, 1), (33, 129)])
def test_it_is_as_close_as_its_dtype_allows(attend, dtype, layout, nq, nk, poisoned):
    q, k, v = make_qkv(2, nq, nk, 3, 16, dtype=dtype, layout=layout)
    assert_close(attend(q, k, v), q, k, v)


@pytest.mark.parametrize("head_dim", [1, 7, 40, 72, 88, 300])
def test_any_head_dim(attend, head_dim):
    q, k, v = make_qkv(1, 20, 30, 2, head_dim)
    assert_close(attend(q, k, v), q, k, v)


def test_the_hosts_layout_gives_the_same_bits(attend):
    q, k, v = make_qkv(2, 20, 30, 3, 16)
    swapped = attend(*(x.transpose(1, 2) for x in (q, k, v)), layout="BHND")
    assert torch.equal(swapped.transpose(1, 2), attend(q, k, v))


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"scale": 0.0}, {"causal": True}], ids=str)
def test_options(attend, options):
    q, k, v = make_qkv(2, 20, 30, 3, 16)
    assert_close(attend(q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("lengths", [None, [30, 11]])
def test_fewer_key_heads(attend, kv_heads, lengths):
    q, k, v = make_qkv(2, 20, 30, 4, 16, kv_heads=kv_heads)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    assert_close(attend(q, k, v, None, kv_len), q, k, v, kv_len=kv_len)


@pytest.mark.parametrize(
    "mask", (mask for mask in masks(2, 2, 3, 5) if mask.ndim > 1), ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)}"
)
def test_every_mask(attend, mask):
    """A row that sees no key gives 0: torch's own kernels do so for masks of both kinds."""
    q, k, v = make_qkv(2, 3, 5, 2, 8)
    assert_close(attend(q, k, v, mask), q, k, v, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[30, 30], [11, 11], [30, 11], [1, 30], [0, 11], [0, 0]], ids=str)
@pytest.mark.parametrize("masked", ["no mask", "bool", "additive"])
def test_prefix_lengths(attend, dtype, lengths, masked, poisoned):
    q, k, v = make_qkv(2, 20, 30, 3, 16, dtype=dtype)
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    keep = torch.rand(2, 1, 20, 30) < 0.7
    mask = {"no mask": None, "bool": keep, "additive": torch.where(keep, 0.5, -torch.inf).to(dtype)}[masked]
    assert_close(attend(q, k, v, mask, kv_len), q, k, v, mask=mask, kv_len=kv_len)


@pytest.mark.parametrize("lengths", [[11, 11], [30, 11], [0, 11]], ids=str)
def test_keys_beyond_the_length_are_not_read_into_the_result(attend, lengths):
    q, k, v = make_qkv(2, 20, 30, 3, 16)
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    expected = attend(q, k, v, None, kv_len)
    beyond = torch.arange(30) >= kv_len[:, None]
    k[beyond], v[beyond] = 1e4, -1e4
    assert torch.equal(attend(q, k, v, None, kv_len), expected)


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_an_empty_sequence_or_batch(attend, shape, with_lengths, layout, poisoned):
    b, nq, nk = shape
    q, k, v = make_qkv(b, nq, nk, 2, 8)
    kv_len = torch.full((b,), nk, dtype=torch.int32) if with_lengths else None
    if layout == "BHND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, None, kv_len, layout=layout)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert (out == 0).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_comes_out_where_the_host_lets_it_out(attend, where):
    q, k, v = make_qkv(2, 20, 30, 2, 8)
    {"q": q, "k": k, "v": v}[where][0, 3, 1, 2] = torch.nan
    host = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    out = attend(q, k, v)
    assert out[0, :, 1].isnan().any()
    assert out[1].isfinite().all() and out[0, :, 0].isfinite().all()
    if attend.backend == "sdpa":
        assert torch.equal(out.isnan(), host.isnan())


def test_backends_and_their_order():
    assert [backend.name for backend in backends()][:5] == [
        "sdpa",
        "sdpa_cudnn",
        "sdpa_flash",
        "sdpa_efficient",
        "sdpa_math",
    ]
    assert select(call(), EXACT).backend.name == "sdpa"


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_flash", "sdpa_efficient"])
def test_kernels_of_the_gpu_refuse_the_cpu(name):
    with pytest.raises(UnsupportedCall, match=f"'{name}' refuses full attention.*head_dim 64.* on cpu: no GPU"):
        select(call(), EXACT, name)


@pytest.mark.parametrize("decision", [Dense("int8_qk_fp8_pv"), Sparse("pooled")], ids=str)
def test_none_of_them_trades(decision):
    for backend in backends()[:5]:
        assert backend.refuses(call(), decision) == f"computes exact attention only, asked for {decision}"


@pytest.mark.parametrize("facts", [{"mask": "bool"}, {"mask": "additive"}, {"has_kv_len": True}], ids=str)
def test_causal_and_a_mask_are_refused_together(attend, facts):
    """Torch raises at the call; here it is known before."""
    with pytest.raises(UnsupportedCall, match="causal or a mask, not both"):
        select(call(causal=True, **facts), EXACT, attend.backend)
