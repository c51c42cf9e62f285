"""Before and after: one generation without and with fast attention, from the same seed, in alternating order.

    first     one generation of each, thrown away: it compiles and plans; its latents and calls are looked at
    timed     rounds of A B B A and B A A B without any instrument
    profiles  of each
    control   the base sampler with as many network calls, where patched makes fewer
    floor     two exact kernels against each other

Frames are compared as the pipeline returns them, never after a video codec.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoattn import api, quality
from videoattn.policy import Policy
from videoattn.profiling import alternating, folder, frames, recorder
from videoattn.profiling.alternating import State
from videoattn.profiling.categories import ATTENTION
from videoattn.profiling.comparison import Comparison, Control, Quality
from videoattn.profiling.profile import Profile
from videoattn.profiling.recorder import Generation, Progress
from videoattn.profiling.scopes import COMPILED, Scope, Scopes, original
from videoattn.session import Session, session_of

DEFAULT = "balanced"
_OURS = ("callback_on_step_end", "return_dict")


def compare(
    pipe: object,
    *,
    policy: Policy | str | None = None,
    rounds: int = 3,
    control: int | None = None,
    out: Path | str | None = None,
    lpips_weights: Path | None = None,
    progress: Progress | None = None,
    commit: str = "",
    **arguments: Any,
) -> Comparison:
    """Run a generation with and without fast attention and say what it gave in time, memory and quality.

    Afterwards the pipeline is as it was: where attention was enabled, the very same session is. Its report counts the
    runs.

    Args:
        pipe: a diffusers pipeline, patched or not.
        policy: as for `enable_fast_attention`; None compares what is enabled on `pipe`, "balanced" where nothing is.
        rounds: each times two runs of either. The interval of three is their spread; fewer show no difference in time.
        control: steps of the control; None finds as many as make the calls of the patched run, 0 leaves it out.
        out: folder for report.html, report.json, report.md and the traces; none is written where None.
        lpips_weights: see `quality.lpips`.
        progress: told what runs, by the names of `runs`.
        commit: of the code that is measured, for the environment.
        arguments: of the pipeline's call. `output_type` is "np".

    Raises:
        TypeError: `pipe` is no pipeline.
        ValueError: it has no denoiser that can be served, or does not take an argument; no step, no round; or `out` cannot
            be written. Nothing has run then.
    """
    options = _Options(
        rounds=rounds, control=control, lpips_weights=lpips_weights, tell=progress or _silent, commit=commit
    )
    with _scheduler_kept(pipe):
        generation = _generation(pipe, arguments)
        if out is not None:
            folder.require_writable(Path(out))
        switch = _Switch(pipe, generation, policy)
        try:
            compared = _between(generation, switch.patched, switch.name, switch.planning_seconds, options)
        finally:
            switch.restore()
    if out is not None:
        compared.save(out)
    return compared


def compare_states(
    pipe: object,
    patched: State,
    arguments: Mapping[str, Any],
    *,
    name: str,
    rounds: int = 3,
    control: int | None = None,
    lpips_weights: Path | None = None,
    progress: Progress | None = None,
    commit: str = "",
) -> Comparison:
    """`compare` for whatever else can be done to a pipeline: as it is, against what it is inside of `patched()`.

    Args:
        name: of what `patched` does. The rest as for `compare`.
    """
    options = _Options(
        rounds=rounds, control=control, lpips_weights=lpips_weights, tell=progress or _silent, commit=commit
    )
    with _scheduler_kept(pipe):
        return _between(_generation(pipe, arguments), patched, name, lambda: 0.0, options)


def runs(rounds: int) -> tuple[str, ...]:
    """What `progress` is told, in this order."""
    passes = (f"{whose}, {name}" for whose in ("base", "patched") for name in recorder.PASSES)
    return ("base, first", "patched, first", *(f"round {i + 1}" for i in range(rounds)), *passes, "control", "floor")


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Arguments of `compare` that say how much is measured."""

    rounds: int
    control: int | None
    lpips_weights: Path | None
    tell: Progress
    commit: str

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: wanted at least 1, got {self.rounds}")
        if self.control is not None and self.control < 0:
            raise ValueError(f"control: wanted steps, or 0 for none, got {self.control}")
        if self.lpips_weights is not None and not self.lpips_weights.is_file():
            raise ValueError(f"lpips_weights: wanted a file, got {self.lpips_weights}")


def _silent(_: str) -> None:
    pass


