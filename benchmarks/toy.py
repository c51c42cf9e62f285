"""A pipeline whose costs are known: operators that take a given time, and a matrix product of a given size.

The operators are another library's, as far as torch knows: the profiler tells what they count as by their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

OPERATORS = {  # -> (the category that the profiler should find, ms)
    "conv_wait": ("convolution", 30.0),
    "gemm_wait": ("linear", 20.0),
    "layer_norm_wait": ("normalisation", 10.0),
    "flash_attention_wait": ("attention of unknown kind", 40.0),
}
IDLE_MS = 15.0  # Python that calls no operator
SIZE = {"cpu": 1024, "cuda": 4096}  # of the square product
PRODUCTS = {"cpu": 1, "cuda": 20}  # a step

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


class _Waits(nn.Module):
    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.videoattn_toy, self.operator)(x)


class _Idles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:  # on a GPU the queue would hide it
            time.sleep(IDLE_MS / 1e3)
        return x


class Denoiser(nn.Module):
    def __init__(self, size: int, products: int) -> None:
        super().__init__()
        for name in OPERATORS:
            setattr(self, name, _Waits(name))
        self.idle = _Idles()
        self.proj = nn.Linear(size, size, bias=False)
        self.products = products

    def forward(self, x: Tensor, timestep: object = None) -> Tensor:
        for name in OPERATORS:
            x = getattr(self, name)(x)
        x = self.idle(x)
        for _ in range(self.products):
            x = self.proj(x) / 64
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
        self.size, self.products = SIZE[self.device.type], PRODUCTS[self.device.type]
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.transformer = Denoiser(self.size, self.products).to(self.device, dtype)
        self.vae, self.scheduler = Decoder(), None
        self.dtype = dtype
        if self.device.type == "cuda":
            _cycles[torch.ones(1, device=self.device).device] = 2e7 / self._timed(lambda: torch.cuda._sleep(int(2e7)))

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

    @torch.no_grad()
    def expected_ms(self, steps: int) -> dict[str, float]:
        """Category -> milliseconds of a generation; the products have no given time and are timed alone."""
        x = torch.ones(self.size, self.size, device=self.device, dtype=self.dtype)
        product = self._timed(lambda: [self.transformer.proj(x) for _ in range(self.products)])
        found = {"linear": product * steps, "VAE decode": OPERATORS["conv_wait"][1]}
        if self.device.type == "cpu":
            found["host gaps"] = IDLE_MS * steps
        for category, ms in OPERATORS.values():
            found[category] = found.get(category, 0.0) + ms * steps
        return found

    def _timed(self, work: Callable[[], object]) -> float:
        """The median of several runs, ms."""
        taken = []
        for _ in range(7):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append((time.perf_counter() - started) * 1e3)
        return sorted(taken)[3]


def share_error(shares: dict[str, float], expected_ms: dict[str, float]) -> float:
    """The greatest difference between found and expected shares, in points of a hundred."""
    total = sum(expected_ms.values())
    return max(100 * abs(shares.get(name, 0.0) - ms / total) for name, ms in expected_ms.items())
