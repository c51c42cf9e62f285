"""Two states of a pipeline in alternating order, without any instrument, and what their times show.

Rounds are A B B A and B A A B: a drift of the clocks hits both alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from videoattn.benchmarks import timing
from videoattn.profiling import frames
from videoattn.profiling.comparison import Timing
from videoattn.profiling.recorder import Generation, Progress

ENOUGH = 3  # rounds: where nothing differs, three agree beyond the noise of three in 1 run of 80, two in 1 of 12

State = Callable[[], AbstractContextManager[object]]
"""A context in which the pipeline is patched; outside of it, it is not."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """base_ms, patched_ms: both runs of each round. base, patched: the video of the last run, [T, H, W, 3]."""

    base_ms: Sequence[tuple[float, float]]
    patched_ms: Sequence[tuple[float, float]]
    base: np.ndarray
    patched: np.ndarray


def timed(generation: Generation, patched: State, rounds: int, tell: Progress) -> Timed:
    """Run the rounds; `tell` is told the name of each."""
    ms: dict[str, list[float]] = {"base": [], "patched": []}
    videos: dict[str, np.ndarray] = {}
    for index in range(rounds):
        tell(f"round {index + 1}")
        order = ("base", "patched") if index % 2 == 0 else ("patched", "base")
        for name in (*order, *order[::-1]):
            with patched() if name == "patched" else contextlib.nullcontext():
                taken, output = generation.run()
            ms[name].append(taken)
            videos[name] = frames.of(output)
    pairs = {name: list(zip(taken[::2], taken[1::2], strict=True)) for name, taken in ms.items()}
    return Timed(base_ms=pairs["base"], patched_ms=pairs["patched"], **videos)


def shown(times: Timed, *, first_base_ms: float, first_patched_ms: float, planning_ms: float) -> Timing:
    """What the rounds show, by the statistics of benchmarks/timing.py.

    With A for base and B for patched, a round gives the ratio sqrt(A1 A2 / (B1 B2)). Its control is
    sqrt(A1 B1 / (A2 B2)): the same work against itself, of the same variance, in truth 1. Fewer than `ENOUGH` rounds show
    nothing.
    """
    ratios, controls = [], []
    for (a1, a2), (b1, b2) in zip(times.base_ms, times.patched_ms, strict=True):
        ratios.append(math.sqrt(a1 * a2 / (b1 * b2)))
        controls.append(math.sqrt(a1 * b1 / (a2 * b2)))
    ratio, lo, hi = timing.interval(np.array(ratios))
    _, control_lo, control_hi = timing.interval(np.array(controls))
    noise = max(control_hi - 1, 1 - control_lo)
    return Timing(
        base_ms=tuple(ms for pair in times.base_ms for ms in pair),
        patched_ms=tuple(ms for pair in times.patched_ms for ms in pair),
        ratio=ratio,
        ci_lo=lo,
        ci_hi=hi,
        noise=noise,
        verdict=timing.verdict(lo, hi, noise) if len(ratios) >= ENOUGH else timing.NOT_SHOWN,
        first_base_ms=first_base_ms,
        first_patched_ms=first_patched_ms,
        planning_ms=planning_ms,
    )
