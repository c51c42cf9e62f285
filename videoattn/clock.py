"""When a denoiser call happens, read off the scheduler: a new generation, the step, the guidance branch.

A new generation is a new `scheduler.timesteps` object; an aborted one leaves nothing behind, since the next begins with
another object. The scheduler is looked up at every call, so that a user may exchange it.
"""

from __future__ import annotations

import torch

from videoattn.call import Grid, Step


class Clock:
    """Counts the calls of one denoiser."""

    def __init__(self) -> None:
        self.generation = -1
        self.calls = 0  # denoiser calls since attention was enabled
        self._timesteps: torch.Tensor | None = None
        self._index = -1
        self._branch = 0

    def tick(self, scheduler, timestep: object, grid: Grid | None) -> Step:
        """The step of the call that is about to run.

        Args:
            scheduler: the pipeline's scheduler, or None for a bare denoiser: every call is then a generation of its own.
            timestep: what the denoiser is given as its timestep.
            grid: the call's video tokens.
        """
        self.calls += 1
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            self.generation += 1
            return Step(generation=self.generation, grid=grid)
        if timesteps is not self._timesteps:
            self.generation += 1
            self._timesteps, self._index = timesteps, -1
        index = _index(scheduler, timesteps, timestep)
        if index >= len(timesteps):  # a schedule that has ended tells nothing: another pipeline runs the denoiser
            self.generation += 1
            return Step(generation=self.generation, grid=grid)
        self._branch = self._branch + 1 if index == self._index else 0
        self._index = index
        return Step(generation=self.generation, index=index, total=len(timesteps), branch=str(self._branch), grid=grid)


def _index(scheduler, timesteps: torch.Tensor, timestep: object) -> int:
    """The scheduler's own count, or the place of the timestep in the schedule; only the last resort synchronises."""
    step_index = getattr(scheduler, "step_index", None)
    if step_index is not None:
        return step_index
    if isinstance(timestep, torch.Tensor) and _shares_storage(timestep, timesteps):
        return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    if hasattr(scheduler, "step_index"):  # it begins to count in its first step()
        return getattr(scheduler, "begin_index", None) or 0
    if timestep is None:
        return 0
    first = torch.as_tensor(timestep, device=timesteps.device).flatten()[0]
    return int((timesteps - first).abs().argmin())


def _shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
