"""How much memory a call will take: the model's twin runs it on the meta device, where tensors have sizes and no bytes.

What is counted is what is alive, operator by operator, on a copy of the module's structure with the same slices, and what
convolutions of a GPU take beside it: cuDNN's kernels want channels last, and where a convolution's tensors are not, it holds its
input, its output and its weight a second time while it runs (measured on an H200 in fp16, bf16 and fp32, two and three
dimensions; 1 x 1 takes nothing). Where input or weight has channels last, so has the output, and what has not is copied.
Attention makes its output and no more, as every fused kernel does. What is left out is the allocator's rounding.

Of slices that are alike two run.
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

from videoattn.pipelines.processor import FastProcessor
from videoattn.prologue import Prologue, Stream
from videoattn.slicing.install import SlicedForward

Place = tuple[str, str | None]
"""Name of a site, and of one of its groups, or None for all of it."""


@functools.cache
def _aliases(operator: torch._ops.OpOverload) -> bool:
    """Whether what it returns is memory that it was given: views, and what is done in place."""
    return any(each.alias_info is not None for each in operator._schema.returns)


class _Memory(TorchDispatchMode):
    """What is alive while it is on: `peak`, and the most within each of the windows that are open.

    Args:
        workspaces: whether convolutions take some, as on a GPU.
    """

    def __init__(self, workspaces: bool) -> None:
        super().__init__()
        self.workspaces = workspaces
        self.bytes = self.peak = 0
        self.windows: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        convolves = self.workspaces and func is torch.ops.aten.convolution.default
        if convolves and any(map(_channels_last, args[:2])):
            out = out.contiguous(memory_format=CHANNELS_LAST[out.ndim])
        if not _aliases(func):
            for made in (out,) if isinstance(out, Tensor) else out if isinstance(out, list | tuple) else ():
                if isinstance(made, Tensor):
                    self._made(made.untyped_storage())
        if convolves:
            self._seen(self.bytes + _workspace(args[0], args[1], out))
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        weakref.finalize(storage, self._gone, size).atexit = False
        self._seen(self.bytes)

    def _seen(self, size: int) -> None:
        self.peak = max(self.peak, size)
        for window in self.windows:
            window[0] = max(window[0], size)

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
            self.windows.pop()


INDEXED = 2**31  # elements that cuDNN's kernels can count: of more, torch runs some rows of the batch at a time


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_last(x: Tensor) -> bool:
    """Of a convolution's input or weight, by its strides, as torch asks: cuDNN's output is then too, the meta device's is not."""
    return x.ndim in CHANNELS_LAST and x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def _workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Bytes that a convolution holds beside its input and its output, of a GPU."""
    if x.ndim not in CHANNELS_LAST:
        return 0
    if _channels_last(x) or _channels_last(weight):
        return sum(each.nbytes for each in (x, weight) if not each.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]))
    copied = 0 if x.is_contiguous() else x.nbytes
    largest = max(x.numel(), out.numel())
    if largest < INDEXED and weight[0, 0].numel() == 1:
        return copied
    rows = len(x) if largest < INDEXED else max(1, INDEXED // (largest // len(x)))
    return (x.nbytes + out.nbytes) * rows // len(x) + weight.nbytes + copied


def twin(model: nn.Module) -> nn.Module:
    """The same modules on the meta device, with weights of the same types and layouts, as its class makes them of its config.

    Raises:
        TypeError: a model without a config, which nobody can make again.
    """
    if not hasattr(model, "config") or not hasattr(type(model), "from_config"):
        raise TypeError(f"memory: wanted a model of diffusers, with a config, got {type(model).__name__}")
    with torch.device("meta"):
        made = type(model).from_config(model.config).to("meta")  # buffers that are made of NumPy's arrays too
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    usual = next(model.parameters()).dtype
    for name, x in [*made.named_parameters(), *made.named_buffers()]:
        like = known.get(name)
        strides = x.stride() if like is None or like.shape != x.shape else like.stride()  # channels last
        dtype = usual if like is None else like.dtype
        x.data = torch.empty_strided(x.shape, strides, dtype=dtype, device="meta")
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, FastProcessor):  # its session may come to bind it after this
            made.get_submodule(name).processor = _attending(processor)
    for name, value in vars(model).items():  # switches that were set since: tiling
        if isinstance(value, bool | int | float) and hasattr(made, name):
            setattr(made, name, value)
    return made.eval().requires_grad_(False)


class _Attends:
    """A runner that attends to nothing, and makes what ours make: norm and rotation are one pass, from q and k to q and k."""

    def __init__(self, sparse: bool) -> None:
        self.sparse = sparse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask=None, kv_len=None, scale=None) -> Tensor:
        return q.new_empty(q.shape)

    def attend(self, prologue: Prologue, heads: int, *streams: Stream, kv_len: Tensor | None = None) -> Tensor:
        q, k, v = self._finished(prologue, heads, streams)
        return self(q, k, v)

    @staticmethod
    def _finished(prologue: Prologue, heads: int, streams: tuple[Stream, ...]) -> tuple[Tensor, Tensor, Tensor]:
        for stream in streams:
            if any(each is not None for each in (stream.norm_q, stream.norm_k, stream.rope)):
                # both are made while the raw ones still stand
                stream.q, stream.k = (x.new_empty(x.shape) for x in (stream.q, stream.k))
            stream.norm_q = stream.norm_k = stream.rope = None
        return prologue(heads, *streams)


def _attending(processor: FastProcessor) -> FastProcessor:
    """The same kind, for a twin."""
    made = type(processor)(processor.host)
    made.bind(_Attends(processor.run is not None and processor.run.sparse))
    return made


def on_meta(arguments: object) -> object:
    """The same arguments with tensors that have no bytes."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, arguments)


@torch.no_grad()
def peak(
    call: Callable[[], object], sites: Iterable[SlicedForward] = (), *, workspaces: bool = False
) -> tuple[int, dict[Place, int]]:
    """The most that is alive of what a call makes, in bytes, and the most while a site, or one of its groups, runs.

    Args:
        workspaces: whether convolutions take some, as on a GPU.
    """
    from videoattn.profiling.rehearsal import OnMeta

    memory, most = _Memory(workspaces), defaultdict(int)

    @contextmanager
    def window(name: str, group: str | None = None):
        with memory.window() as opened:
            yield
        most[name, group] = max(most[name, group], opened[0])

    for site in sites:
        site.around = functools.partial(window, site.name)
        site.groups.around = functools.partial(window, site.name)
    with OnMeta(), memory:
        call()
    return memory.peak, dict(most)
