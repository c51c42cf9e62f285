"""On an NVIDIA GPU: every tiny pipeline, exact beside untouched, by what was measured best and by our own kernels."""

import pytest
import tiny_pipelines
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton")
from kernel_checks import Case, compile_ahead

import videoattn
from videoattn import measured

pytestmark = pytest.mark.gpu
FORMS = [(64, "none"), (64, "bool"), (64, "additive"), (32, "none"), (32, "additive"), (96, "none"), (128, "none")]


@pytest.fixture(scope="module", autouse=True)
def ahead():
    """What the pipelines make our kernels compile."""
    usual = {"dtype": torch.float32, "heads": 2, "kv_heads": 2, "batch": 1}
    dense = {"backend": "triton_flash", "q_len": 70, "kv_len": 70}
    compile_ahead(
        [
            *(Case(**usual, **dense, head_dim=head_dim, mask=mask) for head_dim, mask in FORMS),
            Case(**usual, **dense, kv_lens=(50,)),
            *(Case(**usual, backend="triton_temporal", q_len=5, kv_len=5, head_dim=n) for n in (4, 64, 128)),
        ]
    )


@pytest.fixture
def no_tf32():
    """cuDNN's convolutions round to TF32 unless told otherwise.

    Where a patch embedding does, an input that differs in its last bit now and then becomes one that differs by 2^-11, and
    the noise floor of one run does not foretell when.
    """
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    yield
    for library, allowed in zip(libraries, before, strict=True):
        library.allow_tf32 = allowed


def ours_first(call, names, bounded=(), sparse=None):
    """In place of `measured.choose`: each of our kernels for what it was written for, wherever it can."""
    wanted = ("triton_temporal", "triton_flash") if call.kind == "temporal" else ("triton_hopper", "triton_flash")
    return next((name for name in (*wanted, *names) if name in names), names[0]), "forced"


def run_exact(name, pipe):
    """(latents, the report's rows)"""
    with videoattn.fast_attention(pipe, "exact"):
        return tiny_pipelines.run(name, pipe), [row for row in videoattn.report(pipe).sites if row.shape]


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_exact_in_fp32(name, monkeypatch, no_tf32):
    """In fp32, so that what is compared is the way of the data and not the rounding of 16 bits."""
    pipe = tiny_pipelines.build(name, head_dim=96 if name == "allegro" else 64).to("cuda")
    untouched = tiny_pipelines.run(name, pipe)
    with sdpa_kernel(SDPBackend.MATH):  # the noise floor: another exact kernel in the untouched pipeline
        floor = (tiny_pipelines.run(name, pipe) - untouched).abs().max()
    measured_best, best_rows = run_exact(name, pipe)
    monkeypatch.setattr(measured, "choose", ours_first)
    ours, rows = run_exact(name, pipe)
    for latents in (measured_best, ours):
        assert (latents - untouched).abs().max() <= 2 * floor + 1e-5 * untouched.abs().max()
    assert rows and all(row.calls for row in (*best_rows, *rows))
    assert all(row.backend.startswith("triton_") for row in rows)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx", "latte", "animatediff"])
def test_our_kernels_in_bf16(name, monkeypatch):
    """No farther from fp32 than twice what torch's kernels are, in bf16."""
    pipe = tiny_pipelines.build(name, head_dim=64).to("cuda")
    exact = tiny_pipelines.run(name, pipe).double()
    pipe.to(torch.bfloat16)
    untouched = tiny_pipelines.run(name, pipe)
    monkeypatch.setattr(measured, "choose", ours_first)
    ours, rows = run_exact(name, pipe)
    assert (ours - exact).norm() <= 2 * (untouched - exact).norm()
    assert rows and all(row.calls and row.backend.startswith("triton_") for row in rows)
