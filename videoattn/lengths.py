"""Prefix lengths: the keys of row b that count are the first kv_len[b].

Every mask that a diffusers video DiT gives to its attention is of this kind: text padded on the right. As a device
tensor int32 [B] they cost a kernel nothing; backends that need them on the host ask here, once per tensor, so a
generation synchronises once and not once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HOST, _MASKS = "_videoattn_host_lengths", "_videoattn_masks"  # kept on the tensor object: the cheapest look-up


def host_lengths(kv_len: Tensor) -> tuple[int, ...]:
    """The lengths as Python integers; synchronises the first time a tensor is seen. It must not change afterwards."""
    lengths = getattr(kv_len, _HOST, None)
    if lengths is None:
        lengths = tuple(kv_len.tolist())
        setattr(kv_len, _HOST, lengths)
    return lengths


def key_mask(kv_len: Tensor, nk: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """[B, 1, 1, nk]: bool, True where a key counts; or of a float dtype, to be added: 0 where it counts, else -inf.

    Kept as long as `kv_len` lives.
    """
    masks = getattr(kv_len, _MASKS, None)
    if masks is None:
        masks = {}
        setattr(kv_len, _MASKS, masks)
    if (nk, dtype) not in masks:
        keep = torch.arange(nk, device=kv_len.device) < kv_len.view(-1, 1, 1, 1)
        if dtype != torch.bool:
            keep = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf)
        masks[nk, dtype] = keep
    return masks[nk, dtype]


def prefix_lengths(mask: Tensor) -> Tensor | None:
    """int32 [B] if `mask` [B, Nk] (bool or 0/1) keeps a prefix of the keys in every row, else None. Synchronises."""
    keep = mask.bool()
    lengths = keep.sum(dim=-1, dtype=torch.int32)
    is_prefix = torch.equal(keep, torch.arange(keep.shape[-1], device=keep.device) < lengths[:, None])
    return lengths if is_prefix else None
