"""Beside what else a user does to a pipeline: it works, in either order, or is left untouched and reported."""

import copy
import gc
import io
import weakref

import pytest
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffSparseControlNetPipeline,
    ContextParallelConfig,
    ControlNetModel,
    SparseControlNetModel,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.modular_pipelines import WanBlocks
from PIL import Image
from tiny_parts import TEXT_DIM, randomize
from tiny_pipelines import build, denoisers, load, run
from torch import nn

import videoattn
from videoattn.pipelines.adapter import attention_modules
from videoattn.pipelines.processor import FastProcessor
from videoattn.session import session_of


@pytest.fixture(autouse=True)
def active_backend_of_diffusers():
    """`set_attention_backend` also sets one for the whole process, and resetting does not."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_served(pipe, *, except_for=()):
    """Every attention layer runs on ours, but for those of the given names."""
    report = videoattn.report(pipe)
    for row in report.sites:
        if row.name in except_for:
            assert row.adapter == "untouched", row
        else:
            assert row.calls > 0 and not row.why, row
    for _, model in denoisers(pipe):
        sites = dict(session_of(model).adapter.sites(model))
        assert {patch.attn for patch in session_of(model).patches} == sites.keys()


def assert_undone(pipe):
    for _, model in denoisers(pipe):
        assert not any(isinstance(module.processor, FastProcessor) for _, module in attention_modules(model))
        assert not model._forward_pre_hooks


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


# -- what the host can do to its weights and modules -------------------------------------------------------------------

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


# -- processors and backends that the user chooses ---------------------------------------------------------------------


def test_a_backend_of_diffusers_set_before_gives_way():
    """Who speaks last is obeyed: enabling after it takes attention over, and disabling gives it back."""
    for name in ("wan", "skyreels_v2"):
        pipe = build(name)
        pipe.transformer.set_attention_backend("_native_math")
        host = run(name, pipe)
        videoattn.enable_fast_attention(pipe, "exact")
        run(name, pipe)
        assert_served(pipe)
        videoattn.disable(pipe)
        assert torch.equal(run(name, pipe), host)


@pytest.mark.parametrize("name", ["wan", "skyreels_v2"])
def test_a_backend_of_diffusers_set_afterwards_is_obeyed(name):
    pipe = build(name)
    pipe.transformer.set_attention_backend("_native_math")
    math = run(name, pipe)

    pipe = videoattn.enable_fast_attention(build(name), "exact")
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.equal(run(name, pipe), math)
    report = videoattn.report(pipe)
    assert len(report.refused) == len(report.sites) == 4
    assert all("set after enabling" in why for _, why in report.refused)

    pipe.transformer.reset_attention_backend()
    run(name, pipe)
    assert_served(pipe)
    assert not videoattn.report(pipe).refused

    pipe.transformer.set_attention_backend("_native_math")
    videoattn.disable(pipe)  # with no forward between
    assert torch.equal(run(name, pipe), math)


def test_context_parallelism_is_left_untouched_and_reported():
    pipe = build("wan")
    sites = dict(attention_modules(pipe.transformer))
    sites["blocks.0.attn1"].processor._parallel_config = ContextParallelConfig(ulysses_degree=2)
    before = sites["blocks.0.attn1"].processor
    videoattn.enable_fast_attention(pipe, "exact")
    assert sites["blocks.0.attn1"].processor is before
    assert videoattn.report(pipe).refused == (("blocks.0.attn1", "runs under context parallelism"),)

    sites["blocks.1.attn1"].processor._parallel_config = ContextParallelConfig(ulysses_degree=2)
    assert videoattn.disable(pipe)
    assert sites["blocks.1.attn1"].processor._parallel_config is not None


class UserProcessor(AttnProcessor2_0):
    """Somebody's own: it may do anything."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("order", ["enabled before", "enabled after"])
