"""Every way in which step rehash can go wrong: it refuses, or runs every step and says so, and nothing stale survives."""

import copy

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from tiny_rehash import EVEN, STEPS, Abort, abort_at, euler_wan, generate, make, ran, rehash, report

import videoattn

# --- wrong use ---


def test_a_bare_denoiser_has_no_steps():
    model = make("wan").transformer
    with pytest.raises(
        ValueError, match="step rehash: wanted a pipeline, whose scheduler tells the steps, got WanTransf"
    ):
        videoattn.enable_step_rehash(model, steps=7)
    assert not model._forward_pre_hooks


def test_an_unknown_denoiser():
    pipe = make("wan")
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="of Linear it is not known what a step can leave out"):
        videoattn.enable_step_rehash(pipe, steps=7)


def test_wrong_settings_leave_what_was_enabled():
    pipe = videoattn.enable_step_rehash(make("wan"), **EVEN)
    before = rehash(pipe)
    with pytest.raises(ValueError, match="mode: wanted one of"):
        videoattn.enable_step_rehash(pipe, steps=7, mode="more")
    assert rehash(pipe) is before
    videoattn.enable_step_rehash(pipe, steps=8)
    assert rehash(pipe) is not before and len(pipe.transformer._forward_pre_hooks) == 1


# --- generations that run in full, and say so ---


def served_in_full(name, pipe, why, **options):
    expected = generate(name, copy.deepcopy(pipe), **options)
    videoattn.enable_step_rehash(pipe, **EVEN)
    assert torch.equal(generate(name, pipe, **options), expected)
    assert not rehash(pipe).reused and why in report(pipe)


def test_eight_steps_or_fewer():
    served_in_full("wan", make("wan"), "every step runs: wanted a sampler of at least 9 steps, got 8", steps=8)


def test_as_many_steps_as_the_sampler_has():
    pipe = make("wan")
    videoattn.enable_step_rehash(pipe, steps=9, keys="uniform", mode="extrapolate")
    generate("wan", pipe, steps=9)
    assert len(ran(pipe)) == 9 and "wanted 9 steps to run, and the sampler has 9" in report(pipe)


def test_two_calls_a_step():
    served_in_full("wan", make("wan", scheduler=FlowMatchHeunDiscreteScheduler()), "calls the network 2 times a step")


def test_a_cache_of_the_host():
    from diffusers import FirstBlockCacheConfig

    pipe = make("wan", layers=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    videoattn.enable_step_rehash(pipe, **EVEN)
    generate("wan", pipe)
    assert "every step runs: a cache of diffusers is enabled" in report(pipe)


def test_noisy_samplers_are_served_but_not_corrected():
    pipe = make("animatediff")
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    videoattn.enable_step_rehash(pipe, steps=7)
    for _ in range(2):
        generate("animatediff", pipe)
    assert len(ran(pipe)) == 7 and "nothing is corrected: the scheduler draws noise" in report(pipe)


# --- nothing stale survives ---


@pytest.mark.parametrize("name", ["wan", "animatediff"])
@pytest.mark.parametrize("step", [0, 6])
def test_after_an_aborted_generation(name, step):
    pipe = make(name)
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate(name, pipe)
    with pytest.raises(Abort):
        generate(name, pipe, seed=1, callback_on_step_end=abort_at(step))
    assert torch.equal(generate(name, pipe), expected)


@pytest.mark.parametrize("step", [2, 3])
def test_after_an_exception_inside_of_a_call(step, monkeypatch):
    """In a step that runs and in one that is reused: nothing of ours is left on a module."""
    pipe = euler_wan()
    videoattn.enable_step_rehash(pipe, **EVEN)
    expected = generate("wan", pipe)
    forward = type(pipe.transformer.norm_out).forward

    def fails(own, *args):
        if (pipe.scheduler.step_index or 0) == step and own is pipe.transformer.norm_out:
            raise Abort
        return forward(own, *args)

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.transformer.norm_out), "forward", fails)
        with pytest.raises(Abort):
            generate("wan", pipe)
    assert not any("forward" in vars(module) or module._forward_hooks for module in pipe.transformer.blocks.modules())
    assert "forward" not in vars(pipe.transformer.proj_out) and not pipe.transformer.proj_out._forward_hooks
    assert torch.equal(generate("wan", pipe), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("wan", change) for change in ("steps", "size", "batch", "scheduler", "seed")),
        *(("text_to_video_sd", change) for change in ("steps", "size", "scheduler")),
    ],
)
def test_a_change_between_generations(name, change):
    """The same as from a pipeline that has never seen another generation."""

    def options(changed):
        return {
            "steps": {"steps": STEPS + 2 * changed},
            "size": {"height": 48 + 16 * changed} if name == "wan" else {"height": 16 + 16 * changed, "width": 16},
            "batch": {"batch": 1 + changed},
            "seed": {"seed": int(changed)},
        }.get(change, {})

    def settle(pipe, changed):
        if change == "scheduler" and changed:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return pipe

    fresh = settle(videoattn.enable_step_rehash(make(name), **EVEN), True)
    expected = generate(name, fresh, **options(True))
    pipe = videoattn.enable_step_rehash(make(name), **EVEN)
    generate(name, pipe, **options(False))
    settle(pipe, True)
    assert torch.equal(generate(name, pipe, **options(True)), expected)
    assert rehash(pipe).reused


