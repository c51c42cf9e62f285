"""The passes over a pipeline, in order, and what they give together: a Profile.

1. warm-up    compiles, plans, loads; thrown away
2. clean      no instrument at all: the only wall time that is reported
3. recorded   ranges and torch.profiler: whose time it is
4. counted    a dispatch mode: FLOPs, bytes, shapes, steps
5. memory     torch.profiler with the allocator's events

No instrument is in the way of another. Every pass runs the same generation from the same random state, and the pipeline is
left as it was, also where a pass raises.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from videoattn import runner
from videoattn.clock import Clock
from videoattn.profiling import memory, pictures, trace
from videoattn.profiling.assemble import assemble, ceilings_of
from videoattn.profiling.counts import Counts
from videoattn.profiling.profile import Ceilings, Memory, Profile
from videoattn.profiling.scopes import ROOT, Listener, Scopes, any_compiled, denoisers, original
from videoattn.profiling.trace import Ranges, Recorded, exported

PASSES = ("warm-up", "clean", "recorded", "counted", "memory")
Progress = Callable[[str], None]
"""Told the name of each pass as it begins."""

_CLEAN_SECONDS, _CLEAN_RUNS = 5.0, 5  # short generations are timed more than once


class ProfileAborted(RuntimeError):
    """The generation raised, which is the cause. `profile` is the report up to there, marked as partial."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(f"the profiled generation broke off: {profile.error}")
        self.profile = profile


def record(
    pipe: object,
    arguments: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    clean_runs: int | None = None,
    commit: str = "",
) -> Profile:
    """Profile one generation.

    Args:
        pipe: a DiffusionPipeline or ModularPipeline, patched or not.
        arguments: of its call. Without a generator every pass gets one with seed 0.
        progress: told the name of each pass.
        clean_runs: how often the clean pass runs; about five seconds of it, at least once, where None.
        commit: of the code that is measured, for the environment.

    Raises:
        TypeError: `pipe` is no pipeline. ValueError: it has no denoiser, or an argument that it does not take, or no step.
        ProfileAborted: the generation raised.
    """
    generation = Generation(pipe, arguments)
    done = Passed()
    with quiet(pipe):
        for name in PASSES:
            if progress is not None:
                progress(name)
            with done.attempt():
                _RUN[name](generation, done, clean_runs)
    with done.attempt():  # after a GPU's error nothing runs there
        done.ceilings = ceilings_of(generation)
    profile = assemble(generation, done, commit)
    if done.error is not None:
        raise ProfileAborted(profile) from done.error
    return profile


class Generation:
    """A call of a pipeline that can be repeated: the same arguments, generators and random state every time."""

    def __init__(self, pipe: object, arguments: Mapping[str, Any]) -> None:
        if isinstance(pipe, nn.Module) or not hasattr(pipe, "components") or not callable(pipe):
            raise TypeError(f"pipe: wanted a pipeline of diffusers, got {type(pipe).__name__}")
        self.pipe = pipe
        self.components = dict(pipe.components)
        self.denoisers = denoisers(self.components)
        if not self.denoisers:
            raise ValueError(f"{type(pipe).__name__}: wanted a pipeline with a denoiser, got one without")
        self.arguments = dict(arguments)
        self._validate()
        self.device = _device(pipe, self.denoisers)
        self._generators = self.arguments.get("generator")
        self._states = [g.get_state() for g in _listed(self._generators)]

    def _validate(self) -> None:
        takes = inspect.signature(type(self.pipe).__call__).parameters
        open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
        unknown = [name for name in self.arguments if name not in takes]
        if unknown and not open_ended:
            raise ValueError(f"{type(self.pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")
        steps = self.arguments.get("num_inference_steps")
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps: wanted at least 1, got {steps}")
        if "generator" in takes and self.arguments.get("generator") is None:
            self.arguments["generator"] = torch.Generator().manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def run(self) -> tuple[float, object]:
        """Milliseconds of wall time, and the output."""
        self.rewind()
        devices = [self.device] if self.on_gpu else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)  # torch.manual_seed also seeds every GPU, which nobody would undo
            if self.on_gpu:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(0)
            self.wait()
            started = time.perf_counter()
            output = self.pipe(**self.arguments)
            self.wait()
            return (time.perf_counter() - started) * 1e3, output

    def rewind(self) -> None:
        """Put the generators back to where they were."""
        for generator, state in zip(_listed(self._generators), self._states, strict=True):
            generator.set_state(state)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(eq=False)
class Passed:
    """What the passes have given so far."""

    clean_ms: list[float] = field(default_factory=list)
    frames: np.ndarray | None = None  # of the clean pass; its output would be memory of the later ones
    recorded_ms: float = 0.0
    recorded: Recorded | None = None
    chrome: dict | None = None  # the recorded pass's trace
    same: str = ""  # how the recorded pass's output differs from the clean one's
    compiled: tuple[str, ...] = ()
    counts: Counts | None = None
    memory: Memory | None = None
    ceilings: Ceilings | None = None
    error: Exception | None = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """A pass that raises leaves what it has; the first error is raised again when the report stands."""
        caught = _Caught()
        with caught:
            yield
        self.error = self.error or caught.error
        _let_go(caught.error)


