"""Video denoisers without processors of their own here: only where their attention is and of what kind.

Every class of diffusers' video families stands in `KINDS`, so that an image model or an unknown one is told apart.
"""

from __future__ import annotations

from videoattn.call import Kind
from videoattn.pipelines.adapter import Adapter

_Kinds = tuple[tuple[str, Kind], ...]

_FULL_AND_CROSS: _Kinds = (("*attn2", "cross"), ("*attn1", "full"))
_JOINT: _Kinds = (("*refiner*", "text"), ("*cross*", "cross"), ("*", "joint"))
_KANDINSKY: _Kinds = (
    ("*text_transformer_blocks*", "text"),
    ("*cross_attention", "cross"),
    ("*audio_dec_block*", "audio"),
    ("*", "full"),
)
_LTX2: _Kinds = (
    ("*audio_attn1", "audio"),
    ("*audio_attn2", "cross"),
    ("*audio_to_video_attn", "cross"),
    ("*video_to_audio_attn", "cross"),
    *_FULL_AND_CROSS,
)

KINDS: dict[str, _Kinds] = {
    "AllegroTransformer3DModel": _FULL_AND_CROSS,
    "AnyFlowFARTransformer3DModel": _FULL_AND_CROSS,
    "AnyFlowTransformer3DModel": _FULL_AND_CROSS,
    "ChronoEditTransformer3DModel": _FULL_AND_CROSS,
    "ConsisIDTransformer3DModel": _JOINT,
    "Cosmos3OmniTransformer": _JOINT,
    "CosmosTransformer3DModel": _FULL_AND_CROSS,
    "EasyAnimateTransformer3DModel": _JOINT,
    "HeliosTransformer3DModel": _FULL_AND_CROSS,
    "HunyuanVideoFramepackTransformer3DModel": _JOINT,
    "I2VGenXLUNet": (
        ("*temp_attentions*", "temporal"),
        ("transformer_in*", "temporal"),
        ("image_latents_temporal_encoder*", "temporal"),
        ("*attn2", "cross"),
        ("*attn1", "spatial"),
    ),
    "Kandinsky5Transformer3DModel": _KANDINSKY,
    "Kandinsky6SRTransformer3DModel": _KANDINSKY,
    "Kandinsky6Transformer3DModel": _KANDINSKY,
    "LTX2VideoTransformer3DModel": _LTX2,
    "LatteTransformer3DModel": (
        ("temporal_transformer_blocks*attn1", "temporal"),
        ("*attn2", "cross"),
        ("*attn1", "spatial"),
    ),
    "MiniMaxH3Transformer3DModel": _JOINT,
    "MochiTransformer3DModel": _JOINT,
    "MotifVideoTransformer3DModel": _JOINT,
    "SanaVideoTransformer3DModel": _FULL_AND_CROSS,
    "SanaWMLTX2RefinerTransformer3DModel": _LTX2,
    "SanaWMTransformer3DModel": (("*cross_attn", "cross"),),
    "SkyReelsV2Transformer3DModel": _FULL_AND_CROSS,
    "WanAnimate2Transformer3DModel": (("*cross_attn", "cross"), ("*self_attn", "full")),
    "WanAnimateTransformer3DModel": (("face_adapter*", "cross"), *_FULL_AND_CROSS),
}


def adapter(class_name: str) -> Adapter:
    """The adapter of a class in `KINDS`."""
    return Adapter(name="generic", kinds=KINDS[class_name])
