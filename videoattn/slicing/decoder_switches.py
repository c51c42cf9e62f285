"""diffusers' own switches against the memory of a decoder, which of them change the video, and tiling on and off again.

What changes the video stays off unless a user asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

_TEMPORAL = ("AutoencoderKLTemporalDecoder",)  # whose frames see each other in one call of `decode`
_GONE = object()


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Of a pipeline.

    Args:
        name: "vae.enable_tiling()", or the name of an argument of the call.
        exact: whether videos stay what they are, to rounding. why: a sentence.
    """

    name: str
    exact: bool
    why: str


def mixes_frames(vae: nn.Module) -> bool:
    """Whether frames that are rows of a batch see each other in one call of `decode`."""
    return type(vae).__name__ in _TEMPORAL


def host_switches(pipe: object) -> Iterator[Switch]:
    """Those that this pipeline has."""
    vae = getattr(pipe, "vae", None)
    if hasattr(vae, "use_slicing"):
        yield Switch(
            name="vae.enable_slicing()", exact=True, why="rows of the batch are decoded one by one and know no other"
        )
    if hasattr(vae, "use_tiling"):
        yield Switch(
            name="vae.enable_tiling()",
            exact=False,
            why="tiles are decoded without what surrounds them, and blended where they overlap",
        )
    if "decode_chunk_size" in inspect.signature(type(pipe).__call__).parameters:
        temporal = mixes_frames(vae)
        why = "frames of another chunk are not seen" if temporal else "frames are decoded one by one anyway"
        yield Switch(name="decode_chunk_size", exact=not temporal, why=why)


def tile(vae: nn.Module, **sizes: int) -> Callable[[], None]:
    """Have a VAE decode in tiles; `sizes` as its `enable_tiling` takes them.

    Returns:
        What puts back all that was set before, whatever has been done to tiling in between.

    Raises:
        ValueError: it has no tiles. Nothing has been changed then.
    """
    if not hasattr(vae, "use_tiling"):
        raise ValueError(f"tiling: wanted a VAE that decodes in tiles, got {type(vae).__name__}")
    before = dict(vars(vae))
    vae.enable_tiling(**sizes)
    after = vars(vae)
    touched = {name for name in before | after if name.startswith(("use_tiling", "tile_"))}
    touched |= {name for name in before | after if before.get(name, _GONE) is not after.get(name, _GONE)}

    def restore() -> None:
        for name in touched:
            if name in before:
                setattr(vae, name, before[name])
            elif name in vars(vae):
                delattr(vae, name)

    return restore
