"""The kernels that leave key blocks out, each under a name of its own: for every card since Ampere, and for Hopper.

A list is of blocks as large as the kernel's tiles or twice that: for Hopper 192 or 128 queries, elsewhere 128, and 128 keys.
"""

from __future__ import annotations

from torch import Tensor

from videoattn.call import Call
from videoattn.kernels import block_sparse, flash, flash_hopper, quantised, quantised_hopper
from videoattn.kernels.hopper_device import M
from videoattn.kernels.operands import KEYS, PV
from videoattn.kernels.quantised_sparse_backend import QuantisedSparseBackend
from videoattn.kernels.sparse_backend import SparseBackend
from videoattn.selection.block_list import BlockList

SQUARE = 2 * M.value  # queries and keys of a block that may have empty places


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    kv_len: None,
    flag: Tensor | None,
    lists: BlockList,
    remainder: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """kernels/block_sparse.py as a backend calls it."""
    return block_sparse.attend(q, k, v, lists, scale=scale, flag=flag, pooled=remainder)


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
    SparseBackend("triton_sparse", *flash.BACKENDS, _attend, _portable, remainder=True, limits=_limits),
    *(QuantisedSparseBackend(f"triton_sparse_int8_{dense.pv}", dense, _portable) for dense in quantised.BACKENDS),
    SparseBackend("triton_hopper_sparse", *flash_hopper.BACKENDS, flash_hopper.attend, _exact_hopper),
    *(
        QuantisedSparseBackend(f"triton_hopper_sparse_int8_{dense.pv}", dense, _quantised_hopper(dense.pv))
        for dense in quantised_hopper.BACKENDS
    ),
)
