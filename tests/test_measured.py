"""Measured times decide: the nearest row, never a slower backend, the user's table first, and a word on why."""

import json
from dataclasses import replace

import pytest
import tiny_pipelines
import torch

import videoattn
from videoattn import backend, measured
from videoattn.call import Call
from videoattn.measured import BORROWED_GAIN, BOUNDED_GAIN, FARTHEST, GAIN, TORCH, Card, Evidence, Row, Source, Table

CALL = Call(
    kind="temporal",
    layout="BNHD",
    batch=512,
    q_len=16,
    kv_len=16,
    heads=8,
    kv_heads=8,
    head_dim=64,
    dtype=torch.float16,
    device=torch.device("cpu"),
)
NAMES = (TORCH, "own", "other")
CARD = Card(gpu="NVIDIA RTX 1 (16 GB)", architecture="sm_86")


def table(*rows, **head):
    about = {"gpu": CARD.gpu, "torch": torch.__version__, "triton": measured._triton(), "cudnn": "9", "driver": "1"}
    return Table(**{**about, "date": "2026-01-01T00:00:00Z", "command": "by hand", **head}, rows=rows)


def source(*rows, borrowed=""):
    return Source(table=table(*rows), path=measured.TABLES, borrowed=borrowed)


def row(call=CALL, **ms):
    return Row.of(call, {TORCH: 1.0, **ms})


def chosen(*rows, call=CALL, names=NAMES, borrowed=""):
    return Evidence(sources=(source(*rows, borrowed=borrowed),)).choose(call, names)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A machine with a GPU, no shipped table and an empty cache folder; the CPU stands in for the GPU."""
    monkeypatch.setattr(measured, "card", lambda device: CARD)
    monkeypatch.setattr(measured, "TABLES", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured.evidence.cache_clear()
    yield tmp_path
    measured.evidence.cache_clear()


# -- what a row decides


def test_the_fastest_wins():
    assert chosen(row(own=0.5, other=0.32)) == ("other", "measured 3.12x of torch's choice")


def test_one_that_does_not_take_the_call_cannot_win():
    assert chosen(row(own=0.5, other=0.32), names=(TORCH, "own"))[0] == "own"


@pytest.mark.parametrize(("gain", "winner"), [(0.7, TORCH), (1.0, TORCH), (GAIN - 1e-3, TORCH), (GAIN + 1e-3, "own")])
def test_within_noise_torch_chooses(gain, winner):
    assert chosen(row(own=1 / gain))[0] == winner


@pytest.mark.parametrize(
    ("quantised", "winner"),
    [(0.8, "own"), (2 * BOUNDED_GAIN - 1e-3, "own"), (2 * BOUNDED_GAIN + 1e-3, "quantised"), (3.0, "quantised")],
)
def test_quantised_attention_must_gain_on_the_best_exact_one(quantised, winner):
    evidence = Evidence(sources=(source(row(own=0.5, quantised=1 / quantised)),))
    name, why = evidence.choose(CALL, NAMES, ("quantised",))
    gain = quantised if winner == "quantised" else 2.0
    assert (name, why) == (winner, f"measured {gain:.2f}x of torch's choice")
    assert evidence.choose(CALL, NAMES)[0] == "own"  # nobody asked for it


def test_quantised_attention_that_was_not_measured_is_not_taken():
    assert Evidence(sources=(source(row(own=0.5)),)).choose(CALL, NAMES, ("quantised",))[0] == "own"
    assert Evidence(sources=()).choose(CALL, NAMES, ("quantised",))[0] == TORCH


def test_quantised_attention_goes_by_the_nearest_row_where_it_was_measured():
    far = replace(CALL, q_len=32, kv_len=32)
    evidence = Evidence(sources=(source(row(own=0.5), row(far, quantised=0.25)),))
    for call in (CALL, far):
        assert evidence.choose(call, NAMES, ("quantised",)) == ("quantised", "measured 4.00x of torch's choice")
    slower = Evidence(
        sources=(source(row(own=0.8), row(far, own=0.5, quantised=0.49)),)
    )  # 2.04x there, of which own has 2
    assert slower.choose(CALL, NAMES, ("quantised",))[0] == "own"
    too_far = replace(CALL, q_len=8, kv_len=8)
    assert evidence.choose(too_far, NAMES, ("quantised",))[0] == "own"


def test_times_of_another_architecture_must_speak_louder_for_quantised_attention_too():
    near, far = (Evidence(sources=(source(row(quantised=1 / gain), borrowed="sm_90"),)) for gain in (1.4, 1.6))
    assert near.choose(CALL, NAMES, ("quantised",))[0] == TORCH
    assert far.choose(CALL, NAMES, ("quantised",))[0] == "quantised"


@pytest.mark.parametrize(("gain", "winner"), [(BORROWED_GAIN - 0.01, TORCH), (BORROWED_GAIN + 0.01, "own")])
def test_another_architecture_must_have_gained_much(gain, winner):
    name, why = chosen(row(own=1 / gain), borrowed="sm_90")
    assert name == winner
    assert why.endswith("as measured on sm_90; videoattn calibrate measures this card")


def test_alike_in_another_order_of_memory_the_lesser_gain_counts():
    assert chosen(row(own=0.4, other=0.5), row(own=1.1, other=0.6))[0] == "other"
    assert chosen(row(own=0.4), row(own=1.1))[0] == TORCH
    assert chosen(row(own=0.4, other=0.5), row(other=0.6))[0] == "other"  # own did not take the second


def test_where_torch_cannot_the_measured_best_of_the_others_runs():
    names = ("own", "other")
    assert chosen(row(own=0.5, other=0.4), names=names) == ("other", "measured 1.25x of own")
    assert chosen(row(own=0.5, other=0.6), names=names)[0] == "own"
    assert chosen(names=names) == ("own", "not measured: own")


# -- which row speaks for a call


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"mask": "bool"},
        {"mask": "additive"},
        {"has_kv_len": True},
        {"causal": True},
        {"head_dim": 128},
        {"q_len": 16 * 6},
        {"q_len": 16 * 3, "kv_len": 16 * 3},
    ],
    ids=str,
)
def test_another_class_or_far_away_is_not_measured(change):
    assert chosen(row(own=0.5), call=replace(CALL, **change)) == (TORCH, "not measured: torch's choice")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.bfloat16},
        {"kind": "spatial", "layout": "BHND"},
        {"batch": 1024, "heads": 4, "kv_heads": 4},
        {"batch": 16, "heads": 16},
        {"head_dim": 80},
        {"q_len": 20, "kv_len": 20},
        {"q_len": 8},
    ],
    ids=str,
)
def test_the_same_and_what_is_near_are(change):
    assert chosen(row(own=0.5), call=replace(CALL, **change))[0] == "own"


@pytest.mark.parametrize("change", [{"q_len": 0}, {"kv_len": 0}, {"batch": 0}])
def test_an_empty_call_is_looked_up_as_well(change):
    assert chosen(row(own=0.5), call=replace(CALL, **change))[0] in NAMES


def test_the_nearest_speaks():
    longer, wider = replace(CALL, q_len=24, kv_len=24), replace(CALL, head_dim=80)
    rows = (row(own=0.5), row(longer, other=0.5), row(wider))
    assert chosen(*rows, call=replace(CALL, q_len=18, kv_len=18))[0] == "own"
    assert chosen(*rows, call=replace(CALL, q_len=23, kv_len=22))[0] == "other"
    assert chosen(*rows, call=replace(wider, q_len=18))[0] == TORCH
    assert chosen(*rows, call=replace(longer, q_len=40))[0] == "other"


def test_head_dim_weighs_most():
    rows = (row(own=0.5), row(replace(CALL, head_dim=80, q_len=48), other=0.5))
    assert chosen(*rows, call=replace(CALL, head_dim=80))[0] == "own"  # 1.3 octaves against 1.6
    assert chosen(*rows, call=replace(CALL, head_dim=96, q_len=32))[0] == "other"


# -- files


def test_a_written_table_reads_back(tmp_path):
    path = tmp_path / "new" / "table.json"
    written = table(row(own=0.123456), row(replace(CALL, q_len=9), own=1234.5), command='with "quotes"')
    written.write(path)
    read = Table.read(path)
    assert read == replace(written, rows=(row(own=0.1235), row(replace(CALL, q_len=9), own=1234.0)))
    assert sum('"q_len"' in line for line in path.read_text().splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.json"
    table(row(own=0.5)).write(path)
    before = path.read_text()
    with pytest.raises(TypeError):
        table(row(own=0.4), gpu=object()).write(path)
    assert path.read_text() == before


@pytest.mark.parametrize("spoil", ["", "{}", "[1]", '{"rows": [{"ms": {}}]}', "NaN", "0.0", "no_such"])
def test_a_file_that_is_no_table_is_refused(spoil, tmp_path):
    path = tmp_path / "table.json"
    table(row(own=0.5)).write(path)
    text = path.read_text()
    broken = {
        "NaN": text.replace("0.5", "NaN"),
        "0.0": text.replace("0.5", "0.0"),
        "no_such": text.replace("bits", "b"),
    }
    path.write_text(broken.get(spoil, spoil))
    with pytest.raises(ValueError, match=r"table\.json: wanted a table of videoattn calibrate, got "):
        Table.read(path)


def test_the_shipped_tables_are_sound():
    paths = list(measured.TABLES.glob("sm_*.json"))
    assert "sm_90.json" in {path.name for path in paths}
    names = {known.name for known in backend.backends()}
    for path in paths:
        read = Table.read(path)
        assert read.gpu and read.torch and read.triton and read.date and read.command
        assert len(read.rows) >= 100
        assert all(TORCH in row.ms and set(row.ms) <= names for row in read.rows)


def test_on_the_shipped_table_a_row_is_well_guessed_from_the_others():
    """What WEIGHTS and FARTHEST are chosen by: left out, hardly a row is given to a backend that is slower there."""
    rows = Table.read(measured.TABLES / "sm_90.json").rows
    slower, gained, possible = 0, 0, 0
    for left_out in rows:
        call = replace(
            CALL, **{name: getattr(left_out, name) for name in ("mask", "has_kv_len", "q_len", "kv_len", "head_dim")}
        )
        call = replace(call, batch=left_out.rows, heads=1, kv_heads=1)
        others = [row for row in rows if row.distance(call) > 0]
        name, _ = chosen(*others, call=call, names=tuple(left_out.ms))
        gain = left_out.ms[TORCH] / left_out.ms[name]
        slower += gain < 1 / GAIN
        gained += gain > GAIN
        possible += left_out.ms[TORCH] / min(left_out.ms.values()) > GAIN
    assert possible > 20
    assert gained >= 0.8 * possible
    assert slower <= 0.03 * len(rows)


# -- whose table


def test_without_a_gpu_torch_chooses_and_nothing_is_said():
    assert measured.choose(CALL, NAMES) == (TORCH, "")
    assert measured.choose(CALL, ("own", "other")) == ("own", "")


def test_without_any_table_torch_chooses(here):
    assert measured.choose(CALL, NAMES) == (TORCH, "not measured: torch's choice")


def test_the_shipped_table_of_the_nearest_architecture_speaks(here):
    for name, own in (("sm_75", 0.9), ("sm_86", 0.5), ("sm_90", 0.4)):
        table(row(own=own)).write(measured.TABLES / f"{name}.json")
    assert measured.choose(CALL, NAMES) == ("own", "measured 2.00x of torch's choice")
    (measured.TABLES / "sm_86.json").unlink()
    measured.evidence.cache_clear()
    name, why = measured.choose(CALL, NAMES)
    assert (name, why.split(",")[0]) == ("own", "2.50x of torch's choice")
    assert "as measured on sm_90" in why


def test_the_users_table_comes_first_and_the_shipped_one_after_it(here):
    table(row(own=0.5), row(replace(CALL, head_dim=160), own=0.5)).write(measured.TABLES / "sm_86.json")
    table(row(other=0.8)).write(measured.user_path(CARD.gpu))
    assert measured.choose(CALL, NAMES)[0] == "other"
    assert measured.choose(replace(CALL, head_dim=160), NAMES)[0] == "own"
    assert measured.evidence(CARD).note == ""


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"torch": "1.0.1"}, "measured with torch 1.0, here is "),
        ({"triton": "1.0.1"}, "measured with triton 1.0, here is "),
    ],
)
def test_a_users_table_of_other_versions_is_passed_over_and_that_is_said(head, said, here):
    path = measured.user_path(CARD.gpu)
    table(row(own=0.5), **head).write(path)
    assert measured.choose(CALL, NAMES)[0] == TORCH
    note = measured.evidence(CARD).note
    assert str(path) in note and said in note and "videoattn calibrate" in note


def test_a_patch_release_changes_nothing(here):
    other = f"{'.'.join(torch.__version__.split('.')[:2])}.99+rocm"
    table(row(own=0.5), torch=other).write(measured.user_path(CARD.gpu))
    assert measured.choose(CALL, NAMES)[0] == "own"


def test_a_broken_table_of_the_user_is_passed_over_and_that_is_said(here):
    path = measured.user_path(CARD.gpu)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert measured.choose(CALL, NAMES)[0] == TORCH
    assert str(path) in measured.evidence(CARD).note


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.user_path(CARD.gpu) == tmp_path / "videoattn" / "calibration" / "nvidia-rtx-1-16-gb.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(measured.Path, "home", lambda: tmp_path / "home")
    assert measured.user_path(CARD.gpu).parents[2] == tmp_path / "home" / ".cache"


def test_the_report_says_why_and_what_was_passed_over(here):
    """A denoiser's own call decides by the table: the fused kernels refuse on a CPU, plain products were faster."""
    pipe = videoattn.enable_fast_attention(tiny_pipelines.build("wan"), "exact")
    shapes = []
    seen = measured.choose

    def spy(call, names, bounded=(), sparse=None):
        shapes.append(call)
        return seen(call, names, bounded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "choose", spy)
        tiny_pipelines.run("wan", pipe)
    rows = [Row.of(call, {TORCH: 1.0, "sdpa_math": 0.25}) for call in shapes]
    table(*rows).write(measured.TABLES / "sm_86.json")
    table(*rows, torch="1.0").write(measured.user_path(CARD.gpu))
    measured.evidence.cache_clear()
    videoattn.enable_fast_attention(pipe, "exact")
    tiny_pipelines.run("wan", pipe)
    report = videoattn.report(pipe)
    called = [site for site in report.sites if site.calls]
    assert called and {site.backend for site in called} == {"sdpa_math"}
    assert {site.why for site in called} == {"measured 4.00x of torch's choice"}
    assert len([note for note in report.notes if "measured with torch 1.0" in note]) == 1


def test_the_bound_is_stated_in_octaves():
    edge = replace(CALL, q_len=int(CALL.q_len * 2**FARTHEST))
    assert chosen(row(own=0.5), call=edge)[0] == "own"
    assert chosen(row(own=0.5), call=replace(edge, q_len=edge.q_len + 1))[0] == TORCH


def test_a_row_is_one_line_of_json_with_its_class_and_sizes(tmp_path):
    table(row(own=0.5)).write(tmp_path / "t.json")
    (line,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    sizes = {"bits": 16, "mask": "none", "has_kv_len": False, "causal": False}
    assert line == {**sizes, "head_dim": 64, "q_len": 16, "kv_len": 16, "rows": 4096, "ms": {TORCH: 1.0, "own": 0.5}}
