"""Is the profiler right? Shares of a pipeline of known cost, and FLOPs of real models against counts by hand.

Rows go to profile.csv: `share_error_points` of the toy, `flop_error` of Wan, AnimateDiff and SVD at their real sizes.

    python -m videoattn.benchmarks.profile_truth                    # half a minute, with or without a GPU
"""

from __future__ import annotations

import argparse

import torch

from videoattn.benchmarks import hand_counts, results, toy
from videoattn.profiling import recorder, summary
from videoattn.profiling.plan import plan

STEPS, CLEAN_RUNS = 3, 3  # the recorded pass comes after the warm-up and the clean ones
MODELS = {  # case -> (model of models.toml, height x width x frames, FLOPs of a forward by hand)
    "wan": ("wan-1.3b", (480, 832, 81), hand_counts.wan_1_3b(480, 832, 81)),
    "animatediff": ("animatediff", (512, 512, 16), hand_counts.AnimateDiff(512, 512, 16).flops()),
    "svd": ("svd-xt", (576, 1024, 25), hand_counts.SVD(576, 1024, 25).flops()),
}


def share_error(device: torch.device) -> float:
    """Points of a hundred by which the profiler's share of an operator is off, at most."""
    pipe = toy.Toy(device)
    made = recorder.record(pipe, {"num_inference_steps": STEPS}, clean_runs=CLEAN_RUNS)
    shares = {share.name: share.share for share in summary.categories(made)}
    return toy.share_error(shares, pipe.expected_ms(STEPS, run=1 + CLEAN_RUNS))


def flop_error(case: str) -> float:
    """Relative, of the denoiser's forward."""
    name, size, by_hand = MODELS[case]
    (denoiser,) = plan(name, *size).denoisers
    return abs(denoiser.flops / by_hand - 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold the profiler against costs that are known.")
    results.add_arguments(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    figures = [("toy", "share_error_points", share_error(torch.device(args.device)), "points")]
    figures += [(case, "flop_error", flop_error(case), "relative") for case in MODELS]
    for case, metric, value, unit in figures:
        print(f"{case:12s} {metric} {value:.3g} {unit}", flush=True)
        row = {"case": case, "metric": metric, "value": value, "unit": unit}
        results.append_figures("profile", [row], env, args.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
