"""What may be traded, where: a Policy maps a site and a step to a Decision.

Three classes of exactness, and no result changes class silently:
  exact    the same mathematics, other rounding
  bounded  quantised operands, with a gate on the error of each call
  lossy    key blocks or steps left out; off until the user asks
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from videoattn.call import KINDS, Grid, Kind, Site, Step
from videoattn.selection.arrangement import Tile
from videoattn.selection.selector import Selector, label, selector_of
from videoattn.selection.sliding_tiles import SlidingTiles, Window
from videoattn.selection.xattention import XAttention

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Precision = Literal["exact", "int8_qk_fp8_pv", "int8_qk_16bit_pv", "int8_qk_int8_pv"]
"""Of the two matrix products. q k^T in INT8 has smoothed keys; p v runs in FP8 (e4m3), in the inputs' 16 bits, or in INT8."""

FINER: dict[Precision, tuple[Precision, ...]] = {
    "exact": (),
    "int8_qk_16bit_pv": ("exact",),
    "int8_qk_fp8_pv": ("int8_qk_16bit_pv", "exact"),
    "int8_qk_int8_pv": ("int8_qk_16bit_pv", "exact"),
}
"""What may stand in for a precision, because its error is smaller."""


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
    """Every query block attends to the key blocks that a selector keeps.

    Args:
        selector: one of videoattn/selection, or its name.
        precision: of the two matrix products.
        first_frame: whether the key blocks of the first frame alone are kept by all.
        keep_steps: how many steps in a row a selection serves, its own included.
        remainder: whether key blocks that are left out stay in the softmax by their mean key and value, the pooled
            remainder (Sol-Attn, arXiv:2607.24027).
    """

    selector: Selector | str = "pooled"
    precision: Precision = "exact"
    first_frame: bool = True
    keep_steps: int = 1
    remainder: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.selector, str):
            object.__setattr__(self, "selector", selector_of(self.selector))
        if isinstance(self.selector, type) or not hasattr(self.selector, "keep"):
            raise TypeError(f"Sparse.selector: wanted a selector or its name, got {self.selector!r}")
        if not isinstance(self.keep_steps, int) or self.keep_steps < 1:
            raise ValueError(f"Sparse.keep_steps: wanted 1 or more, got {self.keep_steps!r}")
        _one_of("precision", self.precision, get_args(Precision))

    def __str__(self) -> str:
        kept = ", remainder" if self.remainder else ""
        kept += f", kept {self.keep_steps} steps" if self.keep_steps > 1 else ""
        several = isinstance(self.selector, SlidingTiles) and len(self.selector.windows) > 1
        selected = "sliding_tiles, a window a head" if several else label(self.selector)  # alike in every layer
        return f"sparse[{selected}{kept}] {self.precision}"


Decision = Dense | Sparse
EXACT = Dense()


