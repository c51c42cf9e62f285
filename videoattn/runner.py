"""From a decision to a kernel: one Runner for all sites that decide alike, one plan for each shape it meets.

Eager calls look the plan up by shape and go straight to it. While torch.compile traces, the call becomes one operator,
`videoattn::attend`, which does the same look-up when the graph runs: nothing is decided inside a compiled graph, and a
new shape or step needs no new graph.

A graph knows its runner by a number that stands for what is computed (kind, decision, backend), not for the object:
enabling again with the same settings, on this or another pipeline, needs no new graph, and other settings need one.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from videoattn import fusion, guard
from videoattn.backend import Choice, Run, RunStreams, select
from videoattn.call import Call, Grid, Kind, Layout, Step
from videoattn.policy import EXACT, Decision, Sparse
from videoattn.prologue import Prologue, Stream
from videoattn.selection.arrangement import Order, Tokens
from videoattn.selection.kept import Kept
from videoattn.verify import select_verified


@dataclass(slots=True)
class Plan:
    """A planned call, how often it ran, and the flag of a kernel of ours that runs it.

    `run` takes q, k, v, mask, kv_len and scale; or streams and kv_len, where there is a `prologue`: in plans of
    `Runner.attend`. `fused` tells whether a pass of ours does its work.
    """

    call: Call
    choice: Choice
    run: Run | RunStreams
    flag: Tensor | None = None
    calls: int = 0
    prologue: Prologue | None = None
    fused: bool = False


class Watcher(Protocol):
    """A profiler that wants to know which kernel computes a call: kernels of ours are launched past torch's dispatcher."""

    def begin(self, plan: Plan) -> None:
        """The plan is about to run."""

    def end(self) -> None:
        """It has run, or has raised."""


watchers: list[Watcher] = []
"""Those that watch right now; empty but while a profiler records."""


Observer = Callable[[Plan, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | None], None]
"""(plan, q, k, v, mask, kv_len, scale), as `Runner.__call__` has them."""

observers: list[Observer] = []
"""Those that want the tensors of every call before it runs; while there are any, a prologue is not fused."""


