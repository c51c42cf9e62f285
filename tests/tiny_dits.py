"""Tiny pipelines of the transformer families that stand alone: CogVideoX, LTX, Mochi, Latte, Allegro, Cosmos."""

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tiny_parts import TEXT_DIM, TEXT_LENGTH, Recipe, image_vae, t5_text
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from videoattn.testing import byte_tokenizer

CALL = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}


def _cogvideox(head_dim, heads, layers, *, rope):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=TEXT_LENGTH,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        use_rotary_positional_embeddings=rope,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler(), **t5_text())


def cogvideox(*, head_dim=16, heads=2, layers=2):
    """As the 2B model: absolute positions; width (heads x head_dim) a multiple of 16."""
    return _cogvideox(head_dim, heads, layers, rope=False)


def cogvideox_rope(*, head_dim=16, heads=2, layers=2):
    """As the 5B model: rotary positions on the video part of the joint sequence."""
    return _cogvideox(head_dim, heads, layers, rope=True)


def ltx(*, head_dim=16, heads=2, layers=2):
    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        num_layers=layers,
        in_channels=8,
        out_channels=8,
        caption_channels=TEXT_DIM,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
    )
    return LTXPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **t5_text())


def ltx2(*, head_dim=16, heads=2, layers=2):
    """Video and audio streams; audio heads are half as wide."""
    width, audio_width = heads * head_dim, heads * head_dim // 2
    transformer = LTX2VideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=width,
        audio_num_attention_heads=heads,
        audio_attention_head_dim=head_dim // 2,
        audio_cross_attention_dim=audio_width,
        num_layers=layers,
        in_channels=4,
        out_channels=4,
        audio_in_channels=4,
        audio_out_channels=4,
        caption_channels=TEXT_DIM,
        rope_double_precision=False,
        rope_type="split",
    )
    text_layers = 2
    text_encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": 264,
                "hidden_size": TEXT_DIM,
                "intermediate_size": 37,
                "num_hidden_layers": text_layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "sliding_window": 16,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "bos_token_id": 2,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            mm_tokens_per_image=4,
            boi_token_index=260,
            eoi_token_index=261,
            image_token_index=262,
        )
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=text_layers + 1,
        **{f"{stream}_connector_num_attention_heads": 4 for stream in ("video", "audio")},
        **{f"{stream}_connector_attention_head_dim": TEXT_DIM // 4 for stream in ("video", "audio")},
        **{f"{stream}_connector_num_layers": 1 for stream in ("video", "audio")},
        **{f"{stream}_connector_num_learnable_registers": None for stream in ("video", "audio")},
        connector_rope_base_seq_len=TEXT_LENGTH,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
        decoder_causal=False,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        transformer=transformer,
        vae=vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        connectors=connectors,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer("gemma"),
    )


def mochi(*, head_dim=16, heads=2, layers=2):
    transformer = MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=4,
        max_sequence_length=TEXT_LENGTH,
    )
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **t5_text())


def latte(*, head_dim=16, heads=2, layers=2):
    """``layers`` spatial and as many temporal blocks, in turn."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        num_layers=layers,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_DIM,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=5,
    )
    return LattePipeline(
        transformer=transformer, vae=image_vae(), scheduler=DDIMScheduler(clip_sample=False), **t5_text()
    )


def allegro(*, head_dim=12, heads=2, layers=2):
    """``head_dim`` a multiple of 6; the VAE decodes tiles only."""
    transformer = AllegroTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        num_layers=layers,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        caption_channels=TEXT_DIM,
    )
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    vae.enable_tiling()
    return AllegroPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False), **t5_text())


class NoSafetyChecker(ModelMixin, ConfigMixin):
    """Lets everything pass: Cosmos runs with no checker at all only on a machine that holds the real one."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_buffer("unused", torch.zeros(1))  # a model without weights cannot be saved

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def cosmos(*, head_dim=16, heads=2, layers=2):
    """Without the padding-mask channel, which the model resizes by torchvision."""
    transformer = CosmosTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=4,
        out_channels=4,
        mlp_ratio=2,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = EDMEulerScheduler(sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min")
    return CosmosTextToWorldPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, safety_checker=NoSafetyChecker(), **t5_text()
    )


RECIPES = {
    "cogvideox": Recipe(make=cogvideox, call=CALL),
    "cogvideox_rope": Recipe(make=cogvideox_rope, call=CALL),
    "ltx": Recipe(make=ltx, call=CALL | {"height": 32}),
    "ltx2": Recipe(make=ltx2, call=CALL | {"height": 32, "num_frames": 5, "spatio_temporal_guidance_blocks": [1]}),
    "mochi": Recipe(make=mochi, call=CALL | {"num_frames": 13}),
    "latte": Recipe(make=latte, call={"height": 16, "width": 24, "video_length": 5, "clean_caption": False}),
    "allegro": Recipe(make=allegro, call=CALL | {"num_frames": 8, "clean_caption": False}),
    "cosmos": Recipe(make=cosmos, call=CALL | {"height": 32, "width": 48}),
}
