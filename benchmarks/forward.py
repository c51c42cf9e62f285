"""Whole denoiser forwards at real sizes with random weights: as diffusers runs them, and after ``enable_fast_attention``.

Both run on the same weights, launch gaps included, because that is what a user waits for: eager, or with --compile both
compiled, by blocks where the host names those that repeat, as diffusers advises. rel_l2 is the patched output against the
unpatched one, not against an fp32 reference: at these depths two exact kernels differ by a percent.
Peak memory of either, allocated above what was there before the call, goes to ``forward_memory.csv``.

    python -m videoattn.benchmarks.forward --preset exact            # three minutes on an H200
    python -m videoattn.benchmarks.forward --preset balanced --compile --only wan-1.3b
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import videoattn
from videoattn.benchmarks import models, results, timing
from videoattn.policy import PRESETS, Policy, Sparse

CASES = (
    ("wan-1.3b", (480, 832, 81)),
    ("wan-14b-8l", (720, 1280, 81)),
    ("svd-xt", (576, 1024, 25)),
    ("animatediff", (512, 512, 16)),
    ("animatediff", (576, 1024, 16)),
    ("modelscope", (256, 256, 16)),
    ("cogvideox-5b", (480, 720, 49)),
    ("ltx", (512, 704, 161)),
)
TOLERANCE = {"exact": 0.05, "balanced": 0.3, "fast": 1.0}  # rel_l2 beyond which a run is wrong and not merely rounded


STEPS, DENSE = 50, "balanced"  # of a generation, of which "fast" computes the dense steps as "balanced" does
REACHED = 0.34  # of the key blocks, by "fast" on tiny-wan (quality_sparse.csv), where rounding up counts for more


def twin(denoiser: nn.Module) -> nn.Module:
    """A second module tree on the very same parameters and buffers."""
    tensors = itertools.chain(denoiser.parameters(), denoiser.buffers())
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})


def a_step_of(preset: str) -> Policy:
    """The policy of a preset at a step that is not one of the dense ones: a bare denoiser's steps are not known. What "fast"
    keeps is what it kept where its quality was measured."""
    policy = replace(PRESETS[preset], dense_steps=0.0, min_steps=0)
    if not isinstance(policy.decision, Sparse):
        return policy
    return replace(
        policy, decision=replace(policy.decision, selector=replace(policy.decision.selector, density=REACHED))
    )


def over_steps(preset: str, sparse: timing.Comparison, dense: timing.Comparison) -> timing.Comparison:
    """The mean of STEPS steps, of which the first ones are dense."""
    share = math.ceil(PRESETS[preset].dense_steps * STEPS) / STEPS

    def mean(a: float, b: float) -> float:
        return 1 / (share / a + (1 - share) / b)

    return replace(
        sparse,
        name=f"{preset}, mean of {STEPS} steps",
        median_ms=share * dense.median_ms + (1 - share) * sparse.median_ms,
        ratio=mean(dense.ratio, sparse.ratio),
        ci_lo=mean(dense.ci_lo, sparse.ci_lo),
        ci_hi=mean(dense.ci_hi, sparse.ci_hi),
        verdict=timing.verdict(mean(dense.ci_lo, sparse.ci_lo), mean(dense.ci_hi, sparse.ci_hi), sparse.noise),
    )


def compile_in_place(denoiser: nn.Module) -> None:
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(fullgraph=True)
    else:
        denoiser.compile()


def check(limit: float) -> timing.Check:
    def error(inputs: timing.Inputs, out: torch.Tensor, reference: torch.Tensor) -> float:
        rel_l2 = float((out.float() - reference.float()).norm() / reference.float().norm())
        if not rel_l2 <= limit:
            raise timing.WrongOutput(f"wanted the unpatched output within {limit}, got rel_l2 {rel_l2:.2e}")
        return rel_l2

    return error


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call allocates above what was allocated before it, at its peak."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    name: str,
    size: tuple[int, int, int],
    preset: str,
    device: torch.device,
    seconds: float,
    overrides: models.Spec | None,
    *,
    compiled: bool = False,
) -> tuple[dict[str, timing.Comparison], dict[str, int], videoattn.reports.Report]:
    """Patched against unpatched, of a preset that leaves key blocks out also its dense steps, peak bytes of both (empty on a
    CPU), and the report of what was patched."""
    plain = models.denoiser(name, device=device, overrides=overrides)
    patched = {preset: videoattn.enable_fast_attention(twin(plain), a_step_of(preset))}
    fast = patched[preset]
    if isinstance(PRESETS[preset].decision, Sparse):
        patched[DENSE] = videoattn.enable_fast_attention(twin(plain), DENSE)
    if compiled:
        for each in (plain, *patched.values()):
            compile_in_place(each)

    def run(denoiser: nn.Module) -> Callable[..., torch.Tensor]:
        @torch.no_grad()
        def forward(kwargs: dict[str, object]) -> torch.Tensor:
            return denoiser(**kwargs)[0]

        return forward

    def inputs(seed: int) -> timing.Inputs:
        return (models.inputs(name, *size, device=device, overrides=overrides, seed=seed),)

    compared = timing.compare(
        run(plain),
        {who: run(each) for who, each in patched.items()},
        inputs,
        check(TOLERANCE[preset]),
        device=device,
        seconds=seconds,
        min_rounds=3,
        full_queue=False,
    )
    compared.pop("control")
    arguments = inputs(0)
    peaks = {}
    if device.type == "cuda":
        peaks = {who: peak(lambda f=f: run(f)(*arguments), device) for who, f in (("unpatched", plain), (preset, fast))}
    return compared, peaks, videoattn.report(fast)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time whole denoiser forwards, patched against unpatched.")
    results.add_arguments(parser)
    parser.add_argument("--preset", default="exact", choices=tuple(TOLERANCE))
    parser.add_argument("--compile", action="store_true", help="both through torch.compile")
    parser.add_argument("--seconds", type=float, default=8.0, help="a case; at least three rounds of six forwards")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env, device = results.environment(args.commit), torch.device(args.device)
    chosen = [(f"{name} {'x'.join(map(str, size))}", name, size) for name, size in CASES]
    chosen = [case for case in chosen if args.only in case[0]]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {[name for name, _ in CASES]}")
    wrong = []
    for case, name, size in chosen:
        try:
            compared, peaks, report = measure(
                name, size, args.preset, device, args.seconds, None, compiled=args.compile
            )
        except (timing.WrongOutput, torch.OutOfMemoryError) as error:
            wrong.append(f"{case}: {error}")
            continue
        result = compared[args.preset]
        shown = [result]
        if DENSE in compared and args.preset != DENSE:
            shown.append(over_steps(args.preset, result, compared[DENSE]))
        for each in shown:
            print(f"{case}: {each}", flush=True)
            row = results.timing(
                each,
                case=case,
                shape=f"batch {models.spec(name)['batch']}",
                dtype=models.spec(name)["dtype"],
                kernel=each.name,
                baseline="torch.compile" if args.compile else "eager",
            )
            results.append("forward", [row], env, args.results)
            if each is result:
                results.append_samples("forward", row, result, args.samples)
        print(report, flush=True)
        if peaks and not args.compile:
            values = [(f"peak_{who}", count / 2**30, "GiB") for who, count in peaks.items()]
            values.append((f"peak_ratio_{args.preset}", peaks[args.preset] / peaks["unpatched"], "patched/unpatched"))
            figures = [{"case": case, "metric": m, "value": v, "unit": u} for m, v, u in values]
            results.append_figures("forward_memory", figures, env, args.results)
            torch.cuda.empty_cache()
    print("\n".join(f"FAILED {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
