"""What a VAE's own tiling saves and costs on trained weights, beside exact slices: `vae_tiling` of `enable_feature_slicing`.

Clips of held-out scenes are drawn and encoded whole. Each decoding of the same latents is held against the whole one: PSNR of
frames in 0..1, and what a call makes at its peak (`torch.cuda.max_memory_allocated`; on a CPU, of what torch's operators make).
How near the whole decoding is to the drawn clip stands beside it. Pictures are larger than the tiles, which VAEs choose.

Needs a checkout: scenes and what draws them are examples/train_tiny's.

    python -m videoattn.benchmarks.tiling
    python -m videoattn.benchmarks.tiling --sheet outputs/tiling      # the frame that changes most: whole, in tiles, difference
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from videoattn.benchmarks import results
from videoattn.benchmarks.memory import Figure, figure, peak
from videoattn.benchmarks.quality_tiny import EXAMPLES
from videoattn.slicing.session import Slicing

SIZES = {"tiny-wan": (33, 352, 352), "tiny-animatediff": (16, 384, 384)}  # frames, height, width
SLICES = 8
RUNS = {"whole": {}, f"{SLICES} slices": {"slices": SLICES}, "tiles": {"slices": 1, "tiling": True}}


def psnr(a: Tensor, b: Tensor) -> float:
    """Of videos in -1..1, dB for frames in 0..1."""
    error = (a.float() - b.float()).square().mean().item() / 4
    return -10 * float(np.log10(max(error, 1e-15)))


@torch.no_grad()
def measure(model: str, scenes: int, device: torch.device, sheet: Path | None) -> list[Figure]:
    """Figures of one trained VAE: the mean over clips, and the worst."""
    from data import Size, layouts
    from diffusers import AutoencoderKL, AutoencoderKLWan
    from render import render
    from scenes import held_out_scenes

    kind = AutoencoderKLWan if model == "tiny-wan" else AutoencoderKL
    vae = kind.from_pretrained(EXAMPLES / "models" / model / "vae").to(device).eval()
    frames, height, width = SIZES[model]
    size = Size(frames=frames, height=height, width=width)
    case = f"{model} {size}"
    points: dict[str, list[float]] = defaultdict(list)
    most = dict.fromkeys(RUNS, 0)
    rng = np.random.default_rng(0)
    shown: tuple[float, Tensor, Tensor] | None = None
    for scene in held_out_scenes(scenes):
        drawn, _ = render(*layouts([scene], rng, size, device), size.frames, size.height, size.width)
        x = drawn if kind is AutoencoderKLWan else drawn.transpose(1, 2).flatten(0, 1)
        latents = vae.encode(x).latent_dist.mode()
        videos = {}
        for name, options in RUNS.items():
            decode = _decoding(vae, latents, options)
            most[name] = max(most[name], peak(decode, device))
            videos[name] = decode().clamp(-1, 1)
            against = ("drawn", x) if name == "whole" else ("whole", videos["whole"])
            points[f"{name} against {against[0]}"].append(psnr(videos[name], against[1]))
        if shown is None or points["tiles against whole"][-1] < shown[0]:
            shown = points["tiles against whole"][-1], videos["whole"], videos["tiles"]
    if sheet is not None:
        _draw(sheet / f"{model}.png", *shown[1:])
    figures = [figure(case, f"peak {name}", size / 2**20, "MiB") for name, size in most.items()]
    for what, found in points.items():
        figures.append(figure(case, f"psnr {what}", float(np.mean(found)), "dB"))
        figures.append(figure(case, f"worst psnr {what}", min(found), "dB"))
    return figures


def _decoding(vae: torch.nn.Module, latents: Tensor, options: dict[str, object]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        slicing = Slicing(vae, "decode", **options) if options else None
        if slicing is not None:
            slicing.attach()
        try:
            return vae.decode(latents).sample
        finally:
            if slicing is not None:
                slicing.detach()

    return call


def _draw(path: Path, whole: Tensor, tiled: Tensor) -> None:
    """The frame that changes most, in tiles, and ten times their difference."""
    from PIL import Image

    frames = [x[0].transpose(0, 1) if x.ndim == 5 else x for x in (whole, tiled)]
    difference = (frames[1] - frames[0]).abs()
    index = int(difference.flatten(1).mean(1).argmax())
    pictures = (frames[0][index] / 2 + 0.5, frames[1][index] / 2 + 0.5, (5 * difference[index]).clamp(max=1))
    row = torch.cat([picture.float() for picture in pictures], dim=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * row).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--only", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="a folder for pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    for model in args.only:
        figures = measure(model, args.scenes, torch.device(args.device), args.sheet)
        results.append_figures("tiling", figures, env, args.results)
        for each in figures:
            print(f"{each['case']:32s} {each['metric']:36s} {each['value']:.4g} {each['unit']}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
