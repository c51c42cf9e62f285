"""Step rehash: the time of whole generations, and what it costs in quality beside its control.

time      real sizes, random weights, latents out: every step in eager diffusers against step rehash by its defaults, at the last
          block of a U-Net too, and against "fast" with it. Runs are whole, interleaved A B B A; a first generation, which is
          the calibration, warms up.
quality   a trained model, held-out prompts: PSNR of every mode against the run of all steps with the same seeds. The control is
          the plain sampler with as many network calls, on its own grid and on every grid of key steps that a mode has. (A held
          output is that sampler for DDIM and flow Euler, to rounding: so it is run. For UniPC it is not, and that sampler runs
          on those grids.) Calibrated on prompts of their own.
cpu       the trained model on a CPU, seconds of a whole generation.

    python -m videoattn.benchmarks.rehash --part time
    python -m videoattn.benchmarks.rehash --part quality --model examples/models/tiny-wan
    python -m videoattn.benchmarks.rehash --part quality --fold 1    # other prompts and seeds than the defaults were chosen on
    python -m videoattn.benchmarks.rehash --part quality --unipc     # Wan's own sampler, which is of second order
    python -m videoattn.benchmarks.rehash --part cpu
    python -m videoattn.benchmarks.rehash --part quality --prompts 2 --frames 17 --height 128 --width 128    # a look, on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import videoattn
from videoattn.benchmarks import models, results, timing
from videoattn.benchmarks.quality_sparse import figures_of
from videoattn.benchmarks.quality_tiny import MODEL, PAIRED, compare
from videoattn.benchmarks.timing import Comparison
from videoattn.caches.families import Point
from videoattn.caches.session import rehash_of

UNET = ("animatediff", (576, 1024, 16), 25, 13)
DIT = ("wan-1.3b", (480, 832, 81), 50, 25)
CALIBRATED_ON = 4  # prompts, none of those that are compared
DEFAULT, OF_MULTISTEP = "correct, similarity", "hold, similarity"
THRESHOLDS = (0.05, 0.1, 0.2)

Options = dict[str, Any]


# -- time --------------------------------------------------------------------------------------------------------------


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, `rounds` samples: one order and then the other, so that a drift of the clocks hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        for name in functions if index % 2 == 0 else reversed(functions):
            _settle()
            start = time.perf_counter()
            functions[name]()
            _settle()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def comparison(name: str, own: Sequence[float], base: Sequence[float]) -> Comparison:
    """The median of the ratios, between the least and the greatest of them."""
    ratios = np.array(base) / np.array(own)
    low, high = float(ratios.min()), float(ratios.max())
    noise = max(base) / min(base) - 1
    return Comparison(
        name=name,
        median_ms=1e3 * float(np.median(own)),
        baseline_ms=1e3 * float(np.median(base)),
        ratio=float(np.median(ratios)),
        ci_lo=low,
        ci_hi=high,
        noise=noise,
        error=float("nan"),
        verdict=timing.verdict(low, high, noise),
        rounds=len(own),
        clocks="clocks unknown",
        samples_ms=tuple(1e3 * x for x in own),
        baseline_samples_ms=tuple(1e3 * x for x in base),
    )


def generations(name: str, size: tuple[int, int, int], steps: int, run: int, device: str, folder: Path):
    """(pipe, {what: a function that makes one generation of it}) of a model with random weights; all warm, and calibrated."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = models.load(name, device=device)
    if name == DIT[0]:  # as the trained model has it; what rehash costs in quality depends on it, and no time does
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    height, width, frames = size
    arguments = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}

    def generate(count: int = steps) -> None:
        seeded = torch.Generator().manual_seed(0)
        pipe(prompt="a red cube", output_type="latent", generator=seeded, **arguments | {"num_inference_steps": count})

    def rehash(point: Point = "output") -> None:
        videoattn.enable_step_rehash(pipe, steps=run, point=point, calibration=folder / f"{name}.toml")

    def eager() -> None:
        videoattn.disable(pipe)
        generate()

    def rehashed() -> None:
        videoattn.disable(pipe)
        rehash()
        generate()

    def fast() -> None:
        videoattn.enable_fast_attention(pipe, "fast")
        rehash()
        generate()

    def late() -> None:
        videoattn.disable(pipe)
        rehash("late_block")
        generate()

    made = {"eager": eager, "rehash": rehashed}
    more = {"fast + rehash": fast} if name == DIT[0] else {"rehash at late_block": late}
    for each in (rehashed, *more.values()):
        each()  # all steps, of which it learns how alike they are
    made |= more
    return pipe, made


