"""How much memory a call will take: the model's twin runs it on the meta device, where tensors have sizes and no bytes.

What is counted is what is alive, operator by operator, on a copy of the module's structure with the same slices; what a GPU
adds to it are workspaces of convolutions and the allocator's rounding to 512 bytes. Attention makes its output and no more,
as every fused kernel does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from videoattn.profiling.alive import Alive
from videoattn.slicing.install import SlicedForward


class _Memory(TorchDispatchMode):
    """What is alive while it is on: `peak`, and the most within each of the windows that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = Alive()
        self.windows: list[list[int]] = []

    @property
    def peak(self) -> int:
        return self.alive.peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive.see((args, kwargs), out, "")
        for window in self.windows:
            window[0] = max(window[0], self.alive.bytes)
        return out

    @contextmanager
    def window(self):
        """Yields a list whose one element is the most that was alive within."""
        opened = [self.alive.bytes]
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
        made = type(model).from_config(model.config)
    dtypes = {name: x.dtype for name, x in model.named_parameters()} | {
        name: x.dtype for name, x in model.named_buffers()
    }
    usual = next(model.parameters()).dtype
    for name, x in [*made.named_parameters(), *made.named_buffers()]:
        x.data = torch.empty(x.shape, dtype=dtypes.get(name, usual), device="meta")
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
        site.around = partial(window, site.name)
    with OnMeta(), memory:
        call()
    return memory.peak, dict(most)
