"""Whole tiny pipelines, denoiser and VAE, sliced as a user slices them: the same videos."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import PIPELINES, build, run

import videoattn
from videoattn.slicing import session
from videoattn.slicing.session import OverBudget, slicing_of

SLICED = (
    "animatediff",
    "svd",
    "text_to_video_sd",
    "i2vgen_xl",
    "wan",
    "wan22",
    "cogvideox_rope",
    "ltx",
    "hunyuan_video",
)
WITH_VAE = ("animatediff", "svd", "text_to_video_sd", "wan")


def close(made, expected):
    """Within what fp32 sums in another order leave, of the greatest value."""
    assert (made - expected).abs().max() <= 2e-4 * expected.abs().max()


def video(name, pipe, **options):
    return run(name, pipe, output_type="pt", **options)


@pytest.mark.parametrize("name", SLICED)
def test_the_same_latents(name):
    pipe = build(name)
    expected = run(name, pipe, batch=2)
    for slices in (2, 1000):
        videoattn.enable_feature_slicing(pipe, slices=slices)
        close(run(name, pipe, batch=2), expected)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    sizes = {size for site in slicing_of(denoiser).sites for size in site.groups.sizes.values()}
    assert max(sizes) > 1  # something ran in slices
    videoattn.disable(pipe)
    assert torch.equal(run(name, pipe, batch=2), expected)


@pytest.mark.parametrize("name", WITH_VAE)
def test_the_same_video(name):
    pipe = build(name)
    expected = video(name, pipe)
    videoattn.enable_fast_attention(pipe, "exact")
    videoattn.enable_feature_slicing(pipe, slices=3)
    close(video(name, pipe), expected)
    assert any(site.groups.sizes for site in slicing_of(pipe.vae).sites)
    videoattn.disable(pipe)
    assert "decode" not in vars(pipe.vae)
    assert torch.equal(video(name, pipe), expected)


@pytest.mark.parametrize(
    ("name", "other"), [("animatediff", EulerDiscreteScheduler), ("wan", FlowMatchEulerDiscreteScheduler)]
)
def test_a_scheduler_changed_between_calls(name, other):
    """Another one, with more steps: a size is cut as before, and the videos are those of the unsliced."""
    plain, pipe = build(name), build(name)
    before = video(name, plain)
    plain.scheduler = other.from_config(plain.scheduler.config)
    expected = video(name, plain, num_inference_steps=3)
    assert (expected - before).abs().max() > 1e-3
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    video(name, pipe)
    slicing = slicing_of(getattr(pipe, "unet", None) or pipe.transformer)
    slicing.budget, slicing.choices = slicing.choice.total - 1, {}  # a byte less than it takes whole
    close(video(name, pipe), before)
    (chosen,) = slicing.choices.values()
    pipe.scheduler = other.from_config(pipe.scheduler.config)
    close(video(name, pipe, num_inference_steps=3), expected)
    assert all(
        choice.counts == chosen.counts for choice in slicing.choices.values()
    )  # timesteps may be of another dtype
    assert max(count for groups in chosen.counts.values() for count in groups.values()) > 1


@pytest.mark.parametrize("name", WITH_VAE)
@pytest.mark.parametrize("part", ["denoiser", "vae"])
def test_a_budget_cuts_a_part_and_is_kept(name, part, monkeypatch):
    """Half way from what it takes whole to the least that it can do with."""
    monkeypatch.setattr(session, "MOST", 4)  # forecasts of the least take their time
    pipe = build(name)
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    expected = video(name, pipe)
    slicing = slicing_of(pipe.vae if part == "vae" else getattr(pipe, "unet", None) or pipe.transformer)
    whole = slicing.choice
    slicing.budget, slicing.choices = whole.resident, {}
    with pytest.raises(OverBudget) as over:
        video(name, pipe)
    slicing.budget = (over.value.least + whole.total) // 2
    close(video(name, pipe), expected)
    assert slicing.choice.total <= slicing.budget < whole.total
    assert max(count for groups in slicing.choice.counts.values() for count in groups.values()) > 1


def test_a_decoder_over_budget_is_told_before_the_first_step():
    pipe = build("animatediff")
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    video("animatediff", pipe)
    decode = slicing_of(pipe.vae)
    decode.budget, decode.choices = decode.choice.resident + 10, {}
    slicing_of(pipe.unet).choices.clear()
    steps = []
    left = "less may do with vae_frames .*; less may do with vae_tiling .which changes the video"
    with pytest.raises(ValueError, match=f"AutoencoderKL.decode at this size needs .*{left}"):
        video("animatediff", pipe, callback_on_step_end=lambda pipe, step, t, kwargs: steps.append(step) or {})
    assert steps == []


def test_tiles_that_the_host_has_on_are_told_and_not_named_again():
    pipe = build("wan")
    pipe.vae.enable_tiling()
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    assert "decodes in tiles, by the host's own switch: this changes the video" in str(videoattn.report(pipe))
    video("wan", pipe)
    decode = slicing_of(pipe.vae)
    decode.budget, decode.choices = decode.choice.resident + 10, {}
    with pytest.raises(OverBudget) as over:
        video("wan", pipe)
    assert "AutoencoderKLWan.decode at this size needs" in str(over.value) and "less may do" not in str(over.value)


@pytest.mark.parametrize("name", ["mochi", "hunyuan_video15"])
def test_a_model_that_needs_values_takes_no_budget(name):
    pipe = videoattn.enable_feature_slicing(build(name), memory="1TiB")
    with pytest.raises(
        ValueError, match="memory: .* does not run on the meta device, .* a number of slices goes without"
    ):
        run(name, pipe)


def test_tiles_are_off_unless_asked_for_and_off_again_afterwards():
    """They change the video, which the report says."""
    pipe = build("animatediff")
    expected = video("animatediff", pipe, height=64, width=64)
    videoattn.enable_feature_slicing(pipe, slices=2)
    assert not pipe.vae.use_tiling
    videoattn.enable_feature_slicing(pipe, slices=2, vae_tiling=True)
    assert pipe.vae.use_tiling and "this changes the video" in str(videoattn.report(pipe))
    videoattn.disable(pipe)
    assert not pipe.vae.use_tiling
    assert torch.equal(video("animatediff", pipe, height=64, width=64), expected)
    with pytest.raises(ValueError, match="vae_tiling: wanted a pipeline with a VAE that decodes in tiles"):
        videoattn.enable_feature_slicing(pipe.unet, slices=2, vae_tiling=True)


def test_few_frames_at_a_time_are_off_unless_asked_for():
    """As the pipeline's own argument has them, which changes what a decoder gives that mixes frames, and the report says it."""
    pipe = build("svd")
    whole = video("svd", pipe)
    frames = whole.shape[1] - 1
    few = video("svd", pipe, decode_chunk_size=frames)
    assert not torch.allclose(few, whole, atol=1e-3)
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    close(video("svd", pipe), whole)
    videoattn.enable_feature_slicing(pipe, memory="1TiB", vae_frames=frames)
    close(video("svd", pipe), few)
    assert len(slicing_of(pipe.vae).choices) == 2  # of the rest too
    assert f"decodes {frames} frames at a time" in str(videoattn.report(pipe))
    assert "this changes the video" in str(videoattn.report(pipe))
    pipe = build("animatediff")
    expected = video("animatediff", pipe)
    videoattn.enable_feature_slicing(pipe, slices=2, vae_frames=3)
    close(video("animatediff", pipe), expected)
    assert "this changes the video" not in str(videoattn.report(pipe))
    with pytest.raises(ValueError, match="vae_frames: wanted a pipeline whose VAE takes frames"):
        videoattn.enable_feature_slicing(build("wan"), slices=2, vae_frames=2)
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match="vae_frames: wanted an int of 1 or more"):
            videoattn.enable_feature_slicing(pipe, slices=2, vae_frames=wrong)


def test_a_budget_knows_how_many_frames_are_decoded_at_once():
    pipe = build("svd")
    videoattn.enable_feature_slicing(pipe, memory="1TiB")
    whole = video("svd", pipe)
    most = slicing_of(pipe.vae).choice.activations
    videoattn.enable_feature_slicing(pipe, memory="1TiB", vae_frames=whole.shape[1] // 2)
    video("svd", pipe)
    assert max(choice.activations for choice in slicing_of(pipe.vae).choices.values()) < 0.7 * most


def test_every_name_is_of_a_pipeline():
    assert set(SLICED) | set(WITH_VAE) <= set(PIPELINES)
