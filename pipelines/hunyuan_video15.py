"""HunyuanVideo 1.5: joint attention over video, then image, glyph and text tokens, every padded token last.

The host builds a bool mask [B, 1, N, N] in every layer (2.4 GiB a copy at 480p, 121 frames). Its rows are the same prefix
for every query that counts, so lengths serve and no mask is made; rows of padded queries are never read.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor

from videoattn.pipelines.adapter import Adapter, patched_grid
from videoattn.pipelines.hunyuan_video import JointProcessor
from videoattn.pipelines.token_order import Seams


def kv_len(model, inputs) -> Tensor:
    """Video tokens, the image's tokens where there is an image, and the tokens of both texts that are not padding."""
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    glyphs = inputs["encoder_attention_mask_2"].sum(dim=1, dtype=torch.int32)
    image = inputs["image_embeds"]  # [B, n, C]; the host takes all zeros for text-to-video
    image_tokens = (image != 0).any() * image.shape[1]
    return (text + glyphs + image_tokens + patched_grid(model, inputs).tokens).to(torch.int32)


ADAPTER = Adapter(
    name="hunyuan_video15",
    kinds=(("*token_refiner*", "text"), ("*transformer_blocks.*.attn", "joint")),
    processors={HunyuanVideo15AttnProcessor2_0: JointProcessor},
    grid=patched_grid,
    kv_len=kv_len,
    kv_len_from=("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
    seams=Seams(enter="x_embedder", tables="rope", leave="proj_out"),
)
