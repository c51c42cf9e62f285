"""The tables of sparse.md, from benchmarks/results; fill_tables.py puts them there."""

from collections.abc import Callable

from quantised_tables import newest, ratio, table

MEAN = "fast, mean of 50 steps"
DENSITIES = ("0.1", "0.2", "0.35", "0.6")
KERNELS = {"exact": "16 bits", "fp8": "INT8/FP8", "16bit": "INT8/16 bits"}
SHOWN = ("fast", "random, raster", "random, morton", "fewer steps", "noise floor")


def quality() -> str:
    """What the plot does not show by name: the preset, with its controls."""
    found: dict[str, dict[str, float]] = {}
    rows_of_all = newest("quality_sparse", "case", "metric", card="")
    latest = max(rows_of_all, key=lambda row: row["date"])["commit"]  # curves compare within a commit
    for row in (row for row in rows_of_all if row["commit"] == latest):
        found.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    rows = []
    for case in sorted((case for case in found if case.startswith(SHOWN)), key=_rank):
        of = found[case]
        density = f"{of['density']:.2f}" if "density" in of else ""
        over = f"{of['over_random_db']:+.1f}" if "over_random_db" in of else ""
        rows.append(
            [case, density, f"{of['psnr_mean_db']:.1f}", f"{of['psnr_worst_db']:.1f}", f"{of['ssim_mean']:.4f}", over]
        )
    head = ["run", "key blocks kept", "PSNR, mean, dB", "PSNR, worst, dB", "SSIM, mean", "over random blocks, dB"]
    return table(head, rows)


def _rank(case: str) -> tuple[int, str]:
    return next(place for place, name in enumerate(SHOWN) if case.startswith(name)), case


def forwards() -> str:
    means = {row["case"]: row for row in newest("forward", "case", kernel=MEAN, baseline="eager")}
    rows = []
    for row in newest("forward", "case", kernel="fast", baseline="eager"):
        times = [f"{float(row['baseline_ms']):.0f}", f"{float(row['median_ms']):.0f}"]
        mean = ratio(means[row["case"]]) if row["case"] in means else ""
        rows.append([row["case"], *times, ratio(row), mean, row["commit"][:7]])
    return table(["denoiser", "eager ms", "a sparse step ms", "ratio", "mean of 50 steps", "commit"], rows)


def kernels() -> str:
    found: dict[str, dict[str, float]] = {}
    for row in newest("sparse", "case", "metric"):
        found.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    rows = []
    for case, of in found.items():
        for name, label in KERNELS.items():
            if f"efficiency {name} 0.1" in of:
                rows.append([case, f"{label} along lists", *(f"{of[f'efficiency {name} {d}']:.2f}" for d in DENSITIES)])
    lines = [table(["call", "kernel, dense time x density / time", *(f"density {d}" for d in DENSITIES)], rows), ""]
    rows = []
    for case, of in found.items():
        for metric, value in of.items():
            if metric.startswith("selection ") and not metric.startswith("selection ms"):
                name = metric.removeprefix("selection ")
                rows.append(
                    [
                        case,
                        f"selection, {name}",
                        f"{100 * value:.1f} % of dense cuDNN",
                        f"{of[f'selection ms {name}']:.3f}",
                    ]
                )
            elif metric.startswith("attention "):
                *name, density = metric.removeprefix("attention ").split()
                rows.append([case, f"attention, {' '.join(name)} at {density}", f"{value:.2f}x of cuDNN", ""])
    lines.append(table(["call", "what", "", "ms"], rows))
    return "\n".join(lines)


def presets() -> str:
    rows = []
    for row in newest("sparse", "case", "metric", metric="fast/balanced"):
        rows.append([row["case"], row["unit"], f"{float(row['value']):.2f}x"])
    return table(["call", "what fast computes", "balanced/fast"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "forwards": forwards,
    "kernels": kernels,
    "presets": presets,
}
