"""The forms of a report that are text: what stands in them, what they leave out, and that GitHub and Perfetto take them."""

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import profile_samples
import pytest
import torch
from torch import nn

from videoattn.profiling import comparison, folder, markdown, perfetto, summary, text
from videoattn.profiling.comparison import Comparison, Quality
from videoattn.profiling.profile import AttentionCall, Profile
from videoattn.profiling.scopes import ROOT, Scopes
from videoattn.profiling.trace import Ranges
from videoattn.quality import compare_videos

SAMPLES = {
    "wan": profile_samples.wan,
    "svd": profile_samples.svd,
    "broken": lambda: profile_samples.broken(profile_samples.wan()),
    "empty": profile_samples.empty,
}
HOSTILE = 'a|b <script>alert("1")</script> @somebody *loud* `code` #12\nnext line'


def rows_of(printed: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    lines = printed.split(title, 1)[1].splitlines()
    body = [line for line in lines if line.startswith("│")]
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in body if lines.index(line) < end]


def test_advice_on_a_run_that_is_one_thing_only():
    made = profile_samples.wan()
    alone = replace(
        made, rows=tuple(row for row in made.rows if row.operator == "linear" and row.stage == "transformer")
    )
    assert summary.advice(alone) == "All of the time is linear."
    assert summary.advice(replace(made, rows=())) == "nothing was recorded"


# -- the terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_the_table_fits_the_terminal_and_ends_with_the_verdict(name):
    profile = SAMPLES[name]()
    printed = text.table(profile)
    assert max(map(len, printed.splitlines())) <= text.WIDTH
    assert "\x1b" not in printed and printed.startswith(profile.title)
    assert printed.replace("\n", " ").rstrip().endswith(summary.advice(profile))


def test_colours_only_where_they_are_asked_for(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    profile = SAMPLES["broken"]()
    coloured = text.table(profile, colour=True)
    assert "\x1b[" in coloured
    bare = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()]
    assert bare == text.table(profile).splitlines()


def test_categories_are_those_of_the_summary():
    profile = SAMPLES["svd"]()
    rows = rows_of(text.table(profile), "time by category")
    expected = summary.categories(profile)
    assert [row[0] for row in rows] == [share.name for share in expected]
    assert [float(row[2].replace(",", "")) for row in rows] == pytest.approx([s.ms for s in expected], abs=0.051)
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    convolution = expected[0]
    assert (rows[0][0], rows[0][1]) == ("convolution", f"{convolution.calls:,}")
    assert float(rows[0][5]) == pytest.approx(convolution.flops / 1e12, rel=5e-3)
    assert float(rows[0][6]) == pytest.approx(convolution.bytes / 1e9, rel=5e-3)
    assert rows[0][8] == "46%"  # the rate that the sample was made with


def test_the_longest_bar_belongs_to_the_greatest_share():
    rows = rows_of(text.table(SAMPLES["svd"]()), "time by category")
    lengths = [len(row[4]) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 0


@pytest.mark.parametrize(("share", "bar"), [(0, "    "), (1, "████"), (0.5, "██  "), (0.53125, "██▏ "), (2, "████")])
def test_bars_are_exact_to_an_eighth(share, bar):
    assert text.bar(share, 4) == bar


def test_temporal_beside_spatial_where_both_are_there():
    spatial, temporal = SAMPLES["svd"](), SAMPLES["wan"]()
    ratio = summary.temporal_per_flop(spatial)
    assert f"temporal attention takes {ratio:.3g} times as long" in text.table(spatial)
    assert "times as long for a FLOP" not in text.table(temporal)
    assert "25 to 9,216 (369x)" in text.table(spatial) and "32,760 throughout" in text.table(temporal)


def test_no_more_shapes_than_fit_and_how_many_are_left_out():
    profile = SAMPLES["svd"]()
    printed = text.table(profile)
    assert len(rows_of(printed, "attention shapes")) == text.SHAPES < len(summary.shapes(profile))
    assert f"{len(summary.shapes(profile)) - text.SHAPES} more in the JSON" in printed


def test_what_went_wrong_is_said():
    printed = text.table(SAMPLES["broken"]())
    assert "partial, the generation broke off: OutOfMemoryError" in printed
    assert "check failed: time in named categories: 93.1 %, wanted at least 97 %" in printed
    assert "attention calls labelled" not in printed  # that check has passed
    assert "nothing was recorded" in text.table(SAMPLES["empty"]())


def test_a_copy_is_measured_against_the_bandwidth():
    """Without operations the roof at intensity 0 is 0: the share is that of the measured copy."""
    profile = SAMPLES["wan"]()
    rows = tuple(replace(row, pointwise=0) if row.operator == "layout" else row for row in profile.rows)
    profile = replace(profile, rows=rows)
    (layout,) = [share for share in summary.categories(profile) if share.name == "layout copies"]
    expected = layout.bytes / (layout.ms / 1e3) / profile.ceilings.copy_bandwidth
    assert layout.work == 0 and text.of_roof(profile)["layout copies"] == pytest.approx(expected)


# -- Markdown -----------------------------------------------------------------------------------------------------------


def seen(page: str) -> list[str]:
    return [line for line in page.split("<details>")[0].splitlines() if line]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_pull_request_shows_twenty_lines_and_folds_the_rest(name):
    page = markdown.summary(SAMPLES[name]())
    assert len(seen(page)) <= 20
    assert page.count("<details>") == page.count("</details>") == 1 and page.rstrip().endswith("</details>")
    assert not re.search(r"<(style|script|img|svg)|data:image", page)
    checked_tables(page)


def checked_tables(page: str) -> None:
    """Every row of a table has as many cells as its head."""
    cells = 0
    for line in page.splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line)) - 1
        cells = cells or found
        assert found == cells, line


def test_the_seen_part_answers_what_to_speed_up():
    profile = SAMPLES["svd"]()
    visible = "\n".join(seen(markdown.summary(profile)))
    ranked = summary.categories(profile)
    for share in ranked[: markdown.ROWS]:
        assert f"| {share.name} | {share.ms:,.1f} | {share.share:.1%} |" in visible
    assert f"| {len(ranked) - markdown.ROWS} others |" in visible
    assert f"would be {summary.without_attention(profile):.2f}x faster" in visible
    assert "temporal attention takes" in visible and "torch 2.13.0+cu128" in visible


def test_failed_checks_are_not_folded():
    visible = "\n".join(seen(markdown.summary(SAMPLES["broken"]())))
    assert "check failed: time in named categories" in visible and "broke off: OutOfMemoryError" in visible


def test_what_a_user_typed_is_no_markup():
    profile = replace(SAMPLES["svd"](), title=HOSTILE, arguments={"prompt": HOSTILE}, error=HOSTILE)
    page = markdown.summary(profile)
    assert "<script>" not in page and "@somebody" not in page and "#12" not in page
    assert r"\*loud\*" in page and r"\`code\`" in page and r"a\|b" in page
    checked_tables(page)


def test_a_comparison_shows_the_change_of_every_category():
    compared = profile_samples.comparison()
    page = markdown.comparison(compared)
    assert len(seen(page)) <= 20
    checked_tables(page)
    full = comparison.categories(compared)[0]
    assert full.name == "full 3-D self-attention" and full.speedup == pytest.approx(1.6, rel=0.01)
    assert f"| full 3-D self-attention | {full.base_ms:,.1f} | {full.patched_ms:,.1f} | 1.60x |" in page
    visible = "\n".join(seen(page))
    assert "PSNR 31.20 dB" in visible and "noise floor PSNR 33.90 dB" in visible and "faster, 1.23x" in visible
    for delta in comparison.categories(compared):
        assert f"| {delta.name} |" in page
    assert len(re.findall(r"^\| \d+ \| \d+\.\d\d dB \|", page, re.MULTILINE)) == len(compared.quality.psnr_frames)


def test_a_comparison_in_the_terminal():
    compared = profile_samples.comparison()
    printed = str(compared)
    assert max(map(len, printed.splitlines())) <= text.WIDTH
    rows = {row[0]: row[1:] for row in rows_of(printed, "time by category, ms")}
    base, patched = comparison.medians(compared.timing)
    assert rows["wall time (median)"][:2] == [f"{base:,.1f}", f"{patched:,.1f}"]
    categories = [row for name, row in rows.items() if name != "wall time (median)"]
    for side, whole in ((0, base), (1, patched)):
        assert sum(float(row[side].replace(",", "")) for row in categories) == pytest.approx(whole, abs=1)
    assert printed.replace("\n", " ").rstrip().endswith(comparison.verdict(compared))
    assert "LPIPS: not computed, the package lpips is not installed" in printed


# -- JSON ---------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_read_as_it_was_written():
    compared = profile_samples.comparison()
    again = Comparison.from_json(compared.to_json())
    assert again.to_json() == compared.to_json()
    assert again.control == compared.control and again.pairs == compared.pairs and again.notes == compared.notes
    assert again.quality.psnr_frames == pytest.approx(compared.quality.psnr_frames, rel=1e-5)
    assert type(again.timing) is type(compared.timing) and again.timing.rounds == compared.timing.rounds
    assert json.loads(compared.to_json())["schema"] == "videoattn.comparison/1"


@pytest.mark.parametrize(
    "wrong", ["{}", "[]", "no json", '{"schema": "videoattn.comparison/1"}', '{"schema": "videoattn.comparison/9"}']
)
def test_what_is_no_comparison_is_refused(wrong):
    with pytest.raises(ValueError, match=r"videoattn\.comparison/1|comparison"):
        Comparison.from_json(wrong)


def test_json_knows_no_infinity():
    still = np.full((3, 16, 16, 3), 0.5)
    found = Quality.of(compare_videos(still, still))
    assert found.identical and found.psnr is None and found.psnr_frames == (None,) * 3 and found.motion is None
    assert str(found) == "identical"
    compared = replace(profile_samples.comparison(), quality=found)
    again = Comparison.from_json(compared.to_json())
    assert again.quality == found and "identical" in markdown.comparison(again) and "identical" in str(again)


def test_a_folder_gives_back_what_was_written_to_it(tmp_path):
    for report in (profile_samples.svd(), profile_samples.comparison()):
        files = folder.write(report, tmp_path)
        assert [file.name for file in files] == ["report.html", "report.json", "report.md"]  # samples have no trace
        again = folder.read(tmp_path / "report.json")
        assert type(again) is type(report) and again.to_json() == report.to_json()
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"report\.json: wanted the JSON of a report"):
        folder.read(tmp_path / "report.json")


# -- Perfetto -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict:
    """A trace as torch.profiler exports it, with our ranges on two modules."""
    model, ranges = nn.Sequential(Attention(), nn.Linear(8, 8)), Ranges()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        Scopes({"transformer": model}, ranges),
    ):
        ranges.enter(ROOT)
        model(torch.zeros(1, 2, 16, 8))
        ranges.leave(ROOT)
    file = tmp_path_factory.mktemp("trace") / "trace.json"
    profiler.export_chrome_trace(str(file))
    return json.loads(file.read_text())


def profile_of(site: str) -> Profile:
    call = AttentionCall(
        stage="transformer",
        site=site,
        kind="temporal",
        step=0,
        steps=1,
        branch="0",
        batch=1,
        heads=2,
        kv_heads=2,
        q_len=16,
        kv_len=16,
        head_dim=8,
        dtype="float32",
        backend="sdpa_cpu",
        ms=1.0,
        flops=1,
        bytes=1,
    )
    return replace(profile_samples.empty(), title="a tiny run", calls=(call,))


def test_perfetto_gets_readable_ranges_and_plots_in_a_valid_trace(recorded):
    names = {event.get("name") for event in recorded["traceEvents"]}
    assert "va:transformer.0" in names
    start = next(event["ts"] for event in recorded["traceEvents"] if event.get("name") == "va:transformer.0")
    before = json.dumps(recorded)
    tracks = {"sequence length": [(start + 5.0, 64), (start, 16)], "bytes alive": [(start, 1024)]}

    written = perfetto.annotate(recorded, profile_of("transformer.0"), tracks)

    assert json.dumps(recorded) == before  # the user's own trace
    trace = json.loads(gzip.decompress(written), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert trace["videoattn"] == {"schema": "videoattn.profile/1", "title": "a tiny run", "device": "cpu", "policy": ""}
    assert {**trace, "traceEvents": 0, "videoattn": 0} == {**recorded, "traceEvents": 0, "videoattn": 0}
    for event in trace["traceEvents"]:
        assert isinstance(event["ph"], str) and "pid" in event and isinstance(event["name"], str)
        assert event["ph"] == "M" or np.isfinite(event["ts"])
        assert event["ph"] != "X" or event["dur"] >= 0
    ours = {event["name"]: event for event in trace["traceEvents"] if event.get("cat") == "videoattn"}
    assert "transformer.0 (temporal self-attention)" in ours and "transformer.1" in ours and "pipeline" in ours
    assert ours["transformer.1"]["args"]["module"] == "transformer.1"
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert [(c["name"], c["ts"] - start, c["args"]) for c in counters] == [
        ("sequence length", 0.0, {"sequence length": 16}),
        ("sequence length", 5.0, {"sequence length": 64}),
        ("bytes alive", 0.0, {"bytes alive": 1024}),
    ]
    assert {c["pid"] for c in counters} == {ours["transformer.1"]["pid"]}
    assert len(trace["traceEvents"]) == len(recorded["traceEvents"]) + 3


def test_the_backend_of_a_call_is_named():
    event = {"ph": "X", "name": "va.attend:flash_hopper", "pid": 7, "tid": 7, "ts": 1.0, "dur": 2.0, "cat": "cpu_op"}
    other = {"ph": "X", "name": "variance", "pid": "GPU", "tid": 0, "ts": 1.0, "dur": 2.0}
    trace = json.loads(gzip.decompress(perfetto.annotate({"traceEvents": [event, other]}, profile_of("x"))))
    assert [e["name"] for e in trace["traceEvents"]] == ["attention by flash_hopper", "variance"]
    assert trace["traceEvents"][1] == other


def test_what_is_no_trace_is_refused(recorded):
    with pytest.raises(ValueError, match="traceEvents, got the keys events"):
        perfetto.annotate({"events": []}, profile_of("x"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        perfetto.annotate(recorded, profile_of("x"), {"bytes alive": [(1.0, float("nan"))]})


def test_the_same_run_gives_the_same_file(recorded):
    profile = profile_of("transformer.0")
    assert perfetto.annotate(recorded, profile) == perfetto.annotate(recorded, profile)
