"""What a user can choose of step rehash, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from videoattn.caches.families import POINTS, Point
from videoattn.caches.timetable import COORDINATES, LEAST_STEPS, Coordinate

Mode = Literal["hold", "extrapolate", "extrapolate2", "fit", "correct"]
MODES: tuple[Mode, ...] = get_args(Mode)
Keys = Literal["uniform", "similarity", "error"]
KEYS: tuple[Keys, ...] = get_args(Keys)

TERMS = {"hold": 1, "extrapolate": 2, "extrapolate2": 3, "fit": 2, "correct": 2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """See `videoattn.enable_step_rehash`, whose arguments these are.

    Raises:
        TypeError, ValueError: no such choice, or two that exclude each other.
    """

    steps: int | tuple[int, ...] | None = None
    similarity: float | None = None
    threshold: float | None = None
    mode: Mode | None = None
    keys: Keys | None = None
    point: Point = "output"
    coordinate: Coordinate | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("steps", "similarity", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"step rehash: wanted one of steps, similarity and threshold, got {given or 'none'}")
        for name, known in (("mode", MODES), ("keys", KEYS), ("point", POINTS)):
            if getattr(self, name) not in (known if name == "point" else (None, *known)):
                raise ValueError(f"{name}: wanted one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.coordinate is not None and self.coordinate not in COORDINATES:
            raise ValueError(f"coordinate: wanted one of {', '.join(COORDINATES)}, got {self.coordinate!r}")
        if self.steps is not None:
            if isinstance(self.steps, bool) or not isinstance(self.steps, int | tuple):
                raise TypeError(f"steps: wanted an int, or indices of steps, got {type(self.steps).__name__}")
            if isinstance(self.steps, tuple):
                if not all(isinstance(step, int) and step >= 0 for step in self.steps):
                    raise ValueError(f"steps: wanted indices from 0, got {self.steps}")
            elif self.steps < 3:
                raise ValueError(f"steps: wanted 3 or more of the sampler's {LEAST_STEPS} or more, got {self.steps}")
        if self.similarity is not None and not 0 < self.similarity < 1:
            raise ValueError(f"similarity: wanted a cosine between 0 and 1, got {self.similarity}")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold: wanted a relative change above 0, got {self.threshold}")
        if (self.threshold is not None) and self.point != "first_block":
            raise ValueError(f"threshold: wanted point 'first_block', whose change it is of, got {self.point!r}")
        if self.point != "output" and self.mode == "correct":
            raise ValueError(f"mode 'correct': wanted point 'output', got {self.point!r}")
        if self.threshold is not None and self.mode == "fit":
            raise ValueError(
                "threshold: wanted mode hold or extrapolate, which need no steps that are known ahead, got 'fit'"
            )
        if self.similarity is not None and self.keys not in (None, "similarity"):  # the others need a number of steps
            raise ValueError(f"similarity: wanted keys 'similarity', got {self.keys!r}")

    def resolved(self, multistep: bool) -> Settings:
        """With what was left open chosen by measurement (docs/rehash.md).

        Args:
            multistep: whether the sampler takes differences of outputs, to which guesses do harm.
        """
        fitted = "correct" if self.point == "output" else "fit"
        mode = "hold" if multistep else "extrapolate" if self.threshold is not None else fitted
        return replace(self, mode=self.mode or mode, keys=self.keys or "similarity")

    @property
    def terms(self) -> int:
        return TERMS[self.mode]

    @property
    def calibrated(self) -> bool:
        """Whether it needs to know how alike steps are."""
        chosen = isinstance(self.steps, tuple) or self.keys == "uniform"
        return self.threshold is None and (not chosen or self.mode in ("fit", "correct"))

    def __str__(self) -> str:
        wanted = next(
            f"{n} {getattr(self, n)}" for n in ("steps", "similarity", "threshold") if getattr(self, n) is not None
        )
        chosen = self.threshold is not None or isinstance(self.steps, tuple)
        keys = "" if chosen else f", keys by {self.keys}"
        return f"{wanted}{keys}, {self.mode} at {self.point}"
