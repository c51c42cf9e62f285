"""An exported trace of torch.profiler -> the time of each module and kind of operator, and of each attention call.

The trace is read, not `prof.events()`: building those takes ten times as long, and a file that somebody sends can be read
the same way. Ranges that `Ranges` opened tell which module was running.

- Host events form a tree on each thread. Self time is an event's time less that of its children: nothing is counted twice.
- A GPU kernel belongs to the host event that was open on the launching thread when its launch was called, which the
  correlation id tells; so it also catches kernels that no operator surrounds, as Triton's.
- Where kernels overlap, the time counts for the earlier one: their sum is the time in which the GPU was busy.
- What lies between kernels is the GPU waiting for the host. A gap belongs to the module whose kernel ends it.

Times in the trace are microseconds; everything that leaves this file is in milliseconds.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from videoattn.profiling.categories import (
    ATTENTION,
    PROLOGUE,
    PROLOGUE_KERNELS,
    bare,
    operator_of,
    operator_of_kernel,
)
from videoattn.profiling.scopes import COMPILED, ROOT, Scope
from videoattn.profiling.summary import ATTENTIONS

RANGE = "va:"  # before a module's path
ATTEND = "va.attend:"  # before the name of the backend that computes a call
_HOST = ("cpu_op", "user_annotation")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_SAME = 1e-3  # us: time stamps nearer than this are the same


class Ranges:
    """A listener of `Scopes`, and a watcher of `runner`: opens a range in the trace for every scope and attention call.

    `known` maps the ranges' names to scopes. One `_RecordFunctionFast` takes 0.8 us, a `record_function` 7 us.
    """

    def __init__(self) -> None:
        self.known: dict[str, Scope] = {}
        self._open: list = []

    def enter(self, scope: Scope) -> None:
        name = RANGE + scope.module
        self.known[name] = scope
        opened = torch._C._profiler._RecordFunctionFast(name)
        opened.__enter__()
        self._open.append(opened)

    def leave(self, scope: Scope) -> None:
        self._open.pop().__exit__(None, None, None)

    def begin(self, plan) -> None:
        opened = torch._C._profiler._RecordFunctionFast(ATTEND + plan.choice.backend.name)
        opened.__enter__()
        self._open.append(opened)

    def end(self) -> None:
        self._open.pop().__exit__(None, None, None)


@dataclass(slots=True, eq=False)
class Span:
    """A host event and where it stands.

    Args:
        name, start, end: as in the trace, us from its begin.
        parent: the event around it.
        scope: of the innermost range around it, its own where it is one.
        op: bare name of the outermost operator between that range and it, "" where there is none.
        instance: the attention call that it is part of.
    """

    name: str
    start: float
    end: float
    parent: Span | None
    scope: Scope
    op: str
    instance: Instance | None
    children: float = 0.0
    top: bool = False  # the outermost operator itself
    inside: bool = False  # of the root range


@dataclass(slots=True, eq=False)
class Instance:
    """One attention call in the trace: an SDPA operator, a range of our runner, or one run of an unfused module."""

    scope: Scope
    start: float
    ms: float = 0.0
    host_ms: float = 0.0
    ops: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(slots=True, eq=False)
class Spent:
    """Time of one (stage, module, operator); as in `profile.Row`."""

    calls: int = 0
    ms: float = 0.0
    host_ms: float = 0.0
    ops: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, ms: float) -> None:
        self.ms += ms
        self.ops[name] += ms


Key = tuple[str, str, str]
"""(stage, module, operator)."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a trace says.

    Args:
        device: whether `ms` is GPU time.
        wall_ms: of the root range. busy_ms: in which the GPU worked; the wall on a CPU.
        spent: time by (stage, module, operator), attention excepted. idle: GPU waiting, by (stage, module).
        instances: attention calls in the order of the run.
        astray_ms: GPU time that no range of ours surrounds.
        overlap_ms: by which the kernels' durations exceed busy_ms.
        kernels: how many there were.
        begin_us: the root range's begin on the trace's clock.
    """

    device: bool
    wall_ms: float
    busy_ms: float
    spent: Mapping[Key, Spent]
    idle: Mapping[tuple[str, str], float]
    instances: tuple[Instance, ...]
    astray_ms: float
    overlap_ms: float
    kernels: int
    begin_us: float


def read(trace: Mapping, known: Mapping[str, Scope], *, device: bool) -> Recorded:
    """The times in a trace.

    Args:
        trace: as exported, with "traceEvents".
        known: range name -> scope, of the `Ranges` that listened.
        device: whether kernels count, or the host's own time.

    Raises:
        ValueError: no root range, or no kernel where kernels count (another profiler holds the GPU's counters).
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    threads = spans(events, known)
    roots = [span for found in threads.values() for span in found if span.name == RANGE + ROOT.module]
    if not roots:
        raise ValueError(f"trace: wanted a range {RANGE + ROOT.module!r}, got none")
    root = roots[0]
    spent: dict[Key, Spent] = defaultdict(Spent)
    instances: dict[int, Instance] = {}
    for found in threads.values():
        for span in found:
            if span.inside:
                _spend_host(span, spent, instances, counts=not device)
    idle: dict[tuple[str, str], float] = defaultdict(float)
    wall = root.end - root.start
    busy, astray, overlap, kernels = wall, 0.0, 0.0, 0
    if device:
        busy, astray, overlap, kernels = _spend_device(events, threads, spent, instances, idle, root)
        if not kernels:
            raise ValueError(
                "trace: wanted GPU kernels, got none; another profiler (nsys, ncu, DCGM) may hold the GPU's counters"
            )
    return Recorded(
        device=device,
        wall_ms=wall / 1e3,
        busy_ms=busy / 1e3,
        spent=spent,
        idle=idle,
        instances=tuple(sorted(instances.values(), key=lambda instance: instance.start)),
        astray_ms=astray / 1e3,
        overlap_ms=overlap / 1e3,
        kernels=kernels,
        begin_us=root.start,
    )


def exported(profiler: torch.profiler.profile) -> dict:
    """The trace of a profile that has ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def spans(events: list[Mapping], known: Mapping[str, Scope]) -> dict[tuple, list[Span]]:
    """Thread -> its host events in the order of their begin, each with its place."""
    by_thread: dict[tuple, list[tuple[float, float, str, str]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _HOST:
            start = event["ts"]
            by_thread[event["pid"], event["tid"]].append((start, start + event["dur"], event["name"], event["cat"]))
    return {thread: list(_tree(found, known)) for thread, found in by_thread.items()}


def innermost(found: list[Span], starts: list[float], time: float) -> Span | None:
    """The innermost span of a thread that is open at a time; `starts` are the begins of `found`."""
    index = bisect.bisect_right(starts, time) - 1
    span = found[index] if index >= 0 else None
    while span is not None and span.end < time:
        span = span.parent
    return span


def _tree(events: list[tuple[float, float, str, str]], known: Mapping[str, Scope]) -> Iterator[Span]:
    events.sort(key=lambda event: (event[0], -event[1]))
    stack: list[Span] = []
    for start, end, name, category in events:
        while stack and stack[-1].end <= start + _SAME:
            stack.pop()
        span = _placed(name, category, start, end, stack[-1] if stack else None, known)
        if span.parent is not None:
            span.parent.children += end - start
        stack.append(span)
        yield span


def _placed(name: str, category: str, start: float, end: float, parent: Span | None, known: Mapping) -> Span:
    scope, op, instance, inside = ROOT, "", None, False
    if parent is not None:
        scope, op, instance, inside = parent.scope, parent.op, parent.instance, parent.inside
    span = Span(name, start, end, parent, scope, op, instance, inside=inside)
    if name.startswith(RANGE):
        span.scope, span.op, span.instance = known.get(name, ROOT), "", None
        span.inside = inside or name == RANGE + ROOT.module
    elif name.startswith(ATTEND):
        span.op, span.instance = "", instance or Instance(scope, start)
    elif not op and _is_operator(name, category):
        span.op, span.top = bare(name), True
        if instance is None and operator_of(span.op, scope.role, scope.kind) in ATTENTIONS:
            span.instance = _instance(span, parent)
    return span


def _instance(span: Span, parent: Span | None) -> Instance:
    """A fused operator is a call of its own; the products and the softmax of an unfused module share one."""
    if operator_of(span.op, "", "") == ATTENTION or parent is None:
        return Instance(span.scope, span.start)
    around = parent
    while around.parent is not None and not around.name.startswith(RANGE):
        around = around.parent
    if around.instance is None:
        around.instance = Instance(span.scope, span.start)
    return around.instance


def _is_operator(name: str, category: str) -> bool:
    """Annotations of others (ProfilerStep, "Torch-Compiled Region", a user's ranges) hide no operator below them."""
    return category == "cpu_op" and ("::" in name or name.startswith("triton_"))


def _spend_host(span: Span, spent: dict, instances: dict, *, counts: bool) -> None:
    """Give a span's self time to its place; `counts`: it is the time that rows are made of."""
    ms = max(0.0, span.end - span.start - span.children) / 1e3
    scope, operator = span.scope, _host_operator(span, counts)
    if operator in ATTENTIONS and span.instance is not None:
        instance = instances.setdefault(id(span.instance), span.instance)
        instance.host_ms += ms
        if counts:
            instance.ms += ms
            instance.ops[span.op] += ms
        return
    place = spent[scope.stage, scope.module, operator]
    place.host_ms += ms
    place.calls += span.top
    if counts:
        place.add(span.op or "Python", ms)


def _host_operator(span: Span, counts: bool) -> str:
    if span.op:
        return operator_of(span.op, span.scope.role, span.scope.kind)
    if span.scope.role == COMPILED and counts:
        return "fused"  # the compiler's own code, which shows no operator
    return "host"


def _spend_device(events, threads, spent, instances, idle, root) -> tuple[float, float, float, int]:
    """Give every kernel's time to the place that launched it. Returns busy, astray and overlapping us, and how many."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCH and "correlation" in event.get("args", {})
    }
    starts = {thread: [span.start for span in found] for thread, found in threads.items()}
    kernels = sorted((event for event in events if event.get("cat") in _DEVICE), key=lambda event: event["ts"])
    of_runs: dict[int, Instance] = {}
    busy = astray = durations = 0.0
    last, seen = root.start, 0
    for event in kernels:
        launch = launches.get(event.get("args", {}).get("correlation"))
        span = None
        if launch is not None:
            thread = launch["pid"], launch["tid"]
            span = innermost(threads.get(thread, []), starts.get(thread, []), launch["ts"])
        start, end = event["ts"], event["ts"] + event["dur"]
        if not root.start <= start <= root.end:
            continue  # before or after the run
        seen += 1
        durations += event["dur"]
        own = max(0.0, end - max(start, last))
        gap = max(0.0, start - last)
        last = max(last, end)
        busy += own
        if span is None or not span.inside:
            astray += own
        scope = ROOT if span is None else span.scope
        idle[scope.stage, scope.module] += gap / 1e3
        _spend_kernel(event, span, scope, own / 1e3, spent, instances, of_runs)
    idle[ROOT.stage, ROOT.module] += max(0.0, root.end - last) / 1e3
    return busy, astray, durations - busy, seen


def _spend_kernel(
    event: Mapping, span: Span | None, scope: Scope, ms: float, spent: dict, instances: dict, of_runs: dict
) -> None:
    op = "" if span is None else span.op
    name = op or _short(event["name"])
    if event["cat"] == "gpu_memcpy" and ("HtoD" in event["name"] or "DtoH" in event["name"]):
        operator = "transfer"
    elif op:
        operator = operator_of(op, scope.role, scope.kind)
    elif event["name"] in PROLOGUE_KERNELS:
        operator = PROLOGUE
    elif span is not None and (span.instance is not None or scope.role == ATTENTION):
        operator = scope.kind or ATTENTION  # launched by a kernel's own launcher
    elif event["cat"] != "kernel":
        operator = "layout"
    else:
        operator = operator_of_kernel(event["name"])
    if operator not in ATTENTIONS:
        spent[scope.stage, scope.module, operator].add(name, ms)
        return
    instance = None if span is None else span.instance
    if instance is None:  # neither an operator nor a range tells the call: one for each run of the module
        run = span
        while run is not None and not run.name.startswith(RANGE):
            run = run.parent
        instance = of_runs.setdefault(id(run), Instance(scope, event["ts"] if run is None else run.start))
    instances.setdefault(id(instance), instance)
    instance.ms += ms
    instance.ops[name] += ms


def _short(kernel: str) -> str:
    """A kernel's name without template arguments."""
    return kernel.removeprefix("void ").split("<")[0].split("(")[0][:80]
