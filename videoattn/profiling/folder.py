"""A report on disk: one folder, every form of it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from videoattn.profiling import comparison, html, markdown
from videoattn.profiling.comparison import Comparison
from videoattn.profiling.profile import Profile

HTML, JSON, MARKDOWN, TRACE = "report.html", "report.json", "report.md", "trace.json.gz"
BASE_TRACE, PATCHED_TRACE = "trace_base.json.gz", "trace_patched.json.gz"


def require_writable(folder: Path) -> None:
    """Make the folder. Raises ValueError where it cannot be written, before anything has run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"out: wanted a folder that can be written, got {folder}: {os.strerror(error.errno)}"
        ) from error


def write(report: Profile | Comparison, folder: Path) -> list[Path]:
    """Write every form of a report; returns the files. All are made from the JSON, so that it can make them again."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = report.to_json()
    if isinstance(report, Comparison):
        kept = Comparison.from_json(stored)
        pages = html.render_comparison(kept), markdown.comparison(kept)
        traces = {BASE_TRACE: report.base.trace, PATCHED_TRACE: report.patched.trace}
    else:
        kept = Profile.from_json(stored)
        pages = html.render(kept), markdown.summary(kept)
        traces = {TRACE: report.trace}
    files = {HTML: pages[0], JSON: stored + "\n", MARKDOWN: pages[1]}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    there = {name: trace for name, trace in traces.items() if trace}
    for name, trace in there.items():
        (folder / name).write_bytes(trace)
    return [folder / name for name in (*files, *there)]


def read(file: Path) -> Profile | Comparison:
    """A report from its JSON. Raises ValueError where it is none of a schema that is known."""
    text = file.read_text(encoding="utf-8")
    try:
        schema = json.loads(text).get("schema")
    except (AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: wanted the JSON of a report, got {error}") from error
    return Comparison.from_json(text) if schema == comparison.SCHEMA else Profile.from_json(text)
