"""The tables of quantised.md, from benchmarks/results; fill_tables.py puts them there."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CARD = "NVIDIA H200"
PRECISIONS = {
    "int8_qk_fp8_pv": ("INT8", "e4m3", "8.9"),
    "int8_qk_16bit_pv": ("INT8", "as they come", "8.0"),
    "int8_qk_int8_pv": ("INT8", "INT8, by the greatest weight of each tile", "8.0"),
}
PASSES = {"prepare": "exact: norm, rotation, layout", "quantise": "INT8/FP8: these, smoothing, quantisation"}

Row = dict[str, str]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def newest(name: str, *identity: str, card: str = CARD, **where: str) -> list[Row]:
    """The newest row of each identity in a CSV file, of a card ("": any), in the order in which they first came."""
    found: dict[tuple[str, ...], Row] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if card in ("", row["gpu"]) and all(row[column] == value for column, value in where.items()):
                found[tuple(row[column] for column in identity)] = row
    return list(found.values())


def ratio(row: Row) -> str:
    return f"{float(row['ratio']):.2f}x [{float(row['ci_lo']):.2f}, {float(row['ci_hi']):.2f}]"


def precisions() -> str:
    errors: dict[str, float] = {}
    for row in newest("quantised", "case", "kernel", "baseline"):
        errors[row["kernel"]] = max(errors.get(row["kernel"], 0.0), float(row["rel_l2"]))
    rows = [
        [f"`{name}`", qk, pv, f"{errors[name]:.4f}", capability] for name, (qk, pv, capability) in PRECISIONS.items()
    ]
    exact = max(float(row["rel_l2"]) for row in newest("dense", "case", "shape", dtype="bfloat16"))
    rows.append(["exact", "16 bits", "16 bits", f"{exact:.4f}", "any"])
    return table(["precision", "q k^T", "weights and v", "error on normal inputs", "compute capability"], rows)


def hard_inputs() -> str:
    found: dict[str, dict[str, str]] = {}
    for row in newest("quantised_error", "case", "metric"):
        found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    rows = []
    for case, of in found.items():
        if "error_ratio" not in of:
            continue
        least = [
            min(float(value) for metric, value in of.items() if metric.startswith(f"rel_l2 {name} "))
            for name in PRECISIONS
        ]
        sage = float(of["rel_l2 sage2 emulated"])
        rows.append([case, f"{sage:.4f}", *(f"{value:.4f}" for value in least)])
    return table(["inputs", "SageAttention 2, emulated", *(f"`{name}`" for name in PRECISIONS)], rows)


def int4() -> str:
    found = {row["case"]: float(row["value"]) for row in newest("quantised_error", "case", card="", metric="cosine")}
    paper = {"none": "80.04 %", "k": "98.07 %", "q": "98.30 %", "both": "99.46 %"}
    rows = []
    for name, published in paper.items():
        case = f"int4 {name} smoothing{'s' if name == 'both' else ''}"
        shown = f"{100 * found[case]:.2f} %"
        rows.append([{"none": "nothing", "both": "q and k"}.get(name, name), shown, published])
    return table(["smoothed", "here", "the paper, on CogVideoX"], rows)


def times() -> str:
    rows = newest("quantised", "case", "kernel", "baseline", baseline="sdpa_cudnn")
    sage = {row["case"]: row for row in newest("quantised", "case", "kernel", "baseline", baseline="sageattention")}
    lines = []
    for row in rows:
        if row["kernel"] not in PRECISIONS or row["case"].startswith("chosen"):
            continue
        against = sage.get(row["case"]) if row["kernel"] == "int8_qk_fp8_pv" else None
        lines.append(
            [row["case"], row["shape"], f"`{row['kernel']}`", f"{float(row['median_ms']):.2f}"]
            + [f"{float(row['tflops']):.0f}", ratio(row), "" if against is None else f"{float(against['ratio']):.2f}x"]
        )
    head = [
        "call",
        "B x H x Nq x Nk x D",
        "precision",
        "ms",
        "TFLOP/s",
        "cuDNN's time over ours",
        "SageAttention 1.0.6's",
    ]
    return table(head, lines)


def passes() -> str:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in newest("prologue", "case", "kernel", "baseline"):
        found.setdefault((row["case"], row["kernel"]), {})[row["baseline"]] = row
    rows = []
    for (case, kernel), of in found.items():
        eager, copy = of["eager"], of["copy"]
        rows.append(
            [case, PASSES[kernel], f"{float(eager['baseline_ms']):.2f}", f"{float(eager['median_ms']):.3f}"]
            + [ratio(eager), f"{float(copy['ratio']):.0%}"]
        )
    return table(["model", "pass", "eager ms", "ms", "ratio", "of the copy bandwidth"], rows)


def forwards() -> str:
    rows = []
    for row in newest("forward", "case", "kernel", "baseline"):
        if row["kernel"] == "balanced" or (row["kernel"] == "exact" and row["case"].startswith("wan")):
            rows.append(
                [row["case"], row["kernel"], row["baseline"], f"{float(row['baseline_ms']):.0f}"]
                + [f"{float(row['median_ms']):.0f}", ratio(row), row["commit"][:7]]
            )
    rows.sort(key=lambda line: line[:3])
    return table(["denoiser", "preset", "against", "its ms", "ms", "ratio", "commit"], rows)


def quality() -> str:
    found: dict[str, dict[str, str]] = {}
    for row in newest("quality", "case", "metric"):
        found.setdefault(row["case"].removeprefix("tiny-wan "), {})[row["metric"]] = row["value"]
    runs = {
        "balanced": "INT8/FP8 on every self-attention call",
        "balanced dispatched": "what balanced itself chooses",
        "noise floor": "noise floor: another exact kernel of torch",
        "one step fewer": "control: exact, one step of 25 fewer",
    }
    rows = []
    for case, what in runs.items():
        mean, worst = (f"{float(found[case][f'psnr_{which}_db']):.1f}" for which in ("mean", "worst"))
        prompts = found[case].get("prompts_followed", "")
        rows.append([what, mean, worst, prompts and f"{prompts} of 64"])
    rows.append(["exact attention itself", "", "", f"{found['exact']['prompts_followed']} of 64"])
    return table(["run", "PSNR, mean, dB", "PSNR, worst, dB", "prompts followed"], rows)


def tuned() -> str:
    written = tomllib.loads((RESULTS / "tuned" / "tiny-wan.toml").read_text())
    columns = ("int4_qk_fp8_pv", "int8_qk_fp8_pv", "int8_qk_16bit_pv", "exact")
    rows = [
        [f"`{error['site']}`", str(error["part"] + 1), *(f"{error[name]['cosine']:.5f}" for name in columns)]
        + [f"`{written['sites'][error['site']][error['part']]}`"]
        for error in written["errors"]
    ]
    return table(["layer", "third of the steps", *(f"`{name}`" for name in columns), "chosen"], rows)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (precisions, hard_inputs, int4, times, passes, forwards, quality, tuned)
}
