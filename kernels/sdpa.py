"""Exact attention through torch's scaled_dot_product_attention: torch's own choice, or one of its kernels by name.

sdpa            torch's own choice among the kernels below; on the CPU its blocked kernel
sdpa_cudnn      cuDNN's fused kernel
sdpa_flash      FlashAttention 2 (Dao, arXiv:2307.08691), takes no mask
sdpa_efficient  memory-efficient attention (Rabe and Staats, arXiv:2112.05682; xFormers' kernel), any float dtype
sdpa_math       plain matrix products; the scores stand in memory

Prefix lengths become shorter keys where every row has the same length, which needs no mask at all, and a [B, 1, 1, Nk]
mask where they differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from videoattn.backend import Run
from videoattn.call import Call
from videoattn.lengths import host_lengths, key_mask
from videoattn.policy import EXACT, Decision

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, scale) -> out, all [B, H, N, D]."""

CUDNN_WIDE_HEADS = 91000  # from this version on, its forward takes head_dim up to 256 on Hopper
_HALF = (torch.float16, torch.bfloat16)


class Sdpa:
    """One way through torch's SDPA.

    Args:
        name: the backend's name.
        kernel: the SDPBackend to hold torch to, or None for torch's own choice.
    """

    own = False

    def __init__(self, name: str, kernel: SDPBackend | None) -> None:
        self.name = name
        self.kernel = kernel

    def __repr__(self) -> str:
        return f"Sdpa({self.name!r})"

    def computes(self, decision: Decision) -> bool:
        return decision == EXACT

    def refuses(self, call: Call, decision: Decision) -> str | None:
        if not self.computes(decision):
            return f"computes exact attention only, asked for {decision}"
        if call.causal and (call.mask != "none" or call.has_kv_len):
            return "takes causal or a mask, not both"
        if self.kernel is None or self.kernel is SDPBackend.MATH:
            return None
        if call.device.type != "cuda":
            return "no GPU"
        if torch.version.hip is not None:
            return "not tested on ROCm"
        if self.kernel is SDPBackend.EFFICIENT_ATTENTION:
            multiple = 4 if call.dtype == torch.float32 else 8
            if call.dtype not in (*_HALF, torch.float32):
                return f"takes fp16, bf16 and fp32, got {call.dtype}"
            return f"head_dim {call.head_dim} is no multiple of {multiple}" if call.head_dim % multiple else None
        if call.dtype not in _HALF:
            return f"takes fp16 and bf16, got {call.dtype}"
        if call.head_dim % 8:
            return f"head_dim {call.head_dim} is no multiple of 8"
        if torch.cuda.get_device_capability(call.device) < (8, 0):
            return "needs compute capability 8.0"
        if self.kernel is SDPBackend.FLASH_ATTENTION:
            if call.mask != "none":
                return "takes no mask"
            return f"head_dim {call.head_dim} is over 256" if call.head_dim > 256 else None
        hopper = torch.cuda.get_device_capability(call.device) == (9, 0)
        limit = 256 if hopper and torch.backends.cudnn.version() >= CUDNN_WIDE_HEADS else 128
        return f"head_dim {call.head_dim} is over {limit}" if call.head_dim > limit else None

    def plan(self, call: Call, decision: Decision, flag: Tensor | None = None) -> Run:
        core = self._core(call)
        over_prefix = _prefix(core, loop=self.kernel is SDPBackend.FLASH_ATTENTION)
        has_kv_len = call.has_kv_len

        if call.layout == "BHND":

            def run(q, k, v, mask, kv_len, scale):
                return over_prefix(q, k, v, mask, kv_len, scale) if has_kv_len else core(q, k, v, mask, scale)

        else:

            def run(q, k, v, mask, kv_len, scale):
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                out = over_prefix(q, k, v, mask, kv_len, scale) if has_kv_len else core(q, k, v, mask, scale)
                return out.transpose(1, 2)

        return run

    def _core(self, call: Call) -> Core:
        causal, gqa, kernel = call.causal, call.heads != call.kv_heads, self.kernel

        if kernel is None:

            def core(q, k, v, mask, scale):
                return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

        elif call.mask == "none" and not call.has_kv_len and not gqa and kernel in _DIRECT:
            # The ATen operator itself: sdpa_kernel() switches process-wide flags and costs more host time than SDPA.
            return _DIRECT[kernel](causal)
        else:

            def core(q, k, v, mask, scale):
                with sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

        return core


def _prefix(core: Core, *, loop: bool) -> Callable[..., Tensor]:
    """`core` over the first kv_len[b] keys of each row b; `loop` for a kernel that takes no mask."""

    def run(q, k, v, mask, kv_len, scale):
        lengths = host_lengths(kv_len)
        longest = max(lengths)
        if longest == 0:
            return torch.zeros_like(q)
        if min(lengths) == longest:
            mask = None if mask is None else mask[..., :longest]
            return core(q, k.narrow(2, 0, longest), v.narrow(2, 0, longest), mask, scale)
        if loop:
            rows = [
                core(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], None, scale) for b, n in enumerate(lengths)
            ]
            return torch.cat(rows)
        if mask is None and min(lengths) > 0:
            # To be added, and on a multiple of 16 keys: what the fused kernels read. Torch makes it so at every call.
            keys = min(k.shape[2], -(-longest // 16) * 16)
            mask = key_mask(kv_len, keys, q.dtype)
        else:
            keys, keep = longest, key_mask(kv_len, longest)
            if mask is not None:
                mask = mask[..., :longest]
                keep = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
            mask = keep
        return core(q, k.narrow(2, 0, keys), v.narrow(2, 0, keys), mask, scale)

    return run


def _direct_cudnn(causal: bool) -> Core:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return lambda q, k, v, mask, scale: op(q, k, v, None, False, 0.0, causal, scale=scale)[0]


def _direct_flash(causal: bool) -> Core:
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    return lambda q, k, v, mask, scale: op(q, k, v, 0.0, causal, scale=scale)[0]


def _direct_efficient(causal: bool) -> Core:
    op = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return lambda q, k, v, mask, scale: op(q, k, v, None, False, 0.0, causal, scale=scale)[0]


_DIRECT = {
    SDPBackend.CUDNN_ATTENTION: _direct_cudnn,
    SDPBackend.FLASH_ATTENTION: _direct_flash,
    SDPBackend.EFFICIENT_ATTENTION: _direct_efficient,
}

BACKENDS = (
    Sdpa("sdpa", None),
    Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
    Sdpa("sdpa_math", SDPBackend.MATH),
)
