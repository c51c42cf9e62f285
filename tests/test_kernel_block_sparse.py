"""The block-sparse kernel against its fp64 oracle: in Triton's interpreter, or on the GPU where there is one."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE, assert_close_lse

from videoattn.call import Grid
from videoattn.kernels import block_sparse, flash, reference
from videoattn.kernels import block_sparse_reference as oracle
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.block_list import BlockList
from videoattn.testing import assert_close_to_oracle, make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # log2(0)
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
EPS = torch.finfo(FP32).eps


def tokens_of(*live):
    return torch.tensor(live, dtype=torch.int32, device=DEVICE)


def make_lists(batch, heads, nq, live, *, block_q=64, block_k=64, density=0.5, seed=0):
    """Random lists for `nq` blocks of queries; the second query block of the last row keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, nq, len(live), generator=generator) < density
    if density < 1:
        keep[-1, -1, min(1, nq - 1)] = False
    return BlockList.of(keep.to(DEVICE), tokens_of(*live), block_q, block_k)


def inputs(lists, heads, head_dim, *, missing=(0, 0), **options):
    """q, k and v over the places of the lists, of which the last so many queries and keys are not there."""
    batch, _, nq, nk = lists.keep.shape
    sizes = (batch, nq * lists.block_q - missing[0], nk * lists.block_k - missing[1], heads, head_dim)
    return make_qkv(*sizes, **{"dtype": FP16, "device": DEVICE} | options)


def check(q, k, v, lists, *, scale=None):
    """Output and log-sum-exp are the dense oracle's under the lists' mask, and the flag stays down."""
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, lse = block_sparse.attend(q, k, v, lists, scale=scale, return_lse=True, flag=flag)
    masked = {"mask": oracle.token_mask(lists, q.shape[1], k.shape[1]), "scale": scale}
    assert_close_to_oracle(out, q, k, v, **masked)
    assert_close_lse(lse, q, k, v, **masked)
    assert out.is_contiguous()
    assert flag.item() == 0


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_oracle_without_a_remainder_is_the_dense_one_under_a_mask(scale):
    lists = make_lists(2, 4, 3, (64, 5, 0))
    q, k, v = inputs(lists, 4, 16, kv_heads=2, dtype=FP32)
    expected = reference.attend(q, k, v, mask=lists.token_mask(), scale=scale)
    for got, wanted in zip(oracle.attend(q, k, v, lists, scale=scale), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the kernel


@pytest.mark.parametrize(
    # B, H, Hkv, D, blocks of queries, tokens of the blocks of keys, block_q, block_k
    ("batch", "heads", "kv_heads", "head_dim", "nq", "live", "block_q", "block_k", "dtype", "layout"),
    [
        (1, 1, 1, 64, 1, (64,), 64, 64, FP16, "BNHD"),
        (2, 2, 2, 16, 3, (64, 64, 13), 64, 64, BF16, "fused"),
        (2, 2, 1, 40, 2, (64, 1, 0, 63, 64), 64, 64, FP16, "BHND"),
        (1, 4, 2, 64, 3, (64, 33, 64), 64, 64, BF16, "fused"),
        (2, 2, 2, 80, 2, (128, 77), 128, 128, FP16, "fused"),
        (1, 2, 1, 128, 2, (128, 0, 3), 128, 128, BF16, "BHND"),
        (2, 1, 1, 64, 2, (63, 64, 0, 7), 128, 64, FP16, "BNHD"),
        (1, 2, 2, 128, 3, (128, 65), 64, 128, BF16, "fused"),
        (2, 2, 1, 256, 1, (64, 31), 64, 64, FP16, "BHND"),
        (1, 1, 1, 112, 2, (0, 64), 64, 64, BF16, "BNHD"),
        (1, 2, 1, 40, 2, (64, 9, 0), 64, 64, FP32, "fused"),
        (1, 1, 1, 128, 1, (64, 50), 64, 64, FP32, "BHND"),
    ],
)
def test_it_equals_the_oracle(batch, heads, kv_heads, head_dim, nq, live, block_q, block_k, dtype, layout, poisoned):
    lists = make_lists(batch, heads, nq, live, block_q=block_q, block_k=block_k)
    q, k, v = inputs(lists, heads, head_dim, kv_heads=kv_heads, dtype=dtype, layout=layout)
    check(q, k, v, lists)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale(scale, poisoned):
    lists = make_lists(1, 2, 2, (64, 9))
    check(*inputs(lists, 2, 40), lists, scale=scale)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.8, 1.0])
