"""What videoattn knows of one model family: where its attention is, of what kind, and who stands in for its processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor, nn

from videoattn.call import Grid, Kind, Site
from videoattn.pipelines.processor import FastProcessor

if TYPE_CHECKING:
    from videoattn.pipelines.token_order import Seams

Inputs = Mapping[str, object]
"""The arguments of one call of the denoiser's forward, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One model family.

    Args:
        name: shown in reports; "generic" for families without processors of their own.
        kinds: (pattern, kind): the first pattern (fnmatch) that matches an attention module's path tells its kind.
        processors: the host's processor class -> ours. A processor of another class goes the generic way.
        grid: (denoiser, inputs) -> the video tokens of the call, or None where that is not known.
        kv_len: (denoiser, inputs) -> how many keys count in each row, int32 [B], for processors that read `kv_len`;
            None where every key does.
        kv_len_from: the inputs that `kv_len` reads; it is computed once for each set of them, not once a step.
        seams: where the video's tokens may take another order; None where they must stay in raster order.
    """

    name: str
    kinds: tuple[tuple[str, Kind], ...]
    processors: Mapping[type, type[FastProcessor]] = field(default_factory=dict)
    grid: Callable[[nn.Module, Inputs], Grid | None] | None = None
    kv_len: Callable[[nn.Module, Inputs], Tensor | None] | None = None
    kv_len_from: tuple[str, ...] = ()
    seams: Seams | None = None

    def sites(self, model: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
        """Every attention module of a denoiser that some kind pattern names, in the order of `named_modules`."""
        for layer, (name, attn) in enumerate(attention_modules(model)):
            kind = next((kind for pattern, kind in self.kinds if fnmatchcase(name, pattern)), None)
            if kind is not None:
                heads = getattr(attn, "heads", None)
                yield attn, Site(name=name, layer=layer, kind=kind, heads=heads, head_dim=_head_dim(attn, heads))


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold an attention processor; diffusers' have no base class in common."""
    for name, module in model.named_modules():
        if callable(getattr(module, "processor", None)):
            yield name, module


def set_processor(attn: nn.Module, processor: object) -> None:
    """Set a processor as the host does; Mochi's attention has no setter of its own."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor


def _head_dim(attn: nn.Module, heads: int | None) -> int | None:
    head_dim = getattr(attn, "head_dim", None)
    inner_dim = getattr(attn, "inner_dim", None)
    if head_dim is not None or inner_dim is None or heads is None:
        return head_dim
    return inner_dim // heads


def patched_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """The grid of a denoiser that takes latents [B, C, T, Y, X] and cuts patches as its config says."""
    frames, height, width = inputs["hidden_states"].shape[2:]
    config = model.config
    patch = config.patch_size
    patch_t, patch_h, patch_w = patch if isinstance(patch, tuple | list) else (config.patch_size_t, patch, patch)
    return Grid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)
