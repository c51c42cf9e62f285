"""The tables of rehash.md, from benchmarks/results; fill_tables.py puts them there."""

import re
from collections.abc import Callable

from quantised_tables import RESULTS, newest, ratio, table

NOT_YET = "Not measured yet."
FLOOR = "noise floor"  # of a model and a size: torch's other exact attention, every step


def quality() -> str:
    """A table for each setting, the best first: a model, its sampler and prompts, a size and how many steps run."""
    if not (RESULTS / "rehash_quality.csv").exists():
        return NOT_YET
    found: dict[str, dict[str, dict[str, float]]] = {}
    rows = [(*row["case"].rpartition(": ")[::2], row) for row in newest("rehash_quality", "case", "metric")]
    last: dict[str, tuple[str, str]] = {}
    for setting, _, row in rows:
        last[setting] = max(last.get(setting, ("", "")), (row["date"], row["commit"]))
    for setting, case, row in rows:
        if row["commit"] == last[setting][1]:  # not what an older benchmark alone has
            found.setdefault(setting, {}).setdefault(case, {})[row["metric"]] = float(row["value"])
    floors = {setting: found.pop(setting)[FLOOR] for setting in [*found] if FLOOR in found[setting]}
    head = ["mode, keys", "steps run", "PSNR, mean, dB", "worst", "SSIM, mean", "above the best control, dB"]
    tables = []
    in_order = sorted(found, key=lambda setting: setting.replace(" fold", ", fold").replace(" with", ", with"))
    for setting in in_order:
        cases = found[setting]
        floor = floors.get(setting.rpartition(", ")[0])
        run = float(setting.rpartition(", ")[2].split()[0])  # "13 of 25"
        rows = [
            _quality_row(case, of, run) for case, of in sorted(cases.items(), key=lambda item: -item[1]["psnr_mean_db"])
        ]
        rows += [_quality_row(FLOOR, floor, run)] if floor else []
        tables.append(f"**{_named(setting)}**\n\n{table(head, rows)}")
    return "\n\n".join(tables)


def _named(setting: str) -> str:
    return re.sub(r" fold \d+", ", other prompts and seeds", setting)


def _quality_row(case: str, of: dict[str, float], run: float) -> list[str]:
    """`run`: calls of the controls, beside which only as many stand."""
    over = f"{of['above_control_db']:+.1f}" if "above_control_db" in of and of["steps_run"] == run else ""
    figures = [f"{of['psnr_mean_db']:.1f}", f"{of['psnr_worst_db']:.1f}", f"{of['ssim_mean']:.4f}"]
    return [case, f"{of['steps_run']:.0f}", *figures, over]


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
