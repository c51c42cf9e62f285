"""What the Triton kernels share: where they run, how a plan calls them, and the numbers that every launch needs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from videoattn.backend import Run
from videoattn.call import Call
from videoattn.policy import EXACT, Decision

if TYPE_CHECKING:
    from triton import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = math.log2(math.e)
TUNED_WITH = "3.6.0"  # the Triton that the tile sizes, warps and stages of our kernels were measured with


class Attend(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, kv_len: Tensor | None, flag: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The primitive under all attention: q, k, v [B, N, H, D] with any strides -> out, and lse or None.

        A kernel that does not refuse them also takes `mask` and `causal`.
        """


class Tile(NamedTuple):
    """How a kernel cuts a call: queries and keys of a tile, and the warps of the program that works on it."""

    block_m: int
    block_n: int
    warps: int


class TritonBackend:
    """A kernel of ours that computes one decision: fp16, bf16 or fp32 on NVIDIA cards from compute capability 8.0.

    Args:
        name: the backend's name.
        attend: the kernel's launcher.
        refuses: the kernel's own limits: (call) -> reason or None.
        tile: how the launcher cuts a call; None for one that does not say.
        decision: what it computes.
    """

    own = True

    def __init__(
        self,
        name: str,
        attend: Attend,
        refuses: Callable[[Call], str | None],
        tile: Callable[[Call], Tile | None] = lambda call: None,
        decision: Decision = EXACT,
    ) -> None:
        self.name = name
        self.attend = attend
        self.tile = tile
        self.decision = decision
        self._refuses = refuses

    def __repr__(self) -> str:
        return f"TritonBackend({self.name!r})"

    def computes(self, decision: Decision) -> bool:
        return decision == self.decision

    def refuses(self, call: Call, decision: Decision) -> str | None:
        if not self.computes(decision):
            return f"computes {self.decision} attention only, asked for {decision}"
        if call.device.type != "cuda":
            return "no GPU"
        if torch.version.hip is not None:
            return "not tested on ROCm"
        if torch.cuda.get_device_capability(call.device) < (8, 0):
            return "needs compute capability 8.0"
        if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"takes fp16, bf16 and fp32, got {call.dtype}"
        if call.head_dim % 4 or not 4 <= call.head_dim <= 256:
            return f"takes head_dim 4 to 256 in steps of 4, got {call.head_dim}"
        return self._refuses(call)

    def plan(self, call: Call, decision: Decision, flag: Tensor | None = None) -> Run:
        attend = functools.partial(self.attend, flag=flag, **({"causal": True} if call.causal else {}))
        if call.mask == "none":

            def run(q, k, v, mask, kv_len, scale):
                return attend(q, k, v, scale=scale, kv_len=kv_len)[0]

        else:

            def run(q, k, v, mask, kv_len, scale):
                return attend(q, k, v, scale=scale, mask=mask, kv_len=kv_len)[0]

        if call.layout == "BNHD":
            return run

        def transposed(q, k, v, mask, kv_len, scale):
            return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, kv_len, scale).transpose(1, 2)

        return transposed


def refuses_but_plain(call: Call) -> str | None:
    """Why a kernel does not take the call that takes 16 bits, heads in steps of 8 from 16 on, and lengths but no mask."""
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {call.dtype}"
    if call.head_dim % 8 or not 16 <= call.head_dim <= 256:
        return f"takes head_dim 16 to 256 in steps of 8, got {call.head_dim}"
    if call.mask != "none":
        return "takes no mask"
    if call.causal:
        return "takes no causal attention"
    if not (call.batch and call.q_len and call.kv_len):
        return "takes no empty tensors"
    return None


