"""What a model's configs say, without its weights: its parts, its sizes, and how often a generation calls them.

A model is a name of `benchmarks/models.toml`, a folder, or a hub id whose configs were downloaded before. Of the last two only
`model_index.json` and the parts' `config.json` are read; what no config says (tokens of the text, whether guidance takes two
calls) is that of the entry of models.toml with the same pipeline or the same denoiser.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videoattn.benchmarks import models
from videoattn.benchmarks.models import Spec

DENOISERS = ("transformer", "transformer_2", "unet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TEXT_WIDTH = ("text_dim", "text_embed_dim", "caption_channels", "in_text_dim", "cross_attention_dim")
_IMAGE_WIDTH = ("image_dim", "image_embed_dim")
_TEXT_TOKENS = ("max_text_seq_length",)  # CogVideoX, whose places are fixed; the others' pipelines say it
_SPATIAL = (
    *("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor"),
    "spatial_compression_ratio",
)
_TEMPORAL = (
    *("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"),
    "temporal_compression_ratio",
)
_IDLE = re.compile(r"tokenizer|feature_extractor|processor|safety_checker|guider|motion_adapter")  # no model, or merged
_NO_OPTION = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a video, in pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}, {self.frames} frames"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline that is described and not loaded.

    Args:
        name: as it was asked for.
        spec: in the form of an entry of models.toml.
        index: model_index.json, empty for a name of models.toml.
        size, steps: what its pipeline generates by default.
    """

    name: str
    spec: Spec
    index: Mapping[str, Any]
    size: Size
    steps: int

    @property
    def components(self) -> dict[str, Spec]:
        return self.spec["components"]

    @property
    def denoisers(self) -> dict[str, Spec]:
        """Component -> config, in the order in which a generation calls them."""
        return {name: self.components[name] for name in DENOISERS if name in self.components}

    @property
    def denoiser(self) -> Spec:
        return _denoiser(self.spec)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.spec["dtype"])

    @property
    def pipeline(self) -> type:
        import diffusers

        return getattr(diffusers, self.spec["pipeline"])

    @cached_property
    def argument(self) -> Mapping[str, Any]:
        """The defaults of the pipeline's own arguments."""
        parameters = inspect.signature(self.pipeline.__call__).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def encoders(self) -> tuple[str, ...]:
        """Text and image encoders that a generation calls; of a name of models.toml those too that it does not describe."""
        if self.index:
            return tuple(filter(_is_encoder, self.components))
        cls = self.pipeline
        parts = tuple(inspect.signature(cls.__init__).parameters)
        idle = () if "image" in self.spec else cls._optional_components
        return tuple(part for part in parts if _is_encoder(part) and (part in self.components or part not in idle))

    def others(self) -> tuple[str, ...]:
        """Parts that compute and are neither encoders, nor denoisers, nor the VAE: connectors, vocoders."""
        taken = inspect.signature(self.pipeline.__init__).parameters.values()
        named = tuple(parameter.name for parameter in taken if parameter.default is inspect.Parameter.empty)[1:]
        parts = tuple(part for part, value in self.index.items() if isinstance(value, list) and value[0] is not None)
        return tuple(part for part in parts or named if not _is_planned(part) and not _IDLE.search(part))

    @property
    def branches(self) -> int:
        """How many prompts guidance encodes: with and without, or one where the guidance is an input of the denoiser."""
        return 1 if self.denoiser.get("guidance_embeds") else 2

    @property
    def calls_a_step(self) -> int:
        """Denoiser calls: two where the branches of guidance are not rows of one call."""
        return 1 if self.spec["batch"] == 2 else self.branches

    def built(self, component: str) -> nn.Module:
        """A component on the meta device."""
        return models.build(self.components[component], device="meta", dtype=self.dtype, seed=0)

    def split(self, steps: int) -> dict[str, int]:
        """Denoiser -> its steps. Of two, as in Wan 2.2, the first has those whose timestep is at the boundary or above."""
        names = list(self.denoisers)
        boundary = self.index.get("boundary_ratio")
        if len(names) == 1 or boundary is None:
            return {name: steps if name == names[0] else 0 for name in names}
        scheduler = models.build(self.components["scheduler"], device="cpu", dtype=torch.float32, seed=0)
        scheduler.set_timesteps(steps)
        first = int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())
        return {names[0]: first, names[1]: steps - first}

    def require(self, size: Size) -> None:
        """Raise ValueError unless the model takes videos of this size."""
        latent, config = self.spec["latent"], self.denoiser
        multiple = latent["spatial"] * _patch(config)
        for axis in ("height", "width"):
            value = getattr(size, axis)
            if value < 1 or value % multiple:
                raise ValueError(f"{axis}: {self.name} takes multiples of {multiple}, got {value}")
        step = latent["temporal"]
        rest = self.size.frames % step
        if size.frames < 1 or size.frames % step != rest:
            wanted = f"multiples of {step}" if rest == 0 else f"multiples of {step} and {rest} more"
            raise ValueError(f"frames: {self.name} takes {wanted}, got {size.frames}")
        most = config.get("motion_max_seq_length") or config.get("video_length")
        if most and size.frames > most:
            raise ValueError(f"frames: {self.name} takes at most {most}, got {size.frames}")


