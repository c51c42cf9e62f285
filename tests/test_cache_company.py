"""Step rehash beside slicing, presets, offloading, compiled blocks and modular pipelines."""

import copy

import pytest
import torch
from tiny_rehash import EVEN, STEPS, Count, euler_wan, generate, make, ran, rehash, report

import videoattn
from videoattn.kernels import masked
from videoattn.policy import Policy, Sparse
from videoattn.selection.pooled import Pooled
from videoattn.session import session_of


@pytest.mark.parametrize(
    ("name", "first"), [("animatediff", "slicing"), ("wan", "slicing"), ("wan", "rehash"), ("svd", "rehash")]
)
def test_with_slicing_and_attention(name, first, monkeypatch):
    pipe = make(name)
    full = generate(name, pipe)
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate(name, pipe)
    videoattn.disable(pipe)
    enable = {
        "slicing": lambda: videoattn.enable_feature_slicing(pipe, slices=2),
        "rehash": lambda: videoattn.enable_step_rehash(pipe, **EVEN),
    }
    for each in sorted(enable, key=lambda each: each != first):
        enable[each]()
    videoattn.enable_fast_attention(pipe, "exact")
    made = generate(name, pipe)
    assert rehash(pipe).reused
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3)
    videoattn.disable_feature_slicing(pipe)
    torch.testing.assert_close(generate(name, pipe), expected, rtol=2e-3, atol=2e-3)
    videoattn.disable(pipe)
    assert torch.equal(generate(name, pipe), full)


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_with_every_preset(preset):
    pipe = euler_wan()
    videoattn.enable_fast_attention(pipe, preset)
    full = generate("wan", pipe)
    videoattn.enable_step_rehash(pipe, steps=7)
    assert torch.equal(generate("wan", pipe), full)
    near = generate("wan", pipe)
    assert len(ran(pipe)) == 7 and (near - full).norm() < 0.3 * full.norm()
    assert "step rehash" in report(pipe) and "policy" in report(pipe)


@pytest.mark.parametrize("point", ["output", "first_block"])
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("wan", "rehash"),
        *((name, "attention") for name in ("wan", "hunyuan_video", "hunyuan_video15", "cogvideox_rope", "ltx")),
    ],
)
def test_with_tokens_in_an_order_that_changes_midway(name, point, first, monkeypatch):
    """All key blocks are kept, so that only a mix of orders would show: the first steps are dense, in raster order."""
    (backend,) = masked.BACKENDS
    monkeypatch.setattr(backend, "blocks", lambda call, gaps: (8, 8))
    policy = Policy(name="test", decision=Sparse(Pooled(density=1.0)), dense_steps=0.3)
    pipe = make(name, layers=3)
    videoattn.enable_step_rehash(pipe, **EVEN, point=point)
    expected = generate(name, pipe)
    videoattn.disable(pipe)
    enable = {
        "attention": lambda: videoattn.enable_fast_attention(pipe, policy, backend="sdpa_masked"),
        "rehash": lambda: videoattn.enable_step_rehash(pipe, **EVEN, point=point),
    }
    for each in sorted(enable, key=lambda each: each != first):
        enable[each]()
    made = generate(name, pipe)
    assert rehash(pipe).reused and (made - expected).norm() <= 1e-3 * expected.norm()
    orders = {plan.call.order for plan in session_of(pipe.transformer).plans if plan.call.kind in ("full", "joint")}
    assert ("morton" in orders) == (point == "output")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_with_offload(kind, order, monkeypatch):
    """On one device only the hooks remain, in the order in which a GPU has them: around whole models and around blocks."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry, ModelHook

    class Moves(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs)

    pipe = euler_wan()
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate("wan", pipe)
    videoattn.disable(pipe)

    def offload():
        model = pipe.transformer
        if kind == "model":
            add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
        for module in [*model.blocks, model.proj_out]:
            if kind == "sequential":
                add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
            if kind == "group":
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Moves(), "moves")

    if order == "before":
        offload()
    videoattn.enable_step_rehash(pipe, **EVEN)
    if order == "after":
        offload()
    for _ in range(2):
        assert torch.equal(generate("wan", pipe), expected) and rehash(pipe).reused
    if kind != "group":
        for module in pipe.transformer.modules():
            remove_hook_from_module(module)
        assert torch.equal(generate("wan", pipe), expected) and rehash(pipe).reused
    videoattn.disable(pipe)
    assert rehash(pipe) is None


def test_with_compiled_blocks():
    """What is compiled stays so, left out or not, and nothing is compiled again."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    pipe = euler_wan()
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate("wan", pipe)
    for block in pipe.transformer.blocks:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(generate("wan", pipe), expected, rtol=1e-4, atol=1e-4)
    assert rehash(pipe).reused
    count = len(graphs)
    assert 1 <= count <= 2
    generate("wan", pipe)
    assert len(graphs) == count
    torch._dynamo.reset()


