"""What leaving key blocks out costs in quality on a trained model: tiny-wan at its largest size, against the same seeds in dense
attention.

Every selector at some densities, on every self-attention call of every step behind the dense first ones (--dense-steps):
no other gate is on. A video is compared with the dense run's own of the same prompt and seed, so PSNR also counts a scene
that is laid out otherwise and is as good.

Every curve is there twice: as it is, and with the blocks that are left out in the softmax by their means ("remainder").

Controls: random key blocks at the same densities, in every order of tokens, of which the best one counts, with the remainder
where a curve has it; dense runs of fewer steps, which save time on the whole denoiser; the noise floor (two exact kernels of
torch).

The density of a run is the share of key blocks in the lists, what is required included. Blocks are as large as the kernel's
(192 queries and 128 keys on Hopper, 64 and 64 in torch on a CPU), so runs compare where the backend is the same.

Needs a checkout: the prompts are examples/train_tiny's.

    python -m videoattn.benchmarks.quality_sparse --sheet outputs/fast.png                         # minutes on an H100
    python -m videoattn.benchmarks.quality_sparse --only pooled random                              # curves by their names
    python -m videoattn.benchmarks.quality_sparse --only window --tuned tuned.toml                  # windows of heads
    python -m videoattn.benchmarks.quality_sparse --device cpu --size small --steps 3 --prompts 1   # for a look at it
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import videoattn
from videoattn.backend import UnsupportedCall
from videoattn.benchmarks import results
from videoattn.benchmarks.quality_tiny import MODEL, PAIRED, able, call_of, load, psnr_figures, save_sheet
from videoattn.call import Call
from videoattn.policy import PRESETS, Policy, Sparse
from videoattn.quality import VideoDifference, compare_videos
from videoattn.selection.arrangement import ORDERS, Order
from videoattn.selection.bands import Bands
from videoattn.selection.pooled import Pooled
from videoattn.selection.radial import Radial
from videoattn.selection.random import Random
from videoattn.selection.selector import Selector
from videoattn.selection.sharded import Sharded
from videoattn.selection.sliding_tiles import SlidingTiles
from videoattn.selection.xattention import XAttention
from videoattn.session import Session

BACKENDS = ("triton_hopper_sparse", "triton_hopper_sparse_int8_fp8", "triton_sparse", "sdpa_masked")
"""Those that may leave key blocks out here, the first that computes a decision."""

DENSITIES = (0.1, 0.2, 0.35, 0.5)  # asked for; what is required comes on top, up to 0.1
POOLED_TAUS = (1.5, 1.0, 0.5, 0.0)
MASS_TAUS = (0.4, 0.55, 0.7, 0.85)
WINDOWS = ((3, 11, 11), (9, 11, 11), (3, 22, 22), (9, 11, 22))  # of 9 x 22 x 22 tokens
DECAYS = (0.25, 0.75, 1.0, 1.5)  # here the least keeps 0.6 already
SHARDS = ((4, (0, 0, 0)), (3, (0, 0, 0)), (4, (1, 1, 1)), (3, (1, 1, 1)))  # with the reach
KEPT = (2, 4)  # steps
DENSE_STEPS = (0.1, 0.2)  # shares of the steps, beside the preset's
STRIDE = 8  # of XAttention

DENSE = "dense"
FAST = "fast"
FAST_IN_16_BITS = "fast in 16 bits"
FEWER_STEPS = "fewer steps"
TUNED = "sliding tiles, a window a head"
REMAINDER = ", remainder"
DENSER = ", dense steps"
NOISE_FLOOR = "noise floor"

Points = dict[str, dict[str, float]]
"""Case -> metric -> value."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All prompts once.

    Args:
        policy: what is computed.
        backends: the first of these that does not refuse is forced.
        steps: of the sampler.
    """

    policy: Policy
    backends: tuple[str, ...]
    steps: int


def curves() -> dict[str, dict[object, Selector]]:
    """Curve -> point -> selector."""
    return {
        "pooled": {each: Pooled(density=each) for each in DENSITIES},
        "pooled by tau": {each: Pooled(tau=each) for each in POOLED_TAUS},
        "pooled, raster": {each: Pooled(density=each, order="raster") for each in DENSITIES},
        "xattention": {each: XAttention(stride=STRIDE, density=each) for each in DENSITIES},
        "xattention, morton": {each: XAttention(stride=STRIDE, density=each, order="morton") for each in DENSITIES},
        "xattention s16, morton": {each: XAttention(density=each, order="morton") for each in DENSITIES},
        "xattention by tau, morton": {each: XAttention(stride=STRIDE, tau=each, order="morton") for each in MASS_TAUS},
        "sliding tiles": {_joined(each): SlidingTiles(windows=(each,)) for each in WINDOWS},
        "radial": {each: Radial(decay_factor=each) for each in DECAYS},
        "bands": {each: Bands(density=each) for each in DENSITIES},
        "sharded": {f"{n} reach {_joined(reach)}": Sharded(shards=n, reach=reach) for n, reach in SHARDS},
        **{_random(order): {each: Random(density=each, order=order) for each in DENSITIES} for order in ORDERS},
    }


def runs(steps: int, dense_steps: float) -> dict[str, Run]:
    """Case -> run. A case is "CURVE: POINT", or a name alone.

    Args:
        steps: of the dense run. dense_steps: share of them that is dense, the first ones.
    """
    made: dict[str, Run] = {}

    def add(case: str, decision: Sparse) -> None:
        policy = Policy(name=case, decision=decision, dense_steps=dense_steps)
        made[case] = Run(policy=policy, backends=BACKENDS, steps=steps)

    for curve, points in curves().items():
        for point, selector in points.items():
            add(f"{curve}: {point}", Sparse(selector))
            add(f"{curve}{REMAINDER}: {point}", Sparse(selector, remainder=True))
    fast = replace(PRESETS["fast"], dense_steps=dense_steps, min_steps=0, min_tokens=0)
    made[FAST] = Run(policy=fast, backends=BACKENDS, steps=steps)
    for each in DENSE_STEPS:
        made[f"{FAST}{DENSER}: {each}"] = Run(policy=replace(fast, dense_steps=each), backends=BACKENDS, steps=steps)
    in_16_bits = replace(fast.decision, precision="exact")
    add(FAST_IN_16_BITS, in_16_bits)
    other = replace(in_16_bits, remainder=not in_16_bits.remainder)
    add(f"{FAST_IN_16_BITS}{', no remainder' if in_16_bits.remainder else REMAINDER}", other)
    for each in KEPT:
        add(f"{FAST_IN_16_BITS}, lists kept: {each} steps", replace(in_16_bits, keep_steps=each))
    for each in fewer(steps):
        made[f"{FEWER_STEPS}: {each}"] = Run(policy=PRESETS["exact"], backends=("sdpa",), steps=each)
    made[NOISE_FLOOR] = Run(policy=PRESETS["exact"], backends=("sdpa_efficient", "sdpa_math"), steps=steps)
    return made


def fewer(steps: int) -> list[int]:
    """How many steps the runs have that save time otherwise: one less, 2, 4, ..., and half of them.

    >>> fewer(25)
    [24, 23, 21, 17, 13]
    """
    less = [2**n for n in range(steps.bit_length()) if 2**n < steps // 2]
    return [steps - each for each in [*less, steps // 2]]


def backend_for(run: Run, call: Call) -> tuple[str | None, str]:
    """Who computes a run, or None and why nobody does."""
    asked = able(run.policy.decision, call)
    reasons = {name: asked.get(name, "not here, or not for this") for name in run.backends}
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    return chosen, "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)


def density(session: Session) -> float | None:
    """The share of key blocks in all lists of a session; None where nothing was left out."""
    found = [(kept.density, kept.selections) for kept in session.kept if kept.density is not None]
    return sum(share * count for share, count in found) / sum(count for _, count in found) if found else None


def random_at(points: Mapping[str, Mapping[str, float]], at: float, *, remainder: bool = False) -> float | None:
    """The mean PSNR in dB of random key blocks at a density, interpolated, in the order of tokens that it is highest in.

    None beyond the densities measured.

    Args:
        points: case -> metric -> value.
        remainder: whether what is left out takes part by its means.
    """
    found = []
    for order in ORDERS:
        curve = f"{_random(order)}{REMAINDER if remainder else ''}: "
        known = sorted((of["density"], of["psnr_mean_db"]) for case, of in points.items() if case.startswith(curve))
        if known and known[0][0] <= at <= known[-1][0]:
            found.append(float(np.interp(at, *zip(*known, strict=True))))
    return max(found, default=None)


def figures_of(case: str, found: Sequence[VideoDifference]) -> list[dict[str, object]]:
    ssim = float(np.mean([each.ssim for each in found]))
    return [*psnr_figures(case, found), {"case": case, "metric": "ssim_mean", "value": ssim, "unit": "of 1"}]


def over_random(points: Points, with_remainder: Collection[str]) -> list[dict[str, object]]:
    """How much better selectors are than the control at their density.

    Args:
        with_remainder: the cases that have it.
    """
    figures = []
    for case, of in points.items():
        control = None
        if (
            "density" in of and not case.startswith("random") and DENSER not in case
        ):  # random blocks keep the usual ones
            control = random_at(points, of["density"], remainder=case in with_remainder)
        if control is not None:
            over = of["psnr_mean_db"] - control
            figures.append({"case": case, "metric": "over_random_db", "value": over, "unit": "dB, interpolated"})
    return figures


def table(points: Points) -> str:
    """A row a case; dashes where something was not measured."""
    columns = {
        "density": ("density", ".3f"),
        "time": ("time", ".3f"),
        "psnr_mean_db": ("PSNR, dB", ".2f"),
        "psnr_worst_db": ("worst", ".2f"),
        "ssim_mean": ("SSIM", ".4f"),
        "over_random_db": ("over random", ".2f"),
    }
    width = max(map(len, points), default=0)
    lines = [" ".join([f"{'case':{width}s}", *(f"{title:>12s}" for title, _ in columns.values())])]
    for case, of in points.items():
        values = (f"{of[name]:{form}}" if name in of else "-" for name, (_, form) in columns.items())
        lines.append(" ".join([f"{case:{width}s}", *(f"{value:>12s}" for value in values)]))
    return "\n".join(lines)


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _random(order: Order) -> str:
    return f"random, {order}"


def main(argv: list[str] | None = None) -> int:
    from data import DEMO, LARGEST, Size
    from evaluate import GUIDANCE, STEPS, generate
    from scenes import held_out_scenes

    sizes = {"largest": LARGEST, "demo": DEMO, "small": Size(frames=17, height=96, width=96)}
    parser = argparse.ArgumentParser(description="Quality of block-sparse attention on the trained model shipped here.")
    results.add_arguments(parser)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=PAIRED)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", choices=sizes, default="largest")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dense-steps", type=float, default=PRESETS["fast"].dense_steps, help="share of the steps")
    parser.add_argument("--only", nargs="+", help="parts of the names of cases that run; all else is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="that alone leaves blocks out; default: the first that does"
    )
    parser.add_argument(
        "--tuned",
        type=Path,
        nargs="+",
        default=[],
        help="policies of videoattn tune --windows, each a case by its name",
    )
    parser.add_argument(
        "--tally", action="store_true", help="no runs: over_random_db of what --results holds, of runs side by side"
    )
    parser.add_argument("--sheet", type=Path, help='a picture: dense above "fast", prompt by prompt')
    args = parser.parse_args(argv)

    every = runs(args.steps, args.dense_steps)
    for file in args.tuned:
        policy = replace(Policy.load(file), dense_steps=args.dense_steps)
        every[f"{TUNED}: {file.stem}"] = Run(policy=policy, backends=BACKENDS, steps=args.steps)
    asked = {case: run for case, run in every.items() if args.only is None or any(part in case for part in args.only)}
    if not asked:
        parser.error(f"--only: wanted parts of {', '.join(every)}, got {args.only}")
    environment = results.environment(args.commit)
    points: Points = {}
    remainders = {case for case, run in every.items() if getattr(run.policy.decision, "remainder", False)}

    def write(figures: Sequence[Mapping[str, object]]) -> None:
        results.append_figures("quality_sparse", figures, environment, args.results)
        for figure in figures:
            points.setdefault(figure["case"], {})[figure["metric"]] = figure["value"]

    if args.tally:
        for row in results.read(args.results / "quality_sparse.csv"):
            if row["commit"] == environment["commit"]:
                points.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
                environment = {name: row[name] for name in environment}  # of what is compared, not of who compares
        write(over_random(points, remainders))
        print(table(points))
        return 0
    size = sizes[args.size]
    pipe = load(args.model, torch.device(args.device))
    prompts = [scene.caption() for scene in held_out_scenes(args.prompts)]
    call = call_of(pipe, size, min(args.batch, len(prompts)))
    left_out: dict[str, str] = {}
    sparse: dict[str, np.ndarray] = {}  # for the sheet

    def clips(run: Run, backend: str) -> tuple[np.ndarray, float | None]:
        with videoattn.fast_attention(pipe, run.policy, backend=backend) as (session,):
            made = generate(pipe, prompts, size, steps=run.steps, guidance=GUIDANCE, batch=args.batch)
            return made, density(session)

    def finish(case: str, known: list[dict[str, object]], compared: Sequence[Future[VideoDifference]]) -> None:
        write([*known, *figures_of(case, [each.result() for each in compared])])
        print(f"{case}: {points[case]['psnr_mean_db']:.2f} dB", flush=True)

    dense, _ = clips(Run(policy=PRESETS["exact"], backends=("sdpa",), steps=args.steps), "sdpa")
    write(
        [
            {"case": DENSE, "metric": "tokens", "value": size.tokens, "unit": "tokens"},
            {"case": DENSE, "metric": "prompts", "value": len(prompts), "unit": "prompts"},
            {"case": DENSE, "metric": "steps", "value": args.steps, "unit": "steps"},
            {"case": DENSE, "metric": "dense_steps", "value": args.dense_steps, "unit": "of the steps"},
        ]
    )
    waiting: deque[tuple[str, list[dict[str, object]], list[Future[VideoDifference]]]] = deque()
    with ThreadPoolExecutor() as pool:  # SSIM takes seconds a clip, in which the next ones are made
        for case, run in asked.items():
            leaves_out = isinstance(run.policy.decision, Sparse)
            if leaves_out and args.backend is not None:
                run = replace(run, backends=tuple(name for name in run.backends if name == args.backend))
            backend, why = backend_for(run, call)
            if backend is None:
                left_out[case] = why or f"not for {args.backend}"
                continue
            try:
                made, share = clips(run, backend)
            except UnsupportedCall as refusal:
                left_out[case] = str(refusal)
                continue
            if leaves_out and share is None:
                left_out[case] = f"all {run.steps} steps are dense"
                continue
            known = []
            if leaves_out:
                unit = f"of the key blocks, {backend}"
                known.append({"case": case, "metric": "density", "value": share, "unit": unit})
            elif run.steps != args.steps:
                unit = "of the steps of the dense run"
                known.append({"case": case, "metric": "time", "value": run.steps / args.steps, "unit": unit})
            if case in (FAST, FAST_IN_16_BITS):
                sparse[case] = made
            waiting.append((case, known, [pool.submit(compare_videos, a, b) for a, b in zip(made, dense, strict=True)]))
            if len(waiting) > 1:
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
    write(over_random(points, remainders))
    if args.sheet is not None and sparse:
        save_sheet(args.sheet, prompts, ("dense", dense), ("sparse", next(iter(sparse.values()))))
    for case, why in left_out.items():
        print(f"{case} left out: {why}")
    print(table({case: of for case, of in points.items() if case != DENSE}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