def describe(model: str) -> Model:
    """The model that a name, a folder or a hub id stands for. Raises ValueError where there is none."""
    if model in models.names():
        spec = models.spec(model)
        height, width, frames = spec["sizes"][0]
        return Model(
            name=model, spec=spec, index={}, size=Size(height=height, width=width, frames=frames), steps=spec["steps"]
        )
    if Path(model).is_dir():
        return _from_folder(model, Path(model))
    if _HUB_ID.fullmatch(model):
        return _from_folder(model, _snapshot(model))
    raise ValueError(
        f"MODEL: wanted a folder, a hub id (owner/name) or one of {', '.join(models.names())}; got {model!r}"
    )


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns="*.json"))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{hub_id}: wanted its configs on this disk, got none; `hf download {hub_id} --include '*.json'` fetches them"
        ) from error


def _from_folder(name: str, folder: Path) -> Model:
    index = _json(folder / "model_index.json")
    parts = {part: value[1] for part, value in index.items() if isinstance(value, list) and value[0] is not None}
    components = {part: _config(folder / part, kind) for part, kind in parts.items() if _is_planned(part)}
    found = next((part for part in DENOISERS if part in components), None)
    if found is None:
        raise ValueError(f"{name}: wanted a denoiser ({', '.join(DENOISERS)}), got {', '.join(parts) or 'no part'}")
    template = _template(name, index.get("_class_name", ""), components[found])
    for part, config in components.items():
        if "_dtype" in template["components"].get(part, {}):
            config["_dtype"] = template["components"][part]["_dtype"]
    spec = {key: value for key, value in template.items() if key != "image"}
    spec |= {"pipeline": index["_class_name"], "components": components}
    if "transformer" in components:
        spec["token_timesteps"] = bool(index.get("expand_timesteps"))
    model = Model(name=name, spec=spec, index=index, size=Size(height=0, width=0, frames=0), steps=0)
    spec |= _sizes(model, template, components[found])
    return Model(name=name, spec=spec, index=index, size=_default_size(model), steps=_default_steps(model))


def _template(name: str, pipeline: str, denoiser: Spec) -> Spec:
    """The entry of models.toml that is nearest: the same denoiser class, and if there is one the same pipeline."""
    entries = [models.spec(entry) for entry in models.names()]
    same = [entry for entry in entries if _denoiser(entry)["_class_name"] == denoiser["_class_name"]]
    if not same:
        known = sorted({_denoiser(entry)["_class_name"] for entry in entries})
        raise ValueError(f"{name}: wanted a denoiser of {', '.join(known)}; got {denoiser['_class_name']}")
    return next((entry for entry in same if entry["pipeline"] == pipeline), same[0])


def _denoiser(entry: Spec) -> Spec:
    return next(entry["components"][part] for part in DENOISERS if part in entry["components"])


