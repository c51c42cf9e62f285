"""Draws quality by density of every selector from benchmarks/results/quality_sparse.csv. Needs matplotlib.

python docs/plot_quality.py --out docs/plots
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from videoattn.benchmarks import results
from videoattn.policy import PRESETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BAR = 27.0  # dB
METRICS = {"psnr_mean_db": "PSNR, mean, dB", "ssim_mean": "SSIM, mean"}
FEWER_STEPS = "fewer steps"
REMAINDER, NO_REMAINDER = ", remainder", ", no remainder"
STARS = {"fast": "full", "fast in 16 bits": "none"}  # the preset, and how its star is filled
# Okabe and Ito's colours, which colour-blind readers tell apart; of one colour what shares a selector
COLOURS = {
    "pooled": "#0072B2",
    "xattention": "#D55E00",
    "sliding tiles": "#009E73",
    "radial": "#CC79A7",
    "bands": "#E69F00",
    "sharded": "#56B4E9",
    "random": "#999999",
    "fast": "#000000",
}
MARKERS = ("o", "s", "^", "D", "v", "P")  # of the curves of one colour, in turn
TICK, NOTE, TITLE = 7, 6, 9  # points

Points = dict[str, dict[str, float]]
"""Case -> metric -> value."""


def points(path: Path, card: str | None = None) -> Points:
    """The figures of the newest commit on one card, the last measured where None.

    Raises:
        ValueError: none of that card.
    """
    rows = results.read(path)
    card = card or (rows[-1]["gpu"] if rows else None)
    rows_of_card = [row for row in rows if row["gpu"] == card]
    found: Points = {}
    for row in rows_of_card:
        if row["commit"] == rows_of_card[-1]["commit"]:
            found.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    if not found:
        raise ValueError(f"{path}: wanted figures of {card or 'any card'}, got {sorted({row['gpu'] for row in rows})}")
    return found


def curves(found: Points, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Curve -> (density, value) in the order of density; of cases that have both."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for case, of in found.items():
        if "density" in of and metric in of:
            lines.setdefault(case.partition(": ")[0], []).append((of["density"], of[metric]))
    return {curve: sorted(line) for curve, line in lines.items()}


def controls(found: Points, metric: str) -> dict[float, float]:
    """The dense runs of fewer steps: time, as a share of all steps -> value."""
    return {of["time"]: of[metric] for case, of in found.items() if case.startswith(FEWER_STEPS) and metric in of}


def selector_of(curve: str) -> str:
    """Whose colour a curve has.

    Raises:
        ValueError: nobody's.
    """
    named = [selector for selector in COLOURS if curve.startswith(selector)]
    if not named:
        raise ValueError(f"curve: wanted one of {', '.join(COLOURS)}, got {curve!r}")
    return named[0]


def has_remainder(curve: str) -> bool:
    """What a name does not say of "fast", the preset does."""
    if curve.startswith("fast"):
        return NO_REMAINDER not in curve and (PRESETS["fast"].decision.remainder or REMAINDER in curve)
    return REMAINDER in curve


def draw(axis: Axes, found: Points, metric: str, *, remainder: bool) -> None:
    """The curves that have the remainder, or the others, and the controls of both."""
    drawn: dict[str, int] = {}
    for curve, line in curves(found, metric).items():
        if has_remainder(curve) != remainder:
            continue
        selector = selector_of(curve)
        marker = MARKERS[drawn.get(selector, 0) % len(MARKERS)]
        drawn[selector] = drawn.get(selector, 0) + 1
        style = {
            "color": COLOURS[selector],
            "marker": marker,
            "ms": 3.5,
            "lw": 1.2,
            "label": curve.replace(REMAINDER, ""),
        }
        if curve in STARS:
            style |= {"marker": "*", "ms": 10, "fillstyle": STARS[curve]}
        axis.plot(*zip(*line, strict=True), **style)
    for time, value in controls(found, metric).items():
        axis.axhline(value, color="#BBBBBB", lw=0.8, ls=":", zorder=0)
        note = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "fontsize": NOTE}
        axis.annotate(f"{time:.0%} of the steps", (1, value), (3, 0), annotation_clip=False, **note)
    if metric == "psnr_mean_db":
        axis.axhline(BAR, color="#333333", lw=1.0, ls="-.", zorder=0)
        axis.annotate(
            f"{BAR:.0f} dB",
            (0, BAR),
            (3, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=NOTE,
        )
    title = f"{METRICS[metric]}; with the pooled remainder" if remainder else METRICS[metric]
    axis.set_title(title, fontsize=TITLE, loc="left")
    axis.set_xlabel("density: share of the key blocks that are kept", fontsize=TICK)
    axis.tick_params(labelsize=TICK)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def heading(dense: Mapping[str, float]) -> str:
    """What the dense run was."""
    return (
        f"tiny-wan, {dense['tokens']:,.0f} tokens, {dense['prompts']:.0f} prompts, {dense['steps']:.0f} steps, the first "
        f"{dense['dense_steps']:.0%} dense; against the same seeds in dense attention"
    )


def plot(found: Points, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(METRICS), 2, figsize=(11, 9), sharex=True, sharey="row", squeeze=False, constrained_layout=True
    )
    for row, metric in zip(axes, METRICS, strict=True):
        for axis, remainder in zip(row, (False, True), strict=True):
            draw(axis, found, metric, remainder=remainder)
    figure.suptitle(heading(found["dense"]), fontsize=TITLE)
    handles = (dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)) for axis in axes[0])
    labels = {label: handle for of in handles for label, handle in of.items()}
    legend = labels.values(), labels.keys()
    figure.legend(*legend, ncols=5, fontsize=TICK, loc="outside lower center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality_sparse.csv")
    parser.add_argument("--card", help="as the column gpu has it; default: that of the last row")
    parser.add_argument("--out", type=Path, required=True, help="folder of quality_sparse.png")
    args = parser.parse_args(argv)
    plot(points(args.results, args.card), args.out / "quality_sparse.png")


if __name__ == "__main__":
    main()
