"""Wan 2.1 and 2.2: full self-attention over the video, cross-attention to text and, in 2.1 I2V, to an image.

RMSNorm across all heads, then rotary embedding of neighbouring pairs on self-attention; no masks.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from videoattn.pipelines.adapter import Adapter, patched_grid
from videoattn.pipelines.processor import FastProcessor, project_out
from videoattn.pipelines.token_order import Seams
from videoattn.prologue import Prologue, Rope, Stream, rotate_pairs, split_heads

TEXT_TOKENS = 512  # the host's transformer hard-codes where the image's tokens end and the text's begin


class WanProcessor(FastProcessor):
    prologue = Prologue(norm="across_heads", rotate=rotate_pairs, pairs="halves")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if self.run is None:
            return self.host(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

        context, image = encoder_hidden_states, None
        if attn.add_k_proj is not None:
            image, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
        rope = None if rotary_emb is None else halves(rotary_emb)  # which q and k share
        stream = Stream(*self._project(attn, hidden_states, context), attn.norm_q, attn.norm_k, rope)
        if image is None and attention_mask is None:
            return project_out(attn, self.attend(attn.heads, stream))

        q, k, v = self.prologue(attn.heads, stream)
        out = self.run(q, k, v, attention_mask)
        if image is not None:
            k, v = self._project_image(attn, image)
            k, v = split_heads(attn.norm_added_k(k), attn.heads), split_heads(v, attn.heads)
            out = out + self.run(q, k, v)
        return project_out(attn, out.flatten(2, 3))

    @staticmethod
    def _project(attn, x, context):
        if not attn.fused_projections:
            source = x if context is None else context
            return attn.to_q(x), attn.to_k(source), attn.to_v(source)
        if context is None:
            return attn.to_qkv(x).chunk(3, dim=-1)
        return attn.to_q(x), *attn.to_kv(context).chunk(2, dim=-1)

    @staticmethod
    def _project_image(attn, image):
        if attn.fused_projections:
            return attn.to_added_kv(image).chunk(2, dim=-1)
        return attn.add_k_proj(image), attn.add_v_proj(image)


def halves(rotary_emb: Rope) -> Rope:
    """The host's tables [1, N, 1, D] hold each value twice: [1, N, 1, D/2]."""
    return rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]


def keeps_order(model, inputs) -> str | None:
    return "VACE's control tokens follow the video's" if "vace_layers" in model.config else None


ADAPTER = Adapter(
    name="wan",
    kinds=(("*attn2", "cross"), ("*attn1", "full")),
    processors={WanAttnProcessor: WanProcessor},
    grid=patched_grid,
    seams=Seams(enter="patch_embedding", tables="rope", leave="proj_out", per_token=("timestep",), refuses=keeps_order),
)
