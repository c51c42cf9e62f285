"""On an NVIDIA GPU: families with a pass of ours between projections and attention, whole pipelines in bf16."""

import pytest
import tiny_pipelines
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import videoattn
from videoattn.policy import Dense, Policy

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
FAMILIES = ("wan", "hunyuan_video", "hunyuan_video15", "ltx", "cogvideox", "cogvideox_rope")
QUANTISED = ("triton_int8_fp8", "triton_int8_16bit", "triton_int8_int8")


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.fixture(params=FAMILIES)
def case(request):
    """(name, pipeline, its latents untouched, how far another exact kernel is from them)"""
    name = request.param
    pipe = tiny_pipelines.build(name, head_dim=64).to("cuda", torch.bfloat16)
    untouched = tiny_pipelines.run(name, pipe)
    with sdpa_kernel(SDPBackend.MATH):
        floor = relative(tiny_pipelines.run(name, pipe), untouched)
    return name, pipe, untouched, floor


def large(report):
    """The rows of self-attention over the video."""
    return [row for row in report.sites if row.kind in ("full", "joint") and row.shape]


def test_exact(case):
    name, pipe, untouched, floor = case
    with videoattn.fast_attention(pipe, "exact"):
        latents, report = tiny_pipelines.run(name, pipe), videoattn.report(pipe)
    assert all(row.fused for row in large(report)), report
    assert relative(latents, untouched) <= 2 * floor + 1e-3


@pytest.mark.parametrize("backend", QUANTISED)
def test_quantised(case, backend):
    name, pipe, untouched, floor = case
    precision = backend.replace("triton_int8_", "int8_qk_") + "_pv"
    with videoattn.fast_attention(pipe, Policy(decision=Dense(precision)), backend=backend):
        latents, report = tiny_pipelines.run(name, pipe), videoattn.report(pipe)
    assert report.shares == {precision: 1.0}
    assert all(row.fused and row.backend == backend for row in large(report)), report
    assert 0 < relative(latents, untouched) <= 2 * floor + 0.1


def test_a_norm_with_a_hook_is_called(case):
    name, pipe, untouched, floor = case
    called = []
    norms = [module for path, module in pipe.transformer.named_modules() if path.endswith("norm_q")]
    handles = [norm.register_forward_hook(lambda module, args, out: called.append(module)) for norm in norms]
    with videoattn.fast_attention(pipe, "exact"):
        latents = tiny_pipelines.run(name, pipe)
    for handle in handles:
        handle.remove()
    assert set(called) == set(norms)
    assert relative(latents, untouched) <= 2 * floor + 1e-3
