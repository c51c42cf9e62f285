"""What selectors read of quantised operands, against the same in torch."""

import math

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE

from videoattn.kernels.operands import KEYS
from videoattn.kernels.quantise import quantise
from videoattn.kernels.unquantised import LN2, block_means, unquantised
from videoattn.testing import make_qkv


def in_torch(x, head_dim):
    """q [B, N, H, D] and k [B, N, Hkv, D] in fp32, by the operands' own definition."""
    n = x.k.shape[2]
    t = torch.arange(n, device=x.k.device)
    k_scale = x.k_scale[:, :, t // KEYS, t % 8 // 2]
    q, k = x.q.float() * x.q_scale[..., None], x.k.float() * k_scale[..., None]
    return tuple(y[..., :head_dim].transpose(1, 2) for y in (q, k))


def operands(batch, q_len, kv_len, heads, head_dim, **options):
    return quantise(
        *make_qkv(batch, q_len, kv_len, heads, head_dim, dtype=torch.float16, device=DEVICE, **options), pv="fp8"
    )


@pytest.mark.parametrize("blocks", [(192, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 260, 260, 1, 64), (2, 70, 150, 2, 40), (1, 5, 3, 1, 128)], ids=str)
def test_means(sizes, blocks, poisoned):
    x = operands(*sizes)
    for got, y, block in zip(block_means(x, sizes[4], *blocks), in_torch(x, sizes[4]), blocks, strict=True):
        expected = torch.stack([part.mean(1) for part in y.double().split(block, dim=1)], dim=1)
        assert got.dtype == torch.float32 and got.shape == expected.shape
        # Sums of at most 192 terms in fp32, of which each is a product that is rounded once.
        bound = 200 * torch.finfo(torch.float32).eps * y.abs().max().item()
        assert (got - expected).abs().max() <= bound


def test_means_of_shared_heads(poisoned):
    x = operands(1, 200, 200, 4, 64, kv_heads=2)
    q_means, k_means = block_means(x, 64, 64, 64)
    assert q_means.shape == (1, 4, 4, 64) and k_means.shape == (1, 4, 2, 64)


@pytest.mark.parametrize("sizes", [(2, 70, 150, 2, 40), (1, 64, 64, 1, 128)], ids=str)
def test_rows(sizes, poisoned):
    x = operands(*sizes)
    for got, expected in zip(unquantised(x, sizes[4], torch.bfloat16), in_torch(x, sizes[4]), strict=True):
        assert torch.equal(got, expected.bfloat16()) and got.is_contiguous()


def test_their_products_are_scores_in_units_of_log2(poisoned):
    q, k, v = make_qkv(1, 130, 130, 2, 64, dtype=torch.float16, device=DEVICE)
    mine = torch.einsum(
        "bihd,bjhd->bhij", *(y.double() for y in unquantised(quantise(q, k, v, pv="fp8"), 64, torch.float32))
    )
    exact = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 64**-0.5
    p, expected = (mine * LN2).softmax(-1), exact.softmax(-1)
    assert (p - expected).norm() <= 0.02 * expected.norm()  # INT8: half a step of 1 / 127 of the greatest, 64 times
    assert (mine.softmax(-1) - expected).norm() > 0.1 * expected.norm() and math.isclose(LN2, math.log(2))
