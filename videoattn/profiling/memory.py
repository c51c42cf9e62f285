"""What is allocated over a generation: from the allocator's events in a trace of torch.profiler, on GPU and CPU alike.

Every event of the allocator falls into the ranges that are open on its thread: that tells whose it is. What is alive at
the peak is one of

weights      allocated before the run, or by a component at an address that a weight of it had when it had run (offloading
             moves them; afterwards others get their addresses)
activations  allocated since the component that runs at the peak was called
caches       older than that: embeddings, latents, and what a cache keeps from call to call

Letters: none; bytes and milliseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from videoattn.profiling.profile import Alive, Memory, ModuleMemory
from videoattn.profiling.scopes import ROOT, Scope
from videoattn.profiling.trace import RANGE, Ranges, Span, innermost, spans

_POINTS = 400  # of the timeline
_LISTED = 200  # modules and live blocks that a report keeps


class MemoryRanges(Ranges):
    """Ranges that also note where the weights of a component lie when it has run."""

    def __init__(self, components: Mapping[str, object]) -> None:
        super().__init__()
        self.addresses: dict[str, set[int]] = defaultdict(set)
        self._components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    def leave(self, scope: Scope) -> None:
        name = scope.module.removesuffix(".decode").removesuffix(".encode")
        part = self._components.get(name)
        if part is not None:
            self.addresses[name].update(tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers()))
        super().leave(scope)


@dataclass(frozen=True, slots=True)
class _Event:
    """One allocation (bytes above 0) or release: when, where in memory, and what was running."""

    time: float
    bytes: int
    address: int
    span: Span


def weights_bytes(components: Mapping[str, object], device: torch.device) -> dict[str, int]:
    """Component -> bytes of its parameters and buffers on a device; shared storage counts once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, part in components.items():
        if not isinstance(part, nn.Module):
            continue
        total = 0
        for tensor in (*part.parameters(), *part.buffers()):
            if tensor.device.type != device.type or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        if total:
            found[name] = total
    return found


def read(
    trace: Mapping,
    known: Mapping[str, Scope],
    weights: Mapping[str, int],
    addresses: Mapping[str, set[int]],
    device: torch.device,
) -> Memory | None:
    """Memory over the run; None where the trace holds no event of the allocator.

    Args:
        trace: exported from a profile with `profile_memory=True`.
        known: range name -> scope. weights: component -> bytes on the device before the run.
        addresses: of each component's weights, as `MemoryRanges` saw them. device: whose memory.
    """
    root, before, events = _events(trace, known, device)
    if not events:
        return None
    before = max(before, sum(weights.values()))
    total = peak = before
    at = 0  # how many events had happened at the peak
    timeline = [(0.0, before)]
    module_peak: dict[str, int] = defaultdict(int)
    allocated: dict[str, int] = defaultdict(int)
    for index, event in enumerate(events, 1):
        total += event.bytes
        timeline.append(((event.time - root.start) / 1e3, total))
        if event.bytes > 0:
            allocated[event.span.scope.module] += event.bytes
        for module in {around.scope.module for around in _ranges(event.span)}:
            module_peak[module] = max(module_peak[module], total)
        if total > peak:
            peak, at = total, index
    top = events[at - 1] if at else events[0]
    ranked = sorted(module_peak.items(), key=lambda item: -item[1])
    return Memory(
        weights_bytes=sum(weights.values()),
        peak_bytes=peak,
        peak_ms=(top.time - root.start) / 1e3 if at else 0.0,
        peak_module=top.span.scope.module if at else ROOT.module,
        timeline=tuple(thinned(timeline)),
        modules=tuple(
            ModuleMemory(module=module, peak_bytes=most, allocated_bytes=allocated[module])
            for module, most in ranked[:_LISTED]
        ),
        alive=tuple(_alive(events[:at], weights, before, addresses)),
    )


def thinned(points: Sequence[tuple[float, int]], count: int = _POINTS) -> list[tuple[float, int]]:
    """At most `count` points; of each stretch the least and the greatest stay, so that no peak is lost."""
    if len(points) <= count:
        return list(points)
    kept: list[tuple[float, int]] = []
    buckets = count // 2
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _events(trace: Mapping, known: Mapping[str, Scope], device: torch.device) -> tuple[Span, int, list[_Event]]:
    """The root range, the bytes allocated before it, and what happened in it."""
    threads = spans([event for event in trace["traceEvents"] if event.get("ph") == "X"], known)
    starts = {thread: [span.start for span in found] for thread, found in threads.items()}
    root = next(span for found in threads.values() for span in found if span.name == RANGE + ROOT.module)
    of_device = 0 if device.type == "cpu" else 1  # torch's numbers of device types
    found = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    found = [event for event in found if event["args"]["Device Type"] == of_device]
    found = [event for event in found if root.start <= event["ts"] <= root.end]
    found.sort(key=lambda event: event["ts"])
    events = []
    for event in found:
        thread, args = (event["pid"], event["tid"]), event["args"]
        span = innermost(threads.get(thread, []), starts.get(thread, []), event["ts"])
        span = span if span is not None and span.inside else root
        events.append(_Event(event["ts"], args["Bytes"], args["Addr"], span))
    # A GPU's allocator also knows of what is no weight: outputs that somebody keeps. A CPU's counts from the trace's begin.
    before = found[0]["args"]["Total Allocated"] - found[0]["args"]["Bytes"] if found and of_device else 0
    return root, before, events


def _ranges(span: Span) -> Iterator[Span]:
    """The ranges that are open when a span is, itself the first, the root's the last."""
    walk: Span | None = span
    while walk is not None:
        if walk.name.startswith(RANGE):
            yield walk
        walk = walk.parent


def _alive(
    events: Sequence[_Event], weights: Mapping[str, int], before: int, addresses: Mapping[str, set[int]]
) -> Iterator[Alive]:
    """What has been allocated and not released, by module and by what it is, the greatest first."""
    live: dict[int, _Event] = {}
    for event in events:
        if event.bytes > 0:
            live[event.address] = event
        else:
            live.pop(event.address, None)
    begun = _component_begin(events[-1].span) if events else 0.0
    totals: dict[tuple[str, str], int] = defaultdict(int)
    for name, count in weights.items():
        totals[name, "weights"] += count
    if before > sum(weights.values()):
        totals["before the run", "caches"] += before - sum(weights.values())
    for event in live.values():
        module = event.span.scope.module
        moved = event.address in addresses.get(module.partition(".")[0], ())
        what = "weights" if moved else "activations" if event.time >= begun else "caches"
        totals[module, what] += event.bytes
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    for (module, what), count in ranked[:_LISTED]:
        yield Alive(module=module, what=what, bytes=count)


def _component_begin(span: Span) -> float:
    """When the component that runs was called: the outermost range below the root; the root's begin where none is open."""
    ranges = list(_ranges(span))
    return ranges[-2].start if len(ranges) > 1 else ranges[-1].start
