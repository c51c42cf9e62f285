"""`videoattn calibrate`: time every backend on the attention calls of real models, into a table of measured.py.

Kernels that quantise are timed where a policy may choose them: self-attention of some length, quantisation included.

The calls are the rows of benchmarks/shapes.toml, timed and checked by benchmarks/attention.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Printed

from videoattn import measured
from videoattn.backend import Backend
from videoattn.benchmarks import attention, results, timing
from videoattn.benchmarks.find_shapes import Shape
from videoattn.call import Call
from videoattn.measured import Evidence, Row, Source, Table
from videoattn.policy import EXACT, Dense, Policy

LEFT_OUT = "sdpa_math"  # its scores stand in memory: no gain in time is worth that, so it has none in a table
ENOUGH = 1.0  # seconds that time a call well; what is left over is for giants, which take longer than their share
QUANTISED_FROM = 1024  # tokens, below which quantising alone takes longer than attention
OVERHEAD = 1.6  # of a row over its timing: inputs, checks, compilation, warm-up


class Line(NamedTuple):
    """A row of the table, and the call that it was measured on."""

    case: str
    call: Call
    row: Row


def calibrate(
    *, out: Path | None, seconds: float, only: str, max_gflop: float, command: str, update: bool = False
) -> int:
    """Measure the current GPU, write its table, and print what it changes.

    Args:
        out: the file, or None for the one in the user's cache folder, where it takes effect.
        update: add to that file the kernels that it does not know, in the rows that it has; the rest of it stays.
        seconds: the most that is spent, one row's time aside; the rows with the most work come last.
        only, max_gflop: which rows of shapes.toml.
        command: what was typed, for the table's head.

    Returns:
        0, or 1 if a backend computed something wrong.

    Raises:
        ValueError: no GPU to measure, no row, or no table of this GPU to update.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = measured.card(device)
    if card is None:
        raise ValueError(
            "calibrate: wanted an NVIDIA GPU, got none. Run it on the machine that makes the videos; without a GPU "
            "torch's own choice of kernel runs, and there is nothing to measure"
        )
    path, old = out or measured.user_path(card.gpu), None
    if update:
        old = Table.read(path)
        if old.gpu != card.gpu:
            raise ValueError(f"{path}: wanted a table of this {card.gpu} to update, got one of {old.gpu}")
    lines, faults, notes = _measure(attention.rows(only, max_gflop), device, seconds, old)
    if not lines:
        why = "; ".join(faults + notes) or "the table has every kernel of these calls"
        raise ValueError(f"calibrate: nothing was measured: {why}")
    cudnn = str(torch.backends.cudnn.version() or "")
    if old is None:
        table = _table([line.row for line in lines], results.machine(), cudnn, command)
    else:
        added = [line.row for line in lines]
        table = replace(old, command=f"{old.command}; {command}", rows=_updated(old.rows, added))
    _show(lines, Source(table=table, path=path))
    table.write(path)
    measured.evidence.cache_clear()
    print("\n".join([*(f"FAILED {fault}" for fault in faults), *notes, f"{len(lines)} calls written to {path}"]))
    return 1 if faults else 0


def from_results(file: Path, out: Path, command: str) -> int:
    """The table of the newest rows of an attention.csv, one run for each call, all of one GPU."""
    runs: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    written = results.read(file)
    if not written:
        raise ValueError(f"{file}: wanted rows of the attention benchmark, got none")
    newest = max(written, key=lambda row: row["date"])
    same = ("gpu", "driver", "torch", "triton")
    for row in written:
        if all(row[name] == newest[name] for name in same):
            runs.setdefault(_key(row), {}).setdefault(row["date"], []).append(row)
    rows = []
    for case, shape in attention.rows():
        dates = runs.get(_key(attention.identity(case, shape)))
        if dates:
            rows.append(_row(shape, {row["kernel"]: row for row in dates[max(dates)]}))
    _table(rows, newest, "", command).write(out)
    print(f"{len(rows)} calls written to {out}")
    return 0