def _is_planned(part: str) -> bool:
    return part in (*DENOISERS, "vae", "scheduler") or _is_encoder(part)


def _is_encoder(part: str) -> bool:
    return part.startswith(("text_encoder", "image_encoder"))


def _config(folder: Path, kind: str) -> Spec:
    """A part's config with the class that the index names, without what its constructor does not take."""
    import diffusers

    config = _json(folder / ("scheduler_config.json" if (folder / "scheduler_config.json").exists() else "config.json"))
    options = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NO_OPTION}
    cls = getattr(diffusers, kind, None)
    if cls is not None:
        taken = inspect.signature(cls.__init__).parameters
        options = {key: value for key, value in options.items() if key in taken}
    return {"_class_name": kind, **options}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: wanted the config of a diffusers pipeline, got no such file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: wanted JSON, got {error}") from error


def _sizes(model: Model, template: Spec, denoiser: Spec) -> Spec:
    """Widths and numbers of tokens of what a denoiser is given, where a config says them; the template's elsewhere."""
    sizes = {"latent": _latent(model, template["latent"])}
    sizes["text"] = {
        "tokens": _first(denoiser, _TEXT_TOKENS, template["text"]["tokens"]),
        "width": _first(denoiser, _TEXT_WIDTH, template["text"]["width"]),
    }
    if "text_2" in template:
        sizes["text_2"] = {**template["text_2"], "width": denoiser["text_embed_2_dim"]}
    if "audio" in template:
        sizes["audio"] = {**template["audio"], "channels": denoiser["audio_in_channels"]}
    width = _first(denoiser, _IMAGE_WIDTH, None)
    if "image" in template and width is not None:
        encoder = model.components.get("image_encoder", {})
        tokens = template["image"]["tokens"]
        if "image_size" in encoder:
            tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
        sizes["image"] = {"tokens": tokens, "width": width}
    return sizes


def _latent(model: Model, usual: Spec) -> Spec:
    """Channels and steps of the latent video, as the pipeline itself reads them off its VAE."""
    if "vae" not in model.components:
        return usual
    vae = model.built("vae")
    taken = list(inspect.signature(model.pipeline.__init__).parameters.values())[1:]
    empty = {parameter.name: None for parameter in taken if parameter.default is inspect.Parameter.empty}
    try:
        owners = model.pipeline(**{**empty, "vae": vae}), vae.config, vae
    except ImportError:  # Cosmos makes a safety checker of a package of its own
        owners = vae.config, vae
    return {
        "channels": vae.config.get("z_dim") or vae.config.get("latent_channels") or usual["channels"],
        "spatial": _attribute(owners, _SPATIAL, usual["spatial"]),
        "temporal": _attribute(owners, _TEMPORAL, 1),
    }


def _attribute(owners: tuple[object, ...], names: tuple[str, ...], default: int) -> int:
    return next((getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)), default)


def _first(config: Spec, names: tuple[str, ...], default: Any) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)


def _default_size(model: Model) -> Size:
    """The pipeline's default, or where it has none, or one that this model does not take, what is next to that of its kin."""
    height, width, frames = model.spec["sizes"][0]
    latent = model.spec["latent"]
    given = [model.argument.get(name) for name in ("height", "width", "num_frames")]
    height, width, frames = (
        a if isinstance(a, int) else b for a, b in zip(given, (height, width, frames), strict=True)
    )
    multiple = latent["spatial"] * _patch(model.denoiser)
    most = model.denoiser.get("motion_max_seq_length") or model.denoiser.get("video_length") or math.inf
    return Size(
        height=max(multiple, height // multiple * multiple),
        width=max(multiple, width // multiple * multiple),
        frames=min(frames, most),
    )


def _default_steps(model: Model) -> int:
    steps = model.argument.get("num_inference_steps")
    return steps if isinstance(steps, int) else model.spec["steps"]


def _patch(config: Spec) -> int:
    """Latent pixels along an edge that a denoiser takes together; the UNets crop what their levels do not halve evenly."""
    patch = config.get("patch_size", 1)
    return patch[-1] if isinstance(patch, list | tuple) else patch
