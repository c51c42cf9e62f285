"""XAttention's selection against its formulas, token by token, on tokens that were never arranged."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from videoattn.call import Grid
from videoattn.selection import xattention
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.selector import required, select, selector_of
from videoattn.selection.threshold import best, by_mass, count
from videoattn.selection.xattention import XAttention, block_mass

CPU = torch.device("cpu")
VIDEO = Grid(frames=3, height=5, width=7)
TEXT = {"before": 3, "after": 6}


def laid_out(order="tiles", block_q=16, block_k=16, grid=VIDEO, **text):
    return arrange(Tokens(grid=grid, **text), order, CPU, block_q=block_q, block_k=block_k)


def mass_of(q, k, arrangement, stride, **options):
    return block_mass(q, k, arrangement.queries, arrangement.keys, stride=stride, **options)


def inputs(arrangement, batch=2, heads=4, kv_heads=2, head_dim=8, scale=1.5):
    """q and k [B, N, H, D] as they come, spread so that the softmax prefers some keys."""
    n = arrangement.tokens.count
    q, k = torch.randn(batch, n, heads, head_dim), torch.randn(batch, n, kv_heads, head_dim)
    return scale * q, scale * k


def literal_mass(q, k, arrangement, stride):
    """Block masses from the tokens of each block alone, fp64: groups without a token do not exist, missing tokens of a
    group are its last one, and a group weighs as much as it has tokens."""
    q, k = q.double(), k.double()
    (batch, _, heads, head_dim), group_heads = q.shape, q.shape[2] // k.shape[2]
    index = arrangement.index.tolist()

    def groups_of(blocks):
        """(block, tokens, share)"""
        groups = []
        for j, live in enumerate(blocks.live.tolist()):
            for at in range(0, live, stride):
                tokens = index[j * blocks.size + at :][: min(stride, live - at)]
                groups.append((j, tokens + tokens[-1:] * (stride - len(tokens)), len(tokens) / stride))
        return groups

    of_queries, of_keys = groups_of(arrangement.queries), groups_of(arrangement.keys)
    mass = torch.zeros(batch, heads, arrangement.queries.count, arrangement.keys.count, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i, queries, w_a in of_queries:
                weights = []
                for _, keys, w_b in of_keys:
                    score = 0.0
                    for s in range(stride):
                        score += float(q[b, queries[stride - 1 - s], h] @ k[b, keys[s], h // group_heads])
                    weights.append(w_b * math.exp(score / (math.sqrt(head_dim) * stride)))
                for (j, _, _), weight in zip(of_keys, weights, strict=True):
                    mass[b, h, i, j] += w_a * weight / sum(weights)
    return mass


@pytest.mark.parametrize(
    ("order", "blocks", "stride", "grid", "text"),
    [
        ("raster", (16, 16), 4, VIDEO, TEXT),
        ("raster", (24, 16), 4, VIDEO, TEXT),  # 114 tokens: the last group has 2 of 4
        ("tiles", (16, 16), 4, VIDEO, TEXT),
        ("morton", (8, 16), 8, VIDEO, {"after": 9}),
        ("morton", (24, 40), 8, VIDEO, {}),
        ("raster", (16, 16), 4, Grid(frames=1, height=5, width=7), {}),
        ("tiles", (32, 32), 2, Grid(frames=1, height=1, width=3), {}),
        ("raster", (192, 128), 16, Grid(frames=1, height=1, width=3), {"after": 2}),
        ("raster", (16, 16), 1, Grid(frames=2, height=3, width=3), {"before": 1}),
    ],
    ids=str,
)
def test_masses_are_the_formula(order, blocks, stride, grid, text):
    arrangement = laid_out(order, *blocks, grid, **text)
    q, k = inputs(arrangement, heads=2, kv_heads=1)
    mass = mass_of(arrangement.arranged(q), arrangement.arranged(k), arrangement, stride)
    torch.testing.assert_close(mass.double(), literal_mass(q, k, arrangement, stride), rtol=2e-5, atol=1e-7)


def test_it_is_the_papers_where_every_block_is_full():
    """Concatenated groups, the queries' reversed, softmax over groups, sums over blocks; heads that share keys."""
    arrangement = laid_out("raster", grid=Grid(frames=3, height=4, width=8))
    q, k = inputs(arrangement)
    stride, head_dim = 4, q.shape[-1]
    queries = torch.cat([q[:, stride - 1 - s :: stride] for s in range(stride)], dim=-1).double()
    keys = torch.cat([k[:, s::stride] for s in range(stride)], dim=-1).double().repeat_interleave(2, 2)
    weights = (torch.einsum("bahd,bchd->bhac", queries, keys) / (stride * head_dim**0.5)).softmax(-1)
    expected = weights.unflatten(-1, (-1, 4)).sum(-1).unflatten(-2, (-1, 4)).sum(-2)
    mass = mass_of(q, k, arrangement, stride)
    torch.testing.assert_close(mass.double(), expected, rtol=2e-5, atol=1e-7)


