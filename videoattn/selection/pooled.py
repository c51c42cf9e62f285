"""Key blocks by the product of block means, those above a threshold of each row: no sort, and a density that adapts.

    score_ij = scale qbar_i . kbar_j,    j stays where score_ij >= mean_j score_ij + tau std_j score_ij

qbar, kbar: means over the live places of a block; mean and std (of the population) over the video's key blocks of the
row (Sol-Attn, arXiv:2607.24027; NVlabs/Sana, techniques/sparse_backends/sol_attn). The published code takes mean and
std from those of kbar's channels as if channels were independent, so that it needs no scores beforehand; here they are
those of the scores themselves, which at blocks of 128 cost 1 / 16,384 of q k^T. It also keeps the blocks before and
after the diagonal.

All in fp32: scores in bf16 tie at the threshold, and ties favour the first blocks. The cost is one read of q and k, or
none where the kernel that arranges them makes the means on its way: `Pooled.keep_by_means`.

Letters: B batch, P places, H heads, Hkv key heads, G = H / Hkv, D head_dim, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Blocks, Order, block_sums
from videoattn.selection.threshold import best, check_share, video_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """Sol-Attn's routing. Only the video's key blocks are judged; text is kept by what is required.

    Args:
        tau: standard deviations above the mean, any finite number; 1.0 where neither is given. So high a tau that no
            score reaches it keeps nothing.
        density: instead, the share of the video's key blocks to keep, the best ones, rounded up.
        order: in which the tokens lie; as published, Morton order.

    NaN: a query block with a NaN score keeps every key block of the video; one in k concerns all query blocks of the
    head.
    """

    dynamic: ClassVar[bool] = True

    tau: float | None = None
    density: float | None = None
    order: Order = "morton"

    def __post_init__(self) -> None:
        if self.tau is None and self.density is None:
            object.__setattr__(self, "tau", 1.0)
        if self.tau is not None and self.density is not None:
            raise ValueError(f"Pooled: wanted tau or density, got tau={self.tau} and density={self.density}")
        if self.tau is not None and not math.isfinite(self.tau):
            raise ValueError(f"Pooled: tau: wanted a finite number, got {self.tau}")
        check_share("Pooled: density", self.density)
        if self.order not in ORDERS:
            raise ValueError(f"Pooled: wanted an order of {', '.join(ORDERS)}, got {self.order!r}")

    @torch.no_grad()
    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [B, H, nq, nk]."""
        if q is None or k is None:
            raise ValueError("Pooled: wanted q and k, got none")
        q_means, k_means = block_means(q, arrangement.queries), block_means(k, arrangement.keys)
        return self.keep_by_means(arrangement, q_means, k_means, scale)

    @torch.no_grad()
    def keep_by_means(
        self, arrangement: Arrangement, q_means: Tensor, k_means: Tensor, scale: float | None = None
    ) -> Tensor:
        """The same mask, bool [B, H, nq, nk], from means that are there already.

        Args:
            q_means: fp32 [B, nq, H, D]. k_means: fp32 [B, nk, Hkv, D]. Over the live places of each block.
            scale: on q k^T, 1 / sqrt(D) where None.

        Raises:
            ValueError: means of other blocks or in another dtype.
        """
        for name, x, blocks in (("q", q_means, arrangement.queries), ("k", k_means, arrangement.keys)):
            if x.dtype != torch.float32 or x.shape[1] != blocks.count:
                raise ValueError(
                    f"Pooled: wanted {name}_means fp32 of {blocks.count} blocks, got {x.dtype} of {x.shape[1]}"
                )
        video = arrangement.keys.video
        scores = block_scores(q_means, k_means[:, :video], scale)
        if not video:  # a short one may share its only block with text
            kept = scores.bool()
        elif self.density is not None:
            kept = best(scores, self.density)
        else:
            std, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
            kept = ~(scores < mean + self.tau * std)  # not ">=", which NaN never is
        return video_only(kept, arrangement.keys.count)


def block_scores(q_means: Tensor, k_means: Tensor, scale: float | None = None) -> Tensor:
    """scale qbar_i . kbar_j, fp32 [B, H, nq, nk], from fp32 means [B, nq, H, D] and [B, nk, Hkv, D]."""
    queries = q_means * (q_means.shape[-1] ** -0.5 if scale is None else scale)
    queries = queries.unflatten(2, (k_means.shape[2], -1))
    with torch.autocast(q_means.device.type, enabled=False):
        return torch.einsum("bihgd,bjhd->bhgij", queries, k_means).flatten(1, 2)


def block_means(x: Tensor, blocks: Blocks) -> Tensor:
    """Means of x [B, P, H, D] over the live places of each of n blocks, fp32 [B, n, H, D].

    Empty places repeat the last live one, and a block's last place holds it either way: so one sum over everything,
    less what was counted too often; x is not masked, nor on a GPU copied to fp32. The sum then errs by up to 2^-15 of
    the greatest element.
    """
    starts = torch.arange(blocks.count, device=x.device) * blocks.size
    ends = (starts + blocks.size).clamp(max=x.shape[1])
    live = blocks.live[:, None, None]
    empty = (ends - starts)[:, None, None] - live
    return (block_sums(x, blocks.size, 1, torch.float32) - empty * x[:, ends - 1].float()) / live
