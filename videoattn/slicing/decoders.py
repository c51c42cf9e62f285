"""Decoders of image VAEs, whose rows are frames: all frames of a video, a few at a time.

`Decoder` (AutoencoderKL: AnimateDiff, ModelScope, Latte) knows nothing of time, so that any rows can run by themselves.

`TemporalDecoder` (AutoencoderKLTemporalDecoder: Stable Video Diffusion, Blattmann et al., 2023) mixes frames in every second
residual block, and normalises over time and space at once. Fewer frames a call, as diffusers' `decode_chunk_size` makes them,
are another function. Here the operators between two temporal blocks (attention; the upsampler of one level and the spatial
block of the next) are one group over frames, and each temporal block a group over rows of the picture, in the place of what
it reads: one tensor of the size of a level is alive, and no two.

Letters: B videos, F frames of each, N = B F, C channels, H rows, W columns; h and w those of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from videoattn.slicing.norm import Statistics, activated, statistics
from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups
from videoattn.slicing.whole import needs_host

Operator = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]  # C, H, W


def _decode_frames(module: Decoder, groups: Groups, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """`sample` [N, C, h, w] -> [N, 3, H, W]."""
    if needs_host(module, sample):
        return type(module).forward(module, sample, latent_embeds)

    def part(start: int, stop: int) -> Tensor:
        embeds = latent_embeds
        if embeds is not None and len(embeds) == len(sample):
            embeds = embeds[start:stop]
        return type(module).forward(module, sample[start:stop], embeds)

    return groups.run("spatial", part, len(sample))


def _refuses_frames(module: nn.Module) -> str | None:
    if type(module) is not Decoder:
        return f"{type(module).__module__}.{type(module).__name__} is not the decoder of AutoencoderKL"
    if any(isinstance(x, nn.modules.batchnorm._BatchNorm) for x in module.modules()):
        return "it normalises over frames"
    return None


def _decode_video(
    module: TemporalDecoder, groups: Groups, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1
) -> Tensor:
    """`sample` [N, C, h, w], `image_only_indicator` [B, F] -> [N, 3, H, W]."""
    parts = (module.conv_in, module.mid_block, module.up_blocks)
    if needs_host(module, sample) or len({x.dtype for part in parts for x in part.parameters()}) > 1:
        return type(module).forward(module, sample, image_only_indicator, num_frames)
    count, stages = len(sample), list(_stages(module))
    shapes = list(_shapes(stages, *sample.shape[-2:]))
    room = sample.new_empty(max(count * math.prod(shape) for shape in shapes), dtype=module.conv_in.weight.dtype)
    x = sample
    for (operators, block), shape in zip(stages, shapes, strict=True):
        made = _at_the_end(room, (count, *shape))
        groups.run("spatial", partial(_chain, operators, x), count, out=made)
        x = made
        _mix_frames(block, groups, x.unflatten(0, (-1, image_only_indicator.shape[-1])), image_only_indicator)
    last = [*_upsamplers(module.up_blocks[-1]), module.conv_norm_out, module.conv_act, module.conv_out]
    x = groups.run("spatial", partial(_chain, last, x), count)
    del room, made
    x = module.time_conv_out(x.unflatten(0, (-1, num_frames)).transpose(1, 2))
    return x.transpose(1, 2).flatten(0, 1)


def _stages(module: TemporalDecoder) -> Iterator[tuple[list[Operator], SpatioTemporalResBlock]]:
    """What runs frame by frame, its spatial residual block last, and the block whose temporal half follows."""
    operators: list[Operator] = [module.conv_in]
    middle = module.mid_block
    for attention, block in zip((None, *middle.attentions), middle.resnets, strict=False):  # the host leaves out more
        if attention is not None:
            operators = [*operators, attention]
        yield [*operators, partial(block.spatial_res_block, temb=None)], block
        operators = []
    for above, level in zip((None, *module.up_blocks), module.up_blocks, strict=False):
        operators = [] if above is None else _upsamplers(above)
        for block in level.resnets:
            yield [*operators, partial(block.spatial_res_block, temb=None)], block
            operators = []


def _upsamplers(level: nn.Module) -> list[Operator]:
    return list(level.upsamplers or ())


def _shapes(
    stages: Sequence[tuple[list[Operator], SpatioTemporalResBlock]], height: int, width: int
) -> Iterator[Shape]:
    """Of a frame after each stage."""
    for operators, block in stages:
        scale = 2 ** sum(isinstance(operator, Upsample2D) for operator in operators)
        height, width = scale * height, scale * width
        yield block.spatial_res_block.out_channels, height, width


def _at_the_end(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The end of `room` as a tensor.

    Frames of a level lie there behind those of the level before, which are smaller: frame i is written over frames up to i,
    and those have been read.
    """
    return room[room.numel() - math.prod(shape) :].view(shape)


