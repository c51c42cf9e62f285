"""The oracle of block-sparse attention: the formula in fp64, on any device.

Over the keys that a list keeps, s = scale q . k; over the key blocks that it leaves out, where they are pooled,
s_j = scale q . kc_j with the mean key kc_j and the sum of values vc_j of the n_j tokens of block j:

    m = max(s, s_j),   l = sum exp(s - m) + sum n_j exp(s_j - m),   out = (sum exp(s - m) v + sum exp(s_j - m) vc_j) / l

and lse = m + log l. (The remainder: Sol-Attn, arXiv:2607.24027.)

Letters: B batch, Pq/Pk places of queries and of keys, H heads, Hkv key heads, D head_dim, nk blocks of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videoattn.selection.block_list import BlockList


def pool(x: Tensor, live: Tensor, block_k: int) -> Tensor:
    """The sums [B, nk, Hkv, D] in fp64 of x [B, Pk, Hkv, D] over the tokens of each block, the first live [nk] places."""
    taken = torch.arange(block_k, device=x.device) < live[:, None]
    x = F.pad(x.double(), (0, 0, 0, 0, 0, -x.shape[1] % block_k))
    return x.unflatten(1, (-1, block_k)).masked_fill(~taken[..., None, None], 0.0).sum(2)


def token_mask(blocks: BlockList, p_q: int, p_k: int) -> Tensor:
    """bool [B, H, Pq, Pk]: which keys a query attends to; both sequences may end within their last block."""
    return blocks.token_mask()[..., :p_q, :p_k]


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None, pooled: bool = False
) -> tuple[Tensor, Tensor]:
    """Arguments as of kernels/block_sparse.py.

    Returns:
        out [B, Pq, H, D] and lse [B, H, Pq] (natural logarithm), both fp64. A row without a key gives 0 and -inf.
    """
    nq, h, d = q.shape[1:]
    scale = d**-0.5 if scale is None else scale
    tokens = blocks.live.double()
    k_means = pool(k, blocks.live, blocks.block_k) / tokens.clamp_min(1)[:, None, None]
    v_sums = pool(v, blocks.live, blocks.block_k)
    q = q.double().transpose(1, 2)
    k, v, k_means, v_sums = (
        x.double().transpose(1, 2).repeat_interleave(h // x.shape[2], 1) for x in (k, v, k_means, v_sums)
    )

    mask = token_mask(blocks, nq, k.shape[2])
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    s_means = q @ k_means.transpose(-1, -2) * scale
    left_out = ~blocks.keep & (blocks.live > 0) if pooled else torch.zeros_like(blocks.keep)
    s_means = s_means.masked_fill(~left_out.repeat_interleave(blocks.block_q, 2)[:, :, :nq], -torch.inf)

    m = torch.cat([s, s_means], -1).amax(-1, keepdim=True)
    finite = m.masked_fill(m == -torch.inf, 0.0)  # a row without a key: every weight is exp(-inf) = 0
    p, p_means = (s - finite).exp(), (s_means - finite).exp()
    l = p.sum(-1, keepdim=True) + (p_means * tokens).sum(-1, keepdim=True)
    out = (p @ v + p_means @ v_sums) / l.masked_fill(l == 0.0, 1.0)
    return out.transpose(1, 2), (finite + l.log()).squeeze(-1)
