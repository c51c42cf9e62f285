"""Who computes a decision. A backend says why it will not, or makes a plan; of those that will, `select` takes the one
that was measured the fastest.

A new kernel is one file under kernels/ with a list `BACKENDS`, and one line in `MODULES` or `TRITON_MODULES` here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from videoattn import measured
from videoattn.call import Call
from videoattn.policy import EXACT, Decision, Dense, Sparse, acceptable
from videoattn.prologue import Prologue, Stream

if TYPE_CHECKING:
    from videoattn.selection.kept import Kept

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, kv_len, scale) -> out; q, k, v, out in the call's layout, out contiguous as [B, N, H, D]."""

RunStreams = Callable[[Sequence[Stream], Tensor | None], Tensor]
"""(streams, kv_len) -> out [B, Nq, H, D], contiguous; empties the streams."""

MODULES = ("videoattn.kernels.sdpa", "videoattn.kernels.masked")
TRITON_MODULES = (
    "videoattn.kernels.temporal",
    "videoattn.kernels.flash",
    "videoattn.kernels.flash_hopper",
    "videoattn.kernels.quantised",
    "videoattn.kernels.quantised_hopper",
    "videoattn.kernels.sparse",
)
"""Imported where Triton is installed, which has no build for macOS."""


class Backend(Protocol):
    name: str
    own: bool
    """Whether the kernel is this project's: then it is checked before its first call and watched while it runs."""

    def computes(self, decision: Decision) -> bool:
        """Whether the kernel is for this decision at all."""

    def refuses(self, call: Call, decision: Decision) -> str | None:
        """None where the backend can compute the decision for this call, else the reason in a few words."""

    def plan(self, call: Call, decision: Decision, flag: Tensor | None = None) -> Run:
        """A callable for calls of exactly this shape.

        flag: int32 [1] in memory that the host and the call's device share (`videoattn.guard.flag`). A kernel that is our
            own stores 1 there when an output is not finite, and nothing else; others ignore it. None: nobody looks.
        """


class StreamsBackend(Backend, Protocol):
    """A backend with a pass of its own between raw projections and its kernel."""

    def plan_streams(self, call: Call, decision: Decision, prologue: Prologue, flag: Tensor | None) -> RunStreams:
        """As `plan`, for streams that make such a call and that `kernels/prepare.py` does not refuse."""


class ListsBackend(Backend, Protocol):
    """A backend that leaves key blocks out."""

    dense: Backend
    """Whose kernel it is; it computes the same with all blocks."""

    def expected_density(self, call: Call, decision: Sparse) -> float:
        """The share of the keys that a query attends to, as far as it can be told beforehand."""

    def keeping(self, kept: Kept) -> ListsBackend:
        """The same backend for plans whose lists `kept` looks after."""


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


def stand_in(backend: Backend, decision: Decision) -> Decision:
    """What a backend has for a decision: that itself, or the next that errs less; the decision where it has neither."""
    return next((allowed for allowed in acceptable(decision) if backend.computes(allowed)), decision)


def select(
    call: Call, decision: Decision, name: str = "auto", failed: Callable[[Backend], str | None] = lambda backend: None
) -> Choice:
    """The backend for a call.

    A named backend is obeyed or refuses with UnsupportedCall. It is for the decisions that it computes: where a policy
    leaves calls exact, one that quantises does not come in, and they are chosen for as with "auto"; where it keeps all key
    blocks, the dense kernel of one that leaves some out takes its place.

    With "auto" `measured.choose` decides among those that accept: kernels of the decision, and of what is more exact where
    that is as fast. A decision that nobody here can compute falls back so too, never to one that errs more; `why` says so.
    `failed` says why a backend that accepts is not to be used all the same, None where it is.
    """
    named = next((backend for backend in backends() if backend.name == name), None)
    if hasattr(named, "dense") and isinstance(decision, Dense):
        named = named.dense  # whose kernel it is, where all blocks are kept
        name = named.name
    if named is not None and decision == EXACT and not named.computes(EXACT):
        name, named = "auto", None
    refusals: list[tuple[str, str]] = []
    accepted: dict[str, tuple[Backend, Decision]] = {}
    for backend in backends():
        if getattr(backend, "named_only", False) and backend is not named:
            continue
        computed = stand_in(backend, decision)
        reason = failed(backend) or backend.refuses(call, computed)
        if reason is None:
            accepted[backend.name] = backend, computed
        else:
            refusals.append((backend.name, reason))

    if named is not None and name not in accepted:
        raise UnsupportedCall(f"backend {name!r} refuses {call}: {dict(refusals)[name]}")
    if not accepted:
        listed = "; ".join(f"{backend}: {reason}" for backend, reason in refusals)
        raise UnsupportedCall(f"no backend computes {call}: {listed}")
    if named is not None:
        best, why = name, "named by the caller"
    else:
        exact = tuple(each for each, (_, computed) in accepted.items() if computed == EXACT)
        sparse = {
            each: (backend.dense.name, backend.expected_density(call, computed))
            for each, (backend, computed) in accepted.items()
            if isinstance(computed, Sparse)
        }
        others = tuple(each for each in accepted if each not in exact and each not in sparse)
        best, why = measured.choose(call, exact, others, sparse)
    backend, computed = accepted[best]
    if computed != decision:
        reason = "" if named is not None else _why_not(call, decision, accepted, refusals)
        why = "; ".join(part for part in (f"{decision} -> {computed}" + (reason and f": {reason}"), why) if part)
    return Choice(backend=backend, decision=computed, why=why, refusals=tuple(refusals))


def _why_not(
    call: Call,
    decision: Decision,
    accepted: Mapping[str, tuple[Backend, Decision]],
    refusals: Sequence[tuple[str, str]],
) -> str:
    """Why something that errs less stands in for a decision."""
    if any(computed == decision for _, computed in accepted.values()):
        return "not measured faster"
    if call.device.type == "cpu":
        return "no GPU"
    able = {backend.name for backend in backends() if backend.computes(decision)}
    reasons = dict.fromkeys(reason for name, reason in refusals if name in able)
    return ", ".join(reasons) or f"no kernel for it on {call.device.type}"
