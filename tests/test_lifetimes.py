"""Pipelines that are saved, copied, pickled, shared or dropped, bare denoisers and modular pipelines."""

import copy
import gc
import io
import weakref

import pytest
import torch
from diffusers import (
    WanVideoToVideoPipeline,
)
from diffusers.modular_pipelines import WanBlocks
from served import assert_served, assert_undone, distance, wan_call
from tiny_pipelines import build, denoisers, load, run

import videoattn
from videoattn.session import session_of


def test_saving_leaves_no_trace(tmp_path):
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    keys = list(build("wan").transformer.state_dict())
    run("wan", pipe)
    assert list(pipe.transformer.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    loaded = load("wan", tmp_path)
    assert_undone(loaded)
    videoattn.enable_fast_attention(loaded, "exact")
    assert distance(run("wan", loaded), run("wan", pipe)) < 1e-4
    assert_served(loaded)


@pytest.mark.parametrize("name", ["wan22", "hunyuan_video", "latte"])
def test_a_copy_is_a_session_of_its_own(name):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    latents = run(name, pipe)
    twin = copy.deepcopy(pipe)
    calls = [row.calls for row in videoattn.report(pipe).sites]
    assert torch.equal(run(name, twin), latents)
    assert [row.calls for row in videoattn.report(twin).sites] == calls
    assert [row.calls for row in videoattn.report(pipe).sites] == calls
    assert videoattn.report(twin).generations == 2  # it reads the copy's scheduler
    videoattn.disable(twin)
    assert_undone(twin)
    assert torch.equal(run(name, pipe), latents)
    assert_served(pipe)


def test_a_denoiser_may_be_pickled_while_enabled():
    pipe = videoattn.enable_fast_attention(build("hunyuan_video"), "exact")
    latents = run("hunyuan_video", pipe)
    file = io.BytesIO()
    torch.save(pipe.transformer, file)
    file.seek(0)
    pipe.transformer = torch.load(file, weights_only=False)
    assert torch.equal(run("hunyuan_video", pipe), latents)
    assert_served(pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_pipelines_that_share_a_denoiser_share_its_session():
    first = videoattn.enable_fast_attention(build("wan"), "exact")
    second = WanVideoToVideoPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    assert second.transformer is first.transformer
    ours = run("wan_v2v", second)
    assert_served(second)
    videoattn.disable(second)
    assert_undone(first)
    assert torch.equal(run("wan_v2v", second), ours)


def test_each_of_two_denoisers_has_a_session():
    pipe = videoattn.enable_fast_attention(build("wan22"), "exact")
    sessions = [session_of(model) for model in (pipe.transformer, pipe.transformer_2)]
    assert None not in sessions and sessions[0] is not sessions[1]
    run("wan22", pipe)
    report = videoattn.report(pipe)
    assert len(report.sites) == 8
    assert report.denoiser_calls == 4
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_a_modular_pipeline():
    """It is no DiffusionPipeline, and its Wan sets no cache_context."""
    host = build("wan")
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(**host.components)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(
            prompt="a red cube",
            negative_prompt="blurry",
            height=48,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output="latents",
            max_sequence_length=32,
        )

    latents = generate()
    assert videoattn.enable_fast_attention(pipe, "exact") is pipe
    assert torch.equal(generate(), latents)
    report = videoattn.report(pipe)
    assert (report.generations, report.denoiser_calls) == (1, 4)
    assert all(row.calls for row in report.sites)
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_a_bare_denoiser():
    model = build("wan").transformer
    with torch.no_grad():
        host = model(**wan_call())[0]
        assert videoattn.enable_fast_attention(model, "exact") is model
        assert torch.equal(model(**wan_call())[0], host)
    assert videoattn.report(model).denoiser_calls == 1
    assert videoattn.disable(model) is model
    assert session_of(model) is None


def test_arguments_may_be_positional():
    model = build("wan").transformer
    call = wan_call()
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact")
        assert torch.equal(model(*(call[name] for name in names), return_dict=False)[0], host)
    assert session_of(model).patches[0].ours.run.plans


@pytest.mark.parametrize("name", ["latte", "svd"])
def test_no_cycle_of_ours_keeps_weights_alive(name):
    """Freed by reference counting alone, as without us: a DiT of diffusers is in a cycle with its own hook registry."""

    def alive(enabled):
        pipe = build(name)
        _, model = denoisers(pipe)[0]
        references = [weakref.ref(x) for x in (pipe, model)]
        if enabled:
            videoattn.enable_fast_attention(pipe, "exact")
            session = weakref.ref(session_of(model))
        run(name, pipe)
        if enabled:
            videoattn.disable(pipe)
            assert session() is None
        del pipe, model
        return [reference() is not None for reference in references]

    gc.collect()
    gc.disable()
    try:
        assert alive(enabled=True) == alive(enabled=False)
    finally:
        gc.enable()
