"""Kernels of our own are checked before their first call and watched while they run."""

import copy
import warnings

import pytest
import torch
from served import wan_call
from tiny_pipelines import build, run

import videoattn
from videoattn import backend as backend_module
from videoattn import guard, measured, verify
from videoattn.backend import UnsupportedCall, backends
from videoattn.kernels.sdpa import BACKENDS
from videoattn.policy import EXACT
from videoattn.runner import Runner
from videoattn.session import session_of
from videoattn.testing import make_qkv

SDPA = BACKENDS[0]


class Planted:
    """A kernel of ours that computes with torch's SDPA; `tamper(q, k, v, mask, kv_len)` changes what it is given."""

    own = True

    def __init__(self, name="planted", tamper=lambda *args: args):
        self.name, self.tamper = name, tamper
        self.spoil = False  # an element of every output
        self.planned, self.calls = [], 0

    def computes(self, decision):
        return decision == EXACT

    def refuses(self, call, decision):
        return None

    def plan(self, call, decision, flag=None):
        self.planned.append(call)
        sdpa = SDPA.plan(call, decision)

        def run(q, k, v, mask, kv_len, scale):
            self.calls += 1
            out = sdpa(*self.tamper(q, k, v, mask, kv_len), scale)
            if self.spoil:
                out = out.clone()
                out[0, 0, 0, 0] = torch.nan
            if flag is not None and not out.isfinite().all():
                flag.fill_(1)
            return out

        return run


def two_percent_off(q, k, v, mask, kv_len):
    return q * 1.02, k, v, mask, kv_len


@pytest.fixture
def plant(monkeypatch):
    """Backends that come before torch's, and are chosen in this order."""

    def plant(*planted):
        monkeypatch.setattr(backend_module, "backends", lambda: (*planted, *BACKENDS))
        monkeypatch.setattr("videoattn.session.backends", lambda: (*planted, *BACKENDS))
        monkeypatch.setattr(measured, "choose", lambda call, names, bounded=(), sparse=None: (names[0], ""))
        monkeypatch.setattr(verify, "_found", {})
        return planted[0]

    return plant


def plans(model):
    return [plan for runner in session_of(model)._runners.values() for plan in runner.plans.values()]


# -- before the first call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_kernel_is_passed_over(plant, dtype):
    plant(Planted("wrong", two_percent_off), Planted("right"))
    runner, qkv = Runner("full", EXACT), make_qkv(2, 40, 96, 4, 64, dtype=dtype)
    with pytest.warns(
        RuntimeWarning, match="full attention, batch 2, .*: wrong passed over: .* > bound .*, on"
    ) as warned:
        out = runner(*qkv)
    assert len(warned) == 1
    assert torch.equal(out, Runner("full", EXACT, "sdpa")(*qkv))
    (plan,) = runner.plans.values()
    assert plan.choice.backend.name == "right"
    assert plan.choice.why.startswith("wrong passed over: ")
    assert plan.choice.refusals[0][0] == "wrong"


def test_the_report_says_so(plant):
    plant(Planted("wrong", two_percent_off))
    model = videoattn.enable_fast_attention(build("wan").transformer, "exact")
    with pytest.warns(RuntimeWarning, match="wrong passed over"), torch.no_grad():
        model(**wan_call())
    report = videoattn.report(model)
    assert all(row.backend == "sdpa" and "wrong passed over" in row.why for row in report.sites)
    assert "wrong passed over" in str(report)


def test_a_wrong_kernel_that_was_named_is_an_error(plant):
    plant(Planted("wrong", two_percent_off))
    with pytest.raises(UnsupportedCall, match="backend 'wrong' refuses full attention.*: .*error .* > bound"):
        Runner("full", EXACT, "wrong")(*make_qkv(1, 40, 96, 2, 64))
    model = videoattn.enable_fast_attention(build("wan").transformer, "exact", backend="wrong")
    with pytest.raises(UnsupportedCall, match="backend 'wrong' refuses"), torch.no_grad():
        model(**wan_call())


