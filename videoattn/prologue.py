"""What a model does between its projections and attention: norm of q and k, rotary embedding, joining of streams.

Processors hand over raw projections and a Prologue instead of finished q, k, v. Here it is applied in torch, operation
by operation as the host does, so that exact attention rounds as the host rounds; a kernel may fuse it instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]
"""cos and sin, in the shapes that the family's `rotate` takes."""


@dataclass(slots=True, eq=False)
class Stream:
    """The raw projections of one run of tokens (video, or text), and what turns them into q, k, v.

    Consumed by a Prologue: a projection is let go as soon as what follows from it exists, as in the host's code, so that
    the memory at the peak is the host's. Make it from calls, not from variables that keep the projections.

    q: [B, Nq, H*D]; k, v: [B, Nk, H*D].
    norm_q, norm_k: the host's modules: called, never read, so that offload and casting hooks keep working.
    rope: turns the tokens of `rope_span` (None: all of them); None where positions are not rotary.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: nn.Module | None = None
    norm_k: nn.Module | None = None
    rope: Rope | None = None
    rope_span: slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prologue:
    """The static part: the same for every call of a site, and hashable.

    Args:
        norm: whether norm_q and norm_k see all heads at once [B, N, H*D] or one head at a time [B, N, H, D].
        rotate: (x, rope) -> x turned; sees what `rope` names: [B, N, H*D] or [B, N, H, D].
        rope: as `norm`, for the rotation.
        pairs: that `rotate` turns neighbouring elements (2i, 2i+1), for kernels that do so themselves: by tables that hold
            each value once ("halves", as `rotate_pairs` takes them) or twice side by side ("repeated": [N, D], or
            [B, N, H*D] across heads; multiplied in fp32). None: nothing is known of it.
    """

    norm: Literal["across_heads", "per_head"]
    rope: Literal["across_heads", "per_head"] = "per_head"
    rotate: Callable[[Tensor, Rope], Tensor] | None = None
    pairs: Literal["halves", "repeated"] | None = None

    def __call__(self, heads: int, *streams: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, N, H, D] of the streams one after another along N."""
        if len(streams) == 1:
            return self._finish(heads, streams[0])
        q, k, v = map(list, zip(*(self._finish(heads, stream) for stream in streams), strict=True))
        joined = []
        for parts in (q, k, v):
            joined.append(torch.cat(parts, dim=1))
            parts.clear()
        return tuple(joined)

    def _finish(self, heads: int, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        self.finish(heads, stream, "q")
        self.finish(heads, stream, "k")
        q, k, v = stream.q, stream.k, split_heads(stream.v, heads)
        stream.q = stream.k = stream.v = None
        return q, k, v

    def finish(self, heads: int, stream: Stream, name: Literal["q", "k"]) -> None:
        """Turn one projection of a stream, [B, N, H*D], into what attention takes, [B, N, H, D], and leave it there."""
        x, norm = getattr(stream, name), getattr(stream, f"norm_{name}")
        setattr(stream, name, None)
        if norm is not None and self.norm == "across_heads":
            x = norm(x)
        if stream.rope is not None and self.rope == "across_heads":
            x = self.rotate(x, stream.rope)
        x = split_heads(x, heads)
        if norm is not None and self.norm == "per_head":
            x = norm(x)
        if stream.rope is not None and self.rope == "per_head":
            span = stream.rope_span
            if span is None:
                x = self.rotate(x, stream.rope)
            else:  # x is a fresh projection or norm, so its other tokens may stay where they are
                x[:, span] = self.rotate(x[:, span], stream.rope)
        setattr(stream, name, x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] as [B, N, H, D]. A view; Tensor.unflatten does the same at several times the host time."""
    b, n, c = x.shape
    return x.view(b, n, heads, c // heads)


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of neighbouring elements (2i, 2i+1), computed in the tables' dtype, returned in x's.

    x: [B, N, H, D]; rope: cos and sin [1, N, 1, D/2] (Su et al., arXiv:2104.09864, section 3.4).
    """
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out
