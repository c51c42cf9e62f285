"""The kernels that leave key blocks out, on a GPU: equal to the dense kernels on the keys that a list names, bit by bit."""

from typing import get_args

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU (make test-gpu)", allow_module_level=True)

from videoattn.call import Call, Grid
from videoattn.kernels import flash_hopper, quantised_hopper, reference
from videoattn.kernels.operands import KEYS
from videoattn.kernels.quantise import quantise
from videoattn.kernels.sparse import BACKENDS
from videoattn.policy import Precision, Sparse
from videoattn.selection.arrangement import Tokens
from videoattn.selection.block_list import BlockList
from videoattn.selection.pooled import Pooled
from videoattn.selection.selector import SELECTORS, selector_of
from videoattn.testing import assert_close_to_oracle, make_qkv
from videoattn.verify import fault

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
SIZES = [(1, 700, 2, 2), (2, 1000, 4, 2), (1, 384, 1, 1), (1, 130, 2, 1)]  # B, N, H, Hkv


def lists_of(batch, n, heads, block_q, *, density=0.5, block_k=KEYS, live=None, seed=0):
    """Random lists; the last head's second query block keeps nothing."""
    nq, nk = -(-n // block_q), -(-n // block_k)
    keep = torch.rand(batch, heads, nq, nk, generator=torch.Generator().manual_seed(seed)) < density
    if density < 1:
        keep[-1, -1, min(1, nq - 1)] = False
    if live is None:
        live = torch.full((nk,), block_k, dtype=torch.int32)
        live[-1] = n - (nk - 1) * block_k
    return BlockList.of(keep.to(DEVICE), live.to(DEVICE), block_q, block_k, gaps=False)


def rows_of(lists, n):
    """(batch row, head, query rows, numbers of the key blocks) of every list."""
    for b, h, i in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)).tolist():
        kept = lists.keep[b, h, i].nonzero().flatten()
        yield b, h, slice(i * lists.block_q, min(n, (i + 1) * lists.block_q)), kept


def tokens_of(blocks, n):
    places = (blocks[:, None] * KEYS + torch.arange(KEYS, device=DEVICE)).flatten()
    return places[places < n]


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact_equals_dense_on_the_keys_of_each_list(sizes, head_dim, poisoned):
    batch, n, heads, kv_heads = sizes
    block_q = 64 * flash_hopper.config(head_dim).GROUPS
    q, k, v = make_qkv(batch, n, n, heads, head_dim, kv_heads=kv_heads, dtype=BF16, device=DEVICE)
    lists = lists_of(batch, n, heads, block_q)
    out, lse = flash_hopper.attend(q, k, v, lists=lists, return_lse=True)
    for b, h, rows, kept in rows_of(lists, n):
        if not len(kept):
            assert (out[b, rows, h] == 0).all() and (lse[b, h, rows] == -torch.inf).all()
            continue
        at, kv = tokens_of(kept, n), h // (heads // kv_heads)
        x = (q[b : b + 1, rows, h : h + 1], k[b : b + 1, at, kv : kv + 1], v[b : b + 1, at, kv : kv + 1])
        expected, expected_lse = flash_hopper.attend(*x, return_lse=True)
        assert torch.equal(out[b, rows, h], expected[0, :, 0])
        assert torch.equal(lse[b, h, rows], expected_lse[0, 0])


