"""Spatial and temporal bands, against the rule token by token; the choice between them, against softmax in fp64."""

import itertools
import math

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection import bands as module
from videoattn.selection.arrangement import ORDERS, Tokens, arrange
from videoattn.selection.bands import Bands, bands, sampled, shares
from videoattn.selection.selector import required, select, selector_of

CPU = torch.device("cpu")
GRIDS = [(6, 4, 6), (9, 5, 5), (20, 2, 3), (1, 7, 9), (12, 1, 1), (3, 2, 2)]


def arranged(grid, order="raster", block=16, block_q=None, **text):
    tokens = Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), **text)
    return arrange(tokens, order, CPU, block_q=block_q or block, block_k=block)


def qk(arrangement, batch=1, heads=4, kv_heads=None, dim=8, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    places = arrangement.index.shape[0]
    q = torch.randn(batch, places, heads, dim, generator=generator) * scale
    k = torch.randn(batch, places, kv_heads or heads, dim, generator=generator) * scale
    return q, k


def coordinates(grid):
    """Of each token: its number frame by frame, and position by position."""
    frames, area = grid[0], grid[1] * grid[2]
    tokens = list(itertools.product(range(frames), range(area)))
    return [[f * area + p for f, p in tokens], [p * frames + f for f, p in tokens]]


def of_blocks(coordinate, density, arrangement):
    """The pairs of blocks that hold the largest share of the band, the nearest of those that hold the same."""
    half = len(coordinate) * (1 - math.sqrt(1 - density))
    index = arrangement.index.tolist()
    of_queries, of_keys = (
        [
            [coordinate[token - arrangement.tokens.before] for token in index[number * blocks.size :][:live]]
            for number, live in enumerate(blocks.live[: blocks.video].tolist())
        ]
        for blocks in (arrangement.queries, arrangement.keys)
    )
    every = sum(map(len, of_queries)) * sum(map(len, of_keys))
    ranked = []
    for (query, of_query), (key, of_key) in itertools.product(enumerate(of_queries), enumerate(of_keys)):
        share = sum(abs(a - b) <= math.ceil(half) for a in of_query for b in of_key) / (len(of_query) * len(of_key))
        apart = abs(sum(of_query) / len(of_query) - sum(of_key) / len(of_key))
        ranked.append((-round(share, 9), round(apart, 4), len(of_query) * len(of_key), query, key))
    ranked.sort()
    keep = torch.zeros(arrangement.queries.count, arrangement.keys.count, dtype=torch.bool)
    covered, last = 0, None
    for *rank, pairs, query, key in ranked:
        if covered >= density * every and rank != last:
            break
        keep[query, key] = True
        covered, last = covered + pairs, rank
    return keep


def share_of_pairs(mask, arrangement):
    """The share of the pairs of tokens in blocks of the video."""
    of_q, of_k = (x.live[: x.video].double() for x in (arrangement.queries, arrangement.keys))
    return float(of_q @ mask[: len(of_q), : len(of_k)].double() @ of_k / (of_q.sum() * of_k.sum()))


@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bands_are_those_of_the_rule(grid, order, density):
    arrangement = arranged(grid, order, before=3, after=20)
    found = bands(arrangement, density)
    assert found.shape == (2, arrangement.queries.count, arrangement.keys.count) and found.dtype == torch.bool
    for mask, coordinate in zip(found, coordinates(grid), strict=True):
        assert torch.equal(mask, of_blocks(coordinate, density, arrangement))
        assert torch.equal(mask, mask.T)
        assert not arrangement.keys.video or share_of_pairs(mask, arrangement) >= density - 1e-9


@pytest.mark.parametrize("text", [{}, {"before": 3, "after": 20}], ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(24, 16), (16, 8), (8, 16), (192, 128)])
@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_two_sizes(grid, order, block_q, block_k, text):
    arrangement = arranged(grid, order, block_k, block_q, **text)
    for mask, coordinate in zip(bands(arrangement, 0.3), coordinates(grid), strict=True):
        assert torch.equal(mask, of_blocks(coordinate, 0.3, arrangement))


