"""On every tiny pipeline: exact attention is exact, undoing it leaves nothing, and each layer is what its table says."""

import contextlib
import re

import pytest
import torch
from attention_kinds import EXPECTED
from diffusers import LTXConditionPipeline, WanVACETransformer3DModel
from tiny_parts import randomize
from tiny_pipelines import PIPELINES, build, denoisers, run
from torch.nn.attention import SDPBackend, sdpa_kernel

import videoattn
from videoattn.call import Grid
from videoattn.clock import Clock
from videoattn.pipelines.adapter import attention_modules
from videoattn.runner import Runner
from videoattn.session import session_of

# pipeline -> frames x height x width of its video tokens, by hand from sizes, VAE and patches
GRIDS = {
    "wan": (3, 3, 4),
    "wan22": (3, 3, 4),
    "wan22_ti2v": (3, 3, 4),
    "wan22_i2v": (3, 3, 4),
    "wan21_i2v": (3, 3, 4),
    "wan_v2v": (3, 3, 4),
    "skyreels_v2": (3, 3, 4),
    "hunyuan_video": (3, 6, 8),
    "hunyuan_video15": (3, 6, 8),
    "cogvideox": (3, 3, 4),
    "cogvideox_rope": (3, 3, 4),
    "ltx": (3, 4, 8),
    "ltx2": (3, 8, 16),
    "mochi": (3, 3, 4),
    "latte": (5, 4, 6),
    "allegro": (2, 3, 4),
    "cosmos": (3, 4, 6),
    "kandinsky5": (3, 3, 4),
    "animatediff": (5, 8, 12),
    "text_to_video_sd": (5, 8, 12),
    "svd": (5, 8, 12),
    "i2vgen_xl": (5, 8, 12),
}

# Padded keys are left out where the host gives them a weight of zero: the same terms, summed in another order. Every
# other pipeline runs the very same operations as the host.
REORDERED = {"hunyuan_video", "hunyuan_video15", "ltx"}


@pytest.fixture(params=PIPELINES, scope="module")
def tiny(request):
    return request.param, build(request.param)


def processors(pipe):
    return {
        (part, name): module.processor for part, model in denoisers(pipe) for name, module in attention_modules(model)
    }


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@contextlib.contextmanager
def enabled(pipe, *args, **kwargs):
    videoattn.enable_fast_attention(pipe, *args, **kwargs)
    try:
        yield
    finally:
        videoattn.disable(pipe)


def assert_exact(name, pipe, **kwargs):
    """Bit for bit, or within twice what another exact kernel of torch (plain products) moves the host's latents by."""
    host = run(name, pipe, **kwargs)
    with enabled(pipe, "exact"):
        ours = run(name, pipe, **kwargs)
    if name not in REORDERED:
        assert torch.equal(ours, host)
        return
    with sdpa_kernel(SDPBackend.MATH):
        floor = distance(run(name, pipe, **kwargs), host)
    assert 0 < floor < 0.05
    assert distance(ours, host) <= 2 * floor


def test_the_table_names_every_pipeline():
    assert sorted(EXPECTED) == sorted(PIPELINES)


def test_each_family_has_its_adapter(tiny):
    name, pipe = tiny
    adapter, _ = EXPECTED[name]
    with enabled(pipe, "exact"):
        for _, model in denoisers(pipe):
            session = session_of(model)
            assert session.adapter.name == adapter
            for patch in session.patches:
                # A token refiner is the text's, not the family's: it goes the generic way everywhere.
                assert patch.adapter == ("generic" if patch.site.kind == "text" else adapter)
                assert patch.refusal == ""


def test_kinds_are_as_the_table_says(tiny):
    name, pipe = tiny
    _, kinds = EXPECTED[name]
    with enabled(pipe, "exact"):
        for _, model in denoisers(pipe):
            sites = [patch.site for patch in session_of(model).patches]
            assert {re.sub(r"(?<=\.)\d+", "#", site.name): site.kind for site in sites} == kinds
            assert [site.name for site in sites] == [path for path, _ in attention_modules(model)]


