"""Which adapter serves which denoiser class. A new model family is one file here and its line in `MODELS`."""

from __future__ import annotations

import importlib

from torch import nn

from videoattn.pipelines.adapter import Adapter

MODELS = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx",
    "UNet3DConditionModel": "modelscope",
    "UNetMotionModel": "animatediff",
    "UNetSpatioTemporalConditionModel": "svd",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}


def adapter_for(model: nn.Module) -> Adapter | None:
    """The adapter of a denoiser, or None where its class is no video denoiser that we know.

    Subclasses (a user's own, or one made at run time) are served as the class they derive from.
    """
    for cls in type(model).__mro__:
        if not cls.__module__.startswith("diffusers."):
            continue
        if cls.__name__ in MODELS:
            return importlib.import_module(f"videoattn.pipelines.{MODELS[cls.__name__]}").ADAPTER
        from videoattn.pipelines import generic

        if cls.__name__ in generic.KINDS:
            return generic.adapter(cls.__name__)
    return None
