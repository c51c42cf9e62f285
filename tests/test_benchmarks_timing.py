# videoattn
"""The timing helper tells a slower function from an equal one, and refuses a wrong output."""

import random
from types import SimpleNamespace

import pytest
import torch

from videoattn.benchmarks import timing


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
