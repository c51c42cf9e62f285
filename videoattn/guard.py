"""Whether the outputs of our kernels were finite: flags that a kernel sets and the host reads, neither of which waits.

A flag lies in pinned host memory, which a GPU reaches under the same address. To set one is a store over the bus, which
happens only where something is wrong; to look at all of them is to read the host's own memory: no copy, no event, no
synchronisation, and nothing that a CUDA graph would have to record.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_FLAGS = 64  # in a block
_WORDS = 4  # of a flag: on a multiple of 16 bytes, since Triton compiles a kernel anew for another alignment

_blocks: list[np.ndarray] = []  # never freed, since a kernel that still runs may write to them
_free: list[Tensor] = []


def flag() -> Tensor:
    """A flag, int32 [1] and 0, that is nobody else's until the tensor is dropped."""
    if not _free:
        with torch.inference_mode(False):  # else it could not be cleared outside of it
            block = torch.zeros(_FLAGS, _WORDS, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        _blocks.append(block.numpy())
        _free.extend(block.unbind())
    words = _free.pop()
    words.zero_()
    taken = words[:1]
    weakref.finalize(taken, _free.append, words)
    return taken


def raised() -> bool:
    """Whether any flag is set by now."""
    return any(block.any() for block in _blocks)


def lower(flag: Tensor) -> bool:
    """Clear a flag; returns whether it was set."""
    was_set = bool(flag)
    flag.zero_()
    return was_set


def wait(devices: Iterable[torch.device]) -> None:
    """Wait until the devices have done what they were given; where a graph is captured, nothing is done yet."""
    for device in devices:
        if device.type == "cuda" and not capturing(device):
            torch.cuda.synchronize(device)


def capturing(device: torch.device) -> bool:
    """Whether calls on a device are recorded into a CUDA graph and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
