"""Shipped configs compiled for cards that are not here: they fit, nothing spills, and Hopper multiplies with wgmma.

Asserted for the Triton that the configs were tuned with; another version's figures are reported, as xfail where wrong.
"""

from dataclasses import replace

import pytest

pytest.importorskip("triton")
import aot

from videoattn.kernels.triton_backend import TUNED_WITH

SPILLING = aot.Case(
    kernel="flash", capability=86, head_dim=256, tuned=(("M", 128), ("N", 128), ("num_warps", 4), ("num_stages", 3))
)
CASES = aot.shipped()


@pytest.fixture(scope="module")
def figures():
    """Case -> Figures"""
    cases = [*CASES, SPILLING]
    return dict(zip(cases, aot.elsewhere(aot.compiled, cases), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shipped_config(case, figures):
    wrong = figures[case].wrong(case)
    if wrong and figures[case].triton != TUNED_WITH:
        pytest.xfail(f"with Triton {figures[case].triton}: {', '.join(wrong)}")
    assert not wrong


def test_a_config_that_is_too_large_is_found_out(figures):
    spilled, shared = figures[SPILLING].wrong(SPILLING)
    assert "bytes spilled" in spilled and "the card has 99" in shared


def test_products_other_than_wgmma_are_found_out(figures):
    older = next(case for case in CASES if case.kernel == "flash" and case.capability == 80)
    assert figures[older].products.keys() == {"mma"}
    assert any("not wgmma alone" in what for what in figures[older].wrong(replace(older, capability=90)))
