"""Fills the tables of documents from benchmarks/results: what stands between `<!-- NAME -->` and `<!-- /NAME -->`.

python docs/fill_tables.py            # --check: changes nothing, fails where the document is behind its results
"""

import argparse
import csv
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import quantised_tables
import rehash_tables
import slicing_tables
import sparse_tables

from videoattn.profiling import summary
from videoattn.profiling.categories import label
from videoattn.profiling.io_model import padding_waste
from videoattn.profiling.profile import Profile, Row

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HERE = Path(__file__).parent
MODELS = {"wan-1.3b": "Wan 2.1 1.3B", "svd-xt": "SVD-XT", "animatediff": "AnimateDiff", "modelscope": "ModelScope"}
USUAL_STEPS = {"wan-1.3b": 50, "svd-xt": 25, "animatediff": 50, "modelscope": 50}  # the pipelines' defaults
DENOISERS = ("transformer", "unet")
EACH_STEP = (*DENOISERS, "scheduler")
MODULATED = 13  # tensors that a block of Wan must move there: norm 2, gate and norm 4, sum and norm 4, gate 3
OPERATORS = ("convolution", "linear", "normalisation", "elementwise", "layout", "host")

Profiles = dict[str, Profile]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ms(rows: Sequence[Row], stages: Sequence[str] = (), operators: Sequence[str] = ()) -> float:
    """Time of the rows of some stages and operators; of all where none are named."""
    return sum(r.ms for r in rows if (not stages or r.stage in stages) and (not operators or r.operator in operators))


def usual(name: str, profile: Profile) -> tuple[float, float]:
    """Time of the denoiser and of the whole run with the usual number of steps, from that of a step: (ms, ms)."""
    times = USUAL_STEPS[name] / profile.arguments["num_inference_steps"]
    denoiser, rest = ms(profile.rows, DENOISERS), ms(profile.rows) - ms(profile.rows, EACH_STEP)
    return denoiser * times, ms(profile.rows, EACH_STEP) * times + rest


