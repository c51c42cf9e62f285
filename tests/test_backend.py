"""Who computes a decision: the best that accepts, the one that is named, or nobody; and what is said about it."""

import dataclasses

import pytest
import torch

from videoattn import backend as backend_module
from videoattn import measured
from videoattn.backend import UnsupportedCall, backends, select, validate_backend
from videoattn.call import Call
from videoattn.policy import EXACT, Dense

BOUNDED, FINER, OTHER = Dense("int8_qk_fp8_pv"), Dense("int8_qk_16bit_pv"), Dense("int8_qk_int8_pv")
CALL = Call(
    kind="full",
    layout="BNHD",
    batch=2,
    q_len=64,
    kv_len=32,
    heads=4,
    kv_heads=4,
    head_dim=64,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)


class Stub:
    def __init__(self, name, *, takes=(EXACT,), reason="not today", for_=None):
        self.name, self.takes, self.reason = name, takes, reason
        self.for_ = takes if for_ is None else for_

    def computes(self, decision):
        return decision in self.for_

    def refuses(self, call, decision):
        return None if decision in self.takes else self.reason


@pytest.fixture
def among(monkeypatch):
    return lambda *stubs: monkeypatch.setattr(backend_module, "backends", lambda: stubs)


def test_of_those_that_accept_the_table_decides(among, monkeypatch):
    asked = []

    def choose(call, names, bounded=(), sparse=None):
        asked.append((call, names, bounded))
        return names[-1], "measured 2.00x"

    monkeypatch.setattr(measured, "choose", choose)
    among(Stub("slow"), Stub("fast"), Stub("fastest", takes=(), for_=(EXACT,)))
    choice = select(CALL, EXACT)
    assert asked == [(CALL, ("slow", "fast"), ())]
    assert (choice.backend.name, choice.decision, choice.why) == ("fast", EXACT, "measured 2.00x")
    assert choice.refusals == (("fastest", "not today"),)
    assert select(CALL, BOUNDED).why == "int8_qk_fp8_pv -> exact: no GPU; measured 2.00x"


def test_the_table_chooses_between_what_is_asked_for_and_what_errs_less(among, monkeypatch):
    asked = []

    def choose(call, names, bounded=(), sparse=None):
        asked.append((names, bounded))
        return bounded[taken], "measured 2.00x"

    monkeypatch.setattr(measured, "choose", choose)
    among(
        Stub("sdpa"), Stub("eight", takes=(BOUNDED,)), Stub("sixteen", takes=(FINER,)), Stub("coarse", takes=(OTHER,))
    )
    taken = 0
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision, choice.why) == ("eight", BOUNDED, "measured 2.00x")
    assert choice.refusals == (("coarse", "not today"),)
    taken = 1
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision) == ("sixteen", FINER)
    assert choice.why == "int8_qk_fp8_pv -> int8_qk_16bit_pv: not measured faster; measured 2.00x"
    assert asked == [(("sdpa",), ("eight", "sixteen"))] * 2


def test_where_the_kernels_of_a_decision_refuse_their_reason_is_told(among, monkeypatch):
    monkeypatch.setattr(measured, "choose", lambda call, names, bounded=(), sparse=None: (names[0], ""))
    among(Stub("sdpa"), Stub("eight", takes=(), for_=(BOUNDED,), reason="takes no mask"))
    on_gpu = dataclasses.replace(CALL, device=torch.device("cuda"))
    assert select(on_gpu, BOUNDED).why == "int8_qk_fp8_pv -> exact: takes no mask"


def test_torchs_own_choice_comes_before_the_others_wherever_it_is_listed(among):
    among(Stub("first"), Stub("sdpa"))
    assert select(CALL, EXACT).backend.name == "sdpa"
    among(Stub("first"), Stub("sdpa", takes=()), Stub("last"))
    assert select(CALL, EXACT).backend.name == "first"


def test_what_was_not_measured_stays_exact(among):
    among(Stub("sdpa"), Stub("quantised", takes=(BOUNDED,)))
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision) == ("sdpa", EXACT)
    assert choice.why == "int8_qk_fp8_pv -> exact: not measured faster"


def test_a_named_backend_is_for_the_decisions_that_it_computes(among):
    among(Stub("sdpa"), Stub("quantised", takes=(BOUNDED,)))
    choice = select(CALL, BOUNDED, "quantised")
    assert (choice.backend.name, choice.decision, choice.why) == ("quantised", BOUNDED, "named by the caller")
    exact = select(CALL, EXACT, "quantised")
    assert (exact.backend.name, exact.decision, exact.why) == ("sdpa", EXACT, "")
    with pytest.raises(UnsupportedCall, match="'quantised' refuses .*: not today"):
        select(CALL, FINER, "quantised")


def test_a_decision_that_nobody_computes_falls_back_to_exact_and_says_so(among):
    among(Stub("plain"), Stub("other", takes=(), for_=(BOUNDED,), reason="needs a newer card"))
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision) == ("plain", EXACT)
    assert choice.why == "int8_qk_fp8_pv -> exact: no GPU"
    assert choice.refusals == (("other", "needs a newer card"),)


def test_a_named_backend_is_obeyed(among):
    among(Stub("sdpa"), Stub("named"))
    choice = select(CALL, EXACT, "named")
    assert (choice.backend.name, choice.why) == ("named", "named by the caller")


def test_a_named_backend_never_gives_way_to_another(among):
    among(Stub("best"), Stub("named", takes=(), for_=(EXACT,), reason="head_dim 64 is odd"))
    message = (
        "backend 'named' refuses full attention, batch 2, q_len 64, kv_len 32, heads 4, head_dim 64, bfloat16, "
        "mask none, on cpu: head_dim 64 is odd"
    )
    for decision in (EXACT, BOUNDED):
        with pytest.raises(UnsupportedCall) as raised:
            select(CALL, decision, "named")
        assert str(raised.value) == message


def test_a_named_exact_backend_computes_what_it_can_and_says_so(among):
    among(Stub("quantised", takes=(BOUNDED,)), Stub("named"))
    choice = select(CALL, BOUNDED, "named")
    assert (choice.backend.name, choice.decision) == ("named", EXACT)
    assert choice.why == "int8_qk_fp8_pv -> exact; named by the caller"


def test_where_nobody_computes_every_reason_is_given(among):
    among(Stub("one", takes=(), reason="too old"), Stub("other", takes=(), reason="too new"))
    with pytest.raises(UnsupportedCall, match="no backend computes full attention.*one: too old; other: too new"):
        select(CALL, EXACT)


def test_unknown_names_are_refused_with_the_known_ones():
    validate_backend("auto")
    for known in backends():
        validate_backend(known.name)
    with pytest.raises(ValueError, match="backend: wanted one of auto, sdpa, .*sdpa_math.*, got 'sage'"):
        validate_backend("sage")


def test_names_are_unique_and_read_as_they_are():
    names = [known.name for known in backends()]
    assert len(set(names)) == len(names)
    assert all(name in repr(known) for name, known in zip(names, backends(), strict=True))
