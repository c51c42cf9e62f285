"""The I/O model's figures are those that were worked out by hand, lie between the bounds, and follow the kernels' tiles."""

import itertools
from dataclasses import replace

import pytest
import torch

from videoattn.backend import backends
from videoattn.call import Call
from videoattn.profiling import io_model
from videoattn.profiling.io_model import Tiling
from videoattn.profiling.profile import AttentionCall, Ceilings

CPU = torch.device("cpu")
H100 = Ceilings(flops={}, copy_bandwidth=3e12, l2_bytes=50 * 2**20, sm_count=132, sm_bytes=228 * 1024)
CUT = Tiling(block_m=128, block_n=64)
WAN, HUNYUAN, SVD = (1, 1, 32760, 128), (1, 1, 118800, 128), (1, 1, 9216, 64)  # batch, heads, tokens, head_dim
LONG = (
    (2, 12, 32760, 128),
    (1, 40, 75600, 128),
    (2, 48, 17776, 64),
    (50, 5, 9216, 64),
    (32, 8, 4096, 40),
    (1, 1, 9216, 256),
)


def call(batch, heads, q_len, head_dim, kv_len=None, kv_heads=None, dtype=torch.bfloat16, **facts):
    kv_len, kv_heads = kv_len or q_len, kv_heads or heads
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len}
    facts = {"kind": "full", "layout": "BNHD", "device": CPU, **facts}
    return Call(**sizes, head_dim=head_dim, dtype=dtype, **facts)


def kernel(name):
    return next(backend for backend in backends() if backend.name == name)


@pytest.mark.parametrize(
    ("sizes", "tiled", "unfused", "trivial"),
    [(WAN, 4.311e9, 8.619e9, 33.546e6), (HUNYUAN, 56.568e9, 113.03e9, 121.65e6), (SVD, 0.17223e9, 0.68420e9, 4.7186e6)],
)
def test_worked_values(sizes, tiled, unfused, trivial):
    one = call(*sizes)
    assert io_model.model(one, CUT, H100).sm_bytes == pytest.approx(tiled, rel=1e-3)
    assert io_model.unfused_bytes(one) == pytest.approx(unfused, rel=1e-3)
    assert io_model.trivial_bytes(one) == pytest.approx(trivial, rel=1e-3)


def test_wan_moves_22_times_the_least_between_an_sm_and_l2():
    words, d, pairs = 116_736, 128, 32_760**2
    least = io_model.lower_bound(call(*WAN), H100.sm_bytes)
    assert least == pytest.approx(2 * (pairs * d * d / (words + 4 * d * d) - words), rel=1e-6)
    assert io_model.model(call(*WAN), CUT, H100).sm_bytes / least == pytest.approx(22.4, abs=0.1)


@pytest.mark.parametrize("lse", [False, True])
def test_temporal_attention_moves_what_it_must_and_no_more(lse):
    """14 frames of head_dim 64: the log-sum-exp adds 0.8 %."""
    temporal = call(18432, 5, 14, 64)
    io = io_model.model(temporal, Tiling(block_m=16, block_n=16, lse=lse), H100)
    trivial = io_model.trivial_bytes(temporal)
    assert io.sm_bound == io.hbm_bound == trivial == 18432 * 5 * 14 * 64 * 4 * 2
    assert io.sm_bytes == io.hbm_bytes == trivial + lse * 18432 * 5 * 14 * 4
    assert io.hbm_bytes / trivial == pytest.approx(1.008 if lse else 1.0, abs=5e-4)


