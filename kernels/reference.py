"""The oracle: attention as the formula says, in fp64, on any device. Everything else is measured against it.

S = scale * Q K^T + mask,  P = softmax(S) over the first kv_len[b] keys,  out = P V,  lse = log sum exp S
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention in fp64.

    Args:
        q: [B, Nq, H, D]. k, v: [B, Nk, Hkv, D], Hkv divides H (query head h reads key head h // (H / Hkv)).
        scale: factor on q k^T; 1 / sqrt(D) by default.
        kv_len: integers [B]: row b attends to its first kv_len[b] keys.
        mask: broadcastable to [B, H, Nq, Nk]; bool (True: attend) or additive.
        causal: query i sees keys 0..i, as torch's SDPA counts them.

    Returns:
        out [B, Nq, H, D] and lse [B, H, Nq] (natural logarithm), both fp64. A row without a key gives 0 and -inf.
    """
    (b, nq, h, d), nk = q.shape, k.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (d**-0.5 if scale is None else scale)  # [B, H, Nq, Nk]

    keys = torch.arange(nk, device=q.device)
    if kv_len is not None:
        scores = scores.masked_fill(keys >= kv_len.view(b, 1, 1, 1), -torch.inf)
    if causal:
        scores = scores.masked_fill(keys > torch.arange(nq, device=q.device)[:, None], -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()

    lse = scores.logsumexp(dim=-1)
    # A row without a key: exp(-inf - -inf) is NaN; subtract 0 there instead, so that every weight is exp(-inf) = 0.
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights @ v).transpose(1, 2), lse
