"""Sparse decisions from policy to output, on a CPU: through torch's SDPA with a mask where a GPU walks along lists."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import build, run

import videoattn
from videoattn import verify
from videoattn.backend import UnsupportedCall, select
from videoattn.call import Call, Grid, Step
from videoattn.kernels import masked, reference
from videoattn.measured import EFFICIENCY, SELECTION, TABLES, TORCH, Evidence, Row, Source, Table
from videoattn.policy import EXACT, PRESETS, Dense, Policy, Sparse
from videoattn.runner import Runner
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.pooled import Pooled
from videoattn.selection.radial import Radial
from videoattn.selection.random import Random
from videoattn.selection.selector import SELECTORS, required, selector_of
from videoattn.selection.sliding_tiles import SlidingTiles
from videoattn.session import session_of
from videoattn.testing import make_qkv

CPU = torch.device("cpu")
(MASKED,) = masked.BACKENDS
GRID = Grid(frames=3, height=10, width=19)
TOKENS = Tokens(grid=GRID, after=40)


def call(**facts):
    n = facts.get("tokens", TOKENS).count if facts.get("tokens", TOKENS) else 610
    sizes = {"batch": 1, "q_len": n, "kv_len": n, "heads": 2, "kv_heads": 2, "head_dim": 16}
    return Call(
        **{"kind": "full", "layout": "BNHD", "dtype": torch.float32, "device": CPU, "tokens": TOKENS, **sizes} | facts
    )


def sparse(selector=None, **options):
    return Sparse(selector or Pooled(density=0.5), **options)


# -- what the backend takes


@pytest.mark.parametrize(
    ("facts", "decision", "why"),
    [
        ({}, sparse(), None),
        ({"kv_heads": 1, "batch": 2, "layout": "BHND", "has_kv_len": True}, sparse(), None),
        ({}, EXACT, "leaves key blocks out, asked for exact"),
        ({}, sparse(precision="int8_qk_fp8_pv"), "leaves key blocks out, asked for sparse"),
        ({"kv_len": 512}, sparse(), "self-attention only, got 610 queries and 512 keys"),
        ({"tokens": None}, sparse(), "the grid of the video is not known"),
        ({"q_len": 600, "kv_len": 600}, sparse(), "wanted the 610 tokens of"),
        ({"mask": "bool"}, sparse(), "takes neither a mask nor causal attention"),
        ({"causal": True}, sparse(), "takes neither a mask nor causal attention"),
        ({"has_kv_len": True}, sparse(SlidingTiles()), "takes no lengths with tokens in tiles"),
    ],
    ids=str,
)
def test_calls(facts, decision, why):
    reason = MASKED.refuses(call(**facts), decision)
    assert reason is None if why is None else why in reason


def test_a_mask_too_large_to_stand_in_memory(monkeypatch):
    monkeypatch.setattr(masked, "MASK", 2**20 - 1)
    n = Tokens(grid=Grid(frames=1, height=32, width=32))
    assert MASKED.refuses(call(tokens=n, heads=1, kv_heads=1), sparse()) == "a mask of 0.0 GiB"


def test_tiles_need_square_blocks(monkeypatch):
    monkeypatch.setattr(MASKED, "blocks", lambda call, gaps: (128, 64))
    assert "in blocks of one size, got 128 queries and 64 keys" in MASKED.refuses(call(), sparse(SlidingTiles()))


def test_cross_attention_stays_exact_in_every_preset():
    for kind in ("cross", "temporal", "text"):
        site = next(patch.site for patch in _patches("wan") if patch.site.kind == "cross")
        assert (
            PRESETS["fast"](
                replace(site, kind=kind), Step(index=40, total=50, grid=Grid(frames=99, height=99, width=99))
            )
            == EXACT
        )


def _patches(name):
    pipe = videoattn.enable_fast_attention(build(name), "exact")
    return session_of(pipe.transformer).patches


# -- what it computes


@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("lies", ["raster", "morton"])
@pytest.mark.parametrize("has_kv_len", [False, True])
def test_the_check_before_the_first_call_finds_nothing(order, layout, lies, has_kv_len):
    if lies == "morton" and order == "raster":
        return  # tokens take the order that the selector wants, or none
    verify._found.clear()
    asked = call(layout=layout, order=lies, has_kv_len=has_kv_len)
    assert verify.fault(MASKED, asked, sparse(Pooled(density=0.3, order=order))) is None


def test_the_check_finds_blocks_that_are_not_in_a_list(monkeypatch):
    verify._found.clear()

    def dense(q, k, v, *, lists, **options):
        return masked.attend(q, k, v, lists=replace(lists, keep=torch.ones_like(lists.keep)), **options)

    monkeypatch.setattr(MASKED, "attend", dense)
    assert "greatest error" in verify.fault(MASKED, call(), sparse())
    verify._found.clear()


PARAMETERS = {
    "sliding_tiles": {"windows": ((1, 8, 8),)},
    "radial": {"decay_factor": 0.1},
    "xattention": {"tau": 0.3},
    "random": {"density": 0.3},
}


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_attends_to_the_blocks_that_it_keeps(name):
    """By an oracle whose mask is made from the selector anew, token by token."""
    selector = selector_of(name, **PARAMETERS.get(name, {}))
    asked, decision = call(batch=2, heads=4, kv_heads=2), sparse(selector)
    q, k, v = make_qkv(2, 610, 610, 4, 16, kv_heads=2)
    out = MASKED.plan(asked, decision)(q, k, v, None, None, None)

    arrangement = arrange(TOKENS, selector.order, CPU, block_q=64, block_k=64)
    seen = (arrangement.arranged(q), arrangement.arranged(k)) if selector.dynamic else ()
    keep = (selector.keep(arrangement, 4, *seen) | required(arrangement)).expand(2, 4, -1, -1)
    of_query, of_key = arrangement.places // 64, arrangement.places // 64
    mask = keep[:, :, of_query][..., of_key]
    exact, _ = reference.attend(q, k, v, mask=mask)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert not mask.all()


def test_all_blocks_are_dense_attention():
    q, k, v = make_qkv(1, 610, 610, 2, 16)
    out = MASKED.plan(call(), sparse(Pooled(density=1.0, order="raster")))(q, k, v, None, None, None)
    torch.testing.assert_close(out.double(), reference.attend(q, k, v)[0], rtol=1e-4, atol=1e-5)


def test_a_selector_that_keeps_nothing_leaves_each_block_its_own():
    q, k, v = make_qkv(1, GRID.tokens, GRID.tokens, 2, 16)
    asked = call(tokens=Tokens(grid=GRID))
    out = MASKED.plan(asked, sparse(Pooled(tau=1e9, order="raster"), first_frame=False))(q, k, v, None, None, None)
    own = torch.arange(GRID.tokens) // 64
    exact, _ = reference.attend(q, k, v, mask=(own[:, None] == own)[None, None])
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(frames=1, height=9, width=11), Grid(frames=1, height=1, width=1)], ids=str)
def test_one_frame_is_a_sink_whole(grid):
    tokens = Tokens(grid=grid, after=3)
    q, k, v = make_qkv(1, tokens.count, tokens.count, 2, 16)
    out = MASKED.plan(call(tokens=tokens), sparse(Pooled(density=0.1)))(q, k, v, None, None, None)
    torch.testing.assert_close(out.double(), reference.attend(q, k, v)[0], rtol=1e-4, atol=1e-5)


def test_nan_in_scores_keeps_everything_and_shows():
    q, k, v = make_qkv(1, 610, 610, 2, 16)
    q[0, 100, 0] = torch.nan
    out = MASKED.plan(call(), sparse(Pooled(density=0.1, order="raster")))(q, k, v, None, None, None)
    assert out[0, 100, 0].isnan().all() and out[0, :, 1].isfinite().all()


def test_lengths_cut_text():
    q, k, v = make_qkv(2, 610, 610, 2, 16)
    kv_len = torch.tensor([575, 610], dtype=torch.int32)
    k[0, 575:], v[0, 575:] = 9.0, 1e4
    for order in ("raster", "morton"):
        run_plan = MASKED.plan(call(batch=2, has_kv_len=True), sparse(Pooled(density=1.0, order=order)))
        out = run_plan(q, k, v, None, kv_len, None)
        exact, _ = reference.attend(q, k, v, kv_len=kv_len)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


# -- who is chosen


def source(**ms):
    table = Table(gpu="", torch="", triton="", cudnn="", driver="", date="", command="", rows=(Row.of(call(), ms),))
    return Source(table=table, path=TABLES)


def choose(density, **ms):
    names = (TORCH, "exact")
    chosen, why = Evidence(sources=(source(**{TORCH: 1.0, "exact": 1.0, **ms}),)).choose(
        call(), names, ("quantised",), {"sparse": ("quantised", density)}
    )
    return chosen, why


def test_sparse_where_its_expected_cost_is_lower():
    assert choose(0.3, quantised=0.7) == (
        "sparse",
        f"measured {1 / (0.7 * (SELECTION + 0.3 / EFFICIENCY)):.2f}x of torch's choice expected, by dense attention",
    )
    assert choose(0.95, quantised=0.7)[0] == "quantised"
    assert choose(0.3, quantised=3.0)[0] == TORCH  # its kernel is slow here
    assert choose(0.3)[0] == TORCH  # was not measured


def test_a_named_backend_refuses_what_it_cannot_do():
    with pytest.raises(UnsupportedCall, match="self-attention only"):
        select(call(kv_len=100), sparse(), "sdpa_masked")


def test_where_all_blocks_are_kept_the_dense_kernel_of_a_named_backend_runs():
    assert select(call(), EXACT, "sdpa_masked").backend.name == "sdpa"
    assert select(call(), sparse(), "sdpa_masked").backend is MASKED


def test_without_a_gpu_nothing_is_left_out():
    choice = select(call(), PRESETS["fast"].decision)
    assert choice.decision == EXACT and "no GPU" in choice.why


@pytest.mark.parametrize(
    ("decision", "low", "high"),
    [
        (sparse(Pooled(density=0.25)), 0.25, 0.6),
        (sparse(Random(density=0.25)), 0.25, 0.75),  # in raster order the first frame is a sink
        (sparse(Pooled(tau=1.0)), 0.5, 0.75),
        (sparse(Radial()), 0.1, 1.0),
        (sparse(Pooled(density=1.0)), 1.0, 1.0),
    ],
    ids=str,
)
def test_expected_density(decision, low, high):
    assert low <= MASKED.expected_density(call(), decision) <= high


# -- in a pipeline


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8, of which even a tiny video has many."""
    monkeypatch.setattr(MASKED, "blocks", lambda call, gaps: (8, 8))


