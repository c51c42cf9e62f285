"""What both trainings share: a step that is captured once and replayed, a time budget, EMA, checkpoints and a log."""

import csv
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

Step = Callable[..., dict[str, torch.Tensor]]


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 where it is fast. Casts of weights are not cached: a captured step would keep the first one for ever."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class GraphedStep:
    """A whole training step (forward, backward, optimizer) as one CUDA graph, so that no launch waits for Python.

    `step` takes tensors of fixed shapes by keyword and returns named scalars. Its first calls, warm-up included, are real
    steps. Off CUDA it runs as it is.
    """

    WARM_UP = 3

    def __init__(self, step: Step, *, graphed: bool, pool: tuple[int, int] | None = None):
        self.step, self.pool = step, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls_until_capture = self.WARM_UP if graphed else math.inf
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.graph is None:
            if self.calls_until_capture > 0:
                self.calls_until_capture -= 1
                return self._warm_up(inputs) if math.isfinite(self.calls_until_capture) else self.step(**inputs)
            self._capture(inputs)
        else:
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs

    def _warm_up(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.step(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _capture(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up took is not the graph's
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool):
            self.outputs = self.step(**self.inputs)


class Budget:
    """Training time: the learning rate follows the part of `seconds` that is used, whatever the machine's speed."""

    WARM_UP = 0.02
    FLOOR = 0.02

    def __init__(self, seconds: float, used: float = 0.0):
        self.seconds, self.start = seconds, time.monotonic() - used

    @property
    def used(self) -> float:
        return time.monotonic() - self.start

    @property
    def part(self) -> float:
        return min(self.used / self.seconds, 1.0)

    def rate(self, peak: float) -> float:
        """Linear warm-up, then a cosine down to `FLOOR` times the peak."""
        if self.part < self.WARM_UP:
            return peak * (0.01 + self.part / self.WARM_UP)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (self.part - self.WARM_UP) / (1 - self.WARM_UP))
        return peak * (self.FLOOR + (1 - self.FLOOR) * cosine)


class Trainer:
    """Parameters of some modules with their optimizer, their moving average, and the way both reach the disk."""

    def __init__(self, modules: dict[str, torch.nn.Module], *, decay: float, weight_decay: float = 0.01):
        self.modules, self.decay, self.steps = modules, decay, 0
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.device = self.parameters[0].device
        self.average = [p.detach().clone() for p in self.parameters]
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(0.0, device=self.device)
            if on_gpu
            else 0.0,  # a tensor, so that a captured step can read it
            betas=(0.9, 0.98),
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """Backward, clip, update; returns the norm of the gradient."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        return norm

    def after_step(self) -> None:
        self.steps += 1
        # the average follows quickly while it is young
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def load_average(self) -> None:
        """Put the moving average into the modules."""
        torch._foreach_copy_(self.parameters, self.average)

    def save(self, path: Path, budget: Budget) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "used": budget.used,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> float:
        """Continue from a checkpoint; returns the seconds already used."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        with torch.no_grad():
            torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        return state["used"]


class Log:
    """Appends rows to a CSV file and prints them."""

    def __init__(self, path: Path, columns: Iterable[str]):
        self.path, self.columns = path, list(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._append(self.columns)

    def write(self, **values: object) -> None:
        row = [f"{values[name]:.5g}" if isinstance(values[name], float) else str(values[name]) for name in self.columns]
        self._append(row)
        print("  ".join(f"{name} {value}" for name, value in zip(self.columns, row, strict=True)), flush=True)

    def _append(self, row: list[str]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
