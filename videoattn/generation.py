"""One generation, timed and measured: what the command line, the demo and the benchmarks of whole pipelines share.

Shape letters: T frames, H height, W width in pixels.
"""

from __future__ import annotations

import argparse
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from PIL.Image import Image, fromarray

from videoattn.pipelines.registry import adapter_for
from videoattn.policy import PRESETS, Policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

GIB = 2**30
UNTOUCHED = "none"  # as a preset: the pipeline as diffusers made it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to generate. None leaves the pipeline's own default; `image`, a path or a picture, is the first frame."""

    prompt: str | None = None
    negative_prompt: str | None = None
    image: str | Image | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")

    @classmethod
    def of(cls, args: argparse.Namespace, **defaults: Any) -> Settings:
        """From the flags of `add_arguments`; `defaults` stand in for flags that were not given."""
        given = {field.name: getattr(args, field.name) for field in fields(cls)}
        return cls(**defaults | {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one call of a pipeline gave and cost."""

    frames: np.ndarray
    """[T, H, W, 3] float32 in 0..1, before any video codec."""
    seconds: float
    """Of the whole call: text encoder, denoiser, VAE."""
    calls: int
    """How often a denoiser ran."""
    peak_gib: float
    memory: str
    """What `peak_gib` counts."""


def add_arguments(parser: argparse.ArgumentParser, *, out: str, preset: str | None = "balanced") -> None:
    """The flags that every command has; `out` and `preset` are defaults.

    With `preset` "none" that is a choice too, with None there is nothing to choose.
    """
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--negative-prompt", help="what it shall not show")
    parser.add_argument("--image", metavar="PATH", help="first frame, for image-to-video pipelines")
    parser.add_argument("--seed", type=int, help="of the initial latents (default: 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: the pipeline's)")
    parser.add_argument("--height", type=int, help="in pixels (default: the pipeline's)")
    parser.add_argument("--width", type=int, help="in pixels (default: the pipeline's)")
    parser.add_argument("--frames", type=int, help="of the video (default: the pipeline's)")
    if preset is not None:
        names = (UNTOUCHED, *PRESETS) if preset == UNTOUCHED else tuple(PRESETS)
        parser.add_argument(
            "--preset",
            type=_preset_among(names),
            default=preset,
            help=f"{', '.join(names)}, or a file that videoattn tune wrote (default: %(default)s)",
        )
    parser.add_argument("--out", type=Path, default=Path(out), help="(default: %(default)s)")


def _preset_among(names: Sequence[str]) -> Callable[[str], str | Policy]:
    def preset(given: str) -> str | Policy:
        if given in names:
            return given
        if given.endswith(".toml"):
            try:
                return Policy.load(given)
            except (ValueError, OSError) as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(names)}, or a .toml file, got {given!r}")

    return preset


def load(folder_or_id: str | Path) -> DiffusionPipeline:
    """A pipeline from a local folder or the hub, on the GPU in bf16 where there is one, else on the CPU in fp32."""
    from diffusers import DiffusionPipeline

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return DiffusionPipeline.from_pretrained(folder_or_id, dtype=dtype).to(device)


def call_arguments(pipe: DiffusionPipeline, settings: Settings) -> dict[str, Any]:
    """The settings as keyword arguments of this pipeline's call, the initial latents fixed by the seed.

    Raises:
        ValueError: a setting that the pipeline does not take, or a prompt or image that it needs and did not get.
    """
    takes, name = _takes(pipe), type(pipe).__name__
    named = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "frames": "video_length" if "video_length" in takes else "num_frames",
    }
    arguments: dict[str, Any] = {}
    for setting in ("prompt", "negative_prompt", "image", "steps", "guidance", "height", "width", "frames"):
        value, argument = getattr(settings, setting), named.get(setting, setting)
        if value is None:
            continue
        if argument not in takes:
            raise ValueError(f"{name} takes no {setting.replace('_', ' ')}, got {value!r}")
        arguments[argument] = value
    if "prompt" in takes and settings.prompt is None:
        raise ValueError(f"{name} needs a prompt, got none")
    if needs_image(pipe) and settings.image is None:
        raise ValueError(f"{name} needs an image, got none")
    if settings.image is not None:
        from diffusers.utils import load_image

        arguments["image"] = load_image(settings.image)
    return arguments | {"generator": torch.Generator().manual_seed(settings.seed), "output_type": "np"}


def needs_image(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline cannot start without an image."""
    takes = _takes(pipe)
    return "image" in takes and takes["image"].default is inspect.Parameter.empty


def synthetic_image(width: int, height: int) -> Image:
    """Colours that run smoothly over the picture: for models with random weights, which see no picture anyway."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return fromarray((np.stack([x, y, 1 - x], axis=-1) * 255).astype(np.uint8))


def _takes(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def generate(pipe: DiffusionPipeline, settings: Settings) -> Generation:
    """Run the pipeline once. The same settings give the same initial latents, patched or not."""
    arguments = call_arguments(pipe, settings)
    denoisers = [module for module in _modules(pipe) if adapter_for(module) is not None]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [denoiser.register_forward_hook(count) for denoiser in denoisers]
    try:
        with _peak_memory() as peak:
            start = time.perf_counter()
            frames = pipe(**arguments).frames[0]
            seconds = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    return Generation(frames=np.asarray(frames, np.float32), seconds=seconds, calls=calls, **peak)


def _modules(pipe: DiffusionPipeline) -> Iterator[torch.nn.Module]:
    return (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))


@contextmanager
def _peak_memory() -> Iterator[dict[str, Any]]:
    """Fills the fields `peak_gib` and `memory` of a Generation when the block ends."""
    peak: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak |= {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory": "allocated on the GPU, weights included",
        }
        return
    process, done = psutil.Process(), threading.Event()
    resident = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(0.02):
            resident.append(process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
    peak |= {"peak_gib": max(resident) / GIB, "memory": "resident memory of the whole process"}
