"""A policy is a pure function of site and step, and says no to what it does not know."""

import dataclasses
import itertools
from typing import get_args

import pytest

from videoattn import Dense, Policy, Sparse
from videoattn.call import KINDS, Call, Grid, Site, Step
from videoattn.policy import EXACT, FINER, PRESETS, Precision, Tuned, Windows, acceptable
from videoattn.selection.sliding_tiles import SlidingTiles


def site(kind="full", name="blocks.3.attn1"):
    return Site(name=name, layer=3, kind=kind, heads=2, head_dim=64)


def test_exact_is_exact_everywhere():
    assert {PRESETS["exact"](site(kind), Step()) for kind in KINDS} == {EXACT}


@pytest.mark.parametrize(
    ("preset", "decision"),
    [("balanced", Dense("int8_qk_fp8_pv")), ("fast", PRESETS["fast"].decision)],
)
def test_presets_trade_in_the_large_self_attention_only(preset, decision):
    late = Step(index=40, total=50, grid=Grid(frames=21, height=30, width=52))
    decided = {kind: Policy.of(preset)(site(kind), late) for kind in KINDS}
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
    finer = (Sparse("pooled", each) for each in FINER[precision])
    assert acceptable(Sparse("pooled", precision)) == (
        Sparse("pooled", precision),
        *finer,
        *acceptable(Dense(precision)),
    )


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


SPARSE = Sparse("pooled", "int8_qk_fp8_pv")
DENSE = Dense("int8_qk_fp8_pv")


def schedule(policy, total, grid=None):
    """ "S" or "D" a step of a schedule."""
    steps = [Step(index=index, total=total, grid=grid) for index in range(total)]
    decided = [policy(site(), step) for step in steps]
    assert set(decided) <= {SPARSE, DENSE} and set(decided) <= policy.decisions(site())
    for one, other in itertools.combinations(range(total), 2):  # one phase, one decision
        if policy.phase(steps[one]) == policy.phase(steps[other]):
            assert decided[one] == decided[other]
    return "".join("S" if each == SPARSE else "D" for each in decided)


def test_the_first_steps_are_dense():
    assert schedule(Policy(decision=SPARSE), 5) == "SSSSS"
    assert schedule(Policy(decision=SPARSE, dense_steps=0.2), 5) == "DSSSS"
    assert schedule(Policy(decision=SPARSE, dense_steps=0.25), 10) == "DDDSSSSSSS"
    assert schedule(Policy(decision=SPARSE, dense_steps=1.0), 3) == "DDD"
    assert schedule(Policy(decision=SPARSE, dense_steps=0.28), 25) == "D" * 7 + "S" * 18
    assert schedule(Policy(decision=SPARSE, dense_steps=0.14), 50) == "D" * 7 + "S" * 43


def test_a_short_schedule_stays_dense():
    policy = Policy(decision=SPARSE, min_steps=8)
    assert schedule(policy, 7) == "D" * 7
    assert schedule(policy, 8) == "S" * 8


def test_few_tokens_stay_dense():
    policy = Policy(decision=SPARSE, min_tokens=100)
    grids = [Grid(frames=3, height=3, width=11), Grid(frames=2, height=5, width=10), None]
    assert [schedule(policy, 1, grid) for grid in grids] == ["D", "S", "D"]


@pytest.mark.parametrize("limits", [{"dense_steps": 0.1}, {"min_steps": 2}])
def test_a_step_that_is_not_known_is_dense(limits):
    policy = Policy(decision=SPARSE, **limits)
    assert policy(site(), Step()) == DENSE
    assert policy.decisions(site()) == {SPARSE, DENSE}


def test_named_layers_stay_dense():
    policy = Policy(decision=SPARSE, dense_layers=("blocks.0.*",), exact_layers=("blocks.9.*",))
    decided = [policy(site(name=f"blocks.{block}.attn1"), Step()) for block in (0, 3, 9)]
    assert decided == [DENSE, SPARSE, EXACT]
    assert policy.decisions(site(name="blocks.0.attn1")) == {DENSE}


def test_a_dense_decision_knows_no_dense_steps():
    policy = Policy(decision=DENSE, dense_steps=0.5, min_steps=9, min_tokens=9)
    assert {policy(site(), Step(index=index, total=4)) for index in range(4)} == {DENSE}
    assert policy.phase(Step(index=0, total=4)) is None


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


WINDOWS = Windows(
    sites=(("blocks.0.attn1", ((3, 4, 6), (9, 4, 6))), ("blocks.1.attn1", ((9, 8, 12), (3, 4, 6)))),
    grid=Grid(frames=9, height=8, width=12),
    tile=(3, 4, 6),
)


def windowed(**options):
    decision = Sparse(SlidingTiles(windows=((9, 8, 12),)), "int8_qk_fp8_pv", keep_steps=2)
    return Policy(**{"decision": decision, "windows": WINDOWS} | options)


