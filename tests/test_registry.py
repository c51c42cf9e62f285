"""Which models are served: every video denoiser of diffusers, none of its image and audio models, each layer by its kind."""

import importlib
import inspect
import pkgutil
import re

import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from diffusers import ModelMixin

import videoattn
from videoattn.pipelines import generic
from videoattn.pipelines.adapter import attention_modules
from videoattn.pipelines.registry import MODELS, adapter_for

# Denoisers of images, sound, text or proteins, and parts of other models. JoyImageEdit's take one image as a video;
# Flux 3 denoises an image beside images that it is given.
NOT_VIDEO = {
    "AceStepTransformer1DModel",
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "BriaFiboTransformer2DModel",
    "BriaTransformer2DModel",
    "ChromaTransformer2DModel",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "DiTTransformer2DModel",
    "DreamLiteTransformer2DModel",
    "DreamLiteUNetModel",
    "ErnieImageTransformer2DModel",
    "Flux2Transformer2DModel",
    "Flux3Transformer2DModel",
    "FluxTransformer2DModel",
    "GlmImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "HunyuanImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky3UNet",
    "Krea2Transformer2DModel",
    "LongCatAudioDiTTransformer",
    "LongCatImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "MiniMaxMusic3RVQDepthDecoder",
    "MiniMaxMusic3Transformer1DModel",
    "MotionAdapter",
    "NucleusMoEImageTransformer2DModel",
    "OmniGenTransformer2DModel",
    "OvisImageTransformer2DModel",
    "PRXTransformer2DModel",
    "PixArtTransformer2DModel",
    "PriorTransformer",
    "QwenImage21Transformer2DModel",
    "QwenImageTransformer2DModel",
    "RFD4ProteinaTransformer",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "StableAudio3DiTModel",
    "StableAudioDiTModel",
    "StableCascadeUNet",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "UNet1DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UVit2DModel",
    "ZImageTransformer2DModel",
}

FULL_AND_CROSS = {"attn1": "full", "attn2": "cross"}
WAN = {f"blocks.#.{attn}": kind for attn, kind in FULL_AND_CROSS.items()}
DIT = {f"transformer_blocks.#.{attn}": kind for attn, kind in FULL_AND_CROSS.items()}
HUNYUAN = {
    "context_embedder.token_refiner.refiner_blocks.#.attn": "text",
    "transformer_blocks.#.attn": "joint",
    "single_transformer_blocks.#.attn": "joint",
}
LTX2 = DIT | {
    "transformer_blocks.#.audio_attn1": "audio",
    "transformer_blocks.#.audio_attn2": "cross",
    "transformer_blocks.#.audio_to_video_attn": "cross",
    "transformer_blocks.#.video_to_audio_attn": "cross",
}

# Denoisers that no tiny pipeline holds -> module path with numbers as # -> kind, by reading the host's forward
KINDS = {
    "AnyFlowFARTransformer3DModel": WAN,
    "AnyFlowTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN,
    "ConsisIDTransformer3DModel": {"transformer_blocks.#.attn1": "joint"},
    "Cosmos3OmniTransformer": {"layers.#.self_attn": "joint"},
    "EasyAnimateTransformer3DModel": {"transformer_blocks.#.attn1": "joint"},
    "HeliosTransformer3DModel": WAN,
    "HunyuanVideoFramepackTransformer3DModel": HUNYUAN,
    "Kandinsky6SRTransformer3DModel": {"visual_transformer_blocks.#.self_attention": "full"},
    "Kandinsky6Transformer3DModel": {
        "video_text_transformer_blocks.#.attn": "text",
        "audio_text_transformer_blocks.#.attn": "text",
        "visual_transformer_blocks.#.video_dec_block.self_attention": "full",
        "visual_transformer_blocks.#.video_dec_block.cross_attention": "cross",
        "visual_transformer_blocks.#.audio_dec_block.self_attention": "audio",
        "visual_transformer_blocks.#.audio_dec_block.cross_attention": "cross",
        "visual_transformer_blocks.#.va_cross_attention": "cross",
        "visual_transformer_blocks.#.av_cross_attention": "cross",
    },
    "MiniMaxH3Transformer3DModel": {
        "token_refiner.refiner_blocks.#.attn": "text",
        "transformer_blocks.#.attn": "joint",
    },
    "MotifVideoTransformer3DModel": {
        "transformer_blocks.#.attn": "joint",
        "transformer_blocks.#.cross_attn": "cross",
        "single_transformer_blocks.#.attn": "joint",
        "single_transformer_blocks.#.cross_attn": "cross",
    },
    "SanaVideoTransformer3DModel": DIT,
    "SanaWMLTX2RefinerTransformer3DModel": LTX2,
    "SanaWMTransformer3DModel": {"blocks.#.cross_attn": "cross"},
    "WanAnimate2Transformer3DModel": {"blocks.#.self_attn": "full", "blocks.#.cross_attn": "cross"},
    "WanAnimateTransformer3DModel": WAN | {"face_adapter.#": "cross"},
    "WanVACETransformer3DModel": WAN | {f"vace_{name}": kind for name, kind in WAN.items()},
}
CONFIGS = {
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "MotifVideoTransformer3DModel": {
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
}
REFUSED = {
    "SanaVideoTransformer3DModel": {"SanaLinearAttnProcessor3_0 calls no attention that can be routed"},
}


def models() -> dict[str, type]:
    """Every model class that diffusers defines among its transformers and UNets."""
    found = {}
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, cls in vars(module).items():
                if inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__:
                    found[name] = cls
    return found


ALL = models()


def test_every_model_of_diffusers_is_told_apart():
    served = MODELS.keys() | generic.KINDS.keys()
    assert not served & NOT_VIDEO
    assert not MODELS.keys() & generic.KINDS.keys()
    assert ALL.keys() - NOT_VIDEO - served == set(), "a model that is neither known as a video denoiser nor as none"
    assert len(ALL.keys() & served) >= 30


@pytest.mark.parametrize("name", [name for name in KINDS if name in ALL])
def test_a_model_that_no_tiny_pipeline_holds(name):
    """Its layers are of the kinds that the table says, and its processors can be stood in for and put back."""
    with torch.device("meta"):
        model = ALL[name](**CONFIGS.get(name, {}))
    sites = [site for _, site in adapter_for(model).sites(model)]
    assert {re.sub(r"(?<=\.)\d+", "#", site.name): site.kind for site in sites} == KINDS[name]
    assert [site.name for site in sites] == [path for path, _ in attention_modules(model)]

    before = [module.processor for _, module in attention_modules(model)]
    videoattn.enable_fast_attention(model)
    report = videoattn.report(model)
    assert {reason for _, reason in report.refused} == REFUSED.get(name, set())
    assert any(row.adapter != "untouched" for row in report.sites)
    videoattn.disable(model)
    assert [module.processor for _, module in attention_modules(model)] == before


def test_a_subclass_is_served_as_its_base():
    class Mine(ALL["WanTransformer3DModel"]):
        pass

    with torch.device("meta"):
        assert adapter_for(Mine(num_layers=1)).name == "wan"


def test_a_stranger_of_the_same_name_is_not_served():
    class WanTransformer3DModel(torch.nn.Module):
        pass

    assert adapter_for(WanTransformer3DModel()) is None