class _Switch:
    """Fast attention that is put on a pipeline and off it: the sessions that are there, or new ones of a policy."""

    def __init__(self, pipe: object, generation: Generation, policy: Policy | str | None) -> None:
        self._models = [original(model) for model in generation.denoisers.values()]
        self._before = self._attached()
        if policy is not None or not self._before:
            api.enable_fast_attention(pipe, policy or DEFAULT)
        self._on = self._attached()
        self._off()

    def restore(self) -> None:
        """What was enabled before is again."""
        for model, session in self._before:
            session.attach(model)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        for model, session in self._on:
            session.attach(model)
        try:
            yield
        finally:
            self._off()

    @property
    def name(self) -> str:
        session = self._on[0][1]
        return session.policy.name + (f", backend {session.backend}" if session.backend != "auto" else "")

    def planning_seconds(self) -> float:
        return sum(session.planning_seconds for _, session in self._on)

    def _attached(self) -> list[tuple[torch.nn.Module, Session]]:
        return [(model, session) for model in self._models if (session := session_of(model)) is not None]

    def _off(self) -> None:
        for _, session in self._attached():
            session.detach()


def _generation(pipe: object, arguments: Mapping[str, Any]) -> Generation:
    """The call that is repeated. Raises what can be seen before it runs."""
    ours = [name for name in _OURS if name in arguments]
    if ours or arguments.get("output_type", "np") != "np":
        named = ours[0] if ours else f"output_type {arguments['output_type']!r}"
        raise ValueError(f"compare: wanted no {named}, which it sets itself: frames are compared as numbers")
    return Generation(pipe, {**arguments, "output_type": "np"})


@dataclass(frozen=True, kw_only=True)
class _First:
    """What an untimed generation showed. calls: of the denoisers. layers: of attention or compiled, that ran in them."""

    ms: float
    frames: np.ndarray
    calls: int
    layers: int

    def network_calls(self, base: _First) -> float:
        """Calls of the whole network, those of which `base` makes."""
        return base.calls * self.layers / base.layers if base.layers else self.calls


def _between(
    generation: Generation, patched: State, name: str, planning: Callable[[], float], options: _Options
) -> Comparison:
    tell = options.tell
    few = f"{options.rounds} rounds show no difference in time: that takes {alternating.ENOUGH}"
    notes = [few] if options.rounds < alternating.ENOUGH else []
    with recorder.quiet(generation.pipe):
        latents: list[Tensor] = []
        tell("base, first")
        base = _first(generation, latents.append)
        distances: list[float] = []
        before = planning()
        tell("patched, first")
        with patched():
            fast = _first(generation, lambda x: distances.append(_relative(x, latents, len(distances))))
        planned = (planning() - before) * 1e3

        times = alternating.timed(generation, patched, options.rounds, tell)
        measured = alternating.shown(times, first_base_ms=base.ms, first_patched_ms=fast.ms, planning_ms=planned)
        reference, video = times.base, times.patched
        if not np.array_equal(base.frames, reference, equal_nan=True):
            apart = quality.compare_videos(frames.sound(base.frames), frames.sound(reference))
            notes.append(f"base does not repeat itself: two of its runs are apart, {apart}")
        notes += frames.unsound(reference, "base") + frames.unsound(video, "patched")
        reference, video = frames.sound(reference), frames.sound(video)

        profiles = [_profile(generation, "base", options, notes)]
        with patched():
            profiles.append(_profile(generation, "patched", options, notes))
        tell("control")
        controlled = _control(generation, options, base, fast.network_calls(base), reference)
        tell("floor")  # last: where the model is compiled, other kernels are other graphs
        floor, why = _floor(generation)
        notes += [f"noise floor not computed: {why}"] if why else []
    lpips = quality.lpips(video, reference, options.lpips_weights)
    return Comparison(
        title=profiles[0].title,
        policy=name,
        base=replace(profiles[0], clean_ms=measured.base_ms, frames=()),
        patched=replace(profiles[1], clean_ms=measured.patched_ms, frames=()),
        timing=measured,
        base_calls=base.network_calls(base),
        patched_calls=fast.network_calls(base),
        quality=Quality.of(quality.compare_videos(video, reference)),
        floor=floor,
        latents=tuple(distances) if len(distances) == len(latents) and np.isfinite(distances).all() else (),
        lpips=lpips if isinstance(lpips, float) else None,
        lpips_why="" if isinstance(lpips, float) else lpips,
        control=controlled,
        pairs=frames.pairs(video, reference),
        notes=tuple(notes),
    )


