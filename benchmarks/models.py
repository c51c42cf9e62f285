"""Video models at their real size with random weights, from ``models.toml``: nothing is downloaded.

``load`` builds a whole pipeline, ``denoiser`` its denoiser alone and ``inputs`` what the pipeline would call it with.
Modules are made on the device and in the dtype asked for, with the initialisation of their own classes, so that a card
that can hold the model can build it. As in ``from_pretrained``, what a class keeps in fp32 stays in fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videoattn.benchmarks import denoiser_inputs

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Spec = dict[str, Any]
DENOISERS = ("transformer", "unet")


def names() -> tuple[str, ...]:
    """Every model of ``models.toml``."""
    return tuple(_table())


def loadable() -> tuple[str, ...]:
    """Those with a whole pipeline; of the others only the denoiser is described."""
    return tuple(
        name for name in names() if "scheduler" in spec(name)["components"] and "vae" in spec(name)["components"]
    )


def spec(name: str) -> Spec:
    """One entry of ``models.toml`` with what it extends filled in. ValueError for an unknown name."""
    table = _table()
    if name not in table:
        raise ValueError(f"wanted a model of benchmarks/models.toml ({', '.join(table)}), got {name!r}")
    entry = table[name]
    return _merge(spec(entry["extends"]), entry) if "extends" in entry else entry


def load(name: str, *, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0):
    """The diffusers pipeline on ``device`` with random weights. ``dtype`` replaces the model's own, except where
    ``models.toml`` fixes a part's (Wan's VAE in fp32). ValueError where only the denoiser is described."""
    import diffusers

    entry = spec(name)
    if name not in loadable():
        raise ValueError(f"{name}: only its denoiser is described; wanted one of {', '.join(loadable())}")
    parts = {
        part: build(config, device=device, dtype=dtype or getattr(torch, entry["dtype"]), seed=seed + index)
        for index, (part, config) in enumerate(entry["components"].items())
    }
    return getattr(diffusers, entry["pipeline"])(**parts)


def denoiser(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    overrides: Spec | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model's denoiser alone, in eval mode. ``overrides`` replace values of its config, for a smaller model."""
    entry = spec(name)
    config = {**_denoiser_config(entry), **(overrides or {})}
    return build(config, device=device, dtype=dtype or getattr(torch, entry["dtype"]), seed=seed)


def inputs(
    name: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int | None = None,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    overrides: Spec | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The keyword arguments of one call of ``denoiser(name)``: shapes, layouts and masks as the pipeline gives them.

    Sizes are of the video in pixels and frames; None is the model's default. A prompt has
    ``denoiser_inputs.PROMPT_TOKENS`` tokens, the rest of the text is padding.
    """
    entry = spec(name)
    default = entry["sizes"][0]
    size = tuple(given or usual for given, usual in zip((height, width, frames), default, strict=True))
    config = {**_denoiser_config(entry), **(overrides or {})}
    return denoiser_inputs.make(
        entry,
        config,
        *size,
        batch or entry["batch"],
        device=device,
        dtype=dtype or getattr(torch, entry["dtype"]),
        seed=seed,
    )


def build(config: Spec | str, *, device: torch.device | str, dtype: torch.dtype, seed: int):
    """One component: a tokenizer, scheduler or processor, or a module in eval mode with random weights."""
    import diffusers
    import transformers

    from videoattn.testing import byte_tokenizer

    if isinstance(config, str):
        return byte_tokenizer(config)
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = config["_class_name"]
    cls = getattr(diffusers, kind, None) or getattr(transformers, kind)
    if not issubclass(cls, nn.Module):
        return cls(**options)
    dtype = getattr(torch, config["_dtype"]) if "_dtype" in config else dtype
    with _random_weights(device, dtype, seed):
        module = cls(cls.config_class(**options)) if cls.__module__.startswith("transformers.") else cls(**options)
    keep = getattr(cls, "_keep_in_fp32_modules", None) or []
    if cls.__module__.startswith("transformers.") and dtype != torch.float16:  # T5 overflows in fp16 only
        keep = getattr(cls, "_keep_in_fp32_modules_strict", None) or []
    for path, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            if any(word in f"{path}.{leaf}".split(".") for word in keep):
                parameter.data = parameter.data.float()
    return module.to(device).eval().requires_grad_(False)  # some buffers are made from NumPy, on the CPU


@contextlib.contextmanager
def _random_weights(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules made in here are on ``device`` and in ``dtype``; the caller's random state is left alone."""
    device = torch.device(device)
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _denoiser_config(entry: Spec) -> Spec:
    return next(entry["components"][part] for part in DENOISERS if part in entry["components"])


@functools.cache
def _table() -> dict[str, Spec]:
    return tomllib.loads((Path(__file__).parent / "models.toml").read_text())


def _merge(base: Spec, over: Spec) -> Spec:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
