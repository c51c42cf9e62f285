"""Key blocks by their attention mass, estimated on antidiagonals: XAttention (Xu et al., arXiv:2503.16428, section 2).

Blocks are cut into groups of S places. A group of queries meets a group of keys on the antidiagonal of their S x S
scores, which touches every row and every column once, so that both vertical and slanted patterns cross it:

    score_ab = scale / S  sum_s q[a S + S-1-s] . k[b S + s]
    mass_IJ  = sum_{a in I} w_a  sum_{b in J} p_ab,    p_ab = w_b exp(score_ab) / sum_b w_b exp(score_ab)

and of each row the fewest key blocks stay that hold tau of the mass. That is a matrix product of P / S groups with an
inner size of S D: 1 / S of q k^T.

w is the live share of a group. The paper has none, and its code lets padding into the softmax, as keys with score 0: of
130 tokens, the 2 in the second block got half of the mass. Here a group that is empty has weight 0, -inf before the
softmax, and one with r live places counts r / S: of queries without preference every block gets its share of the
tokens. The places that are missing in such a group repeat its last token, in place of which nothing better is known;
so do those beyond P.

Letters: B batch, P places, H heads, Hkv key heads, G = H / Hkv, D head_dim, nq and nk blocks of queries and of keys, S
stride, T = P / S groups, rounded up.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Blocks, Order, block_sums
from videoattn.selection.threshold import best, by_mass, check_share, video_only

SCORES = 2**24
"""Scores held at a time, 64 MiB in fp32, unless those of one query block in a key head's G heads are more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttention:
    """XAttention's selection; by tau, text blocks are judged as any others.

    Args:
        stride: places of a group; divides the blocks of queries and of keys.
        tau: share of the mass to keep, above 0, 1 at most; 0.9 where neither is given.
        density: instead, the share of the video's key blocks to keep, those with the greatest mass, rounded up.
        order: in which the tokens lie; as published, frame by frame.

    NaN: a query block with a NaN score keeps everything; one in k concerns all query blocks of the head.
    """

    dynamic: ClassVar[bool] = True

    stride: int = 16
    tau: float | None = None
    density: float | None = None
    order: Order = "raster"

    def __post_init__(self) -> None:
        if self.tau is None and self.density is None:
            object.__setattr__(self, "tau", 0.9)
        if self.tau is not None and self.density is not None:
            raise ValueError(f"XAttention: wanted tau or density, got tau={self.tau} and density={self.density}")
        check_share("XAttention: tau", self.tau)
        check_share("XAttention: density", self.density)
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"XAttention: stride: wanted 1 or more, got {self.stride}")
        if self.order not in ORDERS:
            raise ValueError(f"XAttention: wanted an order of {', '.join(ORDERS)}, got {self.order!r}")

    def refuses(self, heads: int, block_q: int, block_k: int) -> str | None:
        """Why it does not select among blocks of a size, or None."""
        if block_q % self.stride or block_k % self.stride:
            return f"XAttention: wanted a stride that divides blocks of {block_q} and {block_k}, got {self.stride}"
        return None

    @torch.no_grad()
    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [B, H, nq, nk]. By the kernel on a GPU where it takes the call, by torch elsewhere."""
        if q is None or k is None:
            raise ValueError("XAttention: wanted q and k, got none")
        queries, keys = arrangement.queries, arrangement.keys
        mass = _estimator(q, k, queries, keys, self.stride)(q, k, queries, keys, stride=self.stride, scale=scale)
        return self.keep_by_mass(arrangement, mass)

    def keep_by_mass(self, arrangement: Arrangement, mass: Tensor) -> Tensor:
        """The same mask from masses, fp32 [B, H, nq, nk]."""
        if self.density is None:
            return by_mass(mass, self.tau)
        keys = arrangement.keys
        return video_only(best(mass[..., : keys.video], self.density), keys.count)


def _estimator(q: Tensor, k: Tensor, queries: Blocks, keys: Blocks, stride: int):
    if q.is_cuda and importlib.util.find_spec("triton"):
        from videoattn.kernels import antidiagonal  # not before: importing this package does not import Triton

        if antidiagonal.refuses(q, k, queries, keys, stride) is None:
            return antidiagonal.block_mass
    return block_mass


def block_mass(
    q: Tensor, k: Tensor, queries: Blocks, keys: Blocks, *, stride: int, scale: float | None = None
) -> Tensor:
    """mass_IJ, fp32 [B, H, nq, nk]; a row's sum is the number of its live queries over S.

    In plain torch and fp32, a key head and some query blocks at a time: SCORES scores and their softmax are held, and
    the keys of one head in fp32, never T x T.

    Args:
        q: [B, P, H, D]; k: [B, P, Hkv, D]. queries, keys: their blocks.
        stride: S. scale: 1 / sqrt(D) by default.

    Raises:
        ValueError: a stride that does not divide the blocks.
    """
    if queries.size % stride or keys.size % stride:
        raise ValueError(
            f"XAttention: wanted a stride that divides blocks of {queries.size} and {keys.size}, got {stride}"
        )
    batch, places, heads, head_dim = q.shape
    kv_heads, groups = k.shape[2], -(-places // stride)
    group, per_q, per_k = heads // kv_heads, queries.size // stride, keys.size // stride
    factor = (head_dim**-0.5 if scale is None else scale) / stride
    q_share, k_share = (group_share(blocks, stride)[:groups] for blocks in (queries, keys))
    at = torch.arange(groups * stride, device=q.device).clamp(max=places - 1)
    step = max(1, SCORES // (group * per_q * groups))
    mass = torch.empty(batch, heads, queries.count, keys.count, dtype=torch.float32, device=q.device)
    for b in range(batch):
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            of_keys = k[b, at, head].float().reshape(groups, stride * head_dim).T
            for first in range(0, queries.count, step):
                some = at[first * queries.size : (first + step) * queries.size]
                share = q_share[first * per_q : (first + step) * per_q, None]
                # Scaled before the sum over S D; the places of a group in reverse: [G, groups, S D].
                of_queries = (q[b, some, mine].float() * factor).unflatten(0, (-1, stride)).flip(1)
                of_queries = of_queries.permute(2, 0, 1, 3).flatten(2)
                # Filled, not only biased: inf - inf would be NaN.
                scores = (of_queries @ of_keys).add_(k_share.log()).masked_fill_(k_share == 0, -torch.inf)
                sums = block_sums(scores.softmax(-1), per_k, -1).mul_(share).masked_fill_(share == 0, 0.0)
                mass[b, mine, first : first + step] = block_sums(sums, per_q, 1)
    return mass


def group_share(blocks: Blocks, stride: int) -> Tensor:
    """The share of live places of each group of `stride`, fp32; those of the last block reach beyond T."""
    starts = torch.arange(0, blocks.size, stride, dtype=torch.int32, device=blocks.live.device)
    return ((blocks.live[:, None] - starts).clamp(0, stride) / stride).flatten()
