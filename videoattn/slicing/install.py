"""A forward of ours in a module's place, and back: below the hooks that offloading puts around it, whichever came first.

Offloading keeps the forward that it found and calls it between moving weights in and out: accelerate in `_old_forward`,
diffusers' hook registry in its innermost reference. There ours goes, and from there it is taken, so that weights come and go
once a call and not once a slice.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn

from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups


class SlicedForward:
    """The forward of one module, slice by slice.

    Args:
        name: of the module, from its root. kind: of its class.
    """

    def __init__(self, name: str, module: nn.Module, kind: Sliced) -> None:
        self.name = name
        self.module = module
        self.kind = kind
        self.groups = Groups(*kind.groups)
        self.active = False
        self.around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # of a forecast
        self.__signature__ = inspect.signature(self.own)  # hosts and hooks ask for it

    @property
    def own(self) -> types.MethodType:
        """What the module's class does."""
        return types.MethodType(getattr(type(self.module), self.kind.method), self.module)

    @property
    def cut(self) -> bool:
        return self.active and any(count > 1 for count in self.groups.counts.values())

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # a compiler plans the memory of its graph itself
            return getattr(type(self.module), self.kind.method)(self.module, *args, **kwargs)
        with self.around():
            if not self.cut:
                return self.own(*args, **kwargs)
            return self.kind.forward(self.module, self.groups, *args, **kwargs)

    def install(self) -> None:
        if self.kind.method == "forward":
            _replace(self.module, self)
        else:  # no hook stands around it
            setattr(self.module, self.kind.method, self)
        self.active = True

    def remove(self) -> None:
        """Nothing of it is left, but where a wrapper that is not known holds it: there it passes on."""
        self.active = False
        module, method = self.module, self.kind.method
        if module.__dict__.get(method) is self:
            delattr(module, method)
        elif method == "forward":
            _replace(module, self.own, instead_of=self)


def _replace(module: nn.Module, forward: object, instead_of: object = None) -> None:
    """Put a forward where the module's own is called; with `instead_of`, only in its place."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    if hasattr(module, "_old_forward"):
        place, name = module, "_old_forward"
    elif references:
        place = references[0]  # which keeps two where its hook has a forward of its own
        name = "forward" if place.original_forward is None else "original_forward"
    elif instead_of is None:
        place, name = module, "forward"
    else:
        return
    if instead_of is None or getattr(place, name) is instead_of:
        setattr(place, name, forward)
