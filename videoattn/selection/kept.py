"""Lists that live on for some steps: what a query block attends to changes little from one step to the next (LiteAttention,
arXiv:2511.11062), so that a selection can serve more steps than its own.

Sites are known by the order in which they call within one forward of the denoiser, which is the same at every step; this
way nothing about sites has to pass through compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from videoattn.call import Step
from videoattn.selection.block_list import BlockList


@dataclass(slots=True)
class _Found:
    lists: BlockList
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
        self._held: list[Tensor | int] = [0, 0]  # key blocks that lists hold, and all that there are
        self._missed: list[Tensor | int] = [
            0,
            0,
        ]  # of a new selection those that the old one lacked, and all that it holds

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
        place = self._step.branch, self._site
        self._site += 1
        found = self._found.get(place)
        if found is not None and found.like != like:
            found = None
        if found is not None and 0 <= self._step.index - found.index < self.steps:
            return found.lists
        lists = make()
        self.count(lists, found and found.lists)
        if self.steps > 1:
            self._found[place] = _Found(lists, like, self._step.index)
        return lists

    def count(self, lists: BlockList, old: BlockList | None = None) -> None:
        """Lists that serve from now on, and those that they replace; on the device, without waiting for it."""
        self.selections += 1
        held = lists.counts.sum()
        self._held = [self._held[0] + held, self._held[1] + lists.keep.numel()]
        if old is not None:
            self._missed = [self._missed[0] + (lists.keep & ~old.keep).sum(), self._missed[1] + held]

    @property
    def density(self) -> float | None:
        """The share of key blocks in all lists so far, None before the first; waits for the device."""
        return _share(*self._held)

    @property
    def missed(self) -> float | None:
        """Of the key blocks that a new selection keeps, the share that the one before it lacked; None while no list was
        replaced; waits for the device."""
        return _share(*self._missed)


def _share(part: Tensor | int, whole: Tensor | int) -> float | None:
    return float(part) / float(whole) if float(whole) else None
