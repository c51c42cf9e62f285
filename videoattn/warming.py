"""The first generation, ahead of time: plans are made and kernels compiled by a step of the pipeline itself.

Nothing is known here of a family's shapes: the pipeline makes them, text encoder and guidance included.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from videoattn.session import Session

STEPS = 2  # the shortest schedule that every pipeline has; two denoisers mostly take one each
MOST_STEPS = 8  # in which two denoisers are expected to have taken turns
OURS = ("num_inference_steps", "output_type", "callback_on_step_end")


def warm_up(pipe: object, sessions: Sequence[Session], given: Mapping[str, Any]) -> float:
    """Begin a generation, stop it once every denoiser was called, and throw it away; the seconds it took.

    Scheduler and random generators are afterwards as they were.

    Args:
        pipe: a DiffusionPipeline.
        sessions: of its denoisers.
        given: arguments of its call; `num_frames` goes under the pipeline's own name.

    Raises:
        ValueError: an argument that the pipeline does not take, or a denoiser that stays out of reach.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    arguments = _arguments(type(pipe).__name__, takes, given)
    strength = arguments.get("strength", takes["strength"].default if "strength" in takes else 1.0)
    before = [session.clock.calls for session in sessions]

    def idle() -> list[str]:
        return [s.model_name for s, calls in zip(sessions, before, strict=True) if s.clock.calls == calls]

    if "callback_on_step_end" in takes and hasattr(type(pipe), "interrupt"):
        arguments["callback_on_step_end"] = _stop_when(lambda: not idle())
    started, steps = time.perf_counter(), STEPS
    while True:
        _run(pipe, arguments | {"num_inference_steps": math.ceil(steps / strength)})
        if not idle():
            break
        steps *= 2
        if steps > MOST_STEPS:
            raise ValueError(f"warmup: wanted every denoiser called, got none of {idle()[0]} in {MOST_STEPS} steps")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _arguments(name: str, takes: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(given)
    if "num_frames" in arguments and "video_length" in takes:
        arguments["video_length"] = arguments.pop("num_frames")
    ours = [argument for argument in OURS if argument in arguments]
    if ours:
        raise ValueError(f"warmup: wanted no {' or '.join(ours)}, which it sets itself, got one")
    unknown = [argument for argument in arguments if argument not in takes]
    if unknown:
        wanted = ", ".join(argument for argument in takes if argument not in ("self", *OURS))
        raise ValueError(f"warmup: wanted what {name} takes ({wanted}), got {', '.join(unknown)}")
    if "prompt" in takes and not {"prompt", "prompt_embeds"} & arguments.keys():
        arguments["prompt"] = ""
    return {"generator": torch.Generator().manual_seed(0), **arguments, "output_type": "latent"}


def _stop_when(done: Callable[[], bool]) -> Callable[..., dict]:
    def callback(pipe, step, timestep, tensors) -> dict:
        pipe._interrupt = done()  # as diffusers documents it; a pipeline sets it back when it is called
        return tensors

    return callback


def _run(pipe: object, arguments: dict[str, Any]) -> None:
    scheduler = pipe.scheduler
    try:
        pipe.scheduler = copy.deepcopy(scheduler)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            pipe(**arguments)
    finally:
        pipe.scheduler = scheduler
