"""Tiny pipelines of HunyuanVideo, HunyuanVideo 1.5 and Kandinsky 5, which borrows the VAE of one, the Qwen of the other."""

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from tiny_parts import TEXT_DIM, TEXT_LENGTH, Recipe, clip_text_encoder, t5_encoder
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)

from videoattn.testing import byte_tokenizer

CALL = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}
QWEN = {
    "vocab_size": 259,
    "hidden_size": TEXT_DIM,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    "rope_theta": 1e6,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def _vae():
    """Shrinks height and width by 8, time by 4."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def _rope_axes(head_dim):
    """(t, y, x) shares of a head, each even: a quarter for time, the rest in halves as near as it goes."""
    time = head_dim // 8 * 2
    return time, (head_dim - time) // 4 * 2, head_dim - time - (head_dim - time) // 4 * 2


def hunyuan_video(*, head_dim=16, heads=2, layers=2):
    """``layers`` dual-stream and as many single-stream blocks."""
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=_rope_axes(head_dim),
    )
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=260,
            hidden_size=TEXT_DIM,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    return HunyuanVideoPipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer("llama"),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=byte_tokenizer("clip"),
    )


def hunyuan_video15(*, head_dim=16, heads=2, layers=2):
    """Guidance by a guider: two calls a step."""
    transformer = HunyuanVideo15Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        num_refiner_layers=1,
        in_channels=9,
        out_channels=4,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=TEXT_DIM,
        image_embed_dim=12,
        rope_axes_dim=_rope_axes(head_dim),
        target_size=16,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**QWEN)),
        tokenizer=byte_tokenizer("qwen"),
        text_encoder_2=t5_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def kandinsky5(*, head_dim=16, heads=2, layers=2):
    """``layers`` text and as many visual blocks, regular attention."""
    transformer = Kandinsky5Transformer3DModel(
        model_dim=heads * head_dim,
        axes_dims=_rope_axes(head_dim),
        num_text_blocks=layers,
        num_visual_blocks=layers,
        in_text_dim=TEXT_DIM,
        in_text_dim2=TEXT_DIM,
        time_dim=32,
        ff_dim=64,
    )
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_DIM,
        "fullatt_block_indexes": [0],
    }
    return Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN, vision_config=vision)),
        tokenizer=byte_tokenizer("qwen"),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=byte_tokenizer("clip"),
    )


# HunyuanVideo 1.5: 17 image, 16 glyph and 48 prompt tokens in place of 729, 256 and 1000, and what stands before the
# prompt, in bytes and special tokens, is cropped as the 108 tokens of the real template are.
HUNYUAN15_MESSAGE = "Describe the video."
HUNYUAN15_SETTINGS = {
    "system_message": HUNYUAN15_MESSAGE,
    "prompt_template_encode_start_idx": len(f"<system\n{HUNYUAN15_MESSAGE}>\n<user\n"),
    "vision_num_semantic_tokens": 17,
    "tokenizer_2_max_length": 16,
    "tokenizer_max_length": 48,
}

RECIPES = {
    "hunyuan_video": Recipe(make=hunyuan_video, call=CALL | {"prompt_template": {"template": "{}", "crop_start": 0}}),
    "hunyuan_video15": Recipe(
        make=hunyuan_video15, call={"height": 24, "width": 32, "num_frames": 5}, settings=HUNYUAN15_SETTINGS
    ),
    "kandinsky5": Recipe(
        # In bytes the real template alone would fill the prompt's room.
        make=kandinsky5,
        call=CALL,
        settings={"prompt_template": "{}", "prompt_template_encode_start_idx": 0},
    ),
}
