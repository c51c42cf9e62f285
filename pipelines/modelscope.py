"""ModelScope text-to-video: a UNet with a temporal transformer behind every spatial one.

Both attention layers of a temporal block are temporal self-attention, also the one called attn2.
"""

from __future__ import annotations

from diffusers.models.attention_processor import AttnProcessor2_0

from videoattn.pipelines.adapter import Adapter
from videoattn.pipelines.animatediff import grid
from videoattn.pipelines.unet import UNetProcessor

ADAPTER = Adapter(
    name="modelscope",
    kinds=(
        ("*temp_attentions*", "temporal"),
        ("transformer_in*", "temporal"),
        ("*attn2", "cross"),
        ("*attn1", "spatial"),
    ),
    processors={AttnProcessor2_0: UNetProcessor},
    grid=grid,
)
