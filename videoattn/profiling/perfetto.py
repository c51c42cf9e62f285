"""The recorded pass for Perfetto (ui.perfetto.dev): torch's own trace, in which our ranges can be read and plots stand.

The form is the Trace Event Format of Chrome, whose reader skips top-level keys that it does not know:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times in it are microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from videoattn.profiling.categories import label
from videoattn.profiling.profile import Profile

Track = Sequence[tuple[float, float]]
"""(microseconds on the trace's clock, value), in any order."""

_RANGE, _ATTEND = "va:", "va.attend:"  # before a module's path, and before a backend's name
_NO_TIME = "M"  # metadata events are the only ones that need none


def annotate(trace: Mapping[str, Any], profile: Profile, tracks: Mapping[str, Track] | None = None) -> bytes:
    """A trace with readable ranges and counter tracks, as gzipped JSON; `trace` itself is not changed.

    Args:
        trace: as torch.profiler exports it, with "traceEvents".
        profile: of the same run: the kinds of its attention, and what stands under "videoattn".
        tracks: name -> values over time, each a plot of its own: {"sequence length": [(us, Nq), ...]}.

    Raises:
        ValueError: no "traceEvents", or a value that is not finite.
    """
    if "traceEvents" not in trace:
        raise ValueError(f"trace: wanted a mapping with traceEvents, got the keys {', '.join(trace) or 'none'}")
    events = trace["traceEvents"]
    kinds = {call.site: call.kind for call in profile.calls if call.kind}
    named = [_named(event, kinds) for event in events]
    pid = _process(events)
    counters = [
        {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": ts, "args": {name: value}}
        for name, track in (tracks or {}).items()
        for ts, value in sorted(track)
    ]
    about = {"schema": profile.schema, "title": profile.title, "device": profile.device, "policy": profile.policy}
    whole = {**trace, "traceEvents": named + counters, "videoattn": about}
    return gzip.compress(json.dumps(whole, separators=(",", ":"), allow_nan=False).encode(), compresslevel=6, mtime=0)


def _named(event: Mapping[str, Any], kinds: Mapping[str, str]) -> Mapping[str, Any]:
    """An event as it is, or one of our ranges with a name that people read and a category to search for."""
    name = event.get("name")
    if not isinstance(name, str) or event.get("ph") == _NO_TIME:
        return event
    if name.startswith(_ATTEND):
        backend = name.removeprefix(_ATTEND)
        return {**event, "name": f"attention by {backend}", "cat": "videoattn", "args": _args(event, backend=backend)}
    if name.startswith(_RANGE):
        module = name.removeprefix(_RANGE)
        kind = kinds.get(module, "")
        readable = f"{module} ({label(kind)})" if kind else module
        return {**event, "name": readable, "cat": "videoattn", "args": _args(event, module=module, kind=kind)}
    return event


def _args(event: Mapping[str, Any], **more: str) -> dict[str, Any]:
    return {**event.get("args", {}), **{name: value for name, value in more.items() if value}}


def _process(events: Sequence[Mapping[str, Any]]) -> int:
    """The process that our ranges are in, or else most events: counters stand beside it."""
    ours = Counter(e["pid"] for e in events if str(e.get("name")).startswith("va") and isinstance(e.get("pid"), int))
    every = Counter(e["pid"] for e in events if isinstance(e.get("pid"), int))
    return next((pid for pid, _ in [*ours.most_common(1), *every.most_common(1)]), 0)
