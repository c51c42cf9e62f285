"""The helpers of the benchmark of step rehash; no speed."""

import pytest

from videoattn.benchmarks import rehash
from videoattn.caches.settings import Settings


@pytest.mark.parametrize("unet", [False, True])
def test_every_mode_is_a_choice_that_there_is(unet):
    cases = {**rehash.held(13), **rehash.modes(13, unet)}
    settings = {case: Settings(**options) for case, options in cases.items()}
    assert rehash.DEFAULT in settings
    assert all(made.mode == "hold" for case, made in settings.items() if case in rehash.held(13))


def test_interleaved_runs_are_a_palindrome(monkeypatch):
    order = []
    monkeypatch.setattr(rehash, "_settle", lambda: None)  # collecting what other tests left takes seconds
    seconds = rehash.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert order == list("abccba") and all(len(found) == 2 for found in seconds.values())


def test_the_ratio_is_the_median_of_the_rounds():
    found = rehash.comparison("rehash", own=[5.0, 6.0, 5.0], base=[10.0, 10.2, 10.0])
    assert found.ratio == pytest.approx(2.0) and found.ci_lo == pytest.approx(1.7) and found.ci_hi == pytest.approx(2.0)
    assert found.median_ms == 5000 and found.baseline_ms == 10000 and found.verdict == "faster"


def test_a_mode_is_held_against_the_best_control():
    assert rehash.above({"a": 40.0, "plain": 36.0, "held": 39.0}, "a", ["plain", "held"]) == 1.0
