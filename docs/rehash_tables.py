"""The tables of rehash.md, from benchmarks/results; fill_tables.py puts them there."""

from collections.abc import Callable

from quantised_tables import RESULTS, newest, ratio, table

NOT_YET = "Not measured yet."


def quality() -> str:
    """The best first, below each heading of a model, a size and how many steps run."""
    if not (RESULTS / "rehash_quality.csv").exists():
        return NOT_YET
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in newest("rehash_quality", "case", "metric"):
        setting, _, case = row["case"].rpartition(": ")
        found.setdefault(setting, {}).setdefault(case, {})[row["metric"]] = float(row["value"])
    rows = []
    for setting, cases in found.items():
        for case, of in sorted(cases.items(), key=lambda item: -item[1]["psnr_mean_db"]):
            over = f"{of['above_control_db']:+.1f}" if "above_control_db" in of else ""
            figures = [f"{of['psnr_mean_db']:.1f}", f"{of['psnr_worst_db']:.1f}", f"{of['ssim_mean']:.4f}"]
            rows.append([setting, case, f"{of['steps_run']:.0f}", *figures, over])
    head = [
        "model, size, steps",
        "mode, keys",
        "steps run",
        "PSNR, mean, dB",
        "worst",
        "SSIM, mean",
        "above the best control, dB",
    ]
    return table(head, rows)


def times() -> str:
    if not (RESULTS / "rehash.csv").exists():
        return NOT_YET
    rows = [
        [row["case"], row["shape"], row["gpu"], row["kernel"], f"{float(row['baseline_ms']) / 1e3:.1f}",
         f"{float(row['median_ms']) / 1e3:.1f}", ratio(row), row["commit"][:7]]
        for row in newest("rehash", "case", "kernel", "gpu", card="")
    ]  # fmt: skip
    return table(["case", "of", "card", "what", "every step, eager, s", "s", "ratio", "commit"], rows)


TABLES: dict[str, Callable[[], str]] = {"quality": quality, "times": times}