@pytest.mark.parametrize(
    ("tamper", "facts"),
    [
        (lambda q, k, v, mask, kv_len: (q, k, v, mask, torch.full_like(kv_len, k.shape[1])), {"kv_len"}),
        (lambda q, k, v, mask, kv_len: (q, k, v, None, kv_len), {"mask"}),
        (lambda q, k, v, mask, kv_len: (q, k[:, :64], v[:, :64], mask, kv_len), set()),  # the last tile left out
        (lambda q, k, v, mask, kv_len: (q, k.roll(1, 1), v, mask, kv_len), {"causal"}),
        (lambda q, k, v, mask, kv_len: (q.clamp(-8, 8), k, v, mask, kv_len), set()),  # seen with outliers only
        (lambda q, k, v, mask, kv_len: (q, k.clamp(-8, 8), v, mask, kv_len), set()),  # seen with an offset first
    ],
)
def test_faults_that_it_finds(plant, tamper, facts):
    plant(Planted("wrong", tamper))
    given = {
        "kv_len": torch.tensor([80, 96], dtype=torch.int32),
        "mask": torch.ones(1, 1, 40, 96, dtype=torch.bool).tril(),
        "causal": True,
    }
    runner = Runner("full", EXACT)
    with pytest.warns(RuntimeWarning, match="wrong passed over"):
        runner(*make_qkv(2, 40, 96, 4, 64), **{name: given[name] for name in facts})