@pytest.mark.parametrize("point", ["first_block", "late_block"])
def test_with_compiled_blocks_at_other_points(point):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    name = "wan" if point == "first_block" else "text_to_video_sd"
    pipe = make(name, layers=3) if name == "wan" else make(name)
    videoattn.enable_step_rehash(pipe, **EVEN, point=point)
    expected = generate(name, pipe)
    blocks = pipe.transformer.blocks if name == "wan" else pipe.unet.up_blocks[:1]
    for block in blocks:
        block.compile(backend=backend)
    torch.testing.assert_close(generate(name, pipe), expected, rtol=1e-3, atol=1e-3)
    count = len(graphs)
    generate(name, pipe)
    assert len(graphs) == count and rehash(pipe).reused
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_denoiser_compiled_as_a_whole_runs_every_step(how):
    torch._dynamo.reset()
    pipe = euler_wan()
    full = generate("wan", pipe)
    videoattn.enable_step_rehash(pipe, **EVEN)
    if how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(generate("wan", pipe), full, rtol=1e-4, atol=1e-4)
    assert "every step runs: the denoiser is compiled as a whole" in report(pipe)
    torch._dynamo.reset()


def test_a_modular_pipeline():
    from diffusers.modular_pipelines import WanBlocks

    modular = WanBlocks().init_pipeline()
    modular.update_components(**make("wan").components)
    modular.set_progress_bar_config(disable=True)
    videoattn.enable_step_rehash(modular, **EVEN)
    size = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": STEPS, "max_sequence_length": 32}
    modular(prompt="a red cube", negative_prompt="blurry", output="latents", **size)
    assert len(ran(modular)) == 7 and len(rehash(modular).reused) == 5
    videoattn.disable(modular)
    assert rehash(modular) is None


def test_swapped_blocks_are_met(monkeypatch):
    """FreeNoise swaps the transformers inside of blocks; a user may swap a block."""
    pipe = videoattn.enable_step_rehash(euler_wan(), **EVEN)
    generate("wan", pipe)
    pipe.transformer.blocks[0] = copy.deepcopy(pipe.transformer.blocks[1])
    counted = Count(pipe.transformer.blocks[0], monkeypatch)
    generate("wan", pipe)
    assert counted.calls == 2 * 7


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wan", "animatediff"])
def test_with_models_that_come_to_the_gpu_for_their_calls(name):
    """`enable_model_cpu_offload` before rehash and after it: the latents of a pipeline that stays on the card."""
    pipe = make(name).to("cuda")
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate(name, pipe)
    for rehash_first in (False, True):
        pipe = make(name)
        enable = [pipe.enable_model_cpu_offload, lambda pipe=pipe: videoattn.enable_step_rehash(pipe, **EVEN)]
        for each in enable[::-1] if rehash_first else enable:
            each()
        made = generate(name, pipe)
        assert rehash(pipe).reused
        torch.testing.assert_close(made.cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)
