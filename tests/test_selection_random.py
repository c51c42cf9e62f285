"""The random control: so many blocks a row, the same for the same seed, and nobody else's random numbers."""

import math

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.random import Random
from videoattn.selection.selector import required, select, selector_of


def laid_out(frames=5, block_q=16, **text):
    tokens = Tokens(grid=Grid(frames=frames, height=6, width=7), **text)
    return arrange(tokens, "raster", torch.device("cpu"), block_q=block_q, block_k=16)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("block_q", [16, 24])
@pytest.mark.parametrize("frames", [1, 5])
def test_so_many_of_the_videos_blocks(frames, block_q, density):
    arrangement = laid_out(frames, block_q, before=3, after=20)
    keep = Random(density=density).keep(arrangement, 3)
    video = arrangement.keys.video
    assert keep.shape == (1, 3, arrangement.queries.count, arrangement.keys.count) and keep.dtype == torch.bool
    assert (keep[..., :video].sum(-1) == math.ceil(density * video)).all() and not keep[..., video:].any()


def test_each_row_of_each_head_and_batch_has_its_own():
    arrangement = laid_out(20)
    q = torch.full((2, 1, 3, 8), torch.nan)  # only how many rows there are
    keep = Random(density=0.3).keep(arrangement, 3, q, q)
    assert keep.shape[:2] == (2, 3)
    rows = keep.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)


def test_every_block_is_as_likely():
    arrangement = laid_out(20)
    share = Random(density=0.25).keep(arrangement, 64).float().mean((0, 1, 2))
    n = arrangement.keys.count
    expected = math.ceil(0.25 * n) / n
    spread = math.sqrt(expected * (1 - expected) / (64 * n))
    assert ((share - expected).abs() < 5 * spread).all()


def test_the_same_seed_gives_the_same_blocks():
    arrangement = laid_out(20)
    first = Random(density=0.3, seed=7).keep(arrangement, 4)
    torch.manual_seed(1)
    assert torch.equal(Random(density=0.3, seed=7).keep(arrangement, 4), first)
    assert not torch.equal(Random(density=0.3, seed=8).keep(arrangement, 4), first)


def test_nobodys_random_state_changes():
    before = torch.get_rng_state()
    Random(density=0.3).keep(laid_out(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_lists_for_the_kernel():
    arrangement = laid_out(after=20)
    lists = select(selector_of("random", density=0.2), arrangement, 4)
    assert not (required(arrangement) & ~lists.keep).any()
    assert lists.counts.shape == (1, 4, arrangement.queries.count)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 0.0}, "density: wanted a share above 0, 1 at most, got 0.0"),
        ({"density": math.nan}, "density: wanted"),
        ({"density": 0.5, "order": "hilbert"}, "wanted an order of raster, tiles, morton, got 'hilbert'"),
    ],
    ids=str,
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        Random(**parameters)


def test_plans_go_by_it():
    assert Random(density=0.1) == Random(density=0.1, seed=0) and len({Random(density=0.1), Random(density=0.1)}) == 1
    assert not Random.dynamic and Random(density=0.1, order="tiles").order == "tiles"
