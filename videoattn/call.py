"""Facts about attention: where it sits, when it runs, what it is given.

Everything here is frozen and hashable and holds no tensor, so that a policy can be a pure function of it and a plan can
be cached by it.

Letters used in the package: B batch, N tokens, H heads, D head_dim; Nq and Nk where queries and keys differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from videoattn.selection.arrangement import Order, Tokens

Kind = Literal["spatial", "temporal", "full", "cross", "joint", "text", "audio"]
"""What attends to what.

spatial   tokens of one frame among themselves (factorised models)
temporal  one position over the frames (factorised models)
full      every video token to every video token
cross     video tokens to a context: text, image, audio
joint     video and text tokens in one sequence
text      text tokens among themselves (token refiners, connectors)
audio     audio tokens among themselves
"""
KINDS: tuple[Kind, ...] = get_args(Kind)

Layout = Literal["BNHD", "BHND"]
"""The order of a tensor's dimensions: BNHD as projections produce it, BHND as torch's SDPA takes it."""

Mask = Literal["none", "bool", "additive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One attention layer of a denoiser.

    Args:
        name: the module's path in the denoiser, as `named_modules` gives it.
        layer: running number of the site in the denoiser, in the order of `named_modules`.
        kind: what attends to what.
        heads: number of query heads, head_dim: elements per head; None where the host's module does not say.
    """

    name: str
    layer: int
    kind: Kind
    heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The video tokens of one denoiser call, after patching: frames x height x width, in that order, frame-major."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """When a denoiser call happens.

    Args:
        generation: running number of the generation since attention was enabled, from 0.
        index: the scheduler's step, from 0.
        total: number of steps of this generation; 0 where it is not known.
        branch: guidance branch: "0", "1", ... in the order in which the host calls the denoiser within a step.
        grid: the video tokens, or None where the adapter cannot tell.
    """

    generation: int = 0
    index: int = 0
    total: int = 0
    branch: str = "0"
    grid: Grid | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The shape of one attention call; what a backend plans for.

    Args:
        kind: what attends to what.
        layout: dimension order of q, k, v and the output.
        batch, q_len, kv_len, heads, kv_heads, head_dim: sizes; kv_heads divides heads.
        dtype: of q, k, v and the output.
        device: where they live.
        mask: form of the mask tensor that comes with the call.
        has_kv_len: whether prefix lengths int32 [B] come with the call: row b attends to its first kv_len[b] keys.
        causal: whether query i sees keys 0..i only.
        tokens: what the sequence consists of, for what leaves key blocks out; None for all else, and where it is not known.
        order: in which the video's tokens lie.
    """

    kind: Kind
    layout: Layout
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    mask: Mask = "none"
    has_kv_len: bool = False
    causal: bool = False
    tokens: Tokens | None = None
    order: Order = "raster"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.kind} attention, batch {self.batch}, q_len {self.q_len}, kv_len {self.kv_len}, heads {self.heads}, "
            f"head_dim {self.head_dim}, {dtype}, mask {self.mask}, on {self.device}"
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products, masks not deducted."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim
