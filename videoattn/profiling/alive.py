"""What operators made and what of it still lives: the peak of a run's activations, on real tensors as on fake ones."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from videoattn.profiling.costs import storage_key, tensors


class Alive:
    """Bytes of the memory that operators made and that still lives; `peak` is the most of it, in `module`."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self.module = ""
        self._known: set[int] = set()

    def see(self, given: Any, made: Any, module: str) -> None:
        """An operator of `module` has run; memory that it was given and that is not known was there before."""
        before = {storage_key(tensor) for tensor in tensors(given)}
        for tensor in tensors(made):
            key = storage_key(tensor)
            if key in self._known or key in before or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            self._known.add(key)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes()).atexit = False
        if self.bytes > self.peak:
            self.peak, self.module = self.bytes, module

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.bytes -= count