def test_windows_go_by_site_and_only_where_it_is_sparse():
    policy = windowed(dense_steps=0.5, exact_layers=("blocks.3.*",), dense_layers=("blocks.1.*",))
    first, later = Step(index=0, total=4), Step(index=2, total=4)
    sites = [site(name=f"blocks.{block}.attn1") for block in range(4)]
    assert [policy(each, first) for each in sites] == [DENSE, DENSE, DENSE, EXACT]
    own = dataclasses.replace(policy.decision, selector=SlidingTiles(windows=((3, 4, 6), (9, 4, 6))))
    assert [policy(each, later) for each in sites] == [own, DENSE, policy.decision, EXACT]
    assert [policy.decisions(each) for each in sites] == [{own, DENSE}, {DENSE}, {policy.decision, DENSE}, {EXACT}]
    assert policy.phase(first) != policy.phase(later) == policy.phase(Step(index=3, total=4))
    assert policy(site("cross", "blocks.0.attn1"), later) == EXACT


def test_what_is_tuned_goes_before_windows():
    policy = windowed(tuned=TUNED)
    assert policy(site(name="blocks.0.attn1"), Step(index=0, total=3)) == EXACT
    assert policy.decisions(site(name="blocks.0.attn1")) <= set(map(Dense, get_args(Precision)))


def test_windows_of_heads_read_alike_in_every_layer():
    policy = windowed()
    shown = {str(policy(site(name=f"blocks.{block}.attn1"), Step())) for block in (0, 1)}
    assert shown == {"sparse[sliding_tiles, a window a head, kept 2 steps] int8_qk_fp8_pv"}
    assert "windows=((9, 8, 12),)" in str(policy.decision)


WINDOWED = """
precision = "int8_qk_16bit_pv"
dense_steps = 0.3

[windows]
grid = [9, 8, 12]
tile = [3, 4, 6]

[windows.sites]
"blocks.0.attn1" = [[3, 4, 6], [9, 4, 6]]
"blocks.1.attn1" = [[9, 8, 12], [3, 4, 6]]
"""


def test_windows_are_read_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(WINDOWED)
    decision = Sparse(SlidingTiles(windows=((9, 8, 12),)), "int8_qk_16bit_pv")
    assert Policy.load(file) == Policy(name="mine", decision=decision, windows=WINDOWS, dense_steps=0.3)
    for right, wrong in (
        ("int8_qk_16bit_pv", "int3"),
        ("0.3", "1.3"),
        ("dense_steps = 0.3", ""),
        ("[9, 8, 12]\n", "[9, 8]\n"),
        ("[3, 4, 6]\n\n", "[3, 4, 0]\n\n"),
        ("[9, 4, 6]", "[9, 4]"),
        ("[9, 4, 6]", "9"),
        ("[windows.sites]", "[windows.layers]"),
        ("[windows]", "[sites]\n[windows]"),
        (WINDOWED[WINDOWED.index('"blocks') :], ""),
    ):
        assert right in WINDOWED
        file.write_text(WINDOWED.replace(right, wrong))
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
        (lambda: Policy(dense_layers="blocks.*"), TypeError, "wanted a tuple of str, got a str"),
        (lambda: Policy(dense_steps=20), ValueError, "Policy.dense_steps: wanted a share from 0 to 1, got 20"),
        (lambda: Policy(min_tokens=-1), ValueError, "wanted 0 or more, got 0 and -1"),
        (lambda: Policy(tuned={}), TypeError, "Policy.tuned: wanted a Tuned, got dict"),
        (lambda: Policy(windows={}), TypeError, "Policy.windows: wanted a Windows, got dict"),
        (
            lambda: Policy(windows=WINDOWS),
            ValueError,
            "Policy.windows: wanted a decision that is Sparse with SlidingTiles, got exact",
        ),
        (
            lambda: windowed(decision=Sparse("pooled")),
            ValueError,
            "wanted a decision that is Sparse with SlidingTiles, got sparse.pooled",
        ),
        (
            lambda: dataclasses.replace(WINDOWS, sites=()),
            ValueError,
            "Windows.sites: wanted one site at least, got none",
        ),
        (
            lambda: dataclasses.replace(WINDOWS, tile=(0, 4, 6)),
            ValueError,
            "Windows.tile: wanted .frames, height, width. of 1 at least, got .0, 4, 6.",
        ),
        (
            lambda: dataclasses.replace(WINDOWS, sites=(("a", ()),)),
            ValueError,
            "SlidingTiles.windows: wanted tuples",
        ),
        (lambda: Policy("exact"), TypeError, "positional"),
        (lambda: Policy(decisions=EXACT), TypeError, "decisions"),
        (
            lambda: Dense("int4"),
            ValueError,
            "precision: wanted one of exact, int8_qk_fp8_pv, int8_qk_16bit_pv, int8_qk_int8_pv, got 'int4'",
        ),
        (lambda: Sparse("random"), TypeError, "density"),
        (lambda: Sparse(3), TypeError, "Sparse.selector: wanted a selector or its name, got 3"),
        (
            lambda: Sparse(type(Sparse().selector)),
            TypeError,
            "Sparse.selector: wanted a selector or its name, got <class",
        ),
        (lambda: Sparse("dense"), ValueError, "selector: wanted one of sliding_tiles, .*, pooled, random, got 'dense'"),
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
