"""AnimateDiff: a Stable Diffusion UNet on every frame, and motion modules that attend over the frames.

Both attention layers of a motion block are temporal self-attention, also the one called attn2.
"""

from __future__ import annotations

from diffusers.models.attention_processor import AttnProcessor2_0

from videoattn.call import Grid
from videoattn.pipelines.adapter import Adapter
from videoattn.pipelines.unet import UNetProcessor


def grid(model, inputs) -> Grid:
    """Latents come as [B, C, F, Y, X]; the UNet cuts no patches. Deeper levels halve height and width."""
    frames, height, width = inputs["sample"].shape[2:]
    return Grid(frames=frames, height=height, width=width)


ADAPTER = Adapter(
    name="animatediff",
    kinds=(("*motion_modules*", "temporal"), ("*attn2", "cross"), ("*attn1", "spatial")),
    processors={AttnProcessor2_0: UNetProcessor},
    grid=grid,
)