def runs(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        made = p.arguments
        size = f"{made['height']}x{made['width']}x{made['num_frames']}"
        environment = p.environment
        software = f"torch {environment['torch']}, diffusers {environment['diffusers']}"
        rows.append(
            [MODELS[name], size, str(made["num_inference_steps"]), f"{summary.clean_ms(p):,.0f}"]
            + [f"{summary.overhead(p):.2f}x", p.device, environment["commit"][:7], software]
        )
    return table(["model", "size", "steps", "clean ms", "recorded/clean", "card", "commit", "with"], rows)


def attention(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        spent = ms(p.rows, DENOISERS, summary.ATTENTIONS)
        denoiser, whole = ms(p.rows, DENOISERS), ms(p.rows)
        usual_denoiser, usual_whole = usual(name, p)
        usual_spent = spent / denoiser * usual_denoiser
        rows.append(
            [MODELS[name], f"{denoiser / whole:.0%}", f"{spent / denoiser:.1%}", f"{spent / whole:.1%}"]
            + [f"{denoiser / (denoiser - spent):.2f}x", f"{whole / (whole - spent):.2f}x", str(USUAL_STEPS[name])]
            + [f"{usual_spent / usual_whole:.1%}", f"{usual_whole / (usual_whole - usual_spent):.2f}x"]
        )
    head = ["model", "denoiser of the run", "attention of the denoiser", "attention of the run"]
    head += ["denoiser without attention", "run without attention", "usual steps", "attention then", "without it then"]
    return table(head, rows)


def temporal(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        kinds = {total.kind: total for total in summary.kinds(p)}
        if not {"temporal", "spatial"} <= kinds.keys():
            continue
        here, there, bandwidth = kinds["temporal"], kinds["spatial"], p.ceilings.copy_bandwidth
        rows.append(
            [MODELS[name], f"{there.ms:.1f}", f"{here.ms:.1f}", f"{here.ms / there.ms:.2f}x"]
            + [f"{there.flops / here.flops:.0f}x", f"**{summary.temporal_per_flop(p):.0f}x**"]
            + [f"{here.ms / sum(total.ms for total in kinds.values()):.0%}"]
            + [f"{here.flops / here.ms / 1e9:.1f}", f"{there.flops / there.ms / 1e9:.0f}"]
            + [f"{here.bytes / here.ms * 1e3 / bandwidth:.0%}", f"{here.layout_bytes / 1e9:.1f}"]
        )
    head = ["model", "spatial ms", "temporal ms", "time", "fewer FLOPs", "per FLOP", "temporal of all attention"]
    head += ["TFLOP/s temporal", "spatial", "temporal: share of the copy bandwidth", "copies around it, GB"]
    return table(head, rows)


def padding(_: Profiles) -> str:
    """Of the scores that a tile computes, by `io_model.padding_waste`."""
    rows = [
        [str(frames), *(f"{padding_waste(frames, frames, *tile):.1%}" for tile in ((128, 128), (64, 64), (32, 32)))]
        for frames in (16, 25)
    ]
    return table(["frames", "tile 128x128", "64x64", "32x32"], rows)


def lengths(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        for total in summary.kinds(p):
            lens = total.q_lens
            rows.append(
                [MODELS[name], label(total.kind), ", ".join(f"{n:,}" for n in lens), f"{lens[-1] / lens[0]:.0f}x"]
            )
    return table(["model", "kind", "queries", "longest/shortest"], rows)


def operators(profiles: Profiles) -> str:
    rows = []
    for operator in OPERATORS:
        line = [label(operator)]
        for p in profiles.values():
            of = [r for r in p.rows if r.stage in DENOISERS and r.operator == operator]
            spent, moved = ms(of), sum(r.bytes for r in of)
            flops = sum(r.flops for r in of)
            cell = f"{spent / ms(p.rows, DENOISERS):.1%}"
            if spent > 2 and operator != "host":
                roof = max(flops / max(p.ceilings.flops.values()), moved / p.ceilings.copy_bandwidth)
                cell += f" ({roof * 1e3 / spent:.0%})"
            line.append(cell)
        rows.append(line)
    return table(["of the denoiser's time", *(MODELS[name] for name in profiles)], rows)


def vae(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        spent = ms(p.rows, ["vae.decode"])
        parts = [f"{ms(p.rows, ['vae.decode'], [o]) / spent:.0%}" for o in OPERATORS[:1] + OPERATORS[2:5]]
        norms = [r for r in p.rows if r.stage == "vae.decode" and r.operator == "normalisation"]
        reached = sum(r.bytes for r in norms) / ms(norms) * 1e3 / p.ceilings.copy_bandwidth
        _, whole = usual(name, p)
        rows.append(
            [MODELS[name], f"{spent:,.0f}", f"{spent / ms(p.rows):.0%}", f"{spent / whole:.0%}", *parts]
            + [f"{reached:.0%}", f"{p.memory.peak_bytes / 2**30:.1f} GiB in `{p.memory.peak_module}`"]
        )
    head = ["model", "VAE decode ms", "of the run", "with the usual steps", "convolution", "normalisation"]
    head += ["elementwise", "layout copies", "normalisation: share of the copy bandwidth", "peak memory"]
    return table(head, rows)


def host(profiles: Profiles) -> str:
    rows = []
    for name, p in profiles.items():
        idle, copies = ms(p.rows, operators=["host"]), ms(p.rows, operators=["transfer"])
        inside = ms(p.rows, DENOISERS, ["host"])
        rows.append(
            [MODELS[name], f"{idle:.0f}", f"{idle / ms(p.rows):.1%}", f"{inside / ms(p.rows, DENOISERS):.1%}"]
            + [f"{inside / p.arguments['num_inference_steps']:.1f}", f"{copies:.0f}", f"{copies / ms(p.rows):.1%}"]
        )
    head = ["model", "GPU idle ms", "of the run", "of the denoiser", "ms a step", "host-device copies ms", "of the run"]
    return table(head, rows)


Work = tuple[str, float, float]  # what, ms now, ms at the least


def headroom(profiles: Profiles) -> str:
    """What a kernel could gain at the most, of those that would take a hundredth of the denoiser's time away."""
    rows = []
    for name, p in profiles.items():
        denoiser = ms(p.rows, DENOISERS)
        for what, now, least in candidates(p):
            saved = now - least
            if saved > 0.01 * denoiser:
                _, whole = usual(name, p)
                of_run = saved * USUAL_STEPS[name] / p.arguments["num_inference_steps"]
                rows.append(
                    [MODELS[name], what, f"{now:.0f}", f"{least:.0f}"]
                    + [f"{denoiser / (denoiser - saved):.2f}x", f"{whole / (whole - of_run):.2f}x"]
                )
    head = ["model", "kernel", "ms now", "ms at the least", "denoiser, at the most", "run of the usual steps"]
    return table(head, rows)


def candidates(p: Profile) -> list[Work]:
    """At the least: bytes that must move at the copy bandwidth, or products at the rate of the measured ones."""
    kinds = {total.kind: total for total in summary.kinds(p)}
    rate, bandwidth = max(p.ceilings.flops.values()) / 1e3, p.ceilings.copy_bandwidth / 1e3
    rows = [row for row in p.rows if row.stage in DENOISERS]
    found: list[Work] = []
    for kind in ("full", "spatial"):
        if kind in kinds:
            of = kinds[kind]
            found.append((f"{label(kind)} at the rate of a matrix product", of.ms, of.flops / rate))
            found.append((f"{label(kind)}, half of its time (8 bits, or half of the blocks)", of.ms, of.ms / 2))
    if "temporal" in kinds:
        of = kinds["temporal"]
        found.append((f"{label('temporal')} at the copy bandwidth", of.ms, of.bytes / bandwidth))
    one_key = [call for call in p.calls if call.step >= 0 and call.kv_len == 1]
    found.append(("cross-attention to one key: its value", sum(call.ms for call in one_key), 0.0))
    if "full" in kinds:  # a transformer with modulation: tensors are as large as q
        tensor = kinds["full"].bytes / 4
        rope = [r for r in rows if re.search(r"attn1$", r.module) and r.operator in ("elementwise", "layout")]
        found.append(("rotary embedding in one kernel: q and k read and written", ms(rope), 4 * tensor / bandwidth))
        around = [r for r in rows if re.search(r"blocks\.\d+(\.norm\d)?$", r.module) and r.operator in OPERATORS[2:5]]
        floor = MODULATED * tensor / bandwidth
        found.append(("modulated norms and gated residuals, fused", ms(around), floor))
    norms = [r for r in rows if r.operator == "normalisation"]
    found.append(("norms at the copy bandwidth", ms(norms), sum(r.bytes for r in norms) / bandwidth))
    gates = [r for r in rows if re.search(r"\.(ff|ff_in)\.net\.0$", r.module) and r.operator == "elementwise"]
    if "spatial" in kinds:  # GEGLU: gelu moves 2 tensors and the product 3, where 3 would do
        found.append(("GEGLU in one kernel", ms(gates), 3 / 5 * sum(r.bytes for r in gates) / bandwidth))
    found.append(("no gaps: a CUDA graph", ms(rows, operators=["host"]), 0.0))
    return found


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cards(_: Profiles) -> str:
    """The latest row of each card."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in read("profile"):
        found.setdefault((row["case"], row["gpu"]), {}).update({row["metric"]: row["value"], "commit": row["commit"]})
    rows = [
        [case, gpu, f"{float(of['clean_ms']):,.0f}", f"{float(of['overhead']):.2f}x", of["commit"][:7]]
        for (case, gpu), of in sorted(found.items())
        if "clean_ms" in of
    ]
    return table(["case", "card", "clean ms", "recorded/clean", "commit"], rows)


def io_bytes(_: Profiles) -> str:
    found: dict[str, dict[str, str]] = {}
    for row in read("io_bytes"):
        found.setdefault(row["case"], {}).update({row["metric"]: row["value"]} | row)
    rows = []
    for case, of in found.items():
        if "counter_bytes" in of:
            shape, kernel = case.rsplit(" ", 1)
            bar = "yes" if "hbm_deviation" in of else "no"
            rows.append(
                [shape, kernel, *(f"{float(of[name]) / 1e9:.3f}" for name in ("model_bytes", "counter_bytes"))]
                + [f"{float(of['ratio']):.3f}", bar, of["gpu"], of["commit"][:7]]
            )
    return table(["shape", "kernel", "model GB", "counters GB", "model/counters", "bar", "card", "commit"], rows)


TABLES: dict[str, Callable[[Profiles], str]] = {
    made.__name__: made
    for made in (runs, attention, temporal, padding, lengths, operators, vae, host, headroom, cards, io_bytes)
}


def filled(document: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A document's text with its tables made anew. ValueError where a table has no place, or more than one."""
    text = (HERE / document).read_text(encoding="utf-8")
    for name, made in tables.items():
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{document}: wanted one place for the table {name}, got {len(place.findall(text))}")
        text = place.sub(f"{made()}\n", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where the tables are not up to date")
    args = parser.parse_args()
    profiles = {name: Profile.read(RESULTS / "profiles" / f"{name}.json") for name in MODELS}
    of_profiles = {name: functools.partial(made, profiles) for name, made in TABLES.items()}
    behind = 0
    documents = {
        "where-the-time-goes.md": of_profiles,
        "quantised.md": quantised_tables.TABLES,
        "rehash.md": rehash_tables.TABLES,
        "slicing.md": slicing_tables.TABLES,
        "sparse.md": sparse_tables.TABLES,
    }
    for document, tables in documents.items():
        new = filled(document, tables)
        behind += new != (HERE / document).read_text(encoding="utf-8")
        if not args.check:
            (HERE / document).write_text(new, encoding="utf-8")
    return int(args.check and behind > 0)


if __name__ == "__main__":
    sys.exit(main())
