"""Attention over all tokens whose queries come slice by slice: K and V stand in full, q and the output never do.

Rows of attention do not see each other, so a slice of tokens can go from its queries to the end of the block by itself
(Rabe and Staats, arXiv:2112.05682). K and V are made slice by slice too, straight from what the slice's norm and modulation
give, so that the normalised input of a block does not stand in full either.

Our own processors take all queries at once: lists of key blocks are of whole videos, and norm and rotation of q and k are one
pass of a kernel there, which is worth more time than the two tensors that it makes are worth memory. There q, k and v are
projected slice by slice, and so is the output.

Both go past the attention module and call its projections and norms, which takes knowing what its processor does: `known`
says how, for the host's processors that ours stand in for, and for ours. Every other attention is called whole.

Letters: B batch, N tokens, n of a slice, H heads, D head_dim, C channels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from videoattn.pipelines.processor import FastProcessor
from videoattn.prologue import Prologue, Rope, Stream, split_heads
from videoattn.slicing.whole import hooked

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [B, n, H, D], k, v [B, N, H, D], mask or None) -> out [B, n, H, D]."""

Ranges = Callable[[int], Iterable[tuple[int, int]]]
"""Tokens of a run -> its slices."""

OF_TOKENS = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
"""What a joint attention calls its second set of projections and norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an attention module gets from its input to its output, but for the output's projection.

    prologue: norm and rotation of q and k. core: attention.
    whole: (prologue, heads, *streams) -> out [B, N, H, D], in the place of `core` where all queries go in one call.
    """

    prologue: Prologue
    core: Core | None = None
    whole: Callable[..., Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A run of tokens that goes through one set of projections.

    Args:
        size: its tokens. start: where they lie among all keys.
        source: (start, stop) -> the attention's input [B, n, C], of these of the run's tokens.
        rope: the same for the tables; None where nothing turns.
        parts: names of the attention's projections and norms.
        few: so few that they are one slice, as text's are.
    """

    size: int
    source: Callable[[int, int], Tensor]
    rope: Callable[[int, int], Rope] | None = None
    start: int = 0
    parts: tuple[str, ...] = OF_TOKENS
    few: bool = False

    def slices(self, ranges: Ranges) -> Iterable[tuple[int, int]]:
        return ((0, self.size),) if self.few else ranges(self.size)


def known(attn: nn.Module, processors: Mapping[type, type[FastProcessor]], *, lengths: bool = False) -> Way | None:
    """How to attend slice by slice, None where the module is to be called whole.

    Args:
        processors: the host's processor class -> ours, of the family.
        lengths: whether our processor's `kv_len` counts here.
    """
    if hooked(attn) or attn._compiled_call_impl is not None or getattr(attn, "fused_projections", False):
        return None
    processor = attn.processor
    if isinstance(processor, FastProcessor):
        run, host = processor.run, processor.host
        if run is not None:
            ours = processors.get(type(host))
            if ours is None:
                return None
            if isinstance(processor, ours):
                kv_len = processor.kv_len if lengths else None
                return Way(prologue=ours.prologue, whole=functools.partial(run.attend, kv_len=kv_len))
            if run.sparse:
                return None
            return Way(prologue=ours.prologue, core=run)  # the host's code, on our kernels
        processor = host
    ours = processors.get(type(processor))
    if ours is None or getattr(processor, "_parallel_config", None) is not None:
        return None
    if not hasattr(processor, "_attention_backend"):
        return Way(prologue=ours.prologue, core=_sdpa)
    backend = processor._attention_backend

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)

    return Way(prologue=ours.prologue, core=core)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def attending(attn: nn.Module, way: Way, runs: tuple[Run, ...], ranges: Ranges) -> Keys | Rows:
    """What `attend`s any tokens of the runs.

    Args:
        runs: the video's first. ranges: tokens of a run -> its slices.
    """
    return Rows(attn, way, runs, ranges) if way.whole is not None else Keys(attn, way, runs, ranges)


class Keys:
    """K and V of all tokens, and attention of any of them to all."""

    def __init__(self, attn: nn.Module, way: Way, runs: tuple[Run, ...], ranges: Ranges) -> None:
        self.attn = attn
        self.way = way
        self.k: Tensor | None = None  # [B, N, H, D]
        self.v: Tensor | None = None
        tokens = sum(run.size for run in runs)
        for run in runs:
            for start, stop in run.slices(ranges):
                self._add(run, start, stop, tokens)

    def _add(self, run: Run, start: int, stop: int, tokens: int) -> None:
        _, to_k, to_v, _, norm_k = (getattr(self.attn, name, None) for name in run.parts)
        x = run.source(start, stop)
        v = split_heads(to_v(x), self.attn.heads)
        stream = Stream(None, to_k(x), None, None, norm_k, None if run.rope is None else run.rope(start, stop))
        del x
        self.way.prologue.finish(self.attn.heads, stream, "k")
        if v.shape[1] == tokens:
            self.k, self.v = stream.k, v
            return
        if self.k is None:
            b, _, *head = v.shape
            self.k, self.v = stream.k.new_empty(b, tokens, *head), v.new_empty(b, tokens, *head)
        here = slice(run.start + start, run.start + stop)
        self.k[:, here] = stream.k
        self.v[:, here] = v

    def attend(self, run: Run, start: int, stop: int, mask: Tensor | None = None) -> Tensor:
        """Output [B, n, H*D] of some tokens of a run, which is yet to be projected.

        mask: of the host, broadcastable to [B, H, n, N].
        """
        return _told(self.attn, lambda: self._attend(run, start, stop, mask))

    def _attend(self, run: Run, start: int, stop: int, mask: Tensor | None) -> Tensor:
        to_q, _, _, norm_q, _ = (getattr(self.attn, name, None) for name in run.parts)
        rope = None if run.rope is None else run.rope(start, stop)
        stream = Stream(to_q(run.source(start, stop)), None, None, norm_q, None, rope)
        self.way.prologue.finish(self.attn.heads, stream, "q")
        out = self.way.core(stream.q, self.k, self.v, mask)
        return out.flatten(2, 3).to(stream.q.dtype)


class Rows:
    """The output of all tokens, from projections that were made slice by slice."""

    def __init__(self, attn: nn.Module, way: Way, runs: tuple[Run, ...], ranges: Ranges) -> None:
        self.attn = attn
        self.first = dict(zip(runs, itertools.accumulate((run.size for run in runs), initial=0), strict=False))
        alike = len({run.parts for run in runs}) == 1  # then one stream, whose rotation ends where the text begins
        streams = [self._stream(each, ranges) for each in ([runs] if alike else [(run,) for run in runs])]
        self.out = _told(attn, lambda: way.whole(way.prologue, attn.heads, *streams)).flatten(2, 3)

    def _stream(self, runs: tuple[Run, ...], ranges: Ranges) -> Stream:
        *projections, norm_q, norm_k = (getattr(self.attn, name, None) for name in runs[0].parts)
        raw: list[Tensor | None] = [None] * 3
        tokens, at = sum(run.size for run in runs), 0
        for run in runs:
            for start, stop in run.slices(ranges):
                x = run.source(start, stop)
                for index, project in enumerate(projections):
                    made = project(x)
                    if raw[index] is None:
                        raw[index] = made.new_empty(made.shape[0], tokens, made.shape[2])
                    raw[index][:, at : at + stop - start] = made
                    del made
                at += stop - start
        first = runs[0]
        rope = None if first.rope is None else first.rope(0, first.size)
        return Stream(*raw, norm_q, norm_k, rope, slice(first.size) if len(runs) > 1 else None)

    def attend(self, run: Run, start: int, stop: int, mask: Tensor | None = None) -> Tensor:
        """As of `Keys`; our processors count keys where the host has a mask."""
        return self.out[:, self.first[run] + start : self.first[run] + stop]


def _told(module: nn.Module, work: Callable[[], Tensor]) -> Tensor:
    """`work`, as a call of the module to whoever watches it."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return work()
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    out = None
    try:
        out = work()
    finally:
        for hook in module._forward_hooks.values():
            hook(module, (), out)
    return out
