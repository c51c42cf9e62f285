"""Who computes a decision. A backend says why it will not, or makes a plan; of those that will, `select` takes the one
that was measured the fastest.

A new kernel is one file under kernels/ with a list `BACKENDS`, and one line in `MODULES` or `TRITON_MODULES` here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from videoattn import measured
from videoattn.call import Call
from videoattn.policy import EXACT, Decision

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, kv_len, scale) -> out; q, k, v, out in the call's layout, out contiguous as [B, N, H, D]."""

MODULES = ("videoattn.kernels.sdpa",)
TRITON_MODULES = ("videoattn.kernels.temporal", "videoattn.kernels.flash", "videoattn.kernels.flash_hopper")
"""Imported where Triton is installed, which has no build for macOS."""


class Backend(Protocol):
    name: str
    own: bool
    """Whether the kernel is this project's: then it is checked before its first call and watched while it runs."""

    def refuses(self, call: Call, decision: Decision) -> str | None:
        """None where the backend can compute the decision for this call, else the reason in a few words."""

    def plan(self, call: Call, decision: Decision, flag: Tensor | None = None) -> Run:
        """A callable for calls of exactly this shape.

        flag: int32 [1] in memory that the host and the call's device share (`videoattn.guard.flag`). A kernel that is our
            own stores 1 there when an output is not finite, and nothing else; others ignore it. None: nobody looks.
        """


class UnsupportedCall(ValueError):
    """No backend computes the call as asked; the message lists every refusal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `select` settled on: who computes, what is computed, and why not something else."""

    backend: Backend
    decision: Decision
    why: str
    refusals: tuple[tuple[str, str], ...]


@functools.cache
def backends() -> tuple[Backend, ...]:
    modules = MODULES + (TRITON_MODULES if importlib.util.find_spec("triton") else ())
    return tuple(backend for module in modules for backend in importlib.import_module(module).BACKENDS)


def validate_backend(name: str) -> None:
    """Raise ValueError unless `name` is "auto" or a registered backend."""
    names = ["auto", *(backend.name for backend in backends())]
    if name not in names:
        raise ValueError(f"backend: wanted one of {', '.join(names)}, got {name!r}")


def select(
    call: Call, decision: Decision, name: str = "auto", failed: Callable[[Backend], str | None] = lambda backend: None
) -> Choice:
    """The backend for a call.

    A named backend is obeyed or refuses with UnsupportedCall. With "auto" `measured.choose` decides among those that
    accept; a decision that nobody here can compute falls back to exact, never to a lossier one, and `why` says so.
    `failed` says why a backend that accepts is not to be used all the same, None where it is.
    """
    refusals: list[tuple[str, str]] = []
    accepted: dict[str, Backend] = {}
    for backend in backends():
        reason = failed(backend) or backend.refuses(call, decision)
        if reason is None:
            accepted[backend.name] = backend
        else:
            refusals.append((backend.name, reason))

    if name in accepted:
        return Choice(backend=accepted[name], decision=decision, why="named by the caller", refusals=tuple(refusals))
    if name == "auto" and accepted:
        best, why = measured.choose(call, tuple(accepted))
        return Choice(backend=accepted[best], decision=decision, why=why, refusals=tuple(refusals))
    if name != "auto" and decision == EXACT:
        raise UnsupportedCall(f"backend {name!r} refuses {call}: {dict(refusals)[name]}")
    if decision == EXACT:
        listed = "; ".join(f"{backend}: {reason}" for backend, reason in refusals)
        raise UnsupportedCall(f"no backend computes {call}: {listed}")

    reason = "no GPU" if call.device.type == "cpu" else f"no kernel for it on {call.device.type}"
    choice = select(call, EXACT, name, failed)
    return Choice(
        backend=choice.backend,
        decision=EXACT,
        why="; ".join(part for part in (f"{decision} -> exact: {reason}", choice.why) if part),
        refusals=(*refusals, *choice.refusals),
    )
