"""The share of exact attention that a mask keeps, against softmax over the tokens as they came."""

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection import recall as module
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.pooled import Pooled
from videoattn.selection.random import Random
from videoattn.selection.recall import block_mass, recall


def laid_out(order="tiles", frames=5, block_q=16, **text):
    tokens = Tokens(grid=Grid(frames=frames, height=6, width=7), **text)
    return arrange(tokens, order, torch.device("cpu"), block_q=block_q, block_k=16)


def mask_of(arrangement, batch=1, heads=1, share=0.4):
    return torch.rand(batch, heads, arrangement.queries.count, arrangement.keys.count) < share


def inputs(arrangement, batch=2, heads=4, kv_heads=2, head_dim=8):
    n = arrangement.tokens.count
    return 1.5 * torch.randn(batch, n, heads, head_dim), 1.5 * torch.randn(batch, n, kv_heads, head_dim)


def kept_mass(q, k, keep, arrangement):
    """fp64 [B, H, N]: of each token as a query, in the tokens' own order."""
    k = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    p = (torch.einsum("bihd,bjhd->bhij", q.double(), k) * q.shape[-1] ** -0.5).softmax(-1)
    queries, keys = (arrangement.places // blocks.size for blocks in (arrangement.queries, arrangement.keys))
    pairs = keep.expand(*p.shape[:2], -1, -1)[:, :, queries][..., keys]
    return (p * pairs).sum(-1)


@pytest.mark.parametrize(
    ("order", "block_q"), [("raster", 16), ("raster", 24), ("tiles", 16), ("morton", 8), ("morton", 192)]
)
@pytest.mark.parametrize("frames", [1, 5])
def test_it_is_the_mass_of_softmax(order, block_q, frames):
    """Odd sizes, shared keys, text on both sides, empty places."""
    arrangement = laid_out(order, frames, block_q, before=3, after=9)
    q, k = inputs(arrangement)
    for keep in (mask_of(arrangement, 2, 4), mask_of(arrangement)):
        got = recall(*map(arrangement.arranged, (q, k)), keep, arrangement)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), kept_mass(q, k, keep, arrangement).mean(-1), rtol=1e-5, atol=0)


def test_sampled_rows_are_rows():
    """Taken alone or together: the mean of those that were drawn, by their seed."""
    arrangement = laid_out(after=9)
    q, k = inputs(arrangement)
    keep = mask_of(arrangement, 2, 4)
    arranged = [arrangement.arranged(x) for x in (q, k)]
    mass = kept_mass(q, k, keep, arrangement)
    single = {seed: recall(*arranged, keep, arrangement, rows=1, seed=seed).double() for seed in range(5)}
    for got in single.values():
        assert ((mass - got[..., None]).abs() < 1e-5).all((0, 1)).sum() == 1
    assert len({float(got[0, 0]) for got in single.values()}) > 1
    some = recall(*arranged, keep, arrangement, rows=100)
    assert torch.equal(some, recall(*arranged, keep, arrangement, rows=100))
    assert ((some - mass.mean(-1)).abs() < 5 * mass.std(-1) / 10).all()
    every = recall(*arranged, keep, arrangement)
    assert torch.equal(recall(*arranged, keep, arrangement, rows=10**6), every)


def test_empty_places_may_hold_anything():
    arrangement = laid_out()
    q, k = map(arrangement.arranged, inputs(arrangement))
    keep = mask_of(arrangement)
    expected = recall(q, k, keep, arrangement)
    empty = torch.ones(q.shape[1], dtype=torch.bool)
    empty[arrangement.places] = False
    assert empty.any()
    q[:, empty], k[:, empty] = torch.nan, torch.nan
    assert torch.equal(recall(q, k, keep, arrangement), expected)