def test_blocks_of_one_token_are_the_bands_of_the_paper():
    """Where the width is a whole number: 12 tokens of 36 on either side cover 1 - (2 / 3)^2 of the square."""
    grid = (4, 3, 3)
    for mask, coordinate in zip(bands(arranged(grid, block=1), 1 - (2 / 3) ** 2), coordinates(grid), strict=True):
        assert torch.equal(mask, torch.tensor([[abs(a - b) <= 12 for b in coordinate] for a in coordinate]))


def test_the_first_is_near_in_time_and_the_second_near_in_place():
    arrangement = arranged((8, 4, 8), block=8)  # a block is a row of a frame: four of a frame
    spatial, temporal = bands(arrangement, 0.3)
    frames, rows = torch.arange(32) // 4, torch.arange(32) % 4
    assert (spatial >= (frames[:, None] == frames)).all()
    assert not spatial[(frames[:, None] - frames).abs() > 2].any()
    assert (temporal >= (rows[:, None] == rows)).all()
    assert not temporal[(rows[:, None] - rows).abs() > 1].any()


@pytest.mark.parametrize("order", ORDERS)
def test_at_real_size_both_cost_the_target(order):
    for block_q in {128, 128 if order == "tiles" else 192}:
        arrangement = arranged((21, 30, 52), order, block=128, block_q=block_q, after=100)
        for density in (0.1, 0.3):
            for mask in bands(arrangement, density):
                assert density <= share_of_pairs(mask, arrangement) < density + 0.02


def test_one_frame_or_one_position_is_one_band():
    for grid in ((1, 9, 9), (40, 1, 1)):
        spatial, temporal = bands(arranged(grid), 0.3)
        assert torch.equal(spatial, temporal)


