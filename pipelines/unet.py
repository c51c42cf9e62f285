"""Attention of the UNets: plain projections, no norm of q and k, no rotation, no mask in a video pipeline."""

from __future__ import annotations

from diffusers.models.attention_processor import AttnProcessor2_0

from videoattn.pipelines.processor import FastProcessor, project_out
from videoattn.prologue import split_heads


class UNetProcessor(FastProcessor):
    """Stands in for the host's AttnProcessor2_0 where its image-model options are off."""

    def __init__(self, host: AttnProcessor2_0 | None = None) -> None:
        # Loading an IP-Adapter makes more of the class that it finds, without arguments.
        super().__init__(AttnProcessor2_0() if host is None else host)

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kwargs
    ):
        if self.run is None or attention_mask is not None or not is_plain(attn):
            return self.host(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projections = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (split_heads(x, attn.heads) for x in projections)
        return project_out(attn, self.run(q, k, v).flatten(2, 3))


def is_plain(attn) -> bool:
    """Whether an attention module only projects, attends and projects out."""
    return (
        attn.spatial_norm is None
        and attn.group_norm is None
        and attn.norm_cross is None
        and attn.norm_q is None
        and attn.norm_k is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )
