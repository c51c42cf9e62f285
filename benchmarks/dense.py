"""Our exact kernels on long sequences, head_dim by head_dim, against the best of SDPA's kernels; and who is chosen.

The fastest of ours is held against the fastest of SDPA's (of cuDNN's alone in the cases "bf16 ..."). Whether exact
attention then takes the better of the two goes to dense_dispatch.csv: better_chosen is the share of a case's rows on which
the kernel that "auto" selects takes at most 2 % more time than the fastest of all.

    python -m videoattn.benchmarks.dense                           # two minutes on an H200
"""

from __future__ import annotations

import argparse
import statistics

import torch

from videoattn.benchmarks import attention, find_shapes, peers, results
from videoattn.policy import EXACT
from videoattn.verify import select_verified

CUDNN = "sdpa_cudnn"
LENGTHS = ((4, 8, 4096), (2, 8, 8192), (1, 8, 16384))  # batch, heads, tokens
CASES: dict[str, tuple[str, str, int, tuple[tuple[int, int, int], ...]]] = {  # dtype, baseline, head_dim, sizes
    **{f"head_dim {d}": ("float16", peers.BEST, d, LENGTHS) for d in (40, 72, 80, 160)},
    **{f"head_dim {d}": ("bfloat16", peers.BEST, d, LENGTHS) for d in (96, 112)},
    "bf16 head_dim 128": ("bfloat16", CUDNN, 128, ((1, 24, 16384), (1, 12, 32760), (1, 8, 75600))),
    "bf16 head_dim 64": ("bfloat16", CUDNN, 64, ((2, 32, 4992), (2, 16, 9216), (1, 48, 17776))),
}
SLACK = 1.02


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time our exact kernels on long sequences against SDPA's.")
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=3.0, help="a row; long ones take what they need")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    chosen = {case: what for case, what in CASES.items() if args.only in case}
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(CASES)}")
    for case, (dtype, baseline, head_dim, sizes) in chosen.items():
        better = []
        for size in sizes:
            problem = attention.Problem(find_shapes.square("full", *size, head_dim, dtype), torch.device(args.device))
            field = peers.line_up(problem, args.seconds / 2)
            ours, best = field.fastest(own=True), field.fastest(own=False)
            result = peers.against(field, ours, CUDNN if baseline == CUDNN else best, args.seconds / 2)
            line = attention.row(case, problem.shape, ours, result) | {"baseline": baseline}
            results.append("dense", [line], env, args.results)
            results.append_samples("dense", line, result, args.samples)
            taken = select_verified(problem.call(), EXACT).backend.name
            better.append(field.ms[taken] <= SLACK * min(field.ms.values()))
            print(f"{problem.shape.name:24s} {best} -> {result}  auto: {taken}", flush=True)
        share = {"case": case, "metric": "better_chosen", "value": statistics.mean(better), "unit": "share"}
        results.append_figures("dense_dispatch", [share], env, args.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
