"""What exact attention dispatches to on every row of ``shapes.toml``, against torch's own choice called as diffusers calls it.

"Never slower" is shown here: the backend that "auto" selects is timed as in ``attention.py``, and no verdict may be slower.
Where that is torch's own choice and there is no padding mask, patched and unpatched make the very same call: nothing is
timed, the row has no times, and its verdict is "same".

    python -m videoattn.benchmarks.dispatch                       # two minutes on an H200
    python -m videoattn.benchmarks.dispatch --only temporal --seconds 20
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from videoattn.backend import Choice
from videoattn.benchmarks import attention, results
from videoattn.benchmarks.find_shapes import Shape
from videoattn.measured import TORCH
from videoattn.policy import EXACT
from videoattn.verify import select_verified

SAME = "same"
TIMED = ("median_ms", "baseline_ms", "ratio", "ci_lo", "ci_hi", "tflops", "gbs", "rel_l2")


def same(case: str, shape: Shape) -> dict[str, object]:
    """The row of a call that stays what it is."""
    untimed = dict.fromkeys(TIMED)
    return {**attention.identity(case, shape), **untimed, "kernel": TORCH, "baseline": TORCH, "verdict": SAME}


def summary(chosen: Sequence[tuple[Shape, Choice, float | None]]) -> list[dict[str, object]]:
    """Figures over (shape, choice, ratio of the row or None): how often our kernels are chosen, and what that gains."""
    own = [(shape, ratio) for shape, choice, ratio in chosen if choice.backend.own]
    temporal = sum(shape.kind == "temporal" for shape, _, _ in chosen)
    figures = [("own_rows", len(own), "rows")]
    if temporal:
        share = sum(shape.kind == "temporal" for shape, _ in own) / temporal
        figures.append(("own_temporal_share", share, "share"))
    ratios = [ratio for _, ratio in own if ratio is not None]
    if ratios:
        figures.append(("own_geomean_ratio", statistics.geometric_mean(ratios), "baseline/own"))
    return [{"case": "exact", "metric": metric, "value": value, "unit": unit} for metric, value, unit in figures]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what exact attention dispatches to, on the rows of shapes.toml.")
    results.add_arguments(parser)
    attention.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=100.0, help="for all rows; giants take what they need")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    rows = attention.rows(args.only, args.max_gflop)
    dispatched: list[tuple[Shape, Choice, float | None]] = []
    failed = []
    for case, shape in rows:
        problem = attention.Problem(shape, torch.device(args.device))
        choice = select_verified(problem.call(), EXACT)
        name, ratio = choice.backend.name, None
        print(f"{case} {shape.name}: {name}, {choice.why}", flush=True)
        if name == TORCH and not problem.has_kv_len:
            line = same(case, shape)
        else:
            compared = attention.attempt(problem, args.seconds / len(rows), [choice.backend])
            if isinstance(compared, Exception) or name not in compared:
                reason = compared if isinstance(compared, Exception) else f"{name} refuses when it runs"
                failed.append(f"{case} {shape.name}: {reason}")
                continue
            line, ratio = attention.row(case, shape, name, compared[name]), compared[name].ratio
            results.append_samples("dispatch_exact", line, compared[name], args.samples)
            print(f"  {compared[name]}", flush=True)
        results.append("dispatch_exact", [line], env, args.results)
        dispatched.append((shape, choice, ratio))
    figures = summary(dispatched)
    print("\n".join([*(f"{row['metric']} {row['value']:.4g}" for row in figures), *(f"FAILED {x}" for x in failed)]))
    if len(dispatched) == len(attention.rows()):  # a part of the rows says nothing of the whole
        results.append_figures("dispatch_summary", figures, env, args.results)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
