"""The best of torch's kernels is the baseline, ours the candidate, and who is chosen is judged by the times."""

import time

import pytest
import torch

from videoattn.backend import Choice
from videoattn.benchmarks import attention, dense, find_shapes, peers, results, temporal, warmup
from videoattn.kernels import sdpa
from videoattn.policy import EXACT

SDPA, MATH = sdpa.BACKENDS[0], sdpa.BACKENDS[-1]


class Own:
    """A kernel of ours that takes `seconds` longer than torch's."""

    name, own = "triton_own", True

    def __init__(self, seconds=0.0, factor=1.0):
        self.seconds, self.factor = seconds, factor

    def refuses(self, call, decision):
        return None

    def plan(self, call, decision, flag=None):
        run = SDPA.plan(call, decision)

        def slower(*args):
            time.sleep(self.seconds)
            return self.factor * run(*args)

        return slower


@pytest.fixture
def bench(tmp_path, monkeypatch):
    def run(script, *backends, chosen=SDPA):
        for module in (attention, peers):
            monkeypatch.setattr(module, "backends", lambda: backends)
        choice = Choice(backend=chosen, decision=EXACT, why="", refusals=())
        monkeypatch.setattr(dense, "select_verified", lambda call, decision: choice)
        assert script.main(["--seconds", "0.3", "--results", str(tmp_path), "--commit", "abc", "--device", "cpu"]) == 0
        return {path.stem: results.read(path) for path in tmp_path.glob("*.csv")}

    monkeypatch.setattr(temporal, "SHAPES", {"small": (4, 2, 16, 8)})
    monkeypatch.setattr(dense, "CASES", {"head_dim 8": ("float16", peers.BEST, 8, ((1, 2, 32),))})
    return run


def test_temporal_has_both_layouts_against_sdpa_and_a_copy(bench):
    rows = bench(temporal, SDPA, Own())["temporal"]
    assert [(row["layout"], row["baseline"]) for row in rows] == [
        (layout, baseline) for layout in ("BNHD", "BHND") for baseline in ("best sdpa", "copy")
    ]
    assert {row["shape"] for row in rows} == {"4x2x16x16x8"} and {row["kernel"] for row in rows} == {"triton_own"}
    assert all(float(row["ratio"]) < 0.9 for row in rows if row["baseline"] == "copy")  # a copy is less work


def test_a_wrong_output_fails_the_run(bench):
    with pytest.raises(attention.timing.WrongOutput):
        bench(temporal, SDPA, Own(factor=1.5))


def test_the_fastest_of_torchs_kernels_is_the_baseline(monkeypatch):
    monkeypatch.setattr(peers, "backends", lambda: (SDPA, MATH, Own()))
    problem = attention.Problem(find_shapes.square("full", 1, 2, 32, 8, "float32"), torch.device("cpu"))
    field = peers.Field(problem, {"sdpa": 2.0, "sdpa_math": 1.0, "triton_own": 3.0})
    assert (field.fastest(own=False), field.fastest(own=True)) == ("sdpa_math", "triton_own")
    with pytest.raises(ValueError, match="got none"):
        peers.Field(problem, {"sdpa": 2.0}).fastest(own=True)


@pytest.mark.parametrize("chosen_is_slow", [False, True])
def test_who_is_chosen_is_judged(bench, chosen_is_slow):
    slow = Own(seconds=0.003)
    made = bench(dense, SDPA, slow, chosen=slow if chosen_is_slow else SDPA)
    (row,) = made["dense"]
    assert (row["case"], row["baseline"], row["kernel"]) == ("head_dim 8", "best sdpa", "triton_own")
    assert float(row["ratio"]) < 0.9
    (figure,) = made["dense_dispatch"]
    assert (figure["case"], figure["metric"], float(figure["value"])) == (
        "head_dim 8",
        "better_chosen",
        float(not chosen_is_slow),
    )


def test_the_first_forward_is_the_one_that_takes_longer():
    class Denoiser(torch.nn.Module):
        calls = 0

        def forward(self):
            self.calls += 1
            time.sleep(0.05 if self.calls == 1 else 0.0)

    assert warmup.first_forward(Denoiser(), {}, torch.device("cpu")) == pytest.approx(0.05, abs=0.03)
