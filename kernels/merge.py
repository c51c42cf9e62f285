"""Attention over all keys out of attention over parts of them, exactly, by the log-sum-exps.

    lse = log sum exp lse_i,   out = sum exp(lse_i - lse) out_i

for parts i that share no key (Milakov and Gimelshein, arXiv:1805.02867; as split keys in Flash-Decoding). In fp32 and torch,
on any device: it reads the outputs once, a tile of keys at most beside what their attention cost.

Letters: B batch, N queries, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both.

    Args:
        out_a, out_b: [B, N, H, D], any float dtype. lse_a, lse_b: [B, H, N] (natural logarithm), -inf where a row has no key,
            whose output is 0.

    Returns:
        out and lse in fp32.
    """
    out, lse = out_a.to(torch.float32, copy=True), lse_a.to(torch.float32, copy=True)
    add(out, lse, out_b, lse_b)
    return out, lse


def add(out: Tensor, lse: Tensor, other: Tensor, lse_other: Tensor) -> None:
    """`merge` in place: into out and lse, which are fp32."""
    joint = torch.logaddexp(lse, lse_other.to(lse.dtype))
    base = joint.masked_fill(joint == -torch.inf, 0.0)  # a row without a key: exp(-inf - -inf) would be NaN
    out.mul_(_of_rows(torch.exp(lse - base)))
    out.addcmul_(other, _of_rows(torch.exp(lse_other - base)))
    lse.copy_(joint)


def _of_rows(weights: Tensor) -> Tensor:
    """[B, H, N] as [B, N, H, 1]."""
    return weights.transpose(1, 2).unsqueeze(-1)
