"""Memory read from traces that are written by hand, and from a module whose tensors are known."""

import torch
from torch import nn

from videoattn.profiling import memory, trace
from videoattn.profiling.scopes import ROOT, Scope, Scopes
from videoattn.profiling.trace import exported

MODEL = Scope("transformer", "transformer")
BLOCK = Scope("transformer", "transformer.block")
VAE = Scope("vae.decode", "vae.decode")
KNOWN = {trace.RANGE + scope.module: scope for scope in (ROOT, MODEL, BLOCK, VAE)}
GPU = torch.device("cuda")
WEIGHTS = {"transformer": 1000}


def scope(of, start, end):
    name = trace.RANGE + of.module
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": start, "dur": end - start}


def event(at, count, address, *, total=0, device=1):
    args = {"Bytes": count, "Addr": address, "Total Allocated": total, "Device Type": device}
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": at, "args": args}


def read(*events, addresses=()):
    trace = {"traceEvents": [scope(ROOT, 0, 1000), *events]}
    return memory.read(trace, KNOWN, WEIGHTS, dict(addresses), device=GPU)


def alive(found):
    return {(one.module, one.what): one.bytes for one in found.alive}


def test_the_peak_and_what_is_alive_then():
    found = read(
        event(10, 40, 1, total=1040),  # latents
        scope(MODEL, 100, 500),
        event(110, 100, 2),
        scope(BLOCK, 200, 300),
        event(210, 500, 3),
        event(220, 60, 4),
        event(230, -60, 4),
        event(310, -500, 3),
        scope(VAE, 600, 900),
        event(700, 300, 5),
    )
    assert found.peak_bytes == 1000 + 40 + 100 + 500 + 60
    assert found.peak_ms == 0.22 and found.peak_module == BLOCK.module
    assert found.weights_bytes == 1000
    assert alive(found) == {
        ("transformer", "weights"): 1000,
        ("pipeline", "caches"): 40,
        ("transformer", "activations"): 100,
        ("transformer.block", "activations"): 560,
    }
    modules = {module.module: (module.peak_bytes, module.allocated_bytes) for module in found.modules}
    assert modules[BLOCK.module] == (1700, 560)
    assert modules[MODEL.module] == (1700, 100)
    assert modules[VAE.module] == (1440, 300)
    assert found.timeline[0] == (0.0, 1000) and found.timeline[-1] == (0.7, 1440)


def test_what_an_earlier_call_left_is_a_cache():
    found = read(
        scope(MODEL, 100, 200),
        event(110, 70, 1, total=1070),
        scope(MODEL, 300, 400),
        event(310, 30, 2),
    )
    assert alive(found) == {
        ("transformer", "weights"): 1000,
        ("transformer", "caches"): 70,
        ("transformer", "activations"): 30,
    }


def test_at_a_peak_between_the_components_what_the_run_made_is_no_cache():
    """The pipeline's own code runs, directly or in an operator."""
    for operator in ((), ({**scope(ROOT, 800, 850), "name": "aten::cat"},)):
        found = read(scope(VAE, 100, 700), event(110, 70, 1, total=1070), *operator, event(810, 30, 2))
        assert found.peak_module == ROOT.module
        assert alive(found) == {
            ("transformer", "weights"): 1000,
            ("vae.decode", "activations"): 70,
            ("pipeline", "activations"): 30,
        }


def test_weights_that_come_during_the_run_are_weights():
    found = read(
        scope(MODEL, 100, 200), event(110, 70, 1, total=1070), event(120, 30, 2), addresses={"transformer": {1}}
    )
    assert alive(found)["transformer", "weights"] == 1070
    assert alive(found)["transformer", "activations"] == 30


def test_an_address_that_a_weight_had_once_may_be_anothers_later():
    found = read(
        scope(MODEL, 100, 200),
        event(110, 70, 1, total=1070),
        event(500, -70, 1),
        scope(VAE, 600, 900),
        event(610, 90, 1),
        addresses={"transformer": {1}, "vae": set()},
    )
    assert alive(found) == {("transformer", "weights"): 1000, ("vae.decode", "activations"): 90}


def test_memory_that_was_taken_before_is_told_apart_from_weights():
    found = read(event(10, 5, 1, total=1505))
    assert alive(found)["before the run", "caches"] == 500
    assert found.peak_bytes == 1505


def test_other_devices_and_other_times_do_not_count():
    assert read(event(10, 50, 1, device=0)) is None
    found = read(event(10, 50, 1, total=1050), event(20, 999, 2, device=0), event(-5, 999, 3), event(2000, 999, 4))
    assert found.peak_bytes == 1050


def test_thinning_keeps_the_extremes():
    points = [(float(index), 100) for index in range(10_000)]
    points[4321], points[7654] = (4321.0, 10**9), (7654.0, 1)
    kept = memory.thinned(points, 100)
    assert len(kept) <= 100
    assert {points[4321], points[7654]} <= set(kept)
    assert kept == sorted(kept)


class _Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256, 256))

    def forward(self, x):
        a = torch.ones(1000, 1000)  # 4 MB
        b = a + 1  # 4 MB more: the peak
        del a
        return b.sum() + x


def test_a_module_whose_tensors_are_known():
    model, cpu = _Keeps(), torch.device("cpu")
    ranges = memory.MemoryRanges({"transformer": model})
    weights = memory.weights_bytes({"transformer": model}, cpu)
    assert weights == {"transformer": 256 * 256 * 4}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.no_grad(), profiler, Scopes({"transformer": model}, ranges):
        ranges.enter(ROOT)
        model(torch.zeros(1))
        ranges.leave(ROOT)
    found = memory.read(exported(profiler), ranges.known, weights, ranges.addresses, cpu)
    assert 0 <= found.peak_bytes - weights["transformer"] - 8_000_000 < 10_000
    assert found.peak_module == "transformer"
    assert abs(alive(found)["transformer", "activations"] - 8_000_000) < 10_000
    assert not model._forward_hooks and not model._forward_pre_hooks
