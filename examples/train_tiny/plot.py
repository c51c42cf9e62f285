"""Draws the loss curves of both trainings into one PNG. Needs matplotlib.

    python examples/train_tiny/plot.py --run runs/tiny --out examples/train_tiny/loss.png
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curves(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds and loss, size by size."""
    points = defaultdict(lambda: ([], []))
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            seconds, loss = points[row["size"]]
            seconds.append(float(row["seconds"]))
            loss.append(float(row["loss"]))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with vae.csv and denoiser.csv")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, name, title in zip(
        axes,
        ("vae", "denoiser"),
        ("VAE: weighted reconstruction loss", "denoiser: flow-matching loss"),
        strict=True,
    ):
        for size, (seconds, loss) in sorted(curves(args.run / f"{name}.csv").items()):
            axis.plot(seconds, loss, label=size, linewidth=1)
        axis.set(title=title, xlabel="seconds", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(title="frames x height x width", fontsize=8)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
