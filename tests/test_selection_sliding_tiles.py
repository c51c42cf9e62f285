"""Sliding windows of tiles, against the paper's rule tile by tile."""

import itertools
import math

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.selector import select, selector_of
from videoattn.selection.sliding_tiles import SlidingTiles

CPU = torch.device("cpu")


def arranged(grid, block, tile=None, **text):
    tokens = Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), **text)
    return arrange(tokens, "tiles", CPU, block_q=block, block_k=block, tile=tile)


def video(keep, arrangement):
    return keep[..., : arrangement.queries.video, : arrangement.keys.video]


def by_the_centre(counts, widths):
    """Theirs, for odd widths up to the number of tiles: |key - clamp(query, w // 2, c - 1 - w // 2)| <= w // 2."""
    tiles = list(itertools.product(*map(range, counts)))
    return torch.tensor(
        [
            [
                all(
                    abs(b - min(max(a, w // 2), c - 1 - w // 2)) <= w // 2
                    for a, b, w, c in zip(query, key, widths, counts, strict=True)
                )
                for key in tiles
            ]
            for query in tiles
        ]
    )


@pytest.mark.parametrize("text", [{}, {"before": 5}, {"before": 2, "after": 9}], ids=str)
@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 1, 3), (1, 3, 5), (3, 3, 5)], ids=str)
def test_windows_are_those_of_the_paper(widths, text):
    tile, counts = (2, 2, 3), (4, 3, 5)
    arrangement = arranged([c * t for c, t in zip(counts, tile, strict=True)], 12, tile, **text)
    window = tuple(w * t for w, t in zip(widths, tile, strict=True))
    keep = SlidingTiles(windows=(window,)).keep(arrangement, 4)
    assert keep.shape == (1, 1, arrangement.queries.count, arrangement.keys.count) and keep.dtype == torch.bool
    assert torch.equal(video(keep, arrangement)[0, 0], by_the_centre(counts, widths))
    assert keep.sum() == video(keep, arrangement).sum()  # text is for the caller to add


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("grid", [(5, 1, 1), (1, 1, 10), (4, 6, 9)], ids=str)
def test_every_query_has_as_many_tiles_and_itself(grid, width):
    tile = (1, 2, 2)
    arrangement = arranged(grid, 4, tile)
    keep = video(SlidingTiles(windows=((width, 2 * width, 2 * width),)).keep(arrangement, 1), arrangement)[0, 0]
    counts = [math.ceil(size / step) for size, step in zip(grid, tile, strict=True)]
    assert keep.sum(-1).unique().tolist() == [math.prod(min(width, count) for count in counts)]
    assert keep.diagonal().all()


def test_a_window_at_a_border_stays_inside():
    arrangement = arranged((1, 1, 5), 1, (1, 1, 1))
    keep = SlidingTiles(windows=((1, 1, 3),)).keep(arrangement, 1)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in keep] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    keep = SlidingTiles(windows=((1, 1, 2),)).keep(arrangement, 1)[0, 0]  # even: the odd one lies before
    assert [row.nonzero().flatten().tolist() for row in keep] == [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]]


@pytest.mark.parametrize(
    ("window", "tiles"), [(1, 1), (5, 1), (6, 2), (9, 2), (10, 3), (15, 4), (16, 4), (17, 5), (99, 5)]
)
def test_windows_are_rounded_to_whole_tiles(window, tiles):
    """Five tiles of 4 on 17 columns, the last of one column: 17 rounds to 4 tiles, but it is the whole axis."""
    arrangement = arranged((1, 1, 17), 4, (1, 1, 4))
    assert SlidingTiles(windows=((1, 1, window),)).keep(arrangement, 1)[0, 0].sum(-1).unique().tolist() == [tiles]


def test_each_head_has_its_window():
    arrangement = arranged((4, 6, 6), 8, (2, 2, 2))
    windows = ((2, 2, 2), (4, 6, 6), (2, 2, 2), (2, 6, 2))
    keep = SlidingTiles(windows=windows).keep(arrangement, 4)
    assert keep.shape[:2] == (1, 4)
    for head, window in enumerate(windows):
        assert torch.equal(keep[:, head : head + 1], SlidingTiles(windows=(window,)).keep(arrangement, 4))
    assert keep[0, 0].sum() < keep[0, 3].sum() < keep[0, 1].sum() == 18**2
    with pytest.raises(ValueError, match="wanted 1 or 3, one a head, got 4"):
        SlidingTiles(windows=windows).keep(arrangement, 3)


@pytest.mark.parametrize("grid", [(21, 30, 52), (1, 45, 80), (1, 1, 1), (3, 2, 2), (13, 30, 45)], ids=str)
def test_any_grid_with_its_own_tile(grid):
    arrangement = arranged(grid, 128, before=7, after=300)
    selector = selector_of("sliding_tiles")
    lists = select(selector, arrangement, 3)
    assert lists.keep.shape == (1, 3, arrangement.queries.count, arrangement.keys.count)
    assert (lists.counts >= selector.keep(arrangement, 3).sum(-1)).all() and lists.counts.min() >= 1
    wide = SlidingTiles(windows=(grid,)).keep(arrangement, 3)
    assert video(wide, arrangement).all()


def test_wider_windows_keep_more():
    arrangement = arranged((21, 30, 52), 128)
    masks = [SlidingTiles(windows=((7 * w, 3 * w, 6 * w),)).keep(arrangement, 1) for w in range(1, 11)]
    assert all(a.sum() < b.sum() for a, b in itertools.pairwise(masks))
    # Odd widths grow on both sides, so that nothing is lost on the way.
    assert all((a <= b).all() for a, b in zip(masks[::2], masks[2::2], strict=False))


@pytest.mark.parametrize("windows", [(), [(1, 1, 1)], ((1, 1),), ((0, 1, 1),), ((1.0, 1, 1),), (1, 1, 1)], ids=str)
def test_windows_that_are_none(windows):
    with pytest.raises(ValueError, match="wanted tuples"):
        SlidingTiles(windows=windows)


def test_other_orders_have_no_tiles():
    arrangement = arrange(Tokens(grid=Grid(frames=2, height=4, width=4)), "raster", CPU, block_q=8, block_k=8)
    with pytest.raises(ValueError, match="wanted tokens in the order 'tiles', got 'raster'"):
        SlidingTiles().keep(arrangement, 1)
    assert SlidingTiles.order == "tiles" and not SlidingTiles.dynamic
    assert SlidingTiles() == selector_of("sliding_tiles") and hash(SlidingTiles()) == hash(SlidingTiles())
