"""A profile, or a comparison, as one HTML file: it opens from disk, asks no network for anything, and is below 3 MB
without the frames of a video.

Everything that follows from a profile is computed in Python, by summary.py, and lies in the page as JSON (drawn.py); its
scripts (page/) only draw that. Beside it lies the exact JSON, gzipped.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import statistics
import string
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from videoattn.profiling import comparison as compared
from videoattn.profiling import drawn, summary
from videoattn.profiling.comparison import Comparison, Quality
from videoattn.profiling.profile import Profile

EXACT = 1_200_000  # characters of the exact JSON, compressed: beyond, the page does not carry it

_PAGE = Path(__file__).with_name("page")
_SCRIPTS = ("elements", "plots", "roofline", "tables", "time", "attention", "memory", "video", "report")


def render(profile: Profile) -> str:
    """The page of one profile, also of a partial or an empty one."""
    verdict = summary.advice(profile)
    return _page(
        {
            "kind": "profile",
            "title": profile.title,
            "about": _about(profile),
            "error": profile.error,
            "verdict": _sentences(verdict[:1].upper() + verdict[1:]),
            "figures": _figures(profile),
            "checks": [asdict(check) for check in profile.checks],
            "notes": list(profile.notes),
            "runs": [drawn.run(profile, "")],
            "exact": _exact("profile", replace(profile, frames=()).to_json(), bool(profile.frames)),
        }
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of two profiles of the same generation, before and after."""
    runs = (("before", comparison.base), ("after", comparison.patched))
    bare = replace(
        comparison, base=replace(comparison.base, frames=()), patched=replace(comparison.patched, frames=()), pairs=()
    )
    return _page(
        {
            "kind": "comparison",
            "title": comparison.title,
            "about": [*_about(comparison.base), comparison.policy],
            "error": "; ".join(f"{name}: {run.error}" for name, run in runs if run.error),
            "verdict": _compared_verdict(comparison),
            "figures": _compared_figures(comparison),
            "checks": [asdict(c) | {"name": f"{name}: {c.name}"} for name, run in runs for c in run.checks],
            "notes": _compared_notes(comparison),
            "runs": [drawn.run(run, name) for name, run in runs],
            "deltas": _deltas(comparison),
            "quality": _quality_rows(comparison),
            "psnr": {
                "video": comparison.quality.psnr_frames,
                "floor": comparison.floor.psnr_frames if comparison.floor else (),
            },
            "latents": comparison.latents,
            "control": comparison.control.why,
            "lpips_why": comparison.lpips_why,
            "measured": _measured(comparison),
            "pairs": [asdict(pair) for pair in comparison.pairs],
            "exact": _exact("comparison", bare.to_json(), bool(comparison.pairs)),
        }
    )


