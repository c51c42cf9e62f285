"""Lists that live on from step to step."""

import pytest
import torch

from videoattn.call import Step
from videoattn.selection.block_list import BlockList
from videoattn.selection.kept import Kept


def lists_of(*kept):
    """Lists of one query block that keep these of 8 key blocks."""
    keep = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    keep[..., list(kept)] = True
    return BlockList.of(keep, torch.full((8,), 64, dtype=torch.int32), 64, 64)


class Maker:
    """Makes lists and counts how often it was asked."""

    def __init__(self):
        self.made = []

    def __call__(self):
        self.made.append(lists_of(*range(len(self.made) + 1)))
        return self.made[-1]


def forward(kept, maker, sites=2, like="shape", **step):
    kept.begin(Step(**{"total": 10} | step))
    return [kept.lists(maker, like) for _ in range(sites)]


def test_a_selection_serves_its_own_step_alone_by_default():
    kept, maker = Kept(), Maker()
    forward(kept, maker, index=0)
    forward(kept, maker, index=1)
    assert len(maker.made) == kept.selections == 4


def test_a_selection_serves_some_steps_at_its_own_site():
    kept, maker = Kept(3), Maker()
    first = forward(kept, maker, index=4)
    assert first[0] is not first[1]
    for index in (5, 6):
        assert all(a is b for a, b in zip(forward(kept, maker, index=index), first, strict=True))
    assert forward(kept, maker, index=7)[0] is maker.made[2]
    assert len(maker.made) == 4


def test_each_guidance_branch_has_its_own():
    kept, maker = Kept(5), Maker()
    a, b = (forward(kept, maker, index=0, branch=branch, sites=1)[0] for branch in "01")
    assert a is not b
    assert [forward(kept, maker, index=1, branch=branch, sites=1)[0] for branch in "01"] == [a, b]


@pytest.mark.parametrize(
    "change", [{"generation": 1}, {"like": "other"}, {"generation": 1, "index": 0}, {"index": 0}], ids=str
)
def test_nothing_outlives_a_generation_a_shape_or_a_schedule_that_begins_anew(change):
    kept, maker = Kept(5), Maker()
    forward(kept, maker, index=1)
    forward(kept, maker, **{"index": 2} | change)
    assert len(maker.made) == 4


def test_how_much_they_hold_and_what_old_ones_lack():
    kept = Kept(2)
    assert kept.density is None and kept.missed is None
    for index, keep in enumerate([(0, 1), None, (1, 2, 3, 4)]):
        kept.begin(Step(index=index, total=10))
        kept.lists(lambda keep=keep: lists_of(*keep), "shape")
    assert kept.density == 6 / 16 and kept.missed == 3 / 4
    kept.count(lists_of(0))
    assert kept.density == 7 / 24
