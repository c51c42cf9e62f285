"""Tiny pipelines of the UNet families. Every UNet has two levels, the deeper one twice as wide."""

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from tiny_parts import (
    TEXT_DIM,
    Recipe,
    clip_image_processor,
    clip_text,
    clip_vision_config,
    image_vae,
)
from transformers import CLIPVisionModelWithProjection

CALL = {"height": 16, "width": 24, "num_frames": 5}


def _ddim(beta_schedule="scaled_linear"):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule, clip_sample=False, set_alpha_to_one=False
    )


def _widths(head_dim, heads):
    return heads * head_dim, 2 * heads * head_dim


def animatediff(*, head_dim=16, heads=2, layers=1):
    """An image UNet and a motion adapter, merged by the pipeline; ``heads`` of every width, deeper heads are wider."""
    unet = UNet2DConditionModel(
        block_out_channels=_widths(head_dim, heads),
        layers_per_block=layers,
        sample_size=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=heads,  # the name is historical: it is the number of heads
        norm_num_groups=2,
    )
    adapter = MotionAdapter(
        block_out_channels=_widths(head_dim, heads),
        motion_layers_per_block=layers,
        motion_norm_num_groups=2,
        motion_num_attention_heads=heads,
        motion_max_seq_length=16,
    )
    return AnimateDiffPipeline(
        unet=unet, motion_adapter=adapter, vae=image_vae(), scheduler=_ddim("linear"), **clip_text()
    )


def text_to_video_sd(*, head_dim=8, heads=2, layers=1):
    unet = UNet3DConditionModel(
        block_out_channels=_widths(head_dim, heads),
        layers_per_block=layers,
        sample_size=12,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=head_dim,
        norm_num_groups=2,
    )
    return TextToVideoSDPipeline(unet=unet, vae=image_vae(), scheduler=_ddim(), **clip_text())


def svd(*, head_dim=16, heads=2, layers=1):
    """``heads * head_dim`` a multiple of 32, the number of groups that its norms are built with."""
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=_widths(head_dim, heads),
        layers_per_block=layers,
        sample_size=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT_DIM,
        num_attention_heads=(heads, 2 * heads),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), latent_channels=4
    )
    return StableVideoDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        image_encoder=CLIPVisionModelWithProjection(clip_vision_config(image_size=224)),
        feature_extractor=clip_image_processor(),
    )


def i2vgen_xl(*, head_dim=8, heads=2, layers=1):
    unet = I2VGenXLUNet(
        block_out_channels=_widths(head_dim, heads),
        layers_per_block=layers,
        sample_size=12,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=head_dim,
        norm_num_groups=2,
    )
    return I2VGenXLPipeline(
        unet=unet,
        vae=image_vae(),
        scheduler=_ddim(),
        image_encoder=CLIPVisionModelWithProjection(clip_vision_config()),
        feature_extractor=clip_image_processor(),
        **clip_text(),
    )


RECIPES = {
    "animatediff": Recipe(make=animatediff, call=CALL),
    "text_to_video_sd": Recipe(make=text_to_video_sd, call=CALL),
    "svd": Recipe(make=svd, call=CALL | {"max_guidance_scale": 2.5}, media="images", prompted=False),
    # Its way of skipping CLIP's last layer reads an attribute that transformers 5 no longer has.
    "i2vgen_xl": Recipe(make=i2vgen_xl, call=CALL | {"clip_skip": None}, media="images"),
}
