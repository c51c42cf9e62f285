"""Triton's kernel for short rows against the oracle: in Triton's interpreter, or on the GPU where there is one."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE, assert_close_lse, check
from test_kernel_sdpa import call

from videoattn.kernels import temporal
from videoattn.testing import assert_close_to_oracle, make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # log2(0), inf * 0
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def flag():
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    # rows, Nq, Nk, H, Hkv, D
    ("shape", "dtype", "layout"),
    [
        ((5, 16, 16, 3, 3, 40), FP16, "BNHD"),
        ((5, 16, 16, 4, 4, 40), BF16, "fused"),
        ((3, 14, 14, 4, 2, 64), FP16, "BHND"),
        ((3, 25, 25, 2, 2, 72), BF16, "fused"),
        ((3, 16, 16, 4, 4, 80), FP16, "fused"),
        ((2, 32, 32, 4, 1, 16), FP32, "BNHD"),
        ((2, 7, 7, 3, 3, 88), FP32, "fused"),
        ((2, 1, 1, 4, 4, 96), BF16, "BNHD"),
        ((2, 63, 63, 2, 1, 112), FP16, "BHND"),
        ((2, 65, 65, 1, 1, 128), BF16, "BNHD"),
        ((2, 128, 128, 1, 1, 64), FP16, "fused"),
        ((2, 16, 16, 1, 1, 160), FP16, "BNHD"),
        ((2, 9, 9, 2, 2, 256), BF16, "BHND"),
        ((3, 1, 77, 2, 2, 40), FP16, "fused"),
        ((3, 33, 7, 2, 2, 64), FP16, "BNHD"),
        ((2, 7, 100, 4, 2, 48), FP32, "BHND"),
        ((3, 14, 1, 2, 1, 120), BF16, "fused"),
        ((3, 5, 5, 2, 2, 4), FP16, "fused"),
        ((3, 33, 5, 2, 2, 12), BF16, "BNHD"),
    ],
    ids=str,
)
def test_it_equals_the_oracle(shape, dtype, layout, poisoned):
    rows, nq, nk, heads, kv_heads, head_dim = shape
    check(
        temporal.attend,
        *make_qkv(rows, nq, nk, heads, head_dim, kv_heads=kv_heads, dtype=dtype, layout=layout, device=DEVICE),
    )


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale(scale, poisoned):
    check(temporal.attend, *make_qkv(3, 14, 25, 2, 40, dtype=FP16, device=DEVICE), scale=scale)


def test_a_scale_below_zero():
    q, k, v = make_qkv(1, 4, 4, 1, 16, dtype=FP16, device=DEVICE)
    for scale in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"scale: wanted 0 or more, got {scale}"):
            temporal.attend(q, k, v, scale=scale)


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("kv_len", [(0, 3, 25, 17), (25, 25, 25, 25), (0, 0, 0, 0), (1, 16, 26, 99)], ids=str)
def test_prefix_lengths(kv_len, head_dim, poisoned):
    """A length beyond the keys counts as all of them."""
    q, k, v = make_qkv(4, 14, 25, 2, head_dim, dtype=FP16, device=DEVICE)
    check(temporal.attend, q, k, v, kv_len=lengths(*kv_len))


def test_keys_beyond_the_length_are_not_read_into_the_result():
    q, k, v = make_qkv(2, 14, 25, 2, 40, dtype=FP16, device=DEVICE)
    kv_len = lengths(3, 20)
    expected, _ = temporal.attend(q, k, v, kv_len=kv_len)
    beyond = torch.arange(25, device=DEVICE) >= kv_len[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    assert torch.equal(temporal.attend(q, k, v, kv_len=kv_len)[0], expected)


@pytest.mark.parametrize("kv_len", [None, (3, 0)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_rows_addressed_by_two_strides(fused, kv_len, poisoned):
    """[B, F, P, H, D] read as [B, P, F, H, D] where it lies; the output lies likewise."""
    if fused:
        q, k, v = torch.randn(2, 9, 4, 9, 40, device=DEVICE).half().split(3, dim=3)
    else:
        q, k, v = torch.randn(3, 2, 9, 4, 3, 40, device=DEVICE).half()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = temporal.attend(q, k, v, kv_len=None if kv_len is None else lengths(*kv_len), return_lse=True)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    options = {} if kv_len is None else {"kv_len": lengths(*kv_len).repeat_interleave(4)}
    assert_close_to_oracle(out.flatten(0, 1), *rows, **options)
    assert_close_lse(lse.flatten(0, 1), *rows, **options)


def test_no_copy_of_what_is_strided(monkeypatch):
    """Only an element stride other than 1 makes one."""
    launched = []
    launch = mock.Mock(side_effect=lambda q, k, v, *args, **kwargs: launched.append([x.data_ptr() for x in (q, k, v)]))
    monkeypatch.setattr(temporal, "_forward", mock.MagicMock(__getitem__=lambda kernel, grid: launch))
    q, k, v = torch.randn(2, 9, 4, 9, 40, device=DEVICE).half().split(3, dim=3)
    where = [x.data_ptr() for x in (q, k, v)]
    temporal.attend(*(x.transpose(1, 2) for x in (q, k, v)))
    temporal.attend(*(x[:, 0].transpose(1, 2) for x in (q, k, v)))
    assert launched == [where, where]


def test_elements_that_do_not_lie_side_by_side(poisoned):
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(2, 9, 9, 3, 40, device=DEVICE))
    assert q.stride(-1) == 3
    check(temporal.attend, q, k, v)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_address_that_is_not_aligned(offset, poisoned):
    q, _, v = make_qkv(2, 9, 9, 3, 40, dtype=FP16, layout="fused", device=DEVICE)
    moved = torch.randn(2, 9, 9, 40 + offset, device=DEVICE).half()[..., offset:]
    check(temporal.attend, *moved.split(3, dim=2))
    check(temporal.attend, q, moved[:, :, 3:6], v)


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_flag_tells_of_what_is_not_finite(value, head_dim):
    q, k, v = make_qkv(3, 9, 9, 2, head_dim, dtype=FP16, device=DEVICE)
    v[1, 2, 1, head_dim - 1] = value
    raised = flag()
    out, _ = temporal.attend(q, k, v, flag=raised)
    assert raised.item() == 1
    bad = ~out.isfinite()
    assert bad[1, :, 1, -1].all() and bad.sum() == 9


def test_what_overflows_in_the_outputs_precision_raises_the_flag():
    q, k, v = make_qkv(1, 9, 9, 2, 40, dtype=FP16, device=DEVICE)
    raised = flag()
    temporal.attend(q, k, torch.full_like(v, 6.5e4), flag=raised)
    assert raised.item() == 0
    out, _ = temporal.attend(q.float(), k.float(), torch.full_like(v, 3.4e38, dtype=FP32), flag=raised)
    assert raised.item() == 1 and out.isinf().any()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_rows(value, poisoned):
    q, k, v = (torch.full((2, 17, 2, 64), value, dtype=BF16, device=DEVICE) for _ in range(3))
    out, _ = temporal.attend(q, k, v)
    assert torch.equal(out, v)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"q_len": 16, "kv_len": 16}, None),
        ({"q_len": 128, "kv_len": 1, "has_kv_len": True, "kv_heads": 1}, None),
        ({"q_len": 16, "kv_len": 16, "head_dim": 256, "dtype": FP32}, None),
        ({"q_len": 16, "kv_len": 16, "mask": "bool"}, "takes no mask"),
        ({"q_len": 16, "kv_len": 16, "causal": True}, "takes no mask"),
        ({"q_len": 129, "kv_len": 16}, "takes rows of up to 128 tokens, got 129"),
        ({"q_len": 16, "kv_len": 200}, "takes rows of up to 128 tokens, got 200"),
        ({"q_len": 65, "kv_len": 65, "head_dim": 136}, "takes head_dim up to 128 on rows over 32 tokens, got 136"),
        (
            {"q_len": 65, "kv_len": 65, "head_dim": 72, "dtype": FP32},
            "takes head_dim up to 64 on rows over 32 tokens, got 72",
        ),
    ],
    ids=str,
)
def test_calls(facts, why):
    assert temporal._refuses(call(**facts)) == why
