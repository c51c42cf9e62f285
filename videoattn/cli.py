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
from typing import TYPE_CHECKING, NoReturn

import torch

import videoattn
from videoattn import generation

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OK, FAULT, WRONG_USE = 0, 1, 2
BENCHMARKS = {
    "all": "attention, dense, dispatch, forward, host_time and temporal",
    "attention": "every kernel on every attention call of the video models",
    "dense": "our kernels on long sequences, head_dim by head_dim, against the best of torch's",
    "dispatch": "what exact attention chooses there, against torch's choice",
    "forward": "whole denoisers at real sizes",
    "host_time": "host time that a call costs more",
    "suite": "seconds of make test and make demo",
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

    command = commands.add_parser("doctor", help="what works in this environment, and what does not")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("calibrate", help="measure this GPU, so that the fastest kernel is chosen on it")
    command.add_argument("--seconds", type=float, default=60.0, help="the most that is spent (%(default)s)")
    command.add_argument("--only", default="", help="only calls whose name contains this: a model, a kind, a size")
    command.add_argument(
        "--max-gflop", type=float, default=10_000.0, help="leave out calls with more work than this (%(default)s)"
    )
    command.add_argument("--out", type=Path, help="another file than the one in the cache folder, which takes effect")
    command.add_argument("--from-csv", type=Path, help="measure nothing: make OUT of an attention.csv")
    command.set_defaults(run=_calibrate)

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
    pipe = _load(args.model)
    if args.model in _random_models() and generation.needs_image(pipe) and settings.image is None:
        settings = dataclasses.replace(settings, image=generation.synthetic_image(1024, 576))
    videoattn.enable_fast_attention(pipe, args.preset)
    made = generation.generate(pipe, settings)
    write_video(made.frames, args.out)
    print(videoattn.report(pipe))
    print(f"{args.out}: {len(made.frames)} frames, {made.seconds:.1f} s, {made.calls} calls of the denoiser, ", end="")
    print(f"peak {made.peak_gib:.2f} GiB ({made.memory})")
    return OK


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


def _doctor(args: argparse.Namespace) -> int:
    from videoattn import doctor

    checks = doctor.examine()
    doctor.show(checks)
    return FAULT if any(check.state == "broken" for check in checks) else OK


def _calibrate(args: argparse.Namespace) -> int:
    from videoattn import calibration

    if args.from_csv is None:
        return calibration.calibrate(
            out=args.out, seconds=args.seconds, only=args.only, max_gflop=args.max_gflop, command=args.typed
        )
    if args.out is None:
        raise ValueError(f"--from-csv {args.from_csv}: wanted --out, got none")
    return calibration.from_results(args.from_csv, args.out, args.typed)


def _bench(args: argparse.Namespace) -> int:
    return importlib.import_module(f"videoattn.benchmarks.{args.script}").main(args.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
