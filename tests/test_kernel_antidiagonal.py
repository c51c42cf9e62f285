"""XAttention's estimator in Triton against plain torch: in Triton's interpreter, or on the GPU where there is one."""

import math

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE

from videoattn.call import Grid
from videoattn.kernels import antidiagonal
from videoattn.kernels.quantise import quantise
from videoattn.kernels.unquantised import LN2, unquantised
from videoattn.selection import xattention
from videoattn.selection.arrangement import Blocks, Tokens, arrange
from videoattn.testing import make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # inf - inf of NaN
FP16, BF16 = torch.float16, torch.bfloat16


def blocks_of(live, size, device=DEVICE):
    """Blocks of which `live` places are taken."""
    live = torch.tensor(live, dtype=torch.int32, device=device)
    return Blocks(size=size, live=live, video=0, boxes=torch.empty(0, 3, 2, dtype=torch.int64, device=device))


def whole(places, size):
    """Blocks without gaps; the last has what is left."""
    return blocks_of([min(size, places - at) for at in range(0, places, size)], size)


def qk(places, batch=2, heads=4, kv_heads=2, head_dim=64, dtype=BF16, layout="BNHD"):
    return make_qkv(
        batch, places, places, heads, head_dim, kv_heads=kv_heads, dtype=dtype, layout=layout, device=DEVICE
    )[:2]


def inputs(live, size, **options):
    """q and k, where groups of empty places are up to the caller, and the blocks of both."""
    return *qk(len(live) * size, **options), blocks_of(live, size)


def check(q, k, queries, keys, stride, rtol=None, **options):
    got = antidiagonal.block_mass(q, k, queries, keys, stride=stride, **options)
    expected = xattention.block_mass(q, k, queries, keys, stride=stride, **options)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=rtol or tolerance(q, k, stride, **options), atol=1e-6)


def tolerance(q, k, stride, scale=None):
    """What roundings to INT8 make of a weight: twice what they make of a score, its own and that in its row's sum.

    Numbers of a group are rounded to steps of a part in 127 of the greatest, each by half a step or less. Of numbers y
    on the other side the sum of such errors passes 4 steps |y| once in 10^13 (Hoeffding's inequality, of independent
    roundings); a group's norm is at most the greatest of a place times the root of S. 5, since the other side is
    rounded too.
    """
    q, k = q.float(), k.float()
    error = sum((x.abs().amax() / 127 * y.norm(dim=-1).amax()).item() for x, y in ((q, k), (k, q)))
    error *= 5 * abs(q.shape[3] ** -0.5 if scale is None else scale) / stride**0.5
    return 1e-4 + math.expm1(2 * error)


@pytest.mark.parametrize(
    ("live", "block", "stride", "options"),
    [
        ([64, 64, 64], 64, 16, {}),
        ([128, 126, 84, 128, 1], 128, 16, {"batch": 1, "head_dim": 128, "dtype": FP16}),
        ([64, 60, 64, 3, 17, 64, 64, 8, 9], 64, 4, {"layout": "fused", "kv_heads": 4}),  # tails of tiles
        ([48, 3, 48, 1, 48], 48, 4, {}),  # groups of which not all are there
        ([48, 3, 48], 48, 12, {"batch": 1}),  # a stride that is no power of two
        ([64, 64, 0, 0, 9], 64, 1, {"batch": 1, "heads": 1, "kv_heads": 1}),  # a tile without a key
        ([128, 128, 77], 128, 8, {"layout": "BHND", "kv_heads": 1, "dtype": FP16}),
        ([5], 64, 64, {"batch": 1, "heads": 1, "kv_heads": 1}),
        ([64] * 66, 64, 64, {"batch": 1, "heads": 2, "head_dim": 16}),  # a group a block, two tiles
        ([64, 33], 64, 1, {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 24}),
        ([128, 100], 128, 32, {"head_dim": 72}),  # two parts
        ([128, 100], 128, 16, {"batch": 1, "heads": 3, "kv_heads": 1, "head_dim": 160, "dtype": FP16}),
        ([64, 64], 64, 8, {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 256}),
    ],
    ids=str,
)
def test_it_equals_torch(live, block, stride, options, poisoned):
    q, k, blocks = inputs(live, block, **options)
    check(q, k, blocks, blocks, stride)


@pytest.mark.parametrize(
    ("places", "block_q", "block_k", "stride", "options"),
    [
        (2 * 384, 192, 128, 16, {"heads": 2, "kv_heads": 1}),
        (777, 192, 128, 16, {"heads": 2, "kv_heads": 1, "head_dim": 128}),  # the last group has 9 places of 16
        (590, 192, 128, 8, {"batch": 1, "dtype": FP16, "layout": "fused", "kv_heads": 4}),  # 24 groups
        (650, 192, 128, 4, {"heads": 2, "kv_heads": 1, "layout": "BHND"}),  # 48 and 32
        (500, 64, 192, 16, {"batch": 1}),
        (640, 128, 64, 16, {"batch": 1, "heads": 2}),
        (700, 64, 64, 16, {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 256}),
        (321, 48, 80, 16, {"batch": 1, "head_dim": 72}),
        (77, 192, 128, 16, {}),  # less than a block
        (3, 192, 128, 16, {}),  # less than a group
    ],
    ids=str,
)
def test_blocks_of_two_sizes_without_gaps(places, block_q, block_k, stride, options, poisoned):
    q, k = qk(places, **options)
    check(q, k, whole(places, block_q), whole(places, block_k), stride)


@pytest.fixture
def tuned(monkeypatch):
    """Replaces entries of the config."""

    def replace(**entries):
        config = antidiagonal.config
        monkeypatch.setattr(antidiagonal, "config", lambda capability: config(capability) | entries)
        antidiagonal._sums_plan.cache_clear()

    yield replace
    antidiagonal._sums_plan.cache_clear()


@pytest.mark.parametrize(
    "entries", [{"TMA": True}, {"M": 64, "N": 256, "BK": 128, "TMA": True}, {"M": 64, "N": 64, "TMA": False}], ids=str
)
def test_every_way_of_working(entries, tuned, poisoned):
    if DEVICE == "cuda" and entries["TMA"] and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this card")
    tuned(**entries)
    q, k = qk(1801, 1, 2, 1, 40)
    check(q, k, whole(1801, 192), whole(1801, 128), 8)


@pytest.mark.parametrize("stride", [8, 16])
def test_numbers_that_int8_holds(stride, poisoned):
    """Nothing is rounded: of each group, on its own scale, the greatest is 127 steps."""
    places = 1000
    q, k = (x.float().mul(40).round().clamp(-127, 127) for x in qk(places, 1, 4, 2))
    for x in q, k:
        x[:, ::stride, :, 7] = 127
        x *= 2.0 ** (torch.arange(places, device=DEVICE) // stride % 3)[:, None, None]
    check(q.to(BF16), k.to(BF16), whole(places, 192), whole(places, 128), stride, rtol=1e-4, scale=1e-5)


def test_nothing_beyond_the_last_place_is_read(poisoned):
    """Of 130 places the last group has 2."""
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 62), value=torch.nan)[:, :130] for x in qk(130))
    queries, keys = whole(130, 192), whole(130, 128)
    check(q, k, queries, keys, 16)
    assert antidiagonal.block_mass(q, k, queries, keys, stride=16).isfinite().all()


def test_groups_of_empty_places_may_hold_anything(poisoned):
    q, k, blocks = inputs([64, 30, 1, 64, 16], 64, heads=2, kv_heads=1)
    expected = antidiagonal.block_mass(q, k, blocks, blocks, stride=8)
    empty = (xattention.group_share(blocks, 8) == 0).repeat_interleave(8)
    for poison in (3e38, torch.inf, torch.nan):
        q[:, empty], k[:, empty] = poison, poison
        assert torch.equal(antidiagonal.block_mass(q, k, blocks, blocks, stride=8), expected)


def test_a_row_holds_its_live_queries(poisoned):
    q, k, blocks = inputs([64, 30, 1, 64, 16], 64)
    rows = antidiagonal.block_mass(q, k, blocks, blocks, stride=8).sum(-1)
    torch.testing.assert_close(rows, (blocks.live / 8).expand(2, 4, 5), rtol=1e-5, atol=0)
    q, k = qk(1001, heads=2, kv_heads=1)
    queries, keys = whole(1001, 192), whole(1001, 128)
    rows = antidiagonal.block_mass(q, k, queries, keys, stride=16).sum(-1)
    torch.testing.assert_close(rows, (queries.live / 16).expand(2, 2, 6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, -1.0])
def test_any_scale(scale, poisoned):
    q, k, blocks = inputs([64, 30, 9], 64, heads=2, kv_heads=1)
    check(q, k, blocks, blocks, 8, scale=scale)


def test_sums_beyond_half_precision(poisoned):
    """A sum over a group is far above 65504, a score is not."""
    q, k, blocks = inputs([64, 64], 64, batch=1, heads=1, kv_heads=1, dtype=FP16)
    q, k = 300 * q.sign(), 300 * torch.ones_like(k)
    q[:, :64] = 300
    assert (q[0, :16, 0].float() * k[0, :16, 0].float()).sum() > 65504
    check(q, k, blocks, blocks, 16, scale=1e-6)


def test_nan_stays_in_its_row(poisoned):
    """Of a query in its block's row, of a key in all rows of its heads."""
    q, k, blocks = inputs([64, 64, 20], 64)
    usual = antidiagonal.block_mass(q, k, blocks, blocks, stride=16)
    q[1, 70, 2, 5] = torch.nan
    got = antidiagonal.block_mass(q, k, blocks, blocks, stride=16)
    assert got[1, 2, 1].isnan().all()
    usual[1, 2, 1] = torch.nan
    assert torch.equal(got.nan_to_num(-1.0), usual.nan_to_num(-1.0))
    k[0, 3, 1, 0] = torch.nan
    got = antidiagonal.block_mass(q, k, blocks, blocks, stride=16)
    assert got[0, 2:].isnan().all() and torch.equal(got[0, :2], usual[0, :2])


def test_elements_that_do_not_lie_side_by_side(poisoned):
    q, k, blocks = inputs([64, 30], 64, heads=2)
    q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    check(q, k, blocks, blocks, 16)


@pytest.mark.parametrize(
    ("options", "block", "stride", "reason"),
    [
        ({"dtype": torch.float32}, 64, 16, "takes q and k both in fp16 or in bf16, got torch.float32"),
        ({}, 64, 12, "takes blocks of 1 to 64 whole groups, got blocks of 64 and a stride of 12"),
        ({}, 128, 1, "takes blocks of 1 to 64 whole groups, got blocks of 128 and a stride of 1"),
    ],
    ids=str,
)
def test_what_it_refuses(options, block, stride, reason):
    q, k, blocks = inputs([block, 5], block, batch=1, heads=2, **options)
    assert reason in antidiagonal.refuses(q, k, blocks, blocks, stride)
    with pytest.raises(ValueError, match="antidiagonal: takes"):
        antidiagonal.block_mass(q, k, blocks, blocks, stride=stride)


def test_either_size_is_looked_at():
    q, k = qk(192)
    for queries, keys in ((whole(192, 64), whole(192, 60)), (whole(192, 60), whole(192, 64))):
        assert "got blocks of 60 and a stride of 16" in antidiagonal.refuses(q, k, queries, keys, 16)


@pytest.mark.parametrize("sizes", [(2, 210, 2, 1, 64), (1, 200, 2, 2, 40)], ids=str)
def test_quantised_operands(sizes, poisoned):
    """As from what they stand for."""
    batch, places, heads, kv_heads, head_dim = sizes
    q, k = qk(places, batch, heads, kv_heads, head_dim)
    x = quantise(q, k, k, pv="fp8")
    queries, keys = whole(places, 192), whole(places, 128)
    got = antidiagonal.block_mass_quantised(x, head_dim, queries, keys, stride=16)
    stand_for = unquantised(x, head_dim, torch.float32)
    expected = xattention.block_mass(*stand_for, queries, keys, stride=16, scale=LN2)
    torch.testing.assert_close(got, expected, rtol=tolerance(*stand_for, 16, scale=LN2), atol=1e-6)
    with pytest.raises(ValueError, match="takes blocks of 1 to 64 whole groups"):
        antidiagonal.block_mass_quantised(x, head_dim, queries, keys, stride=24)


def test_rows_that_no_program_holds():
    many = whole(2**16 * 4, 4)
    q, k, _ = inputs([64], 64)
    assert antidiagonal.refuses(q, k, many, many, 4) == "takes at most 32768 blocks of keys, got 65536"


def test_sums_of_some_heads_at_a_time(monkeypatch, poisoned):
    q, k = qk(500, heads=2, kv_heads=1)
    queries, keys = whole(500, 64), whole(500, 64)
    expected = antidiagonal.block_mass(q, k, queries, keys, stride=16)
    monkeypatch.setattr(antidiagonal, "SUMS", 1)
    assert torch.equal(antidiagonal.block_mass(q, k, queries, keys, stride=16), expected)


def test_it_refuses_older_cards(monkeypatch):
    monkeypatch.setattr(antidiagonal, "capability_of", lambda device: 75)
    q, k, blocks = inputs([64], 64)
    assert antidiagonal.refuses(q, k, blocks, blocks, 16) == "needs an NVIDIA card of compute capability 8.0"


@pytest.mark.gpu
@pytest.mark.parametrize(("order", "block_q"), [("tiles", 128), ("raster", 192)])
@pytest.mark.parametrize(("head_dim", "stride"), [(64, 8), (128, 16)])
def test_the_selector_takes_it_on_a_gpu(head_dim, stride, order, block_q, monkeypatch):
    tokens = Tokens(grid=Grid(frames=9, height=30, width=45), after=77)
    arrangement = arrange(tokens, order, torch.device("cuda"), block_q=block_q, block_k=128)
    queries, keys = arrangement.queries, arrangement.keys
    count = arrangement.tokens.count
    q, k, _ = make_qkv(2, count, count, 4, head_dim, kv_heads=2, dtype=BF16, device="cuda")
    q, k = arrangement.arranged(q), arrangement.arranged(k)
    check(q, k, queries, keys, stride)
    monkeypatch.setattr(xattention, "block_mass", None)
    keep = xattention.XAttention(stride=stride, order=order).keep(arrangement, 4, q, k)
    assert keep.shape == (2, 4, queries.count, keys.count) and keep.any(-1).all()


@pytest.mark.gpu
def test_rows_beyond_32_bits_on_a_gpu():
    """The last head of 128: its last rows lie 2^31 elements behind the first."""
    places = 1040 * 128
    x = torch.randn(1, places, 128, 128, dtype=BF16, device="cuda")
    q, k = x[:, :, -1:], x[:, :, -2:-1]
    assert (q.shape[1] - 1) * q.stride(1) > 2**31
    check(q, k, whole(places, 192), whole(places, 128), 16)
