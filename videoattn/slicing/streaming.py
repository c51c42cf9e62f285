"""Attention of sequences that do not fit on the device: K and V, and q and the output too, stay in the host's memory.

After the offloading of FastAttention (Lin et al., arXiv:2410.16663), which computes such layers on the host; here the device
computes them, exactly, and the host only keeps them. Blocks of queries come one after the other, and past each go all keys
and values, chunk by chunk: while one chunk is at work, a second stream brings the next into the other of two buffers. What
chunks give is merged by its log-sum-exps (kernels/merge.py).

A chunk of n keys is copied in 2 n H D b / W seconds and at work for 4 M n H D / F, for M queries of a block, b bytes an
element, W bytes and F FLOP a second: copies hide from M = F b / (2 W) on. An H200 with 600 TFLOP/s and 50 GB/s needs 12,000
queries. Blocks of queries walk through the keys to and fro, so that the last two chunks need not come again.

Letters: B batch, N queries, Nk keys, H heads, Hkv key heads, D head_dim; M queries of a block, n keys of a chunk.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from videoattn.kernels import merge
from videoattn.slicing import budget, slices

Attend = Callable[..., tuple[Tensor, Tensor]]
"""(q [B, M, H, D], k, v [B, n, Hkv, D], scale=float | None) -> out [B, M, H, D] and lse [B, H, M], natural logarithm."""

QUERIES, KEYS = 384, 128
"""Blocks of queries are multiples of what every kernel's tiles divide; so are chunks of keys."""
ENOUGH_KEYS = 65536
"""Of a chunk: to merge it then takes half a percent of its attention, and a longer one only takes room from queries."""
ELEMENTS = 2**31 - 1  # of one tensor on the device: kernels may count them in 32 bits


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How a call is cut.

    Args:
        queries: of a block. keys: of a chunk.
        bytes: that the device holds of it at most, as predicted, where all four tensors are the host's; 0 where nobody did.
    """

    queries: int
    keys: int
    bytes: int = 0

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1:
            raise ValueError(f"Sizes: wanted 1 query and 1 key at least, got {self.queries} and {self.keys}")


def plan(
    n: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    budget_bytes: int | str,
    *,
    batch: int = 1,
    keys: int | None = None,
    kv_heads: int | None = None,
) -> Sizes:
    """The largest blocks that fit: queries first, for they hide the copies, once chunks of keys are long enough.

    Args:
        n: queries, and keys where `keys` is None. kv_heads: heads of k and v, those of q where None.
        budget_bytes: that q, k, v, the output and what is computed of them may take on the device; "8GiB" or a number.

    Raises:
        ValueError: the smallest blocks do not fit.
    """
    allowed = budget.parse(budget_bytes, "budget_bytes")
    keys, kv_heads = keys or n, kv_heads or heads
    size = functools.partial(predicted, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, batch=batch)
    least = size(min(QUERIES, n), min(KEYS, keys))
    if least > allowed:
        raise ValueError(
            f"budget_bytes: wanted {least} at least for {heads} heads of {head_dim} in {dtype}, got {allowed}"
        )
    a_key, a_query = size(0, 1), size(1, 0)
    most_keys = max(KEYS, min(ENOUGH_KEYS, allowed // 4 // a_key, ELEMENTS // (batch * kv_heads * head_dim)))
    chunk = _even(keys, most_keys, KEYS)
    if size(min(QUERIES, n), chunk) > allowed:
        chunk = min(KEYS, keys)
    most_queries = min((allowed - size(0, chunk)) // a_query, ELEMENTS // (batch * heads * head_dim))
    block = _even(n, max(most_queries, min(QUERIES, n)), QUERIES)
    return Sizes(queries=block, keys=chunk, bytes=size(block, chunk))


def predicted(
    queries: int, keys: int, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes on the device: two chunks of k and v; q, what a chunk gives and the fp32 sum of a block; six rows of scalars."""
    of_keys = 4 * batch * keys * kv_heads * head_dim * dtype.itemsize
    return of_keys + batch * queries * heads * (head_dim * (2 * dtype.itemsize + 4) + 6 * 4)


