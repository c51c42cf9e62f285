"""HunyuanVideo: joint attention over video and text, video first; dual-stream blocks, then single-stream ones.

The host masks padded text with a bool [B, 1, 1, N]; it is a prefix by construction, so lengths serve. The token refiner
inside the text embedder goes the generic way.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from videoattn.pipelines.adapter import Adapter, patched_grid
from videoattn.pipelines.processor import FastProcessor, project_out
from videoattn.pipelines.token_order import Seams
from videoattn.prologue import Prologue, Rope, Stream


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """The host's rotation of x [B, N, H, D] by cos and sin [N, D]."""
    return apply_rotary_emb(x, rope, sequence_dim=1)


class JointProcessor(FastProcessor):
    """Video and text in one sequence, video first, padding last."""

    prologue = Prologue(norm="per_head", rotate=rotate, pairs="repeated")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if self.run is None:
            return self.host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        video, text = hidden_states, encoder_hidden_states
        n = video.shape[1]
        if attn.add_q_proj is None:  # single stream: one set of projections; the rotation ends where the text begins
            x = torch.cat((video, text), dim=1)
            stream = Stream(
                attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k, image_rotary_emb, slice(n)
            )
            streams = (stream,)
        else:
            streams = (
                Stream(
                    attn.to_q(video), attn.to_k(video), attn.to_v(video), attn.norm_q, attn.norm_k, image_rotary_emb
                ),
                Stream(
                    attn.add_q_proj(text),
                    attn.add_k_proj(text),
                    attn.add_v_proj(text),
                    attn.norm_added_q,
                    attn.norm_added_k,
                ),
            )
        out = self.attend(attn.heads, *streams, kv_len=self.kv_len)

        video, text = out[:, :n], out[:, n:]
        if getattr(attn, "to_out", None) is not None:
            video = project_out(attn, video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def kv_len(model, inputs) -> Tensor:
    """Video tokens and the text tokens that the tokenizer did not pad."""
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    return text + patched_grid(model, inputs).tokens


def keeps_order(model, inputs) -> str | None:
    replaces = model.config.image_condition_type == "token_replace"
    return "layers modulate the first frame's tokens apart" if replaces else None


ADAPTER = Adapter(
    name="hunyuan_video",
    kinds=(("*token_refiner*", "text"), ("*transformer_blocks.*.attn", "joint")),
    processors={HunyuanVideoAttnProcessor2_0: JointProcessor},
    grid=patched_grid,
    kv_len=kv_len,
    kv_len_from=("encoder_attention_mask",),
    seams=Seams(enter="x_embedder", tables="rope", leave="proj_out", refuses=keeps_order),
)
