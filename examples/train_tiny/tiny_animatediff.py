"""The parts of the tiny AnimateDiffPipeline: their sizes, fresh weights, and how they are written to a folder.

Shape letters: B clips, C latent channels, T frames, H x W pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from data import Size
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from tiny_model import TEXT_WIDTH, new_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

DEMO = Size(frames=16, height=128, width=128)
LARGEST = Size(frames=16, height=192, width=192)

LATENT_CHANNELS = 8
LATENT_PIXELS = 8  # on a side
PROMPT_TOKENS = 24  # every prompt is padded to as many, and the padding is attended to; the longest caption has 18
WIDTHS = (64, 96, 128)
HEAD_DIM = 32
LONGEST = 32  # frames that have a position
FAST, SLOW = 0.25, 0.02  # radians a frame, of parts of a position: which tell neighbours apart, which count to 16
TO_ITSELF = 2.0  # times the usual size of weights, of queries that are the keys: some 40 % of a frame's attention


def new_vae() -> AutoencoderKL:
    """2.0 M parameters, 8 x 8 pixels a latent, each frame by itself."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LARGEST.height,
        scaling_factor=1.0,  # `standardise` has the weights do it
    )


def new_unet(widths: Sequence[int] = WIDTHS) -> UNetMotionModel:
    """8.2 M parameters. At every level: convolutions, attention within each frame and to the text, attention over the frames.

    Every residual branch starts at zero, so that a fresh network passes on what it is given, and attention over the frames
    starts with each frame looking mostly at itself and its neighbours: values carry the positions, so that at once a frame
    knows which one it is, and motion can be learned from there.
    """
    heads = tuple(width // HEAD_DIM for width in widths)
    unet = UNetMotionModel(
        sample_size=LARGEST.height // LATENT_PIXELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlockMotion",) * len(widths),
        up_block_types=("CrossAttnUpBlockMotion",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        num_attention_heads=heads,
        motion_num_attention_heads=heads,
        motion_max_seq_length=LONGEST,
    )
    last_layers = [unet.conv_out]
    for module in unet.modules():
        match module:
            case ResnetBlock2D():
                last_layers.append(module.conv2)
            case Transformer2DModel() | AnimateDiffTransformer3D():
                last_layers.append(module.proj_out)
        if isinstance(module, AnimateDiffTransformer3D):
            for block in module.transformer_blocks:
                for attention in (block.attn1, block.attn2):
                    attention.to_q.weight.data.mul_(TO_ITSELF)
                    attention.to_k.weight.data.copy_(attention.to_q.weight)
    for layer in last_layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    number_frames(unet)
    return unet


@torch.no_grad()
def number_frames(unet: UNetMotionModel) -> None:
    """Have the last head of the first attention over the frames, at every level on the way down, look at the frame itself and
    pass on its position, the part of it that changes slowly and so counts the frames.

    What a motion module makes of noise depends on which frame it is only through this; without it directions were learned as
    axes: "left" and "right" gave the same clips, played both ways.
    """
    for block in unet.down_blocks:
        transformer = block.motion_modules[0].transformer_blocks[0]
        attention, pairs = transformer.attn1, transformer.pos_embed.pe.shape[-1] // 2  # sine and cosine side by side
        speed = torch.exp(torch.arange(pairs) * -(math.log(10000.0) / pairs))  # radians a frame
        fast, slow = (speed > FAST).nonzero().flatten(), ((speed < FAST) & (speed > SLOW)).nonzero().flatten()
        looks = torch.cat([2 * fast, 2 * fast + 1])[:HEAD_DIM]
        counts = torch.cat([2 * slow, 2 * slow + 1])[:HEAD_DIM]
        for projection, picked in ((attention.to_q, looks), (attention.to_k, looks), (attention.to_v, counts)):
            rows = torch.zeros(HEAD_DIM, projection.in_features)
            rows[torch.arange(len(picked)), picked] = 1.0
            projection.weight[-HEAD_DIM:] = rows
        attention.to_out[0].weight[:, -HEAD_DIM:].normal_(std=0.5)  # several times the usual: what it adds to is large


def new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """0.3 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """AnimateDiff's noise levels with more of them where hardly anything is left of the clip, for there it is decided where
    things go, stretched so that the last one is noise and nothing else; from there sampling starts."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def encode(vae: AutoencoderKL, video: torch.Tensor) -> torch.Tensor:
    """video [B, 3, T, H, W] in -1..1 -> latents [B, C, T, H / 8, W / 8]."""
    images = video.to(vae.dtype).transpose(1, 2).flatten(0, 1)
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    return latents.unflatten(0, (len(video), -1)).transpose(1, 2)


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Have the latents of each channel, whose mean and deviation [C] were measured, come out with 0 and 1 instead.

    The 1 x 1 convolutions on both sides of the latents take it up, so that what is decoded stays the same.
    `scaling_factor`, one for all channels, could not say it.
    """
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    # as latents = W x + b become (W x + b - mean) / deviation, their log variances fall by 2 log(deviation)
    scale = torch.cat([1 / deviation, torch.ones_like(deviation)])
    to_moments.weight.mul_(scale.view(-1, 1, 1, 1))
    to_moments.bias.sub_(torch.cat([mean, 2 * deviation.log()])).mul_(scale)
    from_latents.bias.add_(from_latents.weight.flatten(1) @ mean)
    from_latents.weight.mul_(deviation.view(1, -1, 1, 1))


def save(folder: Path, vae: AutoencoderKL, unet: UNetMotionModel, text_encoder: CLIPTextModel) -> None:
    """Write the pipeline in diffusers' own format, weights in fp16. Converts the given modules in place.

    All but the text encoder's: loaded without a dtype it stays what it was on the disk, the others become fp32, and the
    pipeline would feed the UNet latents of the text encoder's dtype.
    """
    for module in (vae, unet):
        module.register_to_config(_name_or_path="")  # or the folders they were loaded from are written down too
        module.to(torch.float16, memory_format=torch.contiguous_format)  # which is what safetensors takes
    AnimateDiffPipeline(
        vae=vae,
        text_encoder=text_encoder.to(torch.float32),
        tokenizer=new_tokenizer(PROMPT_TOKENS),
        unet=unet,
        motion_adapter=None,  # it has become part of the UNet
        scheduler=new_scheduler(),
    ).save_pretrained(folder)
