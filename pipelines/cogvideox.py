"""CogVideoX: joint attention over text and video in one stream, text first; LayerNorm and rotation head by head.

The 2B model has no rotary embedding (its positions are added to the tokens).
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from videoattn.call import Grid
from videoattn.pipelines.adapter import Adapter
from videoattn.pipelines.hunyuan_video import rotate
from videoattn.pipelines.processor import FastProcessor, project_out
from videoattn.pipelines.token_order import Seams
from videoattn.prologue import Prologue, Stream


class CogVideoXProcessor(FastProcessor):
    prologue = Prologue(norm="per_head", rotate=rotate, pairs="repeated")

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        if self.run is None or attention_mask is not None:  # no CogVideoX pipeline passes a mask
            return self.host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        text_len, video_len = encoder_hidden_states.shape[1], hidden_states.shape[1]
        if self.run.sparse:  # whose blocks are the video's first, then text's
            x, video, text = (hidden_states, encoder_hidden_states), slice(video_len), slice(video_len, None)
        else:
            x, video, text = (encoder_hidden_states, hidden_states), slice(text_len, None), slice(text_len)
        x = torch.cat(x, dim=1)
        stream = Stream(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k, image_rotary_emb, video)
        out = project_out(attn, self.attend(attn.heads, stream))
        return out[:, video], out[:, text]


def grid(model, inputs) -> Grid:
    """Latents come as [B, T, C, Y, X]; 1.5 also joins frames in time."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    config = model.config
    return Grid(
        frames=frames // (config.patch_size_t or 1),
        height=height // config.patch_size,
        width=width // config.patch_size,
    )


def keeps_order(model, inputs) -> str | None:
    masked = "attention_mask" in (inputs.get("attention_kwargs") or {})
    return "an attention mask over the video's tokens" if masked else None


ADAPTER = Adapter(
    name="cogvideox",
    kinds=(("*attn1", "joint"),),
    processors={CogVideoXAttnProcessor2_0: CogVideoXProcessor},
    grid=grid,
    seams=Seams(enter="patch_embed", tables="image_rotary_emb", leave="proj_out", refuses=keeps_order),
)
