"""Runs AutoencoderKLWan over a whole clip at once instead of chunk by chunk, with the module's own weights.

`vae.encode` and `vae.decode` walk a clip in chunks of four frames and hand the last frames on through a cache. Every layer
of the network looks only into the past, so one pass over the time axis, padded on the left, computes the same numbers with
a fifth of the launches and with gradients. Two layers treat the first frame apart, here as there: halving the frame rate
lets it pass, and doubling it starts over with the second frame.

Shape letters: B clips, C channels, T frames (1 + 4k), H x W positions.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    patchify,
    unpatchify,
)

LAYOUT = torch.channels_last_3d  # what norms and tensor cores want; kept through all layers
TINY = 1e-24  # keeps a zero vector zero, as F.normalize does


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """video [B, 3, 1 + 4k, H, W] in -1..1 -> mean and log variance of the latents, [B, C, 1 + k, H / 8, W / 8] each."""
    if vae.config.patch_size is not None:
        video = patchify(video, vae.config.patch_size)
    x = _conv(vae.encoder.conv_in, video.contiguous(memory_format=LAYOUT))
    for block in vae.encoder.down_blocks:
        x = _block(block, x)
    x = _block(vae.encoder.mid_block, x)
    x = _conv(vae.encoder.conv_out, F.silu(_norm(vae.encoder.norm_out, x)))
    mean, log_variance = _conv(vae.quant_conv, x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """latents [B, C, 1 + k, H / 8, W / 8] -> video [B, 3, 1 + 4k, H, W], not clamped to -1..1 (`vae.decode` clamps)."""
    x = _conv(vae.decoder.conv_in, _conv(vae.post_quant_conv, latents.contiguous(memory_format=LAYOUT)))
    x = _block(vae.decoder.mid_block, x)
    for block in vae.decoder.up_blocks:
        x = _block(block, x)
    x = _conv(vae.decoder.conv_out, F.silu(_norm(vae.decoder.norm_out, x)))
    return x if vae.config.patch_size is None else unpatchify(x, vae.config.patch_size)


def _conv(conv: WanCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """A convolution that sees the past only: zeros stand for the frames before the first."""
    width, _, height, _, past, _ = conv._padding
    if past:
        x = F.pad(x, (0, 0, 0, 0, past, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, height, width))


def _norm(norm: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    """RMS over the channels of each position, computed in fp32 inside one kernel."""
    with torch.autocast(x.device.type, enabled=False):
        last = x.movedim(1, -1)
        gamma = norm.gamma.flatten().to(x.dtype)
        return F.rms_norm(last, gamma.shape, gamma, TINY).movedim(-1, 1)


def _block(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    match block:
        case WanResidualBlock():
            return _residual(block, x)
        case WanResample():
            return _resample(block, x)
        case WanMidBlock():
            x = _residual(block.resnets[0], x)
            for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
                x = _residual(residual, _attention(attention, x))
            return x
        case WanResidualDownBlock():
            shortcut = block.avg_shortcut(x)
            for residual in block.resnets:
                x = _residual(residual, x)
            return (x if block.downsampler is None else _resample(block.downsampler, x)) + shortcut
        case WanResidualUpBlock():
            # "first chunk": the copies of the first frame that lie before the clip are dropped
            shortcut = 0 if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=True)
            for residual in block.resnets:
                x = _residual(residual, x)
            return (x if block.upsampler is None else _resample(block.upsampler, x)) + shortcut
        case WanUpBlock():
            for residual in block.resnets:
                x = _residual(residual, x)
            return x if block.upsamplers is None else _resample(block.upsamplers[0], x)
    raise TypeError(f"wanted a block of AutoencoderKLWan, got {type(block).__name__}")


def _residual(block: WanResidualBlock, x: torch.Tensor) -> torch.Tensor:
    shortcut = x if isinstance(block.conv_shortcut, torch.nn.Identity) else _conv(block.conv_shortcut, x)
    x = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    x = _conv(block.conv2, F.silu(_norm(block.norm2, x)))
    return x + shortcut


def _attention(block: WanAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """One head over the positions of each frame."""
    images, size = _frames_to_batch(x), x.shape
    q, k, v = block.to_qkv(_norm(block.norm, images)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v)
    out = block.proj(out.squeeze(1).transpose(1, 2).unflatten(2, size[-2:]))
    return x + _batch_to_frames(out, size[0])


def _resample(block: WanResample, x: torch.Tensor) -> torch.Tensor:
    if block.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        pairs = _conv(block.time_conv, rest).movedim(1, -1).unflatten(-1, (2, -1)).movedim(-2, 2)
        x = torch.cat([first, pairs.flatten(1, 2).movedim(-1, 1)], dim=2)
    clips, images = x.shape[0], _frames_to_batch(x)
    if block.mode.startswith("upsample"):
        images = block.resample[1](F.interpolate(images, scale_factor=2.0, mode="nearest"))
    else:
        images = block.resample(images)
    x = _batch_to_frames(images, clips)
    if block.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], _conv(block.time_conv, x)], dim=2)
    return x


def _frames_to_batch(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _batch_to_frames(images: torch.Tensor, clips: int) -> torch.Tensor:
    return images.unflatten(0, (clips, -1)).transpose(1, 2)