@pytest.mark.parametrize(
    ("sizes", "facts", "part"),
    [
        # sizes: B, Nq, Nk, H, D, Hkv; part: B, Nq, Nk, H, Hkv of what is computed
        ((2, 300, 300, 4, 16, 4), {}, (1, 236, 300, 1, 1)),
        ((2, 320, 77, 4, 40, 2), {}, (1, 256, 77, 2, 1)),
        ((50, 16, 16, 2, 40, 2), {}, (16, 16, 16, 1, 1)),
        ((3, 1, 1, 2, 8, 2), {}, (256, 1, 1, 1, 1)),
        ((1, 6, 512, 2, 8, 2), {}, (42, 6, 512, 1, 1)),
        ((1, 1, 40000, 1, 8, 1), {}, (1, 1, 40000, 1, 1)),
        ((2, 30, 90, 2, 64, 2), {"kv_len": torch.tensor([80, 9], dtype=torch.int32)}, (8, 30, 90, 1, 1)),
        ((2, 30, 90, 2, 64, 2), {"mask": torch.zeros(30, 90)}, (8, 30, 90, 1, 1)),
        ((2, 30, 90, 2, 64, 2), {"mask": torch.ones(30, 90) > 0}, (8, 30, 90, 1, 1)),
        ((2, 90, 90, 2, 64, 2), {"causal": True}, (2, 90, 90, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_a_right_kernel_is_checked_on_a_small_part_and_used(plant, monkeypatch, sizes, facts, part, dtype, layout):
    planted = plant(Planted())
    monkeypatch.setattr(verify, "SCORES", 5000)  # the oracle in pieces
    b, nq, nk, h, d, h_kv = sizes
    qkv = make_qkv(b, nq, nk, h, d, kv_heads=h_kv, dtype=dtype)
    if layout == "BHND":
        qkv = [x.transpose(1, 2) for x in qkv]
    mask = facts.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        facts = {"mask": mask.to(dtype)}
    state = torch.get_rng_state()
    runner = Runner("full", EXACT)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = runner(*qkv, layout=layout, **facts)
    assert torch.equal(torch.get_rng_state(), state)
    checked, used = planted.planned
    assert (checked.batch, checked.q_len, checked.kv_len, checked.heads, checked.kv_heads) == part
    assert (used.batch, used.q_len, used.heads) == (b, nq, h)
    assert (checked.layout, checked.mask, checked.causal) == (used.layout, used.mask, used.causal)
    assert planted.calls == 4  # normal, offset, outliers; the call
    assert out.shape == qkv[0].shape


def test_a_class_of_calls_is_checked_once(plant):
    planted = plant(Planted())

    def checks(*sizes, **options):
        before = planted.calls
        Runner("full", EXACT)(*make_qkv(*sizes, **options))
        return planted.calls - before - 1

    assert checks(2, 70, 100, 4, 16) == 3
    assert checks(1, 90, 120, 2, 16) == 0
    assert checks(2, 64, 100, 4, 16) == 3  # a multiple of 64
    assert checks(2, 70, 200, 4, 16) == 3
    assert checks(2, 70, 100, 4, 24) == 3
    assert checks(2, 70, 100, 4, 16, kv_heads=2) == 3
    assert checks(2, 70, 100, 4, 16, dtype=torch.bfloat16) == 3
    assert checks(2, 0, 100, 4, 16) == -1  # nothing to compute


def test_nothing_is_checked_while_a_cuda_graph_is_captured(plant, monkeypatch):
    planted, qkv = plant(Planted()), make_qkv(1, 8, 8, 1, 8)
    with monkeypatch.context() as capturing:
        capturing.setattr(guard, "capturing", lambda device: True)
        with pytest.warns(RuntimeWarning, match="planted passed over: its check cannot run while a CUDA graph"):
            Runner("full", EXACT)(*qkv)
        assert not planted.planned
    Runner("full", EXACT)(*qkv)
    assert planted.planned
    monkeypatch.setattr(guard, "capturing", lambda device: True)
    runner = Runner("full", EXACT)
    runner(*qkv)
    assert next(iter(runner.plans.values())).choice.backend is planted


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_a_plan_whose_output_was_not_finite_is_replaced(plant):
    planted, model, call = plant(Planted(), Planted("other")), build("wan").transformer, wan_call()
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact")
        assert torch.equal(model(**call)[0], host)
        assert all(plan.choice.backend is planted and plan.flag is not None for plan in plans(model))
        planted.spoil = True
        assert model(**call)[0].isnan().any()
        calls = planted.calls
        with pytest.warns(
            RuntimeWarning, match="WanTransformer3DModel, generation 1: output of planted was not finite: "
        ) as warned:
            out = model(**call)[0]
    assert torch.equal(out, host)
    assert planted.calls == calls and not guard.raised()
    assert len(warned) == len(plans(model)) == 2
    report = videoattn.report(model)
    assert all(row.backend == "sdpa" and row.why == "output of planted was not finite" for row in report.sites)
    assert {row.calls for row in report.sites} == {6}  # two layers, three forwards


@pytest.mark.parametrize("name", ["wan", "latte", "svd"])
def test_the_generation_is_marked_and_the_next_is_not(plant, name):
    pipe, planted = videoattn.enable_fast_attention(build(name), "exact"), plant(Planted())
    latents = run(name, pipe)
    assert not videoattn.report(pipe).notes
    planted.spoil = True
    with pytest.warns(RuntimeWarning, match="generation 1: output of planted was not finite"):
        assert not run(name, pipe).isfinite().all()
    report = videoattn.report(pipe)
    assert report.notes and all("generation 1 is marked: output of planted" in note for note in report.notes)
    assert "generation 1 is marked" in str(report).replace("\n", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(run(name, pipe), latents)
        report = videoattn.report(pipe)
    assert not report.notes
    assert {row.backend for row in report.sites if row.calls} == {"sdpa"}


@pytest.mark.parametrize("found_by", ["report", "the next generation"])
def test_the_last_step_counts_to_its_own_generation(plant, found_by):
    pipe, planted = videoattn.enable_fast_attention(build("wan"), "exact"), plant(Planted())
    forwards = 4  # two steps, two branches

    def spoil_the_last(model, args):
        planted.spoil = session_of(model).clock.calls % forwards == 0

    pipe.transformer.register_forward_pre_hook(spoil_the_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not run("wan", pipe).isfinite().all()
    assert guard.raised()
    find = videoattn.report if found_by == "report" else lambda pipe: run("wan", pipe)
    with pytest.warns(RuntimeWarning, match="generation 0: output of planted"):
        find(pipe)
    notes = videoattn.report(pipe).notes
    assert ["generation 0 is marked" in note for note in notes] == [True, True] * (found_by == "report")


def test_inputs_that_are_not_finite_are_not_blamed_on_the_kernel(plant):
    plant(Planted())
    model, call = build("wan").transformer, wan_call()
    call["hidden_states"].flatten()[0] = torch.nan
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact")
        ours = model(**call)[0]
    with pytest.warns(RuntimeWarning, match="Its inputs may not have been finite either"):
        videoattn.report(model)
    assert torch.equal(host.isnan(), ours.isnan())


def test_a_backend_that_was_named_stays(plant):
    planted, call = plant(Planted()), wan_call()
    model = videoattn.enable_fast_attention(build("wan").transformer, "exact", backend="planted")
    with torch.no_grad():
        model(**call)
        planted.spoil = True
        model(**call)
        planted.spoil = False
        with pytest.warns(RuntimeWarning, match="output of planted was not finite.* was named and stays"):
            assert model(**call)[0].isfinite().all()
    assert all(row.backend == "planted" and row.why.endswith("not finite") for row in videoattn.report(model).sites)


def test_a_graph_that_still_runs_a_replaced_kernel_is_noticed(plant):
    pipe, planted = videoattn.enable_fast_attention(build("wan"), "exact"), plant(Planted())
    run("wan", pipe)
    planted.spoil = True
    with pytest.warns(RuntimeWarning, match="generation 1"):
        run("wan", pipe)
    run("wan", pipe)
    assert not videoattn.report(pipe).notes
    plans(pipe.transformer)[0].flag.fill_(1)
    with pytest.warns(RuntimeWarning, match="generation 2: output of planted was not finite"):
        assert videoattn.report(pipe).notes


def test_a_compiled_model_follows(plant):
    torch._dynamo.reset()
    planted, model, call = plant(Planted()), build("wan").transformer, wan_call()
    with torch.no_grad():
        host = model(**call)[0]
        videoattn.enable_fast_attention(model, "exact").compile(backend="eager", fullgraph=True)
        assert torch.equal(model(**call)[0], host)
        planted.spoil = True
        model(**call)
        with pytest.warns(RuntimeWarning, match="output of planted was not finite"):
            assert torch.equal(model(**call)[0], host)
    torch._dynamo.reset()


def test_a_copy_has_flags_of_its_own(plant):
    pipe, planted = videoattn.enable_fast_attention(build("wan"), "exact"), plant(Planted())
    run("wan", pipe)
    twin = copy.deepcopy(pipe)
    planted.spoil = True
    with pytest.warns(RuntimeWarning):
        run("wan", twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not videoattn.report(pipe).notes
    assert videoattn.report(twin).notes
    assert {row.backend for row in videoattn.report(pipe).sites} == {"planted"}


def test_it_sleeps_where_no_kernel_of_ours_runs(monkeypatch):
    monkeypatch.setattr(guard, "_blocks", [])
    monkeypatch.setattr(guard, "_free", [])
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    run("wan", pipe)
    assert not guard._blocks and not guard.raised()
    assert all(plan.flag is None for plan in plans(pipe.transformer))


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flags_are_told_apart_and_given_back(monkeypatch):
    monkeypatch.setattr(guard, "_blocks", [])
    monkeypatch.setattr(guard, "_free", [])
    with torch.inference_mode():
        flags = [guard.flag() for _ in range(guard._FLAGS + 1)]
    assert len(guard._blocks) == 2
    assert all(flag.shape == (1,) and flag.dtype == torch.int32 for flag in flags)
    assert all(flag.data_ptr() % 16 == flags[0].data_ptr() % 16 for flag in flags)
    assert not guard.raised()
    flags[-1].fill_(1)
    assert guard.raised()
    assert [guard.lower(flag) for flag in flags] == [False] * guard._FLAGS + [True]
    assert not guard.raised() and not guard.lower(flags[-1])
    flags[3].fill_(1)
    places = {flag.data_ptr() for flag in flags}
    del flags
    assert {guard.flag().data_ptr() for _ in range(3)} <= places and len(guard._blocks) == 2
    kept = [guard.flag() for _ in range(2 * guard._FLAGS)]
    assert not guard.raised() and len(guard._blocks) == 2 and len({flag.data_ptr() for flag in kept}) == len(kept)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [backend.name for backend in backends() if backend.own])
def test_every_kernel_of_ours_sets_its_flag(name):
    runner = Runner("temporal", EXACT, name)
    q, k, v = make_qkv(4, 32, 32, 2, 64, dtype=torch.bfloat16, device="cuda")
    runner(q, k, v)
    torch.cuda.synchronize()
    assert runner.replace_flagged() == []
    v[1, 2, 1, 3] = torch.inf
    runner(q, k, v)
    torch.cuda.synchronize()
    assert guard.raised() and len(runner.replace_flagged()) == 1 and not guard.raised()
