# videoattn
"""The timing helper tells a slower function from an equal one, and refuses a wrong output; with it, host_time finds what
a patched attention call costs more."""

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from torch import nn

from videoattn.benchmarks import host_time, results, targets, timing
from videoattn.pipelines.ltx import LTXProcessor
from videoattn.session import Session


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only inside ``spin``: the verdicts do not depend on what else this machine does."""
    clock = SimpleNamespace(ns=0)
    monkeypatch.setattr(
        timing, "time", SimpleNamespace(perf_counter=lambda: clock.ns / 1e9, perf_counter_ns=lambda: clock.ns)
    )
    return clock


def spin(clock, milliseconds, spread=0.03, seed=0):
    """A function that takes that long, give or take, and returns its input; the clock drifts as a warming card does."""
    noise = random.Random(f"{seed} {milliseconds}")

    def call(x):
        drift = 1 + 0.2 * clock.ns / 1e9
        clock.ns += int(1e6 * milliseconds * drift * noise.uniform(1 - spread, 1 + spread))
        return x

    return call


def inputs(seed):
    return (torch.randn(8, generator=torch.Generator().manual_seed(seed)),)


def equal(inputs, output, reference):
    if not torch.equal(output, reference):
        raise timing.WrongOutput(f"wanted {reference}, got {output}")
    return 0.0


def run(baseline, candidate, check=equal):
    return timing.compare(
        baseline, {"candidate": candidate}, inputs, check, device="cpu", seconds=0.3, min_rounds=20, max_rounds=40
    )


def test_a_slower_function_is_called_slower_and_a_faster_one_faster(clock):
    slower = run(spin(clock, 1.0), spin(clock, 1.1))["candidate"]
    assert slower.verdict == "slower"
    assert slower.ratio == pytest.approx(1 / 1.1, rel=0.02)
    assert slower.ci_lo <= slower.ratio <= slower.ci_hi < 1
    faster = run(spin(clock, 1.1), spin(clock, 1.0))["candidate"]
    assert faster.verdict == "faster"
    assert faster.ratio == pytest.approx(1.1, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_of_equals_shows_no_difference(clock, seed):
    result = run(spin(clock, 0.5, seed=f"a{seed}"), spin(clock, 0.5, seed=f"b{seed}"))
    assert result["candidate"].verdict == "not shown"
    assert result["control"].verdict == "not shown"
    assert result["candidate"].noise == result["control"].noise < 0.05


def test_a_drift_of_the_clocks_cancels(clock):
    """The card gets 20 % slower in a second; without the palindrome the later function would look slower."""
    result = run(spin(clock, 5.0, spread=0), spin(clock, 5.0, spread=0))["candidate"]
    assert result.ratio == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "lo, hi, noise, expected",
    [
        (1.05, 1.10, 0.01, "faster"),
        (1.005, 1.10, 0.01, "not shown"),  # inside the A/A noise
        (0.90, 0.95, 0.01, "slower"),
        (0.90, 0.995, 0.01, "not shown"),
        (0.90, 1.10, 0.0, "not shown"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_noise(lo, hi, noise, expected):
    assert timing.verdict(lo, hi, noise) == expected


def test_a_wrong_output_fails_the_run(clock):
    with pytest.raises(timing.WrongOutput):
        run(spin(clock, 1.0), lambda x: x + 1)


def test_an_output_replayed_from_earlier_inputs_fails_the_run(clock):
    first = []

    def replay(x):
        first.append(x)
        return first[0]

    with pytest.raises(timing.WrongOutput):
        run(spin(clock, 1.0), replay)


def test_an_error_that_is_not_a_number_fails_the_run(clock):
    with pytest.raises(timing.WrongOutput, match="finite"):
        run(spin(clock, 1.0), spin(clock, 1.0), check=lambda inputs, output, reference: float("nan"))


def test_every_function_gets_the_same_calls_on_the_same_inputs():
    seen = {"a": [], "b": []}
    timing.compare(
        lambda x: seen["a"].append(float(x[0])) or x,
        {"b": lambda x: seen["b"].append(float(x[0])) or x},
        inputs,
        equal,
        device="cpu",
        seconds=0.01,
        min_rounds=4,
        max_rounds=4,
    )
    assert set(seen["a"]) == set(seen["b"]) and len(set(seen["b"])) == 3  # two rotated sets, one fresh set after
    assert len(seen["a"]) - 2 == 2 * len(seen["b"])  # the control is the baseline again; two references for the checks


def test_the_names_of_the_helper_are_refused():
    with pytest.raises(ValueError, match="control"):
        timing.compare(len, {"control": len}, inputs, equal, device="cpu")


# -- host_time

CPU = torch.device("cpu")
LAYER = {"num_layers": 1, "num_attention_heads": 1}
LTX = {**LAYER, "num_layers": 2, "cross_attention_dim": 64}


@pytest.mark.parametrize("processor_us, hook_us, added_us", [(0, 0, 0), (50, 0, 50), (-50, 0, -50), (0, 80, 20)])
def test_added_host_time_is_that_of_our_processors_and_of_our_hook(processor_us, hook_us, added_us, clock, monkeypatch):
    """The host takes 200 us an attention call, ours so much more; our hook runs once in a forward of four calls."""
    monkeypatch.setitem(host_time.THIN, "ltx", LTX)
    for cls, us in ((LTXVideoAttnProcessor, 200), (LTXProcessor, 200 + processor_us), (Session, hook_us)):
        monkeypatch.setattr(cls, "__call__", taking(clock, us, cls.__call__))
    result, calls = host_time.measure("ltx", "exact", CPU, 0.01)
    assert calls == 4
    assert host_time.added_us(result, calls) == pytest.approx(added_us)


def taking(clock, us, function):
    @functools.wraps(function)
    def slow(*args, **kwargs):
        clock.ns += 1000 * us
        return function(*args, **kwargs)

    return slow


@pytest.mark.parametrize(
    "name, thin, modules",
    [
        ("ltx", LTX, 4),
        ("wan-i2v-14b", {**LAYER, "ffn_dim": 64, "added_kv_proj_dim": 128}, 2),  # text and image in one call of attn2
        ("hunyuan", {**LAYER, "num_single_layers": 1, "num_refiner_layers": 1}, 3),
        ("mochi", {**LAYER, "pooled_projection_dim": 64}, 1),  # the generic way
    ],
)
def test_what_is_timed_is_every_call_of_an_attention_module_checked(name, thin, modules, monkeypatch):
    monkeypatch.setitem(host_time.THIN, name, thin)
    result, calls = host_time.measure(name, "exact", CPU, 0.01)
    assert calls == modules
    assert result.error < 1e-5 and result.median_ms > 0


def test_a_wrong_output_of_one_patched_call_fails_the_run(monkeypatch):
    monkeypatch.setitem(host_time.THIN, "ltx", LTX)
    attend = LTXProcessor.attend
    monkeypatch.setattr(
        LTXProcessor, "attend", lambda *args, kv_len=None: attend(*args, kv_len=kv_len) * (1 if kv_len is None else 2)
    )
    with pytest.raises(timing.WrongOutput):
        host_time.measure("ltx", "exact", CPU, 0.01)


class Twice(nn.Module):
    """A denoiser that calls one attention module twice and another once."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Scale(), Scale()

    def forward(self, x):
        return self.one(self.other(self.one(x), by=3), by=5)


