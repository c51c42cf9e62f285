"""The pooled remainder behind each kernel that walks along lists, against the fp64 oracle: in Triton's interpreter, or on the
GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE

from videoattn.kernels import block_sparse, operands, reference, remainder
from videoattn.kernels import block_sparse_reference as oracle
from videoattn.kernels.masked import attend as attend_masked
from videoattn.kernels.quantise import quantise
from videoattn.kernels.quantised import attend_quantised
from videoattn.selection.block_list import BlockList
from videoattn.testing import excess, make_qkv

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
EPS = torch.finfo(FP32).eps


def tokens_of(*live):
    return torch.tensor(live, dtype=torch.int32, device=DEVICE)


def make_lists(batch, heads, nq, live, *, block_q=64, block_k=64, density=0.5, seed=0, **options):
    """Random lists for `nq` blocks of queries; the second query block of the last row keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, nq, len(live), generator=generator) < density
    if density < 1:
        keep[-1, -1, min(1, nq - 1)] = False
    return BlockList.of(keep.to(DEVICE), tokens_of(*live), block_q, block_k, **options)


def inputs(lists, heads, head_dim, *, missing=(0, 0), **options):
    """q, k and v over the places of the lists, of which the last so many queries and keys are not there."""
    batch, _, nq, nk = lists.keep.shape
    sizes = (batch, nq * lists.block_q - missing[0], nk * lists.block_k - missing[1], heads, head_dim)
    return make_qkv(*sizes, **{"dtype": FP16, "device": DEVICE} | options)


def attend(q, k, v, lists, *, scale=None, flag=None):
    """What a backend does with the exact kernel."""
    out, lse = block_sparse.attend(q, k, v, lists, scale=scale, return_lse=True)
    remainder.add(out, lse, q, k, v, lists, scale=scale, flag=flag)
    return out, lse


