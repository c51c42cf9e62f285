"""Blocks of video transformers, some tokens at a time: from queries to the end of the block, but for K and V of all tokens.

The host's block holds its input, the normalised input in fp32, q, k and v and what norm and rotation make of them, then the
feed-forward's hidden values, 4 to 8 times as wide as the tokens. Here a block holds its input, K, V, the output that it
fills, and all else of one slice: 4 widths in the place of 11 to 18.

A block takes its own feed-forwards along. `FORWARDS["FeedForward"]` is for the rest: of families whose blocks are not here,
and of text refiners. Of a UNet neither is to be sliced by tokens: its rows are frames or places, and other files cut those.

Letters: B batch, N tokens, n of a slice, T text tokens, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from torch import Tensor, nn

from videoattn.pipelines import cogvideox, hunyuan_video, hunyuan_video15, ltx, wan
from videoattn.pipelines.processor import project_out
from videoattn.pipelines.wan import halves
from videoattn.prologue import Rope
from videoattn.slicing.attending import ADDED, Run, Way, attending, known
from videoattn.slicing.registry import Sliced
from videoattn.slicing.slices import Groups
from videoattn.slicing.whole import hooked

WAN_LIKE = {**wan.ADAPTER.processors, SkyReelsV2AttnProcessor: wan.WanProcessor}

Slice = Callable[[int, int], Tensor]
"""(start, stop) -> of these tokens [B, n, C]."""


def _host(block: nn.Module, *args, **kwargs) -> object:
    """The class's own forward, which the instance's stands before."""
    return type(block).forward(block, *args, **kwargs)


def _whole_where_hooked(*parts: str) -> Callable:
    """Of a block's forward: the host's own, while something hangs on one of these parts, whose calls are of slices here."""

    def of(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def guarded(block: nn.Module, groups: Groups, *args, **kwargs):
            if any(hooked(getattr(block, name)) for name in parts):
                return _host(block, *args, **kwargs)
            return forward(block, groups, *args, **kwargs)

        return guarded

    return of


def _feed_forward(module: nn.Module, groups: Groups, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """hidden_states: [..., N, C]."""
    x = hidden_states
    if x.ndim < 2:
        return _host(module, x, *args, **kwargs)

    def part(start: int, stop: int) -> Tensor:
        return _host(module, x[..., start:stop, :], *args, **kwargs)

    return groups.run("tokens", part, x.shape[-2], dim=x.ndim - 2)


# -- one stream of tokens, text by cross-attention ---------------------------------------------------------------------------


def _self_attention(
    attn: nn.Module, way: Way | None, run: Run, groups: Groups, whole: Callable[[Tensor], Tensor]
) -> Slice:
    """The projected output of self-attention, by slices. whole: calls the module on its whole input [B, N, C]."""
    if way is None:
        out = whole(groups.run("tokens", run.source, run.size, dim=1))
        return lambda start, stop: out[:, start:stop]
    at = attending(attn, way, (run,), partial(groups.ranges, "tokens"))
    return lambda start, stop: project_out(attn, at.attend(run, start, stop))


@_whole_where_hooked("attn2", "ffn")
def _wan(block: nn.Module, groups: Groups, hidden_states, encoder_hidden_states, temb, rotary_emb) -> Tensor:
    table = block.scale_shift_table  # fp32 [1, 6, C]
    if temb.ndim == 4:  # [B, N, 6, C]

        def values(start: int, stop: int) -> tuple[Tensor, ...]:
            return (table.unsqueeze(0) + temb[:, start:stop].float()).unbind(2)

        return _wan_block(block, groups, hidden_states, encoder_hidden_states, values, rotary_emb, None)
    of_all = (table + temb.float()).chunk(6, dim=1)
    return _wan_block(block, groups, hidden_states, encoder_hidden_states, lambda *_: of_all, rotary_emb, None)


@_whole_where_hooked("attn2", "ffn")
def _skyreels(
    block: nn.Module, groups: Groups, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask
) -> Tensor:
    table = block.scale_shift_table
    if temb.ndim == 4:  # [B, 6, N, C]

        def values(start: int, stop: int) -> tuple[Tensor, ...]:
            return (table.unsqueeze(2) + temb[:, :, start:stop].float()).unbind(1)

        return _wan_block(block, groups, hidden_states, encoder_hidden_states, values, rotary_emb, attention_mask)
    of_all = (table + temb.float()).chunk(6, dim=1)
    return _wan_block(
        block, groups, hidden_states, encoder_hidden_states, lambda *_: of_all, rotary_emb, attention_mask
    )


@_whole_where_hooked("attn2", "ffn")
def _wan_vace(
    block: nn.Module, groups: Groups, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb
) -> tuple[Tensor | None, Tensor]:
    """The same on control tokens, with a projection before the first block and one behind each."""
    x = control_hidden_states
    if block.proj_in is not None:
        x = block.proj_in(x) + hidden_states
    of_all = (block.scale_shift_table.to(temb.device) + temb.float()).chunk(6, dim=1)
    x = _wan_block(block, groups, x, encoder_hidden_states, lambda *_: of_all, rotary_emb, None)
    return None if block.proj_out is None else block.proj_out(x), x


def _wan_block(block, groups, x, context, values, tables, mask) -> Tensor:
    """values: (start, stop) -> shift, scale and gate of attention and of the feed-forward, fp32 [B, 1 or n, C] each."""

    def source(start: int, stop: int) -> Tensor:
        part = x[:, start:stop]
        shift, scale, *_ = values(start, stop)
        return (block.norm1(part.float()) * (1 + scale) + shift).type_as(part)

    def rope(start: int, stop: int) -> Rope:
        return halves(tuple(table[:, start:stop] for table in tables))

    run = Run(x.shape[1], source, rope)
    way = known(block.attn1, WAN_LIKE) if mask is None else None
    attended = _self_attention(block.attn1, way, run, groups, lambda y: block.attn1(y, None, mask, tables))

    def part(start: int, stop: int) -> Tensor:
        y, change = x[:, start:stop], attended(start, stop)  # before this slice's values stand a second time
        _, _, gate, shift, scale, ff_gate = values(start, stop)
        y = (y.float() + change * gate).type_as(y)
        del change
        y = y + block.attn2(block.norm2(y.float()).type_as(y), context, None, None)
        change = block.ffn((block.norm3(y.float()) * (1 + scale) + shift).type_as(y))
        return (y.float() + change.float() * ff_gate).type_as(y)

    return groups.run("tokens", part, x.shape[1], dim=1)


@_whole_where_hooked("attn2", "ff")
def _ltx(
    block: nn.Module,
    groups: Groups,
    hidden_states,
    encoder_hidden_states,
    temb,
    image_rotary_emb=None,
    encoder_attention_mask=None,
) -> Tensor:
    x, tables, (batch, count) = hidden_states, image_rotary_emb, temb.shape[:2]
    table = block.scale_shift_table  # [6, C]

    def values(start: int, stop: int) -> tuple[Tensor, ...]:
        of_tokens = temb if count == 1 else temb[:, start:stop]
        own = table[None, None].to(temb.device)
        return (own + of_tokens.reshape(batch, -1, len(table), table.shape[1])).unbind(2)

    def source(start: int, stop: int) -> Tensor:
        shift, scale, *_ = values(start, stop)
        return block.norm1(x[:, start:stop]) * (1 + scale) + shift

    def rope(start: int, stop: int) -> Rope:
        return tables[0][:, start:stop], tables[1][:, start:stop]

    run = Run(x.shape[1], source, None if tables is None else rope)
    way = known(block.attn1, ltx.ADAPTER.processors)
    attended = _self_attention(
        block.attn1, way, run, groups, lambda y: block.attn1(y, encoder_hidden_states=None, image_rotary_emb=tables)
    )

    def part(start: int, stop: int) -> Tensor:
        change = attended(start, stop)
        _, _, gate, shift, scale, ff_gate = values(start, stop)
        y = x[:, start:stop] + change * gate
        del change
        y = y + block.attn2(
            y,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        return y + block.ff(block.norm2(y) * (1 + scale) + shift) * ff_gate

    return groups.run("tokens", part, x.shape[1], dim=1)


# -- video and text in one attention -----------------------------------------------------------------------------------------


@_whole_where_hooked("ff")
def _cogvideox(
    block: nn.Module,
    groups: Groups,
    hidden_states,
    encoder_hidden_states,
    temb,
    image_rotary_emb=None,
    attention_kwargs=None,
) -> tuple[Tensor, Tensor]:
    """Text first among the keys, as in the host's sequence; video and text go through the same projections."""
    video, text, tables = hidden_states, encoder_hidden_states, image_rotary_emb
    n, t = video.shape[1], text.shape[1]
    first, second = (norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in (block.norm1, block.norm2))

    def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]

    def of_video(start: int, stop: int) -> Tensor:
        return modulated(block.norm1, video[:, start:stop], *first[:2])

    def of_text(start: int, stop: int) -> Tensor:
        return modulated(block.norm1, text[:, start:stop], *first[3:5])

    attended, attended_text = _joint_attention(
        block.attn1,
        None if attention_kwargs else known(block.attn1, cogvideox.ADAPTER.processors),
        Run(n, of_video, None if tables is None else partial(_rows, tables), start=t),
        Run(t, of_text, few=True),
        groups,
        lambda video, text: block.attn1(
            hidden_states=video, encoder_hidden_states=text, image_rotary_emb=tables, **(attention_kwargs or {})
        ),
    )

    def part(x: Tensor, attended: Slice, values: slice, start: int, stop: int) -> Tensor:
        (_, _, gate), (shift, scale, ff_gate) = first[values], second[values]
        y = x[:, start:stop] + gate[:, None, :] * attended(start, stop)
        return y + ff_gate[:, None, :] * block.ff(modulated(block.norm2, y, shift, scale))

    out = groups.run("tokens", partial(part, video, attended, slice(3)), n, dim=1)
    return out, part(text, attended_text, slice(3, 6), 0, t)


