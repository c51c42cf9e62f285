"""What every backend is made of that leaves key blocks out and quantises: `SparseBackend` on the operands of one pass in front.

Selectors read the operands (kernels/unquantised.py): no other copy of q and k is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from videoattn.backend import RunStreams
from videoattn.call import Call
from videoattn.kernels import antidiagonal, routing
from videoattn.kernels.operands import Quantised
from videoattn.kernels.prepare import prepare
from videoattn.kernels.quantise import quantise, quantise_streams
from videoattn.kernels.quantised_backend import QuantisedBackend
from videoattn.kernels.remainder import add_quantised
from videoattn.kernels.sparse_backend import Blocks, Selection, SparseBackend
from videoattn.kernels.unquantised import LN2, block_means, unquantised
from videoattn.policy import Decision
from videoattn.prologue import Prologue, Stream
from videoattn.selection.block_list import BlockList
from videoattn.selection.pooled import Pooled, block_scores
from videoattn.selection.threshold import count
from videoattn.selection.xattention import XAttention


class QuantisedSparseBackend(SparseBackend):
    """Attention to the key blocks of lists, on quantised operands.

    Args:
        name, dense, blocks: see `SparseBackend`.
        lse_options: what the kernel may do otherwise where its log-sum-exp is for the remainder.
    """

    dense: QuantisedBackend

    def __init__(self, name: str, dense: QuantisedBackend, blocks: Blocks, **lse_options: bool) -> None:
        super().__init__(name, dense, dense.attend_quantised, blocks)
        self.lse_options = lse_options

    def _attend(self, selection: Selection, call: Call, flag: Tensor | None) -> Callable[..., Tensor]:
        def attend(q, k, v, kv_len, scale):
            q, k, v = (selection.arranged(x) for x in (q, k, v))
            x = quantise(q, k, v, scale=scale, **self._options(selection, kv_len))
            return self._walk(x, selection, call, kv_len, flag)

        return attend

    def plan_streams(self, call: Call, decision: Decision, prologue: Prologue, flag: Tensor | None) -> RunStreams:
        """As `plan`, for raw projections: in one pass where the tokens lie in order."""
        selection = self.selection(call, decision)
        if not selection.in_order:
            attend = self._attend(selection, call, flag)
            return lambda streams, kv_len: attend(*prepare(prologue, call.heads, *streams), kv_len, None)

        def run(streams: Sequence[Stream], kv_len: Tensor | None) -> Tensor:
            x = quantise_streams(prologue, call.heads, *streams, **self._options(selection, kv_len))
            return self._walk(x, selection, call, kv_len, flag)

        return run

    def _options(self, selection: Selection, kv_len: Tensor | None) -> dict[str, object]:
        return {"pv": self.dense.pv, "kv_len": kv_len, "return_lse": selection.decision.remainder}

    def _walk(
        self, x: Quantised, selection: Selection, call: Call, kv_len: Tensor | None, flag: Tensor | None
    ) -> Tensor:
        lists = selection.lists(lambda: select(selection, x, call, kv_len), of_lengths=kv_len is not None)
        options = {"kv_len": kv_len, "flag": flag}
        sizes = {"head_dim": call.head_dim, "dtype": call.dtype}
        if selection.decision.remainder:
            out, lse = self.attend(x, **sizes, lists=lists, return_lse=True, **self.lse_options, **options)
            add_quantised(out, lse, x, lists, **options)
        else:
            out, _ = self.attend(x, **sizes, lists=lists, **options)
        return selection.restored(out)


def select(selection: Selection, x: Quantised, call: Call, kv_len: Tensor | None) -> BlockList:
    """New lists, from operands."""
    selector, arrangement = selection.decision.selector, selection.arrangement
    if not selector.dynamic:
        return selection.select(kv_len)
    queries, keys = arrangement.queries, arrangement.keys
    if isinstance(selector, Pooled):
        q_means, k_means = block_means(x, call.head_dim, queries.size, keys.size)
        scores = block_scores(q_means, k_means[:, : keys.video], LN2)
        rule = {"rule": "above", "tau": selector.tau}
    elif isinstance(selector, XAttention):
        scores = antidiagonal.block_mass_quantised(x, call.head_dim, queries, keys, stride=selector.stride)
        if selector.density is None:
            return selection.listed(selector.keep_by_mass(arrangement, scores), kv_len)
        scores = scores[..., : keys.video]
    else:
        return selection.select(kv_len, *unquantised(x, call.head_dim, call.dtype), LN2)
    if selector.density is not None:
        rule = {"rule": "best", "count": count(selector.density, keys.video)}
    sizes = {"block_q": queries.size, "block_k": keys.size, "batch": call.batch, "heads": call.heads}
    gaps = arrangement.order == "tiles"
    return routing.lists(scores, selection.required, keys.live, **sizes, **rule, kv_len=kv_len, gaps=gaps)