@pytest.mark.parametrize(("order", "block_q"), [("tiles", 16), ("morton", 24)])
@pytest.mark.parametrize("rows", [5, 10_000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_shares_are_those_of_the_softmax(heads, kv_heads, rows, order, block_q, monkeypatch):
    arrangement = arranged((5, 3, 7), order, 16, block_q, before=2, after=9)
    q, k = qk(arrangement, 3, heads, kv_heads)
    masks = bands(arrangement, 0.3)
    live = torch.zeros(q.shape[1], dtype=torch.bool)
    live[arrangement.places] = True
    exact = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(heads // kv_heads, 2)) / 8**0.5
    mass = exact.masked_fill(~live, -torch.inf).softmax(-1)
    places = arrangement.places[2 : 2 + 5 * 3 * 7] if rows > 105 else sampled(arrangement, rows)
    of_tokens = masks.repeat_interleave(block_q, 1).repeat_interleave(16, 2)[:, : q.shape[1], : q.shape[1]]
    expected = torch.stack([(mass * mask)[:, :, places].sum(-1).mean(-1) for mask in of_tokens])
    for limit in (module.LIMIT, 1):  # all heads at once, and one by one
        monkeypatch.setattr(module, "LIMIT", limit)
        found = shares(masks, arrangement, rows, q, k)
        assert found.dtype == torch.float32 and found.shape == (2, 3, heads) and found.max() < 0.9
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text", [{}, {"before": 5, "after": 30}], ids=str)
def test_heads_get_the_band_that_they_attend_in(order, kv_heads, text):
    """Head 0 of row 0 looks along its frame, head 1 along its position; in row 1 the other way round."""
    grid = (8, 6, 6)
    arrangement = arranged(grid, order, block=16, **text)
    codes = torch.zeros(2, arrangement.tokens.count, 8 + 36)
    first = text.get("before", 0)
    for token, (frame, position) in enumerate(itertools.product(range(8), range(36)), start=first):
        codes[0, token, frame] = codes[1, token, 8 + position] = 6.0
    q = torch.stack([codes, codes.flip(0)]).movedim(1, 2)  # [B, N, H, D]
    k = codes.sum(0).expand(2, kv_heads, -1, -1).movedim(1, 2)
    q, k = arrangement.arranged(q), arrangement.arranged(k)
    selector = Bands(density=0.4, order=order)
    keep = selector.keep(arrangement, 2, q, k)
    spatial, temporal = bands(arrangement, 0.4)
    assert keep.shape == (2, 2, arrangement.queries.count, arrangement.keys.count) and not torch.equal(
        spatial, temporal
    )
    for row, head in itertools.product(range(2), repeat=2):
        assert torch.equal(keep[row, head], spatial if row == head else temporal)
    lists = select(selector, arrangement, 2, q, k)
    assert torch.equal(lists.keep, keep | required(arrangement))


def test_the_choice_is_the_larger_share_and_always_the_same():
    arrangement = arranged((6, 5, 8), after=4)
    q, k = qk(arrangement, 2, 16, 4, scale=3.0)
    selector, state = Bands(rows=20), torch.get_rng_state()
    keep = selector.keep(arrangement, 16, q, k)
    assert torch.equal(torch.get_rng_state(), state)
    spatial, temporal = shares(bands(arrangement, 0.3) | required(arrangement), arrangement, 20, q, k)
    assert 0 < (spatial >= temporal).sum() < 32
    for row, head in itertools.product(range(2), range(16)):
        mask = bands(arrangement, 0.3)[0 if spatial[row, head] >= temporal[row, head] else 1]
        assert torch.equal(keep[row, head], mask)
    arrange.cache_clear(), bands.cache_clear(), sampled.cache_clear()
    assert torch.equal(selector.keep(arranged((6, 5, 8), after=4), 16, q, k), keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selector.keep(arrangement, 16, q, k), keep)


def test_empty_places_do_not_count():
    arrangement = arranged((5, 3, 7), "tiles", after=3)
    q, k = qk(arrangement)
    empty = torch.ones(q.shape[1], dtype=torch.bool)
    empty[arrangement.places] = False
    wrong = torch.where(empty[:, None, None], 100.0, k)
    masks = bands(arrangement, 0.3)
    assert empty.any() and torch.equal(shares(masks, arrangement, 64, q, k), shares(masks, arrangement, 64, q, wrong))


def test_raster_order_holds_the_most_of_both():
    """How much of its band a mask of the same density holds; on tiles of several frames near frames are coarse."""
    held = {}
    for order in ORDERS:
        arrangement = arranged((6, 8, 16), order)
        numbers = arrangement.index
        for mask, coordinate in zip(bands(arrangement, 0.3), map(torch.tensor, coordinates((6, 8, 16))), strict=True):
            at = coordinate[numbers]
            band = (at[:, None] - at).abs() <= math.ceil(768 * (1 - math.sqrt(0.7)))
            of_tokens = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
            held.setdefault(order, []).append(float((band & of_tokens).sum() / band.sum()))
    assert min(held["raster"]) > max(min(held["tiles"]), min(held["morton"])) and min(held["raster"]) > 0.85


@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_sampled_rows_are_spread_over_the_video(rows):
    arrangement = arranged((5, 8, 10), "tiles", before=20, after=3)
    tokens = arrangement.index[sampled(arrangement, rows)] - 20
    assert tokens.unique().tolist() == sorted(tokens.tolist()) and 0 <= tokens.min() and tokens.max() < 400
    assert tokens.numel() == min(rows, 400)
    if rows == 64:
        assert (tokens % 10).bincount(minlength=10).min() >= 4  # each column, though 10 divides 400
        assert (tokens // 80).bincount(minlength=5).min() >= 12  # each frame


def test_gradients_are_not_asked_for():
    arrangement = arranged((3, 4, 4))
    q, k = (x.requires_grad_() for x in qk(arrangement))
    assert not Bands().keep(arrangement, 4, q, k).requires_grad


def test_parameters():
    for wrong in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="Bands.density: wanted a share above 0"):
            Bands(density=wrong)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="Bands.rows: wanted 1 at least"):
            Bands(rows=wrong)
    with pytest.raises(ValueError, match="Bands.order: wanted one of raster, tiles, morton, got 'hilbert'"):
        Bands(order="hilbert")
    with pytest.raises(ValueError, match="Bands: wanted q and k"):
        Bands().keep(arranged((2, 2, 2)), 1)
    assert selector_of("bands", density=0.2) == Bands(density=0.2) and Bands.dynamic
    assert hash(Bands()) == hash(Bands()) and Bands().order == "raster"
