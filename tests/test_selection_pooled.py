"""Pooled selection against its formula, block by block, on tokens that were never arranged."""

import math

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import Blocks, Tokens, arrange
from videoattn.selection.pooled import Pooled, block_means, block_scores
from videoattn.selection.selector import required, select, selector_of

CPU = torch.device("cpu")
VIDEO = Grid(frames=5, height=6, width=7)
TEXT = {"before": 5, "after": 14}


def laid_out(order="tiles", block_q=16, block_k=16, grid=VIDEO, **text):
    return arrange(Tokens(grid=grid, **text), order, CPU, block_q=block_q, block_k=block_k)


def inputs(arrangement, batch=2, heads=4, kv_heads=2, head_dim=8):
    n = arrangement.tokens.count
    return torch.randn(batch, n, heads, head_dim), torch.randn(batch, n, kv_heads, head_dim)


def groups_of(arrangement, blocks):
    """The tokens of each block."""
    return [arrangement.index[at * blocks.size :][:live] for at, live in enumerate(blocks.live.tolist())]


def literal_scores(q, k, arrangement):
    """fp64 [B, H, nq, video blocks of keys], from the tokens of each block."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    of_queries, of_keys = (groups_of(arrangement, blocks) for blocks in (arrangement.queries, arrangement.keys))
    video = arrangement.keys.video
    scores = torch.zeros(q.shape[0], q.shape[2], len(of_queries), video, dtype=torch.float64)
    for i, queries in enumerate(of_queries):
        for j, keys in enumerate(of_keys[:video]):
            scores[:, :, i, j] = (q[:, queries].mean(1) * k[:, keys].mean(1)).sum(-1) / math.sqrt(q.shape[-1])
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("order", "blocks", "grid", "text"),
    [
        ("raster", (16, 16), VIDEO, TEXT),
        ("raster", (24, 16), VIDEO, TEXT),
        ("tiles", (16, 16), VIDEO, TEXT),
        ("morton", (8, 16), VIDEO, {}),
        ("tiles", (16, 16), Grid(frames=1, height=5, width=7), {"after": 1}),
    ],
    ids=str,
)
def test_scores_are_the_formula(order, blocks, grid, text, dtype):
    """In fp32, whatever q and k are in."""
    arrangement = laid_out(order, *blocks, grid=grid, **text)
    q, k = (x.to(dtype) for x in inputs(arrangement))
    q_means = block_means(arrangement.arranged(q), arrangement.queries)
    k_means = block_means(arrangement.arranged(k), arrangement.keys)
    scores = block_scores(q_means, k_means)[..., : arrangement.keys.video]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), literal_scores(q, k, arrangement), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_of_any_number_of_live_places(dtype):
    """What was counted too often is taken away again to 2^-15 of the greatest element."""
    live = torch.arange(1, 129, dtype=torch.int32)
    x = torch.randn(1, 128, 128, 2, 4).to(dtype)
    for j in range(128):
        x[:, j, j + 1 :] = x[:, j, j : j + 1]
    means = block_means(x.flatten(1, 2), Blocks(size=128, live=live, video=0, boxes=torch.empty(0, 3, 2)))
    for j in range(128):
        exact = x[:, j, : j + 1].double().mean(1)
        assert (means[:, j] - exact).abs().max() <= 2.0**-15 * x[:, j].abs().max()


@pytest.mark.parametrize("parameters", [{"tau": 0.5}, {"density": 0.3}], ids=str)
def test_means_may_be_made_elsewhere(parameters):
    """192 queries x 128 keys; the same mask under autocast."""
    arrangement = laid_out("morton", 192, 128, Grid(frames=7, height=12, width=15), **TEXT)
    q, k = inputs(arrangement)
    of_q, of_k = arrangement.queries, arrangement.keys
    means = (
        torch.stack([x[:, group].double().mean(1).float() for group in groups_of(arrangement, blocks)], 1)
        for x, blocks in ((q, of_q), (k, of_k))
    )
    q_means, k_means = means
    assert q_means.shape[1] != k_means.shape[1]
    selector = Pooled(**parameters)
    for scale in (None, 0.7):
        keep = selector.keep_by_means(arrangement, q_means, k_means, scale)
        assert keep.shape == (2, 4, of_q.count, of_k.count)
        assert torch.equal(keep, selector.keep(arrangement, 4, *map(arrangement.arranged, (q, k)), scale))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(keep, selector.keep_by_means(arrangement, q_means, k_means, scale))
    with pytest.raises(
        ValueError, match=rf"wanted k_means fp32 of {of_k.count} blocks, got torch.float32 of {of_q.count}"
    ):
        selector.keep_by_means(arrangement, q_means, q_means)
    with pytest.raises(ValueError, match=rf"wanted q_means fp32 of {of_q.count} blocks, got torch.bfloat16"):
        selector.keep_by_means(arrangement, q_means.bfloat16(), k_means)


@pytest.mark.parametrize("parameters", [{"tau": 0.5}, {"density": 0.3}], ids=str)
@pytest.mark.filterwarnings("error")
def test_where_no_block_is_the_videos_nothing_is_judged(parameters):
    arrangement = laid_out("morton", 192, 128, Grid(frames=1, height=5, width=7), after=1)
    q, k = map(arrangement.arranged, inputs(arrangement))
    assert arrangement.keys.video == 0
    assert Pooled(**parameters).keep(arrangement, 4, q, k).tolist() == torch.zeros(2, 4, 1, 1).bool().tolist()


def test_a_block_stays_from_the_threshold_on():
    arrangement = laid_out(**TEXT)
    q, k = inputs(arrangement)
    scores = literal_scores(q, k, arrangement)
    video = arrangement.keys.video
    for tau in (-0.5, 0.0, 1.0, 1.5):
        keep = Pooled(tau=tau).keep(arrangement, 4, *map(arrangement.arranged, (q, k)))
        assert keep.shape == (2, 4, arrangement.queries.count, arrangement.keys.count) and keep.dtype == torch.bool
        assert not keep[..., video:].any()
        margin = scores - scores.mean(-1, keepdim=True) - tau * scores.std(-1, correction=0, keepdim=True)
        clear = margin.abs() > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(keep[..., :video][clear], (margin > 0)[clear])


def test_text_has_no_part_in_the_threshold():
    arrangement = laid_out(**TEXT)
    q, k = inputs(arrangement)
    expected = Pooled().keep(arrangement, 4, *map(arrangement.arranged, (q, k)))
    k[:, :5], k[:, -14:] = 1e4, torch.nan
    assert torch.equal(Pooled().keep(arrangement, 4, *map(arrangement.arranged, (q, k))), expected)


def test_planted_blocks_are_found():
    arrangement = laid_out("raster", grid=Grid(frames=8, height=8, width=8))
    n = arrangement.keys.count
    target = torch.randperm(n)
    directions = torch.nn.functional.one_hot(torch.arange(n), n).float()
    q, k = (x.repeat_interleave(16, 0)[None, :, None] for x in (directions[target], directions))
    q, k = q + torch.randn_like(q) / 16, k + torch.randn_like(k) / 16
    expected = torch.nn.functional.one_hot(target, n).bool()
    for selector in (Pooled(tau=4.0), Pooled(density=1 / n)):
        assert torch.equal(selector.keep(arrangement, 1, q, k)[0, 0], expected)


def test_more_tau_keeps_less():
    arrangement = laid_out(**TEXT)
    q, k = map(arrangement.arranged, inputs(arrangement))
    before = torch.ones(2, 4, arrangement.queries.count, arrangement.keys.count, dtype=torch.bool)
    for tau in (-2.0, -1.0, 0.0, 1.0, 2.0):
        keep = Pooled(tau=tau).keep(arrangement, 4, q, k)
        assert not (keep & ~before).any() and keep.sum() < before.sum()
        before = keep
    assert not Pooled(tau=1e6).keep(arrangement, 4, q, k).any()


@pytest.mark.parametrize("density", [0.01, 0.25, 1.0])
def test_density_keeps_the_best(density):
    arrangement = laid_out(**TEXT)
    q, k = inputs(arrangement)
    video = arrangement.keys.video
    keep = Pooled(density=density).keep(arrangement, 4, *map(arrangement.arranged, (q, k)))
    kept = keep[..., :video]
    assert (kept.sum(-1) == math.ceil(density * video)).all() and not keep[..., video:].any()
    scores = literal_scores(q, k, arrangement)
    worst, rest = scores.masked_fill(~kept, torch.inf).amin(-1), scores.masked_fill(kept, -torch.inf).amax(-1)
    assert (worst > rest - 1e-5).all()


@pytest.mark.parametrize("parameters", [{"tau": 1.0}, {"density": 0.1}], ids=str)
def test_nan_keeps_everything(parameters):
    arrangement = laid_out(**TEXT)
    video = arrangement.keys.video
    q, k = map(arrangement.arranged, inputs(arrangement))
    selector = Pooled(**parameters)
    usual = selector.keep(arrangement, 4, q, k)
    q[1, 3 * 16 + 2, 3] = torch.nan
    keep = selector.keep(arrangement, 4, q, k)
    assert keep[1, 3, 3, :video].all()
    usual[1, 3, 3] = keep[1, 3, 3]
    assert torch.equal(keep, usual)
    k[0, 7, 1, 2] = torch.nan
    keep = selector.keep(arrangement, 4, q, k)
    assert keep[0, 2:, :, :video].all() and torch.equal(keep[0, :2], usual[0, :2])


def test_one_block_is_kept():
    """Its score is the mean, and they do not scatter."""
    arrangement = laid_out("morton", grid=Grid(frames=1, height=3, width=3))
    q, k = map(arrangement.arranged, inputs(arrangement))
    assert Pooled(tau=1.0).keep(arrangement, 4, q, k).all()


def test_lists_for_the_kernel():
    arrangement = laid_out("morton", **TEXT)
    q, k = (arrangement.arranged(x).half() for x in inputs(arrangement))
    lists = select(selector_of("pooled", tau=0.5), arrangement, 4, q, k)
    assert not (required(arrangement) & ~lists.keep).any()
    assert lists.counts.shape == (2, 4, arrangement.queries.count)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tau": math.inf}, "tau: wanted a finite number, got inf"),
        ({"tau": math.nan}, "tau: wanted a finite number, got nan"),
        ({"density": 0.0}, "density: wanted a share above 0, 1 at most, got 0.0"),
        ({"density": 1.1}, "density: wanted"),
        ({"density": 0.5, "tau": 1.0}, "wanted tau or density, got tau=1.0 and density=0.5"),
        ({"order": "hilbert"}, "wanted an order of raster, tiles, morton, got 'hilbert'"),
    ],
    ids=str,
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        Pooled(**parameters)


def test_it_needs_q_and_k():
    with pytest.raises(ValueError, match="wanted q and k"):
        Pooled().keep(laid_out(), 4)


def test_plans_go_by_it():
    assert Pooled() == Pooled(tau=1.0) and hash(Pooled()) == hash(Pooled(tau=1.0))
    assert Pooled.dynamic and Pooled().order == "morton" and Pooled(density=0.2).tau is None
