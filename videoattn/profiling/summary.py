"""What follows from a profile: shares, the heaviest modules, roofline, Amdahl. Pure functions; every form prints these."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from videoattn.call import KINDS
from videoattn.profiling.categories import ATTENTION, UNNAMED, category, label
from videoattn.profiling.profile import AttentionCall, Profile, Row

ATTENTIONS = (*KINDS, ATTENTION)
ALL = 0.9995  # a share that is written as 100 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A group of rows: `ms` of the whole, `share` 0..1 of the clean wall time (of the recorded one on a CPU)."""

    name: str
    ms: float
    share: float
    calls: int
    flops: int
    pointwise: int
    bytes: int

    @property
    def work(self) -> int:
        """The operations of the roofline: those that torch counts, else one for each element written."""
        return self.flops or self.pointwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the roofline: FLOP per byte against FLOP/s; `roof` is what the ceilings allow at that intensity."""

    name: str
    intensity: float
    flops_per_second: float
    bytes_per_second: float
    roof: float
    ms: float


def clean_ms(profile: Profile) -> float:
    """The median wall time of the untouched generation; of the recorded one where none ran to its end."""
    return statistics.median(profile.clean_ms) if profile.clean_ms else profile.recorded_ms


def total_ms(profile: Profile) -> float:
    """Of all rows: on a GPU the clean wall time, idle included; on a CPU the recorded wall time."""
    return sum(row.ms for row in profile.rows)


def categories(profile: Profile) -> list[Share]:
    """Time by category, the greatest first."""
    return _grouped(profile.rows, lambda row: label(category(row.stage, row.operator)), total_ms(profile))


def modules(profile: Profile, named: str) -> list[Share]:
    """The modules of one category, repeated blocks as one: "transformer.blocks.*.ffn"."""
    rows = [row for row in profile.rows if label(category(row.stage, row.operator)) == named]
    return _grouped(rows, lambda row: family(row.module), total_ms(profile))


def heaviest(profile: Profile, count: int = 10) -> list[Share]:
    """The (module, operator) pairs that take most time, repeated blocks as one."""
    rows = [row for row in profile.rows if row.operator != "host"]
    return _grouped(rows, lambda row: f"{family(row.module)}: {label(row.operator)}", total_ms(profile))[:count]


def family(module: str) -> str:
    """A module's path with the numbers of repeated blocks left out.

    >>> family("transformer.blocks.12.ffn.net.0.proj")
    'transformer.blocks.*.ffn.net.*.proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def named_share(profile: Profile) -> float:
    """Share of the time that landed in a category with a name."""
    total = total_ms(profile)
    unnamed = sum(row.ms for row in profile.rows if category(row.stage, row.operator) in UNNAMED)
    return 1 - unnamed / total if total else 1.0


def labelled_share(profile: Profile) -> float:
    """Share of the attention calls whose site and kind are known."""
    return sum(bool(call.site and call.kind) for call in profile.calls) / len(profile.calls) if profile.calls else 1.0


def attention_ms(profile: Profile) -> float:
    """Of attention itself, in the denoisers and wherever else its stage does not count as a whole."""
    return sum(row.ms for row in profile.rows if category(row.stage, row.operator) in ATTENTIONS)


def without_attention(profile: Profile) -> float:
    """Amdahl: if attention were free, the run would be this many times faster."""
    total = total_ms(profile)
    rest = total - attention_ms(profile)
    return total / rest if rest > 0 else float("inf") if total else 1.0


def overhead(profile: Profile) -> float:
    """Wall time of the recorded pass over that of the untouched generation."""
    return profile.recorded_ms / clean_ms(profile)


def roofline(profile: Profile, shares: Iterable[Share]) -> list[Point]:
    """Groups as points; those without operations (copies) lie at no intensity and have only their bandwidth."""
    if profile.ceilings is None:
        return []
    top, bandwidth = max(profile.ceilings.flops.values()), profile.ceilings.copy_bandwidth
    points = []
    for share in shares:
        if not share.ms or not share.bytes:
            continue
        intensity, seconds = share.work / share.bytes, _clean_seconds(profile, share.ms)
        points.append(
            Point(
                name=share.name,
                intensity=intensity,
                flops_per_second=share.work / seconds,
                bytes_per_second=share.bytes / seconds,
                roof=min(top, intensity * bandwidth),
                ms=share.ms,
            )
        )
    return points


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTotal:
    """All calls of one kind of attention."""

    kind: str
    calls: int
    ms: float
    flops: int
    bytes: int
    layout_bytes: int
    q_lens: tuple[int, ...]

    @property
    def ms_per_tflop(self) -> float:
        return self.ms / (self.flops / 1e12) if self.flops else 0.0


