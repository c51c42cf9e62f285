"""Beside AnimateDiff's IP-Adapters, FreeNoise and ControlNets: served, or left untouched and reported."""

import pytest
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffSparseControlNetPipeline,
    ControlNetModel,
    SparseControlNetModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from served import assert_served, assert_undone, distance
from tiny_parts import TEXT_DIM, randomize
from tiny_pipelines import build, run

import videoattn
from videoattn.pipelines.adapter import attention_modules


def ip_adapter_weights(unet):
    """As a checkpoint of an IP-Adapter has them: four image tokens, a key and a value projection a cross-attention."""
    generator = torch.Generator().manual_seed(0)
    tokens, width = 4, unet.config.cross_attention_dim
    sizes = {"proj.weight": (tokens * width, TEXT_DIM), "proj.bias": (tokens * width,)}
    sizes |= {"norm.weight": (width,), "norm.bias": (width,)}
    adapter = {}
    cross = [attn for name, attn in attention_modules(unet) if name.endswith("attn2") and "motion" not in name]
    # Numbered as the host counts them, in the order of its attn_processors.
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor") and "motion" not in name:
            attn = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                adapter[f"{number}.to_{part}_ip.weight"] = torch.randn(attn.inner_dim, width, generator=generator) / 4
            number += 2
    assert number == 1 + 2 * len(cross)
    image_proj = {name: torch.randn(size, generator=generator) / 4 for name, size in sizes.items()}
    return {"image_proj": image_proj, "ip_adapter": adapter}


def run_ip_adapter(pipe):
    image = torch.ones(2, 1, TEXT_DIM)
    return run("animatediff", pipe, ip_adapter_image_embeds=[image])


@pytest.mark.parametrize("order", ["enabled before", "enabled after"])
def test_ip_adapter_layers_are_left_untouched_and_the_others_served(order):
    pipe = build("animatediff")
    weights = ip_adapter_weights(pipe.unet)
    alone = run("animatediff", pipe)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    host = run_ip_adapter(pipe)
    assert distance(host, alone) > 1e-3

    pipe = build("animatediff")
    if order == "enabled before":
        videoattn.enable_fast_attention(pipe, "exact")
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    if order == "enabled after":
        videoattn.enable_fast_attention(pipe, "exact")
    assert torch.equal(run_ip_adapter(pipe), host)
    refused = dict(videoattn.report(pipe).refused)
    assert set(refused.values()) == {"IPAdapterAttnProcessor2_0 holds weights of its own"}
    assert all(name.endswith("attn2") and "motion" not in name for name in refused)
    assert_served(pipe, except_for=refused)

    pipe.unload_ip_adapter()
    assert torch.equal(run("animatediff", pipe), alone)
    assert_served(pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)
    processors = [module.processor for _, module in attention_modules(pipe.unet)]
    assert not any(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in processors)
    assert torch.equal(run("animatediff", pipe), alone)


@pytest.mark.parametrize("order", ["enabled before", "enabled after"])
def test_free_noise(order):
    def free(pipe):
        pipe.enable_free_noise(context_length=4, context_stride=2)

    call = {"num_frames": 8, "prompt": "a red cube", "negative_prompt": "blurry"}
    pipe = build("animatediff")
    free(pipe)
    host = run("animatediff", pipe, **call)
    pipe = build("animatediff")
    if order == "enabled before":
        videoattn.enable_fast_attention(pipe, "exact")
        run("animatediff", pipe)
    free(pipe)
    if order == "enabled after":
        videoattn.enable_fast_attention(pipe, "exact")
    assert torch.equal(run("animatediff", pipe, **call), host)
    assert_served(pipe)
    pipe.enable_free_noise_split_inference()
    assert distance(run("animatediff", pipe, **call), host) < 1e-5
    pipe.disable_free_noise()
    run("animatediff", pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)


def with_controlnet(pipe):
    config = pipe.unet.config
    controlnet = ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=2,
        norm_num_groups=2,
        conditioning_embedding_out_channels=(8, 8),
    )
    return AnimateDiffControlNetPipeline(controlnet=controlnet, **pipe.components)


def with_sparse_controlnet(pipe):
    config = pipe.unet.config
    controlnet = SparseControlNetModel(
        in_channels=config.in_channels,
        conditioning_channels=config.in_channels,
        down_block_types=config.down_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=TEXT_DIM,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=2,
    )
    kept = ("vae", "text_encoder", "tokenizer", "unet", "motion_adapter", "scheduler")
    return AnimateDiffSparseControlNetPipeline(controlnet=controlnet, **{name: getattr(pipe, name) for name in kept})


@pytest.mark.parametrize("joined", [with_controlnet, with_sparse_controlnet])
def test_a_controlnet_stays_the_hosts_and_the_denoiser_is_served(joined):
    """It runs image attention beside the denoiser: not ours to touch."""
    pipe = joined(build("animatediff"))
    pipe.set_progress_bar_config(disable=True)
    randomize(pipe.controlnet.eval().requires_grad_(False), torch.Generator().manual_seed(0))
    frames = [Image.new("RGB", (24, 16), "red")] * 5
    host = run("animatediff", pipe, conditioning_frames=frames)
    assert distance(host, run("animatediff", build("animatediff"))) > 1e-3
    before = [module.processor for _, module in attention_modules(pipe.controlnet)]
    videoattn.enable_fast_attention(pipe, "exact")
    assert torch.equal(run("animatediff", pipe, conditioning_frames=frames), host)
    assert_served(pipe)
    assert [module.processor for _, module in attention_modules(pipe.controlnet)] == before
