"""One runner for all that decide alike: a plan a shape, counted, and nothing shared but what is computed."""

import copy
import gc
import pickle

import pytest
import torch

from videoattn.backend import UnsupportedCall
from videoattn.policy import EXACT, Dense
from videoattn.runner import Runner
from videoattn.testing import make_qkv


def test_each_shape_is_planned_once_and_counted():
    runner = Runner("full", EXACT)
    small, large = make_qkv(1, 4, 6, 2, 8), make_qkv(1, 4, 9, 2, 8)
    for qkv, times in ((small, 3), (large, 2)):
        for _ in range(times):
            runner(*qkv)
    assert [(plan.call.kv_len, plan.calls) for plan in runner.plans.values()] == [(6, 3), (9, 2)]


@pytest.mark.parametrize(
    "facts",
    [
        {"mask": torch.ones(4, 6, dtype=torch.bool)},
        {"mask": torch.zeros(4, 6)},
        {"kv_len": torch.tensor([6], dtype=torch.int32)},
        {"causal": True},
    ],
    ids=str,
)
def test_what_a_kernel_must_know_makes_another_plan(facts):
    runner = Runner("full", EXACT)
    q, k, v = make_qkv(1, 4, 6, 2, 8)
    runner(q, k, v)
    runner(q, k, v, **facts)
    runner(q, k, v, **facts)
    plain, other = runner.plans.values()
    assert (plain.calls, other.calls) == (1, 2)
    assert plain.call != other.call


def test_a_plan_says_what_it_is_for():
    runner = Runner("cross", Dense("int8_qk_fp8_pv"))
    q, k, v = make_qkv(3, 4, 6, 4, 8, kv_heads=2, dtype=torch.bfloat16)
    runner(*(x.transpose(1, 2) for x in (q, k, v)), torch.zeros(3, 1, 4, 6, dtype=torch.bfloat16), layout="BHND")
    (plan,) = runner.plans.values()
    call = plan.call
    assert (call.kind, call.layout, call.batch, call.q_len, call.kv_len) == ("cross", "BHND", 3, 4, 6)
    assert (call.heads, call.kv_heads, call.head_dim, call.dtype, call.mask) == (4, 2, 8, torch.bfloat16, "additive")
    assert (call.has_kv_len, call.causal) == (False, False)
    assert plan.choice.why == "int8_qk_fp8_pv -> exact: no GPU"


def test_a_named_backend_that_refuses_is_told_at_the_call():
    with pytest.raises(UnsupportedCall, match="'sdpa_flash' refuses full attention.*no GPU"):
        Runner("full", EXACT, "sdpa_flash")(*make_qkv(1, 4, 6, 2, 8))


@pytest.mark.parametrize("name", ["k", "v", "mask", "kv_len"])
def test_mixed_devices_are_refused(name):
    tensors = dict(zip("qkv", make_qkv(1, 4, 6, 2, 8), strict=True))
    tensors |= {"mask": torch.ones(4, 6, dtype=torch.bool), "kv_len": torch.tensor([6], dtype=torch.int32)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} of full attention: wanted it on q's cpu, got meta"):
        Runner("full", EXACT)(**tensors)


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_dtypes_are_refused(name):
    tensors = dict(zip("qkv", make_qkv(1, 4, 6, 2, 8), strict=True))
    tensors[name] = tensors[name].half()
    with pytest.raises(ValueError, match=f"{name} of full attention: wanted q's torch.float32, got torch.float16"):
        Runner("full", EXACT)(**tensors)


def test_heads_that_do_not_divide_are_refused():
    q, k, v = make_qkv(1, 4, 6, 4, 8)
    with pytest.raises(ValueError, match="k of full attention: wanted its heads to divide q's 4, got 3"):
        Runner("full", EXACT)(q, k[:, :, :3], v[:, :, :3])


def test_the_key_stands_for_what_is_computed():
    runner = Runner("full", EXACT)
    assert Runner("full", EXACT).key == runner.key
    others = [Runner("joint", EXACT), Runner("full", Dense("int8_qk_fp8_pv")), Runner("full", EXACT, "sdpa_math")]
    assert len({runner.key, *(other.key for other in others)}) == 4
    assert runner.entry is Runner("full", EXACT).entry


def test_calls_by_key_reach_who_serves():
    """As compiled graphs and rebound processors call."""
    first, second = Runner("full", EXACT), Runner("full", EXACT)
    qkv = make_qkv(1, 4, 6, 2, 8)
    for runner in (first, second, first):
        runner.serve()
        assert torch.equal(runner.entry(*qkv), runner(*qkv))
        torch.ops.videoattn.attend(*qkv, None, None, None, "BNHD", False, runner.key)
    calls = [sum(plan.calls for plan in runner.plans.values()) for runner in (first, second)]
    assert calls == [6, 3]


def test_a_runner_lives_no_longer_than_who_holds_it():
    runner = Runner("text", EXACT)
    entry = runner.entry
    del runner
    gc.collect()
    with pytest.raises(KeyError):
        entry(*make_qkv(1, 4, 6, 2, 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_plans_for_itself(copied):
    runner = Runner("full", EXACT, "sdpa_math")
    runner(*make_qkv(1, 4, 6, 2, 8))
    twin = copied(runner)
    assert (twin.kind, twin.decision, twin.backend, twin.key) == ("full", EXACT, "sdpa_math", runner.key)
    assert not twin.plans and runner.plans


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_operations_are_counted_for_flop_counters(layout):
    from torch.utils.flop_counter import FlopCounterMode

    runner = Runner("full", EXACT)
    q, k, v = make_qkv(2, 4, 6, 3, 8)
    if layout == "BHND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with FlopCounterMode(display=False) as counter:
        torch.ops.videoattn.attend(q, k, v, None, None, None, layout, False, runner.key)
    assert counter.get_total_flops() == 4 * 2 * 3 * 4 * 6 * 8
