"""Triton's kernel of any length against the oracle: in Triton's interpreter, or on the GPU where there is one."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE, check
from test_kernel_reference import masks

from videoattn.kernels import flash
from videoattn.testing import make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # log2(0), inf * 0
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    # B, Nq, Nk, H, Hkv, D
    ("shape", "dtype", "layout"),
    [
        ((1, 1, 1, 1, 1, 64), FP16, "BNHD"),
        ((2, 7, 7, 2, 2, 40), BF16, "fused"),
        ((1, 63, 63, 2, 1, 72), FP16, "BHND"),
        ((1, 65, 65, 3, 3, 80), BF16, "fused"),
        ((2, 129, 129, 2, 1, 40), FP16, "fused"),
        ((1, 257, 257, 1, 1, 64), BF16, "BNHD"),
        ((1, 129, 129, 1, 1, 128), FP16, "BHND"),
        ((1, 65, 65, 1, 1, 160), BF16, "BNHD"),
        ((1, 65, 65, 1, 1, 256), FP16, "fused"),
        ((1, 1, 300, 4, 2, 96), BF16, "BNHD"),
        ((3, 200, 7, 1, 1, 88), FP16, "fused"),
        ((1, 129, 1, 2, 2, 112), BF16, "BHND"),
        ((1, 63, 257, 2, 2, 16), FP16, "fused"),
        ((2, 65, 33, 2, 2, 4), FP16, "fused"),
        ((1, 33, 65, 2, 1, 20), BF16, "BHND"),
        ((2, 33, 65, 4, 2, 40), FP32, "fused"),
        ((1, 63, 33, 2, 2, 64), FP32, "BHND"),
        ((1, 17, 65, 1, 1, 128), FP32, "BNHD"),
    ],
    ids=str,
)
def test_it_equals_the_oracle(shape, dtype, layout, poisoned):
    batch, nq, nk, heads, kv_heads, head_dim = shape
    options = {"kv_heads": kv_heads, "dtype": dtype, "layout": layout, "device": DEVICE}
    check(flash.attend, *make_qkv(batch, nq, nk, heads, head_dim, **options))


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_scale(scale, masked, poisoned):
    q, k, v = make_qkv(1, 70, 40, 2, 40, dtype=FP16, device=DEVICE)
    mask = torch.randn(70, 40, device=DEVICE).half() if masked else None
    check(flash.attend, q, k, v, scale=scale, mask=mask)


def test_a_scale_below_zero():
    q, k, v = make_qkv(1, 4, 4, 1, 16, dtype=FP16, device=DEVICE)
    for scale in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"scale: wanted 0 or more, got {scale}"):
            flash.attend(q, k, v, scale=scale)


@pytest.mark.parametrize("kv_len", [(0, 33, 150), (150, 150, 150), (0, 0, 0), (1, 64, 999)], ids=str)
def test_prefix_lengths(kv_len, poisoned):
    """A length beyond the keys counts as all of them."""
    q, k, v = make_qkv(3, 70, 150, 2, 64, dtype=FP16, device=DEVICE)
    check(flash.attend, q, k, v, kv_len=lengths(*kv_len))


def test_keys_beyond_the_length_are_not_read_into_the_result():
    q, k, v = make_qkv(2, 14, 150, 2, 40, dtype=FP16, device=DEVICE)
    kv_len = lengths(3, 70)
    expected, _ = flash.attend(q, k, v, kv_len=kv_len)
    beyond = torch.arange(150, device=DEVICE) >= kv_len[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    assert torch.equal(flash.attend(q, k, v, kv_len=kv_len)[0], expected)


@pytest.mark.parametrize("mask", list(masks(2, 2, 9, 70)), ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)}")
def test_every_mask(mask, poisoned):
    """The last ones hide everything from some row, which then gives 0."""
    q, k, v = make_qkv(2, 9, 70, 2, 40, dtype=FP16, device=DEVICE)
    mask = mask.to(DEVICE)
    check(flash.attend, q, k, v, mask=mask if mask.dtype == torch.bool else mask.half())


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64], ids=str)
def test_an_additive_mask_of_another_dtype_than_the_inputs(dtype, poisoned):
    q, k, v = make_qkv(1, 9, 70, 2, 40, dtype=FP16, device=DEVICE)
    check(flash.attend, q, k, v, mask=(3 * torch.randn(9, 70, device=DEVICE)).to(dtype))


def test_a_mask_of_any_strides(poisoned):
    q, k, v = make_qkv(2, 33, 70, 2, 40, dtype=FP16, device=DEVICE)
    keep = torch.rand(70, 2, 2, 40, device=DEVICE) < 0.6
    check(flash.attend, q, k, v, mask=keep.permute(2, 1, 3, 0)[:, :, 5:38])


@pytest.mark.parametrize("additive", [False, True])
def test_masks_and_prefix_lengths(additive, poisoned):
    q, k, v = make_qkv(2, 33, 150, 2, 40, dtype=FP16, device=DEVICE)
    mask = torch.rand(2, 1, 33, 150, device=DEVICE) < 0.6
    mask[0, 0, 3] = False
    mask = torch.where(mask, 0.5, -torch.inf).half() if additive else mask
    check(flash.attend, q, k, v, mask=mask, kv_len=lengths(20, 133))


@pytest.mark.parametrize(("nq", "nk"), [(1, 70), (129, 129), (150, 40), (40, 150)])
def test_causal(nq, nk, poisoned):
    check(flash.attend, *make_qkv(2, nq, nk, 2, 40, kv_heads=1, dtype=FP16, device=DEVICE), causal=True)


@pytest.mark.parametrize("masked", ["no mask", "bool", "additive"])
def test_causal_with_the_rest(masked, poisoned):
    q, k, v = make_qkv(2, 70, 150, 1, 40, dtype=FP16, device=DEVICE)
    keep = torch.rand(2, 1, 1, 150, device=DEVICE) < 0.6
    mask = {"no mask": None, "bool": keep, "additive": torch.where(keep, 0.5, -torch.inf).half()}[masked]
    check(flash.attend, q, k, v, mask=mask, kv_len=lengths(33, 150), causal=True)


def test_no_copy_of_what_is_strided(monkeypatch):
    """Only an element stride other than 1 makes one."""
    launched = []
    launch = mock.Mock(side_effect=lambda q, k, v, *args, **kwargs: launched.append([x.data_ptr() for x in (q, k, v)]))
    monkeypatch.setattr(flash, "_forward", mock.MagicMock(__getitem__=lambda kernel, grid: launch))
    for layout in ("BNHD", "BHND", "fused"):
        qkv = make_qkv(2, 9, 9, 3, 40, dtype=FP16, layout=layout, device=DEVICE)
        flash.attend(*qkv)
        assert launched.pop() == [x.data_ptr() for x in qkv]


def test_elements_that_do_not_lie_side_by_side(poisoned):
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(2, 9, 9, 3, 40, device=DEVICE))
    assert q.stride(-1) == 3
    check(flash.attend, q, k, v)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_address_that_is_not_aligned(offset, poisoned):
    moved = torch.randn(1, 33, 9, 40 + offset, device=DEVICE).half()[..., offset:]
    check(flash.attend, *moved.split(3, dim=2))


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_flag_tells_of_what_is_not_finite(value, head_dim):
    q, k, v = make_qkv(3, 9, 70, 2, head_dim, dtype=FP16, device=DEVICE)
    v[1, 2, 1, head_dim - 1] = value
    raised = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, _ = flash.attend(q, k, v, flag=raised)
    assert raised.item() == 1
    bad = ~out.isfinite()
    assert bad[1, :, 1, -1].all() and bad.sum() == 9


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_rows(value, poisoned):
    q, k, v = (torch.full((1, 70, 2, 64), value, dtype=BF16, device=DEVICE) for _ in range(3))
    out, _ = flash.attend(q, k, v)
    assert torch.equal(out, v)
