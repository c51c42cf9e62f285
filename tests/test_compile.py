"""Under torch.compile: the same latents, no graph break, and no more graphs than the host alone needs."""

import copy
import functools

import pytest
import torch
from tiny_pipelines import build, denoisers, run

import videoattn
from videoattn.call import Grid
from videoattn.kernels import masked
from videoattn.policy import Policy, Sparse, Windows
from videoattn.selection.pooled import Pooled
from videoattn.selection.sliding_tiles import SlidingTiles
from videoattn.session import session_of

# Blocks that a user compiles where the host names no `_repeated_blocks`.
BLOCKS = {
    "CogVideoXBlock",
    "HunyuanVideo15TransformerBlock",
    "MochiTransformerBlock",
    "SkyReelsV2TransformerBlock",
    "BasicTransformerBlock",
    "TemporalBasicTransformerBlock",
}
OWN = ["wan", "wan22", "hunyuan_video", "hunyuan_video15", "cogvideox_rope", "ltx", "svd"]
GENERIC = ["skyreels_v2", "mochi"]  # the one calls dispatch_attention_fn, the other torch's SDPA itself


class Graphs:
    """A Dynamo backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert torch._dynamo.config.recompile_limit == limit == 8


def compile_blocks(pipe, backend):
    for _, model in denoisers(pipe):
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(backend=backend, fullgraph=True)
            continue
        for module in model.modules():
            if type(module).__name__ in BLOCKS:
                module.compile(backend=backend, fullgraph=True)


def compiled(name, *, order):
    """(pipeline, its graph counter): blocks compiled, and enabled before or after that, or not at all."""
    torch._dynamo.reset()
    pipe, graphs = build(name), Graphs()
    if order == "enable first":
        videoattn.enable_fast_attention(pipe, "exact")
    compile_blocks(pipe, graphs)
    if order == "compile first":
        videoattn.enable_fast_attention(pipe, "exact")
    return pipe, graphs


@functools.cache
def graphs_of_host(name):
    """How many graphs one run of the host alone takes."""
    pipe, host = compiled(name, order="host alone")
    run(name, pipe)
    return host.count


def eager(name, **kwargs):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    return run(name, pipe, **kwargs)


@pytest.mark.parametrize("name", OWN + GENERIC)
def test_compiled_blocks_give_the_same_latents_with_no_more_graphs(name):
    host = graphs_of_host(name)
    pipe, graphs = compiled(name, order="enable first")
    assert torch.equal(run(name, pipe), eager(name))
    assert 0 < graphs.count <= host


@pytest.mark.parametrize("name", ["wan", "skyreels_v2"])
def test_it_may_be_enabled_after_compiling(name):
    host = graphs_of_host(name)
    pipe, graphs = compiled(name, order="compile first")
    assert torch.equal(run(name, pipe), eager(name))
    assert graphs.count <= host


@pytest.mark.parametrize("name", ["wan", "skyreels_v2"])
def test_enabled_between_runs_it_costs_one_more_set_of_graphs(name):
    pipe, graphs = compiled(name, order="host alone")
    latents = run(name, pipe)
    alone = graphs.count
    for _ in range(9):  # more often than Dynamo recompiles
        with videoattn.fast_attention(pipe, "exact"):
            assert torch.equal(run(name, pipe), latents)
    assert torch.equal(run(name, pipe), latents)
    assert graphs.count <= 2 * alone


@pytest.mark.parametrize("name", ["wan", "skyreels_v2", "latte"])
def test_a_compiled_block_follows_the_settings(name):
    """Enabled again with another backend, its graphs do not keep the old one."""
    pipe, _ = compiled(name, order="enable first")
    run(name, pipe)
    videoattn.enable_fast_attention(pipe, "exact", backend="sdpa_math")
    run(name, pipe)
    rows = videoattn.report(pipe).sites
    assert {row.backend for row in rows} == {"sdpa_math"}
    assert all(row.calls for row in rows)


def test_two_compiled_pipelines_share_graphs_and_nothing_else():
    first, graphs = compiled("wan", order="enable first")
    second = videoattn.enable_fast_attention(build("wan", seed=1), "exact")
    compile_blocks(second, graphs)
    for pipe, seed in ((first, 0), (second, 1), (first, 0)):
        expected = run("wan", videoattn.enable_fast_attention(build("wan", seed=seed), "exact"))
        assert torch.equal(run("wan", pipe), expected)
    assert graphs.count == 1
    calls = [sum(row.calls for row in videoattn.report(pipe).sites) for pipe in (first, second)]
    assert calls[0] == 2 * calls[1] > 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wan", {"height": 64, "width": 64, "num_frames": 5}),
        ("wan", {"prompt": ["short"]}),
        ("ltx", {"prompt": ["a much longer prompt than the first"]}),
    ],
)
def test_another_size_or_prompt_costs_what_it_costs_the_host(name, change):
    counts = {}
    for order in ("host alone", "enable first"):
        pipe, graphs = compiled(name, order=order)
        run(name, pipe)
        run(name, pipe, **change)
        counts[order] = graphs.count
        assert torch.equal(run(name, pipe, **change), run(name, pipe, **change))
    assert counts["enable first"] <= counts["host alone"]
    assert torch.equal(run(name, pipe, **change), eager(name, **change))


@pytest.mark.parametrize(("name", "how"), [("wan", "torch.compile(model)"), ("skyreels_v2", "model.compile()")])
def test_a_whole_model_may_be_compiled(name, how):
    pipe, graphs = videoattn.enable_fast_attention(build(name), "exact"), Graphs()
    model = pipe.transformer
    if how == "model.compile()":
        model.compile(backend=graphs, fullgraph=True)
    else:
        pipe.transformer = torch.compile(model, backend=graphs, fullgraph=True)
    assert torch.equal(run(name, pipe), eager(name))
    run(name, pipe)
    assert graphs.count == 1
    # The hook fires at every call, also through the wrapper, and enabling again finds the model inside it.
    assert session_of(model).clock.generation == 1
    assert all(row.calls for row in videoattn.report(pipe).sites)
    videoattn.disable(pipe)
    assert session_of(model) is None
    assert torch.equal(run(name, pipe), run(name, build(name)))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_rope", "ltx"])
def test_dense_and_sparse_steps_cost_a_set_of_graphs_each(name, monkeypatch):
    """Nothing is selected inside a graph: lists, the order of tokens and a new generation need no new one."""
    monkeypatch.setattr(masked.BACKENDS[0], "blocks", lambda call, gaps: (8, 8))
    policy = Policy(name="sparse", decision=Sparse(Pooled(density=0.4), keep_steps=2), dense_steps=0.5)
    plain = videoattn.enable_fast_attention(build(name), policy, backend="sdpa_masked")
    expected = run(name, plain, steps=6)
    host = graphs_of_host(name)  # a longer run takes no more
    torch._dynamo.reset()
    pipe, graphs = videoattn.enable_fast_attention(build(name), policy, backend="sdpa_masked"), Graphs()
    compile_blocks(pipe, graphs)
    for _ in range(2):
        assert torch.equal(run(name, pipe, steps=6), expected)
    assert 0 < graphs.count <= 2 * host
    shares = videoattn.report(pipe).shares
    assert shares[str(policy.decision)] == shares["exact"] == 0.5


def test_windows_of_their_own_in_every_layer_cost_no_graph(monkeypatch):
    """More than eight different layers would pass Dynamo's limit: where a call stands reaches the operator as a tensor."""
    monkeypatch.setattr(masked.BACKENDS[0], "blocks", lambda call, gaps: (8, 8))
    windows = Windows(
        sites=(("blocks.0.attn1", ((1, 4, 4), (5, 2, 4))), ("blocks.1.attn1", ((5, 4, 4), (1, 2, 2)))),
        grid=Grid(frames=3, height=6, width=8),
        tile=(1, 2, 4),
    )
    policy = Policy(decision=Sparse(SlidingTiles(windows=((5, 8, 8),))), windows=windows)
    eager = videoattn.enable_fast_attention(build("wan"), policy, backend="sdpa_masked")
    expected = run("wan", eager)
    for patch in session_of(eager.transformer).patches:
        if patch.site.name.endswith("attn1"):
            (plan,) = patch.ours.run.plans.values()
            assert plan.choice.decision.selector == windows.of(patch.site.name)
    host = graphs_of_host("wan")
    torch._dynamo.reset()
    pipe, graphs = videoattn.enable_fast_attention(build("wan"), policy, backend="sdpa_masked"), Graphs()
    compile_blocks(pipe, graphs)
    assert torch.equal(run("wan", pipe), expected)
    assert 0 < graphs.count <= host
    copied = copy.deepcopy(pipe.transformer)
    plans = [plan for plan in session_of(copied).plans]
    assert not plans  # a copy makes its own, and knows the windows
    assert {patch.ours.run.decision for patch in session_of(copied).patches} == {
        patch.ours.run.decision for patch in session_of(pipe.transformer).patches
    }


def test_aot_autograd_takes_the_operator():
    """Its fake form promises shapes, dtypes and strides that every kernel keeps."""
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    compile_blocks(pipe, "aot_eager")
    latents = eager("wan")
    assert float((run("wan", pipe) - latents).norm() / latents.norm()) < 1e-5
    assert all(row.calls for row in videoattn.report(pipe).sites)


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("masked", ["none", "mask", "kv_len", "place"])
def test_the_operator_obeys_its_own_schema(layout, masked):
    from videoattn.policy import EXACT
    from videoattn.runner import Runner

    runner = Runner("full", EXACT)
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    if layout == "BHND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril() if masked == "mask" else None
    kv_len = torch.tensor([5, 2], dtype=torch.int32) if masked == "kv_len" else None
    torch.library.opcheck(
        torch.ops.videoattn.attend.default,
        (q, k, v, mask, kv_len, None, layout, False, runner.key, torch.tensor(0) if masked == "place" else None),
        test_utils=("test_schema", "test_faketensor"),
    )
