"""Samples held-out prompts with a model's stock pipeline and counts how many clips show what the prompt says.

    python examples/train_tiny/evaluate.py --model examples/models/tiny-wan --out outputs/evaluation

Writes figures as JSON and a contact sheet as PNG.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import tiny_animatediff
import torch
from checker import read
from data import DEMO, LARGEST, Size, layouts
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from render import render
from scenes import Scene, held_out_scenes

SIZES = {  # that a model is judged at, by its pipeline
    "WanPipeline": {"demo": DEMO, "largest": LARGEST},
    "AnimateDiffPipeline": {"demo": tiny_animatediff.DEMO, "largest": tiny_animatediff.LARGEST},
}
STEPS = 25
GUIDANCE = 3.0
ATTRIBUTES = ("colour", "shape", "direction")


def reconstruct(vae: AutoencoderKLWan | AutoencoderKL, video: torch.Tensor) -> torch.Tensor:
    """video [B, 3, T, H, W] in -1..1, and what the VAE keeps of it; an image VAE takes each frame by itself."""
    if not isinstance(vae, AutoencoderKL):
        return vae.decode(vae.encode(video).latent_dist.mode()).sample
    images = video.transpose(1, 2).flatten(0, 1)
    images = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return images.unflatten(0, (len(video), -1)).transpose(1, 2)


@torch.no_grad()
def vae_psnr(vae: AutoencoderKLWan | AutoencoderKL, scenes: list[Scene], size: Size, seed: int = 0) -> dict[str, float]:
    """PSNR in dB of `vae.decode(vae.encode(clip))` on drawn clips, frames in 0..1: over all clips, and of the worst clip."""
    rng, errors = np.random.default_rng(seed), []
    for scene in scenes:
        things, background = layouts([scene], rng, size, vae.device)
        video, _ = render(things, background, size.frames, size.height, size.width)
        video = video.to(vae.dtype)
        errors.append((reconstruct(vae, video).float() - video.float()).square().mean().item() / 4)
    return {"psnr": -10 * float(np.log10(np.mean(errors))), "worst": -10 * float(np.log10(np.max(errors)))}


def generate(
    pipe: DiffusionPipeline, prompts: list[str], size: Size, *, steps: int, guidance: float, batch: int, seed: int = 0
) -> np.ndarray:
    """One clip a prompt, each from its own seed: [prompts, T, H, W, 3] in 0..1."""
    clips = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        clips.append(
            pipe(
                chunk,
                height=size.height,
                width=size.width,
                num_frames=size.frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            ).frames
        )
    return np.concatenate(clips)


def score(scenes: list[Scene], clips: np.ndarray) -> dict[str, float]:
    """Part of the clips in which the checker reads what the scene's one thing is, attribute by attribute."""
    hits = {attribute: [] for attribute in ATTRIBUTES}
    for scene, clip in zip(scenes, clips, strict=True):
        reading = read(clip)
        for attribute in ATTRIBUTES:
            hits[attribute].append(getattr(reading, attribute) == getattr(scene.things[0], attribute))
    return {attribute: float(np.mean(hit)) for attribute, hit in hits.items()}


def contact_sheet(
    prompts: list[str], clips: np.ndarray, frames: int = 5, tile: int = 128, columns: int = 2
) -> Image.Image:
    """Every prompt above `frames` evenly spaced frames of its clip, the prompts in `columns` columns."""
    gap, line = 4, 18
    tile_height = round(tile * clips.shape[2] / clips.shape[3])
    width, height = frames * (tile + gap) + 2 * gap, line + tile_height + 2 * gap
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        left, top = index // rows * width + gap, index % rows * height + gap
        draw.text((left, top), prompt, fill="black", font=font)
        for position, frame in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
            picture = Image.fromarray((clip[frame] * 255).round().astype(np.uint8))
            picture = picture.resize((tile, tile_height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + position * (tile + gap), top + line))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "models" / "tiny-wan")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without their suffix")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--frames", type=int, help="default: that of the model's demo")
    parser.add_argument("--height", type=int, help="default: that of the model's demo")
    parser.add_argument("--width", type=int, help="default: that of the model's demo")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--shift", type=float, help="of a flow-matching scheduler, in place of the shipped one")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--on-sheet", type=int, default=12, help="prompts shown on the contact sheet")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(str(args.model), dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.to("cuda" if on_gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        pipe.scheduler.set_shift(args.shift)
    demo = SIZES[type(pipe).__name__]["demo"]
    size = Size(frames=args.frames or demo.frames, height=args.height or demo.height, width=args.width or demo.width)
    scenes = held_out_scenes(args.prompts)
    prompts = [scene.caption() for scene in scenes]
    start = time.perf_counter()
    clips = generate(pipe, prompts, size, steps=args.steps, guidance=args.guidance, batch=args.batch)
    seconds = time.perf_counter() - start
    figures = {
        "size": str(size),
        "prompts": len(prompts),
        "steps": args.steps,
        "guidance": args.guidance,
        "shift": getattr(pipe.scheduler, "shift", None),
        "seconds": round(seconds, 1),
        **score(scenes, clips),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    shown = args.on_sheet
    contact_sheet(prompts[:shown], clips[:shown]).save(args.out.with_suffix(".png"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
