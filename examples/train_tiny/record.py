"""Appends the figures of a tiny model to benchmarks/results/tiny_models.csv.

    python examples/train_tiny/record.py                                        # what needs no sampling, on any machine
    python examples/train_tiny/record.py --demo DEMO.json --largest LARGEST.json     # what evaluate.py wrote

The second form belongs on the machine that sampled: its name, driver and versions stand in every row.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from data import Size, layouts
from diffusers import AutoModel
from evaluate import ATTRIBUTES, SIZES, score, vae_psnr
from render import render
from scenes import Scene, held_out_scenes

from videoattn.benchmarks import results

MODEL = Path(__file__).parent.parent / "models" / "tiny-wan"


def sizes(model: Path) -> dict[str, Size]:
    """What it is judged at: "demo" and "largest"."""
    return SIZES[json.loads((model / "model_index.json").read_text())["_class_name"]]


def drawn(scene: Scene, size: Size, seed: int) -> np.ndarray:
    """One rendered clip, [T, H, W, 3] in 0..1."""
    video, _ = render(*layouts([scene], np.random.default_rng(seed), size), size.frames, size.height, size.width)
    return ((video[0] + 1) / 2).permute(1, 2, 3, 0).numpy()


def checker_rows(model: Path, count: int) -> list[dict[str, object]]:
    """How often the checker reads rendered held-out clips right, and how often by chance: against another clip's caption."""
    case = "checker" if model.name == MODEL.name else f"checker {model.name}"
    rows, scenes = [], held_out_scenes(count)
    shuffled = random.Random(0).sample(scenes, count)
    everything = []
    for name, size in sizes(model).items():
        right, chance = [], dict.fromkeys(ATTRIBUTES, 0.0)
        for seed, (scene, other) in enumerate(zip(scenes, shuffled, strict=True)):
            clip = [drawn(scene, size, seed)]
            right.append(all(score([scene], clip).values()))
            for attribute, hit in score([other], clip).items():
                chance[attribute] += hit / count
        everything += right
        rows.append(row(f"{case} {name}", "rendered_truth", float(np.mean(right)), "share"))
        rows += [row(f"{case} {name}", f"shuffled_{attribute}", rate, "share") for attribute, rate in chance.items()]
    return [row(case, "rendered_truth", float(np.mean(everything)), "share"), *rows]


def vae_rows(model: Path, clips: dict[str, int]) -> list[dict[str, object]]:
    """PSNR in dB over held-out clips, by size; the lowest of them stands for the model."""
    vae = AutoModel.from_pretrained(str(model), subfolder="vae", dtype=torch.float32)
    figures = {name: vae_psnr(vae, held_out_scenes(clips[name], seed=1), size) for name, size in sizes(model).items()}
    rows = [row(model.name, "vae_psnr_db", min(figure["psnr"] for figure in figures.values()), "dB")]
    for name, figure in figures.items():
        rows.append(row(f"{model.name} {name}", "vae_psnr_db", figure["psnr"], "dB"))
        rows.append(row(f"{model.name} {name}", "vae_psnr_worst_db", figure["worst"], "dB"))
    return rows


def model_rows(model: Path) -> list[dict[str, object]]:
    """Its size on the disk, and the most tokens that tiny-wan was trained at."""
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    rows = [row(model.name, "megabytes", size / 1e6, "MB")]
    if model.name == MODEL.name:
        rows.append(row(model.name, "largest_video_tokens", sizes(model)["largest"].tokens, "tokens"))
    return rows


def evaluation_rows(model: Path, name: str, file: Path) -> list[dict[str, object]]:
    """What evaluate.py wrote, if it was the size that `name` stands for."""
    figures = json.loads(file.read_text())
    if figures["size"] != str(sizes(model)[name]):
        raise ValueError(f"{file}: wanted an evaluation at {sizes(model)[name]}, got one at {figures['size']}")
    rows = [row(f"{model.name} {name}", attribute, figures[attribute], "share") for attribute in ATTRIBUTES]
    return [*rows, row(f"{model.name} {name}", "prompts", figures["prompts"], "prompts")]


def row(case: str, metric: str, value: float, unit: str) -> dict[str, object]:
    return {"case": case, "metric": metric, "value": value, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    for name in ("demo", "largest"):
        parser.add_argument(f"--{name}", type=Path, help=f"JSON of evaluate.py at the {name} size")
    parser.add_argument("--checked", type=int, default=128, help="clips of each size that the checker reads")
    parser.add_argument(
        "--vae-clips", type=int, nargs=2, default=(16, 16), help="how many at the demo's size, the largest"
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="the commit that is measured; default: ask git")
    args = parser.parse_args()

    files = {name: file for name, file in (("demo", args.demo), ("largest", args.largest)) if file is not None}
    if files:
        rows = [made for name, file in files.items() for made in evaluation_rows(args.model, name, file)]
    else:
        rows = model_rows(args.model) + checker_rows(args.model, args.checked)
        rows += vae_rows(args.model, dict(zip(sizes(args.model), args.vae_clips, strict=True)))
    path = results.append_figures("tiny_models", rows, results.environment(args.commit), args.results)
    for made in rows:
        print(f"{made['case']:18s} {made['metric']:22s} {made['value']:.5g} {made['unit']}")
    print(f"{len(rows)} rows appended to {path}")


if __name__ == "__main__":
    main()
