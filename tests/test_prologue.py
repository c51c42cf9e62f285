"""Norm, rotation and joining before attention: as the host does it, operation by operation."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from tiny_pipelines import build, denoisers, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import videoattn
from videoattn.prologue import Prologue, Stream, rotate_pairs
from videoattn.runner import Runner

HEADS, DIM = 3, 8


def projections(tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, HEADS * DIM, generator=generator) for _ in range(3)]


def norm(width):
    made = nn.RMSNorm(width, eps=1e-6)
    made.weight.data = torch.rand(width, generator=torch.Generator().manual_seed(width)) + 0.5
    return made.requires_grad_(False)


def rope(tokens=5):
    angles = torch.rand(tokens, DIM // 2, generator=torch.Generator().manual_seed(9))
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


def rotate(x, rope):
    return apply_rotary_emb(x, rope, sequence_dim=1)


def heads(x):
    return x.unflatten(2, (HEADS, DIM))


def test_plain_projections_only_split_heads():
    q, k, v = projections()
    out = Prologue(norm="per_head")(HEADS, Stream(*projections()))
    assert all(torch.equal(x, heads(y)) for x, y in zip(out, (q, k, v), strict=True))


def test_norm_and_rotation_across_heads():
    def turn(x, table):
        return x * table[0] + x.flip(-1) * table[1]

    table = (torch.rand(5, HEADS * DIM), torch.rand(5, HEADS * DIM))
    norm_q, norm_k = norm(HEADS * DIM), nn.LayerNorm(HEADS * DIM)
    prologue = Prologue(norm="across_heads", rope="across_heads", rotate=turn)
    q, k, v = prologue(HEADS, Stream(*projections(), norm_q, norm_k, table))
    raw_q, raw_k, raw_v = projections()
    assert torch.equal(q, heads(turn(norm_q(raw_q), table)))
    assert torch.equal(k, heads(turn(norm_k(raw_k), table)))
    assert torch.equal(v, heads(raw_v))


def test_norm_across_heads_and_rotation_head_by_head():
    norm_q, norm_k = norm(HEADS * DIM), norm(HEADS * DIM)
    prologue = Prologue(norm="across_heads", rotate=rotate)
    q, k, _ = prologue(HEADS, Stream(*projections(), norm_q, norm_k, rope()))
    raw_q, raw_k, _ = projections()
    assert torch.equal(q, rotate(heads(norm_q(raw_q)), rope()))
    assert torch.equal(k, rotate(heads(norm_k(raw_k)), rope()))


@pytest.mark.parametrize("span", [slice(2, None), slice(3)], ids=str)
def test_only_the_span_turns(span):
    raw_q, raw_k, raw_v = projections()
    tokens = len(range(5)[span])
    prologue = Prologue(norm="per_head", rotate=rotate)
    q, k, v = prologue(HEADS, Stream(*projections(), norm(DIM), norm(DIM), rope(tokens), span))
    for got, raw in ((q, raw_q), (k, raw_k)):
        expected = norm(DIM)(heads(raw)).clone()
        expected[:, span] = rotate(expected[:, span], rope(tokens))
        assert torch.equal(got, expected)
    assert torch.equal(v, heads(raw_v))


def test_streams_are_joined_in_order():
    prologue = Prologue(norm="per_head", rotate=rotate)
    video = prologue(HEADS, Stream(*projections(5), norm(DIM), norm(DIM), rope()))
    text = prologue(HEADS, Stream(*projections(2, seed=1), norm(DIM), None))
    joined = prologue(
        HEADS, Stream(*projections(5), norm(DIM), norm(DIM), rope()), Stream(*projections(2, seed=1), norm(DIM), None)
    )
    for got, parts in zip(joined, zip(video, text, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_rotate_as_wans_do(dtype):
    """Against complex multiplication, of which neighbouring elements are the two parts."""
    x = torch.randn(2, 5, HEADS, DIM).to(dtype)
    cos, sin = (table[None, :, None] for table in rope())
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[..., ::2].to(
        torch.complex128
    )
    expected = torch.view_as_real(turned).flatten(-2)
    out = rotate_pairs(x, (cos[..., 0::2], sin[..., 1::2]))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["cogvideox_rope", "hunyuan_video", "ltx", "wan"])
def test_raw_projections_are_gone_when_attention_runs(name, monkeypatch):
    """As in the host's code: what norm and rotation have replaced must not add to the peak of memory."""
    pipe = build(name)
    raw: list[StorageWeakRef] = []
    alive: list[int] = []
    (_, denoiser), *_ = denoisers(pipe)
    for module_name, module in denoiser.named_modules():
        if (
            module_name.endswith(("attn1.to_q", "attn1.to_k", ".attn.to_q", ".attn.to_k"))
            and "refiner" not in module_name
        ):
            module.register_forward_hook(lambda _module, _args, out: raw.append(StorageWeakRef(out.untyped_storage())))
    call = Runner.__call__

    def watched(self, *args, **kwargs):
        alive.append(sum(not storage.expired() for storage in raw))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "__call__", watched)
    with videoattn.fast_attention(pipe, "exact"):
        run(name, pipe)
    assert raw and alive and max(alive) == 0
