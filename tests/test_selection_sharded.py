"""Shards of the context, against the rule block by block."""

import itertools

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import ORDERS, Tokens, arrange
from videoattn.selection.selector import select, selector_of
from videoattn.selection.sharded import Sharded

CPU = torch.device("cpu")
GRIDS = [(5, 4, 6), (1, 7, 9), (9, 1, 1), (3, 2, 2)]
CASES = [*((order, 8) for order in ORDERS), *((order, size) for order in ("raster", "morton") for size in (12, 4))]


def arranged(grid, order, block=8, block_q=None, **text):
    tokens = Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), **text)
    return arrange(tokens, order, CPU, block_q=block_q or block, block_k=block)


def ranges_of(arrangement, blocks):
    """Of each block of the video: its frames, rows and columns, from first to last."""
    grid, ranges = arrangement.tokens.grid, []
    for number in range(blocks.video):
        tokens = arrangement.index[number * blocks.size :][: int(blocks.live[number])]
        at = [int(token) - arrangement.tokens.before for token in tokens]
        frames = {x // (grid.height * grid.width) for x in at}
        rows = {x // grid.width % grid.height for x in at}
        columns = {x % grid.width for x in at}
        ranges.append([range(min(some), max(some) + 1) for some in (frames, rows, columns)])
    return ranges


def literal(arrangement, heads, shards, reach):
    """The rule, with the distance of boxes as the smallest of any two coordinates of theirs on each axis."""
    queries, keys = arrangement.queries, arrangement.keys
    keep = torch.zeros(1, heads, queries.count, keys.count, dtype=torch.bool)
    for head in range(heads):
        for query, of_query in enumerate(ranges_of(arrangement, queries)):
            for key, of_key in enumerate(ranges_of(arrangement, keys)):
                apart = [min(abs(a - b) for a in x for b in y) for x, y in zip(of_query, of_key, strict=True)]
                near = all(a <= r for a, r in zip(apart, reach, strict=True))
                keep[0, head, query, key] = near or (key + head) % min(shards, heads) == 0
    return keep


@pytest.mark.parametrize(("order", "block_q"), CASES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shares_are_those_of_the_rule(grid, order, block_q):
    arrangement = arranged(grid, order, block_q=block_q, before=3, after=10)
    for heads, shards, reach in [(4, 4, (1, 1, 1)), (2, 3, (0, 0, 0)), (6, 4, (2, 0, 1)), (1, 1, (0, 0, 0))]:
        keep = Sharded(shards=shards, reach=reach, order=order).keep(arrangement, heads)
        assert torch.equal(keep, literal(arrangement, heads, shards, reach))


@pytest.mark.parametrize(("order", "block_q"), CASES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("heads", "shards"), [(1, 8), (3, 8), (8, 8), (12, 5), (40, 16)])
def test_the_heads_together_see_everything(grid, order, block_q, heads, shards):
    """Also with more shards than heads, where the published rule leaves blocks that no head sees; text by what is
    required."""
    selector = Sharded(shards=shards, reach=(0, 0, 0), order=order)
    with_text = arranged(grid, order, block_q=block_q, before=3, after=10)
    assert select(selector, with_text, heads).keep.any(1).all()
    arrangement = arranged(grid, order, block_q=block_q)
    keep = selector.keep(arrangement, heads)
    assert keep.any(1).all()
    few = min(shards, heads)
    assert all(keep[0, at : at + few].any(0).all() for at in range(heads - few + 1))  # any few heads in turn do


def test_the_neighbourhood_is_that_of_the_video():
    """Touching tiles on all three axes, corners too; symmetric."""
    arrangement = arrange(
        Tokens(grid=Grid(frames=6, height=8, width=10)), "tiles", CPU, block_q=8, block_k=8, tile=(2, 2, 2)
    )
    shared = Sharded(shards=60, reach=(1, 1, 1)).keep(arrangement, 60)[0]
    near = shared.all(0)  # what all heads see
    assert torch.equal(near, near.T)
    tiles = [(t, y, x) for t in range(3) for y in range(4) for x in range(5)]
    assert near[tiles.index((1, 1, 2))].sum() == 27 and near[0].sum() == 8
    assert near[tiles.index((1, 1, 2)), tiles.index((2, 0, 3))]


def test_more_shards_keep_less_and_a_longer_reach_more():
    arrangement = arranged((5, 12, 12), "tiles", before=4)
    densities = [select(Sharded(shards=v, reach=(0, 0, 0)), arrangement, 16).density for v in (1, 2, 4, 8, 16)]
    assert densities[0] == pytest.approx(1) and all(a > b for a, b in itertools.pairwise(densities))
    masks = [Sharded(reach=(r, r, r)).keep(arrangement, 4) for r in (0, 1, 3, 5, 12)]
    assert all((a <= b).all() for a, b in itertools.pairwise(masks))
    assert masks[-1][..., :-1, :-1].all() and not masks[-1][..., -1].any()


def test_parameters():
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="Sharded.shards: wanted 1 at least"):
            Sharded(shards=wrong)
    for wrong in ((1, 1), [1, 1, 1], (-1, 0, 0), (0.5, 1, 1)):
        with pytest.raises(ValueError, match="Sharded.reach: wanted a tuple"):
            Sharded(reach=wrong)
    with pytest.raises(ValueError, match="Sharded.order: wanted one of raster, tiles, morton, got 'hilbert'"):
        Sharded(order="hilbert")
    assert selector_of("sharded", shards=2) == Sharded(shards=2) and not Sharded.dynamic
    assert hash(Sharded()) == hash(Sharded())
