"""The timing helper of every benchmark: is a candidate faster than the baseline, slower, or was no difference shown?

``compare`` runs the baseline, the baseline once more (the A/A control) and the candidates in one process:

1. Every round calls each function twice, in a palindrome (A A' B B A' A), so that a drift of the clocks hits all alike;
   the order rotates from round to round. A round gives one ratio per candidate: sqrt(A1 A2 / (B1 B2)).
2. Every call starts with a cold L2 (a buffer of twice its size is rewritten, outside the timed region) on one of several
   input sets with values of their own, together larger than L2. The sets come from the caller, with the strides the model uses.
3. CUDA events time the work. Calls shorter than 1 ms are enqueued behind a sleeping kernel, so that the queue is full and
   no launch gap is counted; longer ones are not. ``full_queue`` overrides that: a benchmark of host-bound work says False.
4. The outputs are checked before the timing and, on inputs never seen before, after it. A wrong output fails the run.
5. The figure is the median of the rounds' ratios with a 95 % bootstrap interval. The control's interval, which truly holds
   1, tells what this run cannot resolve: nothing inside it is called a difference.

Medians of milliseconds are printed beside the ratio, but the ratio is what was measured: it does not contain the drift.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

FASTER, SLOWER, NOT_SHOWN = "faster", "slower", "not shown"

# NVML's reasons for a clock below what the silicon could do
THROTTLE_REASONS = {0x4: "power cap", 0x8: "hw slowdown", 0x20: "sw thermal", 0x40: "hw thermal", 0x80: "power brake"}

Inputs = tuple[Any, ...]
Check = Callable[[Inputs, Any, Any], float]


class WrongOutput(ValueError):
    """A timed function computed something else than it should; raised by a ``check`` callback."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One candidate against the baseline. Times in ms; ``ratio`` is baseline time / candidate time, above 1 is faster."""

    name: str
    median_ms: float
    baseline_ms: float
    ratio: float
    ci_lo: float
    ci_hi: float
    noise: float  # how far from 1 the interval of the A/A control reaches
    error: float  # what ``check`` returned, the larger of before and after
    verdict: str
    rounds: int
    clocks: str
    samples_ms: tuple[float, ...] = field(repr=False)
    baseline_samples_ms: tuple[float, ...] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{self.name:28s} {self.median_ms:9.4f} ms  baseline {self.baseline_ms:9.4f} ms  {self.ratio:6.3f}x "
            f"[{self.ci_lo:.3f}, {self.ci_hi:.3f}]  A/A {100 * self.noise:.1f} %  n={self.rounds}  "
            f"err {self.error:.1e}  {self.verdict}  {self.clocks}"
        )


def compare(
    baseline: Callable[..., Any],
    candidates: Mapping[str, Callable[..., Any]],
    make_inputs: Callable[[int], Inputs],
    check: Check,
    *,
    device: torch.device | str,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    cold_l2: bool = True,
    full_queue: bool | None = None,
    clock: Literal["device", "host"] = "device",
) -> dict[str, Comparison]:
    """Time ``candidates`` against ``baseline``, called as ``f(*make_inputs(seed))``; the A/A control is named "control".

    ``make_inputs(seed)`` returns fresh inputs for that seed, ``check(inputs, output, baseline_output)`` returns an error
    figure or raises ``WrongOutput``. The timing takes about ``seconds``, more where ``min_rounds`` rounds take longer.
    ``clock="host"`` times until the call returns, from an empty queue and without waiting for the device.
    """
    if "baseline" in candidates or "control" in candidates:
        raise ValueError('"baseline" and "control" are names of the helper; got a candidate with that name')
    device = torch.device(device)
    functions = {"baseline": baseline, "control": baseline, **candidates}
    sets = [make_inputs(0)]
    sets += [make_inputs(seed) for seed in range(1, _set_count(sets[0], device))]
    on_device = device.type == "cuda" and clock == "device"
    timer = _CudaTimer(device, cold_l2, full_queue) if on_device else _HostTimer(device)
    order = list(functions)

    def round_of(index: int) -> dict[str, list[float]]:
        turn = order[index % len(order) :] + order[: index % len(order)]
        sequence = turn + turn[::-1]
        inputs = sets[index % len(sets)]
        times = timer.time([functools.partial(functions[name], *inputs) for name in sequence])
        return {name: [t for n, t in zip(sequence, times, strict=True) if n == name] for name in order}

    started = time.perf_counter()
    errors = _checked(functions, sets[0], check)
    warm_up = 0
    while time.perf_counter() < started + 0.2 * seconds or (warm_up == 0 and time.perf_counter() < started + seconds):
        round_of(warm_up)
        warm_up += 1
    results = []
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(results) < min_rounds or (len(results) < max_rounds and time.perf_counter() < deadline):
            results.append(round_of(len(results)))
    finally:
        gc.enable()

    for name, error in _checked(functions, make_inputs(len(sets)), check).items():
        errors[name] = max(errors[name], error)
    control = interval(_round_ratios(results, "control"))
    noise = max(control[2] - 1, 1 - control[1])
    return {
        name: _comparison(name, results, noise, errors[name], timer.clocks()) for name in order if name != "baseline"
    }


