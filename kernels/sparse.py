"""The kernels that leave key blocks out, each under a name of its own: for every card since Ampere, and for Hopper.

A list is of blocks as large as the kernel's tiles or twice that: for Hopper 192 or 128 queries, elsewhere 128, and 128 keys.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from videoattn.call import Call
from videoattn.kernels import block_sparse, flash, flash_hopper, quantised, quantised_hopper
from videoattn.kernels.hopper_device import M
from videoattn.kernels.operands import KEYS, PV
from videoattn.kernels.quantised_sparse_backend import QuantisedSparseBackend
from videoattn.kernels.remainder import add
from videoattn.kernels.sparse_backend import Attend, SparseBackend
from videoattn.selection.block_list import BlockList

SQUARE = 2 * M.value  # queries and keys of a block that may have empty places


def _along(kernel: Callable[..., tuple[Tensor, Tensor | None]]) -> Attend:
    """A kernel that takes lists, as a backend calls it."""

    def attend(q, k, v, *, scale, kv_len, flag, lists, remainder):
        out, lse = kernel(q, k, v, scale=scale, kv_len=kv_len, flag=flag, lists=lists, return_lse=remainder)
        if remainder:
            add(out, lse, q, k, v, lists, scale=scale, kv_len=kv_len, flag=flag)
        return out

    return attend


def _portable_exact(q, k, v, *, kv_len: None, lists: BlockList, **options) -> tuple[Tensor, Tensor | None]:
    return block_sparse.attend(q, k, v, lists, **options)


def _limits(call: Call) -> str | None:
    if call.has_kv_len:
        return "takes no lengths"
    if call.head_dim % 8 or not 16 <= call.head_dim <= 256:
        return f"takes head_dim 16 to 256 in steps of 8, got {call.head_dim}"
    return None


def _portable(call: Call, gaps: bool) -> tuple[int, int]:
    return SQUARE, KEYS


def _exact_hopper(call: Call, gaps: bool) -> tuple[int, int]:
    built = flash_hopper.config(call.head_dim)
    return (SQUARE if gaps else M.value * built.GROUPS), built.N


def _quantised_hopper(pv: PV):
    def blocks(call: Call, gaps: bool) -> tuple[int, int]:
        return (SQUARE if gaps else M.value * quantised_hopper.config(call.head_dim, pv).GROUPS), KEYS

    return blocks


BACKENDS = (
    SparseBackend("triton_sparse", *flash.BACKENDS, _along(_portable_exact), _portable, limits=_limits),
    *(QuantisedSparseBackend(f"triton_sparse_int8_{dense.pv}", dense, _portable) for dense in quantised.BACKENDS),
    SparseBackend("triton_hopper_sparse", *flash_hopper.BACKENDS, _along(flash_hopper.attend), _exact_hopper),
    *(
        QuantisedSparseBackend(
            f"triton_hopper_sparse_int8_{dense.pv}", dense, _quantised_hopper(dense.pv), rounded_sums=True
        )
        for dense in quantised_hopper.BACKENDS
    ),
)
