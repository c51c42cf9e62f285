"""Which backend is the fastest for a call: tables of measured times, and how a call is looked up in them.

A table holds the milliseconds of every backend on the attention calls of real models, on one card. The package ships
one for an architecture (`tables/sm_90.json`); `videoattn calibrate` measures the card that is here into the user's cache
folder, and that table then speaks for it.

A call takes the row that is nearest to it. Whoever was measured faster there than torch's own choice, by more than
noise, computes the call; otherwise, and where nothing near was measured, torch's own choice does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch

from videoattn.call import Call, Mask

TORCH = "sdpa"  # the backend that is torch's own choice, as diffusers makes it
GAIN = 1.02  # what a backend must have gained over it to be taken: two runs of one kernel differ by less
BORROWED_GAIN = 1.5  # the same, where the times are those of another architecture
EFFICIENCY = 0.9  # of a kernel along lists: dense time times density over its own
SELECTION = 0.06  # share of the dense time that selecting and what does not shrink with density take
BOUNDED_GAIN = 1.05  # what quantised attention must gain over the best exact one: it costs quality too
Sparse = Mapping[str, tuple[str, float]]
TABLES = Path(__file__).parent / "tables"

# Octaves between two calls: how much a factor of two in each size counts. With these, each row of sm_90.json looked up
# among the others finds 106 of 117 gains and is mistaken four times; twice the weights and half of them do no better.
WEIGHTS = {"head_dim": 4.0, "q_len": 1.0, "kv_len": 1.0, "rows": 0.25}
FARTHEST = 2.5  # beyond, a call counts as not measured; what lies between lengths a factor of 4 apart does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The times of one call.

    Args:
        bits: of the dtype; fp16 and bf16 take the same time.
        mask, has_kv_len, causal: as in `Call`; with `bits`, the class of the call.
        head_dim, q_len, kv_len: sizes, rows: batch times heads.
        ms: backend name -> milliseconds.
    """

    bits: int
    mask: Mask
    has_kv_len: bool
    causal: bool
    head_dim: int
    q_len: int
    kv_len: int
    rows: int
    ms: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.ms or not all(0 < ms < math.inf for ms in self.ms.values()):
            raise ValueError(f"ms of a row: wanted a positive time of each backend, got {self.ms}")

    @classmethod
    def of(cls, call: Call, ms: Mapping[str, float]) -> Row:
        return cls(
            bits=8 * call.dtype.itemsize,
            mask=call.mask,
            has_kv_len=call.has_kv_len,
            causal=call.causal,
            head_dim=call.head_dim,
            q_len=call.q_len,
            kv_len=call.kv_len,
            rows=call.batch * call.heads,
            ms=ms,
        )

    def distance(self, call: Call) -> float:
        """Octaves between the row's call and this one; infinite where the classes differ."""
        if (self.bits, self.mask, self.has_kv_len, self.causal) != (
            8 * call.dtype.itemsize,
            call.mask,
            call.has_kv_len,
            call.causal,
        ):
            return math.inf
        sizes = {"head_dim": call.head_dim, "q_len": call.q_len, "kv_len": call.kv_len, "rows": call.batch * call.heads}
        return sum(
            WEIGHTS[name] * abs(math.log2(max(1, size) / max(1, getattr(self, name)))) for name, size in sizes.items()
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Times on one card, and what they were measured with; `cudnn` and `driver` may be unknown."""

    gpu: str
    torch: str
    triton: str
    cudnn: str
    driver: str
    date: str
    command: str
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Raises ValueError where the file is no table."""
        try:
            head = json.loads(path.read_text())
            return cls(rows=tuple(Row(**row) for row in head.pop("rows")), **head)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: wanted a table of videoattn calibrate, got {error}") from error

    def write(self, path: Path) -> None:
        """All of it or nothing, one row a line."""
        head = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        rows = [asdict(row) | {"ms": {name: float(f"{ms:.4g}") for name, ms in row.ms.items()}} for row in self.rows]
        lines = [*(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()), '"rows": [\n']
        text = "{\n" + "".join(lines) + ",\n".join(map(json.dumps, rows)) + "\n]\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(path)

    def gains(self, call: Call, default: str, names: Sequence[str] = ()) -> dict[str, float]:
        """Backend -> time of `default` over its own, at the row nearest to the call; empty if that was not measured.

        Rows as near as each other are the same call in another order of memory: the least of their gains counts.

        names: only rows with a time of one of these count; all where there are none.
        """
        known = [row for row in self.rows if default in row.ms and (not names or not row.ms.keys().isdisjoint(names))]
        rows = [(row.distance(call), row.ms) for row in known]
        nearest = min((distance for distance, _ in rows), default=math.inf)
        if nearest > FARTHEST:
            return {}
        alike = [ms for distance, ms in rows if distance == nearest]
        return {
            name: min(ms[default] / ms[name] for ms in alike) for name in alike[0] if all(name in ms for ms in alike)
        }


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table that speaks for a card.

    Args:
        table: the times, path: where they are from.
        borrowed: the architecture whose times they are, where it is not the card's own, else "".
    """

    table: Table
    path: Path
    borrowed: str = ""

    def choose(
        self, call: Call, names: Sequence[str], bounded: Sequence[str], sparse: Sparse, default: str
    ) -> tuple[str, str] | None:
        """The one of all these to take for a call, and why; None where nothing near it was measured."""
        gains = self.table.gains(call, default)
        if not gains:
            return None
        best = max((name for name in names if name in gains), key=gains.__getitem__)
        if gains[best] < (BORROWED_GAIN if self.borrowed else GAIN):
            best = default
        margin = BORROWED_GAIN if self.borrowed else BOUNDED_GAIN
        there = self.table.gains(call, default, bounded) if bounded else {}  # maybe another row
        quantised = max((name for name in bounded if name in there), key=there.__getitem__, default=None)
        if quantised is not None and there[quantised] >= margin * max(there[name] for name in names if name in there):
            best, gains = quantised, there
        what = "none is faster" if best == default else f"{gains[best]:.2f}x of {_label(default)}"
        if bounded and not there:
            what += ", none that quantises was measured (videoattn calibrate --update)"
        expected = {
            name: gain / (SELECTION + density / EFFICIENCY)
            for name, (dense, density) in sparse.items()
            if (gain := self.table.gains(call, default, (dense,)).get(dense)) is not None
        }
        fastest = max(expected, key=expected.__getitem__, default=None)
        if fastest is not None and expected[fastest] >= margin * gains.get(best, 1.0):
            best, what = fastest, f"{expected[fastest]:.2f}x of {_label(default)} expected, by dense attention"
        if not self.borrowed:
            return best, f"measured {what}"
        what = "none is much faster" if best == default else what
        return best, f"{what}, as measured on {self.borrowed}; videoattn calibrate measures this card"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a card: tables, the one to be asked first in front, and why the user's was passed over if so."""

    sources: tuple[Source, ...]
    note: str = ""

    def choose(
        self, call: Call, names: Sequence[str], bounded: Sequence[str] = (), sparse: Sparse = MappingProxyType({})
    ) -> tuple[str, str]:
        """The one to take for a call, and why. What was not measured stays with torch's own choice.

        Args:
            names: of exact backends.
            bounded: of those that quantise, which must gain more to be taken.
            sparse: of those that leave key blocks out -> (the backend of the same kernel with all blocks, the share of the
                keys that is left); what they are expected to take must be as much less.
        """
        default = _default(names)
        for source in self.sources:
            choice = source.choose(call, names, bounded, sparse, default)
            if choice is not None:
                return choice
        return default, f"not measured: {_label(default)}"


@dataclass(frozen=True, kw_only=True)
class Card:
    gpu: str
    architecture: str  # "sm_90"


def card(device: torch.device) -> Card | None:
    """The GPU of a device, None where there is nothing to choose between: no GPU, or not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Card(gpu=torch.cuda.get_device_name(device), architecture=f"sm_{major}{minor}")


def choose(
    call: Call, names: Sequence[str], bounded: Sequence[str] = (), sparse: Sparse = MappingProxyType({})
) -> tuple[str, str]:
    """The backend to take for a call, by what was measured, and why in a few words.

    names: of exact backends, at least one; bounded, sparse: see `Evidence.choose`.
    """
    found = card(call.device)
    return (_default(names), "") if found is None else evidence(found).choose(call, names, bounded, sparse)


def note(device: torch.device) -> str:
    """Why the user's table of a device is passed over, "" where it is not or there is none."""
    found = card(device)
    return "" if found is None else evidence(found).note


@functools.cache
def evidence(card: Card) -> Evidence:
    """The user's table of this very card first, then the shipped one of the nearest architecture."""
    shipped = {path.stem: path for path in TABLES.glob("sm_*.json")}
    sources = []
    if shipped:
        nearest = min(shipped, key=lambda name: (abs(_number(name) - _number(card.architecture)), name))
        borrowed = "" if nearest == card.architecture else nearest
        sources = [Source(table=Table.read(shipped[nearest]), path=shipped[nearest], borrowed=borrowed)]
    path = user_path(card.gpu)
    if not path.is_file():
        return Evidence(sources=tuple(sources))
    try:
        own = Source(table=Table.read(path), path=path)
    except ValueError as error:
        return Evidence(sources=tuple(sources), note=f"{error}; passed over")
    here = {"torch": _series(torch.__version__), "triton": _series(_triton())}
    there = {"torch": _series(own.table.torch), "triton": _series(own.table.triton)}
    if here == there:
        return Evidence(sources=(own, *sources))
    differing = " and ".join(
        f"{name} {there[name]}, here is {here[name]}" for name in here if here[name] != there[name]
    )
    note = f"{path} passed over: measured with {differing}; videoattn calibrate measures again"
    return Evidence(sources=tuple(sources), note=note)


def user_path(gpu: str) -> Path:
    """Where the user's table of a GPU lies: in the cache folder of the platform's user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "videoattn" / "calibration" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def _default(names: Sequence[str]) -> str:
    """Torch's own choice; where it is not among those that can, the first."""
    return TORCH if TORCH in names else names[0]


def _label(default: str) -> str:
    return "torch's choice" if default == TORCH else default


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))
