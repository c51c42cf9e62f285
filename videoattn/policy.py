"""What may be traded, where: a Policy maps a site and a step to a Decision.

Three classes of exactness, and no result changes class silently:
  exact    the same mathematics, other rounding
  bounded  quantised operands, with a gate on the error of each call
  lossy    key blocks or steps left out; off until the user asks
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from videoattn.call import KINDS, Kind, Site, Step

Precision = Literal["exact", "int8_qk_fp8_pv", "int8_qk_16bit_pv", "int8_qk_int8_pv"]
Selector = Literal["pooled"]


def _one_of(what: str, got: object, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise ValueError(f"{what}: wanted one of {', '.join(wanted)}, got {got!r}")


@dataclass(frozen=True, slots=True)
class Dense:
    """Every query attends to every key, in the given precision of the two matrix products."""

    precision: Precision = "exact"

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, get_args(Precision))

    def __str__(self) -> str:
        return self.precision


@dataclass(frozen=True, slots=True)
class Sparse:
    """Every query block attends to the key blocks that `selector` keeps."""

    selector: Selector = "pooled"
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        _one_of("selector", self.selector, get_args(Selector))
        _one_of("precision", self.precision, get_args(Precision))

    def __str__(self) -> str:
        return f"sparse[{self.selector}] {self.precision}"


Decision = Dense | Sparse
EXACT = Dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A pure function from (site, step) to a decision.

    Args:
        name: shown in reports.
        decision: for the self-attention of `kinds`; everything else is exact.
        kinds: the kinds of attention that `decision` is for.
        exact_layers: patterns (fnmatch) of site names that stay exact, e.g. ``("blocks.0.*",)``.
    """

    name: str = "custom"
    decision: Decision = EXACT
    kinds: tuple[Kind, ...] = ("full", "joint", "spatial")
    exact_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.decision, Dense | Sparse):
            raise TypeError(f"Policy.decision: wanted Dense or Sparse, got {type(self.decision).__name__}")
        if isinstance(self.kinds, str) or isinstance(self.exact_layers, str):
            raise TypeError("Policy.kinds and Policy.exact_layers: wanted a tuple of str, got a str")
        for kind in self.kinds:
            _one_of("Policy.kinds", kind, KINDS)

    def __call__(self, site: Site, step: Step) -> Decision:
        if site.kind not in self.kinds or any(fnmatchcase(site.name, pattern) for pattern in self.exact_layers):
            return EXACT
        return self.decision

    def phase(self, step: Step) -> Hashable:
        """Equal for steps at which every site decides alike, so that decisions are made once a phase."""
        return None

    @classmethod
    def of(cls, policy: Policy | str) -> Policy:
        """A policy as it is, or the preset of that name."""
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, str):
            _one_of("preset", policy, tuple(PRESETS))
            return PRESETS[policy]
        raise TypeError(f"policy: wanted a Policy or one of {', '.join(PRESETS)}, got {type(policy).__name__}")


PRESETS = {
    "exact": Policy(name="exact"),
    "balanced": Policy(name="balanced", decision=Dense("int8_qk_fp8_pv")),
    "fast": Policy(name="fast", decision=Sparse("pooled", "int8_qk_fp8_pv")),
}