def _page(data: Mapping[str, Any]) -> str:
    return string.Template(_text("report.html")).substitute(
        title=html.escape(data["title"]),
        verdict=html.escape(" ".join(data["verdict"])),
        style=_text("report.css"),
        script="\n".join(_text(f"{name}.js") for name in _SCRIPTS),
        # Every "<" is escaped, so that no text of a profile ends the element that it lies in.
        data=json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _finite(value: Any) -> Any:
    """For JSON: six digits of every float, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _sentences(text: str) -> list[str]:
    """The first sentence, which is set large, and the rest."""
    first, _, rest = text.partition(". ")
    return [first + "."] + ([rest] if rest else []) if rest or not text.endswith(".") else [text]


def _about(profile: Profile) -> list[str]:
    parts = (profile.pipeline, ", ".join(profile.denoisers), profile.device, profile.policy)
    return [*dict.fromkeys(part for part in parts if part)]


# ------------------------------------------------------------------------------------------------------------ figures


def _figures(profile: Profile) -> list[dict[str, str]]:
    clean, ranked, memory = profile.clean_ms, summary.categories(profile), profile.memory
    if not clean:
        wall = _figure("Wall time, recorded", _seconds(profile.recorded_ms), "no untouched run came to its end")
    else:
        span = f"{_seconds(min(clean))} to {_seconds(max(clean))}"
        runs = "one untouched run" if len(clean) == 1 else f"median of {len(clean)} untouched runs, {span}"
        wall = _figure("Wall time", _seconds(summary.clean_ms(profile)), runs)
    figures = [wall]
    if ranked:
        first = ranked[0]
        figures.append(_figure("Most of it", f"{first.share:.0%}", f"{first.name}, {_seconds(first.ms)}"))
        figures.append(
            _figure("Without attention", f"{summary.without_attention(profile):.2f}x", "as fast, were attention free")
        )
    if memory:
        held = f"{_gib(memory.weights_bytes)} of it weights; reached in {'.'.join(memory.peak_module.split('.')[:2])}"
        figures.append(_figure("Peak memory", _gib(memory.peak_bytes), held))
    if profile.recorded_ms:
        cost = f"recorded, it took {summary.overhead(profile):.2f}x as long" if clean else "of the recorded run"
        if profile.clock == "device":
            figures.append(_figure("GPU busy", f"{profile.busy_ms / profile.recorded_ms:.0%}", cost))
        else:
            figures.append(_figure("Recorded", _seconds(profile.recorded_ms), cost))
    return figures


def _compared_figures(comparison: Comparison) -> list[dict[str, str]]:
    timing, quality, floor = comparison.timing, comparison.quality, comparison.floor
    before, after = compared.medians(timing)
    interval = f"{timing.verdict}; between {timing.ci_lo:.2f} and {timing.ci_hi:.2f}, noise {timing.noise:.1%}"
    figures = [
        _figure("Speed-up", f"{timing.ratio:.2f}x" if compared.is_shown(timing) else "not shown", interval),
        _figure(
            "Wall time", _seconds(after), f"before: {_seconds(before)}; medians of {len(timing.base_ms)} runs each"
        ),
        _figure("PSNR", compared.decibel(quality.psnr), _quality_note(quality, floor)),
    ]
    memories = [run.memory for run in (comparison.base, comparison.patched)]
    if all(memories):
        base, patched = (memory.peak_bytes for memory in memories if memory)
        figures.append(_figure("Peak memory", _gib(patched), f"before: {_gib(base)}"))
    base, patched = (
        summary.attention_ms(p) / (summary.total_ms(p) or 1) for p in (comparison.base, comparison.patched)
    )
    figures.append(_figure("Attention", f"{patched:.0%}", f"of the time; before: {base:.0%}"))
    return figures


def _compared_verdict(comparison: Comparison) -> list[str]:
    timing, quality, floor, policy = comparison.timing, comparison.quality, comparison.floor, comparison.policy
    before, after = map(_seconds, compared.medians(timing))
    first = {
        "faster": f"{timing.ratio:.2f}x faster with {policy}: {before} become {after}.",
        "slower": f"{1 / timing.ratio:.2f}x slower with {policy}: {before} become {after}.",
    }.get(timing.verdict, f"No difference in time shown with {policy}: {before} before, {after} after.")
    if quality.identical:
        return [first, "The videos are identical."]
    apart = "" if floor is None else f"; those of two exact kernels {_apart(floor)}"
    return [first, f"The videos {_apart(quality)}{apart}."]


def _apart(quality: Quality) -> str:
    return "are identical" if quality.identical else f"are {compared.decibel(quality.psnr)} apart"


def _compared_notes(comparison: Comparison) -> list[str]:
    base, patched = comparison.base.notes, comparison.patched.notes
    only = [
        f"{name}: {note}"
        for name, notes, other in (("before", base, patched), ("after", patched, base))
        for note in notes
        if note not in other
    ]
    return [*comparison.notes, *(note for note in base if note in patched), *only]


def _quality_note(quality: Quality, floor: Quality | None) -> str:
    worst = "" if quality.identical else f"worst frame {compared.decibel(quality.psnr_worst)}; "
    return worst + ("no noise floor" if floor is None else f"two exact kernels: {compared.decibel(floor.psnr)}")


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _seconds(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1e3 else f"{ms / 1e3:.3g} s" if ms < 1e6 else f"{ms / 1e3:,.0f} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.3g} MiB"


# ---------------------------------------------------------------------------------------------------------- comparison


def _deltas(comparison: Comparison) -> list[dict[str, Any]]:
    """Categories before and after, in them their modules; ms of the clean wall time."""
    profiles = (comparison.base, comparison.patched)
    key_of = drawn.keys(comparison.base) | drawn.keys(comparison.patched)
    scales = [summary.clean_ms(p) / (summary.total_ms(p) or 1) for p in profiles]
    found = []
    for delta in compared.categories(comparison):
        sides = [
            {share.name: share.ms * scale for share in summary.modules(p, delta.name)}
            for p, scale in zip(profiles, scales, strict=True)
        ]
        modules = [
            {"name": name, "before": sides[0].get(name, 0.0), "after": sides[1].get(name, 0.0)}
            for name in dict.fromkeys((*sides[0], *sides[1]))
        ]
        modules.sort(key=lambda module: -max(module["before"], module["after"]))
        values = {"name": delta.name, "before": delta.base_ms, "after": delta.patched_ms}
        found.append(values | {"key": key_of[delta.name], "modules": modules[: drawn.MODULES]})
    return found


def _measured(comparison: Comparison) -> dict[str, str]:
    """How the times came about, and what they do not hold."""
    timing, control = comparison.timing, comparison.control
    facts = {
        "Rounds": f"{timing.rounds}, of two runs each of both, in turns",
        "Control of the times": f"two halves in which the same ran differ by {timing.noise:.1%} at the most",
        "Network calls": f"{comparison.base_calls:g} before, {comparison.patched_calls:g} after",
        "First generation": f"{_seconds(timing.first_base_ms)} before, {_seconds(timing.first_patched_ms)} after, of it "
        f"{_seconds(timing.planning_ms)} for the choice, check and compilation of kernels",
    }
    if control.ms:
        wall, calls = _seconds(statistics.median(control.ms)), f"{control.calls:g} network calls"
        facts["Control of the steps"] = f"the base sampler with {calls}, {control.steps} of its steps: {wall}"
    return facts


def _quality_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = [("after against before", comparison.quality), ("noise floor: two exact kernels", comparison.floor)]
    rows.append(("control: the base sampler with as few network calls", comparison.control.quality))
    return [
        {"name": name, "lpips": comparison.lpips if i == 0 else None} | asdict(quality) | {"psnr_frames": None}
        for i, (name, quality) in enumerate(rows)
        if quality is not None
    ]


def _exact(name: str, text: str, pictures: bool) -> dict[str, Any]:
    """The JSON form for a data: link; empty where it would make the page too large."""
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    kept = packed if len(packed) <= EXACT else ""
    return {"name": f"{name}.json.gz", "bytes": len(packed) * 3 // 4, "gzip": kept, "without_pictures": pictures}
