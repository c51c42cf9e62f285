"""LTX-Video: full self-attention over packed video tokens, cross-attention to padded text.

Norm and rotation run across all heads, before the heads are split. The text's mask is additive [B, 1, Nk] by the time a
processor sees it; where it keeps a prefix of the keys, lengths take its place.
"""

from __future__ import annotations

import math

from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from torch import Tensor

from videoattn.call import Grid
from videoattn.lengths import prefix_lengths
from videoattn.pipelines.adapter import Adapter
from videoattn.pipelines.processor import FastProcessor, project_out
from videoattn.pipelines.token_order import Seams
from videoattn.prologue import Prologue, Stream


class LTXProcessor(FastProcessor):
    prologue = Prologue(norm="across_heads", rope="across_heads", rotate=apply_rotary_emb, pairs="repeated")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if self.run is None or (attention_mask is not None and self.kv_len is None):
            return self.host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        stream = Stream(
            attn.to_q(hidden_states),
            attn.to_k(context),
            attn.to_v(context),
            attn.norm_q,
            attn.norm_k,
            image_rotary_emb,
        )
        kv_len = None if attention_mask is None else self.kv_len
        return project_out(attn, self.attend(attn.heads, stream, kv_len=kv_len))


def grid(model, inputs) -> Grid | None:
    """None where the tokens are not one video's, frame by frame: the condition pipeline puts others in front."""
    sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes or math.prod(sizes) != inputs["hidden_states"].shape[1]:
        return None
    return Grid(frames=sizes[0], height=sizes[1], width=sizes[2])


def kv_len(model, inputs) -> Tensor | None:
    mask = inputs["encoder_attention_mask"]
    lengths = None if mask is None or mask.ndim != 2 else prefix_lengths(mask)
    # The host adds -10000 to padded scores: a row of nothing but padding attends to all of it alike.
    return None if lengths is None else lengths.masked_fill(lengths == 0, mask.shape[1])


def keeps_order(model, inputs) -> str | None:
    return "tokens that are not one video's, frame by frame" if grid(model, inputs) is None else None


ADAPTER = Adapter(
    name="ltx",
    kinds=(("*attn2", "cross"), ("*attn1", "full")),
    processors={LTXVideoAttnProcessor: LTXProcessor},
    grid=grid,
    kv_len=kv_len,
    kv_len_from=("encoder_attention_mask",),
    seams=Seams(enter="proj_in", tables="rope", leave="proj_out", per_token=("timestep",), refuses=keeps_order),
)
