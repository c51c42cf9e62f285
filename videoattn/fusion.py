"""A prologue in one pass of ours in the place of torch's many: who can, and whether that pass is right on this machine.

kernels/prepare.py makes q, k and v for any backend; one that quantises makes its operands itself (`plan_streams`). Either
is held against the prologue in torch before its first call, on random tokens that go through the host's own norms and
tables. What is found holds for calls of the kind, as long as the process lives.

Letters: B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from videoattn import guard
from videoattn.backend import Backend, RunStreams
from videoattn.call import Call
from videoattn.kernels import reference
from videoattn.policy import Decision, Dense, Sparse
from videoattn.prologue import Prologue, Stream
from videoattn.testing import excess
from videoattn.verify import FACTOR

TURNED, AROUND = 192, 40  # tokens of a check that the rotation turns, and before and after them

_found: dict[tuple, str | None] = {}


def refuses(prologue: Prologue, heads: int, streams: Sequence[Stream]) -> str | None:
    """Why no pass of ours does the work of `prologue(heads, *streams)`, or None."""
    reason = _unable(streams[0].q.device)
    if reason is None and any(x.numel() == 0 for stream in streams for x in (stream.q, stream.k)):
        reason = "takes no empty tensors"
    return reason or _kernels().refuses(prologue, heads, *streams)


def plan(backend: Backend, call: Call, decision: Decision, prologue: Prologue, flag: Tensor | None) -> RunStreams:
    """A callable for streams that make a call of exactly this shape, which `refuses` has nothing against."""
    if hasattr(backend, "plan_streams"):
        return backend.plan_streams(call, decision, prologue, flag)
    prepare, run = _kernels().prepare, backend.plan(call, decision, flag)
    return lambda streams, kv_len: run(*prepare(prologue, call.heads, *streams), None, kv_len, None)


def unfused(backend: Backend, call: Call, decision: Decision, prologue: Prologue, flag: Tensor | None) -> RunStreams:
    """The same, by the prologue in torch."""
    run = backend.plan(call, decision, flag)
    return lambda streams, kv_len: run(*prologue(call.heads, *streams), None, kv_len, None)


@torch.no_grad()
def fault(
    backend: Backend, call: Call, decision: Decision, prologue: Prologue, streams: Sequence[Stream]
) -> str | None:
    """What is wrong with a backend's plan for streams of this kind, None where it is right; found out once a process.

    While a CUDA graph is captured it is not found out, and the plan that is made then does without the pass.
    """
    if isinstance(decision, Sparse):  # what stands before it is what stands before dense attention
        backend, decision, call = backend.dense, Dense(decision.precision), replace(call, tokens=None, order="raster")
    key = (backend.name, decision, prologue, call.heads, call.head_dim, call.dtype, call.device, *map(kind, streams))
    if key not in _found:
        if guard.capturing(call.device):
            return "its check cannot run while a CUDA graph is captured"
        generator = torch.Generator(call.device).manual_seed(0)  # nobody's random numbers change
        given = [_part(stream, generator) for stream in streams]
        q_len, kv_len = (sum(getattr(stream, name).shape[1] for stream in given) for name in "qk")
        small = replace(call, batch=1, q_len=q_len, kv_len=kv_len, has_kv_len=False)
        with torch.autocast(call.device.type, enabled=False):
            q, k, v = prologue(call.heads, *map(_copy, given))
            exact, _ = reference.attend(q, k, v)
            by_torch = backend.plan(small, decision, guard.flag())(q, k, v, None, None, None)
            out = plan(backend, small, decision, prologue, guard.flag())(given, None)
        _found[key] = excess(out, exact, by_torch, factor=FACTOR)
    return _found[key]


def kind(stream: Stream) -> tuple:
    """What of a stream, beside its sizes, makes another pass: norms, tables, what is turned."""
    tables = None if stream.rope is None else (stream.rope[0].dtype, stream.rope[0].ndim, stream.rope_span is None)
    return _norm(stream.norm_q), _norm(stream.norm_k), tables, stream.q.shape[1] == stream.k.shape[1]


def _norm(norm: nn.Module | None) -> tuple:
    weights = (getattr(norm, name, None) for name in ("weight", "bias"))
    return type(norm), *(None if weight is None else weight.dtype for weight in weights)


def _copy(stream: Stream) -> Stream:
    """With tensors of its own: a prologue may write to those that it is given."""
    return replace(stream, q=stream.q.clone(), k=stream.k.clone(), v=stream.v.clone())


def _part(stream: Stream, generator: torch.Generator) -> Stream:
    """Random tokens in the place of the stream's: as many of them as a check needs, and the tables of those turned."""

    def tokens(x: Tensor, count: int) -> Tensor:
        return torch.randn(1, count, x.shape[2], generator=generator, device=x.device).to(x.dtype)

    if stream.rope is None:
        counts = (min(x.shape[1], TURNED) for x in (stream.q, stream.k, stream.v))
        return replace(
            stream, **{name: tokens(getattr(stream, name), n) for name, n in zip("qkv", counts, strict=True)}
        )
    every = range(stream.q.shape[1])
    span = every if stream.rope_span is None else every[stream.rope_span]
    before, turned, after = (
        min(n, most) for n, most in ((span.start, AROUND), (len(span), TURNED), (len(every) - span.stop, AROUND))
    )
    n = before + turned + after
    rope = tuple(table[:turned] if table.ndim == 2 else table[:1, :turned] for table in stream.rope)
    where = None if stream.rope_span is None else slice(before, before + turned)
    made = {name: tokens(getattr(stream, name), n) for name in "qkv"}
    return replace(stream, **made, rope=rope, rope_span=where)


@functools.cache
def _unable(device: torch.device) -> str | None:
    """Why no kernel of ours runs on a device, or None."""
    if device.type != "cuda":
        return "no GPU"
    if torch.version.hip is not None:
        return "not tested on ROCm"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "needs compute capability 8.0"


@functools.cache
def _kernels() -> ModuleType:
    """The module of the pass; only where Triton is installed."""
    return importlib.import_module("videoattn.kernels.prepare")
