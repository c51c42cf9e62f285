"""The tiny text-to-video model: its clips, its checker, its trainings, its figures, and the weights that ship."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "train_tiny"
MODEL = ROOT / "examples" / "models" / "tiny-wan"
sys.path.insert(0, str(SCRIPTS))

import evaluate
import record
import train_denoiser
import whole_clip
from checker import read
from data import DEMO, LARGEST, Size, layouts
from diffusers import AutoencoderKLWan, WanPipeline
from render import render
from scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    all_single_scenes,
    held_out_scenes,
    is_held_out,
    layout,
    sample_scene,
)
from tiny_model import new_text_encoder, new_tokenizer, new_transformer, new_vae
from training import Budget, Trainer

from videoattn.benchmarks import targets

SMALL = Size(frames=9, height=64, width=96)


def draw(scenes, size, seed=0) -> np.ndarray:
    """[clips, T, H, W, 3] in 0..1."""
    video, _ = render(*layouts(scenes, np.random.default_rng(seed), size), size.frames, size.height, size.width)
    return ((video + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


# --- clips ---


def test_caption_reads_as_a_sentence():
    scene = next(s for s in all_single_scenes(held_out=False) if s.things[0].colour == "orange")
    thing = scene.things[0]
    assert scene.caption() == f"an orange {thing.shape} moves {thing.direction} over a {scene.background} background"


def test_training_never_draws_a_held_out_combination():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(3000)]
    assert not any(is_held_out(thing, scene.background) for scene in scenes for thing in scene.things)
    assert {len(scene.things) for scene in scenes} == {1, 2}


def test_held_out_part_is_a_fixed_seventh_and_leaves_every_pair_of_attributes():
    held_out, drawn = all_single_scenes(held_out=True), all_single_scenes(held_out=False)
    assert len(held_out) / (len(held_out) + len(drawn)) == pytest.approx(1 / 7, abs=0.01)
    assert not {s.caption() for s in held_out} & {s.caption() for s in drawn}

    def pairs(scenes):
        rows = [(s.things[0].shape, s.things[0].colour, s.background, s.things[0].direction) for s in scenes]
        return {(i, j, row[i], row[j]) for row in rows for i in range(4) for j in range(i)}

    assert pairs(held_out) <= pairs(drawn)
    assert held_out_scenes(64) == held_out_scenes(64)
    assert len(set(held_out_scenes(64))) == 64


@pytest.mark.parametrize("size", [SMALL, Size(frames=5, height=96, width=64)], ids=str)
def test_things_stay_inside_the_frame(size):
    rng = np.random.default_rng(1)
    scenes = held_out_scenes(40)
    for scene in scenes:
        things, _ = layout(scene, rng, size.height, size.width)
        _, _, _, _, radius, x, y, way_x, way_y = things[0]
        frame = np.array([size.width, size.height]) / min(size.width, size.height)
        for centre in (np.array([x, y]), np.array([x + way_x, y + way_y])):
            assert (centre - radius > 0).all() and (centre + radius < frame).all()


def test_edges_are_anti_aliased_and_weights_follow_the_things():
    scene = held_out_scenes(1)
    video, weight = render(*layouts(scene, np.random.default_rng(0), SMALL), SMALL.frames, SMALL.height, SMALL.width)
    assert video.shape == (1, 3, 9, 64, 96) and weight.shape == (1, 1, 9, 64, 96)
    assert video.abs().max() <= 1
    assert set(weight.unique().tolist()) >= {1.0, 3.0}
    assert len(video[0, 0, 0].unique()) > SMALL.height + 1  # more than the rows of the background and one flat colour


# --- checker ---


def readings(scenes, size, seed=0):
    """One clip at a time: the largest clips together would take gigabytes."""
    return [read(draw([scene], size, seed + i)[0]) for i, scene in enumerate(scenes)]


@pytest.mark.parametrize(("size", "count"), [(DEMO, 100), (LARGEST, 6)], ids=["demo", "largest"])
def test_checker_reads_rendered_truth(size, count):
    scenes = random.Random(0).sample(all_single_scenes(held_out=False), count)
    right = [
        (reading.colour, reading.shape, reading.direction)
        == (scene.things[0].colour, scene.things[0].shape, scene.things[0].direction)
        for scene, reading in zip(scenes, readings(scenes, size), strict=True)
    ]
    assert np.mean(right) >= 0.99


def test_checker_is_near_chance_on_shuffled_captions():
    scenes = random.Random(1).sample(all_single_scenes(held_out=False), 150)
    truth = [scene.things[0] for scene in random.Random(2).sample(scenes, len(scenes))]
    seen = readings(scenes, Size(frames=9, height=128, width=128))
    for attribute, names in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        rate = np.mean([getattr(r, attribute) == getattr(t, attribute) for r, t in zip(seen, truth, strict=True)])
        assert abs(rate - 1 / len(names)) < 0.12, attribute


def test_checker_sees_nothing_in_an_empty_clip():
    reading = read(np.full((9, 64, 64, 3), 0.4))
    assert (reading.colour, reading.shape, reading.direction) == (None, None, None)


# --- the VAE over a whole clip ---


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("family", ["ours", "wan 2.1"])
def test_whole_clip_equals_chunks(family, frames):
    torch.manual_seed(0)
    vae = new_vae() if family == "ours" else AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    vae = vae.double()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):  # ones at first: not a test
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    video = torch.randn(2, 3, frames, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        chunks = vae.encode(video).latent_dist
        mean, log_variance = whole_clip.encode(vae, video)
        torch.testing.assert_close(mean, chunks.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_variance, chunks.logvar, rtol=1e-10, atol=1e-10)
        decoded = whole_clip.decode(vae, mean).clamp(-1, 1)
        # vae.decode itself upsamples in fp32
        torch.testing.assert_close(decoded, vae.decode(chunks.mean).sample, rtol=1e-5, atol=1e-5)


# --- what the denoiser is trained on is what the pipeline feeds it ---


def test_tokenizer_round_trip(tmp_path):
    new_tokenizer().save_pretrained(tmp_path)
    loaded = type(new_tokenizer()).from_pretrained(tmp_path)
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(50)]
    for scene in scenes:
        ids = loaded(scene.caption()).input_ids
        assert ids == new_tokenizer()(scene.caption()).input_ids
        assert loaded.unk_token_id not in ids and ids[-1] == loaded.eos_token_id
        assert len(ids) <= train_denoiser.PROMPT_TOKENS
    assert loaded("A RED circle, moves left.").input_ids == loaded("a red circle moves left").input_ids
    assert loaded("").input_ids == [loaded.eos_token_id]


def test_short_context_equals_the_pipelines_512_tokens():
    torch.manual_seed(0)
    tokenizer, prompts = new_tokenizer(), ["a red circle moves left over a gray background", ""]
    text_encoder = new_text_encoder(len(tokenizer)).eval()
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None, transformer=new_transformer().eval()
    )
    latents, level = torch.randn(2, 16, 2, 8, 8), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        full, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        expected = pipe.transformer(latents, level, full, return_dict=False)[0]
        train_denoiser.shorten_context(pipe.transformer)
        short = train_denoiser.prompt_embeddings(text_encoder, train_denoiser.tokenize(tokenizer, prompts))
        got = pipe.transformer(latents, level, short, return_dict=False)[0]
    assert full.shape[1] == 512 and short.shape[1] == 24
    torch.testing.assert_close(short[:, :23], full[:, :23], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --- training ---


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    def trainer():
        torch.manual_seed(0)
        made = Trainer({"layer": torch.nn.Linear(4, 4)}, decay=0.9)
        made.set_rate(0.01)
        return made

    def train(made, steps):
        for _ in range(steps):
            made.descend(made.modules["layer"](torch.ones(2, 4)).square().sum())
            made.after_step()

    straight, first, second = trainer(), trainer(), trainer()
    train(straight, 6)
    train(first, 3)
    first.save(tmp_path / "checkpoint.pt", Budget(100, used=40))
    assert second.load(tmp_path / "checkpoint.pt") == pytest.approx(40, abs=1)
    train(second, 3)
    assert second.steps == 6
    torch.testing.assert_close(second.parameters, straight.parameters, rtol=0, atol=0)
    torch.testing.assert_close(second.average, straight.average, rtol=0, atol=0)


def test_training_rate_warms_up_and_ends_low():
    rates = [Budget(100, used=used).rate(1.0) for used in (0, 2, 50, 100)]
    assert rates[0] < 0.1 and rates[1] == pytest.approx(1.0, abs=0.01)
    assert rates[2] == pytest.approx(0.52, abs=0.02) and rates[3] == pytest.approx(0.02)


# --- figures ---


def write_evaluation(folder: Path, size: Size) -> Path:
    file = folder / f"{size}.json"
    file.write_text(json.dumps({"size": str(size), "prompts": 64, "colour": 0.9, "shape": 0.8, "direction": 1.0}))
    return file


def test_record_writes_the_rows_that_the_targets_look_for(tmp_path):
    rows = record.model_rows(MODEL) + record.checker_rows(MODEL, 2)
    for name, size in (("demo", DEMO), ("largest", LARGEST)):
        rows += record.evaluation_rows(MODEL, name, write_evaluation(tmp_path, size))
    wanted = [t for t in targets.read(ROOT / "benchmarks" / "targets.toml") if t.id.startswith(("tiny_wan", "checker"))]
    missing = {target.id for target in wanted if not any(target.matches(row) for row in rows)}
    assert missing == {"tiny_wan.vae_psnr"}  # its rows take minutes


def test_record_refuses_an_evaluation_at_another_size(tmp_path):
    with pytest.raises(ValueError, match="wanted an evaluation at 33x352x352, got one at 25x192x192"):
        record.evaluation_rows(MODEL, "largest", write_evaluation(tmp_path, DEMO))


# --- the weights that ship ---


@pytest.fixture(scope="module")
def pipe():
    made = WanPipeline.from_pretrained(str(MODEL), local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def test_shipped_model_is_small():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 24e6


def test_shipped_vae_keeps_held_out_clips(pipe):
    figures = evaluate.vae_psnr(pipe.vae, held_out_scenes(3, seed=2), Size(frames=9, height=128, width=128))
    assert figures["psnr"] >= 30


def test_shipped_model_follows_held_out_prompts(pipe):
    """At the smallest size it was trained at and with half the steps: seconds instead of minutes."""
    scenes = held_out_scenes(3)
    prompts = [scene.caption() for scene in scenes]
    size = Size(frames=17, height=128, width=128)
    clips = evaluate.generate(pipe, prompts, size, steps=12, guidance=evaluate.GUIDANCE, batch=3)
    figures = evaluate.score(scenes, clips)
    assert figures["colour"] == figures["direction"] == 1
    assert figures["shape"] >= 2 / 3
