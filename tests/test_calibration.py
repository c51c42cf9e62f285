"""`videoattn calibrate`: what is measured ends in a table that takes effect, and what is not is said."""

import dataclasses

import pytest
import torch

from videoattn import calibration, cli, measured
from videoattn.benchmarks import attention, results, timing
from videoattn.measured import Card, Table
from videoattn.policy import EXACT, Dense

BOUNDED = Dense("int8_qk_fp8_pv")

CARD = Card(gpu="NVIDIA RTX 1", architecture="sm_86")
SMALL = ["calibrate", "--max-gflop", "0.04", "--seconds", "2"]  # five calls


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A machine with a GPU that nothing is known of; the CPU stands in for it."""
    monkeypatch.setattr(measured, "card", lambda device: CARD)
    monkeypatch.setattr(measured, "TABLES", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured.evidence.cache_clear()
    yield measured.user_path(CARD.gpu)
    measured.evidence.cache_clear()


def comparison(**change):
    figures = {"name": "", "median_ms": 1.0, "baseline_ms": 1.0, "ratio": 1.0, "ci_lo": 1.0, "ci_hi": 1.0, "noise": 0.0}
    rest = {"error": 0.0, "verdict": "not shown", "rounds": 3, "clocks": "", "samples_ms": ()}
    return timing.Comparison(**{**figures, **rest, "baseline_samples_ms": (), **change})


@pytest.fixture
def planted(monkeypatch):
    """Outcomes in the place of measurements: by default sdpa_flash takes half of the 8 ms of torch's choice."""
    outcomes = {}

    def attempt(problem, seconds, among, decision):
        assert seconds > 0
        gained = {"sdpa": comparison(baseline_ms=8.0), "sdpa_flash": comparison(baseline_ms=8.0, ratio=2.0)}
        return outcomes.get(problem.shape.name, gained if decision == EXACT else {"fast": comparison(ratio=4.0)})

    monkeypatch.setattr(attention, "attempt", attempt)
    return outcomes


def rows():
    return attention.rows(max_gflop=0.04)


def test_without_a_gpu_it_says_what_to_do(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", "--out", str(tmp_path / "table.json")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "wanted an NVIDIA GPU, got none. Run it on the machine that makes the videos" in said
    assert not list(tmp_path.iterdir())


def test_what_is_measured_takes_effect(here, capsys):
    """Really measured, here on the CPU, where torch's own choice is the only one that is timed."""
    assert cli.main([*SMALL[:1], "--only", "mochi", *SMALL[1:]]) == 0
    table = Table.read(here)
    assert table.rows and all(set(row.ms) == {"sdpa"} and row.ms["sdpa"] > 1e-4 for row in table.rows)
    assert (table.torch, table.command) == (
        torch.__version__,
        "videoattn calibrate --only mochi " + " ".join(SMALL[1:]),
    )
    ((_, shape),) = [item for item in rows() if item[0].startswith("mochi")]
    call = attention.Problem(shape, torch.device("cpu")).call()
    assert measured.choose(call, ("sdpa", "sdpa_flash")) == ("sdpa", "measured none is faster")
    assert "1 calls written to" in capsys.readouterr().out


def test_the_choices_that_change_are_counted(here, planted, capsys, monkeypatch):
    monkeypatch.setattr(attention, "accepting", lambda call: [_Named("sdpa"), _Named("sdpa_flash")])
    count = len(rows())
    assert cli.main(SMALL) == 0
    assert f"another backend than before for {count} of {count} calls" in capsys.readouterr().out
    assert {tuple(sorted(row.ms.items())) for row in Table.read(here).rows} == {(("sdpa", 8.0), ("sdpa_flash", 4.0))}
    assert cli.main(SMALL) == 0  # and in effect at once: measured again, nothing changes
    assert f"another backend than before for 0 of {count} calls" in capsys.readouterr().out


def test_an_update_adds_what_the_table_lacks(here, planted, capsys, monkeypatch):
    """Times are taken over as shares of the time of torch's own choice: 8 ms then, 2 ms now."""
    monkeypatch.setattr(attention, "accepting", lambda call: [_Named("sdpa"), _Named("sdpa_flash")])
    machine = results.machine()
    monkeypatch.setattr(results, "machine", lambda: {**machine, "gpu": CARD.gpu})
    assert cli.main([*SMALL, "--only", "mochi"]) == 0
    (before,) = Table.read(here).rows
    monkeypatch.setattr(calibration, "_may_be_quantised", lambda call: True)
    monkeypatch.setattr(attention, "quantising", lambda call: [(_Named("fast"), BOUNDED)])
    asked = []

    def attempt(problem, seconds, among, decision):
        asked.append((decision, [backend.name for backend in among]))
        return (
            {"sdpa": comparison(baseline_ms=2.0)}
            if decision == EXACT
            else {"fast": comparison(baseline_ms=2.0, ratio=4)}
        )

    monkeypatch.setattr(attention, "attempt", attempt)
    assert cli.main([*SMALL, "--update"]) == 0
    assert asked == [(EXACT, ["sdpa"]), (BOUNDED, ["fast"])]  # of the rows that the table has
    (after,) = Table.read(here).rows
    assert after.ms == {**before.ms, "fast": 2.0}
    assert Table.read(here).command.endswith("; videoattn " + " ".join([*SMALL, "--update"]))
    with pytest.raises(SystemExit):
        cli.main([*SMALL, "--update"])
    assert "nothing was measured" in capsys.readouterr().err


def test_only_a_table_of_this_gpu_is_updated(here, planted, capsys):
    assert cli.main(SMALL) == 0
    with pytest.raises(SystemExit):
        cli.main([*SMALL, "--update"])
    assert "wanted a table of this NVIDIA RTX 1 to update, got one of cpu" in capsys.readouterr().err


def test_another_file_takes_no_effect(here, planted, tmp_path):
    assert cli.main([*SMALL, "--out", str(tmp_path / "sm_86.json")]) == 0
    assert not here.exists() and len(Table.read(tmp_path / "sm_86.json").rows) == len(rows())


def test_what_does_not_fit_is_skipped_and_what_is_wrong_fails(here, planted, capsys):
    (case, first), (_, second) = rows()[:2]
    planted[first.name] = torch.OutOfMemoryError("no")
    assert cli.main(SMALL) == 0
    assert f"{case} {first.name} left out: more memory than there is" in capsys.readouterr().out
    planted[second.name] = timing.WrongOutput("error 0.5")
    assert cli.main(SMALL) == 1
    assert "error 0.5" in capsys.readouterr().out
    assert len(Table.read(here).rows) == len(rows()) - 2


def test_nothing_measured_is_an_error_and_no_table(here, planted, capsys):
    for _, shape in rows():
        planted[shape.name] = torch.OutOfMemoryError("no")
    with pytest.raises(SystemExit):
        cli.main(SMALL)
    assert "nothing was measured" in capsys.readouterr().err
    assert not here.exists()


def test_the_time_that_is_given_is_kept(here, planted, monkeypatch, capsys):
    """A second a look at the clock: of four seconds, three are left when a call is about to be measured."""
    clock = iter(range(100))
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(clock))
    assert cli.main([*SMALL[:3], "--seconds", "4"]) == 0
    sizes = [(shape.head_dim, shape.q_len, shape.kv_len) for _, shape in rows()]
    assert [(row.head_dim, row.q_len, row.kv_len) for row in Table.read(here).rows] == sizes[:3]
    assert f"{len(sizes) - 3} calls with more work left out: --seconds 4 are over" in capsys.readouterr().out


def test_only_must_leave_something(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*SMALL, "--only", "no such call"])
    assert stopped.value.code == 2 and "no row of shapes.toml is left" in capsys.readouterr().err


# -- from the attention benchmark's results


def written(folder, shape_index, date="2026-01-02T00:00:00Z", gpu="NVIDIA RTX 1", torch_version="2.11.0", **kernels):
    """Rows of attention.csv; kernel=(baseline_ms, ratio)."""
    case, shape = attention.rows()[shape_index]
    env = {"date": date, "commit": "0", "dirty": "no", "gpu": gpu, "driver": "1", "torch": torch_version}
    lines = [
        attention.row(case, shape, name, comparison(baseline_ms=baseline, ratio=ratio))
        for name, (baseline, ratio) in kernels.items()
    ]
    results.append("attention", lines, {**env, "triton": "3.6.0", "diffusers": "0.42.1"}, folder)
    return measured.Row.of(attention.Problem(shape, torch.device("cpu")).call(), {"sdpa": 1.0})


def converted(folder):
    out = folder / "table.json"
    assert cli.main(["calibrate", "--from-csv", str(folder / "attention.csv"), "--out", str(out)]) == 0
    return Table.read(out)


def test_a_table_of_results_holds_times_without_drift(tmp_path):
    row = written(tmp_path, 0, sdpa=(10.0, 0.98), sdpa_flash=(10.0, 2.0), sdpa_math=(10.0, 5.0))
    table = converted(tmp_path)
    assert (table.gpu, table.torch, table.triton, table.driver) == ("NVIDIA RTX 1", "2.11.0", "3.6.0", "1")
    (found,) = table.rows
    # the faster of baseline and control is what is to be beaten; sdpa_math's memory is no bargain
    assert found == dataclasses.replace(row, ms={"sdpa": 10.0, "sdpa_flash": 5.0})
    written(tmp_path, 0, date="2026-01-03T00:00:00Z", sdpa=(10.0, 1.25))
    assert converted(tmp_path).rows[0].ms == {"sdpa": 8.0}


def test_behind_a_padding_mask_the_way_with_lengths_is_what_is_to_be_beaten(tmp_path):
    index = next(i for i, (_, shape) in enumerate(attention.rows()) if shape.mask != "none" and shape.kind != "text")
    written(tmp_path, index, sdpa=(10.0, 0.5), sdpa_flash=(10.0, 0.8))
    (row,) = converted(tmp_path).rows
    assert row.has_kv_len and row.ms == {"sdpa": 20.0, "sdpa_flash": 12.5}


def test_the_newest_run_of_each_call_on_the_newest_machine_counts(tmp_path):
    written(tmp_path, 0, date="2026-01-01T00:00:00Z", sdpa=(1.0, 1.0), sdpa_flash=(1.0, 4.0))
    written(tmp_path, 0, sdpa=(2.0, 1.0))
    written(tmp_path, 1, date="2026-01-01T00:00:00Z", sdpa=(3.0, 1.0))
    written(tmp_path, 2, gpu="NVIDIA RTX 2", date="2026-01-01T00:00:00Z", sdpa=(4.0, 1.0))
    written(tmp_path, 3, torch_version="2.10.0", date="2026-01-01T00:00:00Z", sdpa=(5.0, 1.0))
    assert [row.ms for row in converted(tmp_path).rows] == [{"sdpa": 2.0}, {"sdpa": 3.0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from-csv", "attention.csv"], "--from-csv attention.csv: wanted --out, got none"),
        (["--from-csv", "EMPTY", "--out", "OUT"], "wanted rows of the attention benchmark, got none"),
        (["--from-csv", "no-such.csv", "--out", "OUT"], "No such file"),
    ],
)
def test_wrong_use(arguments, message, tmp_path, capsys):
    paths = {"EMPTY": str(tmp_path / "empty.csv"), "OUT": str(tmp_path / "table.json")}
    (tmp_path / "empty.csv").write_text(",".join(results.COLUMNS) + "\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", *(paths.get(argument, argument) for argument in arguments)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


class _Named:
    def __init__(self, name):
        self.name = name
