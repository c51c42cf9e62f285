"""The clock reads step, total, branch and generation off any pipeline, and an aborted generation leaves nothing behind."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import PIPELINES, build, denoisers, run

import videoattn
from videoattn.clock import Clock
from videoattn.session import session_of

ONE_CALL_A_STEP = {  # guidance by an embedding, or both branches in one batch
    "hunyuan_video",
    "cogvideox",
    "cogvideox_rope",
    "ltx",
    "mochi",
    "latte",
    "allegro",
    "animatediff",
    "text_to_video_sd",
    "svd",
    "i2vgen_xl",
}
THREE_CALLS_A_STEP = {"ltx2"}  # one more for spatio-temporal guidance, one for guidance between picture and sound
SECOND_DENOISER_FROM = {"wan22": 1, "wan22_i2v": 1}  # step


def expected(name):
    """(denoiser, index, branch) of every call of a generation of two steps, and the schedule's length."""
    branches = 1 if name in ONE_CALL_A_STEP else 3 if name in THREE_CALLS_A_STEP else 2
    skipped = PIPELINES[name].skipped_steps  # video to video begins later in the schedule
    calls = [
        (int(index >= SECOND_DENOISER_FROM.get(name, 9)), index + skipped, str(branch))
        for index in range(2)
        for branch in range(branches)
    ]
    return calls, 2 + skipped


@pytest.fixture
def record(monkeypatch):
    """Every Step that any clock tells, as (number of the clock, Step)."""
    steps, clocks = [], {}
    tick = Clock.tick

    def recording(self, *args):
        step = tick(self, *args)
        steps.append((clocks.setdefault(self, len(clocks)), step))
        return step

    monkeypatch.setattr(Clock, "tick", recording)
    return steps


@pytest.fixture(params=PIPELINES, scope="module")
def tiny(request):
    return request.param, build(request.param)


def test_every_call_of_two_generations_is_told_apart(tiny, record):
    name, pipe = tiny
    videoattn.enable_fast_attention(pipe, "exact")
    run(name, pipe)
    run(name, pipe)
    videoattn.disable(pipe)
    calls, total = expected(name)
    assert [(clock, step.index, step.branch) for clock, step in record] == calls * 2
    assert [step.generation for _, step in record] == [0] * len(calls) + [1] * len(calls)
    assert {step.total for _, step in record} == {total}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video15", "latte", "svd"])
def test_an_aborted_generation_leaves_nothing_behind(name, error, record):
    fresh = run(name, videoattn.enable_fast_attention(build(name), "exact"))
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    record.clear()

    def abort(module, args, output):
        if len(record) == 2:
            raise error("stopped in the middle")

    site = session_of(denoisers(pipe)[0][1]).patches[-1].attn
    handle = site.register_forward_hook(abort)
    with pytest.raises(error, match="stopped in the middle"):
        run(name, pipe)
    handle.remove()
    assert len(record) == 2
    record.clear()

    assert torch.equal(run(name, pipe), fresh)
    calls, total = expected(name)
    assert [(step.index, step.branch) for _, step in record] == [call[1:] for call in calls]
    assert {(step.generation, step.total) for _, step in record} == {(1, total)}


def test_the_scheduler_may_be_exchanged(record):
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    run("wan", pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    run("wan", pipe, num_inference_steps=3)
    steps = [step for _, step in record]
    assert [step.index for step in steps] == [0, 0, 1, 1] + [0, 0, 1, 1, 2, 2]
    assert [step.generation for step in steps] == [0] * 4 + [1] * 6


def test_a_bare_denoiser_has_no_schedule(record):
    pipe = build("wan")
    videoattn.enable_fast_attention(pipe.transformer, "exact")
    run("wan", pipe)
    assert [(step.generation, step.index, step.total) for _, step in record] == [(i, 0, 0) for i in range(4)]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),  # does not count its steps
        EulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("given", ["view", "copy", "half"])
def test_each_kind_of_scheduler_is_read(scheduler, given):
    """Whether the denoiser is given the schedule's own timestep, or a copy of it."""
    scheduler.set_timesteps(4)
    clock = Clock()
    sample = torch.randn(1, 4, 2, 2)
    found = []
    for t in scheduler.timesteps:
        timestep = {"view": t.expand(2), "copy": t.clone(), "half": t.to(torch.bfloat16)}[given]
        found += [clock.tick(scheduler, timestep, None) for _ in range(2)]
        sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
    assert [(step.index, step.branch) for step in found] == [(i, b) for i in range(4) for b in "01"]
    assert {(step.generation, step.total) for step in found} == {(0, 4)}


def test_both_evaluations_of_a_second_order_step_are_steps():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    clock, sample, found = Clock(), torch.randn(1, 4, 2, 2), []
    for t in scheduler.timesteps:
        found.append(clock.tick(scheduler, t, None))
        sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
    assert [(step.index, step.branch) for step in found] == [(i, "0") for i in range(len(scheduler.timesteps))]


def test_a_later_start_is_read_before_the_scheduler_counts():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert Clock().tick(scheduler, torch.tensor([500.0]), None).index == 2
