"""On an NVIDIA GPU: profiles whose shares are known, of our own kernels, under offloading and under torch.compile."""

import pytest
import torch
from tiny_pipelines import build, inputs

import videoattn
from videoattn.benchmarks.toy import PRODUCTS, SIZE, Toy, share_error
from videoattn.profiling import ceilings, recorder, summary
from videoattn.profiling.profile import Profile

pytestmark = pytest.mark.gpu


def test_shares_of_kernels_that_take_known_times():
    pipe = Toy("cuda")
    made = recorder.record(pipe, {"num_inference_steps": 3}, clean_runs=1)
    shares = {share.name: share.share for share in summary.categories(made)}
    assert share_error(shares, pipe.expected_ms(3, run=2)) < 3, shares  # after a warm-up and a clean pass
    assert made.clock == "device" and 0.9 < made.busy_ms / made.recorded_ms <= 1
    rows = {(row.module, row.operator): row for row in made.rows}
    assert rows["transformer.products.proj", "linear"].flops == 3 * PRODUCTS["cuda"] * 2 * SIZE["cuda"] ** 3
    assert sum(row.ms for row in made.rows) == pytest.approx(max(summary.clean_ms(made), made.busy_ms), rel=1e-3)


def profiled(name, policy=None, change=lambda pipe: None, **options):
    pipe = build(name, head_dim=64).to("cuda", torch.float16)
    if policy:
        videoattn.enable_fast_attention(pipe, policy, **options)
    change(pipe)
    return pipe, recorder.record(pipe, inputs(name, pipe))


def assert_sound(made):
    """Every check holds but that of the cost: a tiny pipeline is all launches."""
    assert not [check for check in made.checks if not check.passed and check.name != "cost of recording"], made.checks
    assert Profile.from_json(made.to_json()).to_json() == made.to_json()
    assert all(call.ms > 0 for call in made.calls), made.calls


@pytest.mark.parametrize("name", ["svd", "wan", "latte"])
def test_our_kernels_are_told_by_name(name):
    _, made = profiled(name, "exact", backend="triton_flash")
    assert_sound(made)
    calls = [call for call in made.calls if call.step >= 0]
    assert calls and {call.backend for call in calls} == {"triton_flash"}
    assert all(call.io is not None and call.padding_waste is not None for call in calls)


def test_kernels_of_torch_are_told_by_name():
    _, made = profiled("wan")
    assert_sound(made)
    backends = {call.backend for call in made.calls if call.step >= 0}
    assert backends <= {"sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"} and backends


def test_weights_that_are_offloaded():
    pipe, made = profiled("wan", change=lambda pipe: pipe.enable_model_cpu_offload())
    assert_sound(made)
    shares = {share.name: share.ms for share in summary.categories(made)}
    assert shares["host-device copies"] > 0
    assert any(one.what == "weights" for one in made.memory.alive)
    assert any("offloaded" in note for note in made.notes)
    assert hasattr(pipe.transformer, "_hf_hook")


def compile_blocks(pipe):
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True)


def test_blocks_that_inductor_compiled():
    torch._dynamo.reset()
    _, made = profiled("wan", change=compile_blocks)
    assert_sound(made)
    shares = {share.name: share.ms for share in summary.categories(made)}
    assert shares["fused by the compiler"] > 0
    assert {call.kind for call in made.calls if call.step >= 0} == {"full", "cross"}
    torch._dynamo.reset()


def test_the_ceilings_of_this_card():
    found = ceilings.measure(torch.device("cuda"), torch.bfloat16)
    properties = torch.cuda.get_device_properties(0)
    assert found.sm_count == properties.multi_processor_count and found.l2_bytes > 1e6 and found.sm_bytes > 6e4
    assert 1e11 < found.copy_bandwidth < 2e13 and 1e13 < found.flops["bfloat16"] < 1e16
