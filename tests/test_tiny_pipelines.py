"""The tiny pipelines are fit to be tested on: repeatable, finite, and no attention in them can go wrong unseen."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import PIPELINES, build, denoiser_inputs, denoisers, load, run

FAMILIES = [
    "wan",
    "wan22",
    "wan22_ti2v",
    "wan22_i2v",
    "wan21_i2v",
    "wan_v2v",
    "skyreels_v2",
    "cogvideox",
    "cogvideox_rope",
    "hunyuan_video",
    "hunyuan_video15",
    "ltx",
    "ltx2",
    "mochi",
    "latte",
    "allegro",
    "cosmos",
    "kandinsky5",
    "animatediff",
    "text_to_video_sd",
    "svd",
    "i2vgen_xl",
]


@pytest.fixture(params=FAMILIES, scope="module")
def tiny(request):
    """One pipeline for the tests that leave it as it is."""
    return request.param, build(request.param)


@pytest.fixture(params=FAMILIES)
def fresh(request):
    """A pipeline of its own for a test that hooks it."""
    return request.param, build(request.param)


def attention_sites(denoiser):
    return {name: module for name, module in denoiser.named_modules() if hasattr(module, "processor")}


def tensors(output):
    return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]


def test_every_family_is_there():
    assert sorted(PIPELINES) == sorted(FAMILIES)


def test_runs_are_finite_and_bit_identical(tiny):
    name, pipe = tiny
    first = run(name, pipe)
    torch.rand(3)  # the state of the global generator must not matter
    again, rebuilt = run(name, pipe), run(name, build(name))
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert torch.equal(first, rebuilt)
    assert not torch.equal(first, run(name, build(name, seed=1)))
    assert not torch.equal(first, run(name, pipe, seed=1))


def test_a_batch_of_two_runs(tiny):
    name, pipe = tiny
    one, two = run(name, pipe), run(name, pipe, batch=2)
    assert two.shape == (2, *one.shape[1:])
    assert two.isfinite().all()
    assert not torch.equal(two[0], two[1])


def test_saved_and_loaded_it_gives_the_same_latents(tiny, tmp_path):
    """Up to fp32 rounding: loaded weights lie elsewhere in memory, where CPU kernels may sum in another order."""
    name, pipe = tiny
    pipe.save_pretrained(tmp_path)
    latents = run(name, pipe)
    assert float((run(name, load(name, tmp_path)) - latents).norm() / latents.norm()) < 1e-4


def test_every_denoiser_is_called(tiny):
    name, pipe = tiny
    called = [denoiser for denoiser, _, _ in denoiser_inputs(name, pipe)]
    assert called == [denoiser for _, denoiser in denoisers(pipe)]
    assert len(called) == (2 if name in ("wan22", "wan22_i2v") else 1)


def test_every_attention_site_matters(fresh):
    """To first order, how much the denoiser's output moves for a small relative error at a site, output and query.

    The bounds stand far above the 1e-6 that rounding in fp32 moves it by. A query with one key cannot matter: softmax
    of one score is 1.
    """
    name, pipe = fresh
    for denoiser, args, kwargs in denoiser_inputs(name, pipe):
        found = defaultdict(list)  # what is named -> tensors that a site made
        keys = {}

        def record(module, args, output, *, label, found=found):
            for tensor in tensors(output):
                tensor.retain_grad()
                found[label].append(tensor)

        def count_keys(module, args, output, *, label, keys=keys):
            keys[label] = max(keys.get(label, 0), output.shape[1])

        def hook(module, function, label):
            module.register_forward_hook(lambda m, a, out: function(m, a, out, label=label))

        for label, site in attention_sites(denoiser.requires_grad_(True)).items():
            hook(site, record, f"{label}: output")
            query, key = (getattr(site, f"to_{x[0]}", None) or getattr(site, f"to_{x}") for x in ("query", "key"))
            hook(query, record, f"{label}: query")
            hook(key, count_keys, f"{label}: query")

        output = torch.cat([x.flatten() for x in tensors(denoiser(*args, **kwargs | {"return_dict": False}))])
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        assert len(found) == 2 * len(attention_sites(denoiser)), "a site was never called"
        for label, made in found.items():
            moved = max(
                float(x.grad.norm() * x.detach().norm() / x.numel() ** 0.5 / output.detach().norm())
                for x in made
                if x.grad is not None
            )
            if label.endswith("output"):
                assert moved > 1e-2, f"{name} {label} moves the output by {moved:.1e} only"
            elif keys[label] > 1:
                assert moved > 1e-4, f"{name} {label} moves the output by {moved:.1e} only"


def test_latents_follow_attention(fresh):
    """An error of 1 % in every attention output is seen in the latents: no scheduler clips it away."""
    name, pipe = fresh
    clean = run(name, pipe)
    generator = torch.Generator().manual_seed(0)

    def disturb(module, args, output):
        noisy = tuple(x + 0.01 * x.std() * torch.randn(x.shape, generator=generator) for x in tensors(output))
        return noisy if isinstance(output, tuple) else noisy[0]

    for _, denoiser in denoisers(pipe):
        for site in attention_sites(denoiser).values():
            site.register_forward_hook(disturb)
    assert float((run(name, pipe) - clean).norm() / clean.norm()) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_head_dim_heads_and_layers_are_knobs(name, monkeypatch):
    head_dim = 96 if name == "allegro" else 64
    pipe = build(name, head_dim=head_dim, heads=1, layers=1)
    shapes = set()
    sdpa = F.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        shapes.add((query.shape[1], query.shape[3]))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for denoiser, args, kwargs in denoiser_inputs(name, pipe):
        shapes.clear()
        denoiser(*args, **kwargs)
        assert (1, head_dim) in shapes