@pytest.mark.parametrize("sizes", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_m", [64, 128, 192])
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_the_least_the_tiling_and_unfused_attention_are_in_this_order(sizes, dtype, block_m, density):
    long = call(*sizes, dtype=dtype)
    io = io_model.model(long, Tiling(block_m=block_m, block_n=64, resident=2), H100, density=density)
    trivial = io_model.trivial_bytes(long)
    assert trivial <= io.sm_bound <= io.sm_bytes
    assert trivial <= io.hbm_bound <= io.hbm_bytes <= io.sm_bytes
    if block_m >= sizes[-1] / 2:  # two heads of k and v a tile, against two tiles of scores written and read
        assert io.sm_bytes <= io_model.unfused_bytes(long)


@pytest.mark.parametrize("head_dim", [40, 128, 512])
def test_more_memory_never_means_more_bytes(head_dim):
    long = call(2, 4, 9216, head_dim)
    around = head_dim**2 * 2  # bytes at which the regimes meet
    sizes = sorted({2**power for power in range(8, 31)} | {around - 2, around, around + 2})
    least = [io_model.lower_bound(long, size) for size in sizes]
    assert least == sorted(least, reverse=True) and least[0] > 10 * least[-1]
    chips = [replace(H100, l2_bytes=size) for size in sizes]
    moved = [io_model.model(long, CUT, chip).hbm_bytes for chip in chips]
    assert moved == sorted(moved, reverse=True) and moved[0] > moved[-1]
    by_tile = [io_model.model(long, Tiling(block_m=m, block_n=64), H100).sm_bytes for m in (16, 64, 128, 256)]
    assert by_tile == sorted(by_tile, reverse=True) and by_tile[0] > 10 * by_tile[-1]


def test_memories_side_by_side_may_start_filled():
    one, all_of_them = (io_model.lower_bound(call(*WAN), H100.sm_bytes, units=units) for units in (1, 132))
    assert one - all_of_them == 131 * H100.sm_bytes


@pytest.mark.parametrize(
    ("head_dim", "dtype", "regime"),
    [
        (64, torch.bfloat16, "large cache"),
        (128, torch.float32, "large cache"),
        (256, torch.bfloat16, "large cache"),
        (256, torch.float32, "small cache"),
        (512, torch.bfloat16, "small cache"),  # attention in the middle of a VAE
    ],
)
def test_which_regime(head_dim, dtype, regime):
    assert io_model.model(call(1, 1, 9216, head_dim, dtype=dtype), CUT, H100).regime == regime


@pytest.mark.parametrize("q_tiles", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("wave", [1, 2, 4, 6, 9])
@pytest.mark.parametrize("heads", [1, 4, 11])
def test_each_wave_reads_its_heads_once_where_l2_holds_none(q_tiles, wave, heads):
    """Against waves that are played through."""
    one = call(1, heads, 16 * q_tiles, 16)
    chip = replace(H100, l2_bytes=16, sm_count=wave)
    order = [head for head in range(heads) for _ in range(q_tiles)]
    waves = [order[start : start + wave] for start in range(0, len(order), wave)]
    readings = sum(len(set(heads_of_wave)) for heads_of_wave in waves)
    q = heads * 16 * q_tiles * 16 * 2
    io = io_model.model(one, Tiling(block_m=16, block_n=16), chip)
    assert io.hbm_bytes == pytest.approx(2 * q + readings * 2 * q / heads, abs=1)


def test_where_the_heads_at_work_fit_into_half_of_l2_each_byte_moves_once():
    ltx = call(8, 32, 7392, 64)
    cut = Tiling(block_m=192, block_n=128)
    # 132 programs touch 5 heads at the most (39 tiles each), and have 132 tiles of q and out
    at_work = 5 * 2 * 7392 * 128 + 132 * 2 * 192 * 128
    fits, not_quite = (replace(H100, l2_bytes=2 * at_work + extra) for extra in (0, -2))
    assert io_model.model(ltx, cut, fits).hbm_bytes == io_model.trivial_bytes(ltx)
    assert io_model.model(ltx, cut, not_quite).hbm_bytes > io_model.trivial_bytes(ltx)
    assert io_model.model(call(1, 40, 75600, 128), cut, H100).hbm_bytes > 2 * io_model.trivial_bytes(
        call(1, 40, 75600, 128)
    )


def test_heads_that_share_keys_read_them_each_into_an_sm_but_once_from_memory():
    shared, own = call(1, 8, 4096, 64, kv_heads=2), call(1, 8, 4096, 64)
    q = 8 * 4096 * 128
    assert io_model.trivial_bytes(shared) == 2 * q + 2 * q // 4
    with_shared, with_own = (io_model.model(one, CUT, H100) for one in (shared, own))
    assert with_shared.sm_bytes == with_own.sm_bytes
    assert with_shared.hbm_bytes == 2 * q + q // 2 and with_own.hbm_bytes == 4 * q


def test_cross_attention_and_element_sizes():
    cross = call(1, 12, 32760, 128, kv_len=512)
    q, kv = 12 * 32760 * 256, 12 * 512 * 256
    assert io_model.model(cross, CUT, H100).sm_bytes == 2 * q + 256 * 2 * kv
    assert io_model.unfused_bytes(cross) == 2 * q + 2 * kv + 4 * 2 * 12 * 32760 * 512
    assert io_model.unfused_bytes(cross, 4) == 2 * q + 2 * kv + 4 * 4 * 12 * 32760 * 512
    wide = io_model.model(replace(cross, dtype=torch.float32), CUT, H100)
    assert wide.sm_bytes == 2 * io_model.model(cross, CUT, H100).sm_bytes


def test_what_a_sparse_kernel_does_not_visit_it_does_not_read():
    long = call(1, 12, 32760, 128)
    q = 12 * 32760 * 256
    dense, sparse = (io_model.model(long, CUT, H100, density=density).sm_bytes for density in (1.0, 0.25))
    assert sparse - 2 * q == pytest.approx((dense - 2 * q) / 4)
    assert io_model.model(long, CUT, H100, density=1e-6).sm_bytes == io_model.trivial_bytes(long)


@pytest.mark.parametrize(
    ("lengths", "tiles", "waste"),
    [
        ((14, 14), (16, 16), 1 - (14 / 16) ** 2),
        ((16, 16), (128, 128), 1 - 1 / 64),
        ((16, 16), (16, 16), 0.0),
        ((129, 64), (128, 64), 1 - 129 / 256),
        ((9216, 1), (128, 64), 1 - 1 / 64),
    ],
)
def test_padding_waste(lengths, tiles, waste):
    assert io_model.padding_waste(*lengths, *tiles) == pytest.approx(waste)


def test_our_tiles_are_the_launchers():
    pytest.importorskip("triton")
    from videoattn.kernels import flash, flash_hopper, temporal

    rows = itertools.product((40, 64, 80, 128, 160, 256), (torch.bfloat16, torch.float32))
    for head_dim, dtype in rows:
        one = call(2, 3, 1000, head_dim, dtype=dtype)
        shape, rest = (2, 1000, 3, head_dim), (1000, 3, (8,), (0,), dtype, CPU, True)
        launch = flash._plan(shape, *rest, "none", False)
        cut = io_model.tiling("triton_flash", one)
        assert (cut.block_m, cut.block_n) == (launch.constants["M"], launch.constants["N"])
        assert launch.grid == (2 * 3 * -(-1000 // cut.block_m), 1, 1)
        masked = flash._plan(shape, *rest, "bool", False).constants
        assert kernel("triton_flash").tile(replace(one, mask="bool"))[:2] == (masked["M"], masked["N"])
    for frames, head_dim in itertools.product((8, 14, 25, 32, 100), (40, 64, 128)):
        one = call(64, 8, frames, head_dim, kind="temporal")
        strides = (1,) * 16
        constants = temporal._plan((64, frames, 8, head_dim), frames, 8, strides, torch.float16, CPU, True).constants
        cut = io_model.tiling("triton_temporal", one)
        assert (cut.block_m, cut.block_n) == (constants["QP"], constants["KP"]) and not cut.lse
    for head_dim in (64, 96, 128, 160, 256):
        cut = io_model.tiling("triton_hopper", call(1, 1, 4096, head_dim))
        built = flash_hopper.config(head_dim)
        assert (cut.block_m, cut.block_n, cut.resident) == (64 * built.GROUPS, built.N, 1) and cut.lse


@pytest.mark.parametrize(
    ("head_dim", "capability", "tile"),
    [
        (40, (9, 0), (128, 128, 2)),
        (64, (8, 9), (128, 128, 2)),
        (80, (8, 0), (128, 64, 2)),
        (128, (9, 0), (128, 64, 2)),
        (128, (8, 6), (128, 32, 2)),
        (160, (8, 0), (128, 32, 2)),
        (160, (8, 9), (128, 64, 1)),
        (224, (12, 0), (64, 64, 2)),
        (256, (8, 0), (128, 64, 1)),
        (256, (9, 0), (64, 64, 2)),
    ],
)
def test_tiles_of_flash_attention_2(head_dim, capability, tile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cut = io_model.tiling("sdpa_flash", call(1, 8, 4096, head_dim, device=torch.device("cuda")))
    assert (cut.block_m, cut.block_n, cut.resident, cut.lse) == (*tile, True)


@pytest.mark.parametrize(
    ("head_dim", "capability", "tile"),
    [(64, (9, 0), (64, 64, 4)), (72, (8, 0), (64, 128, 2)), (128, (7, 5), (32, 128, 3)), (160, (9, 0), None)],
)
def test_tiles_of_memory_efficient_attention(head_dim, capability, tile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cut = io_model.tiling("sdpa_efficient", call(1, 8, 4096, head_dim, device=torch.device("cuda")))
    assert (cut and (cut.block_m, cut.block_n, cut.resident)) == tile


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_cudnn", "sdpa_math", "sdpa_cpu", "unfused", "somebody's"])
def test_unknown_tiles(backend):
    assert io_model.tiling(backend, call(1, 8, 4096, 64)) is None


def test_causal_calls_and_heads_that_no_kernel_takes():
    assert io_model.tiling("sdpa_flash", call(1, 8, 4096, 64, causal=True)) is None
    assert io_model.tiling("sdpa_flash", call(1, 8, 4096, 512)) is None


RECORDED = AttentionCall(
    stage="unet",
    site="unet.attn1",
    kind="spatial",
    step=0,
    steps=4,
    branch="0",
    batch=50,
    heads=5,
    kv_heads=5,
    q_len=9216,
    kv_len=9216,
    head_dim=64,
    dtype="float16",
    backend="sdpa_flash",
    ms=1.0,
    flops=1,
    bytes=1,
)


def test_a_recorded_call_is_annotated():
    done = io_model.annotate(RECORDED, H100, CPU)
    facts = call(50, 5, 9216, 64, dtype=torch.float16)
    assert done.io == io_model.model(facts, io_model.tiling("sdpa_flash", facts), H100)
    assert done.padding_waste == io_model.padding_waste(9216, 9216, 128, 128) == 0.0
    assert replace(done, io=None, padding_waste=None) == RECORDED
    short = io_model.annotate(replace(RECORDED, q_len=25, kv_len=25, kind=""), H100, CPU)
    assert short.padding_waste == pytest.approx(1 - (25 / 128) ** 2)


@pytest.mark.parametrize(
    ("change", "chip"),
    [
        ({"backend": "sdpa_cudnn"}, H100),
        ({"kv_len": 0}, H100),
        ({"batch": 0}, H100),
        ({}, Ceilings(flops={}, copy_bandwidth=1e10)),  # a CPU
    ],
)
def test_a_call_without_a_known_tiling_stays_as_it_is(change, chip):
    recorded = replace(RECORDED, **change)
    assert io_model.annotate(recorded, chip, CPU) is recorded


def test_wrong_use():
    one = call(1, 8, 4096, 64)
    with pytest.raises(ValueError, match="chip: wanted l2_bytes, sm_count and sm_bytes"):
        io_model.model(one, CUT, Ceilings(flops={}, copy_bandwidth=1e10))
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="density: wanted"):
            io_model.model(one, CUT, H100, density=density)
    with pytest.raises(ValueError, match="a call with queries and keys"):
        io_model.trivial_bytes(replace(one, kv_len=0))
    with pytest.raises(ValueError, match="Tiling: wanted sizes from 1"):
        Tiling(block_m=0, block_n=64)