def acceptable(decision: Decision) -> tuple[Decision, ...]:
    """The decision, then those that may stand in for it: nothing that errs more."""
    if isinstance(decision, Sparse):
        finer = (replace(decision, precision=precision) for precision in FINER[decision.precision])
        return decision, *finer, *acceptable(Dense(decision.precision))
    return decision, *map(Dense, FINER[decision.precision])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The precision of each site in each part of the schedule.

    Args:
        sites: (name, precisions), one precision for each of equally many steps, the first steps first; as many for all.
    """

    sites: tuple[tuple[str, tuple[Precision, ...]], ...]

    def __post_init__(self) -> None:
        counts = {len(precisions) for _, precisions in self.sites}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"Tuned.sites: wanted as many precisions for each, one at least, got {sorted(counts)}")
        for _, precisions in self.sites:
            for precision in precisions:
                _one_of("precision", precision, get_args(Precision))

    @property
    def ranges(self) -> int:
        return len(self.sites[0][1])

    def range_of(self, step: Step) -> int | None:
        """Which part of the schedule a step is in; None where its length is not known."""
        return min(step.index * self.ranges // step.total, self.ranges - 1) if step.total else None

    def precision(self, name: str, step: Step) -> Precision | None:
        """The precision of a site; where the step is not known, that which errs least of all. None for other sites."""
        precisions = dict(self.sites).get(name)
        if precisions is None:
            return None
        part = self.range_of(step)
        return min(precisions, key=lambda each: len(FINER[each])) if part is None else precisions[part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The sliding-tile windows of each site.

    Args:
        sites: (name, windows), windows as `SlidingTiles` takes them: one for each head.
        grid, tile: the video's, and the kernel's, that they were found for. They are in tokens: of another grid they keep
            as many frames, rows and columns, and another tile rounds them.
    """

    sites: tuple[tuple[str, tuple[Window, ...]], ...]
    grid: Grid
    tile: Tile

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("Windows.sites: wanted one site at least, got none")
        for _, windows in self.sites:
            SlidingTiles(windows=windows)  # raises
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"Windows.tile: wanted (frames, height, width) of 1 at least, got {self.tile!r}")

    def of(self, name: str) -> SlidingTiles | None:
        """The selector of a site; None for other sites."""
        windows = dict(self.sites).get(name)
        return None if windows is None else SlidingTiles(windows=windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A pure function from (site, step) to a decision.

    Args:
        name: shown in reports.
        decision: for the self-attention of `kinds`; everything else is exact.
        kinds: the kinds of attention that `decision` is for.
        exact_layers: patterns (fnmatch) of site names that stay exact, e.g. ``("blocks.0.*",)``.
        tuned: what was measured of a model, in place of `decision` at the sites that it names (`videoattn tune`).
        windows: those of the sites that it names, in place of those of `decision`, which is Sparse with SlidingTiles
            (`videoattn tune --windows`).

    Where `decision` is Sparse, and one of these says so, attention is dense instead, in the decision's precision:
        dense_steps: share of the steps, the first ones, 0 to 1: they lay out the scene, and errors in them are not made good
            later (all published methods keep 10 % to 25 %).
        min_steps: of a schedule; in one of few steps (distilled models) no step makes good what another left out.
        min_tokens: of the video; short sequences are not sparse, nor does selection pay there.
        dense_layers: patterns of site names.
    A step that is not known (a bare denoiser's) counts as one of the first, a grid that is not known as too small.
    """

    name: str = "custom"
    decision: Decision = EXACT
    kinds: tuple[Kind, ...] = ("full", "joint", "spatial")
    exact_layers: tuple[str, ...] = ()
    tuned: Tuned | None = None
    windows: Windows | None = None
    dense_steps: float = 0.0
    min_steps: int = 0
    min_tokens: int = 0
    dense_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.decision, Dense | Sparse):
            raise TypeError(f"Policy.decision: wanted Dense or Sparse, got {type(self.decision).__name__}")
        if any(isinstance(names, str) for names in (self.kinds, self.exact_layers, self.dense_layers)):
            raise TypeError("Policy.kinds, exact_layers and dense_layers: wanted a tuple of str, got a str")
        for kind in self.kinds:
            _one_of("Policy.kinds", kind, KINDS)
        if self.tuned is not None and not isinstance(self.tuned, Tuned):
            raise TypeError(f"Policy.tuned: wanted a Tuned, got {type(self.tuned).__name__}")
        if self.windows is not None and not isinstance(self.windows, Windows):
            raise TypeError(f"Policy.windows: wanted a Windows, got {type(self.windows).__name__}")
        if self.windows is not None and not isinstance(getattr(self.decision, "selector", None), SlidingTiles):
            raise ValueError(f"Policy.windows: wanted a decision that is Sparse with SlidingTiles, got {self.decision}")
        if not 0.0 <= self.dense_steps <= 1.0:
            raise ValueError(f"Policy.dense_steps: wanted a share from 0 to 1, got {self.dense_steps}")
        if self.min_steps < 0 or self.min_tokens < 0:
            raise ValueError(
                f"Policy.min_steps and min_tokens: wanted 0 or more, got {self.min_steps} and {self.min_tokens}"
            )

    def __call__(self, site: Site, step: Step) -> Decision:
        if site.kind not in self.kinds or any(fnmatchcase(site.name, pattern) for pattern in self.exact_layers):
            return EXACT
        precision = None if self.tuned is None else self.tuned.precision(site.name, step)
        if precision is not None:
            return Dense(precision)
        if isinstance(self.decision, Sparse) and (
            not self.sparse_at(step) or any(fnmatchcase(site.name, pattern) for pattern in self.dense_layers)
        ):
            return Dense(self.decision.precision)
        selector = None if self.windows is None else self.windows.of(site.name)
        return self.decision if selector is None else replace(self.decision, selector=selector)

    def sparse_at(self, step: Step) -> bool:
        """Whether a step may be sparse, whatever the site."""
        if not isinstance(self.decision, Sparse):
            return False
        if (self.dense_steps or self.min_steps) and not step.total:
            return False
        if step.total < self.min_steps or step.index < self.dense_steps * step.total * (1 - 1e-12):
            return False  # 0.28 of 25 is 7 and a rounding error: no eighth step
        return not self.min_tokens or (step.grid is not None and step.grid.tokens >= self.min_tokens)

    def decisions(self, site: Site) -> set[Decision]:
        """All that may be decided at a site in the course of a schedule."""
        parts = 1 if self.tuned is None else self.tuned.ranges
        found = {self(site, Step(index=part, total=parts)) for part in range(parts)}
        if isinstance(self.decision, Sparse):
            always = replace(self, dense_steps=0.0, min_steps=0, min_tokens=0)
            found |= {always(site, Step(index=part, total=parts)) for part in range(parts)}
        return found

    def phase(self, step: Step) -> Hashable:
        """Equal for steps at which every site decides alike, so that decisions are made once a phase."""
        part = None if self.tuned is None else self.tuned.range_of(step)
        return (part, self.sparse_at(step)) if isinstance(self.decision, Sparse) else part

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """The policy that `videoattn tune` wrote; sites that it does not know stay exact, or keep all key blocks.

        Raises:
            ValueError: the file is no such policy.
        """
        path = Path(path)
        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
            if "windows" in read:
                return cls._of_windows(path.stem, **read)
            return cls(
                name=path.stem, tuned=Tuned(sites=tuple((site, tuple(of)) for site, of in read["sites"].items()))
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: wanted a policy of videoattn tune, got {error}") from error

    @classmethod
    def _of_windows(
        cls, name: str, *, windows: dict, precision: Precision, dense_steps: float, found: object = None
    ) -> Policy:
        """From what such a file holds. Other sites have one window as large as the grid."""
        sites = tuple((site, tuple(map(tuple, of))) for site, of in windows["sites"].items())
        frames, height, width = windows["grid"]
        return cls(
            name=name,
            decision=Sparse(SlidingTiles(windows=((frames, height, width),)), precision),
            windows=Windows(
                sites=sites, grid=Grid(frames=frames, height=height, width=width), tile=tuple(windows["tile"])
            ),
            dense_steps=dense_steps,
        )

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
    "fast": Policy(
        name="fast",
        decision=Sparse(XAttention(stride=16, density=0.3, order="morton"), "int8_qk_fp8_pv", remainder=True),
        dense_steps=0.3,
        min_steps=10,
        min_tokens=8192,
    ),
}