def _even(size: int, most: int, multiple: int) -> int:
    """Rows of a block: as many blocks as `most` makes of `size`, all alike, of whole multiples where that fits."""
    if size <= most:
        return size
    block = -(-size // -(-size // most))
    rounded = -(-block // multiple) * multiple
    return rounded if rounded <= most else max(most // multiple * multiple, 1)


def stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: Sizes | int,
    scale: float | None = None,
    attend: Attend | None = None,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention, some queries and some keys on the device at a time.

    Args:
        q: [B, N, H, D]. k, v: [B, Nk, Hkv, D]. Each on the device, any strides, or in the host's memory: pinned, where the
            device is a GPU, and contiguous but for the batch.
        chunk: `plan` makes it; an int: as many queries and keys.
        scale: factor on q k^T; 1 / sqrt(D) by default.
        attend: computes a block of queries and a chunk of keys; on a GPU our kernel for it, or torch's.
        out: where the output goes, as q: shape, dtype, and where it may lie; made where q lies by default.
        device: computes; where q, k or v lies by default.

    Returns:
        out, complete when this returns where it is the host's, else on the current stream as ever; and the log-sum-exp fp32
        [B, H, N] on the device, or None.

    Raises:
        ValueError: shapes, dtypes or places that do not fit.
    """
    device = _device(device, q, k, v)
    sizes = Sizes(queries=chunk, keys=chunk) if isinstance(chunk, int) else chunk
    if out is None:
        pinned = q.device.type == "cpu" and device.type == "cuda"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device, pin_memory=pinned)
    _validate(q, k, v, out, device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=device) if return_lse else None
    if q.numel() == 0:
        return out, lse
    if k.shape[1] == 0:  # rows without a key
        return out.zero_(), None if lse is None else lse.fill_(-torch.inf)
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _Stream(q, k, v, out, lse, sizes, attend or default_attend(q.dtype, q.shape[3], device), scale, device).run()
    return out, lse


class _Lanes:
    """Two streams of a GPU, one that computes and one that copies; on a CPU everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self.compute = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.copies is not None:
            self.copies.wait_stream(self.compute)  # new buffers may lie where its work still goes on

    def copying(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.copies is None else torch.cuda.stream(self.copies)

    def mark(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        return None if stream is None else stream.record_event()

    def wait(self, stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
        if stream is not None and event is not None:
            stream.wait_event(event)

    def finish(self, host_waits: bool) -> None:
        if self.copies is None:
            return
        self.compute.wait_stream(self.copies)  # before the buffers are anyone else's
        if host_waits:
            self.copies.synchronize()


class _Stream:
    """One call; its buffers are made once."""

    def __init__(self, q, k, v, out, lse, sizes: Sizes, attend: Attend, scale: float | None, device) -> None:
        self.q, self.k, self.v, self.out, self.lse = q, k, v, out, lse
        self.attend = functools.partial(attend, scale=scale)
        self.lanes = _Lanes(device)
        # On a CPU all of it is the host's: the same way, for tests.
        self.here = {x: y.device == device and device.type != "cpu" for x, y in (("q", q), ("out", out), ("keys", k))}
        self.blocks = _pieces(q.shape[1], sizes.queries)
        self.chunks = _pieces(k.shape[1], sizes.keys)
        b, _, h, d = q.shape
        rows = min(sizes.queries, q.shape[1])
        self.q_buffer = None if self.here["q"] and self.here["out"] else q.new_empty(b, rows, h, d, device=device)
        self.sum = torch.empty(b, rows, h, d, device=device)  # fp32
        self.slots: list[tuple[Tensor, Tensor]] = []
        if not self.here["keys"]:
            keys = min(sizes.keys, k.shape[1])
            for _ in range(min(2, len(self.chunks))):
                self.slots.append(tuple(x.new_empty(b, keys, *x.shape[2:], device=device) for x in (k, v)))
        self.held: list[int | None] = [None] * len(self.slots)  # which chunk
        self.came: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.free: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.q_free: torch.cuda.Event | None = None

    def run(self) -> None:
        steps = list(self._steps())
        self._bring(steps[0][1], None)
        for index, (block, chunk) in enumerate(steps):
            if index == 0 or steps[index - 1][0] != block:
                queries, first = self._queries(*self.blocks[block]), True
            if index + 1 < len(steps):
                self._bring(steps[index + 1][1], chunk)
            k, v = self._keys(chunk)
            out, lse_of_chunk = self.attend(queries, k, v)
            total = self.sum[:, : queries.shape[1]]
            if first:
                total.copy_(out)
                lse, first = lse_of_chunk.float(), False
            else:
                merge.add(total, lse, out, lse_of_chunk)
            del out, lse_of_chunk  # before the next are made
            if self.slots:
                self.free[self.held.index(chunk)] = self.lanes.mark(self.lanes.compute)
            if index + 1 == len(steps) or steps[index + 1][0] != block:
                del queries
                self._put(total, lse, *self.blocks[block])
        self.lanes.finish(host_waits=not self.here["out"])

    def _steps(self) -> Iterator[tuple[int, int]]:
        """(block, chunk): the chunks forth and back."""
        for block in range(len(self.blocks)):
            chunks = range(len(self.chunks))
            yield from ((block, chunk) for chunk in (reversed(chunks) if block % 2 else chunks))

    def _bring(self, chunk: int, at_work: int | None) -> None:
        """A chunk's copy, in the buffer that is not at work, as soon as what was there has been used."""
        if not self.slots or chunk in self.held:
            return
        slot = 0 if self.held[0] is None or self.held[0] != at_work else 1
        (start, stop), copies = self.chunks[chunk], self.lanes.copies
        self.lanes.wait(copies, self.free[slot])
        with self.lanes.copying():
            for buffer, x in zip(self.slots[slot], (self.k, self.v), strict=True):
                _copy_rows(buffer, x, start, stop)
        self.held[slot], self.came[slot] = chunk, self.lanes.mark(copies)

    def _keys(self, chunk: int) -> tuple[Tensor, Tensor]:
        start, stop = self.chunks[chunk]
        if not self.slots:
            return self.k[:, start:stop], self.v[:, start:stop]
        slot = self.held.index(chunk)
        self.lanes.wait(self.lanes.compute, self.came[slot])
        k, v = self.slots[slot]
        return k[:, : stop - start], v[:, : stop - start]

    def _queries(self, start: int, stop: int) -> Tensor:
        if self.here["q"]:
            return self.q[:, start:stop]
        self.lanes.wait(self.lanes.copies, self.q_free)
        with self.lanes.copying():
            _copy_rows(self.q_buffer, self.q, start, stop)
        self.lanes.wait(self.lanes.compute, self.lanes.mark(self.lanes.copies))
        return self.q_buffer[:, : stop - start]

    def _put(self, total: Tensor, lse: Tensor, start: int, stop: int) -> None:
        """A block's output to where it goes; by way of the buffer of its queries, which are done with."""
        if self.lse is not None:
            self.lse[..., start:stop] = lse
        if self.here["out"]:
            self.out[:, start:stop] = total
            self.q_free = self.lanes.mark(self.lanes.compute)
            return
        rounded = self.q_buffer[:, : stop - start]
        self.lanes.wait(
            self.lanes.compute, self.q_free
        )  # where q is the device's: the last output is on its way from there
        rounded.copy_(total)
        self.lanes.wait(self.lanes.copies, self.lanes.mark(self.lanes.compute))
        with self.lanes.copying():
            for row, of_block in zip(self.out, rounded, strict=True):
                row[start:stop].copy_(of_block, non_blocking=True)
        self.q_free = self.lanes.mark(self.lanes.copies)


def _pieces(size: int, most: int) -> list[tuple[int, int]]:
    return list(slices.ranges(size, -(-size // most)))


def _copy_rows(buffer: Tensor, x: Tensor, start: int, stop: int) -> None:
    """Row by row of the batch: each is one run of memory, which a copy takes without the host's waiting."""
    for to, row in zip(buffer, x, strict=True):
        to[: stop - start].copy_(row[start:stop], non_blocking=True)


def _device(device: torch.device | str | None, *tensors: Tensor) -> torch.device:
    if device is None:
        return next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _validate(q: Tensor, k: Tensor, v: Tensor, out: Tensor, device: torch.device) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"stream_attention: wanted q [B, N, H, D] and k, v [B, Nk, Hkv, D], got {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if q.shape[2] % max(k.shape[2], 1):
        raise ValueError(f"k: wanted heads that divide q's {q.shape[2]}, got {k.shape[2]}")
    if out.shape != q.shape:
        raise ValueError(f"out: wanted q's shape {tuple(q.shape)}, got {tuple(out.shape)}")
    if k.device != v.device:
        raise ValueError(f"v: wanted it on k's {k.device}, got {v.device}")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            raise ValueError(f"{name}: wanted q's float dtype {q.dtype}, got {x.dtype}")
        if x.device == device:
            continue
        if x.device.type != "cpu":
            raise ValueError(f"{name}: wanted it on {device} or in the host's memory, got {x.device}")
        if not x.is_pinned():
            raise ValueError(f"{name}: wanted pinned memory (x.pin_memory()), whose copies hide, got pageable memory")
        if x.shape[0] and not x[0].is_contiguous():
            raise ValueError(f"{name}: wanted rows of tokens side by side, got strides {x.stride()}")


@functools.cache
def default_attend(dtype: torch.dtype, head_dim: int, device: torch.device) -> Attend:
    """Our kernel for the card, or torch's that gives its log-sum-exps; which one is told by its module and name."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    own = torch.version.hip is None and importlib.util.find_spec("triton") is not None and head_dim % 4 == 0
    if (
        own
        and capability >= (8, 0)
        and 4 <= head_dim <= 256
        and dtype in (torch.float16, torch.bfloat16, torch.float32)
    ):
        from videoattn.kernels import flash

        if capability == (9, 0) and dtype != torch.float32 and head_dim % 8 == 0 and head_dim >= 16:
            from videoattn.kernels import flash_hopper

            return functools.partial(flash_hopper.attend, return_lse=True)
        return functools.partial(flash.attend, return_lse=True)
    return torch_attend


def torch_attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """torch's fused kernels, as `Attend`: FlashAttention 2 on a CPU, memory-efficient attention on a GPU of any age."""
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, False, scale=scale
        )
        lse = lse[..., : q.shape[2]]  # it is padded
    return out.transpose(1, 2), lse