def _first(generation: Generation, look: Callable[[Tensor], None]) -> _First:
    """A generation that nobody times; `look` is given the latents after each step."""

    def callback(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tensors.get("latents"), Tensor):
            look(tensors["latents"].detach().float().cpu())
        return tensors

    takes = inspect.signature(type(generation.pipe).__call__).parameters
    more = {"callback_on_step_end": callback} if "callback_on_step_end" in takes else {}
    calls = _Calls(generation)
    with _changed(generation, more), Scopes(generation.components, calls, generation.pipe):
        ms, output = generation.run()
    return _First(ms=ms, frames=frames.of(output), calls=calls.count, layers=calls.layers)


class _Calls:
    """A listener that counts the calls of the denoisers, and the layers in them that ran: a cache skips layers."""

    def __init__(self, generation: Generation) -> None:
        self.count = self.layers = 0
        self._names = generation.denoisers.keys()

    def enter(self, scope: Scope) -> None:
        self.count += scope.module in self._names
        self.layers += scope.stage in self._names and scope.role in (ATTENTION, COMPILED)

    def leave(self, scope: Scope) -> None:
        pass


def _floor(generation: Generation) -> tuple[Quality | None, str]:
    """The noise floor, or why there is none: a kernel that refuses this model."""
    try:
        found = quality.noise_floor(generation.pipe, lambda: frames.sound(frames.of(generation.run()[1])))
    except ValueError as refusal:
        return None, str(refusal)
    return Quality.of(found), ""


def _control(generation: Generation, options: _Options, base: _First, patched: float, reference: np.ndarray) -> Control:
    """The base sampler with as many network calls as `patched`, by the least number of steps that makes them."""
    takes, steps = inspect.signature(type(generation.pipe).__call__).parameters, options.control
    if steps == 0:
        return Control(why="left out, as asked")
    if steps is None and patched >= base.calls:
        return Control(why=f"both make {base.calls} calls, so the base run itself is the control", calls=base.calls)
    given = [name for name in ("timesteps", "sigmas") if generation.arguments.get(name) is not None]
    whole = takes["num_inference_steps"].default if "num_inference_steps" in takes else None
    whole = generation.arguments.get("num_inference_steps") or whole
    if given or not isinstance(whole, int):
        return Control(why=f"none, the steps are set by {given[0] if given else 'something else than their number'}")
    count = steps or max(1, math.floor(whole * patched / base.calls))
    seen = _steps(generation, count)
    while steps is None and seen.network_calls(base) < patched and count < whole:
        count += 1
        seen = _steps(generation, count)
    with _changed(generation, {"num_inference_steps": count}):
        ms = tuple(generation.run()[0] for _ in range(options.rounds))
    calls = seen.network_calls(base)
    return Control(
        why=f"patched makes {patched:.4g} calls, base {base.calls}; base with {count} of {whole} steps makes {calls:.4g}",
        steps=count,
        calls=calls,
        ms=ms,
        quality=Quality.of(quality.compare_videos(frames.sound(seen.frames), reference)),
    )


def _steps(generation: Generation, count: int) -> _First:
    with _changed(generation, {"num_inference_steps": count}):
        return _first(generation, lambda _: None)


def _profile(generation: Generation, whose: str, options: _Options, notes: list[str]) -> Profile:
    generation.rewind()
    try:
        return recorder.record(
            generation.pipe,
            generation.arguments,
            progress=lambda name: options.tell(f"{whose}, {name}"),
            clean_runs=1,
            commit=options.commit,
        )
    except recorder.ProfileAborted as aborted:  # a pass may need more memory than the run itself
        notes.append(f"the profile of {whose} is partial: {aborted.profile.error}")
        return aborted.profile


def _relative(latents: Tensor, references: Sequence[Tensor], index: int) -> float:
    """Relative L2 of the latents of a step; infinite where base had no such step or another shape."""
    if index >= len(references) or latents.shape != references[index].shape:
        return math.inf
    reference = references[index].double()
    return float((latents.double() - reference).norm() / reference.norm())


@contextlib.contextmanager
def _changed(generation: Generation, arguments: Mapping[str, Any]) -> Iterator[None]:
    before = generation.arguments
    generation.arguments = {**before, **arguments}
    try:
        yield
    finally:
        generation.arguments = before


@contextlib.contextmanager
def _scheduler_kept(pipe: object) -> Iterator[None]:
    """A copy of the scheduler stands in; the pipeline's own is afterwards as it was."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        yield
        return
    pipe.scheduler = copy.deepcopy(scheduler)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
