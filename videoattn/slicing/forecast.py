"""How much memory a call will take: the model's twin runs it on the meta device, where tensors have sizes and no bytes.

What is counted is what is alive, operator by operator, on a copy of the module's structure with the same slices; what a GPU
adds to it are workspaces of convolutions and the allocator's rounding to 512 bytes. Attention makes its output and no more,
as every fused kernel does.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from videoattn.slicing.install import SlicedForward


@functools.cache
def _aliases(operator: torch._ops.OpOverload) -> bool:
    """Whether what it returns is memory that it was given: views, and what is done in place."""
    return any(each.alias_info is not None for each in operator._schema.returns)


class _Memory(TorchDispatchMode):
    """What is alive while it is on: `peak`, and the most within each of the windows that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.windows: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not _aliases(func):
            for made in (out,) if isinstance(out, Tensor) else out if isinstance(out, list | tuple) else ():
                if isinstance(made, Tensor):
                    self._made(made.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        weakref.finalize(storage, self._gone, size).atexit = False
        self.peak = max(self.peak, self.bytes)
        for window in self.windows:
            window[0] = max(window[0], self.bytes)

    def _gone(self, size: int) -> None:
        self.bytes -= size

    @contextmanager
    def window(self):
        """Yields a list whose one element is the most that was alive within."""
        opened = [self.bytes]
        self.windows.append(opened)
        try:
            yield opened
        finally:
            self.windows.remove(opened)


def twin(model: nn.Module) -> nn.Module:
    """The same modules on the meta device, with weights of the same types, as its class makes them of its config.

    Raises:
        TypeError: a model without a config, which nobody can make again.
    """
    if not hasattr(model, "config") or not hasattr(type(model), "from_config"):
        raise TypeError(f"memory: wanted a model of diffusers, with a config, got {type(model).__name__}")
    with torch.device("meta"):
        made = type(model).from_config(model.config).to("meta")  # buffers that are made of NumPy's arrays too
    dtypes = {name: x.dtype for name, x in model.named_parameters()} | {
        name: x.dtype for name, x in model.named_buffers()
    }
    usual = next(model.parameters()).dtype
    for name, x in [*made.named_parameters(), *made.named_buffers()]:
        x.data = torch.empty(x.shape, dtype=dtypes.get(name, usual), device="meta")
    for name, value in vars(model).items():  # switches that were set since: tiling
        if isinstance(value, bool | int | float) and hasattr(made, name):
            setattr(made, name, value)
    return made.eval().requires_grad_(False)


def on_meta(arguments: object) -> object:
    """The same arguments with tensors that have no bytes."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, arguments)


@torch.no_grad()
def peak(call: Callable[[], object], sites: Iterable[SlicedForward] = ()) -> tuple[int, dict[str, int]]:
    """The most that is alive of what a call makes, in bytes, and name of a site -> the most while it runs."""
    from videoattn.profiling.rehearsal import OnMeta

    memory, most = _Memory(), defaultdict(int)

    @contextmanager
    def window(name: str):
        with memory.window() as opened:
            yield
        most[name] = max(most[name], opened[0])

    for site in sites:
        site.around = functools.partial(window, site.name)
    with OnMeta(), memory:
        call()
    return memory.peak, dict(most)