def plain(q, k, v, lists, *, scale=None):
    """The oracle's formula with every intermediate rounded to the inputs' dtype: what the kernel's error is held against."""
    nk, dtype = lists.live.shape[0], q.dtype
    live, groups = lists.live.to(dtype), q.shape[2] // k.shape[2]
    pooled = [oracle.means(x, lists.live[None], lists.block_k) for x in (k, v)]
    k, v = (torch.cat([x, mean.to(dtype)], 1) for x, mean in zip((k, v), pooled, strict=True))
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    left_out = (~lists.keep & (lists.live > 0)).repeat_interleave(lists.block_q, 2)[:, :, : q.shape[2]]
    mask = torch.cat([oracle.token_mask(lists, q.shape[2], k.shape[2] - nk), left_out], -1)
    scores = (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(
        ~mask, -torch.inf
    )
    p = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    p[..., -nk:] *= live
    total = p.sum(-1, keepdim=True)
    return ((p / total.masked_fill(total == 0, 1)) @ v).transpose(1, 2)


def assert_lse(lse, exact, q, k, lists, *, scale=None):
    """As kernel_checks.assert_close_lse; half a unit in the last place of the mean key, and what passing it on rounds."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2)
    products = scale * (q.transpose(1, 2).abs().double() @ keys.abs().double().transpose(-1, -2)).amax(-1)
    units = (q.shape[-1] + 4) * products + k.shape[1] + lists.live.shape[0] + 8 + 4 * exact.abs()
    bound = units * EPS
    bound += products * (torch.finfo(q.dtype).eps / 2 + lists.block_k * EPS) + 5 * EPS  # the mean; log2 of a count
    blind = exact == -torch.inf
    assert (lse.shape, lse.dtype) == (exact.shape, FP32)
    assert torch.equal(lse == -torch.inf, blind)
    over = (lse - exact).abs()[~blind] - bound[~blind]
    assert (over <= 0).all(), f"lse is off by {over.max():.2e} more than it may be"


def check(q, k, v, lists, *, scale=None):
    """Output and log-sum-exp are the oracle's, and the flag stays down."""
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, lse = attend(q, k, v, lists, scale=scale, flag=flag)
    exact, exact_lse = oracle.attend(q, k, v, lists, scale=scale, remainder=True)
    wrong = excess(out, exact, plain(q, k, v, lists, scale=scale))
    assert wrong is None, wrong
    assert_lse(lse, exact_lse, q, k, lists, scale=scale)
    assert flag.item() == 0


# ---------------------------------------------------------------- the oracle


def test_the_oracle_is_exact_where_the_keys_of_a_block_are_alike():
    """Then a block counts as its mean does: whatever is kept, the result is that of all keys."""
    lists = make_lists(2, 2, 3, (64, 5, 0, 17))
    q, k, v = inputs(lists, 2, 16, dtype=FP32)
    k = k[:, ::64].repeat_interleave(64, 1)
    every = BlockList.of(torch.ones_like(lists.keep), lists.live, 64, 64)
    expected = reference.attend(q, k, v, mask=every.token_mask())
    for got, wanted in zip(oracle.attend(q, k, v, lists, remainder=True), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_oracle_by_hand():
    """One key block kept, of one token; one pooled, of two, whose mean key scores log 3."""
    lists = BlockList.of(torch.tensor([True, False]).view(1, 1, 1, 2), torch.tensor([1, 2], dtype=torch.int32), 64, 64)
    q, k, v = torch.zeros(1, 64, 1, 16), torch.zeros(1, 128, 1, 16), torch.zeros(1, 128, 1, 16)
    q[..., 0] = 1.0
    k[:, 64:66, :, 0] = torch.tensor([0.0, 2.0]).view(2, 1) * torch.tensor(3.0).log()
    v[:, 0], v[:, 64], v[:, 65] = 1.0, 2.0, 4.0
    out, lse = oracle.attend(q, k, v, lists, scale=1.0, remainder=True)
    torch.testing.assert_close(out, torch.full_like(out, (1 + 3 * (2 + 4)) / (1 + 2 * 3)))
    torch.testing.assert_close(lse, torch.full_like(lse, 7.0).log())


def test_the_oracle_cuts_what_lies_beyond_a_length():
    """As if the tokens were not there: a block that is cut counts those before the length."""
    lists = make_lists(2, 1, 2, (64, 64, 64), density=0.4)
    q, k, v = inputs(lists, 1, 16, dtype=FP32)
    whole = oracle.attend(q, k, v, lists, kv_len=tokens_of(192, 80), remainder=True)
    for row, there in enumerate((192, 80)):
        live = (tokens_of(there) - 64 * torch.arange(3, device=DEVICE)).clamp(0, 64).int()
        cut = BlockList.of(lists.keep[row : row + 1], live, 64, 64)
        parts = (x[row : row + 1] for x in (q, k, v))
        for got, wanted in zip(oracle.attend(*parts, cut, remainder=True), whole, strict=True):
            torch.testing.assert_close(got, wanted[row : row + 1], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- behind the exact kernel


@pytest.mark.parametrize(
    # B, H, Hkv, D, blocks of queries, tokens of the blocks of keys, block_q, block_k, places that are not there
    ("batch", "heads", "kv_heads", "head_dim", "nq", "live", "block_q", "block_k", "missing", "dtype", "layout"),
    [
        (1, 1, 1, 64, 1, (64,), 64, 64, (0, 0), FP16, "BNHD"),
        (2, 2, 2, 16, 3, (64, 64, 13), 64, 64, (63, 1), BF16, "fused"),
        (2, 2, 1, 40, 2, (64, 1, 0, 63, 24), 64, 64, (0, 40), FP16, "BHND"),
        (1, 4, 2, 64, 2, (64, 33, 64), 64, 64, (0, 0), BF16, "fused"),
        (2, 1, 1, 80, 2, (128, 77), 192, 128, (63, 1), FP16, "fused"),
        (1, 2, 1, 128, 1, (128, 0, 3), 128, 128, (10, 0), BF16, "BHND"),
        (1, 2, 2, 256, 1, (64, 31), 64, 64, (0, 0), FP16, "BHND"),
        (1, 2, 1, 40, 2, (64, 9, 0), 64, 64, (0, 0), FP32, "fused"),
    ],
)
def test_it_equals_the_oracle(
    batch, heads, kv_heads, head_dim, nq, live, block_q, block_k, missing, dtype, layout, poisoned
):
    lists = make_lists(batch, heads, nq, live, block_q=block_q, block_k=block_k)
    options = {"kv_heads": kv_heads, "missing": missing, "dtype": dtype, "layout": layout}
    check(*inputs(lists, heads, head_dim, **options), lists)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale(scale, poisoned):
    lists = make_lists(1, 2, 2, (64, 9))
    check(*inputs(lists, 2, 40), lists, scale=scale)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_densities(density, poisoned):
    """More blocks than are pooled at a time; at 0, the means alone, and at 1 what the lists hold, bit for bit."""
    lists = make_lists(1, 1, 1, (64,) * 40 + (0, 3) + (60,) * 24, density=density)
    q, k, v = inputs(lists, 1, 16)
    check(q, k, v, lists)
    if density == 1.0:
        assert torch.equal(attend(q, k, v, lists)[0], block_sparse.attend(q, k, v, lists)[0])


def test_lists_of_blocks_without_a_token(poisoned):
    """No weight at all: 0 and -inf, exactly."""
    lists = make_lists(1, 2, 2, (0, 0, 0), density=0.6)
    out, lse = attend(*inputs(lists, 2, 40), lists)
    assert not out.any() and (lse == -torch.inf).all()


def test_what_empty_places_hold_does_not_matter(poisoned):
    lists = make_lists(2, 2, 2, (64, 20, 1, 0))
    q, k, v = inputs(lists, 2, 40)
    expected = attend(q, k, v, lists)
    empty = (torch.arange(64, device=DEVICE) >= lists.live[:, None]).flatten()
    k[:, empty], v[:, empty] = 60000.0, -60000.0
    assert all(torch.equal(a, b) for a, b in zip(attend(q, k, v, lists), expected, strict=True))


def test_lists_that_rows_and_heads_share_and_others_of_any_strides(poisoned):
    lists = make_lists(1, 1, 2, (64, 20), density=0.6).expand(2, 2)
    q, k, v = inputs(lists, 2, 40, kv_heads=1)
    check(q, k, v, lists)
    expected, _ = attend(q, k, v, lists)
    keep = lists.keep.contiguous().transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.equal(attend(q, k, v, BlockList.of(keep, lists.live, 64, 64))[0], expected)


@pytest.mark.parametrize("offset", [1, 4])
def test_an_address_that_is_not_aligned(offset, poisoned):
    lists = make_lists(1, 2, 2, (64, 9))
    moved = torch.randn(1, 128, 6, 40 + offset, device=DEVICE).half()[..., offset:]
    check(*moved.split(2, dim=2), lists)


def test_values_whose_sum_fp16_cannot_hold(poisoned):
    """128 of them in a block that is pooled."""
    lists = make_lists(1, 1, 2, (128, 128), block_q=128, block_k=128, density=0.0)
    q, k, v = inputs(lists, 1, 64)
    check(q, k, (v + 20000.0).half(), lists)


def test_values_whose_sum_fp32_does_not_hold(poisoned):
    _, k, v = make_qkv(1, 128, 128, 1, 16, dtype=BF16, device=DEVICE)
    q = 8 * k  # every query has a key of its own: the weights, which are summed before they are divided, are few
    v.fill_(1e37)
    keep = torch.tensor([[True, False], [False, True]], device=DEVICE).expand(1, 1, 2, 2)
    out, _ = attend(q, k, v, BlockList.of(keep, tokens_of(64, 64), 64, 64))
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_flag_tells_of_blocks_that_are_in_no_list(value):
    keep = torch.tensor([True, False, False], device=DEVICE).expand(2, 2, 2, 3)
    lists = BlockList.of(keep, tokens_of(64, 64, 10), 64, 64)
    q, k, v = inputs(lists, 2, 40)
    v[0, 130, 1, 39] = value
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    bad = ~attend(q, k, v, lists, flag=flag)[0].isfinite()
    assert flag.item() == 1
    assert bad[0, :, 1, 39].all() and bad.sum() == 128


# ---------------------------------------------------------------- behind the quantised kernels


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "lengths", "dtype", "pv", "gaps"),
    [
        (64, 2, None, BF16, "fp8", False),
        (64, 1, None, FP16, "fp8", True),
        (40, 1, (150, 100), FP16, "16bit", False),
        (40, 2, None, BF16, "int8", True),
        (128, 1, (172, 30), BF16, "fp8", False),
    ],
)
def test_quantised(head_dim, kv_heads, lengths, dtype, pv, gaps, poisoned):
    """Keys with a common offset, which the operands lack, and so do their means. The remainder errs by no more than the
    quantised kernel does with all blocks in its lists."""
    lists = make_lists(2, 2, 2, (70 if gaps else 128, 44), block_k=128, gaps=gaps)
    every = BlockList.of(torch.ones_like(lists.keep), lists.live, 64, 128, gaps=gaps)
    kv_len = None if lengths is None else tokens_of(*lengths)
    if kv_len is not None:  # as selection has it: what begins beyond a length is in no list
        there = (torch.arange(2, device=DEVICE) * 128 < kv_len[:, None])[:, None, None]
        every, lists = (BlockList.of(x.keep & there, x.live, 64, 128) for x in (every, lists))
    q, k, v = inputs(lists, 2, head_dim, missing=(20, 84), kv_heads=kv_heads, dtype=dtype)
    k += 4 * torch.randn(head_dim, device=DEVICE).to(dtype)
    x = quantise(q, k, v, pv=pv, kv_len=kv_len, return_lse=True)
    sizes = {"head_dim": head_dim, "dtype": dtype, "kv_len": kv_len, "return_lse": True}
    errors = []
    for blocks in (every, lists):
        out, lse = attend_quantised(x, lists=blocks, **sizes)
        remainder.add_quantised(out, lse, x, blocks, kv_len=kv_len)
        exact, exact_lse = oracle.attend(q, k, v, blocks, kv_len=kv_len, remainder=True)
        assert exact_lse.isfinite().all()  # the list that keeps nothing has the means
        errors.append(((out - exact).norm() / exact.norm(), (lse - exact_lse).abs().max()))
    (dense, dense_lse), (pooled, pooled_lse) = errors
    assert pooled <= 1.5 * dense  # fewer keys average fewer errors
    assert pooled_lse <= 2 * dense_lse


@pytest.mark.parametrize(
    ("head_dim", "lengths", "pv"),
    [(40, None, "fp8"), (128, (150, 3), "fp8"), (40, (150, 3), "int8"), (64, None, "16bit")],
)
def test_means_of_quantised_operands(head_dim, lengths, pv, poisoned):
    """Of what the operands stand for, without what lies beyond a length; there, and behind a block's tokens, may be anything."""
    live, kv_len = tokens_of(128, 20), None if lengths is None else tokens_of(*lengths)
    q, k, v = make_qkv(2, 5, 158, 2, head_dim, dtype=FP16, device=DEVICE)
    x = quantise(q, k, v, pv=pv, kv_len=kv_len)
    k_means, v_means, counts = remainder.quantised_means(x, head_dim, FP16, live, kv_len)
    token = torch.arange(158, device=DEVICE)
    scale = x.k_scale[:, :, token // operands.KEYS, token % 8 // 2]
    keys = (x.k[..., :head_dim] * scale[..., None]).transpose(1, 2)
    tokens = oracle.counted(make_lists(2, 1, 1, live.tolist(), block_k=128), kv_len)
    torch.testing.assert_close(k_means.double(), oracle.means(keys, tokens, 128), rtol=1e-3, atol=1e-4)
    step = v.abs().max() * {"fp8": 2**-4, "int8": 2**-8, "16bit": 2**-11}[pv]  # half of one, of the greatest value
    assert (v_means - oracle.means(v, tokens, 128)).abs().max() <= step
    torch.testing.assert_close(counts, tokens.expand(2, 2).float().log2())
    if lengths:
        assert not k_means[1, 1].any() and not v_means[1, 1].any()


# ---------------------------------------------------------------- by torch's mask


@pytest.mark.parametrize("lengths", [None, (192, 100)])
def test_masked(lengths):
    lists = make_lists(2, 4, 3, (64, 20, 64), density=0.5)
    lists = BlockList.of(lists.keep | torch.eye(3, dtype=torch.bool, device=DEVICE), lists.live, 64, 64)
    kv_len = None if lengths is None else tokens_of(*lengths)
    q, k, v = inputs(lists, 4, 16, missing=(5, 7), kv_heads=2, dtype=FP32)
    out = attend_masked(q, k, v, scale=0.3, kv_len=kv_len, flag=None, lists=lists, remainder=True)
    exact, _ = oracle.attend(q, k, v, lists, scale=0.3, kv_len=kv_len, remainder=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- means of blocks


@pytest.mark.parametrize("layout", ["BNHD", "BHND", "fused"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, FP16), (40, BF16), (128, FP16), (80, FP32)])
@pytest.mark.parametrize(
    ("block", "live", "missing"), [(64, (64, 1, 0), 0), (128, (128, 77), 0), (64, (64, 40), 24), (128, (5,), 122)]
)
def test_means(head_dim, dtype, layout, block, live, missing, poisoned):
    """Of the tokens that are there, whatever the other places hold."""
    n = len(live) * block - missing
    _, k, v = make_qkv(2, n, n, 3, head_dim, dtype=dtype, layout=layout, device=DEVICE)
    empty = (torch.arange(block, device=DEVICE) >= tokens_of(*live)[:, None]).flatten()[:n]
    k[:, empty] = v[:, empty] = torch.nan
    of = remainder.means(k, v, tokens_of(*live), block)
    for x, mean in ((k, of.k), (v, of.v)):
        exact = oracle.means(x, tokens_of(*live)[None], block)
        greatest = x.nan_to_num().abs().double().amax()
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + greatest * (block + 2) * EPS
        bound += torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert mean.dtype == dtype and mean.shape == exact.shape
        assert ((mean - exact).abs() <= bound).all()
    torch.testing.assert_close(of.counts, tokens_of(*live).float().log2().expand(2, -1))


def test_means_up_to_a_length(poisoned):
    _, k, v = make_qkv(3, 150, 150, 2, 40, dtype=FP16, device=DEVICE)
    kv_len = tokens_of(150, 70, 64)
    for row, there in enumerate(kv_len.tolist()):
        k[row, there:] = v[row, there:] = torch.nan
    of = remainder.means(k, v, tokens_of(64, 64, 22), 64, kv_len)
    tokens = oracle.counted(make_lists(3, 1, 1, (64, 64, 22)), kv_len)
    for x, mean in ((k, of.k), (v, of.v)):
        torch.testing.assert_close(mean.double(), oracle.means(x, tokens, 64), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(of.counts, tokens.float().log2())
