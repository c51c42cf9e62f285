"""Lists that live on for some steps: what a query block attends to changes little from one step to the next (LiteAttention,
arXiv:2511.11062), so that a selection can serve more steps than its own.

Sites are known by the order in which they call within one forward of the denoiser, which is the same at every step; this
way nothing about sites has to pass through compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from videoattn.call import Step
from videoattn.selection.block_list import BlockList


@dataclass(slots=True)
class _Found:
    """lists: None once they have served; keep: their mask, which the next ones are compared with."""

    lists: BlockList | None
    keep: Tensor
    like: Hashable
    index: int


class Kept:
    """The lists of one denoiser's sites, per guidance branch, and how much they hold.

    Args:
        steps: how many steps in a row a selection serves; 1: only its own.
    """

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self.selections = 0
        self._step: Step = Step()
        self._site = 0
        self._found: dict[tuple[str, int], _Found] = {}
        self._held: dict[torch.device, list[Tensor | int]] = {}  # key blocks that lists hold, and all that there are
        self._missed: dict[
            torch.device, list[Tensor | int]
        ] = {}  # those that the old list lacked, and all of the new one

    def begin(self, step: Step) -> None:
        """A forward of the denoiser is about to run; nothing outlives a generation."""
        if step.generation != self._step.generation:
            self._found.clear()
        self._step, self._site = step, 0

    def lists(self, make: Callable[[], BlockList], like: Hashable) -> BlockList:
        """The lists of the next site.

        Args:
            make: selects.
            like: lists kept for another `like` (shape, order) do not serve.
        """
        place, step = (self._step.branch, self._site), self._step
        self._site += 1
        found = self._found.get(place)
        if found is not None and found.like != like:
            found = None
        age = 0 if found is None else step.index - found.index
        if found is not None and found.lists is not None and 0 <= age < self.steps:
            lists = found.lists
            if age == self.steps - 1 or step.index + 1 == step.total:  # no later step asks for them
                found.lists = None
            return lists
        lists = make()
        self.count(lists, found and found.keep)
        if self.steps > 1 and step.total and step.index + 1 < step.total:
            self._found[place] = _Found(lists, lists.keep, like, step.index)
        return lists

    def count(self, lists: BlockList, old: Tensor | None = None) -> None:
        """Lists that serve from now on, and the mask of those that they replace; on the device, without waiting for it."""
        self.selections += 1
        held = lists.counts.sum()
        _add(self._held, held, lists.keep.numel())
        if old is not None:
            _add(self._missed, (lists.keep & ~old).sum(), held)

    @property
    def density(self) -> float | None:
        """The share of key blocks in all lists so far, None before the first; waits for the device."""
        return _share(self._held)

    @property
    def missed(self) -> float | None:
        """Of the key blocks that a new selection keeps, the share that the one before it lacked; None while no list was
        replaced; waits for the device."""
        return _share(self._missed)


def _add(sums: dict[torch.device, list[Tensor | int]], part: Tensor, whole: Tensor | int) -> None:
    """Sums stay on the device that they come from: a denoiser may be spread over several."""
    before = sums.get(part.device, [0, 0])
    sums[part.device] = [before[0] + part, before[1] + whole]


def _share(sums: dict[torch.device, list[Tensor | int]]) -> float | None:
    part, whole = (sum(float(each[at]) for each in sums.values()) for at in (0, 1))
    return part / whole if whole else None
