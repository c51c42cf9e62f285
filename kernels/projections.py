"""What a fused kernel must know of a Prologue and its Streams: where the tokens lie, which norm, which tables.

A Prologue calls the host's norms and rotation; a kernel reads weights and tables instead. `refuses` says where reading is
not the same as calling: hooks, other classes, weights that lie elsewhere or in another dtype.

Letters: B batch, N tokens, H heads, D head_dim, C = H D.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from videoattn.kernels.prologue_device import Form
from videoattn.kernels.tiles import alignment
from videoattn.kernels.triton_backend import aligned
from videoattn.prologue import Prologue, Stream

HEAD_DIMS = range(16, 257, 8)
_KINDS = {
    ("torch.nn.modules.normalization", "RMSNorm"): "rms",
    ("torch.nn.modules.normalization", "LayerNorm"): "layer",
    ("diffusers.models.normalization", "RMSNorm"): "rms_rounded",
}


class Operand(NamedTuple):
    """q, k or v of all streams: at most two, which follow one another along N.

    tensors: x of the two streams, norm weights of both, norm biases of both; None where there is none.
    numbers: tokens of both, tokens of the first, strides (b, n) of the first and of the second, stride of h.
    """

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int, ...]


class Raw(NamedTuple):
    """What a launch needs of q, k and v.

    tables: cos and sin, or None. rope: first and last token turned, strides b, n, h and from pair to pair.
    """

    q: Operand
    k: Operand
    v: Operand
    tables: tuple[Tensor | None, Tensor | None]
    rope: tuple[int, ...]
    eps: float
    form: Form


def refuses(prologue: Prologue, heads: int, *streams: Stream) -> str | None:
    """Why a kernel cannot stand in for `prologue(heads, *streams)`, or None. Reads no values."""
    x = streams[0].q
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {x.dtype}"
    head_dim = x.shape[-1] // heads
    if head_dim not in HEAD_DIMS:
        return f"takes head_dim 16 to 256 in steps of 8, got {head_dim}"
    if len(streams) > 2:
        return f"takes one stream or two, got {len(streams)}"
    for stream in streams:
        for part in (stream.q, stream.k, stream.v):
            if part.dtype != x.dtype or part.device != x.device:
                return f"projections are {part.dtype} on {part.device} and {x.dtype} on {x.device}"
    reason = _refuses_norms(prologue, x, head_dim, streams)
    return _refuses_rope(prologue, x, streams) if reason is None else reason


def _refuses_norms(prologue: Prologue, x: Tensor, head_dim: int, streams: tuple[Stream, ...]) -> str | None:
    across = prologue.norm == "across_heads"
    width = x.shape[-1] if across else head_dim
    norms = [norm for stream in streams for norm in (stream.norm_q, stream.norm_k)]
    if all(norm is None for norm in norms):
        return None
    if any(norm is None for norm in norms):
        return "only some of q and k have a norm"
    if torch_module._has_any_global_hook():
        return "hooks on all modules"
    first = norms[0]
    for norm in norms:
        name = f"{type(norm).__module__}.{type(norm).__qualname__}"
        kind = kind_of(norm)
        if kind is None or across and kind == "layer":
            return f"does not know the norm {name}" + " across heads" * across
        if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
            return f"hooks on the norm {name}"
        if kind != kind_of(first) or norm.eps != first.eps:
            return "norms of several kinds"
        if norm.eps is None:
            return f"the norm {name} has no eps"
        shape = tuple(norm.dim if kind == "rms_rounded" else norm.normalized_shape)
        if shape != (width,):
            return f"the norm {name} is over {shape}, not {(width,)}"
        bias = getattr(norm, "bias", None)
        if kind == "rms_rounded" and bias is not None:
            return f"the norm {name} has a bias"
        if (norm.weight is None, bias is None) != (first.weight is None, getattr(first, "bias", None) is None):
            return "norms with and without weights"
        for weight in (norm.weight, bias):
            if weight is None:
                continue
            if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device or not weight.is_contiguous():
                return f"weights of the norm {name} lie elsewhere or in another form"
            # torch's RMSNorm returns its input's dtype; with other weights diffusers' changes the dtype, LayerNorm fails.
            if weight.dtype != x.dtype and (
                kind != "rms" or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            ):
                return f"weights of the norm {name} are {weight.dtype}, projections {x.dtype}"
    return None


def _refuses_rope(prologue: Prologue, x: Tensor, streams: tuple[Stream, ...]) -> str | None:
    turned = [stream for stream in streams if stream.rope is not None]
    if not turned:
        return None
    if prologue.pairs is None:
        return "does not know the rotation"
    if len(turned) > 1:
        return "rotates in one stream only"
    (stream,) = turned
    span = _span(stream)
    if stream.k.shape[1] != stream.q.shape[1]:
        return "rotates q and k of one length only"
    for table in stream.rope:
        if table.dtype not in (torch.float32, torch.float16, torch.bfloat16) or table.device != x.device:
            return f"tables of the rotation are {table.dtype} on {table.device}"
        if (
            table.dtype != stream.rope[0].dtype
            or table.shape != stream.rope[0].shape
            or table.stride() != stream.rope[0].stride()
        ):
            return "cos and sin differ in form"
        if prologue.pairs == "repeated" and table.stride(-1) != 1:
            return "tables of the rotation have strides"
        tokens = table.shape[0] if table.ndim == 2 else table.shape[1]
        if tokens != len(span):
            return f"tables of {tokens} tokens for {len(span)}"
    if prologue.rope == "across_heads" and (stream.rope_span is not None or prologue.pairs != "repeated"):
        return "rotates across heads by repeated tables of all tokens only"
    if prologue.norm == "per_head" and prologue.rope == "across_heads" and stream.norm_q is not None:
        return "rotates before the norm"
    return None


def kind_of(norm: nn.Module | None) -> str | None:
    """How a kernel computes a norm: "none", "rms", "rms_rounded" (before the weight), "layer"; None for an unknown one."""
    if norm is None:
        return "none"
    return _KINDS.get((type(norm).__module__, type(norm).__qualname__))


def read(prologue: Prologue, heads: int, *streams: Stream) -> Raw:
    """What `refuses` has nothing against. Empties the streams."""
    head_dim = streams[0].q.shape[-1] // heads
    norm = streams[0].norm_q
    q = _operand([stream.q for stream in streams], head_dim, [stream.norm_q for stream in streams])
    k = _operand([stream.k for stream in streams], head_dim, [stream.norm_k for stream in streams])
    v = _operand([stream.v for stream in streams], head_dim, [None] * len(streams))
    tables, rope, rotation = (None, None), (0,) * 6, ()
    before = 0
    for stream in streams:
        if stream.rope is not None:
            tables = stream.rope
            rope = _rope(stream, before, head_dim)
            rounded = prologue.pairs == "halves" and tables[0].dtype == stream.q.dtype
            rotation = (prologue.pairs == "repeated", rounded)
        before += stream.q.shape[1]
        stream.q = stream.k = stream.v = None
    across = norm is not None and prologue.norm == "across_heads"
    form = _form(head_dim, heads * head_dim if across else 0, kind_of(norm), rope, rotation, q, k, v)
    return Raw(q, k, v, tables, rope, 0.0 if norm is None else norm.eps, form)


def finished(q: Tensor, k: Tensor, v: Tensor) -> Raw:
    """q, k, v [B, N, H, D] that need nothing more; elements of a head lie side by side."""
    operands = [
        Operand((x, *(None,) * 5), (x.shape[1], x.shape[1], *x.stride()[:2], 0, 0, x.stride(2))) for x in (q, k, v)
    ]
    rope = (0,) * 6
    return Raw(*operands, (None, None), rope, 0.0, _form(q.shape[-1], 0, "none", rope, (), *operands))


def _operand(parts: list[Tensor], head_dim: int, norms: list[nn.Module | None]) -> Operand:
    """Projections [B, N, C] of one stream or two."""
    parts = [x if x.stride(-1) == 1 else x.contiguous() for x in parts]
    first_len = parts[0].shape[1]
    tokens = sum(x.shape[1] for x in parts)
    strides = [x.stride()[:2] for x in parts]
    weights = [None if norm is None else norm.weight for norm in norms]
    biases = [None if norm is None else getattr(norm, "bias", None) for norm in norms]
    if len(parts) == 1:
        parts, weights, biases, strides = [*parts, None], [*weights, None], [*biases, None], [*strides, (0, 0)]
    return Operand((*parts, *weights, *biases), (tokens, first_len, *strides[0], *strides[1], head_dim))


def _span(stream: Stream) -> range:
    tokens = range(stream.q.shape[1])
    return tokens if stream.rope_span is None else tokens[stream.rope_span]


def _rope(stream: Stream, before: int, head_dim: int) -> tuple[int, ...]:
    """A Raw's rope; `before`: tokens of the streams before this one. A dimension of size 1 holds for all."""
    span, table = _span(stream), stream.rope[0]
    sizes, strides = table.shape, table.stride()
    if table.ndim == 2:  # [N, D]
        axes = (0, strides[0], 0)
    elif table.ndim == 3:  # [B, N, C]
        axes = (strides[0] if sizes[0] > 1 else 0, strides[1], head_dim)
    else:  # [B, N, H, D / 2]
        axes = (strides[0] if sizes[0] > 1 else 0, strides[1], strides[2] if sizes[2] > 1 else 0)
    return (before + span.start, before + span.stop, *axes, strides[-1])


@functools.lru_cache(maxsize=1024)
def _form_of(head_dim: int, channels: int, norm: str, rope, rotation, q, k, v, aligned: bool) -> Form:
    repeated, rounded = rotation or (False, False)
    turned = range(*rope[:2])
    return Form(
        D=head_dim,
        DP=1 << (head_dim - 1).bit_length(),
        C=channels,
        NORM=norm,
        ACROSS=channels > 0,
        ROTATE=len(rotation) > 0,
        SPANNED=len(rotation) > 0 and turned != range(q[0]),
        BY_HEAD=rope[4] > 0,
        REPEATED=repeated,
        ROUNDED=rounded,
        ALIGN=alignment(*q[2:], *k[2:], *v[2:]) if aligned else 1,
        ROPE_ALIGN=alignment(*rope[2:5]),
    )


def _form(head_dim: int, channels: int, norm: str, rope, rotation, q: Operand, k: Operand, v: Operand) -> Form:
    starts = [x for operand in (q, k, v) for x in operand.tensors[:2] if x is not None]
    return _form_of(head_dim, channels, norm, rope, rotation, q.numbers, k.numbers, v.numbers, aligned(*starts))