def policy(selector=None, **options):
    options = {"decision": sparse(selector or Pooled(density=0.3))} | options
    return Policy(name="test", **options)


def rows(pipe):
    return [row for row in videoattn.report(pipe).sites if row.kind in ("full", "joint")]


FAMILIES = ["wan", "hunyuan_video", "hunyuan_video15", "cogvideox", "cogvideox_rope", "ltx"]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_blocks_in_another_order_are_the_host(name, small_blocks):
    pipe = build(name)
    host = run(name, pipe, batch=2)
    for selector in (Pooled(density=1.0), Pooled(density=1.0, order="raster")):
        videoattn.enable_fast_attention(pipe, policy(selector), backend="sdpa_masked")
        out = run(name, pipe, batch=2)
        assert (out - host).norm() <= 1e-3 * host.norm()
        assert {row.computed for row in rows(pipe)} == {str(sparse(selector))}
    videoattn.disable_fast_attention(pipe)
    assert torch.equal(run(name, pipe, batch=2), host)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_are_left_out_show_and_the_report_says_how_many(name, small_blocks):
    pipe = build(name)
    host = run(name, pipe)
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    out = run(name, pipe)
    assert out.isfinite().all() and not torch.allclose(out, host, rtol=1e-3, atol=1e-3)
    assert torch.equal(run(name, pipe), out)
    (kept,) = session_of(pipe.transformer).kept
    assert 0.2 < kept.density < 0.95
    assert f"{kept.density:.1%} of the key blocks kept" in str(videoattn.report(pipe))


