"""Where every bar of ``targets.toml`` stands: one line each, and a non-zero exit unless all are ok.

ok       the figure reaches the bar
short    it does not
missing  no row shows it
stale    the row was measured before the last commit that touched one of its files, or on uncommitted changes

python -m videoattn.benchmarks.targets            # or: make targets
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from videoattn.benchmarks import results

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Row = Mapping[str, str]

# Rows that agree in these columns measure the same thing: the newest counts.
IDENTITY = ("gpu", "case", "shape", "dtype", "layout", "kernel", "baseline", "metric")

DERIVED: dict[str, Callable[[Row], float]] = {
    "slower": lambda row: float(row["verdict"] == "slower"),
    "added_us": lambda row: 1e3 * float(row["baseline_ms"]) * (1 / float(row["ratio"]) - 1),
    "time_ratio": lambda row: 1 / float(row["ratio"]),
}
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "max": max,
    "geomean": statistics.geometric_mean,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One ``[[target]]``; see the head of ``targets.toml``."""

    id: str
    what: str
    csv: str
    where: dict[str, str | list[str]]
    metric: str
    agg: str
    better: str
    at_least: float
    aim: float | str | None = None
    files: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("agg", tuple(AGGREGATES)), ("better", ("higher", "lower"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{self.id}: wanted {name} in {allowed}, got {getattr(self, name)!r}")

    def matches(self, row: Row) -> bool:
        return all(row.get(key) in (value if isinstance(value, list) else [value]) for key, value in self.where.items())

    def reached(self, figure: float) -> bool:
        return figure >= self.at_least if self.better == "higher" else figure <= self.at_least


@dataclass(frozen=True, kw_only=True)
class Standing:
    status: str
    target: Target
    figure: float | None = None
    commit: str = "-"

    def __str__(self) -> str:
        t = self.target
        sign = ">=" if t.better == "higher" else "<="
        figure = "-" if self.figure is None else f"{self.figure:.4g}"
        aim = "-" if t.aim is None else t.aim
        return f"{self.status:8s} {t.id:44s} {figure:>9s} {sign} {t.at_least:<8g} aim {aim!s:<28} {self.commit}"


def read(path: Path) -> list[Target]:
    """The targets of a file. ValueError for a doubled id or a value that is not known."""
    rows = tomllib.loads(path.read_text())["target"]
    doubled = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if doubled:
        raise ValueError(f"{path}: wanted every id once, got {doubled} more often")
    return [Target(**row | {name: tuple(row.get(name, ())) for name in ("files", "chosen")}) for row in rows]


def standing(target: Target, folder: Path, repository: Path) -> Standing:
    """How ``target`` stands by the tables in ``folder`` and the history of ``repository``."""
    rows = _newest([row for row in _table(folder / f"{target.csv}.csv") if target.matches(row)], target.chosen)
    values = [_value(row, target.metric) for row in rows]
    if not values or any(value is None for value in values):
        return Standing(status="missing", target=target)
    figure = AGGREGATES[target.agg](values)
    oldest = min(rows, key=lambda row: row["date"])
    commit = oldest["commit"][:10] + ("+dirty" if oldest["dirty"] == "yes" else "")
    if any(row["dirty"] == "yes" or not _current(row["commit"], target.files, repository) for row in rows):
        status = "stale"
    else:
        status = "ok" if target.reached(figure) else "short"
    return Standing(status=status, target=target, figure=figure, commit=commit)


@functools.cache
def _table(path: Path) -> list[dict[str, str]]:
    return results.read(path) if path.exists() else []


def _newest(rows: list[Row], chosen: tuple[str, ...]) -> list[Row]:
    newest: dict[tuple[str | None, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[tuple(row.get(column) for column in IDENTITY if column not in chosen)] = row
    return list(newest.values())


def _value(row: Row, metric: str) -> float | None:
    if metric in DERIVED:
        return DERIVED[metric](row)
    value = float(row[metric]) if row.get(metric) else math.nan
    return None if math.isnan(value) else value


@functools.cache
def _current(commit: str, files: tuple[str, ...], repository: Path) -> bool:
    """Whether ``commit`` holds the last change of ``files``; a commit that the repository does not know is not current."""
    last = _git(repository, "log", "-1", "--format=%H", "--", *files) if files else ""
    if last is None:
        raise ValueError(f"wanted a git repository, to tell which figures are stale; got {repository}")
    return not last or _git(repository, "merge-base", "--is-ancestor", last, commit) is not None


def _git(repository: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print where every bar of targets.toml stands.")
    parser.add_argument("--targets", type=Path, default=results.HERE / "targets.toml")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--repository", type=Path, default=results.HERE.parent)
    parser.add_argument("--only", default="", help="only targets whose id contains this")
    args = parser.parse_args(argv)
    chosen = [target for target in read(args.targets) if args.only in target.id]
    standings = [standing(target, args.results, args.repository) for target in chosen]
    for line in standings:
        print(line)
    counts = Counter(line.status for line in standings)
    print(", ".join(f"{counts[status]} {status}" for status in ("ok", "short", "missing", "stale")))
    return 0 if counts["ok"] == len(standings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