class _Caught:
    """Keeps an error of the generation for later. An interrupt by the user goes through."""

    error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _let_go(error: BaseException | None) -> None:
    """Drop the variables of the frames that an error came through: the next pass needs the memory of their tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _warm(generation: Generation, done: Passed, runs: int | None) -> None:
    generation.run()


def _clean(generation: Generation, done: Passed, runs: int | None) -> None:
    most = runs or _CLEAN_RUNS
    while len(done.clean_ms) < most and (runs or sum(done.clean_ms) < _CLEAN_SECONDS * 1e3):
        wall, output = generation.run()
        done.clean_ms.append(wall)
        done.frames = pictures.frames_of(output)


def _recorded(generation: Generation, done: Passed, runs: int | None) -> None:
    ranges = Ranges()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if generation.on_gpu else [])]
    scopes = Scopes(generation.components, ranges, generation.pipe)
    profiler = torch.profiler.profile(activities=activities)
    started, output = time.perf_counter(), None
    with done.attempt(), profiler, scopes, _watched(ranges), _root(ranges):
        done.compiled = tuple(scopes.compiled)
        started = time.perf_counter()
        done.recorded_ms, output = generation.run()
    done.same = _difference(done.frames, pictures.frames_of(output))
    done.recorded_ms = done.recorded_ms or (time.perf_counter() - started) * 1e3
    done.chrome = exported(profiler)
    done.recorded = trace.read(done.chrome, ranges.known, device=generation.on_gpu)


def _counted(generation: Generation, done: Passed, runs: int | None) -> None:
    clock = _Steps(generation)
    counts = Counts(where=clock.where)
    scopes = Scopes(generation.components, counts, generation.pipe, into_compiled=True)
    stance = (
        torch.compiler.set_stance("force_eager") if any_compiled(generation.components) else contextlib.nullcontext()
    )
    done.counts = counts
    with stance, clock, scopes, counts:
        generation.run()


def _memory(generation: Generation, done: Passed, runs: int | None) -> None:
    ranges = memory.MemoryRanges(generation.components)
    weights = memory.weights_bytes(generation.components, generation.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if generation.on_gpu else [])]
    scopes = Scopes(generation.components, ranges, generation.pipe)
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with done.attempt(), profiler, scopes, _root(ranges):
        generation.run()
    done.memory = memory.read(exported(profiler), ranges.known, weights, ranges.addresses, generation.device)


_RUN = {"warm-up": _warm, "clean": _clean, "recorded": _recorded, "counted": _counted, "memory": _memory}


class _Steps:
    """A context in which every denoiser's call tells its step; `where` is the step of the latest."""

    def __init__(self, generation: Generation) -> None:
        self.where_now = (-1, 0, "0")
        self._generation = generation
        self._handles: list = []

    def where(self) -> tuple[int, int, str]:
        return self.where_now

    def __enter__(self) -> None:
        for model in self._generation.denoisers.values():
            self._handles += [
                model.register_forward_pre_hook(self._tick(model), with_kwargs=True),
                model.register_forward_hook(self._tock, always_call=True),
            ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tick(self, model: nn.Module) -> Callable[[nn.Module, tuple, dict], None]:
        clock = Clock()
        names = tuple(inspect.signature(type(original(model)).forward).parameters)[1:]

        def tick(_: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = dict(zip(names, args, strict=False)) | kwargs
            step = clock.tick(getattr(self._generation.pipe, "scheduler", None), inputs.get("timestep"), None)
            self.where_now = step.index, step.total, step.branch

        return tick

    def _tock(self, module: nn.Module, args: object, output: object) -> None:
        self.where_now = (-1, 0, "0")


def _device(pipe: object, models: Mapping[str, nn.Module]) -> torch.device:
    """Where the pipeline computes: under offloading not where its weights lie."""
    device = getattr(pipe, "_execution_device", None)
    if device is None:
        device = next(next(iter(models.values())).parameters()).device
    return torch.device(device)


def _listed(generators: torch.Generator | Sequence[torch.Generator] | None) -> Sequence[torch.Generator]:
    if generators is None:
        return ()
    return (generators,) if isinstance(generators, torch.Generator) else generators


def _difference(a: np.ndarray | None, b: np.ndarray | None) -> str:
    """How far the recorded pass's frames are from the clean pass's; "" where one of them has none."""
    if a is None or b is None:
        return ""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "not finite"
    return "identical" if np.array_equal(a, b) else f"greatest difference {np.abs(a - b).max():.3g} of 1"


@contextlib.contextmanager
def _root(listener: Listener) -> Iterator[None]:
    listener.enter(ROOT)
    try:
        yield
    finally:
        listener.leave(ROOT)


@contextlib.contextmanager
def _watched(watcher: runner.Watcher) -> Iterator[None]:
    runner.watchers.append(watcher)
    try:
        yield
    finally:
        runner.watchers.remove(watcher)


@contextlib.contextmanager
def quiet(pipe: object) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = vars(pipe).get("_progress_bar_config")
    pipe._progress_bar_config = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