def ran(pipe: Any) -> int:
    denoiser = next(getattr(pipe, name) for name in models.DENOISERS if getattr(pipe, name, None) is not None)
    return len(rehash_of(denoiser).ran)


def time_model(spec: tuple, case: str, args: argparse.Namespace, env: Mapping[str, str]) -> None:
    name, size, steps, run = spec
    shape = "x".join(map(str, size))
    with tempfile.TemporaryDirectory() as folder:
        pipe, functions = generations(name, size, steps, run, args.device, Path(folder))
        seconds = interleaved(functions, args.rounds)
        functions["rehash"]()
        if ran(pipe) != run:
            raise ValueError(f"{name}: wanted {run} of {steps} steps to run, got {ran(pipe)}")
    dtype = models.spec(name)["dtype"]
    cases = {"rehash": case, "rehash at late_block": case, "fast + rehash": f"{name} {shape}, {steps} steps, fast"}
    for what, of in cases.items():
        if what in seconds:
            found = comparison(what, seconds[what], seconds["eager"])
            write(found, of, f"{name} {shape}", dtype, "eager", args, env)


def write(found: Comparison, case: str, shape: str, dtype: str, baseline: str, args, env) -> None:
    row = results.timing(found, case=case, shape=shape, dtype=dtype, kernel=found.name, baseline=baseline)
    results.append("rehash", [row], env, args.results)
    results.append_samples("rehash", row, found, args.samples)
    print(f"{case}: {found}", flush=True)


def _settle() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- quality -----------------------------------------------------------------------------------------------------------


def held(run: int) -> dict[str, Options]:
    """The control on grids of key steps."""
    return {
        f"hold, {keys}": {"steps": run, "mode": "hold", "keys": keys} for keys in ("uniform", "similarity", "error")
    }


def modes(run: int, unet: bool) -> dict[str, Options]:
    """What is compared with it."""
    made: dict[str, Options] = {}
    for mode in ("extrapolate", "fit", "correct"):
        for keys in ("uniform", "similarity", "error"):
            made[f"{mode}, {keys}"] = {"steps": run, "mode": mode, "keys": keys}
    made["extrapolate2, uniform"] = {"steps": run, "mode": "extrapolate2", "keys": "uniform"}
    if unet:
        for coordinate in ("sigma", "log_snr"):
            made[f"extrapolate over {coordinate}, uniform"] = {
                "steps": run, "mode": "extrapolate", "keys": "uniform", "coordinate": coordinate,
            }  # fmt: skip
    point = "late_block" if unet else "first_block"
    for mode in ("hold", "extrapolate", "fit"):
        made[f"{mode} at {point}, similarity"] = {"steps": run, "mode": mode, "keys": "similarity", "point": point}
    if not unet:
        for each in THRESHOLDS:
            made[f"first block, threshold {each}"] = {"threshold": each, "mode": "extrapolate", "point": "first_block"}
    return made


@contextlib.contextmanager
def on_grid(scheduler: Any, keys: tuple[int, ...]) -> Iterator[None]:
    """A sampler over sigmas that knows only some of its steps."""

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        type(scheduler).set_timesteps(scheduler, *args, **kwargs)
        scheduler.sigmas = torch.cat([scheduler.sigmas[:-1][[*keys]], scheduler.sigmas[-1:]])
        scheduler.timesteps = scheduler.timesteps[[*keys]]
        scheduler.num_inference_steps = len(keys)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def with_unipc(pipe: Any) -> None:
    from diffusers import UniPCMultistepScheduler

    shift = pipe.scheduler.config.shift
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def above(points: Mapping[str, float], case: str, controls: Sequence[str]) -> float:
    """How many dB a case is above the best of its controls."""
    return points[case] - max(points[control] for control in controls)


