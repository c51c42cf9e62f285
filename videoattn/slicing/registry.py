"""Which file knows how a class of diffusers runs slice by slice.

A family's file has a table FORWARDS: class name -> `Sliced`. A new class is one entry there; a new family one file, and one
line here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

FAMILIES = (
    "videoattn.slicing.unet_motion",
    "videoattn.slicing.unet_spatio_temporal",
    "videoattn.slicing.unet_3d",
    "videoattn.slicing.decoders",
    "videoattn.slicing.decoder_wan",
    "videoattn.slicing.tokens",
)


@dataclass(frozen=True, kw_only=True)
class Sliced:
    """How modules of one class run slice by slice.

    Args:
        groups: the names of its groups, in the order in which they run: "spatial", "temporal", "tokens".
        forward: (module, groups: slices.Groups, *args, **kwargs) -> what the module's own forward returns for the same
            arguments, equal to rounding.
        refuses: (module) -> why this one cannot, or None.
        method: what is replaced where it is not `forward`; hooks do not stand around it.
    """

    groups: tuple[str, ...]
    forward: Callable[..., object]
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    method: str = "forward"


@functools.cache
def table() -> dict[str, Sliced]:
    """Class name -> how it is sliced."""
    found: dict[str, Sliced] = {}
    for family in FAMILIES:
        found |= importlib.import_module(family).FORWARDS
    return found
