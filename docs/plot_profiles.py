"""Draws the plots of where-the-time-goes.md from benchmarks/results/profiles/*.json. Needs matplotlib.

python docs/plot_profiles.py --out docs/plots
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from videoattn.profiling import summary
from videoattn.profiling.categories import label
from videoattn.profiling.profile import Profile

PROFILES = Path(__file__).parents[1] / "benchmarks" / "results" / "profiles"
MODELS = {"wan-1.3b": "Wan 2.1 1.3B", "svd-xt": "SVD-XT", "animatediff": "AnimateDiff", "modelscope": "ModelScope"}
# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = {
    "full": "#0072B2",
    "spatial": "#56B4E9",
    "temporal": "#D55E00",
    "cross": "#CC79A7",
    "convolution": "#009E73",
    "linear": "#E69F00",
    "normalisation": "#F0E442",
    "elementwise": "#999999",
    "layout": "#5E4FA2",
    "host": "#DDDDDD",
    "vae": "#333333",
    "rest": "#BBBBBB",
}
ATTENTION = ("full", "spatial", "temporal", "cross")
DENOISERS = ("transformer", "unet")


def denoiser_ms(profile: Profile) -> dict[str, float]:
    """Time in the denoiser by operator; what has no colour of its own is "rest"."""
    spent: dict[str, float] = {}
    for row in profile.rows:
        if row.stage in DENOISERS:
            name = row.operator if row.operator in COLOURS else "rest"
            spent[name] = spent.get(name, 0.0) + row.ms
    return spent


def stacked(axis: plt.Axes, names: Sequence[str], parts: Sequence[dict[str, float]]) -> None:
    """One bar a model, each part a share of its sum."""
    left = [0.0] * len(names)
    for operator, fill in COLOURS.items():
        widths = [part.get(operator, 0.0) / sum(part.values()) for part in parts]
        if not any(widths):
            continue
        axis.barh(names, widths, left=left, color=fill, label=label(operator), edgecolor="white", lw=0.5)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.045:
                dark = operator in ("full", "temporal", "layout", "vae", "convolution")
                colour = "white" if dark else "black"
                axis.text(start + width / 2, row, f"{width:.0%}", ha="center", va="center", fontsize=7, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xticks=[])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)


def plot_shares(profiles: dict[str, Profile], out: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 2.8), constrained_layout=True)
    stacked(axis, list(profiles), [denoiser_ms(profile) for profile in profiles.values()])
    axis.set_title("time of the denoiser, by operator", fontsize=9, loc="left")
    figure.savefig(out / "shares.png", dpi=130)


def plot_kinds(profiles: dict[str, Profile], out: Path) -> None:
    """Temporal beside spatial attention: shares of FLOPs and of time, and the time of a FLOP."""
    with_both = {name: p for name, p in profiles.items() if summary.temporal_per_flop(p) is not None}
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), constrained_layout=True)
    for axis, title, value in (
        (axes[0], "TFLOP of the run", lambda total: total.flops / 1e12),
        (axes[1], "ms of the run", lambda total: total.ms),
        (axes[2], "ms for a TFLOP", lambda total: total.ms_per_tflop),
    ):
        for offset, kind in enumerate(("spatial", "temporal")):
            totals = [{t.kind: t for t in summary.kinds(p)}[kind] for p in with_both.values()]
            places = [row + 0.38 * (offset - 0.5) for row in range(len(with_both))]
            bars = axis.bar(places, [value(t) for t in totals], 0.36, color=COLOURS[kind], label=label(kind))
            axis.bar_label(bars, fmt="%.3g", fontsize=7)
        axis.set_title(f"{title} (logarithmic)", fontsize=9, loc="left")
        axis.set_yscale("log")
        axis.margins(y=0.25)
        axis.set_xticks(range(len(with_both)), list(with_both), fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=2, fontsize=7, loc="outside lower center", frameon=False)
    figure.savefig(out / "temporal.png", dpi=130)


def plot_lengths(profiles: dict[str, Profile], out: Path) -> None:
    """The queries of each attention call of one step."""
    figure, axes = plt.subplots(1, len(profiles), figsize=(9, 2.6), sharey=True, constrained_layout=True)
    drawn = {}
    for axis, (name, profile) in zip(axes, profiles.items(), strict=True):
        calls = [call for call in profile.calls if call.step == 0 and call.branch == "0"]
        for kind in ATTENTION:
            points = [(index, call.q_len) for index, call in enumerate(calls) if call.kind == kind]
            if points:
                drawn[label(kind)] = axis.scatter(*zip(*points, strict=True), s=5, color=COLOURS[kind])
        axis.set_title(name, fontsize=9, loc="left")
        axis.set(yscale="log", xlabel="attention call of a step")
        axis.xaxis.label.set_fontsize(7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("queries", fontsize=7)
    figure.legend(drawn.values(), drawn, ncols=4, fontsize=7, loc="outside lower center", frameon=False, markerscale=2)
    figure.savefig(out / "lengths.png", dpi=130)


def plot_convolution(profiles: dict[str, Profile], out: Path) -> None:
    """Convolution in the denoiser and in the VAE, as shares of the time of each."""
    figure, axis = plt.subplots(figsize=(9, 2.4), constrained_layout=True)
    for offset, (stages, title) in enumerate(((DENOISERS, "denoiser"), (("vae.decode",), "VAE decode"))):
        shares = []
        for profile in profiles.values():
            rows = [row for row in profile.rows if row.stage in stages]
            convolution = sum(row.ms for row in rows if row.operator == "convolution")
            shares.append(convolution / sum(row.ms for row in rows))
        places = [row + 0.38 * (offset - 0.5) for row in range(len(profiles))]
        colour = COLOURS["convolution"] if offset == 0 else COLOURS["vae"]
        bars = axis.bar(places, shares, 0.36, color=colour, label=title)
        axis.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=7)
    axis.set_xticks(range(len(profiles)), list(profiles), fontsize=8)
    axis.set_title("share of convolution in the time of", fontsize=9, loc="left")
    axis.set(yticks=[], ylim=(0, 0.8))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(out / "convolution.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    profiles = {title: Profile.read(args.profiles / f"{name}.json") for name, title in MODELS.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for plot in (plot_shares, plot_kinds, plot_lengths, plot_convolution):
        plot(profiles, args.out)


if __name__ == "__main__":
    main()
