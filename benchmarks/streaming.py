"""Attention of a sequence that does not fit: q, k, v and the output in the host's memory, some GiB on the device.

What is shown: the time against the same blocks with everything on the device (where that fits), so what copies add; how much
of their own time is hidden behind attention; what is allocated at the peak against what `plan` predicts; and the error of
sampled rows against fp64, beside that of torch's kernel.

    python -m videoattn.benchmarks.streaming                       # a million tokens in 8 GiB; 40 s on an H200
    python -m videoattn.benchmarks.streaming --device cpu --tokens 700 --heads 2 --head-dim 16 --budget 192KiB
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from videoattn.benchmarks import results
from videoattn.kernels import reference
from videoattn.slicing import slices
from videoattn.slicing.streaming import Sizes, plan, stream_attention, torch_attend

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROOM = 1.3  # of what q, k, v and the output take, for a run on the device alone


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--budget", default="8GiB", help="of the device's memory")
    parser.add_argument("--rows", type=int, default=256, help="queries whose output is checked")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    sizes = plan(args.tokens, args.heads, args.head_dim, dtype, args.budget)
    shape = (1, args.tokens, args.heads, args.head_dim)
    case = f"1x{args.heads}x{args.tokens}x{args.head_dim} {args.dtype} in {args.budget}"
    print(f"{case}: blocks of {sizes.queries} queries, chunks of {sizes.keys} keys")
    rows = [
        {"case": case, "metric": metric, "value": value, "unit": unit}
        for metric, value, unit in figures(shape, dtype, device, sizes, args.rows)
    ]
    for row in rows:
        print(f"  {row['metric']:<24} {row['value']:.5g} {row['unit']}")
    results.append_figures("streaming", rows, results.environment(args.commit), args.results)
    return 0


@torch.no_grad()
def figures(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, sizes: Sizes, checked: int
) -> Iterator[tuple[str, float, str]]:
    """(metric, value, unit) of q, k, v of `shape` [1, N, H, D]."""
    _, n, heads, head_dim = shape
    gpu = device.type == "cuda"
    q, k, v = (_random(shape, dtype, device, seed) for seed in range(3))
    out = torch.empty(shape, dtype=dtype, pin_memory=gpu)
    few = slice(min(n, 1024))
    stream_attention(q[:, few], k[:, few], v[:, few], chunk=sizes, device=device)  # compiles
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(lambda: stream_attention(q, k, v, chunk=sizes, out=out, device=device), device)
    yield "seconds", seconds, "s"
    yield "tflops", 4 * n * n * heads * head_dim / seconds / 1e12, "TFLOP/s"
    yield "predicted", sizes.bytes, "bytes"
    if gpu:
        allocated = torch.cuda.max_memory_allocated() - before
        yield "allocated", allocated, "bytes"
        yield "peak_gib", allocated / 2**30, "GiB"
        yield from _hidden(q, k, v, sizes, device, seconds)
    yield from _errors(q, k, v, out, device, checked)


def _hidden(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, device, seconds: float) -> Iterator[tuple[str, float, str]]:
    """What copies would take by themselves, and how much of it the run did not take longer than one without any."""
    part = k[:, : sizes.keys]
    in_seconds, out_seconds = _copy_seconds(part[0], device)
    blocks, chunks = -(-q.shape[1] // sizes.queries), -(-k.shape[1] // sizes.keys)
    copied = chunks + (blocks - 1) * max(chunks - 2, 0)  # the last two of a block serve the next one too
    tensors = q.shape[1] / part.shape[1]
    copies = (2 * copied + tensors) * in_seconds + tensors * out_seconds
    yield "host to device", part.nbytes / in_seconds / 1e9, "GB/s"
    yield "device to host", part.nbytes / out_seconds / 1e9, "GB/s"
    yield "copies alone", copies, "s"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < ROOM * 4 * q.nbytes + sizes.bytes:
        return
    q, k, v = (x.to(device) for x in (q, k, v))
    alone = _seconds(lambda: stream_attention(q, k, v, chunk=sizes, device=device), device)
    yield "seconds on the device", alone, "s"
    yield "hidden copies", 1 - max(seconds - alone, 0.0) / copies, "of their time"


def _copy_seconds(part: Tensor, device: torch.device) -> tuple[float, float]:
    """Of a piece of pinned memory to the device, and back."""
    buffer = torch.empty_like(part, device=device)
    there = min(_seconds(lambda: buffer.copy_(part, non_blocking=True), device) for _ in range(3))
    return there, min(_seconds(lambda: part.copy_(buffer, non_blocking=True), device) for _ in range(3))


def _errors(q: Tensor, k: Tensor, v: Tensor, out: Tensor, device, checked: int) -> Iterator[tuple[str, float, str]]:
    """Relative L2 over sampled queries, head by head: in fp64 the scores of a head take 8 bytes a query and key."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randperm(q.shape[1], generator=generator)[:checked].sort().values
    ours = of_torch = whole = 0.0
    for head in range(q.shape[2]):
        one = slice(head, head + 1)
        queries = q[:, rows, one].to(device)
        keys, values = (x[:, :, one].to(device) for x in (k, v))
        expected = reference.attend(queries, keys, values)[0]
        plain = torch_attend(queries, keys.contiguous(), values.contiguous())[0]
        ours += (out[:, rows, one].to(device).double() - expected).square().sum().item()
        of_torch += (plain.double() - expected).square().sum().item()
        whole += expected.square().sum().item()
    yield "rel_l2", (ours / whole) ** 0.5, ""
    yield "rel_l2 of torch", (of_torch / whole) ** 0.5, ""


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal numbers in the host's memory, pinned where there is a GPU, which makes them."""
    made = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(seed)
    for start, stop in slices.ranges(shape[1], -(-shape[1] // 65536)):
        part = torch.randn(stop - start, *shape[2:], dtype=dtype, device=device, generator=generator)
        made[0, start:stop].copy_(part)
    return made


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