def test_everything_nothing_and_two_halves():
    arrangement = laid_out(before=3)
    q, k = map(arrangement.arranged, inputs(arrangement))
    torch.testing.assert_close(recall(q, k, mask_of(arrangement, share=1.0), arrangement), torch.ones(2, 4))
    assert not recall(q, k, mask_of(arrangement, share=0.0), arrangement).any()
    half = mask_of(arrangement, 2, 4)
    both = recall(q, k, half, arrangement) + recall(q, k, ~half, arrangement)
    torch.testing.assert_close(both, torch.ones(2, 4))


def test_scale_is_that_of_the_call():
    """At 0 every key counts the same: the share of the tokens."""
    arrangement = laid_out(after=9)
    q, k = map(arrangement.arranged, inputs(arrangement))
    keep = mask_of(arrangement)
    live = arrangement.keys.live.double()
    expected = (live @ keep[0, 0].double() @ live) / live.sum() ** 2
    torch.testing.assert_close(
        recall(q, k, keep, arrangement, scale=0.0).double(), expected.expand(2, 4), rtol=1e-5, atol=0
    )


def test_chunks_change_nothing(monkeypatch):
    arrangement = laid_out()
    q, k = map(arrangement.arranged, inputs(arrangement))
    keep = mask_of(arrangement)
    whole = recall(q, k, keep, arrangement)
    for scores in (1, 7 * 2 * q.shape[1]):
        monkeypatch.setattr(module, "SCORES", scores)
        torch.testing.assert_close(recall(q, k, keep, arrangement), whole)


def test_a_selector_that_looks_beats_the_control():
    arrangement = laid_out("tiles")
    n = arrangement.keys.count
    direction = torch.nn.functional.one_hot(torch.arange(n), n).float().repeat_interleave(16, 0)[None, :, None]
    q, k = 4 * direction + torch.randn(1, n * 16, 2, n), 4 * direction + torch.randn(1, n * 16, 2, n)
    q, k = (arrangement.arranged(arrangement.restored(x)) for x in (q, k))
    looks = recall(q, k, Pooled(density=0.2).keep(arrangement, 2, q, k), arrangement)
    control = recall(q, k, Random(density=0.2).keep(arrangement, 2), arrangement)
    assert (looks > control + 0.2).all()


def test_rows_are_checked():
    arrangement = laid_out()
    q, k = map(arrangement.arranged, inputs(arrangement))
    with pytest.raises(ValueError, match="wanted one row at least, got 0"):
        recall(q, k, mask_of(arrangement), arrangement, rows=0)


@pytest.mark.parametrize(("order", "block_q"), [("tiles", 16), ("raster", 24), ("morton", 8)])
@pytest.mark.parametrize("rows", [None, 1, 50])
def test_the_mass_of_blocks_is_what_masks_keep_of_it(order, block_q, rows):
    arrangement = laid_out(order, block_q=block_q, before=3, after=9)
    q, k = map(arrangement.arranged, inputs(arrangement))
    mass = block_mass(q, k, arrangement, rows=rows, seed=3)
    assert mass.shape == (2, 4, arrangement.queries.count, arrangement.keys.count) and mass.dtype == torch.float32
    assert (mass >= 0).all()
    torch.testing.assert_close(mass.sum((-1, -2)), torch.ones(2, 4))
    for keep in (mask_of(arrangement, 2, 4), mask_of(arrangement)):
        expected = recall(q, k, keep, arrangement, rows=rows, seed=3)
        torch.testing.assert_close((mass * keep).sum((-1, -2)), expected)


def test_the_mass_of_blocks_knows_scale_and_no_chunks(monkeypatch):
    arrangement = laid_out()
    q, k = map(arrangement.arranged, inputs(arrangement))
    live = arrangement.keys.live.float()
    expected = (live[:, None] * live / live.sum() ** 2).expand(2, 4, -1, -1)
    for scores in (module.SCORES, 1):
        monkeypatch.setattr(module, "SCORES", scores)
        torch.testing.assert_close(block_mass(q, k, arrangement, scale=0.0), expected)
    with pytest.raises(ValueError, match="wanted one row at least, got 0"):
        block_mass(q, k, arrangement, rows=0)
