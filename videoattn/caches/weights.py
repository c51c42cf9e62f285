"""What a step's output is guessed to be: a sum of outputs of other steps, with weights.

A rule gives the weights of some known steps for a wanted one. Steps are indices, 0 to N - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

RIDGE = 1e-6  # of the mean of the squares: what two calibrations differ in must not be fitted


class Rule(Protocol):
    terms: int
    """How many known steps take part, at most."""

    def weights(self, known: Sequence[int], wanted: int) -> np.ndarray:
        """float64, one for each known step, of which there are `terms` at most."""


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """Through the known outputs, over the coordinate of the steps: of `terms` 1 the last one held, of 2 a line.

    For a sampler that is linear between steps (DDIM, Euler) a held output is the sampler of fewer steps to rounding, and a
    line is the method of Adams and Bashforth of second order.
    """

    terms: int
    at: np.ndarray = field(repr=False)

    def weights(self, known: Sequence[int], wanted: int) -> np.ndarray:
        x = self.at[list(known)]
        apart = x[:, None] - x[None, :]
        steps = self.at[wanted] - x
        others = ~np.eye(len(x), dtype=bool)
        return np.array([np.prod(steps[row] / apart[i][row]) for i, row in enumerate(others)])


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """With the least squared error on the calibration's generations.

    Args:
        gram: products of outputs of any two steps, float64 [N, N].
    """

    terms: int
    gram: np.ndarray = field(repr=False)

    def weights(self, known: Sequence[int], wanted: int) -> np.ndarray:
        known = list(known)
        products = self.gram[np.ix_(known, known)]
        ridge = RIDGE * np.trace(products) / len(known)
        return np.linalg.solve(products + ridge * np.eye(len(known)), self.gram[known, wanted])


def error(gram: np.ndarray, known: Sequence[int], weights: np.ndarray, wanted: int) -> float:
    """The squared error of a guess on the calibration's generations, relative to the squared output."""
    known = list(known)
    missed = gram[wanted, wanted] - 2 * weights @ gram[known, wanted] + weights @ gram[np.ix_(known, known)] @ weights
    return max(float(missed / gram[wanted, wanted]), 0.0)
