"""The decoder of Wan's VAE (AutoencoderKLWan; Wan Team, 2025), whose convolutions over time are causal.

diffusers decodes one latent frame after the other and keeps, for every convolution, the last two frames that it read: at full
size these are half of the peak, beside a video that is concatenated anew for every latent frame. Two cuts leave the values as
they are:

    rows     the picture in bands, each decoded from the first frame to the last by itself, so that what is kept is a band's.
             Behind the attention of the middle block, which sees whole frames and runs on whole frames, an output row needs a
             few input rows on either side: each level gets those too, and what the edge of a band spoiled is cut off. They
             are computed twice.
    frames   a latent frame becomes two, then four: each goes down the levels by itself, as causal convolutions allow. Nothing
             is computed twice.

Letters: B videos, C channels, T latent frames, F frames, H rows, W columns; h and w those of the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as host
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from videoattn.slicing.install import SlicedForward
from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups, ranges
from videoattn.slicing.whole import needs_host

LEAST = 8  # rows of latents in a band: with fewer, most of what a band computes is its neighbours'
SETTLED = 3  # latent frames: the first finds nothing kept, the next no frame to interpolate from
KEPT = 2  # frames that a convolution over three reads again
Rows = tuple[int, int]  # start and stop


def _decode(vae: host.AutoencoderKLWan, groups: Groups, z: Tensor, return_dict: bool = True):
    """`z` [B, C, T, h, w] -> the video [B, 3, F, H, W], in a tuple or as the host wraps it."""
    decoder = vae.decoder
    whole = all(count == 1 for count in groups.counts.values())
    if whole or vae.use_tiling or needs_host(vae, z) or not _reachable(decoder):
        return type(vae)._decode(vae, z, return_dict)
    forward = partial(_video, patch=vae.config.patch_size or 1)
    site = SlicedForward("decoder", decoder, Sliced(groups=tuple(groups.counts), forward=forward))
    site.groups = groups
    site.install()  # for this call, so that hooks around the decoder run: offloading brings its weights
    try:
        video = decoder(vae.post_quant_conv(z))
    finally:
        site.remove()
    return DecoderOutput(sample=video) if return_dict else (video,)


def _reachable(decoder: nn.Module) -> bool:
    """Whether what is put in the place of the decoder's forward will run."""
    hooked = hasattr(decoder, "_old_forward") or hasattr(decoder, "_diffusers_hook")
    return decoder._compiled_call_impl is None and (hooked or "forward" not in vars(decoder))


def _video(decoder: host.WanDecoder3d, groups: Groups, x: Tensor, *, patch: int) -> Tensor:
    """x [B, C, T, h, w] -> [B, 3, F, H, W]; `patch`: pixels of an output row and column of the decoder."""
    height, levels = x.shape[-2], decoder.up_blocks
    scale = 2 ** sum(_resample(level) is not None for level in levels)
    slower = 2 ** sum(getattr(_resample(level), "mode", None) == "upsample3d" for level in levels)
    groups.sizes |= {"rows": max(1, height // LEAST), "frames": slower}
    starts = ranges(height, min(groups.counts["rows"], groups.sizes["rows"]))
    bands = [_Band(decoder, groups, (scale * start, scale * stop), height) for start, stop in starts]
    middles, chunks = _middles(decoder, x), x.shape[2]
    if len(bands) > 1:
        middles = list(middles)
    if x.is_meta:  # a forecast: the band that takes most, until it keeps all that it ever will
        bands, chunks = [max(bands, key=_Band.size)], min(chunks, SETTLED)
    video = None
    while bands:
        band = bands.pop(0)  # and with it goes what it kept
        top, at = patch * band.rows[0], 0
        for index, middle in enumerate(islice(middles, chunks)):
            for pixels in band.frames(middle, first_chunk=index == 0):
                pixels = host.unpatchify(pixels, patch).clamp(-1.0, 1.0)
                if video is None:
                    count = 1 + slower * (x.shape[2] - 1)
                    video = pixels.new_empty(*pixels.shape[:2], count, scale * patch * height, pixels.shape[-1])
                _, _, frames, rows, _ = pixels.shape
                video[:, :, at : at + frames, top : top + rows] = pixels
                at += frames
    return video


def _middles(decoder: host.WanDecoder3d, x: Tensor) -> Iterator[Tensor]:
    """[B, C, 1, h, w] behind the middle block, of each latent frame of x [B, C, T, h, w]."""
    cache, kept = _cache(decoder.mid_block), None
    for frame in x.split(1, dim=2):
        made, kept = _causal(decoder.conv_in, frame, kept)
        yield decoder.mid_block(made, feat_cache=cache, feat_idx=[0])


class _Band:
    """Output rows of a decoder, frame after frame.

    Args:
        rows: of its output. height: of the latents.
    """

    def __init__(self, decoder: host.WanDecoder3d, groups: Groups, rows: Rows, height: int) -> None:
        self.decoder = decoder
        self.groups = groups
        self.rows = rows
        self.inputs = list(_inputs(decoder, rows, height))  # of each level, and of what follows the last
        self.cache = [_cache(level) for level in decoder.up_blocks]
        self.kept: Tensor | None = None

    def size(self) -> int:
        """Rows that it computes, of all levels."""
        return sum(stop - start for start, stop in self.inputs)

    def frames(self, middle: Tensor, *, first_chunk: bool) -> Iterator[Tensor]:
        """middle [B, C, 1, h, w] -> [B, C, F, rows, W], a few frames at a time."""
        start, stop = self.inputs[0]
        yield from self._below(middle[..., start:stop, :], 0, first_chunk)

    def _below(self, x: Tensor, index: int, first_chunk: bool) -> Iterator[Tensor]:
        """What the levels from `index` make of their input rows x."""
        if index == len(self.decoder.up_blocks):
            yield self._pixels(x)
            return
        level = self.decoder.up_blocks[index]
        scale = 1 if _resample(level) is None else 2
        x = level(x, feat_cache=self.cache[index], feat_idx=[0], first_chunk=first_chunk)
        x = _cropped(x, scale * self.inputs[index][0], self.inputs[index + 1])
        for start, stop in ranges(x.shape[2], self.groups.counts["frames"]):
            yield from self._below(x[:, :, start:stop], index + 1, first_chunk)

    def _pixels(self, x: Tensor) -> Tensor:
        decoder = self.decoder
        x, self.kept = _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), self.kept)
        return _cropped(x, self.inputs[-1][0], self.rows)


