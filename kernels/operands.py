"""What the quantised attention kernels read: q and k in INT8, v in e4m3, in INT8 or as it came (SageAttention 2's operands)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

PV = Literal["fp8", "16bit", "int8"]
"""What p v is multiplied in."""

KEYS = 128  # tokens of a block of k: four scales each; v's row of tokens is padded to a multiple
OFFSET = (
    8.807  # 2^8.807 = 447.9, below e4m3's greatest number 448: what a row's greatest weight is before it is rounded
)
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)  # stored place i of every 16 tokens of v -> token


class Quantised(NamedTuple):
    """The operands of one call. Letters: W head_dim rounded up to a multiple of 16, P Nk rounded up to one of KEYS.

    Args:
        q: int8 [B, H, Nq, W]. q_scale: fp32 [B, H, Nq]; holds scale * log2(e).
        k: int8 [B, Hkv, Nk, W], less the mean over the tokens. k_scale: fp32 [B, Hkv, ceil(Nk / KEYS), 4], of the tokens
            t of a block with (t % 8) // 2 == g.
        v: e4m3 or int8 [B, Hkv, W, P], every 16 tokens in ORDER, 0 beyond a row's length; or as it came, [B, Nk, Hkv, D].
        v_scale: fp32 [B, Hkv, D]; None for v as it came.
        lse_shift: fp32 [B, H, Nq], scale * q . mean(k); None where no log-sum-exp is asked for.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    lse_shift: Tensor | None
