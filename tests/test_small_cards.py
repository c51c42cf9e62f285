"""Cards before Ampere: Triton makes no code for them, so every kernel of ours refuses, and torch's attention serves.

That what ships fits into the shared memory of the others, 99 KiB on the smallest, is in test_aot.py.
"""

from types import SimpleNamespace
from typing import get_args

import aot
import pytest
import torch

from videoattn import doctor, fusion
from videoattn.backend import UnsupportedCall, backends, select
from videoattn.call import Call, Grid
from videoattn.policy import EXACT, Dense, Precision, Sparse
from videoattn.selection.arrangement import Tokens
from videoattn.slicing import streaming

DECISIONS = [decision for name in get_args(Precision) for decision in (Dense(name), Sparse("pooled", name))]


@pytest.fixture(params=((7, 0), (7, 5)), ids=("sm_70", "sm_75"))
def card(request, monkeypatch):
    """The device of such a card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    for cached in (fusion._unable, streaming.default_attend):
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in (fusion._unable, streaming.default_attend):
        cached.cache_clear()


def calls(device):
    for kind, tokens in (("full", 4096), ("temporal", 16)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            yield Call(
                kind=kind,
                layout="BNHD",
                batch=2,
                q_len=tokens,
                kv_len=tokens,
                heads=4,
                kv_heads=4,
                head_dim=64,
                dtype=dtype,
                device=device,
                tokens=Tokens(grid=Grid(frames=1, height=4, width=tokens // 4)),
            )


def test_every_kernel_of_ours_says_why_not(card):
    asked = 0
    for call in calls(card):
        for backend in backends():
            for decision in filter(backend.computes, DECISIONS):
                reason = backend.refuses(call, decision)
                if backend.own:
                    assert reason == "needs compute capability 8.0", backend
                    asked += 1
                elif backend.name in ("sdpa", "sdpa_efficient", "sdpa_math"):
                    assert reason is None
    assert asked >= 6 * 15
    assert fusion._unable(card) == "needs compute capability 8.0"


def test_torch_serves(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr("videoattn.measured.card", lambda device: None)
    for call in calls(card):
        for decision in DECISIONS:
            choice = select(call, decision)
            assert choice.decision == EXACT and not choice.backend.own
        assert select(call, EXACT).backend.name == "sdpa"
        with pytest.raises(UnsupportedCall, match=r"compute capability 8\.0"):
            select(call, EXACT, "triton_flash")
        assert streaming.default_attend(call.dtype, 64, card) is streaming.torch_attend


def test_doctor_says_so(card, monkeypatch):
    major, minor = torch.cuda.get_device_capability(card)
    properties = SimpleNamespace(name="Tesla T4", total_memory=16 * 2**30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "580")
    check = next(doctor._device())
    assert (check.name, check.state) == ("GPU 0", "note")
    assert "torch's attention runs" in check.why and f"{major}.{minor}" in check.found


def test_the_cards_that_are_compiled_for():
    """The least of them, with what a driver keeps of its 100 KiB; none has 64."""
    assert min(aot.SHARED_KIB.values()) == 99 and min(aot.SHARED_KIB) == 80
    assert {86, 89, 120} <= {case.capability for case in aot.shipped()}