def _causal(convolution: nn.Module, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The convolution of x behind the frames `kept`, and those to keep for what comes next."""
    last = x[:, :, -KEPT:]
    if kept is not None and last.shape[2] < KEPT:
        last = torch.cat([kept[:, :, -1:], last], dim=2)
    else:
        last = last.clone()  # else the rest of x would stay
    return convolution(x, kept), last


def _cropped(x: Tensor, start: int, rows: Rows) -> Tensor:
    """Of x, whose first row is `start`, some rows."""
    return x[..., rows[0] - start : rows[1] - start, :]


def _cache(module: nn.Module) -> list[None]:
    """Where its causal convolutions keep frames."""
    return [None] * sum(isinstance(x, host.WanCausalConv3d) for x in module.modules())


def _inputs(decoder: host.WanDecoder3d, rows: Rows, height: int) -> list[Rows]:
    """Rows of the input that each level, and what follows the last, needs for these rows of the output."""
    for level in decoder.up_blocks:
        height *= 1 if _resample(level) is None else 2
    found = [_wider(rows, decoder.conv_out, height)]
    for level in reversed(decoder.up_blocks):
        rows, resample = found[0], _resample(level)
        if resample is not None:
            start, stop = _wider(rows, resample, height)
            rows, height = (start // 2, -(-stop // 2)), height // 2
        found.insert(0, _wider(rows, level.resnets, height))
    return found


def _wider(rows: Rows, module: nn.Module, height: int) -> Rows:
    """By what all convolutions of a module see beyond a row, within the picture."""
    reach = sum(x.kernel_size[-2] // 2 for x in module.modules() if isinstance(x, nn.Conv2d | nn.Conv3d))
    return max(0, rows[0] - reach), min(height, rows[1] + reach)


def _resample(level: nn.Module) -> nn.Module | None:
    """What doubles the rows at the end of a level."""
    if isinstance(level, host.WanResidualUpBlock):
        return level.upsampler
    return level.upsamplers[0] if level.upsamplers else None


def _refuses(vae: nn.Module) -> str | None:
    decoder = getattr(vae, "decoder", None)
    if type(vae) is not host.AutoencoderKLWan or type(decoder) is not host.WanDecoder3d:
        return f"{type(vae).__module__}.{type(vae).__name__} is not Wan's VAE, or has another decoder"
    for level in decoder.up_blocks:
        if type(level) not in (host.WanUpBlock, host.WanResidualUpBlock):
            return f"how far {type(level).__name__} sees is not known"
        if any(type(block) is not host.WanResidualBlock for block in level.resnets):
            return f"how far the blocks of {type(level).__name__} see is not known"
        resample = _resample(level)
        if resample is not None and getattr(resample, "mode", None) not in ("upsample2d", "upsample3d"):
            return f"{type(resample).__name__} does not double the picture"
    return None


FORWARDS = {
    "AutoencoderKLWan": Sliced(groups=("frames", "rows"), forward=_decode, refuses=_refuses, method="_decode"),
}