def is_of_kind(kind, q_len, kv_len, grid):
    if kind == "cross":
        return q_len != kv_len
    frame = grid.height * grid.width
    lengths = {
        "full": {grid.tokens},
        "joint": range(grid.tokens + 1, 2 * grid.tokens),
        "spatial": {frame, frame // 4},  # UNets halve height and width once
        "temporal": {grid.frames},
        "text": range(1, 64),
        "audio": {5},
    }
    return q_len == kv_len and q_len in lengths[kind]


def test_kinds_and_grids_are_as_the_shapes_say(tiny, monkeypatch):
    """The table is written from module names; here each kind shows in what the calls attend to."""
    name, pipe = tiny
    grid = Grid(**dict(zip(("frames", "height", "width"), GRIDS[name], strict=True)))
    calls, grids = set(), set()
    attend, tick = Runner.__call__, Clock.tick

    def record(self, q, k, v, mask=None, kv_len=None, scale=None, layout="BNHD", causal=False, place=None):
        calls.add((self.kind, q.shape[layout.index("N")], k.shape[layout.index("N")]))
        return attend(self, q, k, v, mask, kv_len, scale, layout, causal)

    def record_grid(self, *args):
        step = tick(self, *args)
        grids.add(step.grid)
        return step

    monkeypatch.setattr(Runner, "__call__", record)
    monkeypatch.setattr(Clock, "tick", record_grid)
    with enabled(pipe, "exact"):
        run(name, pipe)
    kinds = set(EXPECTED[name][1].values())
    assert {kind for kind, _, _ in calls} == (kinds - {"cross"} if name == "svd" else kinds)  # SVD's have one key
    for call in calls:
        assert is_of_kind(*call, grid), call
    assert grids == {None if EXPECTED[name][0] == "generic" else grid}


def test_exact_mode_equals_the_host(tiny):
    assert_exact(*tiny)


def test_exact_mode_equals_the_host_where_rows_differ_in_length(tiny):
    """Two prompts: one is padded, the other is not."""
    assert_exact(*tiny, batch=2)


def test_disable_restores_the_very_objects_and_bits(tiny):
    name, pipe = tiny
    before, latents = processors(pipe), run(name, pipe)
    hooks = [dict(model._forward_pre_hooks) for _, model in denoisers(pipe)]
    with enabled(pipe, "balanced"):
        assert all(processor is not before[site] for site, processor in processors(pipe).items())
        run(name, pipe)
    assert all(processor is before[site] for site, processor in processors(pipe).items())
    assert [dict(model._forward_pre_hooks) for _, model in denoisers(pipe)] == hooks
    assert torch.equal(run(name, pipe), latents)


def test_enabling_twice_does_not_stack(tiny):
    name, pipe = tiny
    before = processors(pipe)
    with enabled(pipe, "balanced"):
        once = run(name, pipe)
        videoattn.enable_fast_attention(pipe, "exact")
        twice = run(name, pipe)
        for _, model in denoisers(pipe):
            assert session_of(model).policy.name == "exact"
            assert len(model._forward_pre_hooks) == 1
        assert {site: processor.host for site, processor in processors(pipe).items()} == before
    assert torch.equal(once, twice)
    assert processors(pipe) == before


def test_the_context_manager_leaves_what_was_before(tiny):
    _, pipe = tiny
    before = processors(pipe)
    with videoattn.fast_attention(pipe, "exact"):
        assert processors(pipe) != before
    assert processors(pipe) == before
    with enabled(pipe, "balanced"):
        outer = [session_of(model) for _, model in denoisers(pipe)]
        ours = processors(pipe)
        with videoattn.fast_attention(pipe, "exact") as sessions:
            assert [session_of(model) for _, model in denoisers(pipe)] == list(sessions)
            assert [session.policy.name for session in sessions] == ["exact"] * len(outer)
        assert [session_of(model) for _, model in denoisers(pipe)] == outer
        assert processors(pipe) == ours
    assert processors(pipe) == before


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15", "ltx"])
def test_padding_becomes_lengths(name):
    """The prompts of a batch differ in length: so do the rows, and no mask reaches the kernels of the video."""
    pipe = build(name)
    seen = []
    model = denoisers(pipe)[0][1]
    with enabled(pipe, "exact"):
        session = session_of(model)
        model.register_forward_hook(lambda *_: seen.append(session.patches[-1].ours.kv_len))
        run(name, pipe, batch=2)
        calls = [
            plan.call
            for patch in session.patches
            if patch.adapter == name
            for plan in patch.ours.run.plans.values()
            if patch.site.kind != "full"
        ]
    assert any(len(set(kv_len.tolist())) > 1 for kv_len in seen)
    assert {(call.has_kv_len, call.mask) for call in calls} == {(True, "none")}


@pytest.mark.parametrize(
    "name", ["wan21_i2v", "hunyuan_video", "hunyuan_video15", "cogvideox_rope", "ltx", "animatediff", "svd"]
)
def test_exact_mode_equals_the_host_in_bf16(name):
    """Own processors round where the host rounds."""
    pipe = build(name).to(torch.bfloat16)
    assert_exact(name, pipe)


@pytest.mark.parametrize("image", [False, True])
def test_wan_vace_equals_the_host(image):
    """Its control blocks attend like the others; no pipeline is needed to see it."""
    generator = torch.Generator().manual_seed(0)
    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        vace_layers=[0, 1],
        vace_in_channels=8,
        image_dim=16 if image else None,
        added_kv_proj_dim=24 if image else None,
    ).requires_grad_(False)
    randomize(model.eval(), generator)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 512, 16, generator=generator),
        "encoder_hidden_states_image": torch.randn(1, 5, 16, generator=generator) if image else None,
        "control_hidden_states": torch.randn(1, 8, 2, 8, 8, generator=generator),
    }
    host = model(**inputs, return_dict=False)[0]
    videoattn.enable_fast_attention(model, "exact")
    session = session_of(model)
    assert torch.equal(model(**inputs, return_dict=False)[0], host)
    assert {patch.site.name.split(".")[0] for patch in session.patches} == {"blocks", "vace_blocks"}
    assert {patch.adapter for patch in session.patches} == {"wan"}
    assert all(row.calls for row in videoattn.report(model).sites)


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_ltx_with_conditions_whose_tokens_are_not_one_video(preset):
    """Its pipeline passes coordinates in place of sizes, and other tokens in front: the grid is not known."""
    made = build("ltx")
    parts = {name: getattr(made, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    pipe = LTXConditionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt="a cat", negative_prompt="a dog", generator=generator, **sizes).frames

    host = latents()
    videoattn.enable_fast_attention(pipe, preset)
    torch.testing.assert_close(latents(), host, rtol=1e-4, atol=1e-4)  # padded text is left out: other sums
    assert not any(plan.call.tokens for plan in session_of(pipe.transformer).plans)
