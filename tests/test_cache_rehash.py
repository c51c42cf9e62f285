"""Step rehash as a user calls it: which steps run, and what comes out."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from tiny_pipelines import PIPELINES, denoisers, inputs
from tiny_rehash import EVEN, STEPS, Count, euler_wan, generate, make, ran, rehash, report

import videoattn
from videoattn.caches import families
from videoattn.caches.session import rehash_of

SERVED = tuple(PIPELINES)
FIRST_BLOCK = (
    "wan",
    "hunyuan_video",
    "hunyuan_video15",
    "cogvideox",
    "ltx",
    "ltx2",
    "mochi",
    "allegro",
    "cosmos",
    "kandinsky5",
)
LATE_BLOCK = ("animatediff", "svd", "text_to_video_sd", "i2vgen_xl")


# --- what runs, and what comes out ---


@pytest.mark.parametrize("name", SERVED)
def test_every_family(name):
    """Some steps run, others do not; the video is near, and disabling brings the same bits and no trace."""
    pipe = make(name)
    full = generate(name, pipe, steps=9)
    models = [model for _, model in denoisers(pipe)]
    keys = [list(model.state_dict()) for model in models]
    assert videoattn.enable_step_rehash(pipe, **EVEN) is pipe
    near = generate(name, pipe, steps=9)
    for model in models:
        assert rehash_of(model).reused and not rehash_of(model).why_full
        assert rehash_of(model).held > 0
    assert 0 < (near - full).norm() < 0.8 * full.norm() and near.isfinite().all()
    assert [list(model.state_dict()) for model in models] == keys
    for model in models:
        assert not any("forward" in vars(module) for module in model.modules())
    assert videoattn.disable_step_rehash(pipe) is pipe
    assert all(not (model._forward_pre_hooks or model._forward_hooks) for model in models)
    assert torch.equal(generate(name, pipe, steps=9), full)


def test_blocks_run_at_key_steps_only(monkeypatch):
    pipe = euler_wan()
    counted = Count(pipe.transformer.blocks[1], monkeypatch)
    videoattn.enable_step_rehash(pipe, **EVEN)
    generate("wan", pipe)
    assert ran(pipe) == [0, 2, 4, 6, 7, 9, 11]
    assert counted.calls == 2 * 7  # branches of guidance


def test_the_very_steps_that_are_named():
    pipe = videoattn.enable_step_rehash(euler_wan(), steps=[0, 1, 5, 8], mode="hold")
    generate("wan", pipe)
    assert ran(pipe) == [0, 1, 5, 8, STEPS - 1]


def coarse(name, pipe, keys):
    """The plain sampler that knows only some of the steps."""
    scheduler = pipe.scheduler
    plain = type(scheduler).set_timesteps

    def set_timesteps(*args, **kwargs):
        plain(scheduler, *args, **kwargs)
        sigmas = scheduler.sigmas[:-1][keys]
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[keys], torch.cat([sigmas, scheduler.sigmas[-1:]])

    scheduler.set_timesteps = set_timesteps
    made = generate(name, pipe)
    del scheduler.set_timesteps
    return made


def test_a_held_output_with_flow_euler_is_the_sampler_of_fewer_steps():
    pipe = euler_wan()
    videoattn.enable_step_rehash(pipe, steps=7, keys="uniform", mode="hold")
    held = generate("wan", pipe)
    keys = ran(pipe)
    videoattn.disable(pipe)
    torch.testing.assert_close(held, coarse("wan", pipe, keys), rtol=1e-4, atol=1e-4)


class CoarseDDIM(DDIMScheduler):
    """DDIM from one timestep of a list to the next of it."""

    keys = None

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[self.keys]

    def step(self, model_output, timestep, sample, **kwargs):
        index = int((self.timesteps == timestep).nonzero())
        now = self.alphas_cumprod[timestep]
        then = (
            self.alphas_cumprod[self.timesteps[index + 1]]
            if index + 1 < len(self.timesteps)
            else self.final_alpha_cumprod
        )
        clean = (sample - (1 - now).sqrt() * model_output) / now.sqrt()
        return DDIMSchedulerOutput(prev_sample=then.sqrt() * clean + (1 - then).sqrt() * model_output)


def test_a_held_output_with_ddim_is_the_sampler_of_fewer_steps():
    pipe = make("text_to_video_sd")
    config = dict(pipe.scheduler.config)
    videoattn.enable_step_rehash(pipe, steps=7, keys="uniform", mode="hold")
    held = generate("text_to_video_sd", pipe)
    keys = ran(pipe)
    videoattn.disable(pipe)
    pipe.scheduler = CoarseDDIM.from_config(config)
    pipe.scheduler.keys = keys
    torch.testing.assert_close(held, generate("text_to_video_sd", pipe), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("mode", "degree"), [("hold", 0), ("extrapolate", 1), ("extrapolate2", 2)])
@pytest.mark.parametrize("name", ["wan", "text_to_video_sd"])
def test_exact_where_outputs_are_polynomials(name, mode, degree, monkeypatch):
    """Of the scheduler's coordinate: what is reused is then what would have been computed."""
    pipe = euler_wan() if name == "wan" else make(name)
    model = denoisers(pipe)[0][1]
    last = model.proj_out if name == "wan" else model.conv_out
    forward = type(last).forward

    def polynomial(own, x):
        if own is not last:
            return forward(own, x)
        scheduler = pipe.scheduler
        at = scheduler.sigmas[scheduler.step_index or 0] if name == "wan" else pipe.now / 1000
        return torch.ones_like(forward(own, x)) * (0.3 - at + 0.7 * at**2 if degree == 2 else 0.3 - degree * at)

    monkeypatch.setattr(type(last), "forward", polynomial)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(pipe, "now", args[1]) if len(args) > 1 else None, with_kwargs=True
    )
    full = generate(name, pipe)
    videoattn.enable_step_rehash(pipe, steps=8, keys="uniform", mode=mode)
    if degree == 2:  # with less than three steps behind it a step is no parabola
        monkeypatch.setattr("videoattn.caches.keysteps.uniform", lambda total, count: [0, 1, 2, 4, 6, 8, 9, total - 1])
    elif degree == 1:
        monkeypatch.setattr("videoattn.caches.keysteps.uniform", lambda total, count: [0, 1, 3, 5, 8, 9, total - 1])
    near = generate(name, pipe)
    assert rehash(pipe).reused
    torch.testing.assert_close(near, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler_wan", "svd", "cogvideox"])
def test_the_default_is_nearer_than_even_steps_held(name, tmp_path):
    """It calibrates in a first generation, which runs in full, bit for bit."""
    pipe = euler_wan() if name == "euler_wan" else make(name)
    name = name.removeprefix("euler_")
    full, path = generate(name, pipe), tmp_path / "calibration.toml"
    videoattn.enable_step_rehash(pipe, steps=7, calibration=path)
    assert torch.equal(generate(name, pipe), full)
    assert len(ran(pipe)) == STEPS and "all 12 steps ran, to see how alike they are" in report(pipe)
    best = generate(name, pipe)
    assert len(ran(pipe)) == 7 and "7 of 12 steps ran, 5 reused" in report(pipe)
    videoattn.enable_step_rehash(pipe, steps=7, keys="uniform", mode="hold")
    held = generate(name, pipe)
    assert (best - full).norm() < 0.9 * (held - full).norm()


def test_the_default_with_a_multistep_sampler():
    """Guesses go wrong there; see docs/rehash.md."""
    pipe = videoattn.enable_step_rehash(make("wan"), steps=7)
    for _ in range(2):
        generate("wan", pipe)
    assert "steps 7, keys by similarity, hold at output" in report(pipe)
    assert "the sampler is a multistep one, where guesses went far wrong on single videos" in report(pipe)


@pytest.mark.parametrize(
    "options", [{"mode": "fit"}, {"mode": "hold"}, {"mode": "extrapolate"}, {"keys": "similarity"}]
)
def test_other_choices_read_the_calibration_of_the_first(options, tmp_path):
    pipe, path = euler_wan(), tmp_path / "calibration.toml"
    videoattn.enable_step_rehash(pipe, steps=7, calibration=path)
    full = generate("wan", pipe)
    assert path.exists()
    videoattn.enable_step_rehash(pipe, steps=7, calibration=path, **options)
    assert not torch.equal(generate("wan", pipe), full)
    assert len(ran(pipe)) == 7


def test_similarity(tmp_path):
    pipe, path = euler_wan(), tmp_path / "calibration.toml"
    counts = []
    for least in (0.5, 0.99, 0.9999999):
        videoattn.enable_step_rehash(pipe, similarity=least, calibration=str(path))
        if not counts:
            generate("wan", pipe)
        generate("wan", pipe)
        counts.append(len(ran(pipe)))
    assert counts == sorted(counts) and counts[0] < counts[-1]


# --- points other than the output ---


@pytest.mark.parametrize("name", LATE_BLOCK)
def test_late_block(name, monkeypatch):
    pipe = make(name)
    full = generate(name, pipe, steps=9)
    first, middle = Count(pipe.unet.up_blocks[-1], monkeypatch), Count(pipe.unet.mid_block, monkeypatch)
    videoattn.enable_step_rehash(pipe, **EVEN, point="late_block")
    near = generate(name, pipe, steps=9)
    assert first.calls > middle.calls > 0
    assert 0 < (near - full).norm() < 0.5 * full.norm()
    with pytest.raises(ValueError, match="UNet.* do not add to the same tensors"):
        videoattn.enable_step_rehash(pipe, **EVEN, point="first_block")


@pytest.mark.parametrize("name", FIRST_BLOCK)
def test_first_block(name, monkeypatch):
    pipe = make(name, layers=3)
    full = generate(name, pipe)
    (first, _), *_, (last, _) = families.blocks(pipe.transformer, families.family_of(pipe.transformer))
    first, last = Count(first, monkeypatch), Count(last, monkeypatch)
    videoattn.enable_step_rehash(pipe, **EVEN, point="first_block")
    near = generate(name, pipe)
    assert first.calls > last.calls > 0
    assert 0 < (near - full).norm() < 0.8 * full.norm()
    with pytest.raises(ValueError, match="is no UNet with two up blocks"):
        videoattn.enable_step_rehash(pipe, **EVEN, point="late_block")


def test_a_held_residual_of_blocks_that_see_nothing_new_is_exact(monkeypatch):
    """Blocks that all add a constant: whenever they are left out, the same comes out."""
    pipe = make("wan", layers=3, scheduler=FlowMatchEulerDiscreteScheduler())
    monkeypatch.setattr(type(pipe.transformer.blocks[0]), "forward", lambda self, x, *args: x + 0.5)
    full = generate("wan", pipe)
    videoattn.enable_step_rehash(pipe, steps=7, keys="uniform", mode="hold", point="first_block")
    torch.testing.assert_close(generate("wan", pipe), full)
    assert rehash(pipe).reused


@pytest.mark.parametrize(("name", "middle"), [("wan", 0.5), ("hunyuan_video", 0.7)])
def test_a_threshold_decides_step_by_step(name, middle):
    pipe = make(name, layers=3)
    full = generate(name, pipe)
    counts = []
    for threshold in (1e-9, middle, 1e9):
        videoattn.enable_step_rehash(pipe, threshold=threshold, point="first_block")
        made = generate(name, pipe)
        counts.append(len(ran(pipe)))
        assert torch.equal(made, full) == (counts[-1] == STEPS)
    assert counts[0] == STEPS > counts[1] > counts[2] == 2
    assert rehash(pipe).ran == {0, STEPS - 1}


@pytest.mark.parametrize("name", ["latte", "wan22_i2v"])
def test_what_no_residual_can_be_told_of(name):
    pipe = make(name)
    with pytest.raises(
        ValueError, match="step rehash: wanted a denoiser that can leave blocks out, got one that cannot"
    ):
        videoattn.enable_step_rehash(pipe, **EVEN, point="first_block")
    assert rehash(pipe) is None


def test_the_names_that_are_served_exist():
    import diffusers

    assert all(hasattr(diffusers, name) for name in families.FAMILIES)
    assert set(FIRST_BLOCK) | set(LATE_BLOCK) <= set(PIPELINES)
    assert set(inputs("wan", make("wan")))
