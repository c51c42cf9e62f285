"""On an NVIDIA GPU: SDPA's kernels against the oracle, their refusals, and what "auto" takes."""

import pytest
import torch

from videoattn.backend import UnsupportedCall, backends
from videoattn.kernels import sdpa
from videoattn.policy import EXACT
from videoattn.runner import Runner
from videoattn.testing import assert_close_to_oracle, make_qkv

pytestmark = pytest.mark.gpu
NAMES = [backend.name for backend in sdpa.BACKENDS]
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160)


@pytest.mark.parametrize("layout", ["BNHD", "BHND", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_the_oracle_or_refuses(name, head_dim, dtype, layout, poisoned):
    q, k, v = make_qkv(2, 129, 129, 3, head_dim, dtype=dtype, layout=layout, device="cuda")
    runner = Runner("full", EXACT, name)
    if name == "sdpa_cudnn" and head_dim > 128 and torch.cuda.get_device_capability() != (9, 0):
        with pytest.raises(UnsupportedCall, match="over 128"):
            runner(q, k, v)
        return
    out = runner(q, k, v)
    assert_close_to_oracle(out, q, k, v)


@pytest.mark.parametrize("lengths", [(77, 77), (5, 77), (1, 40)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_prefix_lengths(name, lengths, poisoned):
    q, k, v = make_qkv(2, 130, 77, 4, 64, dtype=torch.bfloat16, layout="BNHD", device="cuda")
    kv_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    assert_close_to_oracle(Runner("cross", EXACT, name)(q, k, v, None, kv_len), q, k, v, kv_len=kv_len)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sdpa_flash"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks(name, additive, poisoned):
    q, k, v = make_qkv(2, 64, 72, 4, 64, dtype=torch.float16, layout="BNHD", device="cuda")
    mask = torch.rand(2, 1, 64, 72, device="cuda") > 0.3
    mask[..., 0] = True
    if additive:
        mask = torch.where(mask, 0.0, -1e4).half()
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v, mask), q, k, v, mask=mask)


def test_flash_refuses_a_mask():
    q, k, v = make_qkv(1, 64, 64, 2, 64, dtype=torch.float16, layout="BNHD", device="cuda")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    with pytest.raises(UnsupportedCall, match="takes no mask"):
        Runner("full", EXACT, "sdpa_flash")(q, k, v, mask)


def test_fp32_goes_past_the_half_precision_kernels():
    q, k, v = make_qkv(1, 64, 64, 2, 64, dtype=torch.float32, layout="BNHD", device="cuda")
    runner = Runner("full", EXACT)
    assert_close_to_oracle(runner(q, k, v), q, k, v)
    exact = {backend.name for backend in backends() if backend.computes(EXACT)}
    refused = {name for plan in runner.plans.values() for name, _ in plan.choice.refusals if name in exact}
    assert refused == {"sdpa_cudnn", "sdpa_flash", "triton_hopper"}


@pytest.mark.parametrize("shape", [(512, 16, 40), (512, 25, 64), (128, 16, 80), (128, 16, 160), (2, 512, 64)], ids=str)
def test_auto_takes_what_was_measured_best(shape):
    batch, frames, head_dim = shape
    q, k, v = make_qkv(batch, frames, frames, 4, head_dim, dtype=torch.float16, layout="BNHD", device="cuda")
    runner = Runner("temporal", EXACT)
    assert_close_to_oracle(runner(q, k, v), q, k, v)
    (plan,) = runner.plans.values()
    assert "measured" in plan.choice.why
    if torch.cuda.get_device_capability() == (9, 0) and frames <= 64:  # cuDNN wastes most of a tile on short rows
        assert plan.choice.backend.name != "sdpa" and "x of torch's choice" in plan.choice.why
