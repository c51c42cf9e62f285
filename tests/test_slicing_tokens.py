"""Blocks of video transformers by slices of tokens: what the host computes, in less memory."""

import functools
from functools import partial

import pytest
import tiny_pipelines
import torch
from diffusers import WanVACETransformer3DModel
from diffusers.models.attention import FeedForward

import videoattn
from videoattn.policy import Sparse
from videoattn.profiling import rehearsal
from videoattn.profiling.counts import Counts
from videoattn.profiling.scopes import Scopes
from videoattn.selection.random import Random
from videoattn.slicing import attending, tokens
from videoattn.slicing.slices import Groups

FAMILIES = ("wan", "wan22_ti2v", "wan21_i2v", "skyreels_v2", "cogvideox", "cogvideox_rope", "hunyuan_video", "ltx")
FAMILIES += ("hunyuan_video15",)
SPARSE = videoattn.Policy(decision=Sparse(Random(density=0.5)), kinds=("full", "joint"))


class sliced:
    """A context in which blocks of a model run in so many slices; yields their groups."""

    def __init__(self, model, count, names=tokens.DIT_BLOCKS):
        self.model, self.count, self.names = model, count, names

    def __enter__(self):
        self.modules, groups = [], []
        for module in self.model.modules():
            if type(module).__name__ in self.names:
                how = tokens.FORWARDS[type(module).__name__]
                groups.append(Groups(*how.groups))
                groups[-1].counts["tokens"] = self.count
                module.forward = partial(how.forward, module, groups[-1])
                self.modules.append(module)
        return groups

    def __exit__(self, *error):
        for module in self.modules:
            del module.forward


@functools.cache
def built(name):
    """(pipeline, its first denoiser, what the pipeline calls it with)"""
    pipe = tiny_pipelines.build(name)
    model, args, kwargs = tiny_pipelines.denoiser_inputs(name, pipe)[0]
    return pipe, model, partial(model, *args, **kwargs)


def called(call):
    with torch.no_grad():
        return call()[0]


def assert_alike(out, expected):
    """The same but for the order in which a matrix product of fewer rows may add."""
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=8 * torch.finfo(out.dtype).eps * expected.abs().max().item())


@pytest.mark.parametrize("policy", (None, "exact", SPARSE), ids=("host", "fast", "sparse"))
@pytest.mark.parametrize("name", FAMILIES)
def test_as_the_host(name, policy, monkeypatch):
    pipe, model, call = built(name)
    made = []
    for kind in (attending.Keys, attending.Rows):
        init = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, init=init: (made.append(type(self)), init(self, *a))[1])
    if policy is not None:
        videoattn.enable_fast_attention(pipe, policy)
    try:
        expected = called(call)
        for count in (1, 2, 7):
            with sliced(model, count) as groups:
                assert_alike(called(call), expected)
        assert len(groups) > 1 and all(each.sizes["tokens"] % 4 == 0 for each in groups)
    finally:
        if policy is not None:
            videoattn.disable_fast_attention(pipe)
    ours = policy is not None and name != "skyreels_v2"  # which keeps the host's code, on our kernels
    assert set(made) == {attending.Rows if ours else attending.Keys}


@pytest.mark.parametrize("name", ("wan", "hunyuan_video", "hunyuan_video15", "ltx"))
def test_several_rows_of_odd_lengths_in_bf16(name):
    """Rows of a batch with text of their own lengths; slices of few tokens, not all of one length."""
    pipe = tiny_pipelines.build(name)
    model = pipe.transformer
    inputs = {}
    hook = model.register_forward_pre_hook(lambda *a: inputs.setdefault("now", a[1:]) and None, with_kwargs=True)
    try:
        scale = 2 if name == "ltx" else 1
        tiny_pipelines.run(name, pipe, batch=2, height=48 * scale, width=80 * scale)
    finally:
        hook.remove()
    args, kwargs = inputs["now"]
    half = {k: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in kwargs.items()}
    call = partial(model.to(torch.bfloat16), *args, **half)
    expected = called(call)
    with sliced(model, 23):
        out = called(call)
    assert out.shape[0] >= 2
    assert_alike(out, expected)


def test_control_blocks():
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    ).eval()
    call = partial(
        model,
        torch.randn(1, 4, 3, 6, 10),
        torch.tensor([3]),
        torch.randn(1, 5, 8),
        control_hidden_states=torch.randn(1, 6, 3, 6, 10),
        return_dict=False,
    )
    expected = called(call)
    with sliced(model, 4) as groups:
        assert_alike(called(call), expected)
    assert len(groups) == 5 and all(each.sizes for each in groups)


