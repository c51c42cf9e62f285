"""The kernels that leave key blocks out, each under a name of its own: for Hopper, and for every card since Ampere.

A list is of blocks as large as the kernel's tiles: for Hopper 192 or 128 queries, and 128 keys.
"""

from __future__ import annotations

from videoattn.call import Call
from videoattn.kernels import flash_hopper, quantised_hopper
from videoattn.kernels.hopper_device import M
from videoattn.kernels.operands import KEYS, PV
from videoattn.kernels.quantised_sparse_backend import QuantisedSparseBackend
from videoattn.kernels.sparse_backend import SparseBackend

SQUARE = 2 * M.value  # queries and keys of a block that may have empty places


def _exact_hopper(call: Call, gaps: bool) -> tuple[int, int]:
    built = flash_hopper.config(call.head_dim)
    return (SQUARE if gaps else M.value * built.GROUPS), built.N


def _quantised_hopper(pv: PV):
    def blocks(call: Call, gaps: bool) -> tuple[int, int]:
        return (SQUARE if gaps else M.value * quantised_hopper.config(call.head_dim, pv).GROUPS), KEYS

    return blocks


BACKENDS = (
    SparseBackend("triton_hopper_sparse", *flash_hopper.BACKENDS, flash_hopper.attend, _exact_hopper),
    *(
        QuantisedSparseBackend(f"triton_hopper_sparse_int8_{dense.pv}", dense, _quantised_hopper(dense.pv))
        for dense in quantised_hopper.BACKENDS
    ),
)