def test_a_change_of_steps_needs_a_calibration_of_its_own(tmp_path):
    pipe = videoattn.enable_step_rehash(euler_wan(), steps=7, calibration=tmp_path / "c.toml")
    counts = []
    for steps in (12, 12, 14, 14, 12):
        generate("wan", pipe, steps=steps)
        counts.append(len(ran(pipe)))
    assert counts == [12, 7, 14, 7, 7]


def test_an_aborted_generation_does_not_calibrate():
    pipe = videoattn.enable_step_rehash(euler_wan(), steps=7)
    with pytest.raises(Abort):
        generate("wan", pipe, callback_on_step_end=abort_at(8))
    generate("wan", pipe)
    assert len(ran(pipe)) == STEPS
    generate("wan", pipe)
    assert len(ran(pipe)) == 7


def test_two_videos_at_once():
    """Each as by itself, where calibration does not mix them."""
    pipe = videoattn.enable_step_rehash(euler_wan(), **EVEN)
    both = [torch.Generator().manual_seed(seed) for seed in range(2)]
    made = generate("wan", pipe, batch=2, generator=both)
    alone = generate("wan", pipe, batch=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[:1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_guidance_that_ends_midway(at):
    """The branch that is left goes on; one that comes back has no past of now."""
    pipe = euler_wan()

    def switched(on_again):
        def callback(pipe, index, t, kwargs):
            pipe._guidance_scale = 1.0 if at <= index < on_again else 6.0
            return {}

        return callback

    videoattn.enable_step_rehash(pipe, **EVEN)
    for on_again in (99, at + 4):
        made = generate("wan", pipe, callback_on_step_end=switched(on_again))
        assert made.isfinite().all()
        again = generate("wan", pipe, callback_on_step_end=switched(on_again))
        assert torch.equal(made, again)
    if at == 3:  # and not on again only where all branches run
        assert rehash(pipe).missing
        assert "more steps ran than asked for: a branch had no past of its own" in report(pipe)


def test_two_denoisers_each_with_its_own_past():
    pipe = make("wan22")
    full = generate("wan22", pipe)
    videoattn.enable_step_rehash(pipe, steps=7)
    assert torch.equal(generate("wan22", pipe), full)
    near = generate("wan22", pipe)
    first, second = rehash(pipe, 0), rehash(pipe, 1)
    assert first.ran | first.reused | second.ran | second.reused == set(range(STEPS))
    assert not (first.ran | first.reused) & (second.ran | second.reused)
    assert first.reused and second.reused and min(second.ran) == min(second.ran | second.reused)
    assert (near - full).norm() < 0.5 * full.norm()


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("name", ["wan", "animatediff"])
@pytest.mark.parametrize("own", [False, True], ids=["shared scheduler", "own scheduler"])
def test_a_pipeline_that_shares_the_denoiser(name, step, own):
    """It runs in full or is served, but whatever the other has left changes nothing."""
    pipe = make(name)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    if own:
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    videoattn.enable_step_rehash(pipe, **EVEN)
    served = generate(name, pipe, steps=9)
    made = []
    for seed in (1, 2):
        with pytest.raises(Abort):
            generate(name, pipe, seed=seed, steps=9, callback_on_step_end=abort_at(step))
        made.append(generate(name, other, steps=9))
    assert torch.equal(*made)
    assert torch.equal(generate(name, pipe, steps=9), served)


def test_from_pipe():
    pipe = make("wan")
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    fresh = videoattn.enable_step_rehash(make("wan_v2v"), **EVEN)
    expected = generate("wan_v2v", fresh)
    videoattn.enable_step_rehash(pipe, **EVEN)
    first = generate("wan", pipe)
    assert isinstance(pipe, WanPipeline)
    generate("wan_v2v", other)
    videoattn.enable_step_rehash(other, **EVEN)
    assert torch.equal(generate("wan_v2v", other), expected)
    videoattn.enable_step_rehash(pipe, **EVEN)
    assert torch.equal(generate("wan", pipe), first)


def test_a_copy_generates_by_itself():
    pipe = videoattn.enable_step_rehash(euler_wan(), **EVEN)
    expected = generate("wan", pipe)
    copied = copy.deepcopy(pipe)
    assert rehash(copied) is not rehash(pipe)
    assert torch.equal(generate("wan", copied), expected)
    videoattn.disable(copied)
    assert rehash(pipe) is not None


def test_a_pipeline_saved_while_enabled(tmp_path):
    pipe = videoattn.enable_step_rehash(euler_wan(), **EVEN)
    generate("wan", pipe)
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert rehash(again) is None
