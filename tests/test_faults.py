"""Bad input: a clear error with what was wanted, got and where, and the pipeline left exactly as it was."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from served import wan_call
from tiny_parts import image_vae, randomize, t5_encoder
from tiny_pipelines import build, denoisers, run

import videoattn
from videoattn.pipelines.adapter import attention_modules
from videoattn.policy import EXACT, Policy
from videoattn.session import session_of


def flux():
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8
    )


def image_unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def state(pipe):
    """Everything that enabling may change."""
    return [
        (name, module.processor, dict(model._forward_pre_hooks), dict(model._forward_hooks))
        for _, model in denoisers(pipe)
        for name, module in attention_modules(model)
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("turbo",), ValueError, "preset: wanted one of exact, balanced, fast, got 'turbo'"),
        ((None,), TypeError, "policy: wanted a Policy or one of .*, got NoneType"),
        (("exact", "sdpa"), TypeError, "positional"),
        ({"policies": "exact"}, TypeError, "policies"),
        ({"backend": "sage"}, ValueError, "backend: wanted one of auto, sdpa, .*, got 'sage'"),
        ({"backend": None}, ValueError, "backend: wanted one of auto, .*, got None"),
        (
            {"backend": "sdpa_flash"},
            ValueError,
            r"backend 'sdpa_flash' refuses \w+ \S+attn1: no GPU",
        ),
        (
            {"policy": "fast", "backend": "sdpa_cudnn"},
            ValueError,
            r"backend 'sdpa_cudnn' refuses \w+ \S+attn1: no GPU",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("enabled", [False, True], ids=["untouched", "enabled before"])
@pytest.mark.parametrize("name", ["wan22", "svd"])
def test_a_wrong_setting_changes_nothing(name, enabled, arguments, error, message):
    pipe = build(name)
    if enabled:
        videoattn.enable_fast_attention(pipe, "exact")
    before, sessions = state(pipe), [session_of(model) for _, model in denoisers(pipe)]
    args, kwargs = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    with pytest.raises(error, match=message):
        videoattn.enable_fast_attention(pipe, *args, **kwargs)
    with pytest.raises(error, match=message), videoattn.fast_attention(pipe, *args, **kwargs):
        pass
    assert state(pipe) == before
    assert [session_of(model) for _, model in denoisers(pipe)] == sessions


@pytest.mark.parametrize("make", [flux, image_unet, image_vae, t5_encoder, lambda: torch.nn.Linear(2, 2)])
def test_a_model_without_video_attention_is_refused(make):
    model = make()
    name = type(model).__name__
    with pytest.raises(
        ValueError, match=f"denoiser: wanted a video denoiser of diffusers .*WanTransformer3DModel.*, got {name}"
    ):
        videoattn.enable_fast_attention(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("got", [None, "wan", 3, [], {"transformer": None}, object()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("call", [videoattn.enable_fast_attention, videoattn.disable, videoattn.report])
def test_what_is_no_pipeline_is_refused(call, got):
    wanted = "pipe: wanted a diffusers pipeline with one of transformer, transformer_2, unet, or a denoiser"
    with pytest.raises(TypeError, match=f"{wanted}, got {type(got).__name__}"):
        call(got)


def test_a_pipeline_of_images_is_refused():
    class ImagePipeline(DiffusionPipeline):
        def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL):
            super().__init__()
            self.register_modules(unet=unet, vae=vae)

    pipe = ImagePipeline(image_unet(), image_vae())
    before = state(pipe)
    with pytest.raises(ValueError, match="got UNet2DConditionModel"):
        videoattn.enable_fast_attention(pipe)
    assert state(pipe) == before


def test_one_denoiser_that_is_refused_leaves_the_other_untouched():
    pipe = build("wan22")
    pipe.transformer_2 = flux()
    before = state(pipe)
    with pytest.raises(ValueError, match="got FluxTransformer2DModel"):
        videoattn.enable_fast_attention(pipe)
    assert state(pipe) == before


def test_a_denoiser_with_nothing_to_serve_is_refused_with_the_reasons():
    class Theirs:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    model = build("wan").transformer
    for _, attn in attention_modules(model):
        attn.set_processor(Theirs())
    with pytest.raises(
        ValueError, match="WanTransformer3DModel: wanted a denoiser .*Theirs is not the host's own processor"
    ):
        videoattn.enable_fast_attention(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["wan", "latte"])
def test_disabling_what_is_not_enabled_changes_nothing(name):
    pipe = build(name)
    before = state(pipe)
    assert videoattn.disable(pipe) is pipe
    assert videoattn.disable_fast_attention(pipe) is pipe
    assert state(pipe) == before
    with pytest.raises(ValueError, match="report: wanted a pipeline with fast attention enabled, got an untouched"):
        videoattn.report(pipe)


def test_a_named_backend_is_not_refused_for_weights_that_have_yet_to_be_moved(monkeypatch):
    """On a machine with a GPU, weights on the CPU may be offloaded: the call decides."""
    pipe = build("wan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    videoattn.enable_fast_attention(pipe, "exact", backend="sdpa_flash")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend 'sdpa_flash' refuses .* on cpu: no GPU"):
        run("wan", pipe)
    videoattn.disable(pipe)
    assert run("wan", pipe).isfinite().all()


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "latte", "svd"])
def test_an_error_while_it_runs_leaves_it_usable(name):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    latents = run(name, pipe)

    def fail(module, args):
        raise RuntimeError("out of memory")

    _, attn = next(attention_modules(denoisers(pipe)[0][1]))
    handle = attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(name, pipe)
    handle.remove()
    assert torch.equal(run(name, pipe), latents)
    videoattn.disable(pipe)
    assert not denoisers(pipe)[0][1]._forward_pre_hooks


def test_an_error_within_the_context_manager_undoes_it():
    pipe = build("wan")
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt), videoattn.fast_attention(pipe, "exact"):
        raise KeyboardInterrupt
    assert state(pipe) == before


# -- legal, if unusual -------------------------------------------------------------------------------------------------


def host_and_ours(model, call):
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact")
        ours = model(**call)[0]
    assert all(row.calls for row in videoattn.report(model).sites)
    return host, ours


@pytest.mark.parametrize("where", ["hidden_states", "encoder_hidden_states", "weights"])
def test_nan_comes_out_as_from_the_host(where):
    model, call = build("wan").transformer, wan_call()
    if where == "weights":
        model.blocks[1].attn1.to_k.weight[0, 0] = torch.nan
    else:
        call[where].flatten()[0] = torch.nan
    host, ours = host_and_ours(model, call)
    assert host.isnan().any()
    assert torch.equal(host.isnan(), ours.isnan())
    assert torch.equal(host.nan_to_num(), ours.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype):
    model = build("wan").transformer.to(dtype)
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in wan_call().items()}
    host, ours = host_and_ours(model, call)
    assert ours.dtype == dtype and torch.equal(host, ours)


@pytest.mark.parametrize("name", ["animatediff", "i2vgen_xl", "ltx"])
def test_head_dim_7(name):
    """Of models whose positions allow it."""
    pipe = build(name, head_dim=7)
    host = run(name, pipe)
    videoattn.enable_fast_attention(pipe, "exact")
    assert float((run(name, pipe) - host).norm() / host.norm()) <= (1e-6 if name == "ltx" else 0)
    assert 7 in {row.shape[-1] for row in videoattn.report(pipe).sites}


def test_an_empty_context():
    """No token of text at all: cross-attention adds nothing. (An empty batch the host itself does not take.)"""
    model, call = build("wan").transformer, wan_call()
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :0]
    host, ours = host_and_ours(model, call)
    assert torch.equal(host, ours)


def test_strides_as_they_come():
    model, call = build("wan").transformer, wan_call()
    call["hidden_states"] = call["hidden_states"].repeat_interleave(2, dim=4)[..., ::2]
    call["encoder_hidden_states"] = call["encoder_hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not call["hidden_states"].is_contiguous() and not call["encoder_hidden_states"].is_contiguous()
    host, ours = host_and_ours(model, call)
    assert torch.equal(host, ours)


def test_a_mask_that_no_pipeline_passes_is_obeyed():
    """Wan's attention takes one; bool and additive, in two dimensions and in four."""
    model = build("wan").transformer
    attn = model.blocks[0].attn1
    x = torch.randn(1, 6, attn.to_q.in_features)
    masks = [torch.ones(6, 6).tril().bool(), torch.randn(1, 1, 6, 6), torch.ones(1, 2, 6, 6).bool()]
    host = [attn(x, attention_mask=mask) for mask in masks]
    videoattn.enable_fast_attention(model, Policy(name="mine", decision=EXACT))
    with torch.no_grad():
        model(**wan_call())  # binds the processors
    assert not isinstance(attn.processor, type(build("wan").transformer.blocks[0].attn1.processor))
    for mask, expected in zip(masks, host, strict=True):
        assert torch.equal(attn(x, attention_mask=mask), expected)


def test_nothing_but_the_denoiser_changes(monkeypatch):
    """No class, no global, no other model: what runs beside it runs as before."""
    sdpa, processor = F.scaled_dot_product_attention, WanTransformer3DModel.forward
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    other = build("wan")
    run("wan", pipe)
    assert F.scaled_dot_product_attention is sdpa and WanTransformer3DModel.forward is processor
    assert not other.transformer._forward_pre_hooks
    unet = image_unet().eval().requires_grad_(False)
    randomize(unet, torch.Generator().manual_seed(0))
    assert unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 8)).sample.isfinite().all()
    for component in ("vae", "text_encoder"):
        assert not any(module._forward_pre_hooks for module in getattr(pipe, component).modules())