def test_the_order_is_taken_outside_the_layers_where_it_can_be(small_blocks):
    pipe = build("wan")
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    run("wan", pipe)
    plans = [plan for plan in session_of(pipe.transformer).plans if plan.call.kind == "full"]
    assert plans and all(plan.call.order == "morton" for plan in plans)
    assert "change order in every layer" not in str(videoattn.report(pipe))


def test_tokens_that_must_stay_change_order_in_every_layer_with_the_same_result(small_blocks, monkeypatch):
    pipe = build("wan")
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    hoisted = run("wan", pipe)
    monkeypatch.setattr("videoattn.session.refuses", lambda model: "a reason of its own")
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    out = run("wan", pipe)
    assert (out - hoisted).norm() <= 1e-3 * hoisted.norm()
    plans = [plan for plan in session_of(pipe.transformer).plans if plan.call.kind == "full"]
    assert all(plan.call.order == "raster" for plan in plans)
    assert "tokens change order in every layer: a reason of its own" in str(videoattn.report(pipe))


def test_a_family_whose_grid_is_not_known_stays_dense_and_says_so():
    pipe = build("mochi")
    host = run("mochi", pipe)
    videoattn.enable_fast_attention(pipe, "fast")
    assert torch.equal(run("mochi", pipe), host)


