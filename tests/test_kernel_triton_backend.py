"""What the Triton kernels share: refusals, plans, and the numbers that every launch needs."""

import math

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE
from test_kernel_sdpa import call

from videoattn.backend import backends
from videoattn.kernels import flash
from videoattn.kernels.triton_backend import Launch, TritonBackend, aligned, precision, scale_log2, unit_stride
from videoattn.policy import EXACT, Dense, Sparse
from videoattn.testing import assert_close_to_oracle, make_qkv

FP16 = torch.float16
ON_GPU = torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_they_are_backends_of_our_own():
    own = [backend for backend in backends() if backend.own]
    assert {"triton_temporal", "triton_flash", "triton_hopper"} <= {backend.name for backend in own}
    assert str(own[0]) == f"TritonBackend({own[0].name!r})"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, None),
        ({"head_dim": 16, "dtype": torch.bfloat16}, None),
        ({"head_dim": 256, "dtype": torch.float32}, None),
        ({"layout": "BHND", "mask": "additive", "causal": True, "has_kv_len": True, "kv_heads": 1}, None),
        ({"device": torch.device("cpu")}, "no GPU"),
        ({"dtype": torch.float64}, "takes fp16, bf16 and fp32, got torch.float64"),
        ({"head_dim": 2}, "takes head_dim 4 to 256 in steps of 4, got 2"),
        ({"head_dim": 62}, "takes head_dim 4 to 256 in steps of 4, got 62"),
        ({"head_dim": 264}, "takes head_dim 4 to 256 in steps of 4, got 264"),
    ],
    ids=str,
)
def test_calls(ampere, facts, why):
    (backend,) = flash.BACKENDS
    assert backend.refuses(call(**{"device": ON_GPU} | facts), EXACT) == why


@pytest.mark.parametrize("decision", [Dense("int8_qk_fp8_pv"), Sparse("pooled")], ids=str)
def test_exact_attention_alone(ampere, decision):
    (backend,) = flash.BACKENDS
    assert backend.refuses(call(device=ON_GPU), decision) == f"computes exact attention only, asked for {decision}"


def test_cards_before_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (backend,) = flash.BACKENDS
    assert backend.refuses(call(device=ON_GPU), EXACT) == "needs compute capability 8.0"


def test_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    (backend,) = flash.BACKENDS
    assert backend.refuses(call(device=ON_GPU), EXACT) == "not tested on ROCm"


def test_a_kernels_own_refusal_comes_last(ampere):
    backend = TritonBackend("picky", flash.attend, lambda call: "not today")
    assert backend.refuses(call(device=ON_GPU), EXACT) == "not today"
    assert backend.refuses(call(device=ON_GPU, head_dim=2), EXACT) != "not today"


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize(
    "options", [(), ("mask",), ("kv_len",), ("causal",), ("scale",), ("mask", "kv_len", "causal")], ids=str
)
def test_a_plan_hands_everything_on(layout, options, poisoned):
    given = {
        "mask": torch.rand(2, 1, 20, 30, device=DEVICE) < 0.6,
        "kv_len": torch.tensor([30, 11], dtype=torch.int32, device=DEVICE),
        "causal": True,
        "scale": 0.3,
    }
    given = {name: value for name, value in given.items() if name in options}
    q, k, v = make_qkv(2, 20, 30, 4, 40, kv_heads=2, dtype=FP16, device=DEVICE)
    sizes = {"batch": 2, "q_len": 20, "kv_len": 30, "heads": 4, "kv_heads": 2, "head_dim": 40, "device": q.device}
    form = {
        "mask": "bool" if "mask" in given else "none",
        "has_kv_len": "kv_len" in given,
        "causal": "causal" in given,
    }
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    run = flash.BACKENDS[0].plan(call(layout=layout, **sizes, **form), EXACT, flag)

    def swapped(x):
        return x.transpose(1, 2) if layout == "BHND" else x

    def attend(q, k, v):
        return swapped(run(*map(swapped, (q, k, v)), given.get("mask"), given.get("kv_len"), given.get("scale")))

    out = attend(q, k, v)
    assert_close_to_oracle(out, q, k, v, **given)
    assert out.is_contiguous() and flag.item() == 0
    attend(q, k, torch.full_like(v, torch.nan))
    assert flag.item() == 1


def test_the_scale_in_the_exponent_of_two():
    assert scale_log2(None, 64) == pytest.approx(math.log2(math.e) / 8)
    assert scale_log2(2.0, 64) == pytest.approx(2 * math.log2(math.e))
    assert 0 < scale_log2(0.0, 64) < 1e-20


def test_products_in_fp32_are_not_tf32():
    assert precision(torch.float32) == "ieee"


def test_aligned_to_16_bytes():
    x = torch.zeros(64, dtype=FP16)
    assert aligned(x, x[8:], x[16:]) and not aligned(x, x[4:]) and not aligned(x[1:])


def test_a_copy_only_where_elements_do_not_lie_side_by_side():
    x = torch.randn(2, 3, 4, 16)
    for same in (x, x.transpose(1, 2), x[..., :8]):
        assert unit_stride(same) is same
    copy = unit_stride(x.transpose(2, 3))
    assert copy.is_contiguous() and torch.equal(copy, x.transpose(2, 3))


class Compiled:
    """Stands for a compiled kernel: keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands for a kernel that Triton compiles: one for each call that comes past here."""

    arg_names = ("x", "mask", "scale", "n", "D", "ALIGN")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def launch(x, mask, scale, n, *, D, ALIGN, num_warps):
            assert (grid, scale, n, D, ALIGN, num_warps) == ((3, 1, 1), 0.5, 7, 64, 8, 4)
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def test_a_launch_looks_its_kernel_up_once():
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch(3, (7,), {"ALIGN": 8, "D": 64, "num_warps": 4})
    for _ in range(3):
        launch(kernel, (x, None), 0.5)
    (compiled,) = kernel.compiled
    assert compiled.launches == 2 * [((3, 1, 1), (x.data_ptr(), None, 0.5, 7, 64, 8))]
    again = torch.ones(64)
    launch(kernel, (again, None), 0.25)
    assert compiled.launches[-1][1][:3] == (again.data_ptr(), None, 0.25)


def test_a_launch_looks_again_for_what_makes_another_kernel():
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch(3, (7,), {"ALIGN": 8, "D": 64, "num_warps": 4})
    tensors = [(x, None), (x, x), (x[1:], None), (x.half(), None), (x, x.bool())]
    for given in 2 * tensors:
        launch(kernel, given, 0.5)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [1] * len(tensors)
    launch(Kernel(), (x, None), 0.5)
    assert len(kernel.compiled) == len(tensors)
