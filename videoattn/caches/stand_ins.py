"""What stands in for a module during one call of the denoiser, and is gone when that call ends.

Between calls, and in every call that runs in full, the model is as it was: what slices its blocks, compiles them, moves their
weights or copies it meets nothing of ours. A stand-in is outermost, so that a block that is left out is not even moved to its
device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_OWN = ("forward", "_compiled_call_impl")  # attributes of an instance that a call looks at


class StandIns:
    """Everything that was put on modules for the call that runs."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, forward: Callable[[nn.Module, tuple, dict], Any]) -> None:
        """Have a module return `forward(module, args, kwargs)`, compiled or not."""
        before = {name: vars(module)[name] for name in _OWN if name in vars(module)}

        def stand_in(*args, **kwargs):
            return forward(module, args, kwargs)

        def undo() -> None:
            for name in _OWN:
                vars(module).pop(name, None)
            vars(module).update(before)

        module.forward = stand_in
        module._compiled_call_impl = None
        self._undo.append(undo)

    def give(self, module: nn.Module, output: Tensor) -> None:
        """Have a module give an output as its last hook gave it in the call that it is from, whatever hooks there are."""
        self.replace(module, lambda module, args, kwargs: output)
        self.watch(module, lambda module, args, kwargs, out: output)

    def watch(self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict, Any], Any]) -> None:
        """Call `hook(module, args, kwargs, output)` behind a module; what it returns, unless None, is the output then."""
        compiled = module._compiled_call_impl
        if compiled is None:
            self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)
            return

        def around(*args, **kwargs):  # outside of the graph, which a new hook would have to be traced into
            output = compiled(*args, **kwargs)
            other = hook(module, args, kwargs, output)
            return output if other is None else other

        def undo() -> None:
            module._compiled_call_impl = compiled

        module._compiled_call_impl = around
        self._undo.append(undo)

    def clear(self) -> None:
        """Take everything off again, the last first."""
        while self._undo:
            self._undo.pop()()
