"""Tiny pipelines of the Wan family: Wan 2.1, Wan 2.2 and SkyReels-V2, which is built like Wan."""

from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from tiny_parts import TEXT_DIM, TEXT_LENGTH, Recipe, clip_image_processor, clip_vision_config, t5_text
from transformers import CLIPVisionModel

CALL = {"height": 48, "width": 64, "num_frames": 9, "guidance_scale": 6.0, "max_sequence_length": TEXT_LENGTH}


def _transformer(cls=WanTransformer3DModel, *, head_dim, heads, layers, channels=16, in_channels=None, **config):
    return cls(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=in_channels or channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=32,
        rope_max_seq_len=32,
        **config,
    )


def _vae(**config):
    """Shrinks height and width by 8, time by 4."""
    return AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **config
    )


def _common(flow_shift=3.0):
    return t5_text() | {
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    }


def wan(*, head_dim=12, heads=2, layers=2):
    transformer = _transformer(head_dim=head_dim, heads=heads, layers=layers)
    return WanPipeline(transformer=transformer, vae=_vae(), **_common())


def wan22(*, head_dim=12, heads=2, layers=2):
    """Two denoisers: of two steps, the first runs the high-noise one and the second the low-noise one."""
    high, low = (_transformer(head_dim=head_dim, heads=heads, layers=layers) for _ in range(2))
    return WanPipeline(transformer=high, transformer_2=low, boundary_ratio=0.875, vae=_vae(), **_common())


def wan22_ti2v(*, head_dim=12, heads=2, layers=2):
    """One timestep a token; the VAE shrinks height and width by 16 into 48 channels."""
    vae = _vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        scale_factor_spatial=16,
    )
    transformer = _transformer(head_dim=head_dim, heads=heads, layers=layers, channels=48)
    return WanPipeline(transformer=transformer, expand_timesteps=True, vae=vae, **_common())


def wan22_i2v(*, head_dim=12, heads=2, layers=2):
    """Two denoisers that see the image only through 20 more input channels."""
    high, low = (_transformer(head_dim=head_dim, heads=heads, layers=layers, in_channels=36) for _ in range(2))
    return WanImageToVideoPipeline(transformer=high, transformer_2=low, boundary_ratio=0.875, vae=_vae(), **_common())


def wan21_i2v(*, head_dim=12, heads=2, layers=2):
    """Image cross-attention beside the text's; the model takes the last 512 context tokens to be the text."""
    transformer = _transformer(
        head_dim=head_dim,
        heads=heads,
        layers=layers,
        in_channels=36,
        image_dim=TEXT_DIM,
        added_kv_proj_dim=heads * head_dim,
    )
    return WanImageToVideoPipeline(
        transformer=transformer,
        vae=_vae(),
        image_encoder=CLIPVisionModel(clip_vision_config()),
        image_processor=clip_image_processor(),
        **_common(),
    )


def wan_v2v(*, head_dim=12, heads=2, layers=2):
    transformer = _transformer(head_dim=head_dim, heads=heads, layers=layers)
    return WanVideoToVideoPipeline(transformer=transformer, vae=_vae(), **_common())


def skyreels_v2(*, head_dim=12, heads=2, layers=2):
    transformer = _transformer(SkyReelsV2Transformer3DModel, head_dim=head_dim, heads=heads, layers=layers)
    return SkyReelsV2Pipeline(transformer=transformer, vae=_vae(), **_common(flow_shift=8.0))


RECIPES = {
    "wan": Recipe(make=wan, call=CALL),
    "wan22": Recipe(make=wan22, call=CALL),
    "wan22_ti2v": Recipe(make=wan22_ti2v, call=CALL | {"height": 96, "width": 128}),
    "wan22_i2v": Recipe(make=wan22_i2v, call=CALL, media="image"),
    "wan21_i2v": Recipe(make=wan21_i2v, call=CALL | {"max_sequence_length": 512}, media="image"),
    "wan_v2v": Recipe(
        make=wan_v2v,
        call={k: v for k, v in CALL.items() if k != "num_frames"} | {"strength": 0.9},
        media="video",
        skipped_steps=1,
    ),
    "skyreels_v2": Recipe(make=skyreels_v2, call=CALL),
}
