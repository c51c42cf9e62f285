"""The best of torch's kernels on a call: what a kernel of ours is held against.

Every backend that takes the call is timed against torch's own choice first; the fastest of SDPA's is then the baseline of
the figure itself, called on the same strided tensors, so that any copy it needs is its own cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from videoattn.backend import backends
from videoattn.benchmarks import attention, timing

BEST = "best sdpa"


@dataclass(frozen=True)
class Field:
    """All backends on one call. ms: backend name -> milliseconds, drift taken out."""

    problem: attention.Problem
    ms: Mapping[str, float]

    def fastest(self, *, own: bool) -> str:
        """The fastest of our kernels, or of torch's. Raises ValueError where none took the call."""
        names = [backend.name for backend in backends() if backend.own is own and backend.name in self.ms]
        if not names:
            raise ValueError(f"{self.problem.shape.name}: wanted a kernel of {'ours' if own else 'SDPA'}, got none")
        return min(names, key=self.ms.__getitem__)

    def run(self, name: str) -> Callable[..., Tensor]:
        """What ``name`` runs; torch's own choice is called as diffusers calls it."""
        if name == "sdpa":
            return self.problem.as_diffusers
        return self.problem.planned(next(backend for backend in backends() if backend.name == name))


def line_up(problem: attention.Problem, seconds: float) -> Field:
    compared = attention.measure(problem, seconds, attention.accepting(problem.call()))
    return Field(problem, {name: result.baseline_ms / result.ratio for name, result in compared.items()})


def against(field: Field, name: str, baseline: str, seconds: float) -> timing.Comparison:
    """One backend against another on the same inputs."""
    problem = field.problem
    return timing.compare(
        field.run(baseline),
        {name: field.run(name)},
        problem.inputs,
        problem.error,
        device=problem.device,
        seconds=seconds,
        min_rounds=5,
    )[name]
