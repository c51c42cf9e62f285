"""Attention to the key blocks of lists through torch's SDPA with a mask: what selection does to a video, without a GPU.

Every key is still read and multiplied, and the mask of all tokens stands in memory: it shows quality, and is no faster than
dense attention. So it has to be named.

Letters: B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videoattn.call import Call
from videoattn.kernels import sdpa
from videoattn.kernels.block_sparse_reference import counted, means
from videoattn.kernels.sparse_backend import SparseBackend
from videoattn.selection.block_list import BlockList

BLOCK = 64
MASK = 2**31  # bytes of a mask at most


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    kv_len: Tensor | None,
    flag: Tensor | None,
    lists: BlockList,
    remainder: bool,
) -> Tensor:
    """Attention of q, k, v [B, N, H, D] to the blocks of a list. Rows see a key at least: their own block's."""
    nq, nk = q.shape[1], k.shape[1]
    mask = lists.token_mask()[..., :nq, :nk]
    if kv_len is not None:
        mask = mask & (torch.arange(nk, device=k.device) < kv_len[:, None])[:, None, None]
    if remainder:  # means are keys like others, whose scores have the logarithm of their tokens on them
        tokens = counted(lists, kv_len)
        k, v = (torch.cat([x, means(x, tokens, lists.block_k).to(x.dtype)], dim=1) for x in (k, v))
        left_out = tokens[:, None, None].masked_fill(lists.keep, 0).repeat_interleave(lists.block_q, dim=2)
        mask = torch.cat([mask, left_out[:, :, :nq]], dim=-1).to(q.dtype).log()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


class Masked(SparseBackend):
    """See above."""

    named_only = True

    def refuses(self, call: Call, decision) -> str | None:
        reason = super().refuses(call, decision)
        size = call.batch * call.heads * call.q_len * call.kv_len
        return f"a mask of {size / 2**30:.1f} GiB" if reason is None and size > MASK else reason


BACKENDS = (Masked("sdpa_masked", sdpa.BACKENDS[0], attend, lambda call, gaps: (BLOCK, BLOCK)),)
