"""The oracle of block-sparse attention: the formula in fp64, on any device.

Over the keys that a list keeps, s = scale q . k; over the key blocks that it leaves out, where they are pooled,
s_j = scale q . kc_j with the means kc_j and vc_j of the n_j tokens of key block j:

    m = max(s, s_j),   l = sum exp(s - m) + sum n_j exp(s_j - m),   out = (sum exp(s - m) v + sum n_j exp(s_j - m) vc_j) / l

and lse = m + log l. (The remainder: Sol-Attn, arXiv:2607.24027.)

Letters: B batch, Pq/Pk places of queries and of keys, H heads, Hkv key heads, D head_dim, nk blocks of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videoattn.selection.block_list import BlockList


def counted(blocks: BlockList, kv_len: Tensor | None = None) -> Tensor:
    """int32 [B or 1, nk]: how many tokens of a key block count, of which those of row b at or beyond kv_len[b] do not."""
    if kv_len is None:
        return blocks.live[None]
    begins = torch.arange(blocks.live.shape[0], dtype=torch.int32, device=kv_len.device) * blocks.block_k
    return (kv_len[:, None] - begins).clamp_min(0).minimum(blocks.live)


def means(x: Tensor, tokens: Tensor, block_k: int) -> Tensor:
    """The means [B, nk, Hkv, D] in fp64 of x [B, Pk, Hkv, D] over the first tokens [B or 1, nk] of each block; 0 of none."""
    taken = torch.arange(block_k, device=x.device) < tokens[..., None]
    x = F.pad(x.double(), (0, 0, 0, 0, 0, -x.shape[1] % block_k)).unflatten(1, (-1, block_k))
    return x.masked_fill(~taken[..., None, None], 0.0).sum(2) / tokens.clamp_min(1)[..., None, None]


def token_mask(blocks: BlockList, p_q: int, p_k: int) -> Tensor:
    """bool [B, H, Pq, Pk]: which keys a query attends to; both sequences may end within their last block."""
    return blocks.token_mask()[..., :p_q, :p_k]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    remainder: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments as of kernels/block_sparse.py, and

    Args:
        kv_len: int32 [B]: keys of row b at or beyond kv_len[b] count for nothing.
        remainder: whether blocks that are in no list take part by their means.

    Returns:
        out [B, Pq, H, D] and lse [B, H, Pq] (natural logarithm), both fp64. A row without a key gives 0 and -inf.
    """
    nq, h, d = q.shape[1:]
    scale = d**-0.5 if scale is None else scale
    tokens = counted(blocks, kv_len)
    k_means, v_means = (means(x, tokens, blocks.block_k) for x in (k, v))
    q = q.double().transpose(1, 2)
    k, v, k_means, v_means = (
        x.double().transpose(1, 2).repeat_interleave(h // x.shape[2], 1) for x in (k, v, k_means, v_means)
    )

    mask = token_mask(blocks, nq, k.shape[2])
    if kv_len is not None:
        mask = mask & (torch.arange(k.shape[2], device=k.device) < kv_len[:, None])[:, None, None]
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    s_means = q @ k_means.transpose(-1, -2) * scale
    left_out = ~blocks.keep & (tokens > 0)[:, None, None] & remainder
    s_means = s_means.masked_fill(~left_out.repeat_interleave(blocks.block_q, 2)[:, :, :nq], -torch.inf)

    m = torch.cat([s, s_means], -1).amax(-1, keepdim=True)
    finite = m.masked_fill(m == -torch.inf, 0.0)  # a row without a key: every weight is exp(-inf) = 0
    p, p_means = (s - finite).exp(), (s_means - finite).exp() * tokens[:, None, None]
    l = p.sum(-1, keepdim=True) + p_means.sum(-1, keepdim=True)
    out = (p @ v + p_means @ v_means) / l.masked_fill(l == 0.0, 1.0)
    return out.transpose(1, 2), (finite + l.log()).squeeze(-1)
