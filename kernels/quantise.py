"""STUB for tests and the bench: the contract of the operands, made slowly in torch (the Triton pre-pass replaces this)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KEYS = 128
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
OFFSET = 8.807
TINY = 1e-20


class Quantised(NamedTuple):
    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    lse_shift: Tensor | None


def quantise_plain(q, k, v, *, pv="fp8", scale=None, kv_len=None, return_lse=False) -> Quantised:
    """q [B, Nq, H, D], k, v [B, Nk, Hkv, D]; pv "fp8", "int8" or "16bit"."""
    (b, _, h, d), (_, nk, h_kv, _) = q.shape, k.shape
    scale = d**-0.5 if scale is None else scale
    w = -(-d // 16) * 16
    lens = torch.full((b,), nk, device=q.device) if kv_len is None else kv_len.clamp(0, nk)
    valid = (torch.arange(nk, device=q.device) < lens[:, None])[:, None, :, None]  # [B, 1, Nk, 1]
    qf = q.transpose(1, 2).float() * (scale * math.log2(math.e))
    qs = (qf.abs().amax(-1) / 127).clamp_min(TINY) + (qf * 0).sum(-1)
    q8 = torch.floor(qf / qs[..., None] + 0.5).clamp(-127, 127).to(torch.int8)
    kf = k.transpose(1, 2).float().masked_fill(~valid, 0)
    kbar = kf.sum(2, keepdim=True) / lens.clamp_min(1)[:, None, None, None]
    kf = (kf - kbar).masked_fill(~valid, 0)
    blocks = -(-nk // KEYS)
    padded = torch.nn.functional.pad(kf, (0, 0, 0, blocks * KEYS - nk))
    groups = padded.view(b, h_kv, blocks, KEYS // 8, 4, 2, d)
    ks = (groups.abs().amax((3, 5, 6)) / 127).clamp_min(TINY) + (groups * 0).sum((3, 5, 6))
    k8 = torch.floor(groups / ks[:, :, :, None, :, None, None] + 0.5).clamp(-127, 127)
    k8 = k8.reshape(b, h_kv, blocks * KEYS, d)[:, :, :nk].to(torch.int8)
    shift = None
    if return_lse:
        kbar_q = kbar.repeat_interleave(h // h_kv, 1)
        shift = (q.transpose(1, 2).float() * kbar_q).sum(-1).mul(scale).contiguous()
    v_scale = None
    if pv != "16bit":
        vf = v.transpose(1, 2).float().masked_fill(~valid, 0)
        top = 448 if pv == "fp8" else 127
        v_scale = (vf.abs().amax(2) / top).clamp_min(TINY) + (vf * 0).sum(2)
        vq = vf / v_scale[:, :, None, :]
        vq = torch.nn.functional.pad(vq, (0, w - d, 0, blocks * KEYS - nk))
        order = torch.tensor(ORDER, device=q.device)
        vq = vq.view(b, h_kv, blocks * KEYS // 16, 16, w)[:, :, :, order].reshape(b, h_kv, blocks * KEYS, w)
        vq = vq.transpose(2, 3).contiguous()
        v = vq.to(torch.float8_e4m3fn) if pv == "fp8" else torch.floor(vq + 0.5).clamp(-127, 127).to(torch.int8)
    pad = (0, w - d)
    return Quantised(
        torch.nn.functional.pad(q8, pad).contiguous(), qs.contiguous(), torch.nn.functional.pad(k8, pad).contiguous(),
        ks.contiguous(), v, None if v_scale is None else v_scale.contiguous(), shift,
    )  # fmt: skip
