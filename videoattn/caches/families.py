"""What a reused step leaves out of each family of denoisers, and what it gives instead.

A reused step calls the denoiser as any other does: embeddings and the outermost code run, blocks do not. Blocks hand on what
they were given, so that shapes stay right, and one place gives what was predicted:

output       the last projection, behind all blocks. Held, that is the network's output of an earlier step, which Step Rehash
             (Zhan et al., NeurIPS 2024) amounts to; it is the smallest tensor there is to keep.
late_block   UNets: what the last up block is given. It and the first down block, whose skips it reads, run.
first_block  DiTs: what all blocks behind the first one added. The first one runs.

Letters: B batch times frames, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

Point = Literal["output", "late_block", "first_block"]
POINTS: tuple[Point, ...] = get_args(Point)

HandOn = Callable[[nn.Module, tuple, dict], Any]
"""(module, args, kwargs of its call) -> what it returns where it is left out."""


def streams(count: int) -> HandOn:
    """The first `count` arguments of a block, which are what it would change."""

    def hand_on(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, ...]:
        given = first_arguments(args, kwargs, count)
        return given[0] if count == 1 else given

    return hand_on


def first_arguments(args: tuple, kwargs: dict, count: int) -> tuple:
    """By place or by name: hosts pass what a block changes first, and in the order of its signature."""
    return (*args, *kwargs.values())[:count]


def wrapped(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor]:
    """As a module does that returns a tuple of one."""
    return first_arguments(args, kwargs, 1)


def down(block: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of a down block of a UNet: (x, skips) of the right shapes that hold nothing.

    x [B, C, H, W] becomes one skip a layer and, half as large, the downsampler's.
    """
    (x,) = first_arguments(args, kwargs, 1)
    count, _, height, width = x.shape
    last = block.resnets[-1]
    channels = getattr(last, "spatial_res_block", last).out_channels
    nothing = x.new_zeros(())
    skips = [nothing.expand(count, channels, height, width)] * len(block.resnets)
    if block.downsamplers is not None:
        skips.append(nothing.expand(count, channels, -(-height // 2), -(-width // 2)))
    return skips[-1], tuple(skips)


def vace(block: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Of a control block of Wan VACE, given (hidden states, text, control): (hint, control)."""
    control = first_arguments(args, kwargs, 3)[2]
    return control, control


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of denoisers.

    Args:
        blocks: name of a module, or of a list of them -> what it hands on; in the order in which they run.
        output: the last projections, whose outputs are all that the blocks are there for.
        changes: how many first arguments each block changes, where blocks follow each other and nothing else comes between:
            what they add together is then a residual. 0 where that is not so.
    """

    blocks: dict[str, HandOn] = field(default_factory=dict)
    output: tuple[str, ...] = ("proj_out",)
    changes: int = 0


def _dit(name: str, changes: int = 1, *, residual: bool = True, **others: Any) -> Family:
    names = name.split()
    return Family(blocks={each: streams(changes) for each in names}, changes=changes if residual else 0, **others)


def _unet(**first: HandOn) -> Family:
    return Family(
        blocks=first
        | {"down_blocks": down, "mid_block": streams(1), "up_blocks": streams(1), "conv_norm_out": streams(1)},
        output=("conv_out",),
    )


FAMILIES: dict[str, Family] = {
    "AllegroTransformer3DModel": _dit("transformer_blocks"),
    "ChronoEditTransformer3DModel": _dit("blocks"),
    "CogVideoXTransformer3DModel": _dit("transformer_blocks", 2),
    "ConsisIDTransformer3DModel": _dit("transformer_blocks", 2, residual=False),
    "CosmosTransformer3DModel": _dit("transformer_blocks"),
    "EasyAnimateTransformer3DModel": _dit("transformer_blocks", 2),
    "HunyuanVideo15Transformer3DModel": _dit("transformer_blocks", 2),
    "HunyuanVideoFramepackTransformer3DModel": _dit("transformer_blocks single_transformer_blocks", 2),
    "HunyuanVideoTransformer3DModel": _dit("transformer_blocks single_transformer_blocks", 2),
    "I2VGenXLUNet": _unet(transformer_in=wrapped),
    "Kandinsky5Transformer3DModel": _dit("visual_transformer_blocks", output=("out_layer",)),
    "LTX2VideoTransformer3DModel": _dit("transformer_blocks", 2, output=("proj_out", "audio_proj_out")),
    "LTXVideoTransformer3DModel": _dit("transformer_blocks"),
    "LatteTransformer3DModel": _dit("transformer_blocks temporal_transformer_blocks", residual=False),
    "MochiTransformer3DModel": _dit("transformer_blocks", 2),
    "MotifVideoTransformer3DModel": _dit("transformer_blocks single_transformer_blocks", 2, residual=False),
    "SanaVideoTransformer3DModel": _dit("transformer_blocks"),
    "SkyReelsV2Transformer3DModel": _dit("blocks"),
    "UNet3DConditionModel": _unet(transformer_in=wrapped),
    "UNetMotionModel": _unet(),
    "UNetSpatioTemporalConditionModel": _unet(),
    "WanAnimateTransformer3DModel": _dit("blocks", residual=False),
    "WanTransformer3DModel": _dit("blocks"),
    "WanVACETransformer3DModel": Family(blocks={"vace_blocks": vace, "blocks": streams(1)}),
}


def family_of(model: nn.Module) -> Family | None:
    """Of a denoiser; subclasses are served as what they derive from."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def refuses(model: nn.Module, point: Point) -> str | None:
    """Why a denoiser cannot be served at a point; None where it can."""
    family = family_of(model)
    if family is None:
        return f"of {type(model).__name__} it is not known what a step can leave out"
    if point == "late_block" and not (hasattr(model, "up_blocks") and len(model.up_blocks) > 1):
        return f"{type(model).__name__} is no UNet with two up blocks"
    if point == "first_block" and not family.changes:
        return f"the blocks of {type(model).__name__} do not add to the same tensors one after the other"
    if point == "first_block" and len(list(blocks(model, family))) < 3:
        return f"{type(model).__name__} has fewer than three blocks"
    return None


def blocks(model: nn.Module, family: Family) -> Iterator[tuple[nn.Module, HandOn]]:
    """All that a step can leave out, with what it hands on; looked up anew, since hosts swap blocks."""
    for name, hand_on in family.blocks.items():
        found = getattr(model, name, None)
        if isinstance(found, nn.ModuleList):
            yield from ((module, hand_on) for module in found)
        elif found is not None:
            yield found, hand_on


def late(model: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, HandOn]]]:
    """Of a UNet: the up block before the last, and what is left out beside it."""
    *before, giver, _ = model.up_blocks
    passing = ([] if model.mid_block is None else [model.mid_block]) + before
    left_out = [(module, down) for module in list(model.down_blocks)[1:]]
    return giver, left_out + [(module, streams(1)) for module in passing]