def test_without_preference_a_block_has_its_share_of_the_tokens():
    """130 tokens, 2 of them in the second block: what is missing in their group takes no mass."""
    arrangement = laid_out("raster", 128, 128, Grid(frames=1, height=10, width=13))
    q, k = torch.zeros(1, 130, 1, 8), torch.zeros(1, 130, 1, 8)
    mass = mass_of(q, k, arrangement, 16)
    torch.testing.assert_close(mass[0, 0, 0], 8 * torch.tensor([128 / 130, 2 / 130]))
    torch.testing.assert_close(mass[0, 0, 1], 2 / 16 * torch.tensor([128 / 130, 2 / 130]))


def test_groups_of_empty_places_may_hold_anything():
    arrangement = laid_out("tiles", 32, 32, Grid(frames=5, height=5, width=5), after=3)
    q, k = map(arrangement.arranged, inputs(arrangement))
    expected = mass_of(q, k, arrangement, 4)
    empty = (xattention.group_share(arrangement.keys, 4) == 0).repeat_interleave(4)
    assert empty.any()
    for poison in (1e30, torch.inf, torch.nan):
        q[:, empty], k[:, empty] = poison, poison
        assert torch.equal(mass_of(q, k, arrangement, 4), expected)


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch):
    arrangement = laid_out("raster", 16, 32, Grid(frames=9, height=16, width=16), after=5)
    q, k = map(arrangement.arranged, inputs(arrangement, batch=1, heads=2, kv_heads=1))
    groups = -(-q.shape[1] // 2)
    one_block = 2 * 8 * groups
    whole = mass_of(q, k, arrangement, 2)
    for scores in (1, 3 * one_block):
        monkeypatch.setattr(xattention, "SCORES", scores)
        with Largest() as largest:
            mass = mass_of(q, k, arrangement, 2)
        torch.testing.assert_close(mass, whole)
        assert largest.elements <= max(scores, one_block, mass.numel(), q.numel()) < groups**2


class Largest(TorchDispatchMode):
    """The greatest number of elements that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_fewest_blocks_that_hold_tau_of_the_mass():
    arrangement = laid_out(**TEXT)
    q, k = inputs(arrangement, head_dim=16)
    keep = XAttention(stride=4, tau=0.7).keep(arrangement, 4, *map(arrangement.arranged, (q, k)))
    mass = literal_mass(q, k, arrangement, 4)
    assert keep.shape == mass.shape and keep.dtype == torch.bool
    for row, kept in zip(mass.flatten(0, 2), keep.flatten(0, 2), strict=True):
        chosen, wanted = 0.0, set()
        for j in row.argsort(descending=True).tolist():
            if chosen >= 0.7 * float(row.sum()):
                break
            chosen += float(row[j])
            wanted.add(j)
        assert set(kept.nonzero().flatten().tolist()) == wanted


def test_planted_blocks_are_found():
    """Each query block looks at one other, and at one that all look at."""
    arrangement = laid_out("raster", grid=Grid(frames=4, height=4, width=8))
    n = arrangement.keys.count
    target = torch.randperm(n)
    directions = torch.nn.functional.one_hot(torch.arange(n), 16).float()
    q = directions[target] + directions[3]
    q, k = (10 * x.repeat_interleave(16, 0)[None, :, None] for x in (q, directions))
    expected = torch.nn.functional.one_hot(target, n).bool() | (torch.arange(n) == 3)
    q, k = q + 0.3 * torch.randn_like(q), k + 0.3 * torch.randn_like(k)
    assert torch.equal(XAttention(stride=8, tau=0.9).keep(arrangement, 1, q, k)[0, 0], expected)


def test_more_tau_keeps_more():
    arrangement = laid_out(**TEXT)
    q, k = map(arrangement.arranged, inputs(arrangement))
    before = torch.zeros(2, 4, arrangement.queries.count, arrangement.keys.count, dtype=torch.bool)
    for tau in (0.05, 0.3, 0.6, 0.9, 0.99, 1.0):
        keep = XAttention(stride=4, tau=tau).keep(arrangement, 4, q, k)
        assert not (before & ~keep).any() and keep.any(-1).all()
        before = keep
    assert before.all()


def test_density_keeps_so_many_of_the_videos_blocks():
    arrangement = laid_out(**TEXT)
    q, k = map(arrangement.arranged, inputs(arrangement))
    keep = XAttention(stride=4, density=0.3).keep(arrangement, 4, q, k)
    video = arrangement.keys.video
    assert (keep.sum(-1) == math.ceil(0.3 * video)).all() and not keep[..., video:].any()
    mass = mass_of(q, k, arrangement, 4)[..., :video]
    kept = keep[..., :video]
    assert (mass.masked_fill(~kept, torch.inf).amin(-1) >= mass.masked_fill(kept, -torch.inf).amax(-1)).all()


@pytest.mark.parametrize("parameters", [{"tau": 0.5}, {"density": 0.1}], ids=str)
def test_nan_keeps_everything(parameters):
    arrangement = laid_out(**TEXT)
    video = arrangement.keys.video
    q, k = map(arrangement.arranged, inputs(arrangement))
    selector = XAttention(stride=4, **parameters)
    usual = selector.keep(arrangement, 4, q, k)
    q[1, 2 * 16 + 5, 3] = torch.nan
    keep = selector.keep(arrangement, 4, q, k)
    assert keep[1, 3, 2, :video].all()
    usual[1, 3, 2] = keep[1, 3, 2]
    assert torch.equal(keep, usual)
    k[0, 7, 1] = torch.nan
    assert selector.keep(arrangement, 4, q, k)[0, 2:, :, :video].all()


def test_lists_for_the_kernel():
    """By its name, with what is required, in half precision."""
    arrangement = laid_out("raster", **TEXT)
    q, k = (arrangement.arranged(x).half() for x in inputs(arrangement))
    lists = select(selector_of("xattention", stride=4, tau=0.3), arrangement, 4, q, k)
    assert not (required(arrangement) & ~lists.keep).any()
    assert lists.counts.shape == (2, 4, arrangement.queries.count)


def test_mass_by_hand():
    mass = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 2.0, 0.0, 0.0]])
    kept = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).bool()
    assert torch.equal(by_mass(mass, 0.6), kept)
    assert torch.equal(by_mass(mass, 0.5)[0], torch.tensor([True, False, False, False]))  # 0.5 is not less than 0.5
    assert torch.equal(best(mass, 0.3)[0], torch.tensor([True, False, True, False]))


def test_counts_are_rounded_up_but_not_by_rounding():
    assert [count(0.07, 100), count(0.071, 100), count(0.001, 3), count(1.0, 7), count(0.1, 30)] == [7, 8, 1, 7, 3]
    assert count(0.5, 0) == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tau": 0.0}, "tau: wanted a share above 0, 1 at most, got 0.0"),
        ({"tau": 1.5}, "tau: wanted"),
        ({"tau": math.nan}, "tau: wanted"),
        ({"density": 0.0}, "density: wanted a share"),
        ({"density": 0.5, "tau": 0.5}, "wanted tau or density, got tau=0.5 and density=0.5"),
        ({"stride": 0}, "stride: wanted 1 or more, got 0"),
        ({"order": "hilbert"}, "wanted an order of raster, tiles, morton, got 'hilbert'"),
    ],
    ids=str,
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        XAttention(**parameters)


def test_calls_are_checked():
    arrangement = laid_out()
    with pytest.raises(ValueError, match="wanted q and k"):
        XAttention().keep(arrangement, 4)
    q, k = map(arrangement.arranged, inputs(arrangement))
    with pytest.raises(ValueError, match="wanted a stride that divides blocks of 16 and 16, got 3"):
        XAttention(stride=3).keep(arrangement, 4, q, k)


def test_plans_go_by_it():
    assert XAttention() == XAttention(tau=0.9, stride=16) and hash(XAttention()) == hash(XAttention(tau=0.9))
    assert XAttention.dynamic and XAttention().order == "raster" and XAttention(density=0.2).tau is None
