"""The command `videoattn`: generate a video, look at the environment, run a benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

import torch

import videoattn
from videoattn import generation
from videoattn.policy import Precision

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from videoattn.profiling.comparison import Comparison
    from videoattn.profiling.profile import Profile

OK, FAULT, WRONG_USE = 0, 1, 2
BENCHMARKS = {
    "all": "attention, dense, dispatch, forward, host_time and temporal",
    "attention": "every kernel on every attention call of the video models",
    "dense": "our kernels on long sequences, head_dim by head_dim, against the best of torch's",
    "dispatch": "what exact attention chooses there, against torch's choice",
    "forward": "whole denoisers at real sizes",
    "memory": "what feature slicing saves and costs",
    "host_time": "host time that a call costs more",
    "prologue": "norm, rotation and quantisation in one pass before attention, against diffusers' own operations",
    "quality_tiny": "what quantised attention costs on the trained model",
    "rehash": "fewer calls of the network: time, and quality beside the sampler with as many",
    "sparse": "attention that leaves key blocks out: kernels, selection, and fast against balanced",
    "quality_sparse": "what leaving key blocks out costs on the trained model, beside its controls",
    "recall_tiny": "how much of attention each selector of key blocks keeps on the trained model",
    "quantised": "quantised attention against cuDNN and SageAttention 1, and its errors",
    "io_bytes": "HBM bytes of our kernels: the profiler's I/O model against ncu's counters",
    "profile_truth": "the profiler's shares and FLOPs against costs that are known",
    "profiles": "where the time of the video models goes, a profile of each",
    "suite": "seconds of make test and make demo",
    "tiling": "what a VAE's own tiling saves and costs on trained weights",
    "streaming": "a million tokens in 8 GiB: copies, memory and errors",
    "temporal": "temporal attention against the best of torch's kernels and against a copy",
    "warmup": "what the first generation takes longer",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse's own prints the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 something here is broken (doctor, a benchmark), 2 wrong use."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.typed = shlex.join(["videoattn", *(sys.argv[1:] if argv is None else argv)])
    try:
        return args.run(args)
    # What users can get wrong: values (ours and diffusers' checks), and files, folders and hub ids that are not there.
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        parser.error(" ".join(str(error).split()))
    except torch.OutOfMemoryError as error:
        if args.traceback:
            raise
        parser.exit(
            FAULT,
            f"videoattn: out of GPU memory, fewer --frames or a smaller --height and --width need less: {error}\n",
        )


def _parser() -> Parser:
    parser = Parser(prog="videoattn", description=videoattn.__doc__)
    parser.add_argument("--version", action="version", version=f"videoattn {videoattn.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser("generate", help="a video, with fast attention")
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a name in benchmarks/models.toml")
    generation.add_arguments(command, out="outputs/video.mp4")
    command.set_defaults(run=_generate)

    command = commands.add_parser("profile", help="where the time and the memory of a generation go, by operator")
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a name in benchmarks/models.toml")
    generation.add_arguments(command, out="outputs/profile", preset="none")
    command.add_argument("--commit", default="", help="of the code that is measured, for the report's environment")
    command.set_defaults(run=_profile)

    command = commands.add_parser("compare", help="a generation without and with fast attention: time, memory, quality")
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a name in benchmarks/models.toml")
    generation.add_arguments(command, out="outputs/compare")
    command.add_argument(
        "--rounds", type=int, default=3, help="of two runs each, without and with (default: %(default)s)"
    )
    command.add_argument(
        "--control", type=int, metavar="STEPS", help="steps of the base run that makes as many network calls; 0: none"
    )
    command.add_argument("--lpips-weights", type=Path, metavar="PATH", help="of torchvision's AlexNet, for LPIPS")
    command.add_argument("--commit", default="", help="of the code that is measured, for the report's environment")
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "report", help="HTML, Markdown and text again from the JSON of a profile or comparison"
    )
    command.add_argument("file", metavar="RUN.JSON", type=Path, help="report.json of such a run")
    command.add_argument("--out", type=Path, default=Path("outputs/report"), help="(default: %(default)s)")
    command.set_defaults(run=_report)

    command = commands.add_parser("plan", help="what a generation will cost, from a model's config: no weights, no GPU")
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a name in benchmarks/models.toml")
    for name, what in (
        ("height", "in pixels"),
        ("width", "in pixels"),
        ("frames", "of the video"),
        ("steps", "denoising"),
    ):
        command.add_argument(f"--{name}", type=int, help=f"{what} (default: the pipeline's)")
    command.add_argument(
        "--card",
        default="h200",
        help="whose ceilings to take: a shipped card, or a profile's report.json (%(default)s)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    command.set_defaults(run=_plan)

    command = commands.add_parser("doctor", help="what works in this environment, and what does not")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("calibrate", help="measure this GPU, so that the fastest kernel is chosen on it")
    command.add_argument("--seconds", type=float, default=60.0, help="the most that is spent (%(default)s)")
    command.add_argument("--only", default="", help="only calls whose name contains this: a model, a kind, a size")
    command.add_argument(
        "--max-gflop", type=float, default=10_000.0, help="leave out calls with more work than this (%(default)s)"
    )
    command.add_argument("--out", type=Path, help="another file than the one in the cache folder, which takes effect")
    command.add_argument("--update", action="store_true", help="only kernels that the table does not have yet")
    command.add_argument("--from-csv", type=Path, help="measure nothing: make OUT of an attention.csv")
    command.set_defaults(run=_calibrate)

    command = commands.add_parser(
        "tune", help="which layers of a model can be quantised, or which windows its heads need, into a policy"
    )
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a name in benchmarks/models.toml")
    generation.add_arguments(command, out="outputs/tuned.toml", preset=None)
    command.add_argument("--prompts", nargs="+", metavar="PROMPT", help="several, or a file with one a line")
    command.add_argument("--samples", type=int, help="steps looked at: of each part 2, for windows 3")
    wanted = command.add_mutually_exclusive_group()
    wanted.add_argument(
        "--target",
        default="cosine=0.998",
        help="a precision for each layer: cosine=, rel_l1= or rel_l2= of each attention call (%(default)s)",
    )
    wanted.add_argument(
        "--windows",
        metavar="recall=SHARE",
        help="the smallest sliding-tile window for each head that keeps this share of the softmax mass: recall=0.9",
    )
    command.add_argument(
        "--ranges", type=int, default=3, help="with --target: parts of the schedule told apart (%(default)s)"
    )
    command.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="int8_qk_fp8_pv",
        help="with --windows: that they will run in (%(default)s)",
    )
    command.add_argument(
        "--dense-steps",
        type=float,
        default=0.2,
        help="with --windows: share of the steps, the first ones (%(default)s)",
    )
    command.add_argument(
        "--block", type=int, default=128, help="with --windows: tokens of a tile, 64 with sdpa_masked (%(default)s)"
    )
    command.set_defaults(run=_tune)

    command = commands.add_parser("bench", help="run a benchmark; its own flags follow its name")
    command.add_argument(
        "script",
        metavar="SCRIPT",
        choices=tuple(BENCHMARKS),
        help="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()),
    )
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its flags; --help lists them")
    command.set_defaults(run=_bench)
    return parser


def _generate(args: argparse.Namespace) -> int:
    from videoattn.video import write_video

    if args.out.suffix != ".mp4":
        raise ValueError(f"--out: wanted a file that ends in .mp4, got {args.out}")
    settings = generation.Settings.of(args)
    pipe, settings = _loaded(args.model, settings)
    videoattn.enable_fast_attention(pipe, args.preset)
    made = generation.generate(pipe, settings)
    write_video(made.frames, args.out)
    print(videoattn.report(pipe))
    print(f"{args.out}: {len(made.frames)} frames, {made.seconds:.1f} s, {made.calls} calls of the denoiser, ", end="")
    print(f"peak {made.peak_gib:.2f} GiB ({made.memory})")
    return OK


def _profile(args: argparse.Namespace) -> int:
    from videoattn.profiling import folder, recorder, shown

    folder.require_writable(args.out)
    settings = generation.Settings.of(args)
    pipe, settings = _loaded(args.model, settings)
    if args.preset != generation.UNTOUCHED:
        videoattn.enable_fast_attention(pipe, args.preset)
    arguments = generation.call_arguments(pipe, settings)
    try:
        with shown.passes(recorder.PASSES) as told:
            made = recorder.record(pipe, arguments, progress=told, commit=args.commit)
    except recorder.ProfileAborted as aborted:
        folder.write(aborted.profile, args.out)
        print(aborted.profile)
        print(f"{args.out}: partial, the generation broke off: {aborted.profile.error}", file=sys.stderr)
        return FAULT
    return _written(made, args.out)


def _compare(args: argparse.Namespace) -> int:
    from videoattn.profiling import compare, folder, shown

    folder.require_writable(args.out)
    settings = generation.Settings.of(args)
    pipe, settings = _loaded(args.model, settings)
    with shown.passes(compare.runs(args.rounds)) as told:
        made = compare.compare(
            pipe,
            policy=args.preset,
            rounds=args.rounds,
            control=args.control,
            lpips_weights=args.lpips_weights,
            progress=told,
            commit=args.commit,
            **generation.call_arguments(pipe, settings),
        )
    return _written(made, args.out)


def _report(args: argparse.Namespace) -> int:
    from videoattn.profiling import folder

    folder.require_writable(args.out)
    made = folder.read(args.file)
    (args.out / "report.txt").write_text(str(made), encoding="utf-8")
    return _written(made, args.out)


def _written(made: Profile | Comparison, out: Path) -> int:
    """Writes a report and prints its table and its files."""
    from videoattn.profiling import folder

    files = folder.write(made, out)
    print(made)
    print("\n".join(f"{file}: {file.stat().st_size / 2**10:.0f} KiB" for file in files))
    return OK


def _loaded(model: str, settings: generation.Settings) -> tuple[DiffusionPipeline, generation.Settings]:
    """The pipeline that MODEL names, and the settings with the picture that one with random weights starts from."""
    pipe = _load(model)
    if model in _random_models() and generation.needs_image(pipe) and settings.image is None:
        settings = dataclasses.replace(settings, image=generation.synthetic_image(1024, 576))
    return pipe, settings


def _load(model: str) -> DiffusionPipeline:
    """The pipeline that MODEL names."""
    if model in _random_models():
        from videoattn.benchmarks import models

        device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
        return models.load(model, device=device, dtype=dtype)
    if Path(model).is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return generation.load(model)
    names = ", ".join(_random_models())
    raise ValueError(f"MODEL: wanted a folder, a hub id (owner/name) or one of {names}; got {model!r}")


def _random_models() -> tuple[str, ...]:
    from videoattn.benchmarks import models

    return models.loadable()


def _plan(args: argparse.Namespace) -> int:
    from videoattn.profiling.plan import plan

    made = plan(args.model, args.height, args.width, args.frames, args.steps, card=args.card)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(made.to_json(), encoding="utf-8")
    print(made, end="")
    return OK


def _doctor(args: argparse.Namespace) -> int:
    from videoattn import doctor

    checks = doctor.examine()
    doctor.show(checks)
    return FAULT if any(check.state == "broken" for check in checks) else OK


def _calibrate(args: argparse.Namespace) -> int:
    from videoattn import calibration

    if args.from_csv is None:
        return calibration.calibrate(
            out=args.out,
            seconds=args.seconds,
            only=args.only,
            max_gflop=args.max_gflop,
            command=args.typed,
            update=args.update,
        )
    if args.out is None:
        raise ValueError(f"--from-csv {args.from_csv}: wanted --out, got none")
    return calibration.from_results(args.from_csv, args.out, args.typed)


def _tune(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from videoattn import tuning, window_tuning

    if args.out.suffix != ".toml":
        raise ValueError(f"--out: wanted a file that ends in .toml, got {args.out}")
    if args.windows is None:
        tune, options = tuning.tune, {"target": tuning.Target.parse(args.target), "ranges": args.ranges}
    else:
        recall = window_tuning.parse_recall(args.windows)
        options = {name: getattr(args, name) for name in ("precision", "dense_steps", "block")}
        tune, options = window_tuning.tune, {"recall": recall, **options}
    if args.samples is not None:
        options["samples"] = args.samples
    prompts = [args.prompt] if args.prompts is None else args.prompts
    if len(prompts) == 1 and prompts[0] is not None and Path(prompts[0]).is_file():
        prompts = [line for line in Path(prompts[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    settings = generation.Settings.of(args)
    pipe, settings = _loaded(args.model, settings)
    every = [dataclasses.replace(settings, prompt=prompt) for prompt in prompts]
    for each in every:
        generation.call_arguments(pipe, each)  # raises before the first of them runs
    with Progress() as progress:
        task = progress.add_task("tuning", total=len(every))
        made = tune(
            pipe,
            (lambda each=each: generation.generate(pipe, each) for each in every),
            progress=lambda: progress.advance(task),
            **options,
        )
    tuning.write(made, args.out)
    print(made)
    print(f"{args.out}: enable_fast_attention(pipe, Policy.load({str(args.out)!r}))")
    return OK


def _bench(args: argparse.Namespace) -> int:
    return importlib.import_module(f"videoattn.benchmarks.{args.script}").main(args.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