@hopper
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("pv", ["fp8", "16bit"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_quantised_equals_dense_on_the_keys_of_each_list(sizes, head_dim, pv, lse, poisoned):
    batch, n, heads, kv_heads = sizes
    block_q = 64 * quantised_hopper.config(head_dim, pv).GROUPS
    q, k, v = make_qkv(batch, n, n, heads, head_dim, kv_heads=kv_heads, dtype=BF16, device=DEVICE)
    x = quantise(q, k, v, pv=pv, return_lse=lse)
    lists = lists_of(batch, n, heads, block_q)
    options = {"head_dim": head_dim, "dtype": BF16, "return_lse": lse}
    out, got_lse = quantised_hopper.attend_quantised(x, lists=lists, **options)
    for b, h, rows, kept in rows_of(lists, n):
        if not len(kept):
            assert (out[b, rows, h] == 0).all()
            assert not lse or (got_lse[b, h, rows] == -torch.inf).all()
            continue
        at, kv = tokens_of(kept, n), h // (heads // kv_heads)
        one = slice(b, b + 1), slice(kv, kv + 1)
        columns = (kept[:, None] * KEYS + torch.arange(KEYS, device=DEVICE)).flatten()
        part = x._replace(
            q=x.q[b : b + 1, h : h + 1, rows].contiguous(),
            q_scale=x.q_scale[b : b + 1, h : h + 1, rows].contiguous(),
            k=x.k[one][:, :, at].contiguous(),
            k_scale=x.k_scale[one][:, :, kept].contiguous(),
            v=x.v[one][..., columns].contiguous() if pv == "fp8" else x.v[b : b + 1, at, kv : kv + 1].contiguous(),
            v_scale=x.v_scale[one].contiguous() if pv == "fp8" else None,
            lse_shift=x.lse_shift[b : b + 1, h : h + 1, rows].contiguous() if lse else None,
        )
        expected, expected_lse = quantised_hopper.attend_quantised(part, **options)
        assert torch.equal(out[b, rows, h], expected[0, :, 0])
        assert not lse or torch.equal(got_lse[b, h, rows], expected_lse[0, 0])


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_blocks_are_dense_attention(head_dim, poisoned):
    n, heads = 1000, 3
    q, k, v = make_qkv(2, n, n, heads, head_dim, dtype=BF16, device=DEVICE)
    every = lists_of(1, n, 1, 64 * flash_hopper.config(head_dim).GROUPS, density=1.0).expand(2, heads)
    assert torch.equal(flash_hopper.attend(q, k, v, lists=every)[0], flash_hopper.attend(q, k, v)[0])
    for pv in ("fp8", "16bit"):
        x, options = quantise(q, k, v, pv=pv), {"head_dim": head_dim, "dtype": BF16}
        block_q = 64 * quantised_hopper.config(head_dim, pv).GROUPS
        every = lists_of(1, n, 1, block_q, density=1.0).expand(2, heads)
        dense, _ = quantised_hopper.attend_quantised(x, **options)
        assert torch.equal(quantised_hopper.attend_quantised(x, lists=every, **options)[0], dense)


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_filled_in_part(head_dim, poisoned):
    """Square blocks; the empty places hold large numbers, which must not count."""
    n, heads = 6 * 128, 2
    live = torch.tensor([128, 100, 1, 127, 128, 64], dtype=torch.int32)
    q, k, v = make_qkv(1, n, n, heads, head_dim, dtype=BF16, device=DEVICE)
    taken = (torch.arange(128) < live[:, None]).flatten().to(DEVICE)
    k[:, ~taken], v[:, ~taken] = 5.0, 30.0
    lists = lists_of(1, n, heads, 128, live=live)
    lists = BlockList.of(lists.keep, lists.live, 128, 128, gaps=True)
    mask = lists.token_mask()
    out, _ = flash_hopper.attend(q, k, v, lists=lists)
    assert_close_to_oracle(out, q, k, v, mask=mask)
    exact, _ = reference.attend(q, k, v, mask=mask)
    for pv, bound in (("fp8", 0.06), ("16bit", 0.03)):  # 1.5 and 2.7 times what dense attention errs on normal inputs
        # With the empty places at 0 the operands are those of tokens alone, as their scales are.
        x = quantise(q, k * taken[:, None, None], v * taken[:, None, None], pv=pv)
        got, _ = quantised_hopper.attend_quantised(x, head_dim=head_dim, dtype=BF16, lists=lists)
        assert (got - exact).norm() <= bound * exact.norm()


@hopper
def test_lists_that_do_not_fit():
    q, k, v = make_qkv(1, 400, 400, 2, 128, dtype=BF16, device=DEVICE)
    with pytest.raises(ValueError, match="wanted blocks of 128 queries and 128 keys, got 64"):
        flash_hopper.attend(q, k, v, lists=lists_of(1, 400, 2, 64))
    with pytest.raises(ValueError, match=r"wanted \[B, H, nq, nk\] \(1, 2, 4, 4\)"):
        flash_hopper.attend(q, k, v, lists=lists_of(1, 300, 2, 128))
    with pytest.raises(ValueError, match="on cuda:0, got torch.int32 on cpu"):
        lists = lists_of(1, 400, 2, 128)
        flash_hopper.attend(q, k, v, lists=BlockList.of(lists.keep.cpu(), lists.live.cpu(), 128, 128))


GRIDS = [
    (Grid(frames=5, height=10, width=19), 0),
    (Grid(frames=1, height=20, width=20), 77),
    (Grid(frames=2, height=3, width=5), 8),
]


def calls(backend, order, **facts):
    for grid, text in GRIDS:
        n = grid.tokens + text
        yield Call(
            **{"kind": "full", "layout": "BNHD", "batch": 2, "q_len": n, "kv_len": n, "heads": 4, "kv_heads": 4}
            | {"head_dim": 128, "dtype": BF16, "device": torch.device("cuda", 0), "order": order}
            | {"tokens": Tokens(grid=grid, after=text)}
            | facts
        )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_check_before_the_first_call(backend, order, head_dim):
    """Random lists against the oracle: tokens in order, tokens that are moved, lengths, text."""
    for lies in {"raster", order}:
        for has_kv_len in (False, True):
            for call in calls(backend, lies, head_dim=head_dim, has_kv_len=has_kv_len):
                for precision in ("exact", "int8_qk_fp8_pv", "int8_qk_16bit_pv"):
                    for remainder in (False, True):
                        decision = Sparse(Pooled(density=0.5, order=order), precision, remainder=remainder)
                        if backend.computes(decision) and backend.refuses(call, decision) is None:
                            assert fault(backend, call, decision) is None


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_remainder_changes_what_is_left_out(backend):
    call = next(calls(backend, "morton"))
    precision = next(p for p in get_args(Precision) if backend.computes(Sparse(Pooled(density=0.3), p)))
    q, k, v = make_qkv(call.batch, call.q_len, call.kv_len, call.heads, call.head_dim, dtype=BF16, device=DEVICE)
    outs = []
    for remainder in (False, True):
        decision = Sparse(Pooled(density=0.3), precision, remainder=remainder)
        if backend.refuses(call, decision):
            pytest.skip(backend.refuses(call, decision))
        outs.append(backend.plan(call, decision)(q, k, v, None, None, None))
    exact, _ = reference.attend(q, k, v)
    assert (outs[1] - exact).norm() < (outs[0] - exact).norm()


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_selector(backend, name):
    """What a plan gives is attention to the blocks that the selector keeps, and little else than dense attention errs."""
    selector = selector_of(name, **({"density": 0.5} if name == "random" else {}))
    precision = next(p for p in ("exact", "int8_qk_fp8_pv", "int8_qk_16bit_pv", "int8_qk_int8_pv")
                     if backend.computes(Sparse(selector, p)))  # fmt: skip
    decision = Sparse(selector, precision)
    for call in calls(backend, "raster"):
        if backend.refuses(call, decision) is not None:
            continue
        q, k, v = make_qkv(call.batch, call.q_len, call.kv_len, call.heads, call.head_dim, dtype=BF16, device=DEVICE)
        out = backend.plan(call, decision)(q, k, v, None, None, None)
        assert out.shape == q.shape and out.isfinite().all()
        again = backend.plan(call, decision)(q, k, v, None, None, None)
        assert torch.equal(out, again)
        if call.q_len <= 128:  # one block: everything
            exact, _ = reference.attend(q, k, v)
            assert (out - exact).norm() <= 0.06 * exact.norm()