class Tiles(NamedTuple):
    """What a launch reads of a TensorDescriptor; that checks its fields anew each time it is made, for 20 us."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding: str = "zero"

    @classmethod
    def of(cls, x: Tensor, rows: int, width: int) -> Tiles:
        """Tiles [1, 1, rows, width] of x, whose base and strides are multiples of 16 bytes."""
        # A dimension of size 1 is never stepped over.
        strides = tuple(step if size > 1 else 16 for size, step in zip(x.shape[:3], x.stride(), strict=False))
        return cls(x, x.shape, (*strides, 1), (1, 1, rows, width))


class Launch:
    """Launches of a kernel whose numbers and constants are the same each time: one shape, one set of strides.

    Triton finds the compiled kernel by reading type, value and alignment of every argument at every launch, which takes the
    host longer than all the rest of a call. What it found is kept here, by what may still differ: which tensors are given,
    their types, where they lie, and whether they begin at multiples of 16 bytes. From then on the kernel gets addresses.

    Args:
        programs: how many the kernel has.
        numbers: its run-time integers, in the order of its parameters.
        constants: its constants and options, by name.
    """

    def __init__(self, programs: int, numbers: tuple[int, ...], constants: dict[str, object]) -> None:
        self.grid = (programs, 1, 1)
        self.numbers = numbers
        self.constants = constants
        self._found: dict[tuple, tuple[Callable[..., None], tuple]] = {}

    def __call__(self, kernel: JITFunction, tensors: tuple[Tensor | Tiles | None, ...], *scale: float) -> None:
        """Run `kernel` on the current device: its parameters are tensors or tiles of them, a scale, if any, the numbers
        and the constants."""
        addresses = [x if x is None or type(x) is Tiles else x.data_ptr() for x in tensors]
        # What of an argument makes another kernel. In place, since calls of Python's cost more than what they would do.
        kinds = [
            x if x is None else x.base.dtype if type(x) is Tiles else (x.dtype, x.is_cuda, not address & 15)
            for x, address in zip(tensors, addresses, strict=True)
        ]
        key = (id(kernel), *kinds)
        found = self._found.get(key)
        if found is not None:
            launch, numbers_and_constants = found
            launch(*addresses, *scale, *numbers_and_constants)
            return
        tensors = [_descriptor(x) if isinstance(x, Tiles) else x for x in tensors]
        compiled = kernel[self.grid](*tensors, *scale, *self.numbers, **self.constants)
        if compiled is not None:  # as it is in the interpreter
            constants = (self.constants[name] for name in kernel.arg_names if name in self.constants)
            self._found[key] = compiled[self.grid], (*self.numbers, *constants)


def _descriptor(x: Tiles) -> TensorDescriptor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x.base, list(x.shape), list(x.strides), list(x.block_shape), x.padding)


def scale_log2(scale: float | None, head_dim: int) -> float:
    """The factor on q k^T in the exponent of 2, above zero. Raises ValueError below: the kernels scale after the maximum."""
    scale = head_dim**-0.5 if scale is None else scale
    if not scale >= 0:
        raise ValueError(f"scale: wanted 0 or more, got {scale}")
    return max(scale * LOG2_E, 1e-30)  # at 0 itself, -inf scores times 0 would be NaN


def precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied in fp32, not in TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


_HERE = contextlib.nullcontext()


@functools.cache
def capability_of(device: torch.device) -> int:
    """90 for compute capability 9.0; the CPU, where only the interpreter runs, gets the smallest tiles."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; this makes it x's where it is another one."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def unit_stride(x: Tensor) -> Tensor:
    """x, or its copy where the elements of a head do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at a multiple of 16 bytes."""
    bits = 0
    for x in tensors:
        bits |= x.data_ptr()
    return bits & 15 == 0


def readable(x: Tensor) -> Tensor:
    """x [B, N, H, D] in 16 bits, or its copy where TMA cannot read x: base and strides are to be multiples of 16 bytes
    above 0."""
    (b, n, h, _), (sb, sn, sh, sd) = x.shape, x.stride()
    # A dimension of size 1 is never stepped over.
    sb, sn, sh = sb if b > 1 else 8, sn if n > 1 else 8, sh if h > 1 else 8
    if sd == 1 and sb > 0 and sn > 0 and sh > 0 and not (sb | sn | sh) & 7 and not x.data_ptr() & 15:
        return x
    return x.clone(memory_format=torch.contiguous_format)
