"""What one guidance branch of one denoiser has given so far in this generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from videoattn.caches.weights import Rule


class Past:
    """The outputs of the last steps that ran, and what was guessed since."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.outputs: list[list[Tensor]] = []
        self.guesses: list[tuple[int, dict[int, float]]] = []  # (step, weights by step), since the last step that ran
        self.size: tuple | None = None  # of the calls
        self.first: Tensor | None = None  # what the first block added in the last step that ran, where that decides

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for outputs in self.outputs for x in outputs)

    def of(self, size: tuple) -> Past:
        """Itself, where its calls had this size; else a new one."""
        if self.size in (None, size):
            self.size = size
            return self
        fresh = Past()
        fresh.size = size
        return fresh

    def add(self, step: int, outputs: Sequence[Tensor], keep: int) -> None:
        self.steps = [*self.steps, step][-keep:]
        self.outputs = [*self.outputs, list(outputs)][-keep:]
        self.guesses = []

    def guess(self, step: int, rule: Rule) -> list[Tensor]:
        """What a step that does not run gives."""
        known = self.steps[-rule.terms :]
        weights = dict(zip(known, rule.weights(known, step).tolist(), strict=True))
        self.guesses.append((step, weights))
        return [self.sum_of(weights, which) for which in range(len(self.outputs[0]))]

    def correction(self, step: int, rule: Rule, influence: np.ndarray, most: float) -> dict[int, float]:
        """How much of each known output, that of `step` included, makes up for the guesses before it.

        A guess g of step q that was u too small left the latents influence[q] u away from where they should be, which an
        output of step s that is influence[q] / influence[s] u greater puts right. u is told by the rule, which now also knows
        what stands behind q.
        """
        known = [*self.steps, step][-rule.terms - 1 :]
        total: dict[int, float] = {}
        for guessed, weights in self.guesses:
            ratio = influence[guessed] / influence[step] if influence[step] else np.inf
            if not abs(ratio) <= most:
                continue
            better = dict(zip(known, rule.weights(known, guessed).tolist(), strict=True))
            for each in better.keys() | weights.keys():
                missed = better.get(each, 0.0) - weights.get(each, 0.0)
                total[each] = total.get(each, 0.0) + ratio * missed
        return total

    def sum_of(self, weights: dict[int, float], which: int = 0, own: tuple[int, Tensor] | None = None) -> Tensor:
        """The known outputs of steps times their weights, summed in fp32, in the outputs' dtype.

        Args:
            which: of several outputs of one step.
            own: a step that is not among those known, and its output.
        """
        known = {step: outputs[which] for step, outputs in zip(self.steps, self.outputs, strict=True)}
        if own is not None:
            known[own[0]] = own[1]
        like = known[next(iter(weights))]
        total = torch.zeros_like(like, dtype=torch.float32 if like.dtype.itemsize < 4 else like.dtype)
        for step, weight in weights.items():
            total.add_(known[step], alpha=weight)
        return total.to(like.dtype)
