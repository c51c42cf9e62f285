"""Where the time of the video models goes: a profile of each at its real size with random weights.

Each generation is a real one of two to four steps, text encoder and VAE included. JSON goes to
``results/profiles/<model>.json``, figures of the reports to ``profile.csv``: `overhead`, the wall time of the recorded pass
over that of the untouched generation; the shares of the time and of the attention calls that have a name; the page's size.

    python -m videoattn.benchmarks.profiles                         # three minutes on an H200
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

import videoattn
from videoattn import generation
from videoattn.benchmarks import models, results
from videoattn.profiling import folder, html, recorder, summary
from videoattn.profiling.profile import Profile

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny-wan"
PROMPT = "a red circle moves left over a blue background"
CASES: dict[str, dict[str, object]] = {
    "wan-1.3b": {"steps": 2, "height": 480, "width": 832, "frames": 81},
    "svd-xt": {"steps": 2, "height": 576, "width": 1024, "frames": 25},
    "animatediff": {"steps": 4, "height": 512, "width": 512, "frames": 16},
    "modelscope": {"steps": 4, "height": 256, "width": 256, "frames": 16},
    "tiny-wan": {"steps": 4, "guidance": 3.0, "height": 192, "width": 192, "frames": 25},
}


def settings(pipe: object, size: dict[str, object]) -> generation.Settings:
    made = generation.Settings(**size)
    if generation.needs_image(pipe):
        return dataclasses.replace(made, image=generation.synthetic_image(size["width"], size["height"]))
    return dataclasses.replace(made, prompt=PROMPT)


def load(name: str, device: torch.device) -> object:
    if name == TINY.name:
        return generation.load(TINY)
    return models.load(name, device=device, dtype=None if device.type == "cuda" else torch.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Profile generations of the video models at their real sizes.")
    results.add_arguments(parser)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--preset", default=generation.UNTOUCHED, help="profile the pipeline patched (none)")
    parser.add_argument("--reports", type=Path, help="also write every form of each report into a folder of this one")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {name: size for name, size in CASES.items() if args.only in name}
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(CASES)}")
    failed = []
    for name, size in chosen.items():
        pipe = load(name, device)
        if args.preset != generation.UNTOUCHED:
            videoattn.enable_fast_attention(pipe, args.preset)
        arguments = generation.call_arguments(pipe, settings(pipe, size))
        made = recorder.record(pipe, arguments, commit=env["commit"])
        case = case_of(name, size, args.preset)
        print(f"{case}\n{made}", flush=True)
        _write(made, name if args.preset == generation.UNTOUCHED else f"{name}-{args.preset}", args)
        results.append_figures("profile", figures(case, made), env, args.results)
        failed += [f"{case}: {check.name}: {check.value}" for check in made.checks if not check.passed]
        del pipe
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(f"FAILED {line}" for line in failed))
    return 1 if failed else 0


def case_of(name: str, size: dict[str, object], preset: str = generation.UNTOUCHED) -> str:
    """As the other tables name it; the model that ships here has one size."""
    case = name if name == TINY.name else f"{name} {size['height']}x{size['width']}x{size['frames']}"
    return case if preset == generation.UNTOUCHED else f"{case} {preset}"


def figures(case: str, made: Profile) -> list[dict[str, object]]:
    """The rows of profile.csv."""
    found = (
        ("overhead", summary.overhead(made), "recorded/clean"),
        ("clean_ms", summary.clean_ms(made), "ms"),
        ("named_share", summary.named_share(made), "share"),
        ("labelled_share", summary.labelled_share(made), "share"),
        ("html_megabytes", len(html.render(made).encode()) / 1e6, "MB"),
    )
    return [{"case": case, "metric": metric, "value": value, "unit": unit} for metric, value, unit in found]


def _write(made: Profile, name: str, args: argparse.Namespace) -> None:
    """The JSON without pictures: random weights show nothing."""
    path = args.results / "profiles" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dataclasses.replace(made, frames=()).to_json() + "\n")
    if args.reports:
        folder.write(made, args.reports / name)


if __name__ == "__main__":
    raise SystemExit(main())
