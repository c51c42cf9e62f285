"""Key blocks by the product of block means, those above a threshold of each row: no sort, and a density that adapts.

    score_ij = scale qbar_i . kbar_j,    j stays where score_ij >= mean_j score_ij + tau std_j score_ij

qbar, kbar: means over the live places of a block; mean and std (of the population) over the video's key blocks of the
row (Sol-Attn, arXiv:2607.24027; NVlabs/Sana, techniques/sparse_backends/sol_attn). The published code takes mean and
std from those of kbar's channels as if channels were independent, so that it needs no scores beforehand; here they are
those of the scores themselves, which at blocks of 128 cost 1 / 16,384 of q k^T. It also keeps the blocks before and
after the diagonal.

All in fp32: scores in bf16 tie at the threshold, and ties favour the first blocks. The cost is one read of q and k.

Letters: B batch, P places, H heads, Hkv key heads, G = H / Hkv, D head_dim, n blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Order
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
        """bool [B, H, n, n]."""
        if q is None or k is None:
            raise ValueError("Pooled: wanted q and k, got none")
        scores = block_scores(q, k, arrangement, scale)
        if self.density is not None:
            kept = best(scores, self.density)
        else:
            std, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
            kept = ~(scores < mean + self.tau * std)  # not ">=", which NaN never is
        return video_only(kept, arrangement.blocks)


def block_scores(q: Tensor, k: Tensor, arrangement: Arrangement, scale: float | None = None) -> Tensor:
    """scale qbar_i . kbar_j, fp32 [B, H, n, video blocks], from q [B, P, H, D] and k [B, P, Hkv, D]."""
    places = arrangement.video_blocks * arrangement.block
    means = block_means(q, arrangement.live) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys = block_means(k[:, :places], arrangement.live[: arrangement.video_blocks])
    means = means.unflatten(2, (k.shape[2], -1))
    return torch.einsum("bihgd,bjhd->bhgij", means, keys).flatten(1, 2)


def block_means(x: Tensor, live: Tensor) -> Tensor:
    """Means of x [B, P, H, D] over the live places of each block, fp32 [B, n, H, D]; live: int32 [n].

    Empty places repeat the last live one, and a block's last place holds it either way: so one sum over everything,
    less what was counted too often; x is not masked, nor on a GPU copied to fp32. The sum then errs by up to 2^-15 of
    the greatest element.
    """
    x = x.unflatten(1, (live.shape[0], -1))
    live = live[:, None, None]
    return (x.sum(2, dtype=torch.float32) - (x.shape[2] - live) * x[:, :, -1].float()) / live
