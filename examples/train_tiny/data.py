"""Batches of clips for training and for measuring: layouts drawn on the CPU, frames drawn on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from scenes import Scene, layout, random_layout, sample_scene


@dataclass(frozen=True, kw_only=True)
class Size:
    """Frames, height and width in pixels: for tiny-wan 1 + 4k and multiples of 16, for tiny-animatediff multiples of 32."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def tokens(self) -> int:
        """How many tiny-wan's denoiser sees: latents of 8 x 8 pixels and 4 frames, patches of 2 x 2 latents."""
        return (1 + self.frames // 4) * (self.height // 16) * (self.width // 16)


DEMO = Size(frames=25, height=192, width=192)
LARGEST = Size(frames=33, height=352, width=352)


def layouts(
    scenes: list[Scene], rng: np.random.Generator, size: Size, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `render.render` draws: things [B, K, 9] and background [B, 6]; K is the largest number of things."""
    things, backgrounds = _stack(scenes, rng, size)
    most = max(len(scene.things) for scene in scenes)
    return _to_device(things[:, :most], device), _to_device(backgrounds, device)


def mixed_layouts(
    count: int, rng: np.random.Generator, size: Size, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half captioned scenes of the training part, half `random_layout`: what the VAE is trained on."""
    captioned = _stack([sample_scene(rng) for _ in range(count // 2)], rng, size)
    free = random_layout(rng, count - count // 2, size.height, size.width)
    return tuple(_to_device(np.concatenate(both), device) for both in zip(captioned, free, strict=True))


def _stack(scenes: list[Scene], rng: np.random.Generator, size: Size) -> tuple[np.ndarray, np.ndarray]:
    things, backgrounds = zip(*(layout(scene, rng, size.height, size.width) for scene in scenes), strict=True)
    return np.stack(things), np.stack(backgrounds)


def _to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor
