"""The HTML report: what the page draws is what the profile says, alone, in a real browser, wide and narrow."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import browser as browsers
import numpy as np
import profile_samples as samples
import pytest
from PIL import Image

from videoattn.profiling import comparison as compared
from videoattn.profiling import drawn, html, summary
from videoattn.profiling.comparison import Comparison
from videoattn.profiling.profile import Profile

MADE: dict[str, Callable[[], Profile]] = {
    "wan": samples.wan,
    "svd": samples.svd,
    "partial": lambda: samples.broken(samples.wan()),
    "empty": samples.empty,
    "large": samples.large,
}
NAMES = (*MADE, "comparison")


@pytest.fixture(scope="module")
def browser():
    with browsers.Browser(browsers.required()) as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Profile | Comparison, Path]]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name in NAMES:
        path = folder / f"{name}.html"
        if name == "comparison":
            result = samples.comparison()
            path.write_text(html.render_comparison(result))
        else:
            result = MADE[name]()
            path.write_text(html.render(result))
        found[name] = result, path
    return found


def texts(page: browsers.Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def count(page: browsers.Page, selector: str) -> int:
    return page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def boxes(page: browsers.Page, selector: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of each."""
    return page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.getBoundingClientRect())"
        ".map((b) => [b.left, b.top, b.right, b.bottom])"
    )


def rows(page: browsers.Page, section: str) -> list[list[str]]:
    """The cells of the rows of the first table in a section."""
    return page.evaluate(
        f"[...document.querySelector('#{section} tbody').rows].map((row) => [...row.cells].map((c) => c.textContent))"
    )


# ----------------------------------------------------------------------------------------------------- the whole page


@pytest.mark.parametrize("dark, width", [(False, 1280), (True, 400)])
@pytest.mark.parametrize("name", NAMES)
def test_page_is_silent_alone_and_fits(browser, made, name, dark, width):
    with browser.open(made[name][1], width=width, dark=dark) as page:
        assert page.messages == []
        assert {address.partition(":")[0] for address in page.requests} <= {"file", "data"}
        assert [address for address in page.requests if address.startswith("file:")] == [made[name][1].as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        outside = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 ||"
            " e.getBoundingClientRect().left < -0.5).map((e) => e.outerHTML.slice(0, 120))"
        )
        assert outside == []
        paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert paper == ("rgb(17, 19, 23)" if dark else "rgb(253, 253, 251)")


def test_console_errors_and_requests_would_be_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<script>console.warn('careful'); setTimeout(() => { throw new Error('late'); })</script>"
        "<img src='http://127.0.0.1:9/picture.png'>"
    )
    with browser.open(tmp_path / "bad.html") as page:
        assert any("careful" in message for message in page.messages)
        assert any("late" in message for message in page.messages)
        assert "http://127.0.0.1:9/picture.png" in page.requests


def test_policy_of_the_page_forbids_the_network(browser, made):
    with browser.open(made["empty"][1]) as page:
        done = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')")
        assert done == "refused"
        assert any("Content Security Policy" in message for message in page.messages)


@pytest.mark.parametrize("name", ["large", "svd"])
def test_size(made, name):
    profile, path = made[name]
    if name == "large":
        assert (len(profile.calls), len(profile.rows)) == (8000, 5000)
    assert path.stat().st_size - sum(map(len, profile.frames)) < (3e6 if name == "large" else 3e5)


def test_large_page_draws_little(browser, made):
    """What makes a page slow is the number of its elements: rows and calls are made when they are asked for."""
    with browser.open(made["large"][1]) as page:
        assert count(page, "*") < 4000
        view = page.evaluate("after.sequence.map((view) => view.lines.map((line) => line.points.length))")
        assert max(itertools.chain(*view)) <= drawn.POINTS


# ----------------------------------------------------------------------------------------------------------- the head


def test_head_answers_what_to_speed_up(browser, made):
    profile, path = made["wan"]
    with browser.open(path) as page:
        said = page.evaluate("document.querySelector('.verdict').textContent")
        assert said.lower() == summary.advice(profile).lower()
        values = texts(page, ".figure .value")
        assert values == [
            f"{summary.clean_ms(profile) / 1e3:.3g} s",
            f"{summary.categories(profile)[0].share:.0%}",
            f"{summary.without_attention(profile):.2f}x",
            f"{profile.memory.peak_bytes / 2**30:.1f} GiB",
            f"{profile.busy_ms / profile.recorded_ms:.0%}",
        ]
        assert boxes(page, ".figure")[-1][3] < 320 and boxes(page, "#time tbody tr")[5][3] < 800  # on the first screen


def test_failed_checks_and_a_broken_run_come_first(browser, made):
    _, path = made["partial"]
    with browser.open(path) as page:
        partial, failed = texts(page, ".alarm")
        assert "OutOfMemoryError in vae.decode" in partial
        assert "time in named categories 93.1 %, wanted at least 97 %" in failed
        assert max(box[3] for box in boxes(page, ".alarm")) < boxes(page, ".verdict")[0][1]
        red = page.evaluate("getComputedStyle(document.querySelector('.alarm b')).color")
        assert red == "rgb(179, 18, 29)"
    with browser.open(made["wan"][1]) as page:
        assert count(page, ".alarm") == 0
        assert "5 checks passed" in texts(page, ".passed summary")[0]


def test_empty_profile_says_so(browser, made):
    with browser.open(made["empty"][1]) as page:
        assert texts(page, ".verdict") == ["Nothing was recorded."]
        assert count(page, "svg") == 0
        assert "the first module raised" in texts(page, ".alarm")[0]


def test_a_run_of_nothing_but_attention(browser, tmp_path):
    profile = samples.svd()
    only = tuple(row for row in profile.rows if row.operator == "spatial")
    (tmp_path / "page.html").write_text(html.render(replace(profile, rows=only)))
    with browser.open(tmp_path / "page.html") as page:
        assert texts(page, ".figure .value")[1:3] == ["100%", "infx"]
        assert page.messages == []


# ----------------------------------------------------------------------------------------------------- plots and data


@pytest.mark.parametrize("name", ["wan", "svd"])
def test_marks_are_those_of_the_data(browser, made, name):
    profile, path = made[name]
    ranked = summary.categories(profile)
    with browser.open(path) as page:
        bars = boxes(page, "#time svg .mark")
        assert len(bars) == len(ranked)
        whole = bars[-1][2] - bars[0][0]
        assert [(right - left) / whole for left, _, right, _ in bars] == pytest.approx(
            [share.share for share in ranked], abs=0.003
        )
        denoised = [call for call in profile.calls if call.step >= 0]
        assert count(page, "#sequence .line") == len({call.kind for call in denoised})
        assert count(page, "#roofline .disc") == len(summary.roofline(profile, ranked))
        assert count(page, "#roofline .point.heavy") == 10
        assert count(page, "#roofline path.roof") == 1 + len(profile.ceilings.flops)
        line = page.evaluate("document.querySelector('#memory .line').dataset.points")
        assert int(line) == len(profile.memory.timeline)
        assert count(page, "#memory circle.peak") == 1
        assert count(page, "#frames img") == len(profile.frames)
        assert page.evaluate("[...document.images].every((image) => image.naturalWidth === 208)")
        assert len(rows(page, "io")) == len(summary.shapes(profile))


def test_categories_have_the_figures_of_the_summary(browser, made):
    profile, path = made["svd"]
    points = {point.name: point for point in summary.roofline(profile, summary.categories(profile))}
    with browser.open(path) as page:
        for cells, share in zip(rows(page, "time"), summary.categories(profile), strict=True):
            name, calls, ms, part, tflop, gb, intensity, roof = cells
            assert (name, calls) == (share.name, f"{share.calls:,}")
            assert float(ms.replace(",", "")) == pytest.approx(share.ms, abs=0.051)
            if share.share > 0.001:
                assert float(part.rstrip("%")) == pytest.approx(100 * share.share, abs=0.051)
            assert float(tflop.replace(",", "") or 0) == pytest.approx(share.flops / 1e12, rel=5e-3, abs=1e-9)
            assert float(gb.replace(",", "") or 0) == pytest.approx(share.bytes / 1e9, rel=5e-3)
            assert float(intensity.replace(",", "") or 0) == pytest.approx(
                share.work / share.bytes if share.bytes else 0, rel=5e-3
            )
            if share.name in points:
                point = points[share.name]
                reached = (
                    point.flops_per_second / point.roof
                    if point.roof
                    else point.bytes_per_second / samples.CEILINGS.copy_bandwidth
                )
                assert float(roof) == pytest.approx(100 * reached, abs=0.51)


def test_sequence_follows_the_levels_of_a_unet(browser, made):
    profile, path = made["svd"]
    lengths = [call.q_len for call in profile.calls if call.kind == "spatial" and call.step == 0]
    changes = [length for length, _ in itertools.groupby(lengths)]
    assert changes == [9216, 2304, 576, 144, 576, 2304, 9216]
    with browser.open(path) as page:
        assert page.evaluate("after.sequence[0].lines[0].points.map((point) => point[1])") == changes
        heights = re.findall(
            r"M[\d.]+,([\d.]+)H", page.evaluate("document.querySelector('#sequence .line').getAttribute('d')")
        )
        steps = np.diff([float(height) for height in heights])
        assert steps == pytest.approx([steps[0]] * 3 + [-steps[0]] * 3, abs=0.3)  # a quarter each: equal on a log axis
        page.click("#sequence .switch button:nth-child(2)")
        assert page.evaluate("Number(document.querySelector('#sequence .line').dataset.points)") == 4 * 6 + 1
        assert (
            page.evaluate("document.querySelector('#sequence [aria-pressed=true]').textContent")
            == "Whole run, 256 calls"
        )


@pytest.mark.parametrize("name", ["wan", "svd", "large", "comparison"])
def test_labels_of_the_roofline_do_not_overlap(browser, made, name):
    with browser.open(made[name][1]) as page:
        for width in (1280, 1000, 400):
            page.resize(width, 800)
            page.settle()
            labels = boxes(page, "#roofline text.point-name, #roofline text.strong")
            assert len(labels) >= 5
            for a, b in itertools.combinations(labels, 2):
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (width, a, b)


def test_labels_of_a_bar_lie_in_it(browser, made):
    with browser.open(made["wan"][1]) as page:
        parts = page.evaluate(
            "[...document.querySelectorAll('#time .part')].filter((part) => part.querySelector('text')).map((part) =>"
            " [part.querySelector('rect'), part.querySelector('text')].map((e) => e.getBoundingClientRect().right))"
        )
        assert len(parts) >= 3 and all(text < rect for rect, text in parts)


# ------------------------------------------------------------------------------------------------------- what one does


def test_a_category_opens_to_its_modules_and_those_to_their_operators(browser, made):
    profile, path = made["wan"]
    closed = len(summary.categories(profile))
    with browser.open(path) as page:
        linear = "#time tr[data-row='linear'] .expand"
        assert page.evaluate(f'document.querySelector("{linear}").getAttribute("aria-expanded")') == "false"
        page.click(linear)
        assert page.evaluate(f'document.querySelector("{linear}").getAttribute("aria-expanded")') == "true"
        wanted = [share.name for share in summary.modules(profile, "linear")]
        assert texts(page, "#time .level-1 th") == wanted
        assert "transformer.blocks.*.ffn.net.*.proj" in wanted
        page.click("#time tr[data-row='linear/transformer.blocks.*.attn1.to_q'] .expand")
        operators = texts(page, "#time .level-2 th")
        assert set(operators) == {op for row in profile.rows if row.operator == "linear" for op in row.ops}
        page.click(linear)
        assert len(rows(page, "time")) == closed
        page.click("#time svg .part:nth-child(3)")  # the bar opens them too: the third after its definitions
        assert count(page, "#time .level-1") > 0


def test_keyboard_reaches_and_opens_rows(browser, made):
    with browser.open(made["wan"][1]) as page:
        page.evaluate("document.querySelector('#time tbody .expand').focus()")
        page.press("Enter")
        assert texts(page, "#time .level-1 th") == ["transformer.blocks.*.attn1"]
        page.press("Tab")
        assert (
            page.evaluate("document.activeElement.dataset.id") == "full 3-D self-attention/transformer.blocks.*.attn1"
        )
        page.press("Enter")
        assert "flash_fprop" in texts(page, "#time .level-2 th")[0]
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


@pytest.mark.parametrize("width", [1280, 400])
def test_columns_sort_both_ways(browser, made, width):
    with browser.open(made["svd"][1], width=width) as page:

        def column(i: int) -> list[str]:
            return [cells[i] for cells in rows(page, "time")]

        page.click("#time th:nth-child(2) .sort")
        calls = [int(value.replace(",", "")) for value in column(1)]
        assert calls == sorted(calls, reverse=True) and len(set(calls)) > 5
        assert texts(page, "#time [aria-sort=descending]") == ["Calls"]
        page.click("#time th:nth-child(2) .sort")
        assert [int(value.replace(",", "")) for value in column(1)] == sorted(calls)
        assert texts(page, "#time [aria-sort=ascending]") == ["Calls"]
        page.click("#time th:nth-child(1) .sort")
        assert column(0) == sorted(column(0)) and column(0) != sorted(column(0), reverse=True)
        page.click("#time th:nth-child(8) .sort")  # rows without a value come last
        assert column(7)[-1] == "" and column(7)[0] != ""


def test_calls_one_by_one(browser, made):
    profile, path = made["svd"]
    with browser.open(path) as page:
        assert count(page, ".calls tr") == 0
        page.click(".calls summary")
        page.settle()
        assert texts(page, ".calls summary") == ["All 256 calls, one by one"]
        assert count(page, ".calls tbody tr") == 101  # and the row that offers more
        first = page.evaluate("[...document.querySelector('.calls tbody tr').cells].map((cell) => cell.textContent)")
        call = profile.calls[0]
        assert first[:6] == [call.site, "0", "0, branch 0", "spatial", "50 × 5 × 9216 × 9216 × 64", call.backend]
        assert float(first[6]) == pytest.approx(call.ms, rel=0.01)
        assert float(first[7]) == pytest.approx(call.flops / call.ms / 1e9, rel=0.01)
        page.click(".calls .more")
        assert count(page, ".calls tbody tr") == 201


def test_too_many_calls_are_left_out_and_the_page_says_so(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "CALLS", 100)
    monkeypatch.setattr(drawn, "MODULES", 3)
    monkeypatch.setattr(html, "EXACT", 100)
    profile = samples.svd()
    (tmp_path / "page.html").write_text(html.render(profile))
    with browser.open(tmp_path / "page.html") as page:
        assert texts(page, ".calls summary") == ["The longest 100 of 256 calls; all are in the exact JSON"]
        longest = sorted((call.ms for call in profile.calls), reverse=True)[:100]
        assert sorted(page.evaluate("after.calls.ms"), reverse=True) == pytest.approx(longest, rel=1e-5)
        page.click("#time tr[data-row='linear'] .expand")
        assert texts(page, "#time .level-1 th")[-1] == f"{len(summary.modules(profile, 'linear')) - 3} more"
        shown = page.evaluate("after.categories.find((c) => c.name === 'linear').modules.reduce((a, m) => a + m.ms, 0)")
        assert shown == pytest.approx(sum(share.ms for share in summary.modules(profile, "linear")), rel=1e-4)
        assert count(page, "#exact a") == 0 and "too large" in texts(page, "#exact")[0]


@pytest.mark.parametrize("name", ["wan", "comparison"])
def test_exact_data_comes_out_again(browser, made, name):
    result, path = made[name]
    with browser.open(path) as page:
        link = page.evaluate("(({href, download}) => [href, download])(document.querySelector('a.download'))")
    kind, _, packed = link[0].partition(",")
    assert (kind, link[1]) == (
        "data:application/gzip;base64",
        "profile.json.gz" if name == "wan" else f"{name}.json.gz",
    )
    text = gzip.decompress(base64.b64decode(packed)).decode()
    if name == "wan":
        assert text == replace(result, frames=()).to_json()
        assert Profile.from_json(text).to_json() == text
    else:
        assert Comparison.from_json(text).timing.ratio == pytest.approx(result.timing.ratio, rel=1e-5)


def test_no_text_of_a_profile_is_run(browser, tmp_path):
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!--<script>"
    profile = samples.svd()
    rows_ = tuple(replace(row, module=f"unet.{evil}") for row in profile.rows[:5])
    bad = replace(
        profile, title=evil, error=evil, notes=(evil,), arguments={evil: evil}, rows=rows_, environment={"date": evil}
    )
    (tmp_path / "page.html").write_text(html.render(bad))
    with browser.open(tmp_path / "page.html") as page:
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.title") == evil
        assert texts(page, "h1") == [evil] and texts(page, ".notes li") == [evil]
        assert texts(page, "#arguments dt") == [evil]
        page.click("#time .expand")
        assert evil in "".join(texts(page, "#time .level-1 th"))
        assert page.messages == []


# --------------------------------------------------------------------------------------------------------- comparison


def test_comparison_shows_both_sides(browser, made):
    result, path = made["comparison"]
    deltas = compared.categories(result)
    with browser.open(path) as page:
        assert texts(page, ".verdict")[0].startswith("1.23x faster with balanced: 6.26 s become 5.09 s.")
        assert texts(page, ".figure .value")[:3] == ["1.23x", "5.09 s", "31.20 dB"]
        assert count(page, "#time svg .mark") == sum(bool(d.base_ms) + bool(d.patched_ms) for d in deltas)
        cells = rows(page, "time")[0]
        assert cells[0] == "full 3-D self-attention" and cells[4] == "1.60x"
        assert float(cells[3].replace(",", "")) == pytest.approx(deltas[0].base_ms - deltas[0].patched_ms, abs=0.1)
        assert count(page, "#roofline .hollow.point") == count(page, "#roofline .disc.point") > 5
        assert count(page, "#memory .line") == 2
        points = page.evaluate("[...document.querySelectorAll('#quality .line')].map((e) => Number(e.dataset.points))")
        assert points == [81, 81, len(result.latents)]
        assert [row[1] for row in rows(page, "quality")] == ["31.20 dB", "33.90 dB"]
        assert "No LPIPS: the package lpips is not installed." in texts(page, "#quality .hint")[0]
        facts = dict(zip(texts(page, "#measured dt"), texts(page, "#measured dd"), strict=True))
        assert facts["Network calls"] == "8 before, 8 after" and facts["Rounds"].startswith("2,")
        assert "2.14 s for the choice" in facts["First generation"]
        page.click("#time tr[data-row='linear'] .expand")
        assert "transformer.blocks.*.attn1.to_q" in texts(page, "#time .level-1 th")


def test_slider_shows_the_pairs(browser, made):
    result, path = made["comparison"]
    with browser.open(path) as page:
        for i in (0, 3):
            page.evaluate(
                f"(() => {{ const s = document.querySelector('input[type=range]'); s.value = {i};"
                " s.dispatchEvent(new Event('input')); })()"
            )
            pair = result.pairs[i]
            shown = page.evaluate("[...document.querySelectorAll('.triple img')].map((e) => e.src.split(',')[1])")
            assert shown == [pair.base, pair.patched, pair.difference]
            assert texts(page, "output") == [f"frame {pair.index}"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"verdict": "not shown", "ratio": 1.002}, "No difference in time shown with balanced"),
        ({"verdict": "slower", "ratio": 0.8}, "1.25x slower with balanced"),
    ],
)
def test_verdict_of_a_comparison_is_honest(changes, said):
    made = samples.comparison(steps=1)
    page = html.render_comparison(replace(made, timing=replace(made.timing, **changes)))
    assert said in page


def test_the_control_of_a_cache_is_shown(browser, tmp_path):
    """Where the patched run makes fewer network calls, the base sampler with as many is its measure."""
    made = samples.comparison(steps=2)
    control = replace(
        made.control, why="as many calls", steps=1, calls=2.5, ms=(900.0, 910.0, 890.0), quality=made.floor
    )
    (tmp_path / "page.html").write_text(html.render_comparison(replace(made, control=control, patched_calls=2.5)))
    with browser.open(tmp_path / "page.html") as page:
        assert [row[0].partition(":")[0] for row in rows(page, "quality")] == [
            "after against before",
            "noise floor",
            "control",
        ]
        assert "the base sampler with 2.5 network calls, 1 of its steps: 900 ms" in texts(page, "#measured dd")
        assert "4 before, 2.5 after" in texts(page, "#measured dd")


def test_identical_videos_are_called_so(browser, tmp_path):
    made = samples.comparison(steps=1)
    none = dict.fromkeys(("psnr", "psnr_mean", "psnr_worst", "flicker_psnr"))
    same = replace(made.quality, identical=True, psnr_frames=(None,) * 81, **none)
    (tmp_path / "page.html").write_text(html.render_comparison(replace(made, quality=same, floor=None)))
    with browser.open(tmp_path / "page.html") as page:
        assert "The videos are identical." in texts(page, ".verdict")[0]
        assert rows(page, "quality")[0][1:3] == ["identical", "identical"]
        assert count(page, "#quality .line") == 0 and page.messages == []


# -------------------------------------------------------------------------------------------------------------- pieces


