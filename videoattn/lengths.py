"""Prefix lengths: the keys of row b that count are the first kv_len[b].

Every mask that a diffusers video DiT gives to its attention is of this kind: text padded on the right. As a device
tensor int32 [B] they cost a kernel nothing; backends that need them on the host ask here, once per tensor, so a
generation synchronises once and not once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def host_lengths(kv_len: Tensor) -> tuple[int, ...]:
    """The lengths as Python integers; synchronises the first time a tensor is seen."""
    lengths = _host.get(kv_len)
    if lengths is None:
        lengths = _host[kv_len] = tuple(kv_len.tolist())
    return lengths


def key_mask(kv_len: Tensor, nk: int) -> Tensor:
    """bool [B, 1, 1, nk], True where a key counts; kept as long as `kv_len` lives."""
    masks = _masks.get(kv_len)
    if masks is None:
        masks = _masks[kv_len] = {}
    if nk not in masks:
        masks[nk] = torch.arange(nk, device=kv_len.device) < kv_len.view(-1, 1, 1, 1)
    return masks[nk]


def prefix_lengths(mask: Tensor) -> Tensor | None:
    """int32 [B] if `mask` [B, Nk] (bool or 0/1) keeps a prefix of the keys in every row, else None. Synchronises."""
    keep = mask.bool()
    lengths = keep.sum(dim=-1, dtype=torch.int32)
    is_prefix = torch.equal(keep, torch.arange(keep.shape[-1], device=keep.device) < lengths[:, None])
    return lengths if is_prefix else None
