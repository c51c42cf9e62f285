"""Ceilings of cards that are not here: shipped in `tables/cards.json`, or those that a report was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CARDS = Path(__file__).parents[1] / "tables" / "cards.json"
DEFAULT = "h200"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card reaches, measured.

    Args:
        name: of the GPU.
        flops: dtype ("bfloat16") -> FLOP/s of a large matrix product.
        copy_bandwidth: bytes a second of a large copy, read and written.
        source: how it was measured, or in which report it stands.
    """

    name: str
    flops: Mapping[str, float]
    copy_bandwidth: float
    source: str

    def __post_init__(self) -> None:
        if not self.flops or min(*self.flops.values(), self.copy_bandwidth) <= 0:
            raise ValueError(f"card {self.name}: wanted ceilings over 0, got {dict(self.flops)}, {self.copy_bandwidth}")

    def ceiling(self, dtype: str) -> tuple[float, str]:
        """FLOP/s in a dtype, and the dtype whose ceiling it is.

        The two kinds of 16 bits are multiplied alike. Where a dtype was not measured the best of the floating-point ones of 16
        bits and more stands in: a time that it gives is a floor all the same.
        """
        alike = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype)
        if dtype in self.flops or alike in self.flops:
            return self.flops[dtype if dtype in self.flops else alike], dtype
        wide = {name: value for name, value in self.flops.items() if name in ("bfloat16", "float16", "float32")}
        best = max(wide or self.flops, key=self.flops.__getitem__)
        return self.flops[best], best


def names() -> tuple[str, ...]:
    """The cards of `tables/cards.json`."""
    return tuple(json.loads(CARDS.read_text()))


def read(card: str) -> Card:
    """A card of the table by its name, or from a file: report.json of `videoattn profile`, or an entry like the table's.

    Raises ValueError for anything else.
    """
    if not card.endswith(".json"):
        shipped = json.loads(CARDS.read_text())
        if card.lower() not in shipped:
            raise ValueError(f"card: wanted one of {', '.join(shipped)} or a .json file, got {card!r}")
        return _card(shipped[card.lower()], shipped[card.lower()]["source"])
    try:
        entry = json.loads(Path(card).read_text())
        measured = entry.get("ceilings", entry)
        return _card({"gpu": entry.get("device"), **measured}, entry.get("source", f"measured for {card}"))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{card}: wanted a report with the ceilings of its machine, got {error!r}") from error


def _card(entry: Mapping, source: str) -> Card:
    flops = {str(dtype): float(value) for dtype, value in entry["flops"].items()}
    return Card(name=str(entry["gpu"]), flops=flops, copy_bandwidth=float(entry["copy_bandwidth"]), source=source)
