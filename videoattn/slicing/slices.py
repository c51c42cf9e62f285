"""How a group of operators is cut, and the loop that runs it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Part = Callable[[int, int], Tensor]
"""(start, stop) -> what the group makes of these rows, in any layout of one shape."""


Range = tuple[int, int]
"""start and stop of a slice."""


ALIGNED = 8


def ranges(size: int, count: int) -> Iterator[Range]:
    """`size` rows in `count` slices as even as can be, the longer ones first; fewer slices where there are fewer rows. Where
    there are many, they begin at multiples of `ALIGNED`, as loads of 16 bytes want it.

    >>> list(ranges(7, 3)), list(ranges(2, 5))
    ([(0, 3), (3, 5), (5, 7)], [(0, 1), (1, 2)])
    """
    unit = ALIGNED if size % ALIGNED == 0 and size >= ALIGNED**2 * count else 1
    count = max(1, min(size, count))
    short, longer = divmod(size // unit, count)
    start = 0
    for index in range(count):
        stop = start + unit * (short + (index < longer))
        yield start, stop
        start = stop


def sliced(part: Part, size: int, slices: Sequence[Range], *, dim: int = 0, out: Tensor | None = None) -> Tensor:
    """The group's output, slice by slice.

    Args:
        part: computes some rows. size: how many there are. slices: of them; with a single one `part` runs once on all, and what
            it returns is returned.
        dim: along which its outputs lie side by side.
        out: where they go; may be what `part` reads, if no slice reads another's rows. Made after the first slice where None.
    """
    if len(slices) <= 1 and out is None:
        return part(0, size)
    for start, stop in slices:
        made = part(start, stop)
        if out is None:
            shape = (*made.shape[:dim], size, *made.shape[dim + 1 :])
            out = torch.empty(shape, dtype=made.dtype, device=made.device, memory_format=_format(made, shape))
        out.narrow(dim, start, stop - start).copy_(made)
        del made  # before the next slice is computed
    return out


def _format(made: Tensor, shape: tuple[int, ...]) -> torch.memory_format:
    """Images stay channels-last where the host made them so."""
    if len(shape) == 4 and not made.is_contiguous() and made.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class Groups:
    """The groups of one module, and into how many slices each is cut.

    Args:
        names: of the groups, in the order in which they run.
    """

    REHEARSED = 2  # slices of a forecast: the first makes room for the output, and those behind the second are like it

    def __init__(self, *names: str) -> None:
        self.counts = dict.fromkeys(names, 1)
        self.sizes: dict[str, int] = {}  # rows of each, as last run
        self.gives = self.takes = None  # a handover.Handover to the next module, or from the one before
        self.around: Callable[[str], contextlib.AbstractContextManager] | None = None  # each group, in a forecast

    def run(self, name: str, part: Part, size: int, *, dim: int = 0, out: Tensor | None = None) -> Tensor:
        """`sliced`, by the count of the group `name`."""
        slices = self.ranges(name, size)
        with self.within(name):
            return sliced(part, size, slices, dim=dim, out=out)

    def ranges(self, name: str, size: int) -> list[Range]:
        """The slices alone, for a group whose slices write into several tensors."""
        self.sizes[name] = size
        slices = ranges(size, self.counts[name])
        return list(slices if self.around is None else itertools.islice(slices, self.REHEARSED))

    def within(self, name: str) -> contextlib.AbstractContextManager:
        """Around what belongs to a group, and is not run by `run`."""
        return _NOTHING if self.around is None else self.around(name)


_NOTHING = contextlib.nullcontext()