def verdict(ci_lo: float, ci_hi: float, noise: float) -> str:
    """ "faster" or "slower" if the whole interval is beyond the noise of the A/A control, else "not shown"."""
    if ci_lo > 1 + noise:
        return FASTER
    if ci_hi < 1 - noise:
        return SLOWER
    return NOT_SHOWN


def _checked(functions, inputs: Inputs, check: Check) -> dict[str, float]:
    reference = functions["baseline"](*inputs)
    errors = {}
    for name, function in functions.items():
        error = check(inputs, function(*inputs), reference)
        if not math.isfinite(error):
            raise WrongOutput(f"{name}: wanted a finite error, got {error}")
        errors[name] = error
    return errors


def _round_ratios(results: list[dict[str, list[float]]], name: str) -> np.ndarray:
    logs = [np.mean(np.log(r["baseline"])) - np.mean(np.log(r[name])) for r in results]
    return np.exp(logs)


def interval(ratios: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval. Seeded: the same samples always give the same verdict."""
    draws = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    return float(np.median(ratios)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def _comparison(name, results, noise: float, error: float, clocks: str) -> Comparison:
    own = tuple(t for r in results for t in r[name])
    base = tuple(t for r in results for t in r["baseline"])
    ratio, lo, hi = interval(_round_ratios(results, name))
    return Comparison(
        name=name,
        median_ms=float(np.median(own)),
        baseline_ms=float(np.median(base)),
        ratio=ratio,
        ci_lo=lo,
        ci_hi=hi,
        noise=noise,
        error=error,
        verdict=verdict(lo, hi, noise) if name != "control" else NOT_SHOWN,
        rounds=len(results),
        clocks=clocks,
        samples_ms=own,
        baseline_samples_ms=base,
    )


def _set_count(inputs: Inputs, device: torch.device) -> int:
    """How many input sets are larger than L2 together: at least 2, at most 8 (the flush does the rest)."""
    if device.type != "cuda":
        return 2
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inputs if torch.is_tensor(t)}
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(8, math.ceil(2 * l2 / max(1, sum(storages.values())))))


class _HostTimer:
    """Wall time until the call returns. On a CPU that is all there is; no flush, no queue."""

    def __init__(self, device: torch.device):
        self.device = device

    def time(self, calls: list[Callable[[], Any]]) -> list[float]:
        times = []
        for call in calls:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times

    def clocks(self) -> str:
        return "clocks unknown"


class _CudaTimer:
    """Events on the current stream around each call, with the L2 flush in front of the first event."""

    SHORT_MS = 1.0
    CYCLES_PER_SECOND = 2.0e9  # of the sleeping kernel; a card that runs slower only sleeps longer

    def __init__(self, device: torch.device, cold_l2: bool, full_queue: bool | None):
        self.device, self.full_queue = device, full_queue
        words = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4
        self.flush = torch.ones(words, dtype=torch.int32, device=device) if cold_l2 else None
        self.enqueue_seconds = 0.0
        self.monitor = _Monitor(device)

    def time(self, calls: list[Callable[[], Any]]) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        torch.cuda.synchronize(self.device)
        if self.full_queue and self.enqueue_seconds:
            torch.cuda._sleep(int(1.5 * self.enqueue_seconds * self.CYCLES_PER_SECOND))
        enqueue = time.perf_counter()
        for call, (start, end) in zip(calls, events, strict=True):
            if self.flush is not None:
                self.flush.bitwise_not_()
            start.record()
            call()
            end.record()
        self.enqueue_seconds = time.perf_counter() - enqueue
        self.monitor.read()
        torch.cuda.synchronize(self.device)
        times = [start.elapsed_time(end) for start, end in events]
        if self.full_queue is None:
            self.full_queue = min(times) < self.SHORT_MS
        return times

    def clocks(self) -> str:
        return self.monitor.summary()


class _Monitor:
    """SM clock, power, temperature and throttle reasons while the card works, through NVML where it is installed."""

    def __init__(self, device: torch.device):
        self.readings: list[tuple[int, float, int, int]] = []
        self.handle = None
        try:
            import pynvml
        except ImportError:
            return
        self.nvml = pynvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._reading()
        except pynvml.NVMLError:  # a virtual machine may hide the card's management
            self.handle = None

    def read(self) -> None:
        if self.handle is not None:
            self.readings.append(self._reading())

    def _reading(self) -> tuple[int, float, int, int]:
        n, h = self.nvml, self.handle
        return (
            n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
            n.nvmlDeviceGetPowerUsage(h) / 1000,
            n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            n.nvmlDeviceGetCurrentClocksThrottleReasons(h),
        )

    def summary(self) -> str:
        if not self.readings:
            return "clocks unknown"
        clock, power, heat, reasons = zip(*self.readings, strict=True)
        seen = [name for bit, name in THROTTLE_REASONS.items() if any(r & bit for r in reasons)]
        return f"{min(clock)}-{max(clock)} MHz {max(power):.0f} W {max(heat)} C {'+'.join(seen) or 'no throttle'}"
