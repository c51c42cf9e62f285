"""What the HTML page draws of one profile: figures of summary.py as plain data, thinned so that no extreme is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from videoattn.profiling import summary
from videoattn.profiling.categories import category, label
from videoattn.profiling.profile import AttentionCall, Memory, Profile
from videoattn.profiling.summary import Share

CALLS = 10_000  # attention calls that are listed one by one: beyond, the longest
MODULES = 300  # rows of a category: of the others the sum
OPERATORS = 12  # rows of a module
HOLDERS = 24  # rows of the tables of memory
POINTS = 1200  # of a line


def run(profile: Profile, name: str) -> dict[str, Any]:
    """One profile; `name` tells it from another on the same page."""
    shapes = summary.shapes(profile)
    return {
        "name": name,
        "clock": profile.clock,
        "total_ms": summary.total_ms(profile),
        "categories": _categories(profile),
        "shapes": [asdict(shape) for shape in shapes],
        "kinds": [
            asdict(total) | {"label": label(total.kind), "ms_per_tflop": total.ms_per_tflop}
            for total in summary.kinds(profile)
        ],
        "temporal_per_flop": summary.temporal_per_flop(profile),
        "calls": _calls(profile, shapes),
        "sequence": _sequence(profile.calls),
        "roofline": _roofline(profile),
        "io": _io(profile.calls),
        "memory": profile.memory and _memory(profile.memory),
        "frames": profile.frames,
        "environment": dict(profile.environment),
        "arguments": {
            key: value if isinstance(value, str) else repr(value) for key, value in profile.arguments.items()
        },
    }


def keys(profile: Profile) -> dict[str, str]:
    """Label of a category -> the category, by which it is coloured."""
    found = (category(row.stage, row.operator) for row in profile.rows)
    return {label(key): key for key in dict.fromkeys(found)}


def _categories(profile: Profile) -> list[dict[str, Any]]:
    """Categories, in them their modules, in those their operators or kernels."""
    key_of = keys(profile)
    operators: dict[tuple[str, str], dict[str, float]] = {}
    for row in profile.rows:
        found = operators.setdefault((label(category(row.stage, row.operator)), summary.family(row.module)), {})
        for op, ms in row.ops.items():
            found[op] = found.get(op, 0.0) + ms
    tree = []
    for share in _shares(profile, summary.categories(profile)):
        inside = summary.modules(profile, share["name"])
        modules = _shares(profile, inside[:MODULES])
        for module in modules:
            ranked = sorted(operators[share["name"], module["name"]].items(), key=lambda item: -item[1])
            module["operators"] = _rest(ranked, OPERATORS)
        if len(inside) > MODULES:
            rest = inside[MODULES:]
            modules.append(
                {
                    "name": f"{len(rest)} more",
                    "rest": True,
                    "ms": sum(s.ms for s in rest),
                    "share": sum(s.share for s in rest),
                }
            )
        tree.append(share | {"key": key_of[share["name"]], "modules": modules})
    return tree


def _shares(profile: Profile, shares: Sequence[Share]) -> list[dict[str, Any]]:
    """With the share of the roof that each reaches: by FLOP/s, or by bandwidth where there are no operations."""
    points = {point.name: point for point in summary.roofline(profile, shares)}
    found = []
    for share in shares:
        point, values = points.get(share.name), {"name": share.name, "ms": share.ms, "share": share.share}
        values |= {"calls": share.calls, "flops": share.flops, "bytes": share.bytes}
        values["intensity"] = share.work / share.bytes if share.bytes else None
        if point is not None and profile.ceilings is not None:
            bandwidth = point.bytes_per_second / profile.ceilings.copy_bandwidth
            values["roof"] = point.flops_per_second / point.roof if point.roof else bandwidth
        found.append(values)
    return found


def _rest(ranked: Sequence[tuple[str, float]], limit: int) -> list[dict[str, Any]]:
    """The first `limit`, and the sum of the others."""
    first, others = [{"name": name, "ms": ms} for name, ms in ranked[:limit]], ranked[limit:]
    if others:
        first.append({"name": f"{len(others)} more", "rest": True, "ms": sum(ms for _, ms in others)})
    return first


def _calls(profile: Profile, shapes: Sequence[summary.Shape]) -> dict[str, Any]:
    """Every call, by column; the longest where there are too many, in the order of the run."""
    kept = range(len(profile.calls))
    if len(kept) > CALLS:
        kept = sorted(sorted(kept, key=lambda i: -profile.calls[i].ms)[:CALLS])
    of_shape = {(s.kind, s.backend, s.batch, s.heads, s.q_len, s.kv_len, s.head_dim): i for i, s in enumerate(shapes)}
    calls = [profile.calls[i] for i in kept]
    sites = {site: i for i, site in enumerate(dict.fromkeys(call.site for call in calls))}
    return {
        "total": len(profile.calls),
        "sites": list(sites),
        "number": list(kept),
        "site": [sites[call.site] for call in calls],
        "shape": [of_shape[c.kind, c.backend, c.batch, c.heads, c.q_len, c.kv_len, c.head_dim] for c in calls],
        "step": [call.step for call in calls],
        "branch": [call.branch for call in calls],
        "ms": [call.ms for call in calls],
    }


def _sequence(calls: Sequence[AttentionCall]) -> list[dict[str, Any]]:
    """How many queries each call of a denoiser has: in its first forward, and over the whole run."""
    denoised = [call for call in calls if call.step >= 0]
    if not denoised:
        return []
    first = denoised[0]
    forward = []
    for call in denoised:
        if (call.stage, call.step, call.branch) != (first.stage, first.step, first.branch):
            break
        forward.append(call)
    starts = [i for i, call in enumerate(denoised) if i == 0 or call.step != denoised[i - 1].step]
    whole = {"name": "Whole run", "calls": len(denoised), "steps": starts, "lines": _lines(denoised)}
    one = {"name": "One forward", "calls": len(forward), "steps": [], "lines": _lines(forward)}
    return [one, whole] if len(forward) < len(denoised) else [one]


def _lines(calls: Sequence[AttentionCall]) -> list[dict[str, Any]]:
    """One line a kind: (number of the call, queries) where the length changes, and where the line ends."""
    lines: dict[str, list[tuple[int, int]]] = {}
    ends: dict[str, int] = {}
    for i, call in enumerate(calls):
        points = lines.setdefault(call.kind or "attention", [])
        if not points or points[-1][1] != call.q_len:
            points.append((i, call.q_len))
        ends[call.kind or "attention"] = i + 1
    return [
        {"kind": kind, "label": label(kind), "points": thin(points, POINTS), "end": ends[kind]}
        for kind, points in lines.items()
    ]


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points of a line: the first, the last, and the least and the greatest of every stretch."""
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    inner, kept = points[1:-1], [points[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def _roofline(profile: Profile) -> dict[str, Any] | None:
    if profile.ceilings is None:
        return None
    key_of = keys(profile)
    points = summary.roofline(profile, summary.categories(profile))
    heaviest = summary.roofline(profile, summary.heaviest(profile))
    return {
        "flops": dict(profile.ceilings.flops),
        "bandwidth": profile.ceilings.copy_bandwidth,
        "categories": [asdict(point) | {"key": key_of[point.name]} for point in points],
        "heaviest": [asdict(point) for point in heaviest],
    }


def _io(calls: Iterable[AttentionCall]) -> list[dict[str, Any]]:
    """The I/O model of one call of each shape whose tiling is known."""
    found = {}
    for call in calls:
        key = (call.kind, call.backend, call.batch, call.heads, call.q_len, call.kv_len, call.head_dim)
        if call.io is not None and key not in found:
            sizes = ("kind", "backend", "batch", "heads", "q_len", "kv_len", "head_dim")
            found[key] = {name: getattr(call, name) for name in sizes} | asdict(call.io)
    return sorted(found.values(), key=lambda values: -values["sm_bytes"])


def _memory(memory: Memory) -> dict[str, Any]:
    held: dict[tuple[str, str], int] = {}
    for alive in memory.alive:
        key = (summary.family(alive.module), alive.what)
        held[key] = held.get(key, 0) + alive.bytes
    ranked = sorted(held.items(), key=lambda item: -item[1])
    kinds = {what: sum(n for (_, w), n in held.items() if w == what) for what in ("weights", "activations", "caches")}
    peaks: dict[str, tuple[int, int]] = {}
    for module in memory.modules:
        name = summary.family(module.module)
        peak, allocated = peaks.get(name, (0, 0))
        peaks[name] = max(peak, module.peak_bytes), max(allocated, module.allocated_bytes)
    return {
        "weights_bytes": memory.weights_bytes,
        "peak_bytes": memory.peak_bytes,
        "peak_ms": memory.peak_ms,
        "peak_module": memory.peak_module,
        "timeline": thin(memory.timeline, POINTS),
        "kinds": kinds,
        "alive": [{"module": module, "what": what, "bytes": n} for (module, what), n in ranked[:HOLDERS]],
        "alive_more": {"count": len(ranked[HOLDERS:]), "bytes": sum(n for _, n in ranked[HOLDERS:])},
        "modules": [
            {"module": name, "peak_bytes": peak, "allocated_bytes": allocated}
            for name, (peak, allocated) in sorted(peaks.items(), key=lambda item: -item[1][0])[:HOLDERS]
        ],
    }
