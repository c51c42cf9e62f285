"""Blocks of UNet3DConditionModel (ModelScope; Wang et al., arXiv:2308.06571) and I2VGenXLUNet (Zhang et al.,
arXiv:2311.04145): a residual block is a group over frames, four convolutions over time are one over places, a spatial
transformer is a group over frames, a temporal one is one over places.

Letters: B videos, T frames of each, N = B T, C channels, H rows, W columns, P = H W places; n of a slice.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
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
    mix_frames,
    mixing,
    not_of,
    up,
)


def _down(module: nn.Module, groups: Groups, given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(x, and all that the up blocks take from here), of x [N, C, H, W]."""
    features = Features(groups, given["hidden_states"], given["num_frames"])
    return down(module, features, lambda index: _layer(module, index, features, given))


def _up(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same, or twice the size."""
    features = Features(groups, given["hidden_states"], given["num_frames"])
    return up(module, features, given, lambda index, join: _layer(module, index, features, given, join))


def _layer(module: nn.Module, index: int, features: Features, given: Given, *join: Operator) -> None:
    _residual(module.resnets[index], module.temp_convs[index], features, given, *join)
    if hasattr(module, "attentions"):
        _attend(module.attentions[index], module.temp_attentions[index], features, given)


def _middle(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same."""
    features = Features(groups, given["hidden_states"], given["num_frames"])
    _residual(module.resnets[0], module.temp_convs[0], features, given)
    for index, attention in enumerate(module.attentions):
        _attend(attention, module.temp_attentions[index], features, given)
        _residual(module.resnets[index + 1], module.temp_convs[index + 1], features, given)
    return features.x


def _residual(
    resnet: nn.Module,
    convolutions: TemporalConvLayer,
    features: Features,
    given: Given,
    start_of: Operator = lambda x, take: x,
) -> None:
    """A residual block, and convolutions over time.

    start_of: what makes its input of some frames.
    """
    features.spatial(lambda x, take: resnet(input_tensor=start_of(x, take), temb=take(given["temb"])))
    if features.across_time(convolutions):
        _convolve(convolutions, features)
    else:
        with features.groups.within("temporal"):
            features.replace(convolutions(features.x, num_frames=features.frames))


def _convolve(module: TemporalConvLayer, features: Features) -> None:
    """x + f(f(f(f(x)))), f: GroupNorm over (C/G, T, H, W), SiLU, convolution of 3 frames. What lies between is one tensor,
    written over by each f; its statistics are taken while it is written."""
    video = features.video()[..., None]
    norm, *operators = module.conv1
    before, source, hidden = features.statistics(norm), video, None
    for norm, *following in (module.conv2, module.conv3, module.conv4):
        after = Statistics(norm)
        part = _convolved(before, source, operators, after)
        hidden = features.groups.run("temporal", part, features.places, dim=3, out=hidden)
        before, source, operators = after, hidden, following
    last = _convolved(before, source, operators)
    features.temporal(lambda start, stop: (video[..., start:stop, :] + last(start, stop)).squeeze(-1))


def _convolved(
    before: Statistics, source: Tensor, operators: list[nn.Module], after: Statistics | None = None
) -> Callable[[int, int], Tensor]:
    """What normalises and convolves `source` [B, C, T, P, 1] at some places.

    after: the statistics of what it makes.
    """

    def part(start: int, stop: int) -> Tensor:
        activation, *rest = operators
        y = activated(before, source[..., start:stop, :], activation)
        for operator in rest:
            y = operator(y)
        if after is not None:
            after.add(y)
        return y

    return part


def _attend(attention: nn.Module, temporal: TransformerTemporalModel, features: Features, given: Given) -> None:
    """A transformer over each frame, and one over time. (The host gives neither a mask.)"""
    kwargs = given["cross_attention_kwargs"]

    def attend(x: Tensor, take: Take) -> Tensor:
        text = take(given["encoder_hidden_states"])
        out = attention(
            hidden_states=x, encoder_hidden_states=text, cross_attention_kwargs=take(kwargs), return_dict=False
        )
        return out[0]

    features.spatial(attend)
    if features.across_time(temporal):
        mix_frames(temporal, features, kwargs=kwargs, timestep=None, class_labels=None)
    else:
        frames = features.frames
        with features.groups.within("temporal"):
            out = temporal(features.x, num_frames=frames, cross_attention_kwargs=kwargs, return_dict=False)
            features.replace(out[0])


def _mixing(module: TransformerTemporalModel, groups: Groups, given: Given) -> object:
    """The transformer over time in front of the first block."""
    mixed = mixing(module, groups, given)
    return TransformerTemporalModelOutput(sample=mixed) if given["return_dict"] else (mixed,)


def _refuses(module: nn.Module) -> str | None:
    attentions = getattr(module, "temp_attentions", ())
    return not_of(TemporalConvLayer, module.temp_convs) or not_of(TransformerTemporalModel, attentions)


_BLOCK = {"groups": ("spatial", "temporal"), "refuses": _refuses}

FORWARDS = {
    "DownBlock3D": Sliced(forward=forward(_down), **_BLOCK),
    "CrossAttnDownBlock3D": Sliced(forward=forward(_down), **_BLOCK),
    "UpBlock3D": Sliced(forward=forward(_up), **_BLOCK),
    "CrossAttnUpBlock3D": Sliced(forward=forward(_up), **_BLOCK),
    "UNetMidBlock3DCrossAttn": Sliced(forward=forward(_middle), **_BLOCK),
    "TransformerTemporalModel": Sliced(groups=("temporal",), forward=forward(_mixing)),
}
