"""What every backend that quantises is made of: the pass in front, then a kernel that attends on its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from videoattn.backend import RunStreams
from videoattn.call import Call
from videoattn.kernels.operands import PV, Quantised
from videoattn.kernels.quantise import quantise, quantise_streams
from videoattn.kernels.triton_backend import Tile, TritonBackend, refuses_but_plain
from videoattn.policy import Decision, Dense
from videoattn.prologue import Prologue, Stream


class AttendQuantised(Protocol):
    def __call__(
        self,
        x: Quantised,
        *,
        head_dim: int,
        dtype: torch.dtype,
        kv_len: Tensor | None = None,
        return_lse: bool = False,
        flag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention on operands: out [B, Nq, H, D] contiguous in `dtype`; lse [B, H, Nq] or None."""


class QuantisedBackend(TritonBackend):
    """A kernel of ours for INT8 q k^T.

    Args:
        name: the backend's name.
        pv: what it multiplies p v in.
        attend_quantised: the kernel's launcher.
        refuses: its own limits: (call) -> reason or None.
        tile: how the launcher cuts a call.
    """

    def __init__(
        self,
        name: str,
        pv: PV,
        attend_quantised: AttendQuantised,
        refuses: Callable[[Call], str | None],
        tile: Callable[[Call], Tile],
    ) -> None:
        super().__init__(name, self._attend, refuses, tile, Dense(f"int8_qk_{pv}_pv"))
        self.pv = pv
        self.attend_quantised = attend_quantised

    def refuses(self, call: Call, decision: Decision) -> str | None:
        reason = super().refuses(call, decision) or refuses_but_plain(call)
        if reason is None and self.pv == "fp8" and torch.cuda.get_device_capability(call.device) < (8, 9):
            return "needs compute capability 8.9 for e4m3"
        return reason

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        kv_len: Tensor | None = None,
        return_lse: bool = False,
        flag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = quantise(q, k, v, pv=self.pv, scale=scale, kv_len=kv_len, return_lse=return_lse)
        sizes = {"head_dim": q.shape[3], "dtype": q.dtype}
        return self.attend_quantised(x, **sizes, kv_len=kv_len, return_lse=return_lse, flag=flag)

    def plan_streams(self, call: Call, decision: Decision, prologue: Prologue, flag: Tensor | None) -> RunStreams:
        """As `plan`, for raw projections: norm, rotation and quantisation in one pass."""
        sizes = {"head_dim": call.head_dim, "dtype": call.dtype}

        def run(streams: Sequence[Stream], kv_len: Tensor | None) -> Tensor:
            x = quantise_streams(prologue, call.heads, *streams, pv=self.pv, kv_len=kv_len)
            return self.attend_quantised(x, **sizes, kv_len=kv_len, flag=flag)[0]

        return run
