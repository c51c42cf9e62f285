"""A report on disk: one folder, every form of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from videoattn.profiling import html, markdown
from videoattn.profiling.profile import Profile

HTML, JSON, MARKDOWN, TRACE = "report.html", "report.json", "report.md", "trace.json.gz"


def require_writable(folder: Path) -> None:
    """Make the folder. Raises ValueError where it cannot be written, before anything has run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out: wanted a folder that can be written, got {folder}: {os.strerror(error.errno)}") from error


def write(profile: Profile, folder: Path) -> list[Path]:
    """Write every form of a profile; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {HTML: html.render(profile), JSON: profile.to_json() + "\n", MARKDOWN: markdown.summary(profile)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if profile.trace:
        (folder / TRACE).write_bytes(profile.trace)
    return [folder / name for name in (*texts, *([TRACE] if profile.trace else []))]
