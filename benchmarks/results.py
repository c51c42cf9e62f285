"""Where figures are written down: ``benchmarks/results/<script>.csv``, appended to, never edited.

Two kinds of tables. Timings have ``COLUMNS`` (one row a kernel and shape, always against a baseline of the same run);
everything that is not a pair of times (PSNR, bytes, accuracies, seconds of the suite) has ``FIGURE_COLUMNS``.

A machine that measures often has no ``.git``: there, name the commit with ``--commit``, which takes what
``git describe --always --dirty --abbrev=40 --exclude='*'`` prints (a hash, "-dirty" behind it if so) or a file that
holds it. What was measured there comes back as CSV files and is appended here:

    python -m videoattn.benchmarks.results FOLDER/attention.csv FOLDER/forward.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from videoattn import doctor
from videoattn.benchmarks.timing import Comparison

HERE = Path(__file__).parent
CHECKOUT = (HERE.parent / "pyproject.toml").is_file()
RESULTS = HERE / "results" if CHECKOUT else Path("benchmarks") / "results"
ENVIRONMENT = ("date", "commit", "dirty", "gpu", "driver", "torch", "triton", "diffusers")
COLUMNS = ENVIRONMENT + (
    "case",
    "shape",
    "dtype",
    "layout",
    "kernel",
    "baseline",
    "median_ms",
    "baseline_ms",
    "ratio",
    "ci_lo",
    "ci_hi",
    "tflops",
    "gbs",
    "rel_l2",
    "verdict",
)
FIGURE_COLUMNS = ENVIRONMENT + ("case", "metric", "value", "unit")
CODE = ("videoattn", "kernels", "pipelines", "benchmarks/*.py", "benchmarks/*.toml", "pyproject.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark can be told: where its rows and samples go, and which commit is measured."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--samples", type=Path, help="folder for every sample that was taken, as <script>.jsonl")
    parser.add_argument("--commit", help="HASH or HASH-dirty, or a file that holds it; default: ask git")


def environment(commit: str | None = None) -> dict[str, str]:
    """Date, code and machine of this run, as strings. ``commit``: see ``add_arguments``."""
    described = _commit(commit)
    return {
        **machine(),
        "commit": described.removesuffix("-dirty"),
        "dirty": "yes" if described.endswith("-dirty") else "no",
    }


def machine() -> dict[str, str]:
    """Date, GPU and versions."""
    gpu, driver = _gpu()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
    }


def append(script: str, rows: Iterable[Mapping[str, object]], env: Mapping[str, str], folder: Path) -> Path:
    """Append timings to ``folder/<script>.csv``. Every row has exactly the columns after ``ENVIRONMENT``; None is empty."""
    return _append(folder / f"{script}.csv", COLUMNS, rows, env)


def timing(
    result: Comparison,
    *,
    case: str,
    shape: str,
    dtype: str,
    kernel: str,
    baseline: str,
    layout: str | None = None,
    tflops: float | None = None,
    gbs: float | None = None,
    calls: int = 1,
) -> dict[str, object]:
    """A row of timings, of a comparison that ran `calls` calls at a time."""
    return {
        "case": case,
        "shape": shape,
        "dtype": dtype,
        "layout": layout,
        "kernel": kernel,
        "baseline": baseline,
        "median_ms": result.median_ms / calls,
        "baseline_ms": result.baseline_ms / calls,
        "ratio": result.ratio,
        "ci_lo": result.ci_lo,
        "ci_hi": result.ci_hi,
        "tflops": tflops,
        "gbs": gbs,
        "rel_l2": result.error,
        "verdict": result.verdict,
    }


def append_samples(script: str, row: Mapping[str, object], result: Comparison, folder: Path | None) -> None:
    """Append what a row was made of to ``folder/<script>.jsonl``: all samples in ms, the control's noise, the clocks."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    named = {key: row[key] for key in ("case", "shape", "layout", "kernel", "baseline")}
    with (folder / f"{script}.jsonl").open("a") as file:
        file.write(json.dumps({**named, **dataclasses.asdict(result)}) + "\n")


def append_figures(script: str, rows: Iterable[Mapping[str, object]], env: Mapping[str, str], folder: Path) -> Path:
    """Append figures that are no timings: rows of case, metric, value, unit."""
    return _append(folder / f"{script}.csv", FIGURE_COLUMNS, rows, env)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, object]], env: Mapping[str, str]) -> Path:
    lines = []
    for row in rows:
        merged = {**env, **row}
        if set(merged) != set(columns):
            raise ValueError(f"{path.name}: wanted the columns {columns}, got {tuple(merged)}")
        lines.append({name: _text(merged[name]) for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != columns:
            raise ValueError(f"{path}: wanted the header {columns}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(lines)
    return path


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _commit(commit: str | None) -> str:
    if commit is not None:
        return Path(commit).read_text().strip() if Path(commit).is_file() else commit
    if not CHECKOUT:
        return f"v{_version('videoattn')}"
    head = _run("git", "-C", str(HERE), "rev-parse", "HEAD")
    if head is None:
        raise ValueError("no git repository here: name the measured commit with --commit")
    changed = _run("git", "-C", str(HERE.parent), "status", "--porcelain", "--", *CODE)
    return head + ("-dirty" if changed else "")


def _gpu() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "cpu", "none"
    return torch.cuda.get_device_name(), doctor.nvidia_driver() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Append CSV files that were measured elsewhere to the results here.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for file in args.files:
        rows = read(file)
        if not rows:
            raise ValueError(f"{file}: wanted rows, got none")
        path = _append(args.results / file.name, COLUMNS if "kernel" in rows[0] else FIGURE_COLUMNS, rows, {})
        print(f"{len(rows)} rows appended to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
