"""Stable Video Diffusion: spatial and temporal blocks side by side, and cross-attention to a single image token.

Softmax over one key is 1 whatever the query, so that attention returns the value of that key: the query and key
projections and the attention itself drop out, exactly.
"""

from __future__ import annotations

from diffusers.models.attention_processor import AttnProcessor2_0

from videoattn.call import Grid
from videoattn.pipelines.adapter import Adapter
from videoattn.pipelines.processor import project_out
from videoattn.pipelines.unet import UNetProcessor, is_plain


class SVDProcessor(UNetProcessor):
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kwargs
    ):
        one_key = encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 1
        if self.run is None or not one_key or attention_mask is not None or not is_plain(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        value = project_out(attn, attn.to_v(encoder_hidden_states))  # [B, 1, C]
        return value.expand(-1, hidden_states.shape[1], -1)


def grid(model, inputs) -> Grid:
    """Latents come as [B, F, C, Y, X]; the UNet cuts no patches. Deeper levels halve height and width."""
    frames, _, height, width = inputs["sample"].shape[1:]
    return Grid(frames=frames, height=height, width=width)


ADAPTER = Adapter(
    name="svd",
    kinds=(
        ("*temporal_transformer_blocks*attn1", "temporal"),
        ("*attn2", "cross"),
        ("*attn1", "spatial"),
    ),
    processors={AttnProcessor2_0: SVDProcessor},
    grid=grid,
)
