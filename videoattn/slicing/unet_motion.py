"""Blocks of UNetMotionModel (AnimateDiff; Guo et al., arXiv:2307.04725): residual block and spatial transformer are a group
over frames, a motion module is one over places.

Letters: B videos, T frames of each, N = B T, C channels, H rows, W columns; n of a slice.
"""

from __future__ import annotations

from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

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

_TO_ATTENTION = ("encoder_hidden_states", "cross_attention_kwargs", "attention_mask", "encoder_attention_mask")


def _down(module: nn.Module, groups: Groups, given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(x, and all that the up blocks take from here), of x [N, C, H, W]."""
    features = Features(groups, given["hidden_states"], given["num_frames"])

    def layer(index: int) -> None:
        features.spatial(_in_turn(*_layer(module, index, given)))
        _move(module.motion_modules[index], features)
        if index == len(module.motion_modules) - 1 and given.get("additional_residuals") is not None:
            features.replace(features.x + given["additional_residuals"])

    return down(module, features, layer)


def _up(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same, or twice the size."""
    features = Features(groups, given["hidden_states"], given["num_frames"])

    def layer(index: int, join: Operator) -> None:
        features.spatial(_in_turn(join, *_layer(module, index, given)))
        _move(module.motion_modules[index], features)

    return up(module, features, given, layer)


def _middle(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """[N, C, H, W] -> the same."""
    features = Features(groups, given["hidden_states"], given["num_frames"])
    operators = [_residual(module.resnets[0], given)]
    for attention, motion, resnet in zip(module.attentions, module.motion_modules, module.resnets[1:], strict=True):
        features.spatial(_in_turn(*operators, _attend(attention, given)))
        _move(motion, features)
        operators = [_residual(resnet, given)]
    features.spatial(_in_turn(*operators))
    return features.x


def _middle_of_images(module: nn.Module, groups: Groups, given: Given) -> Tensor:
    """The middle where the motion adapter has none: the image model's, which knows nothing of time."""
    x = given["hidden_states"]

    def run(x: Tensor, take: Take) -> Tensor:
        rest = {name: take(value) for name, value in given.items() if name not in ("self", "hidden_states")}
        return type(module).forward(module, x, **rest)

    features = Features(groups, x, frames=1)
    features.spatial(run)
    return features.x


def _layer(module: nn.Module, index: int, given: Given) -> list[Operator]:
    """What runs frame by frame."""
    operators = [_residual(module.resnets[index], given)]
    if hasattr(module, "attentions"):
        operators.append(_attend(module.attentions[index], given))
    return operators


def _residual(resnet: nn.Module, given: Given) -> Operator:
    return lambda x, take: resnet(input_tensor=x, temb=take(given["temb"]))


def _attend(attention: nn.Module, given: Given) -> Operator:
    def operator(x: Tensor, take: Take) -> Tensor:
        arguments = {name: take(given[name]) for name in _TO_ATTENTION}
        return attention(hidden_states=x, **arguments, return_dict=False)[0]

    return operator


def _in_turn(*operators: Operator) -> Operator:
    def run(x: Tensor, take: Take) -> Tensor:
        for operator in operators:
            x = operator(x, take)
        return x

    return run


def _move(motion: nn.Module, features: Features) -> None:
    """A motion module."""
    if features.across_time(motion):
        mix_frames(motion, features, timestep=None, class_labels=None)
    else:
        with features.groups.within("temporal"):
            features.replace(motion(features.x, num_frames=features.frames))


def _refuses(module: nn.Module) -> str | None:
    return not_of(AnimateDiffTransformer3D, module.motion_modules)


_BLOCK = {"groups": ("spatial", "temporal"), "refuses": _refuses}

FORWARDS = {
    "DownBlockMotion": Sliced(forward=forward(_down), **_BLOCK),
    "CrossAttnDownBlockMotion": Sliced(forward=forward(_down), **_BLOCK),
    "UpBlockMotion": Sliced(forward=forward(_up), **_BLOCK),
    "CrossAttnUpBlockMotion": Sliced(forward=forward(_up), **_BLOCK),
    "UNetMidBlockCrossAttnMotion": Sliced(forward=forward(_middle), **_BLOCK),
    "UNetMidBlock2DCrossAttn": Sliced(groups=("spatial",), forward=forward(_middle_of_images)),
    "AnimateDiffTransformer3D": Sliced(groups=("temporal",), forward=forward(mixing)),
}
