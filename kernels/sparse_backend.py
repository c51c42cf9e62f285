"""What every backend that leaves key blocks out is made of.

    tokens, in the order of the selector -> operands, as for dense attention -> lists of key blocks, new or kept
    -> the dense kernel, along the lists -> tokens in their own order

Where the denoiser's tokens lie in the selector's order already (pipelines/token_order.py), nothing is moved. Selectors see
what the kernel sees: q and k after norm and rotation, quantised where it quantises. Lengths cut text alone, which comes
behind the video in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from videoattn.backend import Backend, Run
from videoattn.call import Call
from videoattn.policy import Decision, Dense, Sparse
from videoattn.selection.arrangement import Arrangement, arrange
from videoattn.selection.block_list import BlockList
from videoattn.selection.kept import Kept
from videoattn.selection.selector import Selector, lists_of, required

MOST_BLOCKS = 4096  # of keys; in tiles some more
UNKNOWN = 0.5  # density of a selector that goes by a threshold


Blocks = Callable[[Call, bool], tuple[int, int]]
"""(call, whether blocks may be filled in part, which are square then) -> queries and keys of a block."""

Attend = Callable[..., Tensor]
"""(q, k, v, scale, kv_len, flag, lists, remainder) -> out: attention along lists; `remainder`: see policy.Sparse."""


class SparseBackend:
    """Attention to the key blocks of lists.

    Args:
        name: the backend's name.
        dense: the backend that computes the same with all blocks.
        attend: its kernel, along lists.
        blocks: how large they are.
        limits: what it does not take of what the dense kernel takes: (call) -> reason or None.
    """

    def __init__(
        self,
        name: str,
        dense: Backend,
        attend: Attend,
        blocks: Blocks,
        *,
        limits: Callable[[Call], str | None] = lambda call: None,
    ) -> None:
        self.name = name
        self.own = dense.own
        self.dense = dense
        self.attend = attend
        self.blocks = blocks
        self.limits = limits
        self.kept = Kept()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def keeping(self, kept: Kept) -> SparseBackend:
        """The same backend for plans whose lists `kept` looks after."""
        bound = copy(self)
        bound.kept = kept
        return bound

    def computes(self, decision: Decision) -> bool:
        return isinstance(decision, Sparse) and self.dense.computes(Dense(decision.precision))

    def refuses(self, call: Call, decision: Decision) -> str | None:
        if not self.computes(decision):
            return f"leaves key blocks out, asked for {decision}"
        if call.mask != "none" or call.causal:
            return "takes neither a mask nor causal attention"
        reason = _refuses_tokens(call) or self.limits(call) or self.dense.refuses(call, Dense(decision.precision))
        return self._refuses_blocks(call, decision.selector) if reason is None else reason

    def _refuses_blocks(self, call: Call, selector: Selector) -> str | None:
        tiles = selector.order == "tiles"
        block_q, block_k = self.blocks(call, tiles)
        if tiles and call.has_kv_len:
            return "takes no lengths with tokens in tiles"
        if tiles and block_q != block_k:
            return f"takes tiles in blocks of one size, got {block_q} queries and {block_k} keys"
        if call.kv_len > MOST_BLOCKS * block_k:
            return f"takes at most {MOST_BLOCKS} blocks of keys, got {call.kv_len} keys"
        return selector.refuses(call.heads, block_q, block_k) if hasattr(selector, "refuses") else None

    def expected_density(self, call: Call, decision: Sparse) -> float:
        """The share of the keys that a query attends to: of fixed lists, or of what is asked for beside what is required.
        Of a selector that goes by a threshold it is not known: UNKNOWN."""
        selection, selector = self.selection(call, decision), decision.selector
        if not selector.dynamic:
            keep = selector.keep(selection.arrangement, call.heads) | selection.required
            return keep.float().mean().item()
        share = selection.required.float().mean().item()
        chosen = getattr(selector, "density", None)
        return share + (1 - share) * (UNKNOWN if chosen is None else chosen)

    def token_mask(self, call: Call, decision: Sparse, kv_len: Tensor | None) -> Tensor:
        """Which keys the queries of a call see, bool [B, H, N, N] in the order in which they come; of fixed lists."""
        selection = self.selection(call, decision)
        lists = selection.select(kv_len)
        arrangement = selection.arrangement
        count = arrangement.index.shape[0]
        mask = lists.token_mask()[..., :count, :count]
        return mask if selection.in_order else mask[..., arrangement.places, :][..., arrangement.places]

    def plan(self, call: Call, decision: Decision, flag: Tensor | None = None) -> Run:
        attend = self._attend(self.selection(call, decision), call, flag)
        if call.layout == "BNHD":
            return lambda q, k, v, mask, kv_len, scale: attend(q, k, v, kv_len, scale)

        def run(q, k, v, mask, kv_len, scale):
            return attend(*(x.transpose(1, 2) for x in (q, k, v)), kv_len, scale).transpose(1, 2)

        return run

    def selection(self, call: Call, decision: Sparse) -> Selection:
        block_q, block_k = self.blocks(call, decision.selector.order == "tiles")
        arrangement = arrange(call.tokens, decision.selector.order, call.device, block_q=block_q, block_k=block_k)
        in_order = decision.selector.order == "raster" or call.order == decision.selector.order
        return Selection(
            decision=decision,
            arrangement=arrangement,
            in_order=in_order and not call.tokens.before,
            heads=call.heads,
            batch=call.batch,
            kept=self.kept,
        )

    def _attend(self, selection: Selection, call: Call, flag: Tensor | None) -> Callable[..., Tensor]:
        """(q, k, v [B, N, H, D], kv_len, scale) -> out."""
        options = {"flag": flag, "remainder": selection.decision.remainder}

        def attend(q, k, v, kv_len, scale):
            q, k, v = (selection.arranged(x) for x in (q, k, v))
            lists = selection.lists(lambda: selection.select(kv_len, q, k, scale), of_lengths=kv_len is not None)
            return selection.restored(self.attend(q, k, v, scale=scale, kv_len=kv_len, lists=lists, **options))

        return attend


@dataclass(kw_only=True, eq=False)
class Selection:
    """Which blocks a plan's calls attend to, and where their tokens lie.

    Args:
        decision: with the selector. arrangement: of the call's tokens.
        in_order: whether tokens come as the arrangement has them.
        kept: looks after lists from step to step.
    """

    decision: Sparse
    arrangement: Arrangement
    in_order: bool
    heads: int
    batch: int
    kept: Kept

    def __post_init__(self) -> None:
        self.required = required(self.arrangement, first_frame=self.decision.first_frame)
        self._mask: Tensor | None = None  # of a selector that looks at neither q nor k, and
        self._fixed: BlockList | None = None  # its lists

    def arranged(self, x: Tensor) -> Tensor:
        return x if self.in_order else self.arrangement.arranged(x)

    def restored(self, x: Tensor) -> Tensor:
        return x if self.in_order else self.arrangement.restored(x)

    def lists(self, make: Callable[[], BlockList], *, of_lengths: bool) -> BlockList:
        """New lists by `make`, or those that were kept. of_lengths: whether they go by lengths, which change unseen."""

        @torch.no_grad()
        def made() -> BlockList:
            with torch.autocast(self.required.device.type, enabled=False):  # scores in 16 bits tie
                return make()

        if self.decision.selector.dynamic:
            return self.kept.lists(made, (self.arrangement.tokens, self.batch, self.heads))
        if self._fixed is None or of_lengths:
            self._fixed = made()
            self.kept.count(self._fixed)
        return self._fixed

    def select(self, kv_len: Tensor | None, *seen: Tensor | float | None) -> BlockList:
        """New lists. seen: q [B, P, H, D] and k [B, P, Hkv, D] arranged, and scale; of a selector that looks at them."""
        selector = self.decision.selector
        if selector.dynamic:
            return self.listed(selector.keep(self.arrangement, self.heads, *seen), kv_len)
        if self._mask is None:
            self._mask = selector.keep(self.arrangement, self.heads)
        return self.listed(self._mask, kv_len)

    def listed(self, keep: Tensor, kv_len: Tensor | None) -> BlockList:
        """Lists from a selector's mask, bool [B or 1, H or 1, nq, nk]."""
        return lists_of(keep, self.required, self.arrangement, self.batch, self.heads, kv_len)


def _refuses_tokens(call: Call) -> str | None:
    if call.q_len != call.kv_len:
        return f"self-attention only, got {call.q_len} queries and {call.kv_len} keys"
    if call.tokens is None:
        return "the grid of the video is not known"
    if call.tokens.count != call.q_len:
        return f"wanted the {call.tokens.count} tokens of {call.tokens}, got {call.q_len}"
    return None
