"""Options of `enable_feature_slicing` beside slices: which a decoder has, which change the video, and tiling on and off again.

What changes the video stays off unless a user asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

OF_FRAMES = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
"""Classes of VAEs that take frames as rows of a batch."""

_TEMPORAL = ("AutoencoderKLTemporalDecoder",)  # whose frames see each other in one call of `decode`
_GONE = object()


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Of a VAE.

    Args:
        option: of `enable_feature_slicing`.
        exact: whether videos stay what they are, to rounding. why: half a sentence.
    """

    option: str
    exact: bool
    why: str

    def __str__(self) -> str:
        return f"{self.option} ({'' if self.exact else 'which changes the video: '}{self.why})"


def mixes_frames(vae: nn.Module) -> bool:
    """Whether frames that are rows of a batch see each other in one call of `decode`."""
    return type(vae).__name__ in _TEMPORAL


def switches(vae: nn.Module) -> Iterator[Switch]:
    """Those that this VAE has."""
    if type(vae).__name__ in OF_FRAMES:
        why = "frames of another call are not seen" if mixes_frames(vae) else "frames know no other anyway"
        yield Switch(option="vae_frames", exact=not mixes_frames(vae), why=why)
    if hasattr(vae, "use_tiling"):
        why = "tiles are decoded without what surrounds them, and blended where they overlap"
        yield Switch(option="vae_tiling", exact=False, why=why)


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
