"""A pipeline whose costs are known: operators that wait for a given time, and matrix products of a given size.

The operators are another library's, as far as torch knows: the profiler tells what they count as by their names. A busy
machine waits longer than it is told, so clocks of the toy's own stand around everything.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

OPERATORS = {  # -> (the category that the profiler should find, ms)
    "conv_wait": ("convolution", 30.0),
    "gemm_wait": ("linear", 20.0),
    "layer_norm_wait": ("normalisation", 10.0),
    "flash_attention_wait": ("attention of unknown kind", 40.0),
}
IDLE_MS = 15.0  # Python that calls no operator
SIZE = {"cpu": 512, "cuda": 4096}  # of the square product
PRODUCTS = {"cpu": 4, "cuda": 20}  # a step

_library = torch.library.Library("videoattn_toy", "DEF")
for _name in OPERATORS:
    _library.define(f"{_name}(Tensor x) -> Tensor")
    _library.impl(_name, lambda x, ms=OPERATORS[_name][1]: _wait(x, ms), "CompositeExplicitAutograd")
_cycles: dict[torch.device, float] = {}  # of the waiting kernel in a millisecond


def _wait(x: Tensor, ms: float) -> Tensor:
    if x.is_cuda:
        torch.cuda._sleep(int(ms * _cycles[x.device]))
    else:
        time.sleep(ms / 1e3)
    return x.clone()


class Clock:
    """Times what is enqueued between its making and `stopped`: on a GPU by events, on a CPU by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks = [self._mark()]

    def _mark(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stopped(self) -> Clock:
        self.marks.append(self._mark())
        return self

    @property
    def ms(self) -> float:
        start, end = self.marks
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


class _Clocked(nn.Module):
    """Keeps a clock around each of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: list[Clock] = []

    def forward(self, x: Tensor) -> Tensor:
        clock = Clock(x.device)
        x = self.work(x)
        self.clocks.append(clock.stopped())
        return x

    def ms(self, run: int, steps: int) -> float:
        """Of the generation number `run`, of `steps` steps."""
        return sum(clock.ms for clock in self.clocks[run * steps : (run + 1) * steps])


class _Waits(_Clocked):
    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def work(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.videoattn_toy, self.operator)(x)


class _Idles(_Clocked):
    def work(self, x: Tensor) -> Tensor:
        if not x.is_cuda:  # on a GPU the queue would hide it
            time.sleep(IDLE_MS / 1e3)
        return x


class _Multiplies(_Clocked):
    def __init__(self, size: int, products: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, size, bias=False)
        self.products = products

    def work(self, x: Tensor) -> Tensor:
        kept = []  # freeing memory is no part of a product
        for _ in range(self.products):
            kept.append(x)
            x = self.proj(x)
        return x


class Denoiser(nn.Module):
    def __init__(self, size: int, products: int) -> None:
        super().__init__()
        for name in OPERATORS:
            setattr(self, name, _Waits(name))
        self.idle = _Idles()
        self.products = _Multiplies(size, products)

    def forward(self, x: Tensor, timestep: object = None) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = _Waits("conv_wait")

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x)


class Toy:
    """What the profiler needs of a pipeline, and no more. It raises at step `fails_at`."""

    def __init__(self, device: torch.device | str = "cpu", fails_at: int | None = None) -> None:
        self.device, self.fails_at = torch.device(device), fails_at
        self.size = SIZE[self.device.type]
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.transformer = Denoiser(self.size, PRODUCTS[self.device.type]).to(self.device, dtype)
        self.vae, self.scheduler = Decoder(), None
        self.dtype = dtype
        if self.device.type == "cuda":
            _cycles[torch.ones(1, device=self.device).device] = _cycles_of_a_millisecond(self.device)

    @property
    def components(self) -> dict[str, object]:
        return {"transformer": self.transformer, "vae": self.vae, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 2, generator: torch.Generator | None = None) -> Tensor:
        x = torch.ones(self.size, self.size, device=self.device, dtype=self.dtype)
        for step in range(num_inference_steps):
            if step == self.fails_at:
                raise RuntimeError("the card is on fire")
            x = self.transformer(x)
        return self.vae.decode(x)

    def expected_ms(self, steps: int, run: int) -> dict[str, float]:
        """Category -> milliseconds of the generation number `run`, by the toy's own clocks."""
        found = {"linear": self.transformer.products.ms(run, steps), "VAE decode": self.vae.decoder.ms(run, 1)}
        if self.device.type == "cpu":
            found["host gaps"] = self.transformer.idle.ms(run, steps)
        for name, (category, _) in OPERATORS.items():
            found[category] = found.get(category, 0.0) + getattr(self.transformer, name).ms(run, steps)
        return found


def _cycles_of_a_millisecond(device: torch.device) -> float:
    torch.cuda._sleep(int(2e7))
    clock = Clock(device)
    torch.cuda._sleep(int(2e7))
    clock.stopped()
    torch.cuda.synchronize(device)
    return 2e7 / clock.ms


def share_error(shares: dict[str, float], expected_ms: dict[str, float]) -> float:
    """The greatest difference between found and expected shares, in points of a hundred."""
    total = sum(expected_ms.values())
    return max(100 * abs(shares.get(name, 0.0) - ms / total) for name, ms in expected_ms.items())
