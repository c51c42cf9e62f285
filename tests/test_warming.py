"""One step of the pipeline itself makes every plan that a generation needs, and leaves nothing else behind."""

import copy
import functools

import pytest
import torch
from tiny_pipelines import PIPELINES, build, denoisers, inputs, run

import videoattn
from videoattn.runner import Runner
from videoattn.session import session_of

OF_THE_SIGNATURE = ("height", "width", "num_frames", "prompt")


def call_of(name, pipe):
    """What a user hands over before the generation that `run` makes: its arguments without seed, steps and output."""
    given = inputs(name, pipe)
    for argument in ("num_inference_steps", "output_type", "generator"):
        del given[argument]
    given["num_frames"] = given.pop("video_length", given.get("num_frames"))
    named = {argument: given.pop(argument) for argument in OF_THE_SIGNATURE if argument in given}
    return {**named, "arguments": given}


def plans(pipe):
    return [
        (session.model_name, key)
        for _, model in denoisers(pipe)
        for session in [session_of(model)]
        for runner in session._runners.values()
        for key in runner.plans
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_no_plan_is_left_for_the_first_generation(name):
    untouched = run(name, build(name))
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    scheduler, state = pipe.scheduler, copy.deepcopy(vars(pipe.scheduler))
    finite = []
    for _, model in denoisers(pipe):
        model.register_forward_pre_hook(
            lambda _, args, kwargs: finite.extend(
                bool(x.isfinite().all()) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)
            ),
            with_kwargs=True,
        )
    random = torch.get_rng_state()

    assert videoattn.warmup(pipe, **call_of(name, pipe)) > 0

    assert torch.equal(torch.get_rng_state(), random)
    assert pipe.scheduler is scheduler and vars(scheduler).keys() == state.keys()
    assert all(_same(vars(scheduler)[key], state[key]) for key in state)
    assert finite and all(finite)  # else kernels would be blamed for it
    made = plans(pipe)
    assert made
    latents = run(name, pipe)
    assert plans(pipe) == made
    cold = videoattn.enable_fast_attention(build(name), "exact")
    assert torch.equal(latents, run(name, cold))
    torch.testing.assert_close(latents, untouched, atol=1e-3, rtol=1e-3)


def _same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else str(one) == str(other)


def test_sizes_and_prompt_may_be_left_to_the_pipeline(monkeypatch):
    pipe = videoattn.enable_fast_attention(build("text_to_video_sd"), "exact")
    asked = []
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", _recording(call, asked))
    videoattn.warmup(pipe, num_frames=5, arguments={"height": 16, "width": 24})
    ((given),) = asked
    assert given["prompt"] == "" and (given["height"], given["num_inference_steps"]) == (16, 2)
    assert "negative_prompt" not in given and isinstance(given["generator"], torch.Generator)


def _recording(call, asked):
    @functools.wraps(call)
    def recording(self, **arguments):
        asked.append(arguments)
        return call(self, **arguments)

    return recording


def test_steps_are_added_until_every_denoiser_is_reached(monkeypatch):
    """With this boundary the low-noise denoiser takes the last of four steps, and none of two."""
    pipe = videoattn.enable_fast_attention(build("wan22"), "exact")
    pipe.register_to_config(boundary_ratio=0.6)
    videoattn.warmup(pipe, **call_of("wan22", pipe))
    calls = [session_of(model).clock.calls for _, model in denoisers(pipe)]
    assert calls == [2 * (2 + 3), 2]  # with and without the prompt: two steps, then four


@pytest.mark.parametrize(("name", "calls"), [("wan", 2), ("mochi", 1), ("ltx", 1), ("svd", 2)])
def test_it_stops_after_the_first_step_where_the_pipeline_can(name, calls):
    """SVD cannot; Wan calls its denoiser with and without the prompt."""
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    videoattn.warmup(pipe, **call_of(name, pipe))
    assert videoattn.report(pipe).denoiser_calls == calls


def test_a_denoiser_out_of_reach_is_named():
    pipe = videoattn.enable_fast_attention(build("wan22"), "exact")
    pipe.register_to_config(boundary_ratio=0.0)
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="wanted every denoiser called, got none of WanTransformer3DModel in 8 steps"):
        videoattn.warmup(pipe, **call_of("wan22", pipe))
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "x.png"}, "wanted what WanPipeline takes .*prompt.*, got image"),
        ({"output_type": "np"}, "wanted no output_type, which it sets itself"),
        ({"num_inference_steps": 4}, "wanted no num_inference_steps, which it sets itself"),
    ],
)
def test_arguments_are_looked_at_before_anything_runs(change, message):
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    with pytest.raises(ValueError, match=message):
        videoattn.warmup(pipe, 48, 64, 9, arguments=change)
    assert not plans(pipe)


def test_only_a_pipeline_that_was_enabled_warms_up():
    pipe = build("wan")
    with pytest.raises(ValueError, match="warmup: wanted a pipeline with fast attention enabled, got an untouched Wan"):
        videoattn.warmup(pipe, 48, 64, 9)
    for bare in (videoattn.enable_fast_attention(pipe.transformer), object()):
        with pytest.raises(TypeError, match="warmup: wanted a diffusers pipeline"):
            videoattn.warmup(bare, 48, 64, 9)


def test_what_goes_wrong_in_the_pipeline_is_told_and_the_scheduler_comes_back(monkeypatch):
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="divisible by 16"):
        videoattn.warmup(pipe, 47, 64, 9)
    assert pipe.scheduler is scheduler


def test_seconds_of_planning_are_in_the_report(monkeypatch):
    plan = Runner._plan

    def slow(self, *args):
        made = plan(self, *args)
        clock[0] += 2.0
        return made

    clock = [0.0]
    monkeypatch.setattr("videoattn.runner.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Runner, "_plan", slow)
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    run("wan", pipe)
    report = videoattn.report(pipe)
    count = len(plans(pipe))
    assert count > 1 and report.planning_seconds == 2.0 * count
    assert f"{2 * count}.0 s went into plans" in str(report)
    run("wan", pipe)
    assert videoattn.report(pipe).planning_seconds == 2.0 * count
