"""HBM bytes of our kernels: the I/O model of ``videoattn/profiling/io_model.py`` against the card's counters, read by ncu.

Calls of video models, enlarged in the batch until each moves at least 15 times what L2 holds: what a kernel leaves there at
its end, written but not yet on its way to memory, is not counted, and so is at most a fifteenth. Cases with a bar: k and v
of all heads that are at work at a time fit into half of L2, where the model says that each byte moves once. The others show
what it is worth beyond.

ncu runs this script anew, with ``--run``: each case once to compile, then once within cudaProfilerStart/Stop, caches flushed
before it. Where ncu is missing or the machine refuses its counters, that is said, and the bytes are bounded instead by the
time of the call and the copy bandwidth that was measured beside it.

    python -m videoattn.benchmarks.io_bytes                        # a minute on an H200
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from videoattn.backend import Backend, backends
from videoattn.benchmarks import attention, find_shapes, results, timing
from videoattn.policy import EXACT
from videoattn.profiling import ceilings, io_model
from videoattn.profiling.profile import Ceilings, Io

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9}
KERNELS = "regex:.*forward.*"  # the functions of ours; nothing else that the script launches is called so
NCU = ("ncu", "/usr/local/cuda/bin/ncu")


@dataclass(frozen=True)
class Case:
    """One call of one of our kernels. ``bar``: whether it counts for the bar of targets.toml."""

    kernel: str
    shape: find_shapes.Shape
    bar: bool = True


CASES = {
    "cogvideox-5b 480x720x49": Case(
        "triton_hopper", find_shapes.square("joint", 3, 48, 17776, 64, "bfloat16", "BHND BHND BNHD")
    ),
    "ltx 512x704x161": Case("triton_hopper", find_shapes.square("full", 8, 32, 7392, 64, "bfloat16")),
    "svd-xt 576x1024x25 spatial": Case("triton_hopper", find_shapes.square("spatial", 50, 5, 9216, 64, "float16")),
    "svd-xt 576x1024x25 temporal": Case("triton_temporal", find_shapes.square("temporal", 18432, 5, 25, 64, "float16")),
    "animatediff 512x512x16 spatial": Case("triton_flash", find_shapes.square("spatial", 96, 8, 4096, 40, "float16")),
    "animatediff 512x512x16 temporal": Case(
        "triton_temporal", find_shapes.square("temporal", 32768, 8, 16, 40, "float16")
    ),
    "wan-1.3b 480x832x81": Case("triton_hopper", find_shapes.square("full", 3, 12, 32760, 128, "bfloat16"), bar=False),
    "wan-14b 720x1280x81": Case("triton_hopper", find_shapes.square("full", 1, 40, 75600, 128, "bfloat16"), bar=False),
}


class Refused(Exception):
    """The machine gives no counters; the message is the reason in ncu's words."""


def backend(case: Case) -> Backend:
    return next(known for known in backends() if known.name == case.kernel)


def predicted(case: Case, chip: Ceilings, device: torch.device) -> Io:
    """What the model says of a case."""
    call = attention.Problem(case.shape, device).call()
    return io_model.model(call, io_model.tiling(case.kernel, call), chip)


