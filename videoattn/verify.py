"""Whether a kernel of ours computes right on this machine, found out before its first call.

A small part of the call (one head of keys, about 256 rows of queries, every key) on synthetic inputs of three kinds,
against the fp64 oracle: it may err as much as plain torch does where that computes the same decision. What is found holds
for the call's class, as long as the process lives.

A short call is repeated until its rows are as many: the bound is what plain torch errs on the same inputs, and over six
rows that can be a tenth of what it usually is.

Shape letters: B batch, Nq queries, Nk keys, H heads, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import get_args

import torch
from torch import Tensor

from videoattn import guard
from videoattn.backend import Backend, Choice, select
from videoattn.call import Call, Grid
from videoattn.kernels import block_sparse_reference, quantised_reference, reference
from videoattn.policy import EXACT, Decision, Dense, Precision, Sparse
from videoattn.selection.arrangement import Tokens
from videoattn.selection.random import Random
from videoattn.testing import excess, plain_attention


def _quantised(precision: Precision) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return quantised_reference.attend(q, k, v, precision=precision, **options)[0].to(q.dtype)

    return attend


PLAIN: dict[Decision, Callable[..., Tensor]] = {
    EXACT: plain_attention,
    **{Dense(precision): _quantised(precision) for precision in get_args(Precision) if precision != "exact"},
}
"""What computes a decision in plain torch, and so errs as much as the decision must."""

ROWS = 256
KEYS = 2**16  # over the batch, to which short calls are repeated
SCORES = 2**22  # that the oracle makes at a time: 32 MiB a tensor
VIDEO, TEXT = Grid(frames=3, height=10, width=19), 40  # several blocks, and no whole number of them
FACTOR = 4.0  # twice what tests of a kernel allow: a chance in the rounding is no fault

_found: dict[tuple, str | None] = {}


def select_verified(call: Call, decision: Decision, name: str = "auto") -> Choice:
    """`select`, passing over kernels of ours that are wrong on calls like this, with a RuntimeWarning for each.

    Raises:
        UnsupportedCall: as `select`; also where the backend named is wrong.
    """
    wrong: dict[str, str] = {}
    while True:
        choice = select(call, decision, name, failed=lambda backend: wrong.get(backend.name))
        reason = fault(choice.backend, call, choice.decision) if choice.backend.own else None
        if reason is None:
            break
        wrong[choice.backend.name] = reason
    passed_over = [f"{name} passed over: {reason}" for name, reason in wrong.items()]
    for why in passed_over:
        warnings.warn(f"{call}: {why}", RuntimeWarning, stacklevel=2)
    return replace(choice, why="; ".join(why for why in (*passed_over, choice.why) if why))


def fault(backend: Backend, call: Call, decision: Decision) -> str | None:
    """What is wrong with a backend on calls of this class, None where it is right; found out once a process."""
    of = decision
    if isinstance(decision, Sparse):
        of = decision.precision, decision.selector.order, decision.remainder
    key = (backend.name, of, _shape_class(call), call.dtype, call.device)
    if key not in _found:
        if guard.capturing(call.device):
            return "its check cannot run while a CUDA graph is captured"
        _found[key] = _check(backend, call, decision)
    return _found[key]


def _shape_class(call: Call) -> tuple:
    lengths = ((n.bit_length(), n % 64 == 0) for n in (call.q_len, call.kv_len))
    return (
        call.order,
        call.layout,
        call.mask,
        call.has_kv_len,
        call.causal,
        call.head_dim,
        call.heads // call.kv_heads,
        *lengths,
    )


@torch.no_grad()
def _check(backend: Backend, call: Call, decision: Decision) -> str | None:
    if isinstance(decision, Sparse):
        return _check_lists(backend, call, decision)
    call = _part(call)
    generator = torch.Generator(call.device).manual_seed(0)  # nobody's random numbers change
    run = backend.plan(call, decision, guard.flag())
    mask, kv_len = _mask(call, generator), _kv_len(call)
    options = {"mask": mask, "kv_len": kv_len, "causal": call.causal}
    with torch.autocast(call.device.type, enabled=False):
        for kind, *qkv in _inputs(call, generator):
            if call.layout == "BNHD":
                out = run(*qkv, mask, kv_len, None)
            else:
                out = run(*(x.transpose(1, 2).contiguous() for x in qkv), mask, kv_len, None).transpose(1, 2)
            exact = _by_rows(lambda *qkv, **options: reference.attend(*qkv, **options)[0], *qkv, **options)
            wrong = excess(out, exact, _by_rows(PLAIN[decision], *qkv, **options), factor=FACTOR)
            if wrong is not None:
                return f"{wrong}, on {kind}"
    return None


def _check_lists(backend: Backend, call: Call, decision: Sparse) -> str | None:
    """The same for a kernel that walks along lists: on a small video, and random lists, which any selector may give."""
    text = min(call.tokens.after + call.tokens.before, TEXT)
    tokens = Tokens(grid=VIDEO, after=text)
    call = replace(
        call,
        batch=1,
        q_len=tokens.count,
        kv_len=tokens.count,
        heads=call.heads // call.kv_heads,
        kv_heads=1,
        tokens=tokens,
    )
    decision = replace(decision, selector=Random(density=0.5, order=decision.selector.order))
    generator = torch.Generator(call.device).manual_seed(0)  # nobody's random numbers change
    kv_len = None
    if call.has_kv_len:  # half of the text, which alone may be cut
        kv_len = torch.full((1,), tokens.count - text // 2, dtype=torch.int32, device=call.device)
    mask = backend.token_mask(call, decision, kv_len)
    run = backend.plan(call, decision, guard.flag())
    with torch.autocast(call.device.type, enabled=False):
        for kind, *qkv in _inputs(call, generator):
            if call.layout == "BNHD":
                out = run(*qkv, None, kv_len, None)
            else:
                out = run(*(x.transpose(1, 2).contiguous() for x in qkv), None, kv_len, None).transpose(1, 2)
            exact, _ = reference.attend(*qkv, mask=mask, kv_len=kv_len)
            if decision.remainder:
                selection = backend.selection(call, decision)
                arranged = (selection.arranged(x) for x in qkv)
                options = {"kv_len": kv_len, "remainder": True}
                means_too, _ = block_sparse_reference.attend(*arranged, selection.select(kv_len), **options)
                exact = selection.restored(means_too)
            plain = PLAIN[Dense(decision.precision)](*qkv, mask=mask, kv_len=kv_len)
            wrong = excess(out, exact, plain, factor=FACTOR)
            if wrong is not None:
                return f"{wrong}, on {kind}"
    return None


def _part(call: Call) -> Call:
    """What is computed of a call: about as many rows of any, but as many beyond a multiple of 64 as the call has."""
    return replace(
        call,
        batch=max(1, min(ROWS // call.q_len, KEYS // call.kv_len)),
        q_len=min(call.q_len, ROWS - -call.q_len % 64),
        heads=call.heads // call.kv_heads,
        kv_heads=1,
    )


def _inputs(call: Call, generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(what they are, q [B, Nq, H, D], k and v [B, Nk, 1, D])"""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=call.device)

    q = normal(call.batch, call.q_len, call.heads, call.head_dim)
    k, v = (normal(call.batch, call.kv_len, 1, call.head_dim) for _ in "kv")
    offset = 8 * normal(call.head_dim)
    outlier = torch.ones_like(offset)
    outlier[:: -(-call.head_dim // 3)] = 10.0
    for kind, factor, shift in (
        ("normal inputs", 1.0, 0.0),
        ("keys with a common offset", 1.0, offset),
        ("inputs with outlier channels", outlier, 0.0),
    ):
        yield kind, *(x.to(call.dtype) for x in (q * factor, k * factor + shift, v * factor))


def _mask(call: Call, generator: torch.Generator) -> Tensor | None:
    if call.mask == "none":
        return None
    mask = torch.randn(call.q_len, call.kv_len, generator=generator, device=call.device)
    return mask > -1 if call.mask == "bool" else mask.to(call.dtype)


def _kv_len(call: Call) -> Tensor | None:
    """Two thirds of the keys, one more or less from row to row."""
    if not call.has_kv_len:
        return None
    rows = torch.arange(call.batch, dtype=torch.int32, device=call.device)
    return call.kv_len - (call.kv_len // 3 + rows) % call.kv_len


def _by_rows(
    attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kv_len: Tensor | None, causal: bool
) -> Tensor:
    """`attend` over a few rows of queries at a time; all at once if causal, where a row must know its place."""
    scores_a_row = q.shape[0] * q.shape[2] * k.shape[1]
    rows = q.shape[1] if causal else max(1, SCORES // scores_a_row)
    parts = zip(q.split(rows, dim=1), repeat(None) if mask is None else mask.split(rows), strict=False)
    return torch.cat([attend(q, k, v, mask=mask, kv_len=kv_len, causal=causal) for q, mask in parts], dim=1)
