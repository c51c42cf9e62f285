"""The machine's ceilings are measured on random numbers, once, and leave the process as it was."""

import pytest
import torch

from videoattn.profiling import ceilings


@pytest.fixture(autouse=True)
def forgotten():
    for measured in (ceilings._flops, ceilings._copy_bandwidth):
        measured.cache_clear()
    yield
    for measured in (ceilings._flops, ceilings._copy_bandwidth):
        measured.cache_clear()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (32, 64, 128)})
    monkeypatch.setattr(ceilings, "COPY", 2**20)


def test_a_cpu_multiplies_and_copies():
    seeded = torch.random.get_rng_state()
    measured = ceilings.measure("cpu", torch.float32, torch.bfloat16)
    assert set(measured.flops) == {"float32", "bfloat16"}
    assert all(1e8 < flops < 1e14 for flops in measured.flops.values())
    assert 1e8 < measured.copy_bandwidth < 1e13
    assert (measured.l2_bytes, measured.sm_count, measured.sm_bytes) == (0, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), seeded)


def test_measured_once_in_a_process(small, monkeypatch):
    first = ceilings.measure("cpu", torch.float32)
    monkeypatch.setattr(ceilings, "_median_seconds", lambda device, function: 1.0)
    assert ceilings.measure(torch.device("cpu"), torch.float32) == first
    both = ceilings.measure("cpu:0", torch.float32, torch.float64)  # what is new is measured
    assert both.flops == {**first.flops, "float64": 2 * 128**3} and both.copy_bandwidth == first.copy_bandwidth


def test_work_over_time(small, monkeypatch):
    """2 n^3 operations, and every byte read and written, over the median of the repeats."""
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(ceilings, "_seconds", lambda device, function, calls=1: next(times))
    assert ceilings._flops(torch.device("cpu"), torch.float32) == 2 * 32**3 / 4.0  # 9 s: large enough
    monkeypatch.setattr(ceilings, "_seconds", lambda device, function, calls=1: 0.5)
    assert ceilings._copy_bandwidth(torch.device("cpu")) == 2 * 2**20 / 0.5


def test_a_product_grows_until_it_takes_long_enough(small, monkeypatch):
    rows = []

    def seconds(device, function, calls=1):
        rows.append(function.args[0].shape[0])
        return {32: 1e-6, 64: 1.0}[rows[-1]]

    monkeypatch.setattr(ceilings, "_seconds", seconds)
    ceilings._flops(torch.device("cpu"), torch.float32)
    assert rows == [32, 64] + [64] * ceilings.REPEATS


def test_numbers_are_random(small, monkeypatch):
    seen = []

    def look(device, function):
        tensors = function.args if function.func is torch.mm else (function.args[0], function.func.__self__)
        seen.append(tensors)
        return 1.0

    monkeypatch.setattr(ceilings, "_median_seconds", look)
    ceilings.measure("cpu", torch.float32)
    (a, b), (source, target) = seen
    assert a.std() == pytest.approx(1, abs=0.1) and b.std() == pytest.approx(1, abs=0.1) and not torch.equal(a, b)
    assert source.nbytes == 2**20 and torch.equal(source, target) and len(source.unique()) > 2**17


@pytest.mark.parametrize(
    ("device", "dtypes", "wanted"),
    [
        ("meta", (torch.float32,), "device: wanted cpu or cuda, got meta"),
        ("cpu", (), "dtypes: wanted floating-point types of 16 bits and more, got none"),
        ("cpu", (torch.float32, torch.int8), "dtypes: wanted"),
        ("cpu", (torch.float8_e4m3fn,), "dtypes: wanted"),
    ],
)
def test_what_is_not_measured(device, dtypes, wanted):
    with pytest.raises(ValueError, match=wanted):
        ceilings.measure(device, *dtypes)


@pytest.mark.gpu
def test_a_gpu_says_what_it_is():
    measured = ceilings.measure("cuda", torch.bfloat16)
    properties = torch.cuda.get_device_properties(0)
    assert measured.sm_count == properties.multi_processor_count > 0
    assert measured.l2_bytes == properties.L2_cache_size > 2**20
    assert measured.sm_bytes == properties.shared_memory_per_multiprocessor >= 48 * 1024
    assert measured.flops["bfloat16"] > 1e12 and 5e10 < measured.copy_bandwidth < 5e13
