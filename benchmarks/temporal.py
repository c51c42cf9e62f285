"""Temporal attention against the best of SDPA's kernels, and against a copy of as many bytes.

Temporal attention is bound by memory: q, k and v are read once, the output is written once. How near a kernel comes is its
time against that of a device-to-device copy that moves the same bytes (half of them read, half written) in the same run:
the ratio of the rows with baseline "copy" is the share of the copy bandwidth.

    python -m videoattn.benchmarks.temporal                        # a minute on an H200
"""

from __future__ import annotations

import argparse

import torch

from videoattn.benchmarks import attention, find_shapes, peers, results, timing

COPY = "copy"
SHAPES = {  # rows, heads, frames, head_dim
    "animatediff 512x512x16 level 0": (8192, 8, 16, 40),
    "animatediff 512x512x16 level 1": (2048, 8, 16, 80),
    "animatediff 512x512x16 level 2": (512, 8, 16, 160),
    "svd-xt 576x1024x25 level 0": (18432, 5, 25, 64),
    "heads of ModelScope": (2048, 16, 16, 64),
    "latte 512x512x16": (2048, 16, 16, 72),
    "animatediff 512x512x32 level 0": (8192, 8, 32, 40),
}
LAYOUTS = ("BNHD", "BHND")


def against_copy(field: peers.Field, name: str, seconds: float) -> timing.Comparison:
    """A backend against a copy that reads two tensors as large as q and writes two."""
    problem = field.problem
    source = torch.zeros(2 * problem.inputs(0)[0].numel(), dtype=problem.dtype, device=problem.device)
    target = torch.empty_like(source)

    def check(inputs: timing.Inputs, out: torch.Tensor, baseline: torch.Tensor) -> float:
        return 0.0 if out is target else problem.error(inputs, out, baseline)

    return timing.compare(
        lambda *inputs: target.copy_(source),
        {name: field.run(name)},
        problem.inputs,
        check,
        device=problem.device,
        seconds=seconds,
        min_rounds=5,
    )[name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time temporal attention against SDPA and against a copy.")
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=3.0, help="a row")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    chosen = {case: sizes for case, sizes in SHAPES.items() if args.only in case}
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(SHAPES)}")
    for case, sizes in chosen.items():
        for layout in LAYOUTS:
            problem = attention.Problem(
                find_shapes.square("temporal", *sizes, "float16", layout), torch.device(args.device)
            )
            field = peers.line_up(problem, args.seconds / 3)
            ours, best = field.fastest(own=True), field.fastest(own=False)
            compared = {
                peers.BEST: peers.against(field, ours, best, args.seconds / 3),
                COPY: against_copy(field, ours, args.seconds / 3),
            }
            for baseline, result in compared.items():
                line = attention.row(case, problem.shape, ours, result) | {"baseline": baseline}
                results.append("temporal", [line], env, args.results)
                results.append_samples("temporal", line, result, args.samples)
                named = f"{baseline}: {best}" if baseline == peers.BEST else baseline
                print(f"{problem.shape.name:26s} {layout} {named:26s} {result}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
