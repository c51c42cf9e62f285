"""The result of profiling: frozen facts, no computation. What follows from them is in summary.py.

The JSON form is `dataclasses.asdict` of a `Profile`. Fields are only ever added to a schema; what changes the meaning of
one gets a new number.

Letters: B batch, H heads, Nq/Nk queries and keys, D head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

SCHEMA = "videoattn.profile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one module spent on one kind of operator. Self time: nothing is counted in two rows.

    Args:
        stage: component of the pipeline ("transformer", "vae.decode", "text_encoder", "scheduler", "pipeline").
        module: path of the innermost module that was running, with the component in front: "transformer.blocks.3.attn1".
        operator: what the time went to, one of `categories.OPERATORS`.
        calls: how often.
        ms: on a GPU, of its kernels; on a CPU, of the host. Idle time of a GPU stands in rows with operator "host".
        host_ms: of the host: Python and the launches of kernels. On a CPU the same as `ms`.
        flops: of matrix products and convolutions, by torch's formulas.
        pointwise: elements written by everything else, the operations of `summary.roofline` where `flops` is 0.
        bytes: every operator's inputs read once and its outputs written once, as if nothing stayed in a cache.
        ops: operator or kernel name -> ms of this row, the greatest first.
    """

    stage: str
    module: str
    operator: str
    calls: int = 0
    ms: float = 0.0
    host_ms: float = 0.0
    flops: int = 0
    pointwise: int = 0
    bytes: int = 0
    ops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One attention call, in the order of the run.

    Args:
        stage, site: where; `site` is the module's path with the component in front.
        kind: what attends to what (`call.KINDS`), "" where it is not known.
        step, steps, branch: when: the scheduler's step from 0, their number, the guidance branch; step -1 outside of the
            denoiser.
        batch, heads, kv_heads, q_len, kv_len, head_dim, dtype: sizes and type ("bfloat16").
        backend: who computed it: one of our backends' names, torch's "sdpa_cudnn", "sdpa_flash", "sdpa_efficient",
            "sdpa_math", "sdpa_cpu", or "unfused" for matrix products and a softmax.
        ms: of the attention alone, without projections and copies.
        flops: 4 B H Nq Nk D. Masks are not deducted.
        bytes: q, k, v read once and the output written once.
        layout_bytes: moved by copies in the attention module around the call.
        padding_waste: share of the kernel's tiles that is padding, 0..1; None where the tiling is not known.
        io: bytes between memory and chip by `io_model`, None where the tiling is not known.
    """

    stage: str
    site: str
    kind: str
    step: int
    steps: int
    branch: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    backend: str
    ms: float
    flops: int
    bytes: int
    layout_bytes: int = 0
    padding_waste: float | None = None
    io: Io | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Io:
    """Bytes of one attention call by the I/O model, at two levels of the memory hierarchy.

    Args:
        block_m, block_n: queries and keys of a tile.
        sm_bytes, sm_bound: that the tiling moves between L2 and the multiprocessors, and the least that any exact
            algorithm moves with the memory of one.
        hbm_bytes, hbm_bound: the same between HBM and L2.
        regime: "large cache" where the memory of a multiprocessor holds D^2 elements, else "small cache".
    """

    block_m: int
    block_n: int
    sm_bytes: int
    sm_bound: int
    hbm_bytes: int
    hbm_bound: int
    regime: Literal["large cache", "small cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """What a module holds at the peak: `what` is "weights", "activations" or "caches" (kept over denoiser calls)."""

    module: str
    what: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleMemory:
    """Greatest number of bytes that were alive while a module ran, and what it allocated itself."""

    module: str
    peak_bytes: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory over the run, from a pass of its own. Bytes are of tensors on the device, the weights included.

    Args:
        weights_bytes: allocated before the run.
        peak_bytes, peak_ms, peak_module: the peak, when, and in what module.
        timeline: (ms, bytes), thinned so that no extreme is lost.
        modules: by peak, the greatest first.
        alive: what is alive at the peak, the greatest first.
    """

    weights_bytes: int
    peak_bytes: int
    peak_ms: float
    peak_module: str
    timeline: tuple[tuple[float, int], ...]
    modules: tuple[ModuleMemory, ...]
    alive: tuple[Alive, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine reaches, measured.

    Args:
        flops: dtype ("bfloat16") -> FLOP/s of a large matrix product.
        copy_bandwidth: bytes a second of a large copy, read and written.
        l2_bytes, sm_count, sm_bytes: of the GPU; 0 on a CPU.
    """

    flops: Mapping[str, float]
    copy_bandwidth: float
    l2_bytes: int = 0
    sm_count: int = 0
    sm_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that must hold of a report for its figures to mean anything."""

    name: str
    value: str
    wanted: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One profiled generation.

    Args:
        title: what ran, in one line.
        pipeline: class name. denoisers: their class names.
        arguments: of the pipeline's call, as far as they can be printed.
        policy: of fast attention, "" where the pipeline is untouched.
        environment: versions, machine, date.
        device: name of the GPU, or "cpu".
        clock: "device" where `ms` is GPU time, "host" where it is CPU time.
        clean_ms: wall times of the generation without any instrument; the only latency that is reported.
        recorded_ms: wall time of the recorded pass.
        busy_ms: time in which the GPU worked, in the recorded pass; on a CPU the same as recorded_ms.
        rows, calls, memory: what was measured; memory is None where its pass did not run.
        ceilings: of the machine, None where they were not measured.
        checks, notes: whether the figures hold, and what a reader must know.
        error: "" or why the generation broke off; then the report is partial.
        frames: a few frames of the clean pass, [H, W, 3] PNG, base64.
    """

    title: str
    pipeline: str
    denoisers: tuple[str, ...]
    arguments: Mapping[str, Any]
    policy: str
    environment: Mapping[str, str]
    device: str
    clock: Literal["device", "host"]
    clean_ms: tuple[float, ...]
    recorded_ms: float
    busy_ms: float
    rows: tuple[Row, ...]
    calls: tuple[AttentionCall, ...]
    memory: Memory | None
    ceilings: Ceilings | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    error: str = ""
    frames: tuple[str, ...] = ()
    schema: str = SCHEMA
    trace: bytes = field(default=b"", repr=False, compare=False)
    """The recorded pass for Perfetto, gzipped JSON; not part of the JSON form."""

    def to_json(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        return json.dumps({name: plain(value) for name, value in parts.items()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Raises ValueError where the text is no profile of this schema."""
        try:
            read = json.loads(text)
            if read.get("schema") != SCHEMA:
                raise ValueError(f"schema: wanted {SCHEMA}, got {read.get('schema')!r}")
            memory, ceilings = read["memory"], read["ceilings"]
            return cls(
                **read
                | {
                    "denoisers": tuple(read["denoisers"]),
                    "clean_ms": tuple(read["clean_ms"]),
                    "rows": tuple(Row(**row) for row in read["rows"]),
                    "calls": tuple(_call(call) for call in read["calls"]),
                    "memory": memory and _memory(memory),
                    "ceilings": ceilings and Ceilings(**ceilings),
                    "checks": tuple(Check(**check) for check in read["checks"]),
                    "notes": tuple(read["notes"]),
                    "frames": tuple(read["frames"]),
                }
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"wanted the JSON of a profile ({SCHEMA}), got {error}") from error

    @classmethod
    def read(cls, path: Path) -> Profile:
        return cls.from_json(path.read_text())

    def save(self, folder: Path | str) -> None:
        """Write report.html, report.json, report.md and trace.json.gz into a folder, which is made if need be."""
        from videoattn.profiling.folder import write

        write(self, Path(folder))

    def __str__(self) -> str:
        from videoattn.profiling.text import table

        return table(self)


def plain(value: Any) -> Any:
    """For json: dataclasses as mappings, times with the digits that mean something."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _call(read: dict[str, Any]) -> AttentionCall:
    return AttentionCall(**read | {"io": read["io"] and Io(**read["io"])})


def _memory(read: dict[str, Any]) -> Memory:
    return Memory(
        **read
        | {
            "timeline": tuple((ms, count) for ms, count in read["timeline"]),
            "modules": tuple(ModuleMemory(**module) for module in read["modules"]),
            "alive": tuple(Alive(**alive) for alive in read["alive"]),
        }
    )
