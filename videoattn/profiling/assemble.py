"""The passes' results put together: times, FLOPs and shapes of each place in one Profile."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import videoattn
from videoattn.benchmarks import results
from videoattn.profiling import ceilings, io_model, perfetto, pictures, summary
from videoattn.profiling.categories import ATTENTION
from videoattn.profiling.counts import Counts
from videoattn.profiling.profile import AttentionCall, Ceilings, Check, Profile, Row
from videoattn.profiling.scopes import original
from videoattn.profiling.trace import Instance, Recorded
from videoattn.session import session_of

if TYPE_CHECKING:
    from videoattn.profiling.recorder import Generation, Passed

NAMED, LABELLED, ASTRAY, SUM, UNSOUND, OVERHEAD = 0.97, 0.99, 0.01, 0.01, 0.8, 2.0  # what the checks ask for
_OPS = 6  # names that a row keeps
_ROUNDED = 1e-6


def assemble(generation: Generation, done: Passed, commit: str) -> Profile:
    """The report of a generation, as far as its passes came."""
    pipe, recorded, counts = generation.pipe, done.recorded, done.counts
    clean = float(np.median(done.clean_ms)) if done.clean_ms else done.recorded_ms
    matched = _matched(recorded, counts, done.compiled)
    ceiling = done.ceilings
    profile = Profile(
        title=_title(generation, done.frames),
        pipeline=type(pipe).__name__,
        denoisers=tuple(type(original(model)).__name__ for model in generation.denoisers.values()),
        arguments={name: _printable(value) for name, value in generation.arguments.items()},
        policy=_policy(generation),
        environment=_environment(commit),
        device=torch.cuda.get_device_name(generation.device) if generation.on_gpu else "cpu",
        clock="device" if generation.on_gpu else "host",
        clean_ms=tuple(done.clean_ms),
        recorded_ms=done.recorded_ms,
        busy_ms=recorded.busy_ms if recorded else 0.0,
        rows=_rows(recorded, counts, matched, done.compiled, clean),
        calls=tuple(io_model.annotate(call, ceiling) if ceiling else call for call in matched.calls),
        memory=done.memory,
        ceilings=ceiling,
        checks=(),
        notes=tuple(_notes(generation, done)),
        error="" if done.error is None else f"{type(done.error).__name__}: {done.error}",
        frames=pictures.thumbnails(done.frames),
    )
    profile = replace(profile, checks=tuple(_checks(profile, done, matched)))
    if done.chrome is None or recorded is None:
        return profile
    return replace(profile, trace=perfetto.annotate(done.chrome, profile, _tracks(profile, matched, recorded)))


def ceilings_of(generation: Generation) -> Ceilings | None:
    """What the machine reaches, in the type of the denoiser; None for devices that are not measured."""
    measurable = generation.device.type in ("cpu", "cuda")
    return ceilings.measure(generation.device, _dtype(generation)) if measurable else None


@dataclass(frozen=True)
class _Matched:
    """The counted pass's calls with the recorded pass's times."""

    calls: tuple[AttentionCall, ...]
    starts: tuple[float, ...]  # us on the trace's clock
    kinds: Mapping[int, str]  # id of an instance -> the kind of its call
    unmatched: int


def _region(stage: str, module: str, compiled: Sequence[str]) -> str:
    """The compiled module or method that a module runs in, else itself."""
    around = (region for region in compiled if region in (module, stage) or module.startswith(f"{region}."))
    return next(around, module)


def _matched(recorded: Recorded | None, counts: Counts | None, compiled: Sequence[str]) -> _Matched:
    """Calls and times of each place are paired in their order; where their numbers differ the time is shared out."""
    instances: dict[str, list[Instance]] = defaultdict(list)
    for instance in recorded.instances if recorded else ():
        instances[instance.scope.module].append(instance)
    counted = counts.calls if counts else ()
    places = [_region(call.stage, call.site, compiled) for call in counted]
    numbers: dict[str, int] = defaultdict(int)
    for place in places:
        numbers[place] += 1
    calls, starts, kinds, unmatched = [], [], {}, 0
    taken: dict[str, int] = defaultdict(int)
    for call, place in zip(counted, places, strict=True):
        found = instances.get(place, [])
        if len(found) == numbers[place]:
            instance = found[taken[place]]
            taken[place] += 1
            kinds[id(instance)] = call.kind
            calls.append(replace(call, ms=instance.ms))
            starts.append(instance.start)
        else:
            unmatched += 1
            calls.append(replace(call, ms=sum(instance.ms for instance in found) / numbers[place]))
            starts.append(found[0].start if found else 0.0)
    return _Matched(tuple(calls), tuple(starts), kinds, unmatched)


def _rows(
    recorded: Recorded | None, counts: Counts | None, matched: _Matched, compiled: Sequence[str], clean_ms: float
) -> tuple[Row, ...]:
    """Time, FLOPs and bytes of each (stage, module, operator)."""
    rows: dict[tuple[str, str, str], Row] = {}

    def row(key: tuple[str, str, str]) -> Row:
        return rows.get(key) or Row(stage=key[0], module=key[1], operator=key[2])

    if recorded is not None:
        for key, spent in recorded.spent.items():
            rows[key] = replace(row(key), calls=spent.calls, ms=spent.ms, host_ms=spent.host_ms, ops=spent.ops)
        for instance in recorded.instances:
            kind = matched.kinds.get(id(instance)) or instance.scope.kind or ATTENTION
            key = (instance.scope.stage, instance.scope.module, kind)
            old = row(key)
            rows[key] = replace(
                old,
                calls=old.calls + 1,
                ms=old.ms + instance.ms,
                host_ms=old.host_ms + instance.host_ms,
                ops={name: old.ops.get(name, 0.0) + instance.ops.get(name, 0.0) for name in {*old.ops, *instance.ops}},
            )
        # Instruments slow the host, not the kernels: the gaps are those of the clean run, spread as in the recorded one.
        waiting = sum(recorded.idle.values())
        scale = max(0.0, clean_ms - recorded.busy_ms) / waiting if waiting else 0.0
        for (stage, module), ms in recorded.idle.items():
            key = (stage, module, "host")
            rows[key] = replace(row(key), ms=row(key).ms + ms * scale)
    for (stage, module, operator), work in (counts.rows() if counts else {}).items():
        key = (stage, _region(stage, module, compiled), operator)
        old = row(key)
        rows[key] = replace(
            old,
            flops=old.flops + work.flops,
            pointwise=old.pointwise + work.pointwise,
            bytes=old.bytes + work.bytes,
        )
    kept = [replace(found, ops=_greatest(found.ops)) for found in rows.values()]
    return tuple(sorted(kept, key=lambda found: -found.ms))


def _greatest(ops: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(((n, ms) for n, ms in ops.items() if ms), key=lambda item: -item[1])[:_OPS])


def _tracks(profile: Profile, matched: _Matched, recorded: Recorded) -> dict[str, list[tuple[float, float]]]:
    """Plots beside the trace, on its clock: sequence length, and the memory of its own pass, stretched to this one's."""
    tracks = {"sequence length": [(at, call.q_len) for at, call in zip(matched.starts, matched.calls, strict=True)]}
    timeline = profile.memory.timeline if profile.memory else ()
    if timeline and timeline[-1][0]:
        stretch = 1e3 * recorded.wall_ms / timeline[-1][0]
        tracks["bytes alive"] = [(recorded.begin_us + ms * stretch, count) for ms, count in timeline]
    return tracks


