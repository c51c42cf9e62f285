"""What the machine reaches: a large matrix product and a large copy, measured where the report is made.

No figure of a data sheet: clocks, power limits and shared hosts decide what there is to reach. On random numbers, because a
card that multiplies zeros draws less power and runs faster. Medians; half a second on a GPU and a second on a CPU, once in a
process for each device and dtype. The process's settings count: TF32, the number of threads.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from videoattn.profiling.profile import Ceilings

REPEATS = 7
SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}  # rows and columns of a product
LARGE = {"cpu": 1e-2, "cuda": 1e-3}  # seconds: a product that takes this long is large enough
MIN_SECONDS = 2e-3  # of a timed region on a GPU: the events around it count to a microsecond or so
COPY = 2**27  # bytes, beyond the caches of most CPUs; on a GPU 16 times its L2 if that is more
RANDOM = 2**18  # numbers that are drawn; the rest of a copy's source repeats them


def measure(device: torch.device | str, *dtypes: torch.dtype) -> Ceilings:
    """FLOP/s of a matrix product in each dtype, and the bandwidth of a copy, on a CPU or an NVIDIA GPU.

    Needs at most a quarter of the memory that is free. Raises ValueError for other devices, and for dtypes that torch does
    not multiply by itself: those under 16 bits, integers.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted cpu or cuda, got {device}")
    if not dtypes or not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes):
        raise ValueError(f"dtypes: wanted floating-point types of 16 bits and more, got {dtypes or 'none'}")
    if device.type == "cpu":
        return _measure(torch.device("cpu"), dtypes)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    properties = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        return replace(
            _measure(device, dtypes),
            l2_bytes=properties.L2_cache_size,
            sm_count=properties.multi_processor_count,
            sm_bytes=properties.shared_memory_per_multiprocessor,
        )


def _measure(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    flops = {str(dtype).removeprefix("torch."): _flops(device, dtype) for dtype in dtypes}
    return Ceilings(flops=flops, copy_bandwidth=_copy_bandwidth(device))


@functools.cache
@torch.no_grad()
def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product, the first of `SIZES` that takes long enough."""
    generator = torch.Generator(device).manual_seed(0)
    for rows in SIZES[device.type]:
        a, b = (torch.randn(rows, rows, dtype=dtype, device=device, generator=generator) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        product()  # libraries load their kernels
        if _seconds(device, product) >= LARGE[device.type] or 12 * rows * rows * a.itemsize > _budget(device):
            break
    return 2 * rows**3 / _median_seconds(device, product)


@functools.cache
@torch.no_grad()
def _copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, those read and those written."""
    size = COPY
    if device.type == "cuda":
        size = max(size, 16 * torch.cuda.get_device_properties(device).L2_cache_size)
    size = int(min(size, _budget(device) / 2))
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randint(2**31 - 1, (RANDOM,), dtype=torch.int32, device=device, generator=generator)
    source = drawn.repeat(max(1, size // drawn.nbytes))
    copy = functools.partial(torch.empty_like(source).copy_, source)
    copy()
    return 2 * source.nbytes / _median_seconds(device, copy)


def _budget(device: torch.device) -> float:
    """Bytes that a measurement may take."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf


def _median_seconds(device: torch.device, function: Callable[[], Tensor]) -> float:
    calls = 1
    if device.type == "cuda":
        calls += int(MIN_SECONDS / max(_seconds(device, function), 1e-6))
    return statistics.median(_seconds(device, function, calls) for _ in range(REPEATS))


def _seconds(device: torch.device, function: Callable[[], Tensor], calls: int = 1) -> float:
    """Of one call, the mean of some in a row."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
