"""From scores of key blocks to those that are kept: by a share of their mass, or a fixed number of the best.

Along the last dimension; a row with NaN keeps everything, for what cannot be judged must not be left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def by_mass(mass: Tensor, tau: float) -> Tensor:
    """The fewest entries, greatest first, that hold the share tau of a row's mass; bool like mass.

    An entry stays while those before it hold less than tau of the total, so the one that crosses is in (XAttention, Xu
    et al., arXiv:2503.16428, section 2.2). Of equal ones the first come first.

    Args:
        mass: fp32, not negative. tau: above 0, to 1; at 1 what does not change the fp32 sum may go.
    """
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    running = ranked.cumsum(-1)
    before = torch.nn.functional.pad(running[..., :-1], (1, 0))
    # "Not at least" and not "less than": with NaN in the total no comparison holds.
    kept = ~(before >= tau * running[..., -1:])
    return torch.empty_like(kept).scatter_(-1, order, kept)


def best(scores: Tensor, density: float) -> Tensor:
    """The `count` greatest of a row; bool like scores."""
    chosen = scores.topk(count(density, scores.shape[-1]), sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    return kept | scores.isnan().any(-1, keepdim=True)


def count(density: float, blocks: int) -> int:
    """How many of the blocks make up the density, rounded up: ceil(density blocks), one at least where there are any.

    >>> count(0.07, 100), count(0.001, 100)
    (7, 1)
    """
    # 0.07 * 100 is 7.000000000000001: what only rounding added is no block.
    return min(blocks, max(1, math.ceil(density * blocks * (1 - 1e-12))))


def video_only(keep: Tensor, blocks: int) -> Tensor:
    """A mask of the video's key blocks, the first ones, as one of all key blocks; text is not kept by it."""
    return torch.nn.functional.pad(keep, (0, blocks - keep.shape[-1]))


def check_share(what: str, value: float | None) -> None:
    """Raises ValueError unless value is above 0, and 1 at most, or None."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{what}: wanted a share above 0, 1 at most, got {value}")
