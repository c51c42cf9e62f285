"""A prologue in one pass of ours: taken where it can be and is right, left to torch where not; in the interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import DEVICE
from projection_cases import FAMILIES, make, streams

from videoattn import fusion, runner
from videoattn.kernels import prepare, quantised
from videoattn.policy import EXACT, Dense
from videoattn.runner import Runner
from videoattn.testing import make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def able(monkeypatch):
    """Here, where kernels run in the interpreter; and nothing is known of them yet."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fusion, "_unable", lambda device: None)
    monkeypatch.setattr(fusion, "_found", {})


def attended(run, case):
    return run.attend(case.prologue, case.heads, *streams(case))


def by_torch(run, case):
    return run(*case.prologue(case.heads, *streams(case)))


def relative(out, wanted):
    return float((out.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_exact_attention_of_raw_projections(name):
    case, run = make(name, tokens=40), Runner("full", EXACT, "sdpa")
    given = streams(case)
    out = run.attend(case.prologue, case.heads, *given)
    assert all(x is None for stream in given for x in (stream.q, stream.k, stream.v))
    (plan,) = run.plans.values()
    assert (
        plan.prologue == case.prologue and plan.fused and plan.calls == 1 and plan.choice.why == "named by the caller"
    )
    assert out.is_contiguous() and relative(out, by_torch(run, case)) < 4 * torch.finfo(out.dtype).eps
    assert torch.equal(attended(run, case), out)
    assert plan.calls == 2 and len(run.plans) == 2  # the other is of q, k and v


@torch.no_grad()
def test_a_backend_that_quantises_makes_its_operands_itself(monkeypatch):
    case = make("wan", tokens=40)
    (backend,) = (backend for backend in quantised.BACKENDS if backend.name == "triton_int8_16bit")
    monkeypatch.setattr(backend, "refuses", lambda call, decision: None)
    monkeypatch.setattr(prepare, "prepare", None)
    run = Runner("full", Dense("int8_qk_16bit_pv"), "triton_int8_16bit")
    out = attended(run, case)
    (plan,) = run.plans.values()
    assert plan.fused and str(plan.choice.decision) == "int8_qk_16bit_pv"
    assert 0 < relative(out, by_torch(Runner("full", EXACT), case)) < 0.03


def turned_the_other_way(prologue, heads, *given):
    *first, last = (replace(s, rope=s.rope and (s.rope[0], -s.rope[1])) for s in given)
    return prologue(heads, *first, last)


@torch.no_grad()
def test_a_wrong_pass_is_passed_over(monkeypatch):
    case, run = make("wan", tokens=40), Runner("full", EXACT, "sdpa")
    monkeypatch.setattr(prepare, "prepare", turned_the_other_way)
    with pytest.warns(
        RuntimeWarning, match="full attention, .*: norm and rotation in torch, since in one pass: .* > bound"
    ):
        out = attended(run, case)
    (plan,) = run.plans.values()
    assert not plan.fused and plan.choice.why.startswith("norm and rotation in torch, since in one pass: ")
    assert torch.equal(out, by_torch(run, case))
    assert torch.equal(attended(run, case), out)  # and it is asked once


@torch.no_grad()
def test_a_pass_is_checked_once_for_its_kind(monkeypatch):
    case, checks = make("wan", tokens=40), []
    excess = fusion.excess
    monkeypatch.setattr(fusion, "excess", lambda *args, **options: checks.append(1) or excess(*args, **options))
    for _ in range(2):
        attended(Runner("full", EXACT, "sdpa"), case)
    assert len(checks) == 1


@torch.no_grad()
def test_a_hook_on_a_norm_keeps_it_in_torch():
    case, run, called = make("wan", tokens=40), Runner("full", EXACT, "sdpa"), []
    norm = streams(case)[0].norm_q
    handle = norm.register_forward_hook(lambda module, args, out: called.append(module))
    out = attended(run, case)
    handle.remove()
    assert called == [norm] and not any(plan.fused for plan in run.plans.values())
    assert torch.equal(out, by_torch(run, case))


@torch.no_grad()
def test_who_wants_the_tensors_gets_finished_ones(monkeypatch):
    case, run, seen = make("wan", tokens=40), Runner("full", EXACT, "sdpa"), []
    monkeypatch.setattr(runner, "observers", [lambda plan, q, k, v, mask, kv_len, scale: seen.append(q)])
    out = attended(run, case)
    assert torch.equal(seen[0], case.prologue(case.heads, *streams(case))[0])
    assert torch.equal(out, by_torch(Runner("full", EXACT, "sdpa"), case))


@torch.no_grad()
def test_what_was_not_finite_goes_back_to_torch(monkeypatch):
    case = make("wan", tokens=40)
    (backend,) = (backend for backend in quantised.BACKENDS if backend.name == "triton_int8_16bit")
    monkeypatch.setattr(backend, "refuses", lambda call, decision: None)
    run = Runner("full", Dense("int8_qk_16bit_pv"), "triton_int8_16bit")
    attended(run, case)
    run.backend = "auto"
    (plan,) = run.plans.values()
    plan.flag.fill_(1)
    (line,) = run.replace_flagged()
    assert line.startswith("output of triton_int8_16bit was not finite")
    assert torch.equal(attended(run, case), by_torch(Runner("full", EXACT, "sdpa"), case))
    assert not plan.choice.backend.own and not plan.fused and plan.calls == 2


@torch.no_grad()
def test_a_plan_without_the_pass_goes_back_to_torch_too(monkeypatch):
    """One whose pass was found wrong, and whose kernel then gives what is not finite."""
    case = make("wan", tokens=40)
    (backend,) = (backend for backend in quantised.BACKENDS if backend.name == "triton_int8_16bit")
    monkeypatch.setattr(backend, "refuses", lambda call, decision: None)
    monkeypatch.setattr(fusion, "fault", lambda *args: "planted")
    run = Runner("full", Dense("int8_qk_16bit_pv"), "triton_int8_16bit")
    with pytest.warns(RuntimeWarning, match="in one pass: planted"):
        attended(run, case)
    run.backend = "auto"
    (plan,) = run.plans.values()
    plan.flag.fill_(1)
    assert len(run.replace_flagged()) == 1
    assert torch.equal(attended(run, case), by_torch(Runner("full", EXACT, "sdpa"), case))


@torch.no_grad()
def test_exact_calls_beside_a_named_kernel_that_quantises_are_not_named():
    run = Runner("full", EXACT, "triton_int8_16bit")
    q, k, v = make_qkv(1, 8, 8, 2, 16, device=DEVICE)
    run(q, k, v)
    (plan,) = run.plans.values()
    assert plan.choice.backend.name == "sdpa" and not run.named(plan)


@torch.no_grad()
def test_empty_streams_and_lengths_elsewhere_take_the_way_of_torch():
    run = Runner("full", EXACT, "sdpa")
    case = make("wan", tokens=40)
    (stream,) = streams(case)
    x = stream.q[:0]
    empty = replace(stream, q=x, k=x, v=x)
    assert fusion.refuses(case.prologue, case.heads, [empty]) == "takes no empty tensors"
    assert run.attend(case.prologue, case.heads, empty).shape[0] == 0