def kinds(profile: Profile) -> list[KindTotal]:
    """Attention of the denoisers by kind, the greatest time first."""
    groups: dict[str, list[AttentionCall]] = {}
    for call in profile.calls:
        if call.step >= 0:
            groups.setdefault(call.kind or ATTENTION, []).append(call)
    totals = [
        KindTotal(
            kind=kind,
            calls=len(calls),
            ms=sum(call.ms for call in calls),
            flops=sum(call.flops for call in calls),
            bytes=sum(call.bytes for call in calls),
            layout_bytes=sum(call.layout_bytes for call in calls),
            q_lens=tuple(sorted({call.q_len for call in calls})),
        )
        for kind, calls in groups.items()
    ]
    return sorted(totals, key=lambda total: -total.ms)


def temporal_per_flop(profile: Profile) -> float | None:
    """How many times as long temporal attention takes for a FLOP as spatial attention; None without both."""
    by_kind = {total.kind: total for total in kinds(profile)}
    if not {"temporal", "spatial"} <= by_kind.keys() or not by_kind["spatial"].ms_per_tflop:
        return None
    return by_kind["temporal"].ms_per_tflop / by_kind["spatial"].ms_per_tflop


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Calls that are alike but for their place in the run."""

    kind: str
    backend: str
    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    calls: int
    ms: float
    share: float
    tflops: float
    gbs: float
    padding_waste: float | None
    over_bound: float | None


def shapes(profile: Profile) -> list[Shape]:
    """Attention calls by shape and backend, the greatest time first."""
    groups: dict[tuple, list[AttentionCall]] = {}
    for call in profile.calls:
        key = (call.kind, call.backend, call.batch, call.heads, call.q_len, call.kv_len, call.head_dim)
        groups.setdefault(key, []).append(call)
    total = total_ms(profile)
    found = []
    for (kind, backend, batch, heads, q_len, kv_len, head_dim), calls in groups.items():
        ms = sum(call.ms for call in calls)
        seconds = _clean_seconds(profile, ms)
        io = calls[0].io
        found.append(
            Shape(
                kind=kind,
                backend=backend,
                batch=batch,
                heads=heads,
                q_len=q_len,
                kv_len=kv_len,
                head_dim=head_dim,
                calls=len(calls),
                ms=ms,
                share=ms / total if total else 0.0,
                tflops=sum(call.flops for call in calls) / seconds / 1e12 if ms else 0.0,
                gbs=sum(call.bytes for call in calls) / seconds / 1e9 if ms else 0.0,
                padding_waste=calls[0].padding_waste,
                over_bound=io.sm_bytes / io.sm_bound if io else None,
            )
        )
    return sorted(found, key=lambda shape: -shape.ms)


def advice(profile: Profile) -> str:
    """What to speed up first, in a sentence."""
    ranked = categories(profile)
    if not ranked:
        return "nothing was recorded"
    first = ranked[0]
    if first.share > ALL:
        return f"All of the time is {first.name}."
    return (
        f"{first.share:.0%} of the time is {first.name}: free, it would make the run {1 / (1 - first.share):.2f}x faster. "
        f"If attention were free, this run would be {without_attention(profile):.2f}x faster."
    )


def _clean_seconds(profile: Profile, ms: float) -> float:
    """Time of a group without the instruments: on a CPU they slow everything alike."""
    scale = clean_ms(profile) / total_ms(profile) if profile.clock == "host" and total_ms(profile) else 1.0
    return ms * scale / 1e3


def _grouped(rows: Sequence[Row], key: Callable[[Row], str], total: float) -> list[Share]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    shares = [
        Share(
            name=name,
            ms=(ms := sum(row.ms for row in group)),
            share=ms / total if total else 0.0,
            calls=sum(row.calls for row in group),
            flops=sum(row.flops for row in group),
            pointwise=sum(row.pointwise for row in group),
            bytes=sum(row.bytes for row in group),
        )
        for name, group in groups.items()
    ]
    return sorted(shares, key=lambda share: -share.ms)
