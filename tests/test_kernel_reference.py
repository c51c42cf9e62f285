"""The oracle against the formula written out as loops."""

import math

import pytest
import torch

from videoattn.kernels.reference import attend
from videoattn.testing import make_qkv


def loops(q, k, v, *, scale=None, kv_len=None, mask=None, causal=False):
    """Attention one score at a time, in Python's floats."""
    (b, nq, h, d), (_, nk, hkv, dv) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    mask = None if mask is None else mask.broadcast_to(b, h, nq, nk)
    out, lse = torch.zeros(b, nq, h, dv, dtype=torch.float64), torch.full((b, h, nq), -math.inf, dtype=torch.float64)
    for batch, head, i in ((x, y, z) for x in range(b) for y in range(h) for z in range(nq)):
        scores = {}
        for j in range(nk):
            if (causal and j > i) or (kv_len is not None and j >= kv_len[batch]):
                continue
            score = scale * sum(
                float(x) * float(y) for x, y in zip(q[batch, i, head], k[batch, j, head * hkv // h], strict=True)
            )
            if mask is not None and mask.dtype == torch.bool:
                if not mask[batch, head, i, j]:
                    continue
            elif mask is not None:
                score += float(mask[batch, head, i, j])
            if score > -math.inf:
                scores[j] = math.exp(score)
        total = sum(scores.values())
        for j, weight in scores.items():
            out[batch, i, head] += weight / total * v[batch, j, head * hkv // h].double()
        if total:
            lse[batch, head, i] = math.log(total)
    return out, lse


def masks(b, h, nq, nk):
    """Every broadcast, bool and additive; the last ones hide everything from some row."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((nk,), (nq, nk), (1, 1, 1, nk), (b, 1, 1, nk), (b, 1, nq, nk), (1, h, nq, nk), (b, h, nq, nk)):
        keep = torch.rand(shape, generator=generator) < 0.6
        yield keep
        yield torch.where(keep, torch.randn(shape, generator=generator), -torch.inf)
    yield torch.arange(nq)[:, None].expand(nq, nk) > 0
    yield torch.full((b, 1, 1, nk), -torch.inf)


OPTIONS = [
    {},
    {"scale": 0.3},
    {"causal": True},
    {"kv_len": torch.tensor([5, 2])},
    {"kv_len": torch.tensor([0, 4])},
    {"kv_len": torch.tensor([3, 5]), "causal": True, "scale": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_formula(options, kv_heads):
    q, k, v = make_qkv(2, 3, 5, 4, 6, kv_heads=kv_heads)
    for got, wanted in zip(attend(q, k, v, **options), loops(q, k, v, **options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mask", masks(2, 2, 3, 5), ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)}")
def test_every_mask_is_the_formula(mask):
    q, k, v = make_qkv(2, 3, 5, 2, 6)
    for got, wanted in zip(attend(q, k, v, mask=mask), loops(q, k, v, mask=mask), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_answers_in_fp64(dtype):
    q, k, v = make_qkv(1, 3, 5, 2, 6, dtype=dtype)
    out, lse = attend(q, k, v)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    assert (out.shape, lse.shape) == ((1, 3, 2, 6), (1, 2, 3))


def test_scores_may_be_huge():
    q, k, v = (1e3 * x for x in make_qkv(1, 3, 5, 2, 6))
    out, lse = attend(q, k, v)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize(("nq", "nk"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_attend_gives_zero_and_minus_infinity(nq, nk):
    out, lse = attend(*make_qkv(2, nq, nk, 2, 6))
    assert out.shape == (2, nq, 2, 6) and lse.shape == (2, 2, nq)
    assert (out == 0).all() and (nk > 0 or (lse == -torch.inf).all())


def test_strides_do_not_matter():
    results = [attend(*make_qkv(2, 5, 5, 2, 6, layout=layout)) for layout in ("BNHD", "BHND", "fused")]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
