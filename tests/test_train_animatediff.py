"""The tiny AnimateDiff pipeline: its parts, and that it is trained on what its pipeline does."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "examples" / "train_tiny"
sys.path.insert(0, str(SCRIPTS))

import evaluate
import tiny_animatediff
import train_frame_vae
import train_unet
from data import Size
from diffusers import AnimateDiffPipeline, DiffusionPipeline
from scenes import held_out_scenes, sample_scene
from tiny_animatediff import PROMPT_TOKENS, new_scheduler, new_text_encoder, new_unet, new_vae, standardise
from tiny_model import new_tokenizer
from tiny_parts import randomize
from training import Budget, Course, Log, Trainer, train

SIZE = Size(frames=3, height=32, width=64)
CALL = {"num_frames": 3, "height": 32, "width": 64, "num_inference_steps": 2, "output_type": "np"}
WIDTHS = (32, 32, 64)


@pytest.fixture
def tokenizer():
    return new_tokenizer(PROMPT_TOKENS)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    made = new_unet(WIDTHS).eval()
    randomize(made, torch.Generator().manual_seed(0))
    return made


def denoise(unet):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 3, 4, 8, generator=generator)
    context = torch.randn(2, PROMPT_TOKENS, 128, generator=generator).repeat_interleave(3, dim=0)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 999]), context).sample


# --- the parts ---


def test_every_caption_fits_and_is_padded(tokenizer):
    captions = [sample_scene(np.random.default_rng(seed)).caption() for seed in range(200)]
    ids = train_unet.tokenize(tokenizer, captions)
    assert ids.shape == (200, PROMPT_TOKENS)
    assert (ids[:, -1] == tokenizer.pad_token_id).all() and not (ids == tokenizer.unk_token_id).any()
    assert ((ids == tokenizer.eos_token_id).sum(1) == 1).all()


def test_a_level_has_every_kind_of_layer():
    unet = new_unet()
    for block in (*unet.down_blocks, *unet.up_blocks, unet.mid_block):
        assert len(block.attentions) == len(block.motion_modules) > 0
    assert {m.transformer_blocks[0].attn1.heads for m in unet.mid_block.motion_modules} == {4}


def test_all_parts_together_are_small(tokenizer):
    parts = (new_vae(), new_unet(), new_text_encoder(tokenizer))
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) <= 22e6


def test_sampling_starts_from_pure_noise():
    scheduler = new_scheduler()
    scheduler.set_timesteps(25)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    assert scheduler.final_alpha_cumprod == 1  # and ends without any


def test_standardised_latents_decode_to_the_same():
    torch.manual_seed(0)
    vae = new_vae().eval()
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, latents = evaluate.reconstruct(vae, video), tiny_animatediff.encode(vae, video)
        deviation, mean = torch.std_mean(latents.transpose(0, 1).flatten(1), dim=1)
        spread = vae.encode(video[:, :, 0]).latent_dist.std / deviation.view(-1, 1, 1)
        standardise(vae, mean, deviation)
        latents = tiny_animatediff.encode(vae, video).transpose(0, 1).flatten(1)
        torch.testing.assert_close(evaluate.reconstruct(vae, video), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.encode(video[:, :, 0]).latent_dist.std, spread, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean(1), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(1), torch.ones(8), rtol=1e-3, atol=0)


def test_codec_is_the_vae():
    torch.manual_seed(0)
    vae = new_vae().eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.manual_seed(1)
        decoded, mean, log_variance = train_frame_vae.Codec(vae)(images)
        posterior = vae.encode(images).latent_dist
        torch.manual_seed(1)
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        torch.testing.assert_close(decoded, vae.decode(latents).sample)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)


# --- what the UNet is trained on is what the pipeline feeds it ---


def test_fast_training_computes_the_same(unet):
    expected = denoise(unet)
    train_unet.prepare_unet(unet, compiled=False)
    torch.testing.assert_close(denoise(unet), expected, rtol=1e-4, atol=1e-4)


def test_fresh_network_adds_nothing():
    unet = new_unet(WIDTHS)
    assert denoise(unet).abs().max() == 0
    for block in (unet.down_blocks[0].resnets[0], unet.mid_block.motion_modules[0]):
        x = torch.randn(3, block.in_channels, 4, 4)
        assert torch.equal(block(x, num_frames=3) if hasattr(block, "proj_in") else block(x, torch.randn(3, 128)), x)


def test_step_trains_the_schedulers_velocity(tokenizer, unet, monkeypatch):
    """Its loss, when the network predicts zero, is the mean square of what the scheduler calls the velocity."""
    scheduler, seen = new_scheduler(), {}

    def silent(network, noisy, timesteps, context, **unused):
        seen.update(noisy=noisy, timesteps=timesteps, context=context)
        return (unet.conv_in.weight.sum() * torch.zeros_like(noisy),)

    monkeypatch.setattr(train_unet, "half_call", silent)
    text_encoder = new_text_encoder(tokenizer)
    trainer = Trainer({"unet": unet, "text_encoder": text_encoder}, decay=0.9)
    empty = train_unet.tokenize(tokenizer, [""])
    prompt = "a red circle moves left over a gray background"
    step = train_unet.denoiser_step(unet, text_encoder, trainer, scheduler, empty, shift=2.0, pure=0.0)
    monkeypatch.setattr(trainer, "descend", lambda loss: torch.zeros(()))
    monkeypatch.setattr(train_unet, "EMPTY_PROMPTS", 0.0)
    latents = torch.randn(2, 8, 3, 4, 8)
    figures = step(latents, train_unet.tokenize(tokenizer, [prompt, ""]))
    signal = scheduler.alphas_cumprod[seen["timesteps"]].sqrt().view(-1, 1, 1, 1, 1)
    noise = (seen["noisy"] - signal * latents) / (1 - signal**2).sqrt()
    velocity = scheduler.get_velocity(latents, noise, seen["timesteps"])
    torch.testing.assert_close(seen["noisy"], scheduler.add_noise(latents, noise, seen["timesteps"]))
    torch.testing.assert_close(figures["loss"], velocity.square().mean(), rtol=1e-4, atol=1e-4)

    pipe = AnimateDiffPipeline(
        vae=new_vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, motion_adapter=None, scheduler=None
    )
    given, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    torch.testing.assert_close(seen["context"], torch.cat([given, empty]).repeat_interleave(3, dim=0))


def test_larger_shift_draws_noisier_steps():
    torch.manual_seed(0)
    drawn = {shift: train_unet.draw_timesteps(20000, shift, 0.0, 999, torch.device("cpu")) for shift in (1.0, 3.0)}
    assert all(t.min() >= 0 and t.max() <= 999 for t in drawn.values())
    assert drawn[1.0].float().median() == pytest.approx(500, abs=10)
    assert drawn[3.0].float().median() == pytest.approx(750, abs=10)
    assert (drawn[1.0] == 999).any()
    pure = train_unet.draw_timesteps(20000, 1.0, 0.3, 999, torch.device("cpu")) == 999
    assert pure.float().mean() == pytest.approx(0.3, abs=0.02)


def test_frames_know_their_number():
    """What the first motion module adds to noise tells the halves of a clip apart; without the numbered head it hardly does."""
    torch.manual_seed(0)
    unet = tiny_animatediff.new_unet()
    transformer = unet.down_blocks[0].motion_modules[0].transformer_blocks[0]
    noise = torch.randn(256, 16, 64)
    with torch.no_grad():
        last = transformer.attn1(transformer.pos_embed(noise)).mean(0)
        transformer.attn1.to_out[0].weight[:, -tiny_animatediff.HEAD_DIM :] = 0
        others = transformer.attn1(transformer.pos_embed(noise)).mean(0)
    apart, before = ((x[:8].mean(0) - x[8:].mean(0)).norm() for x in (last, others))
    assert apart > 5 * before


# --- training ---


def test_loop_logs_means_of_each_course_and_keeps_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("training.LOGGED", 4)
    courses = [Course(size=SIZE, batch=1, share=1.0, start=0.0), Course(size=SIZE, batch=2, share=1.0, start=2.0)]
    trainer, rates = Trainer({"layer": torch.nn.Linear(2, 2)}, decay=0.9), []

    def step(course):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return {"loss": torch.tensor(float(trainer.steps))}

    log = Log(tmp_path / "log.csv", ("step", "seconds", "size", "loss", "rate"))
    budget = Budget(0.5)
    train(
        step,
        courses,
        trainer,
        budget,
        peak_rate=1.0,
        rng=np.random.default_rng(0),
        log=log,
        checkpoint=tmp_path / "checkpoint.pt",
    )
    rows = list(csv.DictReader(log.path.open()))
    assert [float(row["loss"]) for row in rows[:2]] == [1.5, 5.5] and rows[0]["size"] == "3x32x64"
    assert rates[0] < 0.01
    assert Trainer(trainer.modules, decay=0.9).load(tmp_path / "checkpoint.pt") >= 0.5


def run(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
    script.main()


def test_from_nothing_to_a_judged_pipeline(tmp_path, monkeypatch):
    run(monkeypatch, train_frame_vae, "--smoke", "--run", tmp_path, "--seconds", 0.5)
    small = ("--smoke", "--run", tmp_path, "--widths", *WIDTHS)
    run(monkeypatch, train_unet, *small, "--seconds", 1)
    run(monkeypatch, train_unet, *small, "--seconds", 1.5, "--resume")
    run(monkeypatch, train_unet, "--smoke", "--run", tmp_path, "--start-from", tmp_path / "pipeline", "--warm-up")

    model = tmp_path / "pipeline"
    pipe = DiffusionPipeline.from_pretrained(str(model), local_files_only=True)
    assert isinstance(pipe, AnimateDiffPipeline)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle moves left", generator=torch.Generator().manual_seed(0), **CALL).frames
    assert frames.shape == (1, 3, 32, 64, 3) and np.isfinite(frames).all()
    pipe.save_pretrained(tmp_path / "again")
    again = AnimateDiffPipeline.from_pretrained(str(tmp_path / "again"), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    expected = again("a red circle moves left", generator=torch.Generator().manual_seed(0), **CALL).frames
    np.testing.assert_allclose(frames, expected, atol=1e-5)

    size = ("--frames", 3, "--height", 32, "--width", 64, "--steps", 2)
    run(monkeypatch, evaluate, "--model", model, "--out", tmp_path / "demo", *size, "--prompts", 2, "--batch", 2)
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["prompts"] == 2 and figures["size"] == "3x32x64" and figures["shift"] is None
    assert evaluate.vae_psnr(pipe.vae, held_out_scenes(1), SIZE)["psnr"] > 0
