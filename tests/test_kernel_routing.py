"""From scores or masks to lists: the kernel against the same in torch."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE

from videoattn.kernels import routing
from videoattn.selection.block_list import BlockList
from videoattn.selection.threshold import best

BLOCKS = {"block_q": 192, "block_k": 128}
SIZES = [(2, 3, 5, 9, 9), (1, 2, 4, 300, 297), (1, 1, 1, 1, 1)]  # B, H, nq, nk, nv


def problem(batch, heads, nq, nk, nv):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, heads, nq, nv, generator=generator).to(DEVICE)
    required = (torch.rand(nq, nk, generator=generator) < 0.1).to(DEVICE)
    required[:, nv:] = True
    live = torch.full((nk,), 128, dtype=torch.int32, device=DEVICE)
    return scores, required, live


def assert_same(got, keep, live):
    expected = BlockList.of(keep.contiguous(), live, **BLOCKS)
    assert torch.equal(got.keep, expected.keep)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)


def widened(keep, required):
    return torch.nn.functional.pad(keep, (0, required.shape[1] - keep.shape[-1])) | required


@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0, 50.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_above(sizes, tau, poisoned):
    scores, required, live = problem(*sizes)
    got = routing.lists(scores, required, live, **BLOCKS, batch=sizes[0], heads=sizes[1], rule="above", tau=tau)
    std, mean = torch.std_mean(scores.double(), dim=-1, correction=0, keepdim=True)
    off = (scores.double() - mean - tau * std).abs()
    assert sizes[4] == 1 or off.min() > 1e-5, "no score may lie on the threshold, where fp32 decides"
    if sizes[4] > 1:
        assert_same(got, widened(scores >= mean + tau * std, required), live)


@pytest.mark.parametrize("density", [0.05, 0.35, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_best(sizes, density, poisoned):
    scores, required, live = problem(*sizes)
    count = max(1, round(density * sizes[4]))
    got = routing.lists(scores, required, live, **BLOCKS, batch=sizes[0], heads=sizes[1], rule="best", count=count)
    assert_same(got, widened(best(scores, count / sizes[4]), required), live)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_of_one_sign_and_of_extremes(sign, poisoned):
    scores, required, live = problem(1, 2, 4, 40, 40)
    scores = sign * scores.abs()
    scores[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    got = routing.lists(scores, required, live, **BLOCKS, batch=1, heads=2, rule="best", count=7)
    assert_same(got, widened(best(scores, 7 / 40), required), live)


def test_what_equals_the_last_stays(poisoned):
    scores, required, live = problem(1, 1, 1, 8, 8)
    got = routing.lists(torch.zeros_like(scores), required, live, **BLOCKS, batch=1, heads=1, rule="best", count=2)
    assert got.keep.all() and got.counts.item() == 8


@pytest.mark.parametrize("rule", ["above", "best"])
def test_a_row_with_nan_keeps_everything(rule, poisoned):
    scores, required, live = problem(1, 2, 3, 20, 20)
    scores[0, 1, 2, 7] = torch.nan
    got = routing.lists(scores, required, live, **BLOCKS, batch=1, heads=2, rule=rule, tau=9.0, count=1)
    assert got.counts[0, 1, 2] == 20 and got.counts[0, 1, 1] < 20


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 3), (2, 1)], ids=str)
def test_masks_and_lengths(shape, poisoned):
    _, required, live = problem(2, 3, 5, 9, 9)
    mask = (torch.rand(*shape, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.4).to(DEVICE)
    kv_len = torch.tensor([0, 513], dtype=torch.int32, device=DEVICE)
    got = routing.lists(mask, required, live, **BLOCKS, batch=2, heads=3, kv_len=kv_len)
    inside = torch.arange(9, device=DEVICE) * 128 < kv_len[:, None, None, None]
    assert_same(got, (mask | required).expand(2, 3, 5, 9) & inside, live)
    assert (got.counts[0] == 0).all()


def test_more_blocks_than_a_program_holds():
    many = routing.MOST_BLOCKS + 1
    required = torch.zeros(1, many, dtype=torch.bool, device=DEVICE)
    live = torch.full((many,), 128, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="at most 8192"):
        routing.lists(required[None, None], required, live, **BLOCKS, batch=1, heads=1)