def _checks(profile: Profile, done: Passed, matched: _Matched) -> list[Check]:
    """Whether the figures mean something."""
    named, labelled = summary.named_share(profile), summary.labelled_share(profile)
    checks = [
        Check(
            name="time in a category with a name",
            value=f"{named:.2%}",
            wanted=f">= {NAMED:.0%}",
            passed=named >= NAMED,
        ),
        Check(
            name="attention calls with site and kind",
            value=f"{labelled:.2%} of {len(profile.calls)}",
            wanted=f">= {LABELLED:.0%}",
            passed=labelled >= LABELLED,
        ),
        Check(
            name="attention calls found in both passes",
            value=f"{len(matched.calls) - matched.unmatched} of {len(matched.calls)}",
            wanted="all",
            passed=not matched.unmatched,
        ),
    ]
    if done.counts is not None and profile.calls:
        twice = done.counts.overcounted()
        checks.append(
            Check(
                name="FLOPs of attention counted once",
                value=f"{twice:.4f} of what its shapes say",
                wanted="<= 1",
                passed=twice <= 1 + _ROUNDED,
            )
        )
    recorded = done.recorded
    if recorded is not None:
        # On a GPU idle time is set so that the rows add up to the clean wall: there only kernels can be too many.
        wanted = max(summary.clean_ms(profile), profile.busy_ms) if recorded.device else recorded.wall_ms
        off = abs(summary.total_ms(profile) / wanted - 1) if wanted else 0.0
        checks.append(
            Check(
                name="rows add up to the wall time", value=f"{off:.3%} off", wanted=f"<= {SUM:.0%}", passed=off <= SUM
            )
        )
    if recorded is not None and recorded.device:
        astray = recorded.astray_ms / recorded.busy_ms if recorded.busy_ms else 0.0
        checks.append(
            Check(
                name="GPU time outside of every module",
                value=f"{astray:.2%}",
                wanted=f"<= {ASTRAY:.0%}",
                passed=astray <= ASTRAY,
            )
        )
    if done.same:
        checks.append(
            Check(
                name="the recorded pass makes the same video",
                value=done.same,
                wanted="identical",
                passed=done.same == "identical",
            )
        )
    if profile.clean_ms and not done.error:
        cost = summary.overhead(profile)
        checks.append(
            Check(
                name="cost of recording",
                value=f"{cost:.2f}x of {summary.clean_ms(profile):.0f} ms",
                wanted=f"{UNSOUND:g}x to {OVERHEAD:g}x",  # a recorded run that is faster tells of a machine that was busy
                passed=UNSOUND <= cost <= OVERHEAD,
            )
        )
    return checks


