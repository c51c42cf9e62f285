"""Random key blocks: the control that every selector has to beat at the same density.

Letters: B batch, H heads, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videoattn.selection.arrangement import ORDERS, Arrangement, Order
from videoattn.selection.threshold import best, check_share, video_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """ceil(density * video blocks) of the video's key blocks for each query block and head.

    Args:
        density: above 0, 1 at most; before what is required is added.
        seed: the same gives the same blocks at every call and on every device.
        order: that of the selector which it is the control of.
    """

    dynamic: ClassVar[bool] = False

    density: float
    seed: int = 0
    order: Order = "raster"

    def __post_init__(self) -> None:
        check_share("Random: density", self.density)
        if self.order not in ORDERS:
            raise ValueError(f"Random: wanted an order of {', '.join(ORDERS)}, got {self.order!r}")

    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """bool [B, H, nq, nk]; B of q, or 1. Nothing but the batch is read of q."""
        batch = 1 if q is None else q.shape[0]
        # On the CPU: a generator of its own leaves everybody's random state alone, and cards draw other numbers.
        generator = torch.Generator().manual_seed(self.seed)
        queries, keys = arrangement.queries, arrangement.keys
        drawn = torch.rand(batch, heads, queries.count, keys.video, generator=generator)
        return video_only(best(drawn, self.density), keys.count).to(keys.live.device)
