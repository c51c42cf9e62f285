# videoattn
"""models.toml describes models that diffusers builds, and the inputs are what their denoisers take."""

from dataclasses import replace

import pytest
import torch

from videoattn.benchmarks import denoiser_inputs, forward, models

# Billions of parameters as the models' cards state them; for the UNets, of the UNet alone.
BILLIONS = {
    "wan-1.3b": 1.42,
    "wan-14b": 14.3,
    "wan-5b": 5.0,
    "hunyuan": 12.8,
    "cogvideox-2b": 1.69,
    "cogvideox-5b": 5.57,
    "ltx": 1.92,
    "ltx-13b": 13.0,
    "cosmos-7b": 7.24,
    "svd-xt": 1.52,
    "modelscope": 1.41,
}
UNET = {"block_out_channels": [32] * 4, "layers_per_block": 1}
DIT = {"num_layers": 1, "num_attention_heads": 1}
WAN = {**DIT, "ffn_dim": 64}
THIN = {  # one model a denoiser class and way of being called
    "wan-1.3b": WAN,
    "wan-i2v-14b": {**WAN, "added_kv_proj_dim": 128},
    "wan-5b": WAN,
    "skyreels-df-1.3b": WAN,
    "hunyuan": {**DIT, "num_single_layers": 1, "num_refiner_layers": 1},
    "hunyuan15": {**DIT, "num_refiner_layers": 1},
    "cogvideox-2b": {**DIT, "num_attention_heads": 2, "sample_height": 8, "sample_width": 8, "sample_frames": 5},
    "cogvideox-5b": DIT,
    "ltx": {**DIT, "cross_attention_dim": 64},
    "ltx2": {**DIT, "attention_head_dim": 64, "cross_attention_dim": 64}
    | {"audio_num_attention_heads": 1, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 32},
    "mochi": {**DIT, "pooled_projection_dim": 64},
    "latte": {**DIT, "cross_attention_dim": 72, "sample_size": 8},
    "allegro": {**DIT, "cross_attention_dim": 96},
    "cosmos-7b": DIT,
    "kandinsky5": {"num_visual_blocks": 1, "num_text_blocks": 1, "model_dim": 64, "ff_dim": 64},
    "animatediff": {**UNET, "num_attention_heads": 2, "motion_num_attention_heads": 2},
    "svd-xt": {**UNET, "num_attention_heads": [1] * 4},
    "modelscope": {**UNET, "attention_head_dim": 16},
    "i2vgen-xl": {**UNET, "attention_head_dim": 16},
}


@pytest.mark.parametrize("name", models.loadable())
def test_a_pipeline_is_built_from_its_entry(name):
    pipe = models.load(name, device="meta")
    assert type(pipe).__name__ == models.spec(name)["pipeline"]
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    assert denoiser.dtype == getattr(torch, models.spec(name)["dtype"])
    if name in BILLIONS:
        assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", sorted(set(BILLIONS) - set(models.loadable())))
def test_a_denoiser_has_the_size_of_its_model(name):
    denoiser = models.denoiser(name, device="meta")
    assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


def test_the_names_that_the_command_line_promises():
    promised = "wan-1.3b wan-14b hunyuan cogvideox-2b cogvideox-5b ltx animatediff svd-xt modelscope latte"
    assert set(promised.split()) <= set(models.loadable())


def test_every_denoiser_class_is_run_below():
    classes = {
        models.spec(name)["components"].get("transformer", models.spec(name)["components"].get("unet"))["_class_name"]
        for name in THIN
    }
    assert classes == set(denoiser_inputs._MAKERS)


@pytest.mark.parametrize("name", THIN)
def test_the_inputs_are_what_the_denoiser_takes(name):
    """Thin, on the CPU and in the model's own dtype: what the meta device lets pass is refused here."""
    thin = {"device": "cpu", "overrides": THIN[name]}
    denoiser = models.denoiser(name, **thin)
    frames = {"latte": 16, "mochi": 7}.get(name, 1 + models.spec(name)["latent"]["temporal"])
    with torch.no_grad():
        one, other = (denoiser(**models.inputs(name, 64, 64, frames, **thin, seed=seed))[0] for seed in range(2))
    assert one.isfinite().all() and not torch.equal(one, other)


def test_inputs_are_given_by_their_seed():
    make = [models.inputs("ltx", 64, 64, 9, device="cpu", seed=seed)["hidden_states"] for seed in (3, 3, 4)]
    assert torch.equal(make[0], make[1]) and not torch.equal(make[0], make[2])


def test_what_a_class_keeps_in_fp32_stays_in_fp32():
    denoiser = models.denoiser("wan-1.3b", device="meta")
    kinds = {name: parameter.dtype for name, parameter in denoiser.named_parameters()}
    assert kinds["blocks.0.scale_shift_table"] == kinds["blocks.0.norm2.weight"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.weight"] == kinds["blocks.0.attn1.norm_q.weight"] == torch.bfloat16


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    make = [models.denoiser("wan-1.3b", device="cpu", overrides=THIN["wan-1.3b"], seed=s) for s in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = (m.blocks[0].attn1.to_q.weight for m in make)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_unknown_names_and_entries_without_a_pipeline_are_refused():
    with pytest.raises(ValueError, match="wan-1.3b"):
        models.spec("wan-99b")
    with pytest.raises(ValueError, match="only its denoiser"):
        models.load("mochi", device="meta")


def test_a_twin_shares_every_tensor_and_no_module():
    plain = models.denoiser("ltx", device="cpu", overrides=THIN["ltx"])
    twin = forward.twin(plain)
    tensors = [[t.data_ptr() for t in (*m.parameters(), *m.buffers())] for m in (plain, twin)]
    assert tensors[0] == tensors[1]
    assert not set(map(id, plain.modules())) & set(map(id, twin.modules()))


def test_a_forward_is_measured_patched_against_unpatched():
    compared, peaks, report = forward.measure("ltx", (64, 64, 9), "exact", torch.device("cpu"), 0.01, THIN["ltx"])
    (result,) = compared.values()
    assert result.error < forward.TOLERANCE["exact"] and result.median_ms > 0 and peaks == {}
    assert {site.adapter for site in report.sites} == {"ltx"}


def test_the_mean_over_a_generation_counts_its_dense_steps():
    """15 of 50 steps at 1.25x and 35 at 2x: 50 / (12 + 17.5)."""
    compared, _, _ = forward.measure("ltx", (64, 64, 9), "fast", torch.device("cpu"), 0.01, THIN["ltx"])
    assert set(compared) == {"fast", "balanced"}
    sparse, dense = (
        replace(compared[who], ratio=ratio, ci_lo=ratio, ci_hi=ratio, median_ms=100 / ratio, noise=0.0)
        for who, ratio in (("fast", 2.0), ("balanced", 1.25))
    )
    mean = forward.over_steps("fast", sparse, dense)
    assert mean.name == "fast, mean of 50 steps" and mean.verdict == "faster"
    assert mean.ratio == mean.ci_lo == mean.ci_hi == pytest.approx(50 / 29.5) and mean.median_ms == pytest.approx(59.0)