def quality(args: argparse.Namespace, env: Mapping[str, str]) -> None:
    from data import Size
    from diffusers import DiffusionPipeline
    from evaluate import GUIDANCE, SIZES, STEPS, generate
    from scenes import held_out_scenes

    on_gpu = args.device.startswith("cuda")
    pipe = DiffusionPipeline.from_pretrained(str(args.model), dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.to(args.device).set_progress_bar_config(disable=True)
    unet = getattr(pipe, "unet", None) is not None
    denoiser = pipe.unet if unet else pipe.transformer
    largest = SIZES[type(pipe).__name__]["largest"]
    size = Size(
        frames=args.frames or largest.frames, height=args.height or largest.height, width=args.width or largest.width
    )
    steps, name = args.steps or STEPS, args.model.name
    default = DEFAULT
    if args.unipc:
        with_unipc(pipe)
        name, default = f"{name} with UniPC", OF_MULTISTEP
    first_scene = args.fold * (PAIRED + CALIBRATED_ON)
    scenes = held_out_scenes(first_scene + args.prompts + CALIBRATED_ON)[first_scene:]
    if len(scenes) < args.prompts + CALIBRATED_ON or (args.fold and args.prompts > PAIRED):
        raise ValueError(
            f"--fold {args.fold}: wanted {PAIRED} prompts at most, and so many held-out scenes, got {len(scenes)}"
        )
    prompts = [scene.caption() for scene in scenes]
    first_seed = 10_000 * args.fold
    if args.fold:
        name = f"{name} fold {args.fold}"
    compared, others = prompts[: args.prompts], prompts[args.prompts :]
    full, points, calls = None, {}, {}

    def clips(texts: Sequence[str], count: int = steps, seed: int = first_seed) -> np.ndarray:
        return generate(pipe, list(texts), size, steps=count, guidance=GUIDANCE, batch=args.batch, seed=seed)

    def record(case: str, made: np.ndarray, ran: int) -> None:
        figures = figures_of(case, compare(made, full))
        figures.append({"case": case, "metric": "steps_run", "value": ran, "unit": f"of {steps}"})
        results.append_figures("rehash_quality", figures, env, args.results)
        points[case], calls[case] = figures[0]["value"], ran
        print(f"{case:60s} {points[case]:6.2f} dB, {ran} steps", flush=True)

    def rehashed(case: str, options: Options, calibration: Path) -> set[int]:
        videoattn.enable_step_rehash(pipe, calibration=calibration, **options)
        made = clips(compared)
        keys = set(rehash_of(denoiser).ran)
        record(case, made, len(keys))
        return keys

    def calibrate(calibration: Path) -> None:
        for point in ("output", "late_block" if unet else "first_block"):
            videoattn.enable_step_rehash(pipe, steps=args.run[0], point=point, calibration=calibration)
            clips(others, seed=first_seed + 1000)
        videoattn.disable(pipe)

    full = clips(compared)
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.toml"
        calibrate(calibration)
        for run in args.run:
            of = f"{name}, {size}, {run} of {steps}: "
            controls = [f"{of}plain sampler", *(() if args.unipc else (of + case for case in held(run)))]
            record(controls[0], clips(compared, run), run)
            grids: set[tuple[int, ...]] = set()
            for case, options in {**held(run), **modes(run, unet)}.items():
                if args.only is not None and case != default and not any(part in case for part in args.only):
                    continue
                keys = tuple(sorted(rehashed(of + case, options, calibration)))
                videoattn.disable(pipe)
                if len(keys) != run or keys in grids:
                    continue
                grids.add(keys)
                if args.unipc:  # of which held outputs are another sampler
                    controls.append(f"{of}plain sampler, keys of {case}")
                    with on_grid(pipe.scheduler, keys):
                        record(controls[-1], clips(compared), run)
                elif case not in held(run):
                    controls.append(f"{of}hold, keys of {case}")
                    rehashed(controls[-1], {"steps": keys, "mode": "hold"}, calibration)
                    videoattn.disable(pipe)
            known = [control for control in controls if control in points]
            figures = [
                {
                    "case": case,
                    "metric": "above_control_db",
                    "value": above(points, case, known),
                    "unit": "dB, the best of them",
                }
                for case in points
                if case.startswith(of) and case not in known and calls[case] == run
            ]
            results.append_figures("rehash_quality", figures, env, args.results)
            for figure in sorted(figures, key=lambda figure: -figure["value"]):
                print(f"{figure['case']:60s} {figure['value']:+.2f} dB above the best control")
            if run == args.run[0] and not args.unipc and not args.fold:
                value = above(points, of + DEFAULT, known)
                row = {
                    "case": f"{name} rehash",
                    "metric": "psnr_above_control_db",
                    "value": value,
                    "unit": f"dB, {run} of {steps}",
                }
                results.append_figures("quality", [row], env, args.results)
    if on_gpu and args.only is None:
        videoattn.enable_fast_attention(pipe, "exact", backend="sdpa_math")
        record(f"{name}, {size}: noise floor", clips(compared), steps)


def cpu(args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """tiny-wan at its demo's size, all steps and rehashed ones."""
    from data import DEMO
    from diffusers import DiffusionPipeline
    from evaluate import GUIDANCE, STEPS

    pipe = DiffusionPipeline.from_pretrained(str(args.model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = {
        "height": args.height or DEMO.height,
        "width": args.width or DEMO.width,
        "num_frames": args.frames or DEMO.frames,
    }
    run = round((STEPS + 1) / 2)

    def generate() -> None:
        seeded = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"} | size
        pipe("a red circle moves left", generator=seeded, **arguments)

    def eager() -> None:
        videoattn.disable(pipe)
        generate()

    with tempfile.TemporaryDirectory() as folder:

        def rehashed() -> int:
            videoattn.enable_step_rehash(pipe, steps=run, calibration=Path(folder) / "calibration.toml")
            generate()
            return ran(pipe)

        rehashed()
        seconds = interleaved({"eager": eager, "rehash": rehashed}, args.rounds)
        if rehashed() != run:
            raise ValueError(f"wanted {run} of {STEPS} steps to run, got {ran(pipe)}")
    shape = "x".join(str(size[name]) for name in ("height", "width", "num_frames"))
    found = comparison("rehash", seconds["rehash"], seconds["eager"])
    write(found, "tiny-wan cpu", f"{shape}, {run} of {STEPS} steps", "float32", "eager", args, env)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--part", choices=("time", "quality", "cpu"), default="time")
    parser.add_argument("--case", choices=("unet", "dit"), nargs="+", default=("unet", "dit"), help="of time")
    parser.add_argument("--rounds", type=int, default=2, help="samples of each generation")
    parser.add_argument("--model", type=Path, default=MODEL, help="of quality and cpu")
    parser.add_argument("--prompts", type=int, default=PAIRED)
    parser.add_argument(
        "--fold", type=int, default=0, help="other prompts and seeds: 0 is what defaults were chosen on"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's usual ones)")
    parser.add_argument("--run", type=int, nargs="+", default=(13,), help="how many of them run; the first counts")
    parser.add_argument("--only", nargs="+", help="parts of the names of modes that run beside the default")
    parser.add_argument("--unipc", action="store_true", help="quality of tiny-wan with that sampler")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    if args.part == "quality":
        quality(args, env)
    elif args.part == "cpu":
        cpu(args, env)
    else:
        for spec, case in ((UNET, "unet"), (DIT, "dit")):
            if case in args.case:
                time_model(spec, f"{case} {spec[3]} of {spec[2]}", args, env)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
