"""What all trainings share: options, a step that is captured once and replayed, the loop, a time budget, EMA, a log."""

import argparse
import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import Size

Step = Callable[..., dict[str, torch.Tensor]]
WARM_UP_STEPS = 200  # compiling and capturing may use up the budget's own warm-up before the first of them
LOGGED = 50  # steps of a course whose means make a row of the log
SAVED = 60  # seconds from one checkpoint to the next


@dataclass(frozen=True, kw_only=True)
class Course:
    """A size of the training mix, drawn with weight `share` once the part `start` of the time is over.

    Larger sizes need more noise before a thing is lost in it, so a larger `shift` of the noise levels.
    """

    size: Size
    batch: int
    share: float
    start: float
    shift: float = 1.0


def options(description: str, *, seconds: float, peak_rate: float) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint, the log and the result")
    parser.add_argument("--seconds", type=float, default=seconds, help="training time")
    parser.add_argument("--peak-rate", type=float, default=peak_rate, help="the highest learning rate")
    parser.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see the script run on a CPU")
    return parser


def denoiser_options(description: str, *, seconds: float, peak_rate: float) -> argparse.ArgumentParser:
    """`options`, and those of a denoiser that needs the folder which the training of its VAE left."""
    parser = options(description, seconds=seconds, peak_rate=peak_rate)
    parser.add_argument(
        "--start-from", type=Path, help="pipeline folder whose denoiser and text encoder are trained on"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--warm-up", action="store_true", help="only fill the cache of torch.compile, one step a size")
    return parser


def prepare(seed: int) -> torch.device:
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 where it is fast. Casts of weights are not cached: a captured step would keep the first one for ever."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def half_call(module: torch.nn.Module, *args: torch.Tensor, **kwargs: object):
    """`module(*args, **kwargs)` in bf16 where it is fast; gradients reach the fp32 weights through the cast.

    Autocast would have norms and softmax read and write fp32, which is most of the time of a narrow convolutional network.
    """
    if next(module.parameters()).device.type != "cuda":
        return module(*args, **kwargs)
    named = (*module.named_parameters(), *module.named_buffers())
    return torch.func.functional_call(
        module, {name: _half(tensor) for name, tensor in named}, tuple(map(_half, args)), kwargs
    )


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


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


def graphed_steps(
    make: Callable[[Course], Step], courses: Sequence[Course], graphed: bool
) -> dict[Course, GraphedStep]:
    """The step of each course, their graphs in one pool of memory."""
    memory = torch.cuda.graph_pool_handle() if graphed else None
    return {course: GraphedStep(make(course), graphed=graphed, pool=memory) for course in courses}


def train(
    step: Callable[[Course], dict[str, torch.Tensor]],
    courses: Sequence[Course],
    trainer: Trainer,
    budget: Budget,
    *,
    peak_rate: float,
    rng: np.random.Generator,
    log: Log,
    checkpoint: Path,
) -> None:
    """Steps on courses drawn at random until the time is over, with a log and checkpoints.

    `step` does one step of a course, update of the weights included, and returns named scalars.
    """
    recent = {course: [] for course in courses}
    next_save = budget.used + SAVED
    while budget.part < 1:
        ready = [course for course in courses if course.start <= budget.part]
        shares = np.array([course.share for course in ready])
        course = ready[rng.choice(len(ready), p=shares / shares.sum())]
        rate = budget.rate(peak_rate) * min(1.0, (trainer.steps + 1) / WARM_UP_STEPS)
        trainer.set_rate(rate)
        figures = step(course)
        trainer.after_step()
        recent[course].append(torch.stack(list(figures.values())))
        if trainer.steps % 5 == 0 and trainer.device.type == "cuda":
            torch.cuda.synchronize()  # or the queue runs ahead of the clock
        if len(recent[course]) == LOGGED:
            means = dict(zip(figures, torch.stack(recent[course]).mean(0).tolist(), strict=True))
            recent[course].clear()
            log.write(step=trainer.steps, seconds=budget.used, size=course.size, rate=rate, **means)
        if budget.used > next_save:
            trainer.save(checkpoint, budget)
            next_save = budget.used + SAVED
    trainer.save(checkpoint, budget)