@pytest.mark.parametrize("activation", ("gelu", "gelu-approximate", "geglu", "swiglu", "linear-silu"))
@pytest.mark.parametrize("shape", ((7, 8), (2, 7, 8), (2, 3, 7, 8)))
def test_feed_forward(activation, shape):
    torch.manual_seed(0)
    layer = FeedForward(8, activation_fn=activation, final_dropout=True).eval()
    x = torch.randn(shape)
    expected = layer(x)
    with sliced(layer, 3, {"FeedForward"}) as (groups,):
        assert_alike(layer(x), expected)
    assert groups.sizes == {"tokens": 7}


def test_feed_forwards_of_other_transformers():
    _, model, call = built("mochi")
    expected = called(call)
    with sliced(model, 3, {"FeedForward"}) as groups:
        assert_alike(called(call), expected)
    assert groups and all(each.sizes["tokens"] for each in groups)


def test_inputs_stay_as_they_are():
    _, model, call = built("cogvideox_rope")
    given = []
    hook = model.transformer_blocks[1].register_forward_pre_hook(
        lambda block, args, kwargs: given.extend(
            (x, x.clone()) for x in (*args, *kwargs.values()) if torch.is_tensor(x)
        ),
        with_kwargs=True,
    )
    try:
        with sliced(model, 3):
            called(call)
    finally:
        hook.remove()
    assert given and all(torch.equal(x, before) for x, before in given)


def test_what_hangs_on_projections_still_counts():
    """As LoRA's layers, offloading and casting do."""
    _, model, call = built("hunyuan_video")
    attn = model.transformer_blocks[0].attn
    parts = (attn.to_k, attn.add_q_proj, attn.to_out[0], model.single_transformer_blocks[0].proj_mlp)
    hooks = [part.register_forward_hook(lambda module, args, out: out * 1.5) for part in parts]
    try:
        expected = called(call)
        with sliced(model, 3):
            assert_alike(called(call), expected)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("part", "keys"), (("attn1", 1), ("attn2", 1), ("ffn", 1)))
def test_a_hooked_part_is_called_once_with_all_tokens(part, keys, monkeypatch):
    """Caches of diffusers return what the last call gave."""
    _, model, call = built("wan")
    seen, made = [], []
    init = attending.Keys.__init__
    monkeypatch.setattr(attending.Keys, "__init__", lambda self, *a: (made.append(self), init(self, *a))[1])

    def remember(module, args, out):
        seen.append(out.shape[1])

    expected = called(call)
    hook = getattr(model.blocks[0], part).register_forward_hook(remember)
    try:
        with sliced(model, 3):
            assert_alike(called(call), expected)
    finally:
        hook.remove()
    assert seen == [36] and len(made) == keys  # the other block's


def test_fused_projections_and_processors_that_are_not_known():
    pipe = tiny_pipelines.build("wan")
    (model, args, kwargs) = tiny_pipelines.denoiser_inputs("wan", pipe)[0]
    call = partial(model, *args, **kwargs)
    expected = called(call)

    class Twice:
        def __init__(self, host):
            self.host = host

        def __call__(self, *args, **kwargs):
            return 2 * self.host(*args, **kwargs)

    model.blocks[0].attn1.set_processor(Twice(model.blocks[0].attn1.processor))
    model.blocks[1].attn1.fuse_projections()
    changed = called(call)
    with sliced(model, 3):
        assert_alike(called(call), changed)
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("name", ("wan", "cogvideox"))
def test_a_profile_finds_attention_where_it_is(name):
    _, model, call = built(name)
    counts = Counts()
    with sliced(model, 3), Scopes({"transformer": model}, counts), counts:
        called(call)
    sites = [each.site for each in counts.calls if "attn1" in each.site]
    assert {each.kind for each in counts.calls if "attn1" in each.site} <= {"full", "joint"}
    assert len(set(sites)) == 2 and len(sites) >= 6
    assert not counts.silent


@pytest.mark.parametrize(
    ("name", "gain_of_8", "gain_of_16"),
    (("wan-1.3b", 2.6, 2.9), ("cogvideox-5b", 2.4, 2.7), ("ltx", 1.7, 1.8), ("hunyuan", 3.1, 3.6)),
)
def test_memory_at_real_size(name, gain_of_8, gain_of_16):
    from videoattn.benchmarks import models

    layers = {"num_layers": 1} | ({"num_single_layers": 1} if name == "hunyuan" else {})
    model = models.denoiser(name, device="meta", overrides=layers)
    call = partial(model, **models.inputs(name, device="meta", overrides=layers))

    def peak():
        return rehearsal._run("transformer", model, call, 1).counts.peak_bytes

    host = peak()
    for count, gain in ((8, gain_of_8), (16, gain_of_16)):
        with sliced(model, count):
            assert host / peak() > gain


def test_which_classes():
    assert tokens.DIT_BLOCKS == tokens.FORWARDS.keys() - {"FeedForward"}
    for how in tokens.FORWARDS.values():
        assert how.groups == ("tokens",) and how.refuses(torch.nn.Identity()) is None
