"""The tables of slicing.md, from benchmarks/results; fill_tables.py puts them there."""

from collections.abc import Callable

from quantised_tables import newest, table

NAMES = {"animatediff": "AnimateDiff", "svd-xt": "SVD-XT", "wan-1.3b": "Wan 2.1 1.3B"}


def _name(case: str) -> str:
    model, size = case.split()
    return f"{NAMES[model]} {size}"


def _figures() -> dict[str, dict[str, dict[str, str]]]:
    """case -> metric -> row."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in newest("memory", "case", "metric"):
        found.setdefault(row["case"], {})[row["metric"]] = row
    return found


def generations() -> str:
    """Peaks of whole generations, weights included."""
    rows = []
    for case, of in _figures().items():
        value = {metric: float(row["value"]) for metric, row in of.items()}
        commit = of["peak plain"]["commit"][:7]
        sliced = value["peak sliced"]
        psnr = f"{value['psnr_db sliced']:.0f} dB"
        rows.append(
            [
                _name(case),
                f"{value['peak plain']:.1f}",
                "exact",
                f"{sliced:.1f}",
                f"{value['peak plain'] / sliced:.2f}x",
                psnr,
                commit,
            ]
        )
        if "peak sliced, lossy" in value:
            switch = of["peak_ratio"]["unit"].rpartition(", ")[2]
            lossy, psnr = value["peak sliced, lossy"], f"{value['psnr_db sliced, lossy']:.0f} dB"
            rows.append([_name(case), f"{value['peak plain']:.1f}", switch, f"{lossy:.1f}", f"{value['peak plain'] / lossy:.2f}x", psnr, commit])  # fmt: skip
    return table(["whole generation", "plain, GiB", "what", "sliced, GiB", "less", "PSNR to plain", "commit"], rows)


def parts() -> str:
    """What a call of a denoiser or of a decoder makes, and its time."""
    times = {(row["case"], row["baseline"]): row for row in newest("slicing_time", "case", "baseline")}
    rows = []
    for case, of in _figures().items():
        value = {metric: float(row["value"]) for metric, row in of.items()}
        switches = [value[metric] for metric in value if metric.startswith("activations forward chunking")]
        for part, plain, sliced, baseline in (
            ("denoiser", "activations plain", "activations sliced", "unsliced"),
            ("decoder", "decoder plain", "decoder sliced", "unsliced decoder"),
        ):
            time = times[case, baseline]
            switch = f"{min(switches):.2f}" if part == "denoiser" and switches else ""
            rows.append([
                f"{_name(case)}, {part}", f"{value[plain]:.2f}", switch, f"{value[sliced]:.2f}", f"{value[plain] / value[sliced]:.2f}x",
                f"{float(time['baseline_ms']):.0f}", f"{float(time['median_ms']):.0f}", f"{1 / float(time['ratio']):.3f}x",
                time["commit"][:7],
            ])  # fmt: skip
    head = [
        "call",
        "plain, GiB",
        "forward chunking, GiB",
        "sliced, GiB",
        "less",
        "unsliced, ms",
        "sliced, ms",
        "time",
        "commit",
    ]
    return table(head, rows)


def predictions() -> str:
    """Peaks of generations under a budget of all that a generation takes whole, and of six tenths of what it makes."""
    metrics = {(row["case"], row["metric"]): row for row in newest("memory", "case", "metric", "unit")}
    rows = []
    for case, of in _figures().items():
        for share in ("100%", "60%"):
            told, measured = (float(of[f"{name} at {share}"]["value"]) for name in ("predicted", "measured"))
            commit = metrics[case, "prediction_error"]["commit"][:7]
            rows.append(
                [
                    f"{_name(case)}, {share}",
                    f"{told:.2f}",
                    f"{measured:.2f}",
                    f"{abs(told - measured) / measured:.1%}",
                    commit,
                ]
            )
    return table(["budget", "foretold, GiB", "measured, GiB", "off by", "commit"], rows)


def tiling() -> str:
    """Trained VAEs: whole, in slices, in tiles."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in newest("tiling", "case", "metric"):
        found.setdefault(row["case"], {})[row["metric"]] = row
    rows = []
    for case, of in found.items():
        for metric, row in of.items():
            if not metric.startswith("peak "):
                continue
            what = metric.removeprefix("peak ")
            against = f"psnr {what} against {'drawn' if what == 'whole' else 'whole'}"
            psnr, worst = (f"{float(of[name]['value']):.1f}" for name in (against, f"worst {against}"))
            to = "the drawn clip" if what == "whole" else "whole"
            rows.append([case, what, f"{float(row['value']):.0f}", psnr, worst, to, row["commit"][:7]])
    return table(["VAE, size", "decoded", "peak, MiB", "PSNR, mean, dB", "worst", "to", "commit"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "generations": generations,
    "parts": parts,
    "predictions": predictions,
    "tiling": tiling,
}
