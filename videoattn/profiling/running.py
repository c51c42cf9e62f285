"""What has begun and not ended while operators are counted: scopes, and the attention calls in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from videoattn.profiling.categories import ATTENTION
from videoattn.profiling.profile import AttentionCall
from videoattn.profiling.scopes import Scope

BESIDE_TEMPORAL = ("spatial", "full", "joint")


class Scores(NamedTuple):
    """The first product of an attention that is written out, [rows, Nq, D] x [rows, D, Nk]."""

    rows: int
    q_len: int
    head_dim: int
    kv_len: int
    bytes: int


@dataclass(slots=True, eq=False)
class Frame:
    """A scope that runs.

    Args:
        attention: the innermost attention module around it, itself included.
        calls: attention calls in it.
        layout: bytes of layout copies in its own code; in an attention module those of its parts too.
        width: of an attention module: columns of its first projection, heads x head_dim.
        scores, weights: the latest product, and the latest softmax's shape.
    """

    scope: Scope
    parent: Frame | None = None
    attention: Frame | None = None
    calls: list[BegunCall] = field(default_factory=list)
    layout: int = 0
    width: int = 0
    scores: Scores | None = None
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.attention = self if self.scope.role == ATTENTION else self.parent and self.parent.attention

    def settle(self) -> None:
        """It has ended: its copies go to the calls that they were made for.

        Those are the calls of an attention module. Where a module's only self-attention is temporal (a temporal
        transformer of a UNet), what its own code copies brings the frames together: those go to its temporal calls.
        """
        if self.attention is self:
            _share(self.layout, self.calls)
        elif self.attention is not None:
            self.parent.layout += self.layout
        elif not any(call.kind in BESIDE_TEMPORAL for call in self.calls):
            _share(self.layout, [call for call in self.calls if call.kind == "temporal"])
        if self.parent is not None:
            self.parent.calls += self.calls


def _share(layout: int, calls: list[BegunCall]) -> None:
    for call in calls:
        call.layout_bytes += layout // len(calls)


@dataclass(slots=True, eq=False)
class BegunCall:
    """An attention call while it runs.

    Args:
        facts: what is known of it when it begins: not its backend, nor the copies around it.
        seen: whether an operator that computes it was counted.
        is_operator: whether it runs inside of the operator videoattn::attend.
    """

    facts: AttentionCall
    backend: str = ""
    layout_bytes: int = 0
    seen: bool = False
    is_operator: bool = False

    @property
    def kind(self) -> str:
        return self.facts.kind

    def done(self) -> AttentionCall:
        return replace(self.facts, backend=self.backend, layout_bytes=self.layout_bytes)