@_whole_where_hooked("ff", "ff_context")
def _hunyuan(
    block: nn.Module,
    groups: Groups,
    hidden_states,
    encoder_hidden_states,
    temb,
    attention_mask=None,
    freqs_cis=None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    masks = attention_mask, attention_mask
    processors = hunyuan_video.ADAPTER.processors
    return _dual(
        block, groups, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, masks, processors
    )


@_whole_where_hooked("ff", "ff_context")
def _hunyuan15(
    block: nn.Module,
    groups: Groups,
    hidden_states,
    encoder_hidden_states,
    temb,
    attention_mask=None,
    freqs_cis=None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """The host lets no padded query attend and no padded key count; video is never padded. attention_mask: [B, T]."""
    n, t = hidden_states.shape[1], encoder_hidden_states.shape[1]
    keep = F.pad(attention_mask, (n + t - attention_mask.shape[1], 0), value=True).bool()[:, None, None, :]
    masks = keep, keep[..., n:].transpose(2, 3) & keep
    processors = hunyuan_video15.ADAPTER.processors
    return _dual(
        block, groups, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, masks, processors
    )


def _dual(block, groups, video, text, temb, attention_mask, tables, masks, processors) -> tuple[Tensor, Tensor]:
    """Two streams with weights of their own; video first among the keys. masks: of the queries of both."""
    n, t = video.shape[1], text.shape[1]
    of_video, of_text = (norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in (block.norm1, block.norm1_context))
    attn = block.attn

    def source(norm: nn.Module, x: Tensor, values: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        shift, scale, *_ = values
        return norm.norm(x[:, start:stop]) * (1 + scale[:, None]) + shift[:, None]

    attended, attended_text = _joint_attention(
        attn,
        known(attn, processors, lengths=True),
        Run(n, partial(source, block.norm1, video, of_video), None if tables is None else partial(_rows, tables)),
        Run(t, partial(source, block.norm1_context, text, of_text), start=n, parts=ADDED, few=True),
        groups,
        lambda video, text: attn(
            hidden_states=video, encoder_hidden_states=text, attention_mask=attention_mask, image_rotary_emb=tables
        ),
        masks,
    )

    def part(x, attended, values, norm, ff, start: int, stop: int) -> Tensor:
        _, _, gate, shift, scale, ff_gate = values
        y = x[:, start:stop] + attended(start, stop) * gate.unsqueeze(1)
        return y + ff_gate.unsqueeze(1) * ff(norm(y) * (1 + scale[:, None]) + shift[:, None])

    out = groups.run("tokens", partial(part, video, attended, of_video, block.norm2, block.ff), n, dim=1)
    return out, part(text, attended_text, of_text, block.norm2_context, block.ff_context, 0, t)


def _hunyuan_single(
    block: nn.Module,
    groups: Groups,
    hidden_states,
    encoder_hidden_states,
    temb,
    attention_mask=None,
    image_rotary_emb=None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """One set of weights for both streams, and a feed-forward beside the attention: one projection out of both."""
    video, text, tables = hidden_states, encoder_hidden_states, image_rotary_emb
    n, t = video.shape[1], text.shape[1]
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    attn = block.attn

    def source(x: Tensor, start: int, stop: int) -> Tensor:
        return block.norm.norm(x[:, start:stop]) * (1 + scale[:, None]) + shift[:, None]

    attended, attended_text = _joint_attention(
        attn,
        known(attn, hunyuan_video.ADAPTER.processors, lengths=True),
        Run(n, partial(source, video), None if tables is None else partial(_rows, tables)),
        Run(t, partial(source, text), start=n, few=True),
        groups,
        lambda video, text: attn(
            hidden_states=video, encoder_hidden_states=text, attention_mask=attention_mask, image_rotary_emb=tables
        ),
        (attention_mask, attention_mask),
    )

    def part(x: Tensor, attended: Slice, start: int, stop: int) -> Tensor:
        hidden = block.act_mlp(block.proj_mlp(source(x, start, stop)))
        change = block.proj_out(torch.cat((attended(start, stop), hidden), dim=2))
        return gate.unsqueeze(1) * change + x[:, start:stop]

    out = groups.run("tokens", partial(part, video, attended), n, dim=1)
    return out, part(text, attended_text, 0, t)


def _rows(tables: Rope, start: int, stop: int) -> Rope:
    """Of tables [N, D]."""
    return tables[0][start:stop], tables[1][start:stop]


def _out_of_video(attn: nn.Module, x: Tensor) -> Tensor:
    return x if getattr(attn, "to_out", None) is None else project_out(attn, x)


def _out_of_text(attn: nn.Module, x: Tensor) -> Tensor:
    return x if getattr(attn, "to_add_out", None) is None else attn.to_add_out(x)


def _joint_attention(
    attn: nn.Module,
    way: Way | None,
    video: Run,
    text: Run,
    groups: Groups,
    whole: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Slice, Slice]:
    """The projected output of video and of text, by slices.

    Args:
        whole: calls the module on its whole inputs [B, N, C] and [B, T, C].
        masks: of the queries of both.
    """
    if way is None:
        outs = whole(groups.run("tokens", video.source, video.size, dim=1), text.source(0, text.size))
        return tuple(partial(_tokens, out) for out in outs)
    at = attending(attn, way, (video, text), partial(groups.ranges, "tokens"))
    of_text = _out_of_text if text.parts is ADDED else _out_of_video
    return tuple(
        lambda start, stop, run=run, project=project, mask=mask: project(attn, at.attend(run, start, stop, mask))
        for run, project, mask in zip((video, text), (_out_of_video, of_text), masks, strict=True)
    )


def _tokens(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, start:stop]


FORWARDS: dict[str, Sliced] = {
    "CogVideoXBlock": Sliced(groups=("tokens",), forward=_cogvideox),
    "FeedForward": Sliced(groups=("tokens",), forward=_feed_forward),
    "HunyuanVideo15TransformerBlock": Sliced(groups=("tokens",), forward=_hunyuan15),
    "HunyuanVideoSingleTransformerBlock": Sliced(groups=("tokens",), forward=_hunyuan_single),
    "HunyuanVideoTransformerBlock": Sliced(groups=("tokens",), forward=_hunyuan),
    "LTXVideoTransformerBlock": Sliced(groups=("tokens",), forward=_ltx),
    "SkyReelsV2TransformerBlock": Sliced(groups=("tokens",), forward=_skyreels),
    "WanTransformerBlock": Sliced(groups=("tokens",), forward=_wan),
    "WanVACETransformerBlock": Sliced(groups=("tokens",), forward=_wan_vace),
}
DIT_BLOCKS = frozenset(FORWARDS) - {"FeedForward"}
"""Classes that slice the feed-forwards in them."""