class Scale(nn.Module):
    def forward(self, x, by=2):
        return by * x


def test_a_replay_makes_the_recorded_calls_in_their_order_behind_the_hooks():
    denoiser, seen = Twice(), []
    calls = host_time.record(denoiser, ("other", "one"), {"x": torch.tensor(1)})
    assert [call.name for call in calls] == ["one", "other", "one"]
    assert not denoiser.one._forward_pre_hooks
    host_time.replay(denoiser, calls)
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    assert denoiser(x=7) == [2, 6, 30]  # of the tensors that were recorded, not of 7
    assert seen == [{"x": 7}]


@pytest.mark.parametrize("backend, kernel", [("auto", "exact"), ("sdpa", "exact/sdpa")])
def test_the_row_names_preset_and_forced_backend(backend, kernel, tmp_path, monkeypatch):
    monkeypatch.setitem(host_time.THIN, "ltx", LTX)
    flags = ["--device", "cpu", "--commit", "0", "--results", str(tmp_path), "--seconds", "0.01", "--only", "ltx"]
    host_time.main([*flags, "--backend", backend])
    (row,) = results.read(tmp_path / "host_time.csv")
    assert row["kernel"] == kernel
    (bar,) = (target for target in targets.read(results.HERE / "targets.toml") if target.id == "host_time.sdpa")
    assert bar.matches({**row, "gpu": "NVIDIA H200"}) == (backend == "sdpa")


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backend: wanted one of auto"):
        host_time.main(["--commit", "0", "--results", str(tmp_path), "--only", "ltx", "--backend", "fastest"])