def test_dense_steps_layers_and_sizes(small_blocks):
    pipe = build("wan")
    host = run("wan", pipe, steps=4)
    for gates in ({"dense_steps": 1.0}, {"min_steps": 5}, {"min_tokens": 10**6}, {"dense_layers": ("blocks.*",)}):
        videoattn.enable_fast_attention(pipe, policy(**gates), backend="auto")
        assert torch.equal(run("wan", pipe, steps=4), host)
    videoattn.enable_fast_attention(pipe, policy(dense_steps=0.5), backend="sdpa_masked")
    run("wan", pipe, steps=4)
    shares = videoattn.report(pipe).shares
    assert shares == {"exact": 0.5, str(sparse(Pooled(density=0.3))): 0.5}


def test_a_new_size_between_calls(small_blocks):
    pipe = build("wan")
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    first = run("wan", pipe)
    run("wan", pipe, height=48, width=32)
    assert torch.equal(run("wan", pipe), first)
    grids = {plan.call.tokens.grid for plan in session_of(pipe.transformer).plans if plan.call.tokens}
    assert len(grids) == 2


def test_lists_are_kept_for_some_steps_per_branch_and_not_into_the_next_generation(small_blocks):
    pipe = build("wan")
    videoattn.enable_fast_attention(
        pipe, policy(decision=Sparse(Pooled(density=0.3), keep_steps=3)), backend="sdpa_masked"
    )
    first = run("wan", pipe, steps=6)
    (kept,) = session_of(pipe.transformer).kept
    layers = sum(patch.site.kind == "full" for patch in session_of(pipe.transformer).patches)
    branches = 2
    assert kept.selections == layers * branches * 2
    assert torch.equal(run("wan", pipe, steps=6), first)
    assert kept.selections == layers * branches * 4
    assert 0 < kept.missed < 1 and "kept on for 3 steps, lists lack" in str(videoattn.report(pipe))


def test_an_aborted_generation_leaves_no_list_behind(small_blocks):
    pipe = build("wan")
    videoattn.enable_fast_attention(
        pipe, policy(decision=Sparse(Pooled(density=0.3), keep_steps=50)), backend="sdpa_masked"
    )
    expected = run("wan", pipe, steps=3)

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("wan", pipe, steps=3, seed=1, callback_on_step_end=stop)
    assert torch.equal(run("wan", pipe, steps=3), expected)


def test_a_copy_has_lists_and_an_order_of_its_own(small_blocks):
    pipe = build("wan")
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    expected = run("wan", pipe)
    twin = copy.deepcopy(pipe.transformer)
    assert session_of(twin)._token_order is not session_of(pipe.transformer)._token_order
    pipe.transformer = twin
    assert torch.equal(run("wan", pipe), expected)


def test_nothing_is_left_behind(small_blocks):
    pipe = build("wan")
    hooks = lambda: sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.transformer.modules()
    )
    before = hooks()
    videoattn.enable_fast_attention(pipe, policy(), backend="sdpa_masked")
    assert hooks() > before
    run("wan", pipe)
    videoattn.disable_fast_attention(pipe)
    assert hooks() == before


def test_a_runner_knows_text_behind_the_video():
    runner = Runner("joint", sparse(), "sdpa_masked")
    runner.begin(Step(total=5, grid=GRID), "raster")
    assert runner._tokens(610) == TOKENS and runner._tokens(100) is None
    q, k, v = make_qkv(1, 610, 610, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(q, k, v)
    (plan,) = runner.plans.values()
    assert plan.call.tokens == TOKENS and plan.choice.backend.kept is runner.kept


def test_a_precision_that_is_dense_elsewhere():
    assert Dense("exact") == EXACT and str(sparse(keep_steps=2)) == "sparse[pooled density=0.5, kept 2 steps] exact"
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="Sparse.keep_steps: wanted 1 or more"):
            sparse(keep_steps=wrong)