def test_densities(density, poisoned):
    """At 0 there is nothing."""
    lists = make_lists(1, 1, 2, (64,) * 20 + (0, 3) + (60,) * 13, density=density)
    check(*inputs(lists, 1, 16), lists)


def test_a_row_without_a_key_gives_nothing(poisoned):
    lists = make_lists(1, 1, 2, (64, 64), density=0.0)
    out, lse = block_sparse.attend(*inputs(lists, 1, 16), lists, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("missing", [(63, 1), (0, 40)], ids=str)
@pytest.mark.parametrize(
    # Hkv, D, blocks of queries, blocks of keys, block_q, block_k
    ("kv_heads", "head_dim", "nq", "nk", "block_q", "block_k", "dtype", "layout"),
    [
        (2, 64, 3, 5, 64, 64, FP16, "fused"),
        (1, 40, 2, 4, 128, 64, BF16, "BHND"),
        (2, 80, 2, 3, 192, 128, FP16, "BNHD"),
        (1, 128, 1, 3, 192, 64, BF16, "fused"),
        (2, 16, 2, 1, 64, 128, FP16, "BNHD"),
        (2, 40, 2, 2, 64, 64, FP32, "fused"),
    ],
)
def test_sequences_that_end_within_a_block(
    kv_heads, head_dim, nq, nk, block_q, block_k, dtype, layout, missing, poisoned
):
    """Which is kept in some lists, and in some not; blocks before it may be filled in part."""
    live = [block_k] * nk
    live[nk // 2] = 9
    live[-1] = min(live[-1], block_k - missing[1])
    lists = make_lists(2, 2, nq, live, block_q=block_q, block_k=block_k)
    q, k, v = inputs(lists, 2, head_dim, kv_heads=kv_heads, dtype=dtype, layout=layout, missing=missing)
    check(q, k, v, lists)


@pytest.mark.parametrize("keys", [1, 7, 16, 63])
def test_fewer_keys_than_a_tile(keys, poisoned):
    lists = make_lists(1, 2, 2, (keys,), density=0.8)
    check(*inputs(lists, 2, 40, missing=(30, 64 - keys), layout="fused"), lists)


def test_what_lies_behind_the_sequences_is_neither_read_nor_written(poisoned):
    """NaN stands there, and in front of a last block what other lists name."""
    lists = make_lists(1, 2, 2, (64, 64, 20), density=1.0)
    q, k, v = inputs(lists, 2, 40)
    for x, there in ((q, 100), (k, 148), (v, 148)):
        x[:, there:] = torch.nan
    check(q[:, :100], k[:, :148], v[:, :148], lists)
    keep = torch.tensor([[False, False, True], [True, True, False]], device=DEVICE).expand(1, 2, 2, 3)
    lists = BlockList.of(keep, lists.live, 64, 64)
    out, lse = block_sparse.attend(q[:, :100], k[:, :148], v[:, :148], lists, return_lse=True)
    k[:, :128], v[:, :128] = 60000.0, -60000.0
    again, again_lse = block_sparse.attend(q[:, :100], k[:, :148], v[:, :148], lists, return_lse=True)
    assert torch.equal(out[:, :64], again[:, :64]) and torch.equal(lse[..., :64], again_lse[..., :64])


def test_blocks_without_a_token_are_as_if_they_were_not_there(poisoned):
    """Kept or not, first in a list or last: their weights are 0, and the greatest score stays.

    Compiled, though, m scale - round(m scale) is not 0 but the rounding of the product, since it is one instruction: a
    tile that leaves the greatest score as it is multiplies l and acc by up to 2^(half a unit in the last place of
    m scale). Theirs is a tile like any other in this, so that the bounds are those of the list without them; bit for bit it
    is that list's result in the interpreter.
    """
    lists = make_lists(1, 2, 2, (64, 20), density=0.6)
    empty = torch.ones(1, 2, 2, 1, dtype=torch.bool, device=DEVICE)
    more = BlockList.of(
        torch.cat([empty, lists.keep, empty, ~empty], -1), tokens_of(0, 64, 20, 0, 0), lists.block_q, lists.block_k
    )
    q, k, v = inputs(lists, 2, 40)
    others = (torch.randn(1, 64, 2, 40, device=DEVICE).half() for _ in range(6))
    more_k, more_v = (torch.cat([next(others), x, next(others), next(others)], 1) for x in (k, v))
    out, lse = block_sparse.attend(q, more_k, more_v, more, return_lse=True)
    mask = oracle.token_mask(lists, q.shape[1], k.shape[1])
    assert_close_to_oracle(out, q, k, v, mask=mask)
    assert_close_lse(lse, q, k, v, mask=mask)
    if DEVICE == "cpu":
        expected, expected_lse = block_sparse.attend(q, k, v, lists, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_lists_of_blocks_without_a_token(poisoned):
    """No weight at all: 0 and -inf, exactly."""
    lists = make_lists(1, 2, 2, (0, 0, 0), density=0.6)
    out, lse = block_sparse.attend(*inputs(lists, 2, 40), lists, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


def test_what_empty_places_hold_does_not_matter():
    lists = make_lists(2, 2, 2, (64, 20, 1, 0))
    q, k, v = inputs(lists, 2, 40)
    expected = block_sparse.attend(q, k, v, lists, return_lse=True)
    empty = (torch.arange(64, device=DEVICE) >= lists.live[:, None]).flatten()
    k[:, empty], v[:, empty] = 60000.0, -60000.0
    got = block_sparse.attend(q, k, v, lists, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_every_block_kept_is_dense_attention_bit_for_bit(head_dim, dtype, poisoned):
    """Tiles are the dense kernel's and so is their order, where blocks of 128 places hold them."""
    lists = make_lists(2, 2, 2, (128, 128), block_q=128, block_k=128, density=1.0)
    q, k, v = inputs(lists, 2, head_dim, kv_heads=1, dtype=dtype, layout="fused")
    expected = flash.attend(q, k, v, return_lse=True)
    got = block_sparse.attend(q, k, v, lists, return_lse=True)
    if DEVICE == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for x, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("order", ["raster", "tiles", "morton"])
def test_every_block_kept_is_dense_attention_in_every_order(order, poisoned):
    """An odd number of tokens with text on both sides, laid out in blocks and brought back."""
    tokens = Tokens(grid=Grid(frames=3, height=5, width=7), before=5, after=77)
    arrangement = arrange(tokens, order, torch.device(DEVICE), block_q=64, block_k=64)
    keep = torch.ones(1, 1, arrangement.queries.count, arrangement.keys.count, dtype=torch.bool, device=DEVICE)
    lists = BlockList.of(keep, arrangement.keys.live, 64, 64).expand(2, 2)
    q, k, v = make_qkv(2, tokens.count, tokens.count, 2, 64, kv_heads=1, dtype=BF16, device=DEVICE)
    out, _ = block_sparse.attend(*map(arrangement.arranged, (q, k, v)), lists)
    assert_close_to_oracle(arrangement.restored(out), q, k, v)


def test_lists_that_rows_and_heads_share(poisoned):
    shared = make_lists(1, 1, 3, (64, 20, 64), density=0.6)
    lists = shared.expand(2, 4)
    assert lists.keep.stride()[:2] == lists.indices.stride()[:2] == lists.counts.stride()[:2] == (0, 0)
    q, k, v = inputs(lists, 4, 40, kv_heads=2)
    check(q, k, v, lists)
    copied = BlockList.of(lists.keep.contiguous(), lists.live, 64, 64)
    expected, _ = block_sparse.attend(q, k, v, copied)
    assert torch.equal(block_sparse.attend(q, k, v, lists)[0], expected)


def test_lists_of_any_strides(poisoned):
    lists = make_lists(2, 2, 2, (64, 20, 64))
    odd = dataclasses.replace(
        lists,
        counts=lists.counts.transpose(0, 2).contiguous().transpose(0, 2),
        indices=lists.indices.transpose(1, 3).contiguous().transpose(1, 3),
        keep=lists.keep.transpose(0, 3).contiguous().transpose(0, 3),
        live=torch.stack([lists.live, lists.live], 1)[:, 0],
    )
    check(*inputs(lists, 2, 40), odd)


def test_what_stands_behind_a_list_does_not_matter():
    lists = make_lists(2, 2, 2, (64, 20, 64, 64))
    q, k, v = inputs(lists, 2, 40)
    behind = torch.arange(4, device=DEVICE) >= lists.counts[..., None]
    changed = dataclasses.replace(lists, indices=lists.indices.masked_fill(behind, 0))
    expected, _ = block_sparse.attend(q, k, v, lists)
    assert torch.equal(block_sparse.attend(q, k, v, changed)[0], expected)


def test_two_lists_that_share_nothing_merge_into_dense_attention(poisoned):
    """By their log-sum-exps, as a ring merges what its members computed."""
    lists = make_lists(2, 2, 2, (64, 64, 17, 64), density=0.5)
    others = BlockList.of(~lists.keep, lists.live, 64, 64)
    every = BlockList.of(torch.ones_like(lists.keep), lists.live, 64, 64)
    q, k, v = inputs(lists, 2, 64, dtype=FP32)
    parts = [block_sparse.attend(q, k, v, part, return_lse=True) for part in (lists, others)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp().transpose(1, 2)[..., None] for out, part in parts)
    assert_close_to_oracle(merged, q, k, v, mask=every.token_mask())
    assert_close_lse(lse, q, k, v, mask=every.token_mask())


def test_elements_that_do_not_lie_side_by_side(poisoned):
    lists = make_lists(1, 3, 2, (64, 9))
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(lists, 3, 40))
    assert q.stride(-1) == 3
    check(q, k, v, lists)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_address_that_is_not_aligned(offset, poisoned):
    lists = make_lists(1, 2, 2, (64, 9))
    moved = torch.randn(1, 128, 6, 40 + offset, device=DEVICE).half()[..., offset:]
    check(*moved.split(2, dim=2), lists)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_rows(value, poisoned):
    lists = make_lists(1, 2, 3, (64, 9, 64), density=0.5)
    lists = BlockList.of(lists.keep | torch.eye(3, dtype=torch.bool, device=DEVICE), lists.live, 64, 64)
    q, k, v = (torch.full_like(x, value) for x in inputs(lists, 2, 64, dtype=BF16))
    out, _ = block_sparse.attend(q, k, v, lists)
    assert torch.equal(out, v)


# ---------------------------------------------------------------- the flag


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_flag_tells_of_blocks_that_are_in_a_list(value):
    """Keys that no list names are not read."""
    keep = torch.zeros(2, 2, 2, 3, dtype=torch.bool, device=DEVICE)
    keep[..., 0] = True
    keep[1, 1, 1, 2] = True
    lists = BlockList.of(keep, tokens_of(64, 64, 10), 64, 64)
    q, k, v = inputs(lists, 2, 40)
    v[0, 130, 1, 39] = value  # in block 2, which no list of this row of the batch names

    def raised():
        flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        out, _ = block_sparse.attend(q, k, v, lists, flag=flag)
        assert flag.item() == int(not out.isfinite().all())
        return ~out.isfinite()

    assert not raised().any()
    v[1, 130, 1, 39] = value  # here one does
    bad = raised()
    assert bad[1, 64:, 1, 39].all() and bad.sum() == 64


# ---------------------------------------------------------------- refusals


def without_the_last(x, dim):
    return x.narrow(dim, 0, x.shape[dim] - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 32}, "wanted block_q 64 or 128 or 192, got 32"),
        ({"block_k": 256}, "wanted block_k 64 or 128, got 256"),
        (
            {"q": lambda x: x[0]},
            r"wanted q \[B, Pq, H, D\] and k, v \[B, Pk, Hkv, D\], none empty, got \[\(128, 4, 40\)",
        ),
        ({"q": lambda x: x[:, :0]}, r"none empty, got \[\(2, 0, 4, 40\)"),
        ({"k": lambda x: x[:1]}, r"with q's B and D, and Hkv that divides H, got q, k, v \[\(2, 128, 4, 40\), \(1, "),
        ({"v": lambda x: without_the_last(x, 1)}, r"wanted k and v \[B, Pk, Hkv, D\] .*\(2, 191, 2, 40\)\]"),
        ({"q": lambda x: without_the_last(x, 2)}, "Hkv that divides H"),
        (dict.fromkeys("qkv", lambda x: x[..., :36]), "wanted head_dim 16 to 256 in steps of 8, got 36"),
        (dict.fromkeys("qkv", lambda x: x[..., :8]), "wanted head_dim 16 to 256 in steps of 8, got 8"),
        (dict.fromkeys("qkv", torch.Tensor.double), "wanted q, k and v all in fp16, bf16 or fp32, got torch.float64"),
        ({"v": torch.Tensor.bfloat16}, "got torch.float16, torch.float16 and torch.bfloat16"),
        ({"q": lambda x: x[:, :64]}, r"wanted counts torch.int32 \(2, 4, 1\), got torch.int32 \(2, 4, 2\)"),
        (
            dict.fromkeys("kv", lambda x: x[:, :128]),
            r"wanted indices torch.int32 \(2, 4, 2, 2\), got torch.int32 \(2, 4, 2, 3\)",
        ),
        ({"counts": torch.Tensor.long}, r"wanted counts torch.int32 \(2, 4, 2\), got torch.int64 \(2, 4, 2\)"),
        ({"indices": lambda x: x[:, :1]}, r"wanted indices torch.int32 \(2, 4, 2, 3\), got torch.int32 \(2, 1, 2, 3\)"),
        ({"keep": lambda x: x[..., :2]}, r"wanted keep torch.bool \(2, 4, 2, 3\), got torch.bool \(2, 4, 2, 2\)"),
        ({"live": lambda x: x[:2]}, r"wanted live torch.int32 \(3,\), got torch.int32 \(2,\)"),
        ({"live": lambda x: x.to("meta")}, f"wanted live on q's device, {DEVICE}.*, got meta"),
        ({"v": lambda x: x.to("meta")}, f"wanted v on q's device, {DEVICE}.*, got meta"),
    ],
)
def test_refusals(change, message, monkeypatch):
    lists = make_lists(2, 4, 2, (64, 64, 10))
    tensors = dict(zip("qkv", inputs(lists, 4, 40, kv_heads=2), strict=True))
    monkeypatch.setattr(block_sparse, "_plan", None)  # nothing gets as far as a launch
    for name, by in change.items():
        if name in tensors:
            tensors[name] = by(tensors[name])
        else:
            lists = dataclasses.replace(lists, **{name: by(getattr(lists, name)) if callable(by) else by})
    with pytest.raises(ValueError, match=f"^block_sparse.attend: .*{message}"):
        block_sparse.attend(**tensors, blocks=lists)


def test_a_scale_below_zero():
    lists = make_lists(1, 1, 1, (64,))
    with pytest.raises(ValueError, match="scale: wanted 0 or more, got -0.1"):
        block_sparse.attend(*inputs(lists, 1, 16), lists, scale=-0.1)


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("block_q", [64, 128, 192])
@pytest.mark.parametrize("block_k", [64, 128])
def test_tiles_divide_blocks(capability, block_q, block_k):
    for head_dim in range(16, 257, 8):
        for itemsize in (2, 4):
            settings = block_sparse.config(head_dim, itemsize, capability, block_q, block_k)
            assert block_q % settings["M"] == block_k % settings["N"] == 0
            assert min(settings["M"], settings["N"]) >= 16