class Runner:
    """Attention for every site of one kind that decides alike.

    Args:
        kind: what attends to what.
        decision: what the policy allows.
        backend: a backend's name, or "auto".

    Sites may differ in what a compiled graph need not know (windows of their own): `placed` is for those.
    """

    def __init__(self, kind: Kind, decision: Decision, backend: str = "auto") -> None:
        self.kind = kind
        self.decision = decision
        self.decisions = [decision]  # of the places, the first for whoever names none
        self.backend = backend
        self.plans: dict[tuple, Plan] = {}
        self.sparse = isinstance(decision, Sparse)
        self.kept = Kept(decision.keep_steps) if self.sparse else None
        self._not_finite = ""  # why nothing is left out any more, if that is so
        self._grid: Grid | None = None
        self._order: Order = "raster"
        self.planning_seconds = 0.0
        self.key = _key(kind, decision, backend)
        self.serve()

    def __reduce__(self):  # a copy makes its own plans
        return Runner, (self.kind, self.decision, self.backend), {"decisions": list(self.decisions)}

    def placed(self, decision: Decision) -> Placed:
        """For sites that decide this instead, in the same graphs: their place reaches the kernels as a number in a tensor."""
        if decision not in self.decisions:
            self.decisions.append(decision)
        return Placed(self, self.decisions.index(decision))

    def begin(self, step: Step, order: Order) -> None:
        """A forward of the denoiser is about to run, whose video tokens lie in `order`. Only what is sparse goes by it."""
        self.serve()
        if self.sparse:
            self.kept.begin(step)
            self._grid, self._order = step.grid, order

    def serve(self) -> None:
        """Take the calls of compiled graphs and of `entry` from now on; whoever shares the key computes the same."""
        _serving[self.key] = self

    @property
    def entry(self) -> Callable[..., Tensor]:
        """A function with the arguments of a call, the same one for all runners of this key: it reaches who serves."""
        return _entry(self.key)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        kv_len: Tensor | None = None,
        scale: float | None = None,
        layout: Layout = "BNHD",
        causal: bool = False,
        place: Tensor | None = None,
    ) -> Tensor:
        """Attention of one call.

        Args:
            q: [B, Nq, H, D]; k, v: [B, Nk, Hkv, D]; or [B, H, N, D] with layout "BHND".
            mask: broadcastable to [B, H, Nq, Nk], of two dimensions at least; bool (True: attend) or additive.
            kv_len: int32 [B]: row b attends to its first kv_len[b] keys.
            scale: factor on q k^T; 1 / sqrt(D) by default.
            layout: dimension order of q, k, v and the output.
            causal: query i sees keys 0..i only.
            place: int64 [] on the CPU, which decision it goes by; the runner's where None.

        Returns:
            The output in q's shape, dtype and layout.
        """
        if torch.compiler.is_compiling():
            return torch.ops.videoattn.attend(q, k, v, mask, kv_len, scale, layout, causal, self.key, place)
        key = (
            q.shape,
            k.shape,
            q.dtype,
            q.device,
            layout,
            mask if mask is None else mask.dtype,
            kv_len is None,
            causal,
            self._grid,
            self._order,
            0 if place is None else int(place),
        )
        plan = self.plans.get(key)
        if plan is None:
            plan = self._new_plan(key, self._plan, q, k, v, mask, kv_len, layout, causal)
        plan.calls += 1
        for observer in observers:
            observer(plan, q, k, v, mask, kv_len, scale)
        if watchers:
            return _watched(plan, q, k, v, mask, kv_len, scale)
        return plan.run(q, k, v, mask, kv_len, scale)

    def attend(
        self,
        prologue: Prologue,
        heads: int,
        *streams: Stream,
        kv_len: Tensor | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """Attention of raw projections; what turns them into q, k and v is a pass of ours where one can do it.

        While torch.compile traces, the prologue stays in torch, where the compiler fuses it.

        Args:
            streams: consumed, as by the prologue itself.
            kv_len: int32 [B]: row b attends to its first kv_len[b] keys.
            place: as of `__call__`.

        Returns:
            The output [B, Nq, H, D].
        """
        # No name is kept for a projection here: it goes as soon as what follows from it exists.
        elsewhere = kv_len is not None and kv_len.device != streams[0].q.device
        if (
            torch.compiler.is_compiling()
            or observers
            or elsewhere
            or fusion.refuses(prologue, heads, streams) is not None
        ):
            return self(*prologue(heads, *streams), None, kv_len, place=place)
        shapes = ((stream.q.shape, stream.k.shape, *fusion.kind(stream)) for stream in streams)
        first = streams[0].q
        number = 0 if place is None else int(place)
        key = (prologue, heads, *shapes, first.dtype, first.device, kv_len is None, self._grid, self._order, number)
        plan = self.plans.get(key)
        if plan is None:
            plan = self._new_plan(key, self._plan_streams, prologue, heads, streams, kv_len)
        plan.calls += 1
        if watchers:
            return _watched(plan, streams, kv_len)
        return plan.run(streams, kv_len)

    def _new_plan(self, key: tuple, make: Callable[..., Plan], *args) -> Plan:
        started = perf_counter()
        plan = self.plans[key] = make(self.decisions[key[-1]], *args)
        self.planning_seconds += perf_counter() - started
        return plan

    def _plan(self, decision: Decision, q, k, v, mask, kv_len, layout, causal) -> Plan:
        for name, other in (("k", k), ("v", v), ("mask", mask), ("kv_len", kv_len)):
            if other is not None and other.device != q.device:
                raise ValueError(f"{name} of {self.kind} attention: wanted it on q's {q.device}, got {other.device}")
        for name, other in (("k", k), ("v", v)):
            if other.dtype != q.dtype:
                raise ValueError(f"{name} of {self.kind} attention: wanted q's {q.dtype}, got {other.dtype}")
        n, h = (1, 2) if layout == "BNHD" else (2, 1)
        if k.shape[h] and q.shape[h] % k.shape[h]:
            raise ValueError(
                f"k of {self.kind} attention: wanted its heads to divide q's {q.shape[h]}, got {k.shape[h]}"
            )
        call = Call(
            kind=self.kind,
            layout=layout,
            batch=q.shape[0],
            q_len=q.shape[n],
            kv_len=k.shape[n],
            heads=q.shape[h],
            kv_heads=k.shape[h],
            head_dim=q.shape[3],
            dtype=q.dtype,
            device=q.device,
            mask="none" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
            has_kv_len=kv_len is not None,
            causal=causal,
            tokens=self._tokens(q.shape[n]),
            order=self._order,
        )
        if 0 in (call.batch, call.q_len, call.kv_len):  # a row without a key is 0; no kernel sees an empty product
            choice = select(call, decision, self.backend)
            return Plan(call, choice, lambda q, k, v, mask, kv_len, scale: torch.zeros_like(q))
        choice = self._choose(call, decision)
        flag = guard.flag() if choice.backend.own else None
        return Plan(call, choice, choice.backend.plan(call, choice.decision, flag), flag)

    def _plan_streams(
        self,
        decision: Decision,
        prologue: Prologue,
        heads: int,
        streams: Sequence[Stream],
        kv_len: Tensor | None,
    ) -> Plan:
        first = streams[0]
        head_dim = first.q.shape[2] // heads
        call = Call(
            kind=self.kind,
            layout="BNHD",
            batch=first.q.shape[0],
            q_len=sum(stream.q.shape[1] for stream in streams),
            kv_len=sum(stream.k.shape[1] for stream in streams),
            heads=heads,
            kv_heads=first.k.shape[2] // head_dim,
            head_dim=head_dim,
            dtype=first.q.dtype,
            device=first.q.device,
            has_kv_len=kv_len is not None,
            tokens=self._tokens(sum(stream.q.shape[1] for stream in streams)),
            order=self._order,
        )
        choice = self._choose(call, decision)
        flag = guard.flag() if choice.backend.own else None
        planned = choice.backend, call, choice.decision, prologue
        reason = fusion.fault(*planned, streams)
        if reason is not None:
            why = f"norm and rotation in torch, since in one pass: {reason}"
            warnings.warn(f"{call}: {why}", RuntimeWarning, stacklevel=2)
            choice = replace(choice, why="; ".join(part for part in (why, choice.why) if part))
            return Plan(call, choice, fusion.unfused(*planned, flag), flag, prologue=prologue)
        return Plan(call, choice, fusion.plan(*planned, flag), flag, prologue=prologue, fused=True)

    def _tokens(self, count: int) -> Tokens | None:
        """What a sequence of self-attention consists of: the video, then text; None where that is not known."""
        if self._grid is None or count < self._grid.tokens:
            return None
        return Tokens(grid=self._grid, after=count - self._grid.tokens)

    def _choose(self, call: Call, decision: Decision) -> Choice:
        if self._not_finite:  # as `_replace` has it; tokens in another order make another plan of the same call
            return select(call, EXACT, failed=lambda backend: self._not_finite if backend.own else None)
        choice = select_verified(call, decision, self.backend)
        if isinstance(choice.decision, Sparse):
            return replace(choice, backend=choice.backend.keeping(self.kept))
        return choice

    def replace_flagged(self) -> list[str]:
        """Take torch's exact attention where an output of ours was not finite; a line on each such plan.

        A backend that was named stays. A plan that was replaced may be found again, where a CUDA graph still runs it.
        """
        flagged = [plan for plan in self.plans.values() if plan.flag is not None and guard.lower(plan.flag)]
        for plan in flagged:
            if plan.choice.backend.own:
                self._replace(plan)
        return [f"{plan.choice.why}: {plan.call}" for plan in flagged]

    def named(self, plan: Plan) -> bool:
        """Whether the plan's backend was asked for by name; for exact calls one that quantises is not."""
        return plan.choice.backend.name == self.backend

    def _replace(self, plan: Plan) -> None:
        reason, choice = f"output of {plan.choice.backend.name} was not finite", plan.choice
        if not self.named(plan):
            if self.sparse:
                self._not_finite = reason
            choice = select(plan.call, EXACT, failed=lambda backend: reason if backend.own else None)
            if plan.prologue is None:
                plan.run = choice.backend.plan(plan.call, EXACT)
            else:
                plan.run = fusion.unfused(choice.backend, plan.call, EXACT, plan.prologue, None)
                plan.fused = False
        plan.choice = replace(choice, why=reason)


class Placed:
    """A runner as sites of one place call it."""

    def __init__(self, runner: Runner, number: int) -> None:
        self.runner = runner
        self.number = number
        self.sparse = runner.sparse
        with torch.inference_mode(False):  # or graphs would tell it from others
            self.place = torch.tensor(number)

    @property
    def decision(self) -> Decision:
        return self.runner.decisions[self.number]

    @property
    def plans(self) -> dict[tuple, Plan]:
        return {key: plan for key, plan in self.runner.plans.items() if key[-1] == self.number}

    def __call__(self, *args, **kwargs) -> Tensor:
        return self.runner(*args, **kwargs, place=self.place)

    def attend(self, prologue: Prologue, heads: int, *streams: Stream, kv_len: Tensor | None = None) -> Tensor:
        return self.runner.attend(prologue, heads, *streams, kv_len=kv_len, place=self.place)


def _watched(plan: Plan, *args) -> Tensor:
    present = tuple(watchers)
    for watcher in present:
        watcher.begin(plan)
    try:
        return plan.run(*args)
    finally:
        for watcher in reversed(present):
            watcher.end()


_numbers = itertools.count()
_serving: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()


@functools.cache
def _key(kind: Kind, decision: Decision, backend: str) -> int:
    return next(_numbers)


@functools.cache
def _entry(key: int) -> Callable[..., Tensor]:
    def attend(q, k, v, mask=None, kv_len=None, scale=None, layout="BNHD", causal=False):
        if torch.compiler.is_compiling():
            return torch.ops.videoattn.attend(q, k, v, mask, kv_len, scale, layout, causal, key)
        return _serving[key](q, k, v, mask, kv_len, scale, layout, causal)

    return attend


_library = torch.library.Library("videoattn", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? kv_len, float? scale, str layout, bool causal, int runner, "
    "Tensor? place=None) -> Tensor"
)


def _attend(q, k, v, mask, kv_len, scale, layout, causal, runner, place=None):
    out = _serving[runner](q, k, v, mask, kv_len, scale, layout, causal, place)
    # One stride order for every kernel, as the fake below promises to the compiler.
    return out.contiguous() if layout == "BNHD" else out.transpose(1, 2).contiguous().transpose(1, 2)


def _attend_fake(q, k, v, mask, kv_len, scale, layout, causal, runner, place=None):
    if layout == "BNHD":
        return q.new_empty(q.shape)
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2)


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("videoattn::attend", _attend_fake, lib=_library)


@register_flop_formula(torch.ops.videoattn.attend)
def _attend_flops(q, k, v, mask, kv_len, scale, layout, causal, runner, *args, out_shape=None, **kwargs) -> int:
    if layout == "BNHD":
        q, k, v = ((b, h, n, d) for b, n, h, d in (q, k, v))
    b, h, nq, d = q
    return sdpa_flop_count((b, h, nq, d), (b, h, k[2], d), (b, h, v[2], d))
