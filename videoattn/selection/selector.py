"""What a selector is, and what stays whatever it says.

Letters: B batch, P places (tokens in order), H heads, Hkv key heads, D head_dim, nq and nk blocks of queries and of keys.
"""

from __future__ import annotations

import importlib.util
from dataclasses import MISSING, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from videoattn.selection.arrangement import Arrangement, Order
from videoattn.selection.block_list import BlockList


class Selector(Protocol):
    """A frozen dataclass of parameters, so that plans go by it.

    order: in which the tokens lie for it. dynamic: whether it looks at q and k.
    """

    order: Order
    dynamic: ClassVar[bool]

    def keep(
        self,
        arrangement: Arrangement,
        heads: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Which key blocks to keep, bool [B, H, nq, nk]; dimensions of 1 in place of B and H where all are alike.

        q: [B, P, H, D]; k: [B, P, Hkv, D], arranged; of a dynamic selector. scale: on q k^T, 1 / sqrt(D) where None.

        One that cannot serve every call also has `refuses(heads, block_q, block_k) -> str | None`.
        """


SELECTORS = {
    "sliding_tiles": ("videoattn.selection.sliding_tiles", "SlidingTiles"),
    "radial": ("videoattn.selection.radial", "Radial"),
    "bands": ("videoattn.selection.bands", "Bands"),
    "sharded": ("videoattn.selection.sharded", "Sharded"),
    "xattention": ("videoattn.selection.xattention", "XAttention"),
    "pooled": ("videoattn.selection.pooled", "Pooled"),
    "random": ("videoattn.selection.random", "Random"),
}
"""Name -> module and class; "random" is the control that all others are measured against."""


def selector_of(name: str, **parameters: object) -> Selector:
    """A selector by its name."""
    if name not in SELECTORS:
        raise ValueError(f"selector: wanted one of {', '.join(SELECTORS)}, got {name!r}")
    module, cls = SELECTORS[name]
    return getattr(importlib.import_module(module), cls)(**parameters)


def label(selector: Selector) -> str:
    """A selector as reports show it: its name, and the parameters that are not the default's.

    >>> label(selector_of("pooled", tau=0.8))
    'pooled tau=0.8'
    """
    cls = type(selector)
    name = next((name for name, at in SELECTORS.items() if at == (cls.__module__, cls.__qualname__)), cls.__name__)
    usual = None if any(field.default is MISSING for field in fields(selector)) else cls()
    given = {field.name: getattr(selector, field.name) for field in fields(selector)}
    shown = (key for key, value in given.items() if value is not None and value != getattr(usual, key, None))
    return " ".join([name, *(f"{key}={given[key]}" for key in shown)])


def required(arrangement: Arrangement, *, first_frame: bool = True) -> Tensor:
    """What stays whatever a selector says, bool [nq, nk]: the diagonal, which is the key blocks that share a place with
    the query block, text keys, and all keys of text queries.

    first_frame: also every key block of the first frame alone, which image-to-video models condition on and others attend
        to from everywhere (Radial Attention, arXiv:2506.19852). A block that holds later frames too is not meant: in tiles
        and in Morton order these would be a quarter to half of all.
    """
    queries, keys = arrangement.queries, arrangement.keys
    of_query, of_key = (torch.arange(x.count, device=x.live.device) * x.size for x in (queries, keys))
    of_query = of_query[:, None]
    keep = (of_query < of_key + keys.size) & (of_key < of_query + queries.size)
    keep[:, keys.video :] = True
    keep[queries.video :] = True
    if first_frame:
        keep[:, : keys.video] |= keys.boxes[:, 0, 1] == 0
    return keep


def select(
    selector: Selector,
    arrangement: Arrangement,
    heads: int,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    scale: float | None = None,
    first_frame: bool = True,
) -> BlockList:
    """The lists of a selector, with what is required.

    Args:
        heads: of q. q: [B, P, H, D]; k: [B, P, Hkv, D], in the arrangement's order; of a dynamic selector.
        scale: on q k^T, 1 / sqrt(D) where None. first_frame: see `required`.

    Raises:
        ValueError: tokens in another order than the selector's, or q and k of another number of places.
    """
    if arrangement.order != selector.order:
        raise ValueError(f"select: wanted tokens in the order {selector.order!r}, got {arrangement.order!r}")
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.shape[1] != arrangement.index.shape[0]:
            raise ValueError(f"select: wanted {name} of {arrangement.index.shape[0]} places, got {x.shape[1]}")
    with torch.autocast(arrangement.index.device.type, enabled=False):  # scores in 16 bits tie
        keep = selector.keep(arrangement, heads, q, k, scale)
    batch = keep.shape[0] if q is None else q.shape[0]
    return lists_of(keep, required(arrangement, first_frame=first_frame), arrangement, batch, heads)


def lists_of(
    keep: Tensor, required: Tensor, arrangement: Arrangement, batch: int, heads: int, kv_len: Tensor | None = None
) -> BlockList:
    """Lists from a mask, with what is required; by a kernel on a GPU where Triton is installed, by torch elsewhere.

    Args:
        keep: bool [B or 1, H or 1, nq, nk]. required: bool [nq, nk].
        kv_len: int32 [B]: key blocks of row b that begin at or beyond kv_len[b] are in no list.
    """
    queries, keys, gaps = arrangement.queries, arrangement.keys, arrangement.order == "tiles"
    if keep.is_cuda and importlib.util.find_spec("triton"):
        from videoattn.kernels import routing  # not before: importing this package does not import Triton

        own = (batch, heads) if kv_len is not None else keep.shape[:2]  # where rows or heads are alike they share lists
        sizes = {"block_q": queries.size, "block_k": keys.size, "batch": own[0], "heads": own[1]}
        lists = routing.lists(keep, required, keys.live, **sizes, kv_len=kv_len, gaps=gaps)
        return lists if own == (batch, heads) else lists.expand(batch, heads)
    keep = keep | required
    if kv_len is not None:
        begins = torch.arange(keys.count, device=keep.device) * keys.size
        keep = keep & (begins < kv_len[:, None])[:, None, None]
    return BlockList.of(keep, keys.live, queries.size, keys.size, gaps=gaps).expand(batch, heads)