def test_a_processor_of_the_users_own_is_left_untouched(order):
    def set_own(pipe):
        pipe.transformer.transformer_blocks[1].attn1.set_processor(UserProcessor())

    pipe = build("latte")
    set_own(pipe)
    host = run("latte", pipe)
    pipe = build("latte")
    if order == "enabled before":
        videoattn.enable_fast_attention(pipe, "exact")
    set_own(pipe)
    if order == "enabled after":
        videoattn.enable_fast_attention(pipe, "exact")
    assert torch.equal(run("latte", pipe), host)
    reason = "UserProcessor is not the host's own processor"
    assert videoattn.report(pipe).refused == (("transformer_blocks.1.attn1", reason),)
    assert_served(pipe, except_for=["transformer_blocks.1.attn1"])
    videoattn.disable(pipe)
    assert isinstance(pipe.transformer.transformer_blocks[1].attn1.processor, UserProcessor)


def test_the_hosts_own_processor_put_back_by_hand_is_served_again():
    pipe = build("wan")
    attn = pipe.transformer.blocks[0].attn1
    host = attn.processor
    videoattn.enable_fast_attention(pipe, "exact")
    attn.set_processor(host)
    run("wan", pipe)
    assert_served(pipe)
    videoattn.disable(pipe)
    assert attn.processor is host


def test_attention_slicing_is_left_untouched():
    pipe = build("text_to_video_sd")
    pipe.enable_attention_slicing(1)
    host = run("text_to_video_sd", pipe)
    pipe = videoattn.enable_fast_attention(build("text_to_video_sd"), "exact")
    pipe.enable_attention_slicing(1)
    assert torch.equal(run("text_to_video_sd", pipe), host)
    assert {row.adapter for row in videoattn.report(pipe).sites} == {"untouched"}


# -- AnimateDiff's company ---------------------------------------------------------------------------------------------


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


# -- gradients ---------------------------------------------------------------------------------------------------------


def wan_call(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 3, 6, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, TEXT_DIM, generator=generator),
        "return_dict": False,
    }


@pytest.mark.parametrize("what", ["input", "weights", "lora", "checkpointed weights"])
def test_what_requires_grad_keeps_the_hosts_path(what):
    def gradients(enabled):
        model = build("wan").transformer
        call = wan_call()
        if what == "input":
            call["hidden_states"].requires_grad_()
            leaves = [call["hidden_states"]]
        elif what == "lora":
            peft = pytest.importorskip("peft")
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
            leaves = [p for p in model.parameters() if p.requires_grad]
        else:
            model.requires_grad_()
            leaves = list(model.parameters())
        if what == "checkpointed weights":
            model.enable_gradient_checkpointing()
            model.train()
        if enabled:
            videoattn.enable_fast_attention(model, "exact")
        out = model(**call)[0]
        out.square().sum().backward()
        if enabled:
            report = videoattn.report(model)
            assert report.notes == ("WanTransformer3DModel: inputs or weights require grad: the host's own path",)
            assert not any(row.calls for row in report.sites)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for ours, host in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, host)


def test_it_is_served_again_once_nothing_requires_grad():
    model = videoattn.enable_fast_attention(build("wan").transformer.requires_grad_(), "exact")
    out = model(**wan_call())[0]
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(model(**wan_call())[0], out)
    report = videoattn.report(model)
    assert not report.notes and all(row.calls for row in report.sites)
    assert model(**wan_call())[0].requires_grad
    assert videoattn.report(model).notes


@pytest.mark.parametrize("name", ["wan", "hunyuan_video15", "svd"])
def test_inference_mode(name):
    pipe = build(name)
    with torch.inference_mode():
        host = run(name, pipe)
    videoattn.enable_fast_attention(pipe, "exact")
    with torch.inference_mode():
        ours = run(name, pipe)
    assert distance(ours, host) < 2e-6
    assert distance(run(name, pipe), host) < 2e-6  # and without it, on lengths that it has cached


# -- pipelines that are saved, copied, shared, or none at all ----------------------------------------------------------


