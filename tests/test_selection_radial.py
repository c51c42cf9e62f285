"""Radial windows, against the rule token by token."""

import itertools
import math

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import ORDERS, Tokens, arrange
from videoattn.selection.radial import Radial, reach
from videoattn.selection.selector import select, selector_of

CPU = torch.device("cpu")
GRIDS = [(6, 4, 6), (9, 5, 5), (20, 2, 3), (1, 7, 9), (12, 1, 1), (3, 2, 2)]


def arranged(grid, order="raster", block=16, block_q=None, **text):
    tokens = Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), **text)
    return arrange(tokens, order, CPU, block_q=block_q or block, block_k=block)


def of_the_paper(grid):
    """Their mask in four indices: frames i, j and positions k, l of s tokens."""
    frames, s = grid[0], grid[1] * grid[2]

    def seen(i, k, j, l):
        power = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
        return (power <= s and abs(k - l) + 1 <= s / power) or (
            power > s and k == l and abs(i - j) % math.ceil(power / s) == 0
        )

    tokens = list(itertools.product(range(frames), range(s)))
    return torch.tensor([[seen(*query, *key) for key in tokens] for query in tokens])


def by_the_rule(grid, block, decay_factor):
    """The same with a narrowest window of a block of keys or a frame, and the factor."""
    frames, area = grid[0], grid[1] * grid[2]
    narrowest = min(block, area)

    def seen(i, k, j, l):
        distance = abs(i - j)
        if distance <= 1:
            return True
        octave = math.floor(math.log2(distance))
        if area / 2**octave < narrowest and distance % math.ceil(narrowest * 2**octave / area) != 0:
            return False
        return abs(k - l) + 1 <= max(decay_factor * area / 2**octave, narrowest)

    tokens = list(itertools.product(range(frames), range(area)))
    return torch.tensor([[seen(*query, *key) for key in tokens] for query in tokens])


def of_blocks(mask, arrangement):
    """More than 60 % of the keys that are seen at all are seen by more than a third of the queries."""
    of_queries, of_keys = (
        [
            arrangement.index[number * blocks.size :][:live] - arrangement.tokens.before
            for number, live in enumerate(blocks.live[: blocks.video].tolist())
        ]
        for blocks in (arrangement.queries, arrangement.keys)
    )
    keep = torch.zeros(arrangement.queries.count, arrangement.keys.count, dtype=torch.bool)
    for (query, rows), (key, columns) in itertools.product(enumerate(of_queries), enumerate(of_keys)):
        share = [sum(column) / len(column) for column in mask[rows][:, columns].T.tolist()]
        seen = [x for x in share if x > 0]
        keep[query, key] = len(seen) > 0 and sum(x > 1 / 3 for x in seen) / len(seen) > 0.6
    return keep


@pytest.mark.parametrize("grid", [(9, 2, 3), (5, 3, 4), (1, 3, 3), (14, 1, 3)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_one_token_are_the_mask_of_the_paper(grid, order):
    arrangement = arranged(grid, order, block=1)
    keep = Radial(order=order).keep(arrangement, 2)
    expected = of_the_paper(grid)
    assert torch.equal(expected, expected.T)
    assert torch.equal(keep[0, 0], expected[arrangement.index][:, arrangement.index])


@pytest.mark.parametrize("decay_factor", [0.2, 0.95, 1.0, 3.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_are_those_of_the_rule(grid, order, decay_factor):
    arrangement = arranged(grid, order, before=3, after=20)
    keep = Radial(decay_factor=decay_factor, order=order).keep(arrangement, 2)
    assert keep.shape == (1, 1, arrangement.queries.count, arrangement.keys.count) and keep.dtype == torch.bool
    assert torch.equal(keep[0, 0], of_blocks(by_the_rule(grid, 16, decay_factor), arrangement))


@pytest.mark.parametrize("text", [{}, {"before": 3, "after": 20}], ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(24, 16), (16, 8), (8, 16), (192, 128)])
@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_two_sizes(grid, order, block_q, block_k, text):
    arrangement = arranged(grid, order, block_k, block_q, **text)
    keep = Radial(decay_factor=0.5, order=order).keep(arrangement, 2)
    assert torch.equal(keep[0, 0], of_blocks(by_the_rule(grid, block_k, 0.5), arrangement))


@pytest.mark.parametrize("area", [1, 5, 100, 1560, 3600])
@pytest.mark.parametrize("block", [1, 64, 128])
def test_windows_halve_as_the_distance_doubles(area, block):
    assert reach(0, area, block, 0.1) == reach(1, area, block, 0.1) == area - 1
    narrowest = min(block, area)
    for distance in range(2, 200):
        found = reach(distance, area, block, 1.0)
        octave = int(math.log2(distance))
        if area / 2**octave >= narrowest:
            assert found == area // 2**octave - 1
        else:
            assert found in (-1, narrowest - 1)
    for octave in range(1, 7):  # some frame of each octave is seen, and no more of them than the window asks for
        seen = [d for d in range(2**octave, 2 ** (octave + 1)) if reach(d, area, block, 1.0) >= 0]
        assert len(seen) >= 1
        assert len(seen) * narrowest <= area + narrowest or area / 2**octave >= narrowest


@pytest.mark.parametrize("grid", [(6, 4, 8), (8, 2, 8), (5, 4, 4)], ids=str)
def test_the_mask_is_the_same_backwards(grid):
    """Frames and positions counted from the other end: the rule knows distances only."""
    keep = Radial(decay_factor=0.5).keep(arranged(grid, block=8), 1)[0, 0]
    assert torch.equal(keep, keep.flip(0, 1))
    assert keep.diagonal().all()


def test_a_larger_factor_keeps_more():
    arrangement = arranged((16, 8, 16))
    masks = [Radial(decay_factor=factor).keep(arrangement, 1) for factor in (0.1, 0.3, 0.5, 1.0, 2.0)]
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(counts) and counts[0] < counts[3] < counts[4]


def test_one_frame_and_frames_next_to_one_another_are_dense():
    for grid in ((1, 9, 9), (2, 9, 9)):
        assert Radial(decay_factor=0.1).keep(arranged(grid), 1).all()


def test_a_change_of_resolution_changes_the_mask():
    selector = Radial(decay_factor=0.4)
    same_count = [(8, 4, 8), (4, 8, 8), (8, 8, 4)]
    masks = [selector.keep(arranged(grid), 1) for grid in same_count]
    assert not torch.equal(masks[0], masks[1]) and torch.equal(
        masks[0], masks[2]
    )  # 2 is 0 but for the shape of a frame
    for grid, mask in zip(same_count, masks, strict=True):
        arrange.cache_clear()
        assert torch.equal(selector.keep(arranged(grid), 1), mask)


@pytest.mark.parametrize("order", ORDERS)
def test_real_size(order):
    arrangement = arranged((21, 30, 52), order, block=128)
    sparse, dense = (select(Radial(decay_factor=f, order=order), arrangement, 40).density for f in (0.2, 1.0))
    assert 0.2 < sparse < dense < 0.8


def test_parameters():
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="Radial.decay_factor: wanted a number above 0"):
            Radial(decay_factor=wrong)
    with pytest.raises(ValueError, match="Radial.order: wanted one of raster, tiles, morton, got 'hilbert'"):
        Radial(order="hilbert")
    assert selector_of("radial", decay_factor=0.2) == Radial(decay_factor=0.2) and not Radial.dynamic
    assert hash(Radial()) == hash(Radial()) and Radial().order == "raster"
