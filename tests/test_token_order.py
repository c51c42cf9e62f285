"""The video's tokens in another order between the seams: the same output, up to the order of sums in attention.

In fp64 that order is all that can show. A sum of n terms moves by n * 1.1e-16 of its size at most, the longest here has
some 600, and a tiny denoiser has four layers of a few sums each: 1e-12 of the output is never reached. Tokens without
their positions, or their timesteps, move it by more than 1e-3.
"""

import copy
import dataclasses
import importlib
import inspect
import io

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FirstBlockCacheConfig,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from peft import LoraConfig
from tiny_parts import TEXT_DIM, randomize
from tiny_pipelines import build, run
from torch import nn

import videoattn
from videoattn.pipelines import generic
from videoattn.pipelines.adapter import set_processor
from videoattn.pipelines.registry import MODELS, adapter_for
from videoattn.pipelines.token_order import Seams, TokenOrder, refuses

TOLERANCE = 1e-12
PIPELINES = (
    "wan",
    "wan22_ti2v",
    "wan22_i2v",
    "wan21_i2v",
    "hunyuan_video",
    "hunyuan_video15",
    "cogvideox",
    "cogvideox_rope",
    "ltx",
)
CASES = (*PIPELINES, "wan22_ti2v per token", "ltx per token", "ltx [B, 1]", "cogvideox15")


