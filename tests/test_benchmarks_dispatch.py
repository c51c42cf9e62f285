"""What exact attention chooses is what is timed; what stays torch's own call is not, and says so; the bars find both."""

import pytest
import torch

from videoattn import cli
from videoattn.backend import Choice, UnsupportedCall
from videoattn.benchmarks import attention, dispatch, find_shapes, results, targets
from videoattn.benchmarks.find_shapes import Shape
from videoattn.kernels import sdpa
from videoattn.policy import EXACT


class Own:
    """A kernel of ours that computes rightly, or twice the truth."""

    own = True

    def __init__(self, factor=1):
        self.name, self.factor = "triton_own", factor

    def plan(self, call, decision, flag=None):
        run = sdpa.BACKENDS[0].plan(call, decision)
        return lambda *args: self.factor * run(*args)


def shape(**change):
    base = {"kind": "full", "batch": 2, "heads": 3, "kv_heads": 3, "q_len": 24, "kv_len": 24, "head_dim": 16}
    return Shape(**{**base, "dtype": "float32", "layout": "BNHD", "kv_valid": 24, **change})


FULL = shape()
TEMPORAL = shape(kind="temporal", q_len=8, kv_len=8, kv_valid=8)
OTHER = shape(kind="temporal", q_len=9, kv_len=9, kv_valid=9)
PADDED = shape(kind="cross", mask="prefix", mask_shape=(2, 1, 1, 24), kv_valid=9, q_len=30)
NAMED = {FULL: {"a full": 1}, TEMPORAL: {"b": 1}, OTHER: {"c": 1}, PADDED: {"d": 1}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Dispatch over NAMED, where `own` chooses a kernel of ours for some shapes; returns exit status and both tables."""

    def run(own=(), factor=1, flags=()):
        monkeypatch.setattr(find_shapes, "read", lambda: NAMED)
        kernel = Own(factor)
        ours = {attention.Problem(shape, torch.device("cpu")).call() for shape in own}

        def select(call, decision):
            assert decision == EXACT
            backend = kernel if call in ours else sdpa.BACKENDS[0]
            return Choice(backend=backend, decision=EXACT, why="measured", refusals=())

        monkeypatch.setattr(dispatch, "select_verified", select)
        status = cli.main(
            [
                "bench",
                "dispatch",
                "--device",
                "cpu",
                "--commit",
                "0",
                "--results",
                str(tmp_path),
                "--seconds",
                "0.1",
                *flags,
            ]
        )
        tables = [tmp_path / "dispatch_exact.csv", tmp_path / "dispatch_summary.csv"]
        return status, *(results.read(table) if table.exists() else [] for table in tables)

    return run


def test_what_is_chosen_is_timed_and_what_stays_the_same_call_is_not(run):
    status, rows, figures = run(own=[TEMPORAL])
    assert status == 0
    by_case = {row["case"]: row for row in rows}
    assert {case: row["kernel"] for case, row in by_case.items()} == {
        "a full full": "sdpa",
        "b temporal": "triton_own",
        "c temporal": "sdpa",
        "d cross": "sdpa",
    }
    for case in ("a full full", "c temporal"):
        assert by_case[case]["verdict"] == "same"
        assert not any(by_case[case][column] for column in dispatch.TIMED)
    for case in ("b temporal", "d cross"):  # behind a mask, torch's choice is called with lengths: another call
        assert by_case[case]["verdict"] in ("faster", "slower", "not shown")
        assert float(by_case[case]["median_ms"]) > 0 and float(by_case[case]["rel_l2"]) < 1e-5
    values = {row["metric"]: float(row["value"]) for row in figures}
    assert (values["own_rows"], values["own_temporal_share"]) == (1, 0.5)
    assert values["own_geomean_ratio"] == pytest.approx(float(by_case["b temporal"]["ratio"]))


def test_where_ours_is_never_chosen_there_is_no_gain_to_tell(run):
    _, _, figures = run()
    assert {row["metric"]: float(row["value"]) for row in figures} == {"own_rows": 0, "own_temporal_share": 0}


def test_a_wrong_kernel_fails_the_run_and_the_others_are_kept(run, capsys):
    status, rows, figures = run(own=[TEMPORAL], factor=2)
    assert status == 1 and "FAILED b temporal" in capsys.readouterr().out
    assert len(rows) == len(NAMED) - 1
    assert figures == []


def test_a_part_of_the_rows_gives_no_summary(run):
    status, rows, figures = run(own=[TEMPORAL], flags=["--only", "temporal"])
    assert (status, len(rows), figures) == (0, 2, [])


def test_the_bars_read_these_rows(run, tmp_path):
    _, rows, figures = run(own=[TEMPORAL, OTHER])
    bars = {bar.id: bar for bar in targets.read(results.HERE / "targets.toml") if bar.id.startswith("exact.dispatch.")}
    at_h200 = [{**row, "gpu": "NVIDIA H200"} for row in (*rows, *figures)]
    slower = bars.pop("exact.dispatch.never_slower")
    assert all(slower.matches(row) for row in at_h200[: len(rows)])
    assert [targets._value(row, slower.metric) for row in rows if row["verdict"] == "same"] == [
        0.0,
    ]
    found = {name: [row for row in at_h200 if "metric" in row and bar.matches(row)] for name, bar in bars.items()}
    assert sorted(found) == ["exact.dispatch.own_ratio", "exact.dispatch.own_rows", "exact.dispatch.own_temporal"]
    assert all(len(matching) == 1 for matching in found.values())


def test_nothing_selected_is_an_error(run):
    with pytest.raises(SystemExit):
        run(flags=["--only", "no such row"])


def test_it_asks_who_serves_a_users_call(tmp_path, monkeypatch):
    """The same question that a plan asks, refusals included."""
    monkeypatch.setattr(find_shapes, "read", lambda: {FULL: {}})
    monkeypatch.setattr("videoattn.backend.backends", lambda: ())
    with pytest.raises(UnsupportedCall):
        dispatch.main(["--device", "cpu", "--commit", "0", "--results", str(tmp_path)])
