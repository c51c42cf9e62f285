"""A policy is a pure function of site and step, and says no to what it does not know."""

import dataclasses
from typing import get_args

import pytest

from videoattn import Dense, Policy, Sparse
from videoattn.call import KINDS, Call, Grid, Site, Step
from videoattn.policy import EXACT, FINER, PRESETS, Precision, Tuned, acceptable


def site(kind="full", name="blocks.3.attn1"):
    return Site(name=name, layer=3, kind=kind, heads=2, head_dim=64)


def test_exact_is_exact_everywhere():
    assert {PRESETS["exact"](site(kind), Step()) for kind in KINDS} == {EXACT}


@pytest.mark.parametrize(
    ("preset", "decision"),
    [("balanced", Dense("int8_qk_fp8_pv")), ("fast", Sparse("pooled", "int8_qk_fp8_pv"))],
)
def test_presets_trade_in_the_large_self_attention_only(preset, decision):
    decided = {kind: Policy.of(preset)(site(kind), Step()) for kind in KINDS}
    large = {"full", "joint", "spatial"}
    assert decided == {kind: decision if kind in large else EXACT for kind in KINDS}


def test_named_layers_stay_exact():
    policy = Policy(decision=Sparse(), exact_layers=("blocks.0.*", "*.attn2"))
    names = ["blocks.0.attn1", "blocks.10.attn1", "blocks.3.attn2", "xblocks.0.attn1"]
    assert [policy(site(name=name), Step()) == EXACT for name in names] == [True, False, True, False]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_only_what_errs_less_stands_in(precision):
    order = {each: len(FINER[each]) for each in get_args(Precision)}
    asked, *others = acceptable(Dense(precision))
    assert asked == Dense(precision)
    assert [order[other.precision] for other in others] == sorted(
        (order[each] for each in FINER[precision]), reverse=True
    )
    assert precision == "exact" or others[-1] == EXACT
    assert acceptable(Sparse("pooled", precision)) == (Sparse("pooled", precision), *acceptable(Dense(precision)))


TUNED = Tuned(
    sites=(
        ("blocks.0.attn1", ("exact", "int8_qk_16bit_pv", "int8_qk_fp8_pv")),
        ("blocks.1.attn1", ("int8_qk_fp8_pv", "int8_qk_fp8_pv", "int8_qk_16bit_pv")),
    )
)


def test_a_tuned_policy_goes_by_site_and_by_part_of_the_schedule():
    policy = Policy(tuned=TUNED)
    steps = [Step(index=index, total=7) for index in range(7)]
    assert [policy.phase(step) for step in steps] == [0, 0, 0, 1, 1, 2, 2]
    decided = {name: [str(policy(site(name=f"blocks.{name}.attn1"), step)) for step in steps] for name in range(3)}
    fp8, finer = "int8_qk_fp8_pv", "int8_qk_16bit_pv"
    assert decided == {
        0: ["exact"] * 3 + [finer] * 2 + [fp8] * 2,
        1: [fp8] * 5 + [finer] * 2,
        2: ["exact"] * 7,
    }
    assert policy(site("cross", "blocks.1.attn1"), steps[0]) == EXACT


def test_where_the_step_is_not_known_the_least_error_counts():
    policy = Policy(tuned=TUNED)
    assert policy.phase(Step()) is None
    assert policy(site(name="blocks.0.attn1"), Step()) == EXACT
    assert policy(site(name="blocks.1.attn1"), Step()) == Dense("int8_qk_16bit_pv")


def test_a_tuned_policy_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    lines = [f'"{name}" = {list(precisions)}' for name, precisions in TUNED.sites]
    file.write_text("\n".join(["[sites]", *lines]))
    assert Policy.load(file) == Policy(name="mine", tuned=TUNED)
    for wrong in (
        "[sites]",
        "[layers]",
        '[sites]\n"a" = ["int3"]',
        '[sites]\n"a" = ["exact"]\n"b" = []',
        "sites = 3",
        "[",
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="mine.toml: wanted a policy of videoattn tune, got "):
            Policy.load(file)


def test_a_policy_is_taken_as_it_is():
    policy = Policy(name="mine", kinds=("temporal",), decision=Dense("int8_qk_fp8_pv"))
    assert Policy.of(policy) is policy
    assert policy(site("temporal"), Step()) == Dense("int8_qk_fp8_pv")
    assert policy(site("full"), Step()) == EXACT


@pytest.mark.parametrize("made", [Policy(), Dense(), Sparse(), site(), Step(), Grid(frames=1, height=2, width=3)])
def test_facts_are_frozen_and_hashable(made):
    assert hash(made) == hash(dataclasses.replace(made))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, None)


def test_decisions_read_as_reports_show_them():
    assert str(EXACT) == "exact"
    assert str(Dense("int8_qk_fp8_pv")) == "int8_qk_fp8_pv"
    assert str(Sparse("pooled", "int8_qk_fp8_pv")) == "sparse[pooled] int8_qk_fp8_pv"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy.of("turbo"), ValueError, "preset: wanted one of exact, balanced, fast, got 'turbo'"),
        (lambda: Policy.of(None), TypeError, "policy: wanted a Policy or one of exact, balanced, fast, got NoneType"),
        (lambda: Policy(decision="exact"), TypeError, "Policy.decision: wanted Dense or Sparse, got str"),
        (lambda: Policy(kinds=("full", "all")), ValueError, "Policy.kinds: wanted one of spatial, .*, got 'all'"),
        (lambda: Policy(kinds="full"), TypeError, "wanted a tuple of str, got a str"),
        (lambda: Policy(exact_layers="blocks.*"), TypeError, "wanted a tuple of str, got a str"),
        (lambda: Policy(tuned={}), TypeError, "Policy.tuned: wanted a Tuned, got dict"),
        (lambda: Policy("exact"), TypeError, "positional"),
        (lambda: Policy(decisions=EXACT), TypeError, "decisions"),
        (
            lambda: Dense("int4"),
            ValueError,
            "precision: wanted one of exact, int8_qk_fp8_pv, int8_qk_16bit_pv, int8_qk_int8_pv, got 'int4'",
        ),
        (lambda: Sparse("random"), ValueError, "selector: wanted one of pooled, got 'random'"),
        (lambda: Sparse("pooled", "int4"), ValueError, "precision: wanted one of"),
    ],
)
def test_what_is_unknown_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_tokens_and_operations_are_counted():
    assert Grid(frames=21, height=30, width=52).tokens == 32_760  # Wan at 480p, 81 frames
    call = {"kind": "full", "layout": "BNHD", "batch": 2, "q_len": 10, "kv_len": 20, "heads": 3, "kv_heads": 3}
    assert Call(**call, head_dim=4, dtype=None, device=None).flops == 2 * 2 * (2 * 3 * 10 * 20 * 4)
