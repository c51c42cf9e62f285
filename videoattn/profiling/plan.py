"""What a generation will cost, from a model's config alone: no weights, no GPU, seconds.

    print(plan("wan-14b", height=720, width=1280, frames=81, steps=50))

Every part is built on the meta device, where tensors have a shape and no memory, and runs there once under `Counts`: the
operators, shapes and allocations are those of diffusers' own code. Attention is taken as one fused operator, as every GPU
computes it.

Times are floors: each operator takes as long as its FLOPs at the measured rate of the card's matrix products, or as its bytes at
the measured rate of its copies, whichever is longer, and nothing stays in a cache between two operators. A real run in eager
mode lies near it where it is memory-bound, and over it where kernels reach less than the ceiling.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby

from videoattn.profiling import cards
from videoattn.profiling.cards import Card
from videoattn.profiling.categories import category, label
from videoattn.profiling.described import DENOISERS, Model, Size, describe
from videoattn.profiling.profile import AttentionCall, Row
from videoattn.profiling.rehearsal import Refusal, Rehearsal, rehearse
from videoattn.profiling.summary import ATTENTIONS, Share, family

SCHEMA = "videoattn.plan/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the pipeline and what one call of it costs.

    Args:
        name: "transformer", "vae.decode", "text_encoder".
        kind: its class. dtype: what it computes in.
        calls: in the whole generation.
        rows: of one call, repeated blocks as one; `ms` is the floor on the card.
        attention: its attention calls in order; `ms` is 0.
        weights_bytes: of parameters and buffers. Parts that share a component (encode and decode) both name them.
        activations_bytes: the most that one call makes at a time, its inputs excepted; peak_module: where.
    """

    name: str
    kind: str
    dtype: str
    calls: int
    rows: tuple[Row, ...]
    attention: tuple[AttentionCall, ...]
    weights_bytes: int
    activations_bytes: int
    peak_module: str

    @property
    def component(self) -> str:
        return self.name.split(".")[0]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def ms(self) -> float:
        return sum(row.ms for row in self.rows)

    @property
    def attention_flops(self) -> int:
        return sum(row.flops for row in self.rows if row.operator in ATTENTIONS)

    def lengths(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Kind -> (queries, keys) through a call, as they change: how N moves through a UNet's levels."""
        by_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for call in self.attention:
            by_kind[call.kind].append((call.q_len, call.kv_len))
        return {kind: tuple(length for length, _ in groupby(lengths)) for kind, lengths in by_kind.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a generation costs by its configs.

    Args:
        model, pipeline, height, width, frames, steps: what is planned; one video.
        card: whose ceilings the times are floors of.
        parts: those that ran on the meta device.
        unplanned: (part, reason) of the others.
        notes: what a reader must know.
    """

    model: str
    pipeline: str
    height: int
    width: int
    frames: int
    steps: int
    card: Card
    parts: tuple[Part, ...]
    unplanned: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    schema: str = SCHEMA

    @property
    def flops(self) -> int:
        return sum(part.calls * part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.calls * part.bytes for part in self.parts)

    @property
    def ms(self) -> float:
        return sum(part.calls * part.ms for part in self.parts)

    @property
    def denoisers(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.name in DENOISERS)

    def attention_share(self) -> float:
        """Of the denoisers' FLOPs."""
        whole = sum(part.calls * part.flops for part in self.denoisers)
        return sum(part.calls * part.attention_flops for part in self.denoisers) / whole if whole else 0.0

    def without_attention(self) -> float:
        """Amdahl: if the denoisers' attention were free, the floor of the whole generation would be this many times lower."""
        attention = sum(
            part.calls * row.ms for part in self.denoisers for row in part.rows if row.operator in ATTENTIONS
        )
        return self.ms / (self.ms - attention) if self.ms > attention else float("inf")

    def weights_bytes(self) -> int:
        return sum({part.component: part.weights_bytes for part in self.parts}.values())

    def peak_bytes(self) -> int:
        """With the weights of all parts in memory, while the part with the greatest activations runs."""
        return self.weights_bytes() + max((part.activations_bytes for part in self.parts), default=0)

    def categories(self) -> list[Share]:
        """The generation by category, the greatest floor first; `share` is of the floor."""
        groups: dict[str, list[tuple[int, Row]]] = defaultdict(list)
        for part in self.parts:
            for row in part.rows:
                groups[label(category(row.stage, row.operator))].append((part.calls, row))
        shares = [
            Share(
                name=name,
                ms=(ms := sum(calls * row.ms for calls, row in group)),
                share=ms / self.ms if self.ms else 0.0,
                calls=sum(calls * row.calls for calls, row in group),
                flops=sum(calls * row.flops for calls, row in group),
                pointwise=sum(calls * row.pointwise for calls, row in group),
                bytes=sum(calls * row.bytes for calls, row in group),
            )
            for name, group in groups.items()
        ]
        return sorted(shares, key=lambda share: -share.ms)

    def to_json(self) -> str:
        """Everything above, with what follows from it."""
        derived = {
            "flops": self.flops,
            "bytes": self.bytes,
            "floor_ms": self.ms,
            "attention_share": self.attention_share(),
            "without_attention": self.without_attention(),
            "weights_bytes": self.weights_bytes(),
            "peak_bytes": self.peak_bytes(),
            "categories": [asdict(share) for share in self.categories()],
            "lengths": {part.name: part.lengths() for part in self.parts},
        }
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {"card": asdict(self.card), "parts": [asdict(part) for part in self.parts]}
        return json.dumps({"schema": own.pop("schema"), **own, **plain, **derived})

    def __str__(self) -> str:
        from videoattn.profiling.plan_text import table

        return table(self)


def plan(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    *,
    card: str = cards.DEFAULT,
) -> Plan:
    """Plan one video.

    Args:
        model: a name of benchmarks/models.toml, a folder, or a hub id whose configs are on this disk.
        height, width: in pixels. frames: of the video. steps: of the scheduler. Each the pipeline's own by default.
        card: whose measured ceilings to take: a name of `cards.names()`, or the report.json of a profile.

    Raises:
        ValueError: no such model or card, or a size that the model does not take.
    """
    known, described = cards.read(card), describe(model)
    usual = described.size
    size = Size(
        height=usual.height if height is None else height,
        width=usual.width if width is None else width,
        frames=usual.frames if frames is None else frames,
    )
    steps = described.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    described.require(size)
    done = list(rehearse(described, size, steps))
    parts = tuple(_part(rehearsal, known) for rehearsal in done if isinstance(rehearsal, Rehearsal))
    return Plan(
        model=model,
        pipeline=described.spec["pipeline"],
        **asdict(size),
        steps=steps,
        card=known,
        parts=parts,
        unplanned=tuple((refusal.name, refusal.why) for refusal in done if isinstance(refusal, Refusal)),
        notes=tuple(_notes(described, parts, known)),
    )


def _part(rehearsal: Rehearsal, card: Card) -> Part:
    counts = rehearsal.counts
    return Part(
        name=rehearsal.name,
        kind=rehearsal.kind,
        dtype=rehearsal.dtype,
        calls=rehearsal.calls,
        rows=_rows(rehearsal, card),
        attention=counts.calls,
        weights_bytes=rehearsal.weights_bytes,
        activations_bytes=counts.peak_bytes,
        peak_module=counts.peak_module,
    )


def _rows(rehearsal: Rehearsal, card: Card) -> tuple[Row, ...]:
    """Floors are taken module by module, then repeated blocks are added up."""
    ceiling, _ = card.ceiling(rehearsal.dtype)
    rows: dict[tuple[str, str, str], Row] = {}
    for (stage, module, operator), work in rehearsal.counts.rows().items():
        key = stage, family(module), operator
        old = rows.get(key) or Row(stage=key[0], module=key[1], operator=key[2])
        rows[key] = replace(
            old,
            calls=old.calls + work.calls,
            ms=old.ms + 1e3 * max(work.flops / ceiling, work.bytes / card.copy_bandwidth),
            flops=old.flops + work.flops,
            pointwise=old.pointwise + work.pointwise,
            bytes=old.bytes + work.bytes,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.ms))


def _notes(model: Model, parts: Iterable[Part], card: Card) -> Iterable[str]:
    yield "the scheduler's and the pipeline's own operators are not planned: they work on latents alone"
    if not model.index and any(part.name.startswith(("text_encoder", "image_encoder")) for part in parts):
        yield "benchmarks/models.toml describes encoders of the right width but a few layers: the checkpoint's are deeper"
    for dtype in sorted({part.dtype for part in parts}):
        _, measured = card.ceiling(dtype)
        if measured != dtype:
            yield f"{card.name}: the rate of products in {dtype} is not measured, {measured} stands in: those floors are low"