def _notes(generation: Generation, done: Passed) -> list[str]:
    notes = []
    if done.error is not None:
        notes.append("The generation broke off; what follows is what had been recorded until then.")
    if done.compiled:
        notes.append(
            f"{len(done.compiled)} modules or methods are compiled: inside them time goes by the names of kernels, not by module; "
            "calls of attention are those of the same modules run eagerly."
        )
    silent = sorted(done.counts.silent) if done.counts is not None and done.error is None else []
    if silent:
        notes.append(
            f"{len(silent)} attention modules compute nothing that is known as attention, {silent[0]} among them: of them "
            "there are no calls."
        )
    if any(hasattr(model, "_hf_hook") for model in generation.denoisers.values()):
        notes.append("Weights are offloaded: their way to the GPU counts as host-device copies.")
    if done.recorded is not None and done.recorded.overlap_ms > 0.01 * done.recorded.busy_ms:
        notes.append(
            f"Kernels overlap for {done.recorded.overlap_ms:.0f} ms; that time counts once, for the earlier one."
        )
    if done.recorded is not None and not done.recorded.device:
        notes.append("On a CPU the shares are of the recorded pass; only the wall time is free of instruments.")
    return notes


def _title(generation: Generation, frames: np.ndarray | None) -> str:
    arguments = generation.arguments
    if frames is not None:
        size = f"{frames.shape[1]}x{frames.shape[2]}, {len(frames)} frames"
    else:
        named = [arguments.get(name) for name in ("height", "width")]
        size = "x".join(map(str, named)) if all(named) else "default size"
    steps = arguments.get("num_inference_steps")
    return f"{type(generation.pipe).__name__}, {size}" + (f", {steps} steps" if steps else "")


def _policy(generation: Generation) -> str:
    sessions = [session_of(original(model)) for model in generation.denoisers.values()]
    return next((session.policy.name for session in sessions if session is not None), "")


def _printable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return list(value)
    return f"<{type(value).__name__}>"


def _dtype(generation: Generation) -> torch.dtype:
    """Of the denoiser's products: what most of its parameters have, sixteen bits or more."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for model in generation.denoisers.values():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
                sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def _environment(commit: str) -> dict[str, str]:
    return {
        **results.machine(),
        "videoattn": videoattn.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