def _measure(
    chosen: list[tuple[str, Shape]], device: torch.device, seconds: float, old: Table | None = None
) -> tuple[list[Line], list[str], list[str]]:
    """The measured rows, the outputs that were wrong, and what was left out. Of what is in `old`, only what it lacks."""
    deadline = time.perf_counter() + seconds
    lines: list[Line] = []
    faults: list[str] = []
    notes: list[str] = []
    for index, (case, shape) in enumerate(track(chosen, "measuring")):
        left = deadline - time.perf_counter()
        if left <= 0:
            notes.append(f"{len(chosen) - index} calls with more work left out: --seconds {seconds:g} are over")
            break
        problem = attention.Problem(shape, device)
        call = problem.call()
        share = min(ENOUGH, left / (len(chosen) - index) / OVERHEAD)
        known = {} if old is None else next((row.ms for row in old.rows if row.distance(call) == 0), None)
        if known is None:
            continue  # a row that the table has not
        groups = _groups(call, known)
        if not groups:
            continue
        compared: dict[str, timing.Comparison] = {}
        for decision, among in groups.items():
            found = attention.attempt(problem, share, among, decision)
            if isinstance(found, torch.OutOfMemoryError):
                notes.append(f"{case} {shape.name} left out: more memory than there is")
            elif isinstance(found, Exception):
                faults.append(f"{case} {shape.name}, {decision}: {found}")
            else:
                compared |= found
        if measured.TORCH in compared:
            timings = {name: attention.row(case, shape, name, result) for name, result in compared.items()}
            lines.append(Line(case, call, _row(shape, timings)))
    return lines, faults, notes


def _groups(call: Call, known: Mapping[str, float]) -> dict[Dense, list[Backend]]:
    """Decision -> the backends to time for it, but those whose time is known; torch's own choice is always among them."""
    among = [backend for backend in attention.accepting(call) if backend.name != LEFT_OUT]
    groups = {EXACT: [backend for backend in among if backend.name == measured.TORCH or backend.name not in known]}
    for backend, decision in attention.quantising(call) if _may_be_quantised(call) else ():
        if backend.name not in known:
            groups.setdefault(decision, []).append(backend)
    return groups if not known or sum(map(len, groups.values())) > 1 else {}


def _updated(old: Sequence[Row], added: Sequence[Row]) -> tuple[Row, ...]:
    """The old rows with the added times, as shares of the time of torch's own choice in either."""
    rows = []
    for row in old:
        ms = dict(row.ms)
        for new in added:
            if replace(new, ms=row.ms) == row:
                drift = row.ms[measured.TORCH] / new.ms[measured.TORCH]
                ms |= {name: drift * time for name, time in new.ms.items() if name not in ms}
        rows.append(replace(row, ms=ms))
    return tuple(rows)


def _may_be_quantised(call: Call) -> bool:
    return call.kind in Policy().kinds and min(call.q_len, call.kv_len) >= QUANTISED_FROM


def _row(shape: Shape, timings: Mapping[str, Mapping[str, object]]) -> Row:
    """Rows of attention.csv, backend -> row, as times that hold no drift: the baseline's over each one's ratio."""
    problem = attention.Problem(shape, torch.device("cpu"))
    ms = {name: float(row["baseline_ms"]) / float(row["ratio"]) for name, row in timings.items() if name != LEFT_OUT}
    if not problem.has_kv_len:  # baseline and control are the same function: the faster of the two is to be beaten
        ms[measured.TORCH] = min(ms[measured.TORCH], float(timings[measured.TORCH]["baseline_ms"]))
    return Row.of(problem.call(), ms)


def _table(rows: list[Row], machine: Mapping[str, str], cudnn: str, command: str) -> Table:
    head = {name: machine[name] for name in ("gpu", "torch", "triton", "driver", "date")}
    return Table(**head, cudnn=cudnn, command=command, rows=tuple(rows))


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("case", "shape", "dtype", "layout"))


def _show(lines: list[Line], source: Source) -> None:
    """Each call's times, and who computes it by them instead of whom."""
    changes = 0
    printed = Printed("call", "B x H x Nq x Nk x D", "torch's choice", "fastest", "chosen", "before")
    for case, call, row in lines:
        names = [backend.name for backend in attention.accepting(call)]
        bounded = [backend.name for backend, _ in attention.quantising(call)] if _may_be_quantised(call) else []
        before, _ = measured.choose(call, names, bounded)
        chosen, _ = Evidence(sources=(source,)).choose(call, names, bounded)
        changes += chosen != before
        fastest = min(row.ms, key=row.ms.__getitem__)
        printed.add_row(
            case,
            f"{call.batch} x {call.heads} x {call.q_len} x {call.kv_len} x {call.head_dim}",
            f"{row.ms[measured.TORCH]:.4g} ms" if measured.TORCH in row.ms else "",
            f"{fastest} {row.ms[fastest]:.4g} ms",
            chosen,
            before if chosen != before else "",
        )
    Console().print(printed)
    print(f"another backend than before for {changes} of {len(lines)} calls")
