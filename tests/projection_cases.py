"""Raw projections of every family, with the host's norms, rotations and tables: for tests of the fused kernels."""

from dataclasses import dataclass

import torch
from diffusers.models.normalization import RMSNorm
from kernel_checks import DEVICE
from torch import nn

from videoattn.pipelines.cogvideox import CogVideoXProcessor
from videoattn.pipelines.hunyuan_video import JointProcessor
from videoattn.pipelines.ltx import LTXProcessor
from videoattn.pipelines.wan import WanProcessor
from videoattn.prologue import Prologue, Stream

FP16, BF16 = torch.float16, torch.bfloat16
FAMILIES = ("wan", "ltx", "hunyuan dual", "hunyuan single", "cogvideox", "cogvideox 2b", "plain")
TEXT = 11


@dataclass
class Case:
    """parts: a list a stream: [[q, k, v], norm_q, norm_k, rope, rope_span]."""

    prologue: Prologue
    heads: int
    head_dim: int
    parts: list[list]


def streams(case, fresh=False):
    """Streams of a case; `fresh` on tensors of their own, which the torch Prologue may write to."""
    return [Stream(*(x.clone() if fresh else x for x in xs), *rest) for xs, *rest in case.parts]


def norm(cls, width, dtype=BF16, eps=1e-6):
    made = cls(width, eps=eps).to(DEVICE, dtype).requires_grad_(False)
    made.weight.data = (torch.rand(width) + 0.5).to(DEVICE, dtype)
    if getattr(made, "bias", None) is not None:
        made.bias.data = torch.randn(width).to(DEVICE, dtype)
    return made


def make(name, *, batch=2, tokens=70, heads=3, head_dim=24, dtype=BF16, table=torch.float32, fused=False):
    """A family's case. table: dtype of cos and sin; fused: q, k and v are slices of one projection."""

    def projections(n):
        x = torch.randn(batch, n, 3 * heads * head_dim)
        x = (x + torch.randn(3 * heads * head_dim)).to(DEVICE, dtype)  # with an offset to smooth
        parts = x.chunk(3, dim=-1)
        return list(parts) if fused else [part.contiguous() for part in parts]

    def rope(*shape):
        angles = 6.28 * torch.rand(*shape[:-1], shape[-1] // 2)
        return tuple(f(angles).repeat_interleave(2, -1).to(DEVICE, table) for f in (torch.cos, torch.sin))

    width = heads * head_dim
    if name == "wan":
        cos, sin = rope(1, tokens, 1, head_dim)
        norms = [norm(nn.RMSNorm, width, dtype), norm(nn.RMSNorm, width, dtype)]
        return Case(
            WanProcessor.prologue,
            heads,
            head_dim,
            [[projections(tokens), *norms, (cos[..., 0::2], sin[..., 1::2]), None]],
        )
    if name == "ltx":
        norms = [norm(nn.RMSNorm, width, dtype), norm(nn.RMSNorm, width, dtype)]
        return Case(
            LTXProcessor.prologue, heads, head_dim, [[projections(tokens), *norms, rope(batch, tokens, width), None]]
        )
    if name.startswith("hunyuan"):
        video, text = ([norm(RMSNorm, head_dim, dtype), norm(RMSNorm, head_dim, dtype)] for _ in range(2))
        parts = [[projections(tokens), *video, rope(tokens, head_dim), None], [projections(TEXT), *text, None, None]]
        if name == "hunyuan single":
            parts = [[projections(tokens + TEXT), *video, rope(tokens, head_dim), slice(tokens)]]
        return Case(JointProcessor.prologue, heads, head_dim, parts)
    if name.startswith("cogvideox"):
        norms = [norm(nn.LayerNorm, head_dim, dtype), norm(nn.LayerNorm, head_dim, dtype)]
        turn = [None, None] if name.endswith("2b") else [rope(tokens, head_dim), slice(TEXT, None)]
        return Case(CogVideoXProcessor.prologue, heads, head_dim, [[projections(tokens + TEXT), *norms, *turn]])
    return Case(Prologue(norm="per_head"), heads, head_dim, [[projections(tokens), None, None, None, None]])