def counted(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Case -> bytes read from HBM and written to it, by ncu's counters. Raises Refused where there are none."""
    program = next(filter(None, map(shutil.which, NCU)), None)
    if program is None:
        raise Refused("ncu is not installed")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [program, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--metrics", f"{READ},{WRITTEN}", "--kernel-name", KERNELS, "--profile-from-start", "off"]
        command += ["--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none"]
        command += ["--target-processes", "application-only"]
        command += [sys.executable, "-m", "videoattn.benchmarks.io_bytes", "--run", *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        written = log.read_text() if log.is_file() else ""
    rows = parse(written)
    if len(rows) == len(names):
        return dict(zip(names, rows, strict=True))
    said = f"{written}\n{done.stdout}\n{done.stderr}"
    refusals = [line for line in said.splitlines() if line.startswith("==ERROR==") and "returned an error" not in line]
    if refusals and not rows:
        raise Refused(refusals[0].removeprefix("==ERROR==").strip())
    raise ValueError(
        f"ncu: wanted {len(names)} kernels, got {len(rows)}, exit status {done.returncode}: {said[-2000:]}"
    )


def parse(text: str) -> list[tuple[int, int]]:
    """ncu's raw page as CSV -> (bytes read, bytes written) of each kernel.

    Lines of ncu's own ("==PROF==") and of the program may stand before the header. The first row below it has the units.
    """
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = [line for line in lines[start:] if line.startswith('"')]
    units, *rows = csv.DictReader(io.StringIO("".join(table)))
    for metric in (READ, WRITTEN):
        if units.get(metric) not in UNITS:
            raise ValueError(f"ncu: wanted {metric} in one of {', '.join(UNITS)}, got {units.get(metric)!r}")

    def figure(row: dict[str, str], metric: str) -> int:
        try:
            return round(float(row[metric].replace(",", "")) * UNITS[units[metric]])
        except ValueError as error:  # "n/a"
            raise ValueError(
                f"ncu: wanted a number of {metric} of {row['Kernel Name']}, got {row[metric]!r}"
            ) from error

    return [(figure(row, READ), figure(row, WRITTEN)) for row in rows]


def run(names: Sequence[str], device: torch.device) -> None:
    """What ncu watches: of each case the second call."""
    for name in names:
        case = CASES[name]
        problem = attention.Problem(case.shape, device)
        call = backend(case).plan(problem.call(), EXACT)
        q, k, v, _, _ = problem.inputs(0)
        call(q, k, v, None, None, None)
        torch.cuda.synchronize(device)
        with torch.cuda.profiler.profile():
            call(q, k, v, None, None, None)
            torch.cuda.synchronize(device)
        del q, k, v
        torch.cuda.empty_cache()
        print(name, flush=True)


def bounded(case: Case, chip: Ceilings, device: torch.device) -> float:
    """The most bytes that the call can have moved: its time, from a cold L2, times the copy bandwidth."""
    problem = attention.Problem(case.shape, device)
    planned = problem.planned(backend(case))
    compared = timing.compare(planned, {}, problem.inputs, problem.error, device=device, seconds=0.5, min_rounds=3)
    torch.cuda.empty_cache()
    return compared["control"].median_ms / 1e3 * chip.copy_bandwidth


def rows_of_counters(name: str, io: Io, read: int, written: int) -> list[dict[str, object]]:
    """Rows for the CSV file; `hbm_deviation` only where there is a bar."""
    figures = [("model_bytes", io.hbm_bytes, "B"), ("counter_bytes", read + written, "B")]
    figures += [("counter_bytes_read", read, "B"), ("counter_bytes_written", written, "B")]
    ratio = io.hbm_bytes / (read + written)
    figures.append(("ratio", ratio, "model/counter"))
    if CASES[name].bar:
        figures.append(("hbm_deviation", abs(ratio - 1), "share"))
    return _rows(name, figures)


def rows_of_time(name: str, io: Io, most: float) -> list[dict[str, object]]:
    """Rows for the CSV file where there are no counters."""
    figures = [("model_bytes", io.hbm_bytes, "B"), ("time_x_copy_bandwidth_bytes", round(most), "B")]
    return _rows(name, [*figures, ("ratio_to_time_x_copy_bandwidth", io.hbm_bytes / most, "model/most")])


def _rows(name: str, figures: list[tuple[str, float, str]]) -> list[dict[str, object]]:
    return [
        {"case": f"{name} {CASES[name].kernel}", "metric": metric, "value": value, "unit": unit}
        for metric, value, unit in figures
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the I/O model's HBM bytes with the counters of ncu.")
    results.add_arguments(parser)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--no-counters", action="store_true", help="bound the bytes by time, as where ncu is refused")
    parser.add_argument(
        "--run", nargs="+", choices=CASES, metavar="CASE", help="what ncu watches: call these and leave"
    )
    args = parser.parse_args(argv)
    device = _gpu()
    if args.run:
        run(args.run, device)
        return 0
    env = results.environment(args.commit)
    chosen = [name for name in CASES if args.only in name and _runs_here(name, device)]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(CASES)} whose kernel runs here")
    counts: dict[str, tuple[int, int]] = {}
    try:
        if args.no_counters:
            raise Refused("--no-counters")
        counts = counted(chosen)
    except Refused as reason:
        print(f"no counters ({reason}): bytes are bounded by time x copy bandwidth", flush=True)
    chip = ceilings.measure(device, torch.bfloat16)
    print(f"copy {chip.copy_bandwidth / 1e12:.2f} TB/s, L2 {chip.l2_bytes / 2**20:.0f} MiB, {chip.sm_count} SMs")
    for name in chosen:
        io = predicted(CASES[name], chip, device)
        if counts:
            lines = rows_of_counters(name, io, *counts[name])
        else:
            lines = rows_of_time(name, io, bounded(CASES[name], chip, device))
        results.append_figures("io_bytes", lines, env, args.results)
        figures = "  ".join(f"{line['metric']} {line['value']:.4g}" for line in lines)
        print(f"{name:34s} {CASES[name].kernel:16s} {figures}{'' if CASES[name].bar else '  no bar'}", flush=True)
    return 0


def _gpu() -> torch.device:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise ValueError("io_bytes: wanted an NVIDIA GPU, got none: bytes are counted on the card")
    return torch.device("cuda", torch.cuda.current_device())


def _runs_here(name: str, device: torch.device) -> bool:
    case = CASES[name]
    reason = backend(case).refuses(attention.Problem(case.shape, device).call(), EXACT)
    if reason is not None:
        print(f"{name}: {case.kernel} {reason}")
    return reason is None


if __name__ == "__main__":
    raise SystemExit(main())
