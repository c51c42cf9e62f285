"""The key blocks of each query block, as lists that a kernel walks along.

Letters: B batch, H heads, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockList:
    """Lists of key blocks.

    Args:
        counts: int32 [B, H, nq], how many key blocks a query block attends to.
        indices: int32 [B, H, nq, nk], which ones, ascending, the first counts of them; behind them anything that is a block.
        keep: bool [B, H, nq, nk], the same as a mask; what takes part in a pooled remainder is what it leaves out.
        live: int32 [nk], how many tokens of a key block are there, the first ones.
        block_q, block_k: places of a block.
        gaps: whether other blocks than the last may be filled in part.

    Dimensions B and H may be expanded (stride 0): lists that are the same for all.
    """

    counts: Tensor
    indices: Tensor
    keep: Tensor
    live: Tensor
    block_q: int
    block_k: int
    gaps: bool = False

    @classmethod
    def of(cls, keep: Tensor, live: Tensor, block_q: int, block_k: int, *, gaps: bool = False) -> BlockList:
        """Lists from a mask bool [B, H, nq, nk]; without a synchronisation."""
        is_mask = keep.dtype == torch.bool and keep.ndim == 4
        if not is_mask or live.dtype != torch.int32 or live.shape != keep.shape[-1:]:
            raise ValueError(
                f"BlockList: wanted a mask bool [B, H, nq, nk] and live int32 [nk], got {keep.dtype} {tuple(keep.shape)} "
                f"and {live.dtype} {tuple(live.shape)}"
            )
        nk = keep.shape[-1]
        counts = keep.sum(-1, dtype=torch.int32)
        # What is kept goes to its rank among the kept, the rest behind it in turn: a permutation, so no place stays unset.
        among_kept, among_left = (x.cumsum(-1, dtype=torch.int32) for x in (keep, ~keep))
        rank = torch.where(keep, among_kept, counts[..., None] + among_left) - 1
        blocks = torch.arange(nk, dtype=torch.int32, device=keep.device).expand(keep.shape)
        indices = torch.empty_like(blocks, memory_format=torch.contiguous_format).scatter_(-1, rank.long(), blocks)
        return cls(counts=counts, indices=indices, keep=keep, live=live, block_q=block_q, block_k=block_k, gaps=gaps)

    def expand(self, batch: int, heads: int) -> BlockList:
        """For all rows of a batch and all heads, where they share lists."""
        return BlockList(
            counts=self.counts.expand(batch, heads, -1),
            indices=self.indices.expand(batch, heads, -1, -1),
            keep=self.keep.expand(batch, heads, -1, -1),
            live=self.live,
            block_q=self.block_q,
            block_k=self.block_k,
            gaps=self.gaps,
        )

    @property
    def density(self) -> Tensor:
        """The share of the keys that a block of queries attends to, mean over blocks, fp32 []; empty places do not count."""
        weight = self.live.float() / self.live.sum()
        return (self.keep * weight).sum(-1).mean()

    def token_mask(self) -> Tensor:
        """bool [B, H, nq block_q, nk block_k] over the places of whole blocks, for the oracle."""
        keys = torch.arange(self.block_k, device=self.live.device) < self.live[:, None]
        mask = self.keep[..., None] & keys
        return mask.flatten(-2).repeat_interleave(self.block_q, dim=-2)
