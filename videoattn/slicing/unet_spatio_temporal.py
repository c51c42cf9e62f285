"""Blocks of UNetSpatioTemporalConditionModel (Stable Video Diffusion; Blattmann et al., arXiv:2311.15127).

A residual block is a group over frames, and one over places: two convolutions over time with a GroupNorm over (T, H, W) in
front of each, of which what lies between them is stored once. A transformer runs its spatial half on frames and stores its
tokens once; its temporal half, the blend of both and the projection back are a group over places.

Letters: B videos, T frames of each, N = B T, C channels, H rows, W columns, P = H W places; n of a slice, L length of text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.resnet import SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from videoattn.slicing.norm import Statistics, activated
from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups
from videoattn.slicing.spatial_temporal import (
    Features,
    Given,
    Operator,
    Take,
    down,
    forward,
    not_of,
    up,
)
from videoattn.slicing.whole import hooked


def _down(module: nn.Module, groups: Groups, given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(x, and all that the up blocks take from here), of x [N, C, H, W]."""
    features = _features(groups, given)
    return down(module, features, lambda index: _layer(module, index, features, given))


def _up(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same, or twice the size."""
    features = _features(groups, given)
    return up(module, features, given, lambda index, join: _layer(module, index, features, given, join))


def _layer(module: nn.Module, index: int, features: Features, given: Given, *join: Operator) -> None:
    _residual(module.resnets[index], features, given, *join)
    if hasattr(module, "attentions"):
        _attend(module.attentions[index], features, given)


def _middle(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same."""
    features = _features(groups, given)
    _residual(module.resnets[0], features, given)
    for attention, resnet in zip(module.attentions, module.resnets[1:], strict=True):
        _attend(attention, features, given)
        _residual(resnet, features, given)
    return features.x


def _features(groups: Groups, given: Given) -> Features:
    return Features(groups, given["hidden_states"], given["image_only_indicator"].shape[-1])


def _residual(
    block: SpatioTemporalResBlock, features: Features, given: Given, start_of: Operator = lambda x, take: x
) -> None:
    """A residual block.

    start_of: what makes its input of some frames.
    """
    temb, images = given["temb"], given["image_only_indicator"]
    if hooked(block):
        whole = start_of(features.x, Take(len(features.x), lambda y: y))
        features.replace(block(whole, temb, image_only_indicator=images))
        return
    features.spatial(lambda x, take: block.spatial_res_block(start_of(x, take), take(temb)))
    if temb is not None:
        temb = temb.reshape(features.videos, features.frames, -1)
    video, temporal = features.video()[..., None], block.temporal_res_block

    def blended(x: Tensor, mixed: Tensor) -> Tensor:
        return block.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=images).squeeze(-1)

    if features.across_time(temporal):
        made = _temporal_residual(temporal, features, temb)
        features.temporal(lambda start, stop: blended(video[..., start:stop, :], made(start, stop)))
    else:
        with features.groups.within("temporal"):
            features.replace_video(blended(video, temporal(video, temb)))


def _temporal_residual(
    resnet: TemporalResnetBlock, features: Features, temb: Tensor | None
) -> Callable[[int, int], Tensor]:
    """What makes its output [B, C, T, n, 1] at some places: norm, SiLU, convolution, time step, stored; and the rest.

    temb: [B, T, channels].
    """
    video, before = features.video()[..., None], features.statistics(resnet.norm1)
    between = Statistics(resnet.norm2)
    shift = 0
    if resnet.time_emb_proj is not None:
        shift = resnet.time_emb_proj(resnet.nonlinearity(temb)).transpose(1, 2)[..., None, None]

    def first(start: int, stop: int) -> Tensor:
        y = activated(before, video[..., start:stop, :], resnet.nonlinearity)
        y = resnet.conv1(y) + shift
        between.add(y)
        return y

    hidden = features.groups.run("temporal", first, features.places, dim=3)

    def rest(start: int, stop: int) -> Tensor:
        y = activated(between, hidden[..., start:stop, :], resnet.nonlinearity)
        y = resnet.conv2(resnet.dropout(y))
        x = video[..., start:stop, :]
        return (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)) + y

    return rest


def _attend(attention: TransformerSpatioTemporalModel, features: Features, given: Given) -> None:
    """A transformer in space and time."""
    text, images = given["encoder_hidden_states"], given["image_only_indicator"]
    if hooked(attention):
        whole = attention(features.x, encoder_hidden_states=text, image_only_indicator=images, return_dict=False)[0]
        features.replace(whole)
        return
    groups, x, size, places = features.groups, features.x, len(features.x), features.places
    context = text.unflatten(0, (features.videos, -1))[:, :1]  # [B, 1, L, channels], of the first frames
    frame = torch.arange(features.frames, device=x.device).repeat(features.videos)
    frame = attention.time_pos_embed(attention.time_proj(frame).to(x.dtype))[:, None]  # [N, 1, C]

    def enter(start: int, stop: int) -> Tensor:
        y = attention.proj_in(attention.norm(x[start:stop]).permute(0, 2, 3, 1).flatten(1, 2))
        return attention.transformer_blocks[0](y, encoder_hidden_states=text[start:stop])

    def attend(block: nn.Module, start: int, stop: int) -> Tensor:
        return block(tokens[start:stop], encoder_hidden_states=text[start:stop])

    def mix(block: nn.Module, start: int, stop: int) -> Tensor:
        y = tokens[:, start:stop]
        there = context.expand(-1, stop - start, -1, -1).flatten(0, 1)
        mixed = block(y + frame, num_frames=features.frames, encoder_hidden_states=there)
        return attention.time_mixer(x_spatial=y, x_temporal=mixed, image_only_indicator=images)

    tokens = groups.run("spatial", enter, size)  # [N, P, C]
    *inner, last = attention.temporal_transformer_blocks
    for temporal, spatial in zip(inner, attention.transformer_blocks[1:], strict=True):
        tokens = groups.run("temporal", partial(mix, temporal), places, dim=1, out=_over(tokens, groups))
        tokens = groups.run("spatial", partial(attend, spatial), size, out=_over(tokens, groups))

    def leave(start: int, stop: int) -> Tensor:
        y = attention.proj_out(mix(last, start, stop)).transpose(1, 2)  # [N, C, n]
        return (y + x.flatten(2)[..., start:stop]).unflatten(0, (-1, features.frames)).transpose(1, 2)

    features.temporal(leave)


def _over(tokens: Tensor, groups: Groups) -> Tensor | None:
    """Where tokens go next: over themselves, where slices made them."""
    return tokens if min(groups.counts.values()) > 1 else None


def _refuses(module: nn.Module) -> str | None:
    attentions = getattr(module, "attentions", ())
    return not_of(SpatioTemporalResBlock, module.resnets) or not_of(TransformerSpatioTemporalModel, attentions)


_BLOCK = {"groups": ("spatial", "temporal"), "refuses": _refuses}

FORWARDS = {
    "DownBlockSpatioTemporal": Sliced(forward=forward(_down), **_BLOCK),
    "CrossAttnDownBlockSpatioTemporal": Sliced(forward=forward(_down), **_BLOCK),
    "UpBlockSpatioTemporal": Sliced(forward=forward(_up), **_BLOCK),
    "CrossAttnUpBlockSpatioTemporal": Sliced(forward=forward(_up), **_BLOCK),
    "UNetMidBlockSpatioTemporal": Sliced(forward=forward(_middle), **_BLOCK),
}
