"""Who computes a decision: the best that accepts, the one that is named, or nobody; and what is said about it."""

import pytest
import torch

from videoattn import backend as backend_module
from videoattn.backend import UnsupportedCall, backends, select, validate_backend
from videoattn.call import Call
from videoattn.policy import EXACT, Dense

BOUNDED = Dense("int8_qk_fp8_pv")
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
    def __init__(self, name, *, rank=1.0, takes=(EXACT,), reason="not today"):
        self.name, self.ranked, self.takes, self.reason = name, rank, takes, reason

    def refuses(self, call, decision):
        return None if decision in self.takes else self.reason

    def rank(self, call):
        return self.ranked


@pytest.fixture
def among(monkeypatch):
    return lambda *stubs: monkeypatch.setattr(backend_module, "backends", lambda: stubs)


def test_the_best_ranked_that_accepts_wins(among):
    among(Stub("slow", rank=3), Stub("fast", rank=1), Stub("fastest", rank=0, takes=()))
    choice = select(CALL, EXACT)
    assert (choice.backend.name, choice.decision, choice.why) == ("fast", EXACT, "")
    assert choice.refusals == (("fastest", "not today"),)


def test_a_decision_that_somebody_computes_is_kept(among):
    among(Stub("plain"), Stub("quantised", rank=5, takes=(BOUNDED,)))
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision, choice.why) == ("quantised", BOUNDED, "")


def test_a_decision_that_nobody_computes_falls_back_to_exact_and_says_so(among):
    among(Stub("plain", reason="exact only"))
    choice = select(CALL, BOUNDED)
    assert (choice.backend.name, choice.decision) == ("plain", EXACT)
    assert choice.why == "int8_qk_fp8_pv -> exact: no GPU"
    assert choice.refusals == (("plain", "exact only"),)


def test_a_named_backend_is_obeyed(among):
    among(Stub("best", rank=0), Stub("named", rank=9))
    assert select(CALL, EXACT, "named").backend.name == "named"


def test_a_named_backend_never_gives_way_to_another(among):
    among(Stub("best"), Stub("named", takes=(), reason="head_dim 64 is odd"))
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
    assert choice.why == "int8_qk_fp8_pv -> exact: no GPU"


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