def _chain(operators: Sequence[Operator], x: Tensor, start: int, stop: int) -> Tensor:
    x = x[start:stop]
    for operator in operators:
        x = operator(x)
    return x


def _mix_frames(block: SpatioTemporalResBlock, groups: Groups, x: Tensor, image_only_indicator: Tensor) -> None:
    """The temporal half of a block on x [B, F, C, H, W], in its place: each row of the picture needs itself in all frames.

    The statistics of the second norm need the first convolution everywhere, and its output has no place to stay: it is
    computed twice.
    """
    resnet, x = block.temporal_res_block, x.transpose(1, 2)
    height = x.shape[-2]

    def blended(x: Tensor, mixed: Tensor) -> Tensor:
        return block.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)

    if groups.counts["temporal"] == 1:
        groups.run("temporal", lambda start, stop: blended(x, resnet(x, None)), height, dim=-2, out=x)
        return
    slices = groups.ranges("temporal", height)
    before = statistics(resnet.norm1, (x[..., start:stop, :] for start, stop in slices))

    def convolved(rows: Tensor) -> Tensor:
        return resnet.conv1(activated(before, rows, resnet.nonlinearity))

    between = Statistics(resnet.norm2)
    for start, stop in slices:
        between.add(convolved(x[..., start:stop, :]))

    def part(start: int, stop: int) -> Tensor:
        rows = x[..., start:stop, :]
        mixed = activated(between, convolved(rows), resnet.nonlinearity)
        mixed = resnet.conv2(resnet.dropout(mixed))
        shortcut = rows if resnet.conv_shortcut is None else resnet.conv_shortcut(rows)
        return blended(rows, shortcut + mixed)

    groups.run("temporal", part, height, dim=-2, out=x)


def _refuses_video(module: nn.Module) -> str | None:
    if type(module) is not TemporalDecoder:
        return f"{type(module).__module__}.{type(module).__name__} is not the decoder of AutoencoderKLTemporalDecoder"
    blocks = [block for level in (module.mid_block, *module.up_blocks) for block in level.resnets]
    for block in blocks:
        if not isinstance(block, SpatioTemporalResBlock) or block.temporal_res_block.time_emb_proj is not None:
            return f"{type(block).__name__} is no residual block of space, then time, without a time step"
    for upsampler in (x for level in module.up_blocks for x in _upsamplers(level)):
        if not isinstance(upsampler, Upsample2D) or upsampler.use_conv_transpose or not upsampler.interpolate:
            return f"{type(upsampler).__name__} does not double the picture"
    shapes = _shapes(list(_stages(module)), 1, 1)
    if any(math.prod(later) < math.prod(earlier) for earlier, later in pairwise(shapes)):
        return "a level is smaller than the one before"
    return None


FORWARDS = {
    "Decoder": Sliced(groups=("spatial",), forward=_decode_frames, refuses=_refuses_frames),
    "TemporalDecoder": Sliced(groups=("spatial", "temporal"), forward=_decode_video, refuses=_refuses_video),
}
