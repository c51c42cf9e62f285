"""FLOPs, bytes and attention calls of a run, operator by operator, in a pass of its own; fake tensors do as well as real ones.

    counts = Counts(where=clock.where)
    with Scopes(components, counts, pipe), counts:
        pipe(...)
    counts.rows(), counts.calls

A dispatch mode sees the operators, a function mode sees `F.scaled_dot_product_attention` around those that it runs, and
`runner.watchers` tells of attention that our own kernels compute, which no mode sees. Every operator counts once: what runs
inside of an attention call of ours is not counted beside it.

The output keeps its bits: operators run as they were called. The function mode hides the fused path of
`nn.MultiheadAttention`, which no video pipeline of diffusers has. Tensor subclasses (quantised weights) write themselves out
in plain operators first, and those are counted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from videoattn import runner
from videoattn.policy import EXACT
from videoattn.profiling import costs
from videoattn.profiling.alive import Alive
from videoattn.profiling.categories import ATTENTION, NORMALISATION, PROLOGUE, SDPA, SDPA_BACKENDS, operator_of
from videoattn.profiling.profile import AttentionCall
from videoattn.profiling.running import BegunCall, Frame, Scores
from videoattn.profiling.scopes import ROOT, Scope
from videoattn.profiling.summary import ATTENTIONS

if TYPE_CHECKING:
    from videoattn.call import Call
    from videoattn.runner import Plan

Where = Callable[[], tuple[int, int, str]]
"""(step, steps, branch) of now; step -1 outside of a denoiser."""

Key = tuple[str, str, str]
"""(stage, module, operator)."""

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_FUSED = SDPA - {"_native_multi_head_attention"}  # what takes q, k and v
_PRODUCTS = ("bmm", "baddbmm")
_SOFTMAX = ("_softmax", "_safe_softmax", "softmax")


class Work(NamedTuple):
    """What operators of one kind in one module did.

    Args:
        calls: operators that computed or moved something; views are none.
        flops: of matrix products and convolutions.
        pointwise: elements written by the others, layout copies excepted.
        bytes: inputs read once, outputs written once, each operator for itself.
    """

    calls: int = 0
    flops: int = 0
    pointwise: int = 0
    bytes: int = 0


class Counts:
    """A context that counts; also a listener of `Scopes` and a watcher of `runner`.

    Args:
        where: asked at every attention call.
        memory: follow what is alive, for `peak_bytes`; what was made before the context counts nothing.
    """

    def __init__(self, *, where: Where = lambda: (-1, 0, ""), memory: bool = False) -> None:
        self.alive = Alive() if memory else None
        self._ran_silently: set[str] = set()  # attention modules
        self._where = where
        self._rows: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._calls: list[BegunCall] = []
        self._stack = [Frame(ROOT)]
        self._around: BegunCall | None = None  # the attention call that is being computed
        self._own = False  # by a kernel of ours
        self._whole = False  # inside of an operator that counts as a whole
        self._depth = 0  # of calls of the runner
        self._exit = ExitStack()

    def __enter__(self) -> None:
        self._exit.enter_context(_Functions(self))
        self._exit.enter_context(_Operators(self))
        if self not in runner.watchers:
            runner.watchers.append(self)
            self._exit.callback(runner.watchers.remove, self)

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def rows(self) -> dict[Key, Work]:
        """Work by (stage, module, operator). Attention in a row is what ran: with keys left out it is less than in `calls`."""
        return {key: Work(*row) for key, row in self._rows.items()}

    @property
    def calls(self) -> tuple[AttentionCall, ...]:
        """Attention calls in the order of the run, their `ms` 0."""
        return tuple(call.done() for call in self._calls)

    @property
    def silent(self) -> set[str]:
        """Attention modules that ran and in which no attention was recognised."""
        return self._ran_silently - {call.facts.site for call in self._calls}

    @property
    def peak_bytes(self) -> int:
        """The most that was alive at once of what was made here."""
        return self.alive.peak if self.alive else 0

    @property
    def peak_module(self) -> str:
        """The module that was running then."""
        return self.alive.module if self.alive else ""

    def overcounted(self) -> float:
        """FLOPs of attention in the rows over those of the calls, which are known by their shapes: over 1, something counts twice."""
        rows = sum(row[1] for (_, _, operator), row in self._rows.items() if operator in ATTENTIONS)
        calls = sum(call.facts.flops for call in self._calls)
        return rows / calls if calls else float(rows > 0)

    # ---- a listener of Scopes

    def enter(self, scope: Scope) -> None:
        self._stack.append(Frame(scope, self._stack[-1]))

    def leave(self, scope: Scope) -> None:
        frame = self._stack.pop()
        frame.settle()
        if frame.attention is frame and not frame.calls:
            self._ran_silently.add(scope.module)

    # ---- a watcher of the runner

    def begin(self, plan: Plan) -> None:
        self._depth += 1
        name, own = plan.choice.backend.name, plan.choice.backend.own
        if self._around is not None:  # inside of the operator videoattn::attend, which counts
            self._around.backend = self._around.backend or name
            return
        self._around = self._planned(plan.call)
        self._before(plan)
        self._around.backend, self._own = (name, True) if own else ("", False)

    def end(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._around is not None and not self._around.is_operator:
            call, self._around, self._own = self._around, None, False
            self._close(call)

    # ---- attention calls

    @contextmanager
    def attending(self, q: Tensor, k: Tensor, v: Tensor, layout: str, *, is_operator: bool = False) -> Iterator[None]:
        """Around what computes one attention call."""
        if self._around is not None:
            yield
            return
        call = self._around = self._open(q, k, v, layout)
        call.is_operator = is_operator
        computed = False
        try:
            yield
            computed = True
        finally:
            self._around = None
            if not computed:
                self._calls.remove(call)
        self._close(call)

    def _open(self, q: Tensor, k: Tensor, v: Tensor, layout: str) -> BegunCall:
        batch, heads, q_len, head_dim = _sizes(q, layout)
        _, kv_heads, kv_len, v_dim = _sizes(v, layout)
        out = batch * heads * q_len * v_dim * q.element_size()
        return self._call(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            dtype=_name(q.dtype),
            bytes=costs.nbytes(q) + costs.nbytes(k) + costs.nbytes(v) + out,
        )

    def _planned(self, call: Call) -> BegunCall:
        """Of a call of ours, whose q, k and v are read once and whose output is written once."""
        rows = 2 * call.q_len * call.heads + 2 * call.kv_len * call.kv_heads
        return self._call(
            batch=call.batch,
            heads=call.heads,
            kv_heads=call.kv_heads,
            q_len=call.q_len,
            kv_len=call.kv_len,
            head_dim=call.head_dim,
            dtype=_name(call.dtype),
            bytes=call.batch * rows * call.head_dim * call.dtype.itemsize,
        )

    def _before(self, plan: Plan) -> None:
        """Of a pass of ours in front of a call: q, k and v, or q and k alone, are read once and written once."""
        call, quantises = plan.call, plan.choice.decision != EXACT
        if not plan.fused and not quantises:
            return
        tokens = call.q_len * call.heads + call.kv_len * call.kv_heads * (2 if quantises else 1)
        elements = call.batch * tokens * call.head_dim
        written = 1 if quantises else call.dtype.itemsize
        self._add(PROLOGUE, 0, elements, elements * (call.dtype.itemsize + written))

    def _call(self, *, q_len: int, kv_len: int, heads: int, batch: int, head_dim: int, **facts: Any) -> BegunCall:
        frame = self._stack[-1]
        site = frame.attention or frame
        step, steps, branch = self._where()
        known = AttentionCall(
            stage=frame.scope.stage,
            site=site.scope.module,
            kind=frame.scope.kind,
            step=step,
            steps=steps,
            branch=branch,
            batch=batch,
            heads=heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            flops=4 * batch * heads * q_len * kv_len * head_dim,
            backend="",
            ms=0.0,
            **facts,
        )
        call = BegunCall(known)
        self._calls.append(call)
        frame.calls.append(call)
        return call

    def _close(self, call: BegunCall) -> None:
        """Where no operator of the call was seen (a kernel of ours, a stand-in), it counts by its shapes."""
        call.backend = call.backend or ("sdpa_math" if call.seen else "sdpa")
        if not call.seen:
            self._add(call.kind or ATTENTION, call.facts.flops, 0, call.facts.bytes)

    # ---- operators

    def whole(self, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        """Run a norm that is one kernel, though a dispatch mode makes torch write it out in small operators."""
        self._whole, before = True, self._whole
        try:
            out = func(*args, **kwargs)
        finally:
            self._whole = before
        frame = self._stack[-1]
        if self.alive is not None:
            self.alive.see((args, kwargs), out, frame.scope.module)
        if not before and not self._own:
            read = sum(map(costs.nbytes, costs.tensors([args, kwargs])))
            self._add(NORMALISATION, 0, out.numel(), read + costs.nbytes(out))
        return out

    def count(self, func: costs.Operator, args: tuple, kwargs: dict, out: Any) -> None:
        """An operator has run."""
        frame, known = self._stack[-1], costs.signature(func)
        if self._whole:
            return
        if self.alive is not None:
            self.alive.see((args, kwargs), out, frame.scope.module)
        if self._own:
            return
        flops, traffic = costs.flops(func, args, kwargs, out), costs.traffic(func, args, kwargs, out)
        moved = traffic.read + traffic.written
        if not flops and not moved:
            return
        call = self._around
        if call is None and known.name in _FUSED:  # called past F.scaled_dot_product_attention
            call = self._open(*args[:3], "BHND")
            call.backend = SDPA_BACKENDS.get(known.name, known.name)
        if call is not None:
            operator = call.kind or ATTENTION
            call.seen = call.seen or flops > 0
            call.backend = call.backend or SDPA_BACKENDS.get(known.name, "")
        else:
            operator = operator_of(known.name, frame.scope.role, frame.scope.kind)
            if operator == "layout" and costs.crosses(args, out):
                operator = "transfer"
            self._notice(frame, known.name, args, out)
        self._add(operator, flops, traffic.elements if known.pointwise else 0, moved)
        if operator == "layout":
            frame.layout += moved

    def _add(self, operator: str, flops: int, pointwise: int, moved: int) -> None:
        scope = self._stack[-1].scope
        row = self._rows[scope.stage, scope.module, operator]
        for index, amount in enumerate((1, flops, pointwise, moved)):
            row[index] += amount

    def _notice(self, frame: Frame, op: str, args: tuple, out: Any) -> None:
        """Recover the calls of attention that is written out in an attention module: product, softmax, product."""
        if frame.attention is None:
            return
        if op in ("mm", "addmm") and not frame.attention.width:  # the first projection is that of the queries
            frame.attention.width = out.shape[-1]
        if frame.scope.role != ATTENTION:
            return
        if op in _SOFTMAX:
            frame.weights = out.shape
        elif op in _PRODUCTS:
            a, b = args[-2:]
            if frame.scores is not None and len(frame.weights) > 2 and a.shape[-2:] == frame.weights[-2:]:
                self._unfused(frame, frame.scores, b)
                frame.scores, frame.weights = None, ()
            else:
                frame.scores = Scores(*a.shape, b.shape[-1], costs.nbytes(a) + costs.nbytes(b))

    def _unfused(self, frame: Frame, scores: Scores, v: Tensor) -> None:
        heads = frame.weights[1] if len(frame.weights) == 4 else frame.width // scores.head_dim
        if not heads or scores.rows % heads:
            heads = 1
        out = scores.rows * scores.q_len * v.shape[-1] * v.element_size()
        call = self._call(
            batch=scores.rows // heads,
            heads=heads,
            kv_heads=heads,
            q_len=scores.q_len,
            kv_len=scores.kv_len,
            head_dim=scores.head_dim,
            dtype=_name(v.dtype),
            bytes=scores.bytes + costs.nbytes(v) + out,
        )
        call.backend = "unfused"


class _Functions(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.rms_norm and _is_one_kernel(args[0] if args else kwargs["input"]):
            return self._counts.whole(func, args, kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        with self._counts.attending(q, k, v, "BHND"):
            return func(*args, **kwargs)


def _is_one_kernel(x: Tensor) -> bool:
    """Whether torch has a kernel for the RMSNorm of x: on a GPU, for which a tensor without memory stands."""
    return x.device.type in ("cuda", "meta") or isinstance(x, FakeTensor)


class _Operators(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # the subclass writes itself out in plain operators, which come here again
        if costs.is_composite(func):
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if costs.signature(func).name != "videoattn::attend":
            out = func(*args, **kwargs)
            self._counts.count(func, args, kwargs, out)
            return out
        with self._counts.attending(*args[:3], args[6], is_operator=True):
            out = func(*args, **kwargs)
            self._counts.count(func, args, kwargs, out)
            return out


def _sizes(tensor: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, tokens and head_dim of q, k or v; torch's SDPA takes two dimensions and more."""
    shape = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    *batch, a, b, head_dim = shape
    heads, tokens = (b, a) if layout == "BNHD" else (a, b)
    return math.prod(batch), heads, tokens, head_dim


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
