"""What one operator costs, by its arguments' shapes alone: FLOPs, bytes, elements. Nothing is read, so fake tensors do.

FLOPs are those of `torch.utils.flop_counter`, 2 for a multiply-add, with formulas for what its registry lacks.

Bytes are inputs read once and outputs written once:

- a view moves nothing, an allocation moves nothing;
- an expanded tensor is as large as the memory behind it, and one that is given twice is read once;
- an operator in place reads and writes its first argument, one that overwrites it (`copy_`, `out=`) only writes;
- a look-up (`embedding`) reads the rows that it takes, and a scatter writes what it is given, not whole tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from videoattn.profiling.categories import SDPA_BACKENDS, bare, operator_of

Operator = Any
"""An `OpOverload`, or a higher-order operator, which has no schema."""


class Traffic(NamedTuple):
    """Bytes read and written, and elements written."""

    read: int
    written: int
    elements: int


NOTHING = Traffic(0, 0, 0)

_ALLOCATES = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("resize_", "set_", "record_stream"),
}
_OVERWRITES = {
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"),
    "_foreach_copy_",
}
_LOOKS_UP = {"embedding", "index_select", "index", "gather", "take", "masked_select"}
_SCATTERS = {
    *("index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "index_add_"),
    *("scatter_", "scatter_add_", "masked_scatter_"),
}
_READS_ONLY = {"_local_scalar_dense", "equal"}
_PURE_LAYOUT = ("layout", "transfer")


class _Argument(NamedTuple):
    index: int
    name: str
    written: bool
    read: bool


class Signature(NamedTuple):
    """What is known of an operator before it is called.

    Args:
        name: bare, as `categories` has it.
        arguments: those that may hold tensors; empty for a higher-order operator.
        pointwise: whether elements that it writes are operations: it has no FLOP formula and does not only move data.
    """

    name: str
    arguments: tuple[_Argument, ...]
    pointwise: bool


@functools.cache
def signature(func: Operator) -> Signature:
    name = _name(func)
    if not isinstance(func, OpOverload):
        return Signature(name, (), False)
    arguments = []
    for index, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or not (argument.kwarg_only or name in _OVERWRITES)
        if "Tensor" in str(argument.type):
            arguments.append(_Argument(index, argument.name, written, read))
    moves = operator_of(name, "", "") in _PURE_LAYOUT
    has_formula = func._overloadpacket in flop_registry or name in _FORMULAS
    return Signature(name, tuple(arguments), not moves and not has_formula)


@functools.cache
def is_composite(func: Operator) -> bool:
    """Whether torch writes the operator out in others, which a dispatch mode sees whole in inference mode only."""
    if not isinstance(func, OpOverload) or func.namespace == "prim":  # which no dispatcher knows
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _name(func: Operator) -> str:
    return bare(func._schema.name) if isinstance(func, OpOverload) else func.name()


def flops(func: Operator, args: Sequence, kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of a call; 0 where there is no formula."""
    own = _FORMULAS.get(signature(func).name)
    if own is not None:
        return own(*args)
    torchs = flop_registry.get(getattr(func, "_overloadpacket", func))
    return torchs(*args, **kwargs, out_val=out) if torchs is not None else 0


def traffic(func: Operator, args: Sequence, kwargs: Mapping[str, Any], out: Any) -> Traffic:
    """What a call reads and writes."""
    known = signature(func)
    if known.name in _ALLOCATES:
        return NOTHING
    given: list[tuple[Tensor, _Argument | None]] = []
    if known.arguments:
        for argument in known.arguments:
            value = args[argument.index] if argument.index < len(args) else kwargs.get(argument.name)
            given += [(tensor, argument) for tensor in tensors(value)]
    else:
        given = [(tensor, None) for tensor in tensors((args, dict(kwargs)))]
    made = list(tensors(out))
    if not made and known.name not in _READS_ONLY:
        return NOTHING
    storages = {storage_key(tensor) for tensor, _ in given}
    new = [tensor for tensor in made if storage_key(tensor) not in storages]
    overwritten = [tensor for tensor, argument in given if argument is not None and argument.written]
    if not new and not overwritten and known.name not in _READS_ONLY:
        return NOTHING  # a view
    read = [tensor for tensor, argument in given if argument is None or argument.read]
    if known.name in _SCATTERS and read:
        read = read[1:]
        overwritten = read[-1:]
    if known.name in _LOOKS_UP and read and new:
        whole, rest = read[0], read[1:]
        taken = min(nbytes(whole), sum(map(nbytes, new)))
        return Traffic(taken + _total(rest), _total(new), sum(tensor.numel() for tensor in new))
    written = new + overwritten
    return Traffic(_total(read), _total(written), sum(nbytes(x) // x.element_size() for x in written))


def crosses(args: Sequence, out: Any) -> bool:
    """Whether a copy goes from one device to another; "meta" is none."""
    return len({tensor.device.type for tensor in tensors([args, out])} - {"meta"}) > 1


def nbytes(tensor: Tensor) -> int:
    """Bytes of the memory that a tensor covers: a dimension along which it repeats itself counts once."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    covered = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return min(covered * tensor.element_size(), tensor.untyped_storage().nbytes())


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them lives."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _total(parts: list[Tensor]) -> int:
    seen = {}
    for tensor in parts:
        offset = tensor.storage_offset() if tensor.layout is torch.strided else 0
        seen[storage_key(tensor), offset, tensor.numel()] = nbytes(tensor)
    return sum(seen.values())


def _product(a: Tensor, b: Tensor, *_: Any) -> int:
    """[..., M, K] x [K, N]."""
    return 2 * a.numel() * b.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    """[B, H, Nq, D] x [B, Hkv, Nk, D] and the weights x [B, Hkv, Nk, Dv], Hkv a divisor of H."""
    return 2 * q.shape[:3].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


_FORMULAS = {  # what torch's registry lacks, or refuses in some of its versions: heads that share keys
    **{name: _attention for name in SDPA_BACKENDS},
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_int_mm": _product,
    "_addmm_activation": lambda bias, a, b, *_: _product(a, b),
    "_weight_int8pack_mm": lambda a, b, *_: 2 * a.numel() * b.shape[0],
    "mkldnn_linear": lambda a, b, *_: 2 * a.numel() * b.shape[0],
    "mv": lambda a, b: 2 * a.numel(),
    "addmv": lambda bias, a, b, *_: 2 * a.numel(),
    "dot": lambda a, b: 2 * a.numel(),
}
