"""What the host can do to its weights and modules: it works, before and after enabling."""

import pytest
import torch
from diffusers import (
    WanPipeline,
)
from diffusers.hooks import apply_group_offloading
from served import assert_served, assert_undone, distance
from tiny_pipelines import build, denoisers, run
from torch import nn

import videoattn
from videoattn.pipelines.adapter import attention_modules


def offload_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_leaves(pipe):
    """As enable_sequential_cpu_offload does; not through it, because accelerate fails on transformers' T5."""
    from accelerate import cpu_offload

    for _, model in denoisers(pipe):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def offload_groups(pipe):
    for _, model in denoisers(pipe):
        apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")


def store_in_fp8(pipe):
    for _, model in denoisers(pipe):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def fuse_qkv(pipe):
    for _, model in denoisers(pipe):
        model.fuse_qkv_projections()


def add_lora(pipe):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _, model in denoisers(pipe):
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))


def quantise_with_torchao(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    for _, model in denoisers(pipe):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quantise_with_bitsandbytes(pipe):
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(linear):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        made.load_state_dict(linear.state_dict())
        return made.to("cpu").requires_grad_(False)

    replace_linears_of_attention(pipe, quantised)


def quantise_with_gguf(pipe):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def quantised(linear):
        made = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        blocks = gguf.quantize(linear.weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        made.weight = GGUFParameter(torch.from_numpy(blocks), quant_type=gguf.GGMLQuantizationType.Q8_0)
        made.bias = linear.bias
        return made

    replace_linears_of_attention(pipe, quantised)


def replace_linears_of_attention(pipe, quantised):
    """Those whose rows are whole blocks of 32 weights."""
    replaced = 0
    for _, model in denoisers(pipe):
        for _, attn in attention_modules(model):
            for name, linear in list(attn.named_modules()):
                if isinstance(linear, nn.Linear) and linear.in_features % 32 == 0:
                    attn.set_submodule(name, quantised(linear))
                    replaced += 1
    assert replaced


CHANGES = [offload_models, offload_leaves, offload_groups, store_in_fp8, quantise_with_torchao]
QUANTISED = [quantise_with_bitsandbytes, quantise_with_gguf]
CASES = [
    *((change, name) for change in CHANGES for name in ("wan", "latte")),
    *((change, "text_to_video_sd") for change in (offload_models, offload_groups)),
    *((change, name) for change in QUANTISED for name in ("hunyuan_video", "latte")),
    *((add_lora, name) for name in ("wan", "hunyuan_video", "animatediff")),
    *((fuse_qkv, name) for name in ("wan", "wan21_i2v", "cogvideox_rope", "text_to_video_sd")),
]


@pytest.mark.parametrize("order", ["enabled before", "enabled after"])
@pytest.mark.parametrize(("change", "name"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_it_works_with(change, name, order):
    pipe = build(name)
    change(pipe)
    host = run(name, pipe)
    assert change in (offload_models, offload_leaves, offload_groups, fuse_qkv) or not torch.equal(
        host, run(name, build(name))
    ), "the change changes nothing: the test would not see it undone"

    pipe = build(name)
    if order == "enabled before":
        videoattn.enable_fast_attention(pipe, "exact")
    change(pipe)
    if order == "enabled after":
        videoattn.enable_fast_attention(pipe, "exact")
    for _ in range(2):  # offloading renews its hooks after each generation
        ours = run(name, pipe)
        assert distance(ours, host) <= (1e-6 if name == "hunyuan_video" else 0)  # which leaves padded keys out
    assert_served(pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)
    assert torch.equal(run(name, pipe), host)


@pytest.mark.parametrize("name", ["wan", "cogvideox_rope", "text_to_video_sd"])
def test_qkv_may_be_fused_and_unfused_while_enabled(name):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    latents = run(name, pipe)
    for change in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        for _, model in denoisers(pipe):
            getattr(model, change)()
        assert distance(run(name, pipe), latents) < 1e-5
        assert_served(pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_what_the_host_kept_of_ours_is_harmless_after_disable():
    """CogVideoX keeps the processors that it replaced by fused ones: ours, which come back when it is unfused."""
    pipe = videoattn.enable_fast_attention(build("cogvideox"), "exact", backend="sdpa_math")
    run("cogvideox", pipe)
    pipe.transformer.fuse_qkv_projections()
    run("cogvideox", pipe)
    videoattn.disable(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(run("cogvideox", pipe), run("cogvideox", build("cogvideox")))


def test_lora_may_be_loaded_and_unloaded_while_enabled(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = build("wan")
    host = run("wan", pipe)
    add_lora(pipe)
    with_lora = run("wan", pipe)
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer))

    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    pipe.load_lora_weights(tmp_path)
    assert distance(run("wan", pipe), with_lora) < 1e-5
    assert_served(pipe)
    pipe.fuse_lora()
    assert distance(run("wan", pipe), with_lora) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert distance(run("wan", pipe), host) < 1e-4  # fusing and unfusing rounds the weights
    assert_served(pipe)
