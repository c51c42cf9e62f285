"""Tiny diffusers video pipelines with random weights, built without a network: one of each attention layout.

    pipe = build("wan")
    latents = run("wan", pipe)          # the same call gives the same bits

The builders stand by family in ``tiny_wan.py``, ``tiny_hunyuan.py``, ``tiny_dits.py`` and ``tiny_unets.py``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tiny_dits
import tiny_hunyuan
import tiny_unets
import tiny_wan
import torch
from diffusers import DiffusionPipeline
from tiny_parts import Recipe, randomize

PIPELINES: dict[str, Recipe] = tiny_wan.RECIPES | tiny_hunyuan.RECIPES | tiny_dits.RECIPES | tiny_unets.RECIPES

# The quotes wake HunyuanVideo 1.5's glyph encoder. Different lengths: a batch of both has two key lengths.
PROMPTS = ('a red cube says "hi"', "two blue dots move left, slowly")
NEGATIVE_PROMPTS = ("blurry", "low quality, no motion")


def build(
    name: str, *, seed: int = 0, head_dim: int | None = None, heads: int | None = None, layers: int | None = None
) -> Any:
    """The pipeline ``name`` in eval mode on the CPU in fp32, every weight random and fixed by ``seed``.

    ``head_dim``, ``heads``, ``layers`` change the denoiser where given (``layers``: blocks, or layers a UNet block).
    """
    size = {k: v for k, v in {"head_dim": head_dim, "heads": heads, "layers": layers}.items() if v is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = PIPELINES[name].make(**size)
    generator = torch.Generator().manual_seed(seed)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            randomize(component.eval().requires_grad_(False), generator)
    return _settle(name, pipe)


def load(name: str, folder: str | Path) -> Any:
    """The pipeline ``name`` from where ``pipe.save_pretrained(folder)`` left it, with the settings of ``build``."""
    return _settle(name, DiffusionPipeline.from_pretrained(folder))


def _settle(name, pipe):
    pipe.set_progress_bar_config(disable=True)
    for attribute, value in PIPELINES[name].settings.items():
        setattr(pipe, attribute, value)
    return pipe


def inputs(name: str, pipe: Any, *, seed: int = 0, steps: int = 2, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of one short generation of ``batch`` (1 or 2) videos that ends with the latents."""
    recipe = PIPELINES[name]
    kwargs = recipe.call | {
        "num_inference_steps": steps + recipe.skipped_steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if recipe.prompted:
        kwargs["prompt"] = list(PROMPTS[:batch])
        kwargs["negative_prompt"] = list(NEGATIVE_PROMPTS[:batch])
    if recipe.media:
        frames = _clip(9, kwargs["height"], kwargs["width"], seed)
        argument, value = {
            "image": ("image", frames[0]),
            "images": ("image", frames[:batch]),
            "video": ("video", frames),
        }[recipe.media]
        kwargs[argument] = value
    return kwargs


def run(name: str, pipe: Any, *, seed: int = 0, steps: int = 2, batch: int = 1, **overrides: Any) -> torch.Tensor:
    """The latents of one short generation; ``overrides`` replace arguments of the pipeline's call.

    The same call twice gives the same bits: the global generator, which some pipelines draw from, is seeded too.
    Where the pipeline also makes sound (LTX-2), its latents follow the video's in one [B, -1] tensor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = pipe(**inputs(name, pipe, seed=seed, steps=steps, batch=batch) | overrides, return_dict=False)
    tensors = [x for x in outputs if isinstance(x, torch.Tensor)] if isinstance(outputs, tuple) else [outputs]
    return tensors[0] if len(tensors) == 1 else torch.cat([x.flatten(1) for x in tensors], dim=1)


def denoisers(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    """(attribute, module) of each denoiser of ``pipe``, in the order in which a generation calls them."""
    names = ("transformer", "transformer_2", "unet")
    return [(name, getattr(pipe, name)) for name in names if getattr(pipe, name, None) is not None]


def denoiser_inputs(name: str, pipe: Any) -> list[tuple[torch.nn.Module, tuple, dict[str, Any]]]:
    """(denoiser, args, kwargs) of the first call of each denoiser in a generation of two steps."""
    calls: dict[torch.nn.Module, tuple] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.setdefault(module, (args, dict(kwargs))) and None, with_kwargs=True
        )
        for _, module in denoisers(pipe)
    ]
    try:
        run(name, pipe)
    finally:
        for hook in hooks:
            hook.remove()
    return [(module, *call) for module, call in calls.items()]


def _clip(frames: int, height: int, width: int, seed: int) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(frame) for frame in pixels]