def test_thinning_keeps_the_extremes():
    random = np.random.default_rng(0)
    line = [(float(i), float(value)) for i, value in enumerate(random.normal(size=9000))]
    line[4321] = (4321.0, 99.0)
    line[77] = (77.0, -99.0)
    thinned = drawn.thin(line, 500)
    assert len(thinned) <= 500 and set(thinned) <= set(line)
    assert (thinned[0], thinned[-1]) == (line[0], line[-1])
    assert {line[4321], line[77]} <= set(thinned)
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert drawn.thin(line[:500], 500) == line[:500]


LINEAR_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LMS_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
SEEN = {  # Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_every_eye(scheme):
    """Distances in OKLab, x 100: 2 is just seen side by side. Text on a mark has the contrast of WCAG AA, 4.5."""
    style = (Path(html.__file__).parent / "page" / "report.css").read_text().partition("* { box-sizing")[0]
    parts = style.split("prefers-color-scheme: dark")
    named = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", parts[scheme]))
    linear = {}
    for name, value in named.items():
        rgb = np.array([int(value[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear[name] = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    def distance(a: str, b: str) -> float:
        def seen(matrix, name):
            return LMS_TO_OKLAB @ np.cbrt(LINEAR_TO_LMS @ np.clip(np.array(matrix) @ linear[name], 0, 1))

        return min(100 * float(np.linalg.norm(seen(m, a) - seen(m, b))) for m in SEEN.values())

    lines = ("spatial", "temporal", "cross", "joint", "text", "audio")
    bars = (
        "full",
        "temporal",
        "cross",
        "linear",
        "convolution",
        "normalisation",
        "elementwise",
        "layout",
        "vae-decode",
    )
    assert min(distance(a, b) for a, b in itertools.combinations(lines[:4], 2)) > 7.5
    assert min(distance(a, b) for a, b in itertools.combinations(lines, 2)) > 5
    assert min(distance(a, b) for a, b in itertools.combinations(bars, 2)) > 3

    def contrast(name: str) -> float:
        low, high = sorted(linear[n] @ [0.2126, 0.7152, 0.0722] + 0.05 for n in (name, "paper"))
        return high / low

    surfaces = ("line", "faint", "hover", "alarm-ground", "paper", "host")
    assert {name: contrast(name) for name in named if name not in surfaces and contrast(name) < 4.49} == {}


def test_screenshot(made, browser, tmp_path):
    browsers.screenshot(made["wan"][1], tmp_path / "page.png", 1280, 800)
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert picture.shape == (800, 1280, 3)
    assert (picture[2, 2] == (253, 253, 251)).all() and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


# -------------------------------------------------------------------------------------------------------- the browser


class TestFindingABrowser:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch, tmp_path):
        """A Debian as root without a browser; `commands` is what ran, and installing makes one appear."""
        self.commands, self.answers, self.present = [], [], False
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(browsers.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(browsers.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(browsers.shutil, "which", self.which)
        monkeypatch.setattr(browsers.subprocess, "run", self.run)

    def which(self, name):
        found = name == "apt-get" or (name == "chromium" and self.present)
        return f"/usr/bin/{name}" if found else None

    def run(self, command, **options):
        self.commands.append([word for word in command if word in ("update", "install", "chromium")])
        code, said = self.answers.pop(0) if self.answers else (0, "")
        self.present = self.present or (code == 0 and "install" in command)
        return subprocess.CompletedProcess(command, code, "", said)

    def test_it_is_installed(self):
        assert browsers.required() == "/usr/bin/chromium"
        assert self.commands == [["update"], ["install", "chromium"]]
        assert browsers.required() == "/usr/bin/chromium" and len(self.commands) == 2

    def test_locks_of_others_are_waited_for(self):
        self.answers = [(100, "E: Could not get lock /var/lib/apt/lists/lock")] * 3
        assert browsers.required() == "/usr/bin/chromium"
        assert self.commands == [["update"]] * 4 + [["install", "chromium"]]

    def test_a_failed_installation_fails(self):
        self.answers = [(0, ""), (100, "E: Unable to locate package chromium")]
        with pytest.raises(RuntimeError, match="Unable to locate"):
            browsers.required()

    def test_without_a_way_it_is_skipped_but_under_ci_it_fails(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(pytest.skip.Exception, match="wanted one of chromium"):
            browsers.required()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(browsers.NoBrowser, match="wanted one of chromium"):
            browsers.required()
        assert self.commands == []
