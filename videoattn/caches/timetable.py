"""What a scheduler tells about the steps of a generation before the first of them: N steps, 0 to N - 1."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Coordinate = Literal["sigma", "log_snr", "timestep"]
COORDINATES: tuple[Coordinate, ...] = get_args(Coordinate)

LEAST_STEPS = 9  # of a sampler with fewer, two steps have too little in common
SMALL = 2.0**-10  # an output that no scheduler clips
LEAST_KEPT = 2.0**-24
"""Of the signal's variance: a first step of pure noise keeps none, and its sigma would be infinite."""


def refuses(scheduler: object) -> str | None:
    """Why every step of a scheduler that stands before its first step has to run; None where some need not."""
    timesteps = scheduler.timesteps
    if len(timesteps) < LEAST_STEPS:
        return f"wanted a sampler of at least {LEAST_STEPS} steps, got {len(timesteps)}"
    order = getattr(scheduler, "order", 1)
    if order > 1 or len(set(timesteps.tolist())) < len(timesteps):
        return (
            f"{type(scheduler).__name__} calls the network {max(order, 2)} times a step, for values that are not alike"
        )
    return None


def multistep(scheduler: object) -> bool:
    """Whether a sampler reads the outputs of several steps at once (UniPC, DPM-Solver++, DEIS)."""
    return (getattr(scheduler.config, "solver_order", None) or 1) > 1


def coordinates(scheduler: object, which: Coordinate | None = None) -> np.ndarray:
    """Where the steps lie on the axis that outputs are extrapolated over, float64 [N].

    Without `which`: the noise level where the scheduler has it, in which its sampler integrates, else the timestep.
    """
    timesteps = np.array(scheduler.timesteps.tolist(), np.float64)
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    has_sigmas = sigmas is not None and len(timesteps) <= len(sigmas) <= len(timesteps) + 1
    if which == "timestep" or (which is None and not has_sigmas) or (not has_sigmas and alphas is None):
        return timesteps
    if has_sigmas:
        noise = np.array(sigmas[: len(timesteps)].tolist(), np.float64)
    else:
        kept = np.array(alphas.tolist(), np.float64)[timesteps.round().astype(int).clip(0, len(alphas) - 1)]
        noise = np.sqrt((1 - kept) / np.maximum(kept, LEAST_KEPT))
    return noise if which != "log_snr" else np.log(np.maximum(noise, 1e-5))


def influence(scheduler: object) -> np.ndarray | None:
    """What a change of one step's output does to the last latents, by the scheduler's arithmetic alone: float64 [N].

    Samplers are linear in the outputs, so one run tells all: N rows of one number, of which row i is given a small output at
    step i and 0 else, beside two rows of zeros. None where a step draws noise, or takes other arguments than (output,
    timestep, sample).
    """
    if list(inspect.signature(scheduler.step).parameters)[:3] != ["model_output", "timestep", "sample"]:
        return None
    fresh = _fresh(scheduler)
    count = len(fresh.timesteps)
    outputs = torch.cat([SMALL * torch.eye(count), torch.zeros(2, count)])
    sample = torch.zeros(count + 2, 1, 1)
    with torch.random.fork_rng(devices=[]):
        for index, timestep in enumerate(fresh.timesteps):
            if hasattr(fresh, "scale_model_input"):
                fresh.scale_model_input(sample, timestep)
            sample = fresh.step(outputs[:, index, None, None], timestep, sample, return_dict=False)[0]
    rows = sample.flatten().double()
    if rows[-1] != rows[-2] or not rows.isfinite().all():
        return None
    return ((rows[:-2] - rows[-1]) / SMALL).numpy()


def key(model: torch.nn.Module, scheduler: object, first: int) -> dict[str, object]:
    """What tells one calibration from another: the model and its config, the scheduler and its timesteps from `first` on."""
    return {
        "model": type(model).__name__,
        "config": _digest(dict(getattr(model, "config", {}))),
        "scheduler": type(scheduler).__name__,
        "steps": len(scheduler.timesteps),
        "first_step": first,
        "timesteps": _digest([round(float(t), 3) for t in scheduler.timesteps.tolist()]),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fresh(scheduler: object):
    """One of the same steps that stands before its first, with its tensors on the CPU."""
    fresh = type(scheduler).from_config(scheduler.config)
    for name in ("num_inference_steps", "timesteps", "sigmas"):
        value = getattr(scheduler, name, None)
        if value is not None:
            setattr(fresh, name, value.cpu() if isinstance(value, Tensor) else value)
    return fresh
