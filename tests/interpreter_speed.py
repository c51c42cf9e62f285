"""Triton's interpreter without what takes most of its time: import it before kernels are tested.

Nothing that is computed changes. On its own it puts its language in the place of Triton's anew for every call of a function
within a kernel, `tl.sum` too; makes a table of all types, and the constants of a shape, for each number; and computes
whether integers overflow, seven numbers for each sum, of which it tells only when it debugs.
"""

import dataclasses
import functools

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_block_type = tl.block_type.__init__
_namespaces: set[int] = set()  # whose language was replaced in this launch
_shapes: dict[tuple[int, ...], tuple] = {}  # what is made of each
_SCALAR = tl.tuple([]), tl.constexpr(1)


class _Done:
    def restore(self) -> None:
        pass


def _replace_language(fn):
    """Once for each namespace of a launch, as long as that runs."""
    if id(fn.__globals__) in _namespaces:
        return _Done()
    first = not _namespaces
    scope = _patch_lang(fn)
    _namespaces.add(id(fn.__globals__))
    if first:
        restore = scope.restore

        def end() -> None:
            _namespaces.clear()
            restore()

        scope.restore = end
    return scope


@functools.cache
def _of_name(name: str) -> np.dtype:
    return _get_np_dtype(tl.dtype(name))


def _np_dtype(of) -> np.dtype:
    scalar = of.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _of_name(scalar.name)


def _make_block_type(self, element_ty, shape) -> None:
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if sizes not in _shapes:
        _block_type(self, element_ty, shape)
        constants = tl.tuple([tl.constexpr(size) for size in sizes])
        _shapes[sizes] = self.shape, self.numel, str(self.shape), constants, tl.constexpr(self.numel)
    self.element_ty = element_ty
    self.shape, self.numel, name, self.constants, self.constant_numel = _shapes[sizes]
    self.name = f"<{name}, {element_ty}>"


def _make_tensor(self, handle, type) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = (type.constants, type.constant_numel) if type.is_block() else _SCALAR


def _same_dtype(self, other) -> bool:
    if isinstance(other, tl.constexpr):
        other = other.value
    return other is self or isinstance(other, tl.dtype) and self.name == other.name


if triton.knobs.runtime.interpret:  # the compiler's own language is left alone
    interpreter._patch_lang = _replace_language
    interpreter._get_np_dtype = _np_dtype
    tl.block_type.__init__ = _make_block_type
    tl.tensor.__init__ = _make_tensor
    tl.dtype.__eq__ = _same_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
