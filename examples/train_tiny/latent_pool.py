"""Latents of clips that are drawn on the fly, each of them used in many steps."""

from collections.abc import Callable

import numpy as np
import torch
from data import Size, layouts
from render import render
from scenes import sample_scene

FIRST_CLIPS = 16  # batches in a pool before the first step
REUSE = 40  # how many steps a latent is drawn for, on average
CAPACITY = 512  # batches
ENCODED_AT_ONCE = 8


class LatentPool:
    """Latents of freshly drawn clips of one size with the ids of their captions; the oldest make room for new ones.

    `encode` makes normalised latents [B, C, ...] of video [B, 3, T, H, W] in -1..1, `tokenize` ids [B, L] of B captions.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        tokenize: Callable[[list[str]], torch.Tensor],
        size: Size,
        batch: int,
        device: torch.device,
    ):
        self.encode, self.tokenize, self.size, self.batch, self.device = encode, tokenize, size, batch, device
        self.capacity = CAPACITY * batch
        self.latents = self.ids = None
        self.made = self.drawn = 0

    def draw(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """A batch; every `REUSE` of them as many new clips are made."""
        if self.drawn % REUSE == 0:
            self.refill(self.batch * (1 if self.drawn else FIRST_CLIPS), rng)
        self.drawn += 1
        chosen = torch.randint(min(self.made, self.capacity), (self.batch,), device=self.device)
        return {"latents": self.latents[chosen], "ids": self.ids[chosen]}

    @torch.no_grad()
    def refill(self, count: int, rng: np.random.Generator) -> None:
        for _ in range(0, count, ENCODED_AT_ONCE):
            scenes = [sample_scene(rng) for _ in range(ENCODED_AT_ONCE)]
            things, background = layouts(scenes, rng, self.size, self.device)
            video, _ = render(things, background, self.size.frames, self.size.height, self.size.width)
            latents = self.encode(video)
            ids = self.tokenize([scene.caption() for scene in scenes]).to(self.device)
            if self.latents is None:
                self.latents = latents.new_zeros(self.capacity, *latents.shape[1:], dtype=torch.bfloat16)
                self.ids = ids.new_zeros(self.capacity, ids.shape[1])
            slots = torch.arange(self.made, self.made + len(scenes), device=self.device) % self.capacity
            self.latents[slots], self.ids[slots] = latents.to(torch.bfloat16), ids
            self.made += len(scenes)
