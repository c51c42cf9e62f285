"""What a fused kernel must know of a Prologue and its Streams: where the tokens lie, which norm, which tables.

A Prologue calls the host's norms and rotation; a kernel reads weights and tables instead. `refuses` says where reading is
not the same as calling: hooks, other classes, weights that lie elsewhere or in another dtype. Hooks that only observe (a
profiler's, which carry `observes = True`) do not count: what they watch must be what runs without them.

All that shapes, strides and types decide is found out once and looked up by them (`Layout`); hooks and weights are looked
at in every call, for both may change between calls.

Letters: B batch, N tokens, H heads, D head_dim, C = H D.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from videoattn.kernels.prologue_device import Form
from videoattn.kernels.tiles import alignment
from videoattn.kernels.triton_backend import aligned, unit_stride
from videoattn.prologue import Prologue, Stream

HEAD_DIMS = range(16, 257, 8)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = {
    ("torch.nn.modules.normalization", "RMSNorm"): "rms",
    ("torch.nn.modules.normalization", "LayerNorm"): "layer",
    ("diffusers.models.normalization", "RMSNorm"): "rms_rounded",
}


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """What follows from shapes, strides and types alone; the same object for all calls of a kind, which plans go by.

    Args:
        reason: why a kernel cannot do it, or None; then the rest is there.
        q, k, v: tokens of both streams, tokens of the first, strides (b, n) of the first and of the second, stride of h.
        rope: first and last token turned, strides b, n, h and from pair to pair.
        turned: which stream turns, or None.
        copied: whether elements of a projection do not lie side by side.
    """

    reason: str | None = None
    q: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    v: tuple[int, ...] = ()
    rope: tuple[int, ...] = (0,) * 6
    turned: int | None = None
    eps: float = 0.0
    form: Form | None = None
    copied: bool = False


class Raw(NamedTuple):
    """What a launch needs; None where there is none.

    q, k: x of the two streams, norm weights of both, norm biases of both; v: x of both; tables: cos and sin.
    """

    q: tuple[Tensor | None, ...]
    k: tuple[Tensor | None, ...]
    v: tuple[Tensor | None, ...]
    tables: tuple[Tensor | None, Tensor | None]
    layout: Layout


class _Tensor(NamedTuple):
    """What a layout may know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Norm(NamedTuple):
    """What a layout may know of a norm."""

    cls: type
    eps: float | None
    shape: tuple[int, ...] | None
    weight: bool
    bias: bool

    @property
    def name(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def kind(self) -> str | None:
        return _KINDS.get((self.cls.__module__, self.cls.__qualname__))


class _Part(NamedTuple):
    """What a layout may know of a stream."""

    q: _Tensor
    k: _Tensor
    v: _Tensor
    norms: tuple[_Norm | None, _Norm | None]
    tables: tuple[_Tensor, _Tensor] | None
    span: tuple[int | None, int | None, int | None] | None

    @classmethod
    def of(cls, q: tuple, k: tuple, v: tuple, norm_q: tuple | None, norm_k: tuple | None, tables, span) -> _Part:
        norms = tuple(None if norm is None else _Norm(*norm) for norm in (norm_q, norm_k))
        tables = None if tables is None else tuple(_Tensor(*table) for table in tables)
        return cls(_Tensor(*q), _Tensor(*k), _Tensor(*v), norms, tables, span)

    @property
    def turned(self) -> range:
        tokens = range(self.q.shape[1])
        return tokens if self.span is None else tokens[slice(*self.span)]


def refuses(prologue: Prologue, heads: int, *streams: Stream) -> str | None:
    """Why a kernel cannot stand in for `prologue(heads, *streams)`, or None. Reads no values."""
    reason = _layout_of(prologue, heads, streams).reason
    return _changed(streams) if reason is None else reason


def _changed(streams: Sequence[Stream]) -> str | None:
    """What hooks and weights have against it, which may have come or moved since the last call."""
    global_hooks = torch_module._has_any_global_hook()
    if len(streams) == 2:
        for a, b in ((streams[0].norm_q, streams[1].norm_q), (streams[0].norm_k, streams[1].norm_k)):
            if a is not None and b is not None and _dtypes(a) != _dtypes(b):
                return "weights of the streams' norms differ in dtype"
    for stream in streams:
        x = stream.q
        for norm in (stream.norm_q, stream.norm_k):
            if norm is None:
                continue
            own = norm.__dict__
            hooks, before = own["_forward_hooks"], own["_forward_pre_hooks"]
            if global_hooks:
                return "hooks on all modules"
            if (hooks or before) and not all(map(_observes, (*hooks.values(), *before.values()))) or "forward" in own:
                return f"hooks on the norm {_name(norm)}"
            for weight in (_own(own, "weight"), _own(own, "bias")):
                if weight is not None and (type(weight) is not nn.Parameter or weight.dtype is not x.dtype):
                    # torch's RMSNorm returns its input's dtype; with other weights diffusers' changes it, LayerNorm fails.
                    if type(weight) not in (nn.Parameter, Tensor):
                        return f"weights of the norm {_name(norm)} are {type(weight).__name__}"
                    if weight.dtype != x.dtype and (type(norm) is not nn.RMSNorm or weight.dtype not in _FLOATS):
                        return f"weights of the norm {_name(norm)} are {weight.dtype}, projections {x.dtype}"
                if weight is not None and not (weight.device == x.device and weight.is_contiguous()):
                    return f"weights of the norm {_name(norm)} lie elsewhere or in another form"
    return None


def _dtypes(norm: nn.Module) -> tuple[torch.dtype | None, ...]:
    weights = (_own(norm.__dict__, name) for name in ("weight", "bias"))
    return tuple(None if weight is None else weight.dtype for weight in weights)


def _observes(hook: object) -> bool:
    return getattr(hook, "observes", False)


def _name(norm: nn.Module) -> str:
    return f"{type(norm).__module__}.{type(norm).__qualname__}"


def _own(own: dict[str, object], name: str) -> Tensor | None:
    """A weight of a module, from its __dict__: a module's own look-up takes longer than all the rest."""
    parameters = own["_parameters"]
    return parameters[name] if name in parameters else own.get(name)


def _layout_of(prologue: Prologue, heads: int, streams: Sequence[Stream]) -> Layout:
    of_all = (prologue.norm, prologue.rope, prologue.pairs, heads)
    return _layout(of_all, *[_facts(stream) for stream in streams])


def _facts(stream: Stream) -> tuple:
    """All that a layout may know of a stream, as fast as Python can tell it: a `_Part` after the first, its alignment."""
    q, k, v, rope, span = stream.q, stream.k, stream.v, stream.rope, stream.rope_span
    if rope is not None:
        cos, sin = rope
        rope = (
            (cos.shape, cos.stride(), cos.dtype, cos.device),
            (sin.shape, sin.stride(), sin.dtype, sin.device),
        )
    return (
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == 0,
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        _norm(stream.norm_q),
        _norm(stream.norm_k),
        rope,
        span if span is None else (span.start, span.stop, span.step),
    )


def _norm(norm: nn.Module | None) -> tuple | None:
    """The fields of a `_Norm`."""
    if norm is None:
        return None
    get = norm.__dict__.get
    weights = get("_parameters")
    return (
        type(norm),
        get("eps"),
        get("normalized_shape") or get("dim"),
        (weights["weight"] if "weight" in weights else get("weight")) is not None,
        (weights["bias"] if "bias" in weights else get("bias")) is not None,
    )


@functools.lru_cache(maxsize=4096)
def _layout(of_all: tuple, *facts: tuple) -> Layout:
    norm_sees, rope_sees, pairs, heads = of_all
    is_aligned, parts = all(of_one[0] for of_one in facts), [_Part.of(*of_one[1:]) for of_one in facts]
    x = parts[0].q
    head_dim = x.shape[-1] // heads
    reason = (
        _refuses_projections(x, head_dim, parts)
        or _refuses_norms(norm_sees, x, head_dim, parts)
        or _refuses_rope(norm_sees, rope_sees, pairs, x, parts)
    )
    if reason is not None:
        return Layout(reason)
    q, k, v = (_numbers([getattr(part, name) for part in parts], head_dim) for name in "qkv")
    norm = parts[0].norms[0]
    across = norm is not None and norm_sees == "across_heads"
    rope, rotation, turned, before = Layout().rope, (), None, 0
    for place, part in enumerate(parts):
        if part.tables is not None:
            rope, turned = _rope(part, before, head_dim), place
            rounded = pairs == "halves" and part.tables[0].dtype == x.dtype
            rotation = (pairs == "repeated", rounded)
        before += part.q.shape[1]
    norm_kind = "none" if norm is None else norm.kind
    form = _form(head_dim, heads * head_dim if across else 0, norm_kind, rope, rotation, q, k, v, is_aligned)
    copied = any(y.strides[-1] != 1 for part in parts for y in part[:3])
    return Layout(None, q, k, v, rope, turned, 0.0 if norm is None else norm.eps, form, copied)


def _refuses_projections(x: _Tensor, head_dim: int, parts: Sequence[_Part]) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {x.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"takes head_dim 16 to 256 in steps of 8, got {head_dim}"
    if len(parts) > 2:
        return f"takes one stream or two, got {len(parts)}"
    for part in parts:
        for y in part[:3]:
            if y.dtype != x.dtype or y.device != x.device:
                return f"projections are {y.dtype} on {y.device} and {x.dtype} on {x.device}"
    return None


def _refuses_norms(sees: str, x: _Tensor, head_dim: int, parts: Sequence[_Part]) -> str | None:
    across = sees == "across_heads"
    width = x.shape[-1] if across else head_dim
    norms = [norm for part in parts for norm in part.norms]
    if all(norm is None for norm in norms):
        return None
    if any(norm is None for norm in norms):
        return "only some of q and k have a norm"
    first = norms[0]
    for norm in norms:
        if norm.kind is None or across and norm.kind == "layer":
            return f"does not know the norm {norm.name}" + " across heads" * across
        if norm.kind != first.kind or norm.eps != first.eps:
            return "norms of several kinds"
        if norm.eps is None:
            return f"the norm {norm.name} has no eps"
        if norm.shape != (width,):
            return f"the norm {norm.name} is over {tuple(norm.shape)}, not {(width,)}"
        if norm.kind == "rms_rounded" and norm.bias:
            return f"the norm {norm.name} has a bias"
        if (norm.weight, norm.bias) != (first.weight, first.bias):
            return "norms with and without weights"
    return None


def _refuses_rope(norm_sees: str, rope_sees: str, pairs: str | None, x: _Tensor, parts: Sequence[_Part]) -> str | None:
    turned = [part for part in parts if part.tables is not None]
    if not turned:
        return None
    if pairs is None:
        return "does not know the rotation"
    if len(turned) > 1:
        return "rotates in one stream only"
    if any(part.k.shape[1] != part.q.shape[1] for part in parts):
        return "rotates q and k of one length only"
    (part,) = turned
    if part.turned.step != 1:
        return "rotates neighbouring tokens only"
    for table in part.tables:
        if table.dtype not in _FLOATS or table.device != x.device:
            return f"tables of the rotation are {table.dtype} on {table.device}"
        if table != part.tables[0]:
            return "cos and sin differ in form"
        if pairs == "repeated" and table.strides[-1] != 1:
            return "tables of the rotation have strides"
        tokens = table.shape[0] if len(table.shape) == 2 else table.shape[1]
        if tokens != len(part.turned):
            return f"tables of {tokens} tokens for {len(part.turned)}"
    by_token = len(part.tables[0].shape) == 2
    if rope_sees == "across_heads" and (part.span is not None or pairs != "repeated" or by_token):
        return "rotates across heads by repeated tables of all tokens only"
    if norm_sees == "per_head" and rope_sees == "across_heads" and part.norms[0] is not None:
        return "rotates before the norm"
    return None


def _numbers(tensors: Sequence[_Tensor], head_dim: int) -> tuple[int, ...]:
    """A Layout's of projections [B, N, C] of one stream or two."""
    strides = [x.strides[:2] for x in tensors]
    tokens = [x.shape[1] for x in tensors]
    return (sum(tokens), tokens[0], *strides[0], *(strides[1] if len(strides) > 1 else (0, 0)), head_dim)


def _rope(part: _Part, before: int, head_dim: int) -> tuple[int, ...]:
    """A Layout's; `before`: tokens of the streams before this one. A dimension of size 1 holds for all."""
    sizes, strides = part.tables[0].shape, part.tables[0].strides
    if len(sizes) == 2:  # [N, D]
        axes = (0, strides[0], 0)
    elif len(sizes) == 3:  # [B, N, C]
        axes = (strides[0] if sizes[0] > 1 else 0, strides[1], head_dim)
    else:  # [B, N, H, D / 2]
        axes = (strides[0] if sizes[0] > 1 else 0, strides[1], strides[2] if sizes[2] > 1 else 0)
    return (before + part.turned.start, before + part.turned.stop, *axes, strides[-1])


def _form(head_dim: int, channels: int, norm: str, rope, rotation, q, k, v, is_aligned: bool) -> Form:
    repeated, rounded = rotation or (False, False)
    return Form(
        D=head_dim,
        DP=1 << (head_dim - 1).bit_length(),
        C=channels,
        NORM=norm,
        ACROSS=channels > 0,
        ROTATE=len(rotation) > 0,
        SPANNED=len(rotation) > 0 and range(*rope[:2]) != range(q[0]),
        BY_HEAD=rope[4] > 0,
        REPEATED=repeated,
        ROUNDED=rounded,
        ALIGN=alignment(*q[2:], *k[2:], *v[2:]) if is_aligned else 1,
        ROPE_ALIGN=alignment(*rope[2:5]),
    )


def read(prologue: Prologue, heads: int, *streams: Stream) -> Raw:
    """What `refuses` has nothing against. Empties the streams."""
    layout = _layout_of(prologue, heads, streams)
    if layout.copied:
        for stream in streams:
            stream.q, stream.k, stream.v = map(unit_stride, (stream.q, stream.k, stream.v))
        layout = _layout_of(prologue, heads, streams)
    first = streams[0]
    if len(streams) == 1:
        q, k, v = (
            (first.q, None, *_weights(first.norm_q, None)),
            (first.k, None, *_weights(first.norm_k, None)),
            (first.v, None),
        )
    else:
        other = streams[1]
        q, k, v = (
            (first.q, other.q, *_weights(first.norm_q, other.norm_q)),
            (first.k, other.k, *_weights(first.norm_k, other.norm_k)),
            (first.v, other.v),
        )
    tables = (None, None) if layout.turned is None else streams[layout.turned].rope
    for stream in streams:
        stream.q = stream.k = stream.v = None
    return Raw(q, k, v, tables, layout)


def _weights(norm: nn.Module | None, other: nn.Module | None) -> tuple[Tensor | None, ...]:
    """Weights of both, biases of both."""
    if norm is None:
        return (None,) * 4
    own, others = norm.__dict__, (other or norm).__dict__
    second = (None, None) if other is None else (_own(others, "weight"), _own(others, "bias"))
    return _own(own, "weight"), second[0], _own(own, "bias"), second[1]


def finished(q: Tensor, k: Tensor, v: Tensor) -> Raw:
    """q, k, v [B, N, H, D] that need nothing more; elements of a head lie side by side."""
    layout = _finished(q.shape[1], k.shape[1], q.shape[3], q.stride(), k.stride(), v.stride(), aligned(q, k, v))
    return Raw((q, *(None,) * 5), (k, *(None,) * 5), (v, None), (None, None), layout)


@functools.lru_cache(maxsize=4096)
def _finished(q_len: int, kv_len: int, head_dim: int, q_strides, k_strides, v_strides, is_aligned: bool) -> Layout:
    q, k, v = (
        (tokens, tokens, *strides[:2], 0, 0, strides[2])
        for tokens, strides in ((q_len, q_strides), (kv_len, k_strides), (kv_len, v_strides))
    )
    rope = Layout().rope
    return Layout(None, q, k, v, rope, form=_form(head_dim, 0, "none", rope, (), q, k, v, is_aligned))