def test_saving_leaves_no_trace(tmp_path):
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    keys = list(build("wan").transformer.state_dict())
    run("wan", pipe)
    assert list(pipe.transformer.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    loaded = load("wan", tmp_path)
    assert_undone(loaded)
    videoattn.enable_fast_attention(loaded, "exact")
    assert distance(run("wan", loaded), run("wan", pipe)) < 1e-4
    assert_served(loaded)


@pytest.mark.parametrize("name", ["wan22", "hunyuan_video", "latte"])
def test_a_copy_is_a_session_of_its_own(name):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    latents = run(name, pipe)
    twin = copy.deepcopy(pipe)
    calls = [row.calls for row in videoattn.report(pipe).sites]
    assert torch.equal(run(name, twin), latents)
    assert [row.calls for row in videoattn.report(twin).sites] == calls
    assert [row.calls for row in videoattn.report(pipe).sites] == calls
    assert videoattn.report(twin).generations == 2  # it reads the copy's scheduler
    videoattn.disable(twin)
    assert_undone(twin)
    assert torch.equal(run(name, pipe), latents)
    assert_served(pipe)


def test_a_denoiser_may_be_pickled_while_enabled():
    pipe = videoattn.enable_fast_attention(build("hunyuan_video"), "exact")
    latents = run("hunyuan_video", pipe)
    file = io.BytesIO()
    torch.save(pipe.transformer, file)
    file.seek(0)
    pipe.transformer = torch.load(file, weights_only=False)
    assert torch.equal(run("hunyuan_video", pipe), latents)
    assert_served(pipe)
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_pipelines_that_share_a_denoiser_share_its_session():
    first = videoattn.enable_fast_attention(build("wan"), "exact")
    second = WanVideoToVideoPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    assert second.transformer is first.transformer
    ours = run("wan_v2v", second)
    assert_served(second)
    videoattn.disable(second)
    assert_undone(first)
    assert torch.equal(run("wan_v2v", second), ours)


def test_each_of_two_denoisers_has_a_session():
    pipe = videoattn.enable_fast_attention(build("wan22"), "exact")
    sessions = [session_of(model) for model in (pipe.transformer, pipe.transformer_2)]
    assert None not in sessions and sessions[0] is not sessions[1]
    run("wan22", pipe)
    report = videoattn.report(pipe)
    assert len(report.sites) == 8
    assert report.denoiser_calls == 4
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_a_modular_pipeline():
    """It is no DiffusionPipeline, and its Wan sets no cache_context."""
    host = build("wan")
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(**host.components)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(
            prompt="a red cube",
            negative_prompt="blurry",
            height=48,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output="latents",
            max_sequence_length=32,
        )

    latents = generate()
    assert videoattn.enable_fast_attention(pipe, "exact") is pipe
    assert torch.equal(generate(), latents)
    report = videoattn.report(pipe)
    assert (report.generations, report.denoiser_calls) == (1, 4)
    assert all(row.calls for row in report.sites)
    videoattn.disable(pipe)
    assert_undone(pipe)


def test_a_bare_denoiser():
    model = build("wan").transformer
    with torch.no_grad():
        host = model(**wan_call())[0]
        assert videoattn.enable_fast_attention(model, "exact") is model
        assert torch.equal(model(**wan_call())[0], host)
    assert videoattn.report(model).denoiser_calls == 1
    assert videoattn.disable(model) is model
    assert session_of(model) is None


def test_arguments_may_be_positional():
    model = build("wan").transformer
    call = wan_call()
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact")
        assert torch.equal(model(*(call[name] for name in names), return_dict=False)[0], host)
    assert session_of(model).patches[0].ours.run.plans


@pytest.mark.parametrize("name", ["latte", "svd"])
def test_no_cycle_of_ours_keeps_weights_alive(name):
    """Freed by reference counting alone, as without us: a DiT of diffusers is in a cycle with its own hook registry."""

    def alive(enabled):
        pipe = build(name)
        _, model = denoisers(pipe)[0]
        references = [weakref.ref(x) for x in (pipe, model)]
        if enabled:
            videoattn.enable_fast_attention(pipe, "exact")
            session = weakref.ref(session_of(model))
        run(name, pipe)
        if enabled:
            videoattn.disable(pipe)
            assert session() is None
        del pipe, model
        return [reference() is not None for reference in references]

    gc.collect()
    gc.disable()
    try:
        assert alive(enabled=True) == alive(enabled=False)
    finally:
        gc.enable()
