"""Draws the loss curves of both trainings into one PNG. Needs matplotlib.

    python examples/train_tiny/plot.py --vae LOGS/vae.csv --denoiser LOGS/denoiser_1.csv LOGS/denoiser_2.csv --out loss.png

Runs that went on from each other's weights stand one behind the other, a dotted line between them.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def rows(log: Path) -> list[dict[str, str]]:
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(size: str) -> int:
    """How many a size has: the legend goes from the smallest to the largest."""
    frames, height, width = map(int, size.split("x"))
    return frames * height * width


def draw(axis: plt.Axes, title: str, logs: list[Path]) -> None:
    """Loss over seconds, one line a size and run."""
    runs = [rows(log) for log in logs]
    sizes = sorted({row["size"] for run in runs for row in run}, key=pixels)
    colours = {size: f"C{index}" for index, size in enumerate(sizes)}
    start = 0.0
    for run in runs:
        points = defaultdict(list)
        for row in run:
            points[row["size"]].append((start + float(row["seconds"]), float(row["loss"])))
        for size, line in points.items():
            axis.plot(*zip(*line, strict=True), color=colours[size], linewidth=1)
        start += float(run[-1]["seconds"])
        if run is not runs[-1]:
            axis.axvline(start, color="gray", linestyle=":", linewidth=1)
    for size, colour in colours.items():
        axis.plot([], [], color=colour, label=size)
    axis.set(title=title, xlabel="seconds of training", yscale="log")
    axis.grid(which="both", alpha=0.2)
    axis.legend(title="frames x height x width", fontsize=8, title_fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, nargs="+", required=True, help="logs of train_vae.py, in their order")
    parser.add_argument("--denoiser", type=Path, nargs="+", required=True, help="logs of train_denoiser.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    draw(axes[0], "VAE: weighted reconstruction loss", args.vae)
    draw(axes[1], "denoiser: flow-matching loss", args.denoiser)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