def to_double(x):
    """Tensors in fp64, in tuples and dictionaries too."""
    if isinstance(x, dict):
        return {key: to_double(value) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(to_double, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def from_pipeline(name):
    """The denoiser of a tiny pipeline and the inputs of its first call for two videos, in fp64."""
    pipe, calls = build(name), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    run(name, pipe, batch=2)
    hook.remove()
    return pipe.transformer.double(), to_double(calls[0]) | {"return_dict": False}


def cogvideox15():
    """As CogVideoX 1.5 from an image: patches of two frames, `ofs`; tables that no two tokens share."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        ofs_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=5,
        sample_width=8,
        sample_height=6,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    randomize(model, torch.Generator().manual_seed(0))
    angles = torch.rand(24, 16, dtype=torch.float64) * 6
    return model.eval().requires_grad_(False).double(), {
        "hidden_states": torch.randn(2, 4, 4, 6, 8, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, TEXT_DIM, dtype=torch.float64),
        "timestep": torch.tensor([900.0, 400.0], dtype=torch.float64),
        "ofs": torch.full((1,), 2.0, dtype=torch.float64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


def make(name):
    """(denoiser, inputs) of a case: a pipeline and, behind a space, how its timesteps come."""
    if name == "cogvideox15":
        return cogvideox15()
    pipeline, _, timesteps = name.partition(" ")
    model, inputs = from_pipeline(pipeline)
    if timesteps == "per token":
        shape = inputs["hidden_states"].shape[0], tokens_of(model, inputs)
        inputs["timestep"] = inputs["timestep"].flatten()[0] * torch.rand(shape, dtype=torch.float64)
    elif timesteps == "[B, 1]":
        inputs["timestep"] = inputs["timestep"][:, None]
    return model, inputs


def tokens_of(model, inputs):
    return adapter_for(model).grid(model, inputs).tokens


def shuffle(tokens, seed=0):
    index = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return index, index.argsort()


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def video_tokens(model, inputs):
    """The video's tokens as the first block takes them, and the output."""
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    seen = []
    hook = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    (output,) = model(**inputs)
    hook.remove()
    return seen[0], output


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def seams_of(model):
    return adapter_for(model).seams


def test_every_family_with_seams_is_here():
    named = {
        name
        for name, module in MODELS.items()
        if importlib.import_module(f"videoattn.pipelines.{module}").ADAPTER.seams is not None
    }
    assert named - {type(build(name).transformer).__name__ for name in PIPELINES} == {"WanVACETransformer3DModel"}


@pytest.mark.parametrize("name", CASES)
def test_another_order_gives_the_same_output(name):
    model, inputs = make(name)
    seams = seams_of(model)
    raster, expected = video_tokens(model, inputs)
    hooks = hook_count(model)

    order = TokenOrder(model, seams)
    assert refuses(model) is None
    assert seams.refuses(model, inputs) is None
    assert torch.equal(model(**inputs)[0], expected)

    for seed in range(2):
        index, inverse = shuffle(tokens_of(model, inputs), seed)
        order.set(index, inverse)
        permuted, output = video_tokens(model, inputs)
        assert torch.equal(permuted, raster[:, index])
        assert not torch.equal(permuted, raster)
        assert output.shape == expected.shape
        assert output.stride() == expected.stride()
        assert distance(output, expected) < TOLERANCE

    order.set(None, None)
    assert torch.equal(model(**inputs)[0], expected)
    order.set(*shuffle(tokens_of(model, inputs)))
    order.remove()
    order.remove()
    assert hook_count(model) == hooks
    assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize(
    "name, left",
    [
        *((name, {"tables": None}) for name in CASES if name != "cogvideox"),
        *((name, {"per_token": ()}) for name in CASES if name.endswith("per token")),
    ],
)
def test_what_belongs_to_a_token_must_go_with_it(name, left):
    """Else the test above could not fail."""
    model, inputs = make(name)
    expected = model(**inputs)[0]
    TokenOrder(model, dataclasses.replace(seams_of(model), **left)).set(*shuffle(tokens_of(model, inputs)))
    assert distance(model(**inputs)[0], expected) > 1e-3


@pytest.mark.parametrize("name", ["cogvideox_rope", "wan22_ti2v per token"])
def test_inputs_may_come_by_position(name):
    model, inputs = make(name)
    expected = model(**inputs)[0]
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    args = [inputs.get(parameter.name, parameter.default) for parameter in parameters]
    TokenOrder(model, seams_of(model)).set(*shuffle(tokens_of(model, inputs)))
    assert distance(model(*args)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_rope"])
def test_gradients_flow_with_and_without_checkpointing(name):
    model, inputs = make(name)
    model.requires_grad_(True).train()
    weights = [next(model.get_submodule(path).parameters()) for path in (seams_of(model).enter, "proj_out")]
    order = TokenOrder(model, seams_of(model))
    gradients = []
    for checkpointing, permuted in ((False, False), (False, True), (True, True)):
        order.set(*(shuffle(tokens_of(model, inputs)) if permuted else (None, None)))
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        gradients.append(torch.autograd.grad(model(**inputs)[0].square().sum(), weights))
    for other in gradients[1:]:
        assert all(distance(a, b) < TOLERANCE for a, b in zip(other, gradients[0], strict=True))


# -- what the host does to a denoiser ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_rope"])
@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_has_an_order_of_its_own(name, how):
    model, inputs = make(name)
    expected = model(**inputs)[0]
    order = TokenOrder(model, seams_of(model))
    order.set(*shuffle(tokens_of(model, inputs)))
    if how == "copied":
        twin, twin_order = copy.deepcopy((model, order))
    else:
        file = io.BytesIO()
        torch.save((model, order), file)
        file.seek(0)
        twin, twin_order = torch.load(file, weights_only=False)
    order.set(None, None)
    assert torch.equal(model(**inputs)[0], expected)
    raster = video_tokens(model, inputs)[0]
    permuted, output = video_tokens(twin, inputs)
    assert torch.equal(permuted, raster[:, twin_order.index])
    assert distance(output, expected) < TOLERANCE
    twin_order.remove()
    assert hook_count(twin) == 0
    assert hook_count(model) > 0


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox_rope"])
@pytest.mark.parametrize("first", ["order", "compile"])
@torch.no_grad()
def test_blocks_may_be_compiled(name, first, fresh_compiler):
    """HunyuanVideo's repeated blocks take in the patch embedding, so that its hook is compiled too."""
    model, inputs = make(name)
    expected = model(**inputs)[0]
    if first == "order":
        order = TokenOrder(model, seams_of(model))
    repeated = {"HunyuanVideoPatchEmbed", "HunyuanVideoTransformerBlock", "CogVideoXBlock"}
    for module in model.modules():
        if type(module).__name__ in repeated:
            module.compile(backend="eager", fullgraph=True)
    assert distance(model(**inputs)[0], expected) < TOLERANCE
    if first == "compile":
        order = TokenOrder(model, seams_of(model))
    for seed in range(2):
        order.set(*shuffle(tokens_of(model, inputs), seed))
        assert distance(model(**inputs)[0], expected) < TOLERANCE
    order.set(None, None)
    assert distance(model(**inputs)[0], expected) < TOLERANCE
    order.set(*shuffle(tokens_of(model, inputs)))
    order.remove()
    assert distance(model(**inputs)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["wan", "cogvideox_rope"])
@torch.no_grad()
def test_a_whole_denoiser_may_be_compiled(name, fresh_compiler):
    model, inputs = make(name)
    expected = model(**inputs)[0]
    order = TokenOrder(model, seams_of(model))
    model.compile(backend="eager")
    for at in (shuffle(tokens_of(model, inputs)), (None, None)):
        order.set(*at)
        assert distance(model(**inputs)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["wan", "cogvideox_rope"])
@torch.no_grad()
def test_a_forward_that_leaves_hooks_out_is_an_error(name, fresh_compiler):
    """torch.compile does not guard on the hooks of a module, so what it compiled runs without those that came later."""
    model, inputs = make(name)
    model.compile(backend="eager")
    expected = model(**inputs)[0]
    order = TokenOrder(model, seams_of(model))
    order.set(*shuffle(tokens_of(model, inputs)))
    with pytest.raises(RuntimeError, match="hooks of the token order to run, got"):
        model(**inputs)
    torch.compiler.reset()
    assert distance(model(**inputs)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_hooks_follow_lora(name):
    model, inputs = make(name)
    seams = seams_of(model)
    order = TokenOrder(model, seams)
    hooks = hook_count(model)
    model.add_adapter(LoraConfig(r=2, target_modules=[seams.enter, seams.leave], init_lora_weights=False))
    model.double()
    expected = model(**inputs)[0]
    order.set(*shuffle(tokens_of(model, inputs)))
    assert distance(model(**inputs)[0], expected) > 1e-3  # the hooks are inside LoRA's wrappers
    order.follow(model)
    order.follow(model)
    assert hook_count(model) == hooks
    assert distance(model(**inputs)[0], expected) < TOLERANCE

    model.unload_lora()
    order.follow(model)
    assert hook_count(model) == hooks
    output = model(**inputs)[0]
    order.set(None, None)
    assert distance(output, model(**inputs)[0]) < TOLERANCE


def test_hooks_survive_offloading():
    model, inputs = make("wan")
    expected = model(**inputs)[0]
    TokenOrder(model, seams_of(model)).set(*shuffle(tokens_of(model, inputs)))
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert refuses(model) is None
    assert distance(model(**inputs)[0], expected) < TOLERANCE


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_vace_keeps_its_order():
    with torch.device("meta"):
        model = WanVACETransformer3DModel(num_layers=1, vace_layers=[0])
    assert "control tokens" in seams_of(model).refuses(model, {})


@pytest.mark.parametrize("kind", [None, "latent_concat", "token_replace"])
def test_hunyuan_video_from_an_image(kind):
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, image_condition_type=kind)
    reason = seams_of(model).refuses(model, {})
    assert (reason is not None) == (kind == "token_replace")


def test_cogvideox_with_a_mask():
    model, inputs = make("cogvideox_rope")
    seams = seams_of(model)
    assert seams.refuses(model, inputs | {"attention_kwargs": {"scale": 1.0}}) is None
    assert "mask" in seams.refuses(model, inputs | {"attention_kwargs": {"attention_mask": torch.ones(1, 1)}})


@pytest.mark.parametrize("change", [{"num_frames": 1}, {"num_frames": None}])
def test_ltx_with_tokens_beside_the_video(change):
    model, inputs = make("ltx")
    assert "one video's" in seams_of(model).refuses(model, inputs | change)


@pytest.mark.parametrize("name", ["HunyuanVideoFramepackTransformer3DModel", "LTX2VideoTransformer3DModel"])
def test_other_families_have_no_seams(name):
    assert generic.adapter(name).seams is None


class OwnForward(WanTransformer3DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnClass(WanTransformer3DModel):
    pass


class OwnProcessor:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_what_was_put_into_the_layers_is_seen():
    def wan(cls=WanTransformer3DModel):
        with torch.device("meta"):
            return cls(num_layers=2)

    assert refuses(wan(OwnClass)) is None
    assert "forward of its own" in refuses(wan(OwnForward))

    model = wan()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "fbc_leader_block_hook" in refuses(model)
    model.disable_cache()
    assert refuses(model) is None

    model.enable_layerwise_casting()
    assert refuses(model) is None

    set_processor(model.blocks[1].attn1, OwnProcessor())
    assert "OwnProcessor" in refuses(model)

    model = wan()
    model._parallel_config = object()
    assert "devices" in refuses(model)


def test_our_own_processors_are_no_reason():
    pipe = videoattn.enable_fast_attention(build("hunyuan_video"), "exact")
    assert refuses(pipe.transformer) is None


def test_an_order_is_validated():
    model = make("wan")[0]
    order = TokenOrder(model, seams_of(model))
    index, inverse = shuffle(8)
    with pytest.raises(ValueError, match="got one of them"):
        order.set(index, None)
    with pytest.raises(ValueError, match="got one of them"):
        order.set(None, inverse)
    with pytest.raises(TypeError, match=r"int64, got torch\.int32"):
        order.set(index.int(), inverse)
    with pytest.raises(ValueError, match=r"\[8\] and \[7\]"):
        order.set(index, inverse[:7])
    with pytest.raises(ValueError, match=r"\[1, 8\]"):
        order.set(index[None], inverse[None])
    assert order.index is order.inverse is None


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_rope", "ltx"])
@pytest.mark.parametrize("by", [-1, 1])
def test_an_order_of_another_video_is_refused_by_the_forward(name, by):
    model, inputs = make(name)
    TokenOrder(model, seams_of(model)).set(*shuffle(tokens_of(model, inputs) + by))
    with pytest.raises(ValueError, match="tokens, as the order has"):
        model(**inputs)


def test_a_denoiser_without_the_modules_stays_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wanted a module 'proj_out', got none"):
        TokenOrder(model, Seams(enter="0", leave="proj_out"))
    assert hook_count(model) == 0


def test_a_forward_set_on_the_denoiser_itself_is_a_reason():
    """As packages do that keep tokens from step to step."""
    model = build("wan").transformer
    assert refuses(model) is None
    model.forward = model.forward
    assert refuses(model) == "WanTransformer3DModel has a forward of its own"
