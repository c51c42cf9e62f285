"""Shipped configs compiled for cards that are not here: they fit, nothing spills, and Hopper multiplies with wgmma.

Asserted for the Triton that the configs were tuned with; another version's figures are reported, as xfail where wrong.
"""

from collections import namedtuple
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")
import aot

from videoattn.kernels import antidiagonal, block_sparse, flash, quantise, quantised
from videoattn.kernels.triton_backend import TUNED_WITH

SPILLING = aot.Case(
    kernel="flash", capability=86, head_dim=256, tuned=(("M", 128), ("N", 128), ("num_warps", 4), ("num_stages", 3))
)


def stands_for_itself(case: aot.Case) -> bool:
    """Whether no other case is the same code.

    No config tells Ampere's cards from Ada's (8.9), and what Triton makes of one for 8.6 and 8.9 takes the same registers of
    the same shared memory; on 8.0 the assembler gives out others. Short rows and projections have one config for all cards:
    every size on Hopper, and elsewhere those of rows that take the most registers. Quantise has INT8 v on 8.0.
    """
    if case.kernel == "temporal":
        return case.capability == 90 or case.capability > 86 and case.head_dim in (64, 256)
    return case.capability != 86 and (case.capability != 80 or case.kernel != "prepare")


CASES = [case for case in aot.shipped() if stands_for_itself(case)]


def test_no_config_tells_ampere_from_ada():
    """Else `stands_for_itself` is wrong."""
    sizes = namedtuple("Form", ("D", "DP", "NORM", "ROTATE"))  # what of a pass's form matters

    def configs(capability):
        for d in range(16, 257, 8):
            yield from (flash.config(d, size, capability, masked) for size in (2, 4) for masked in (False, True))
            yield from (block_sparse.config(d, 2, capability, *blocks) for blocks in ((64, 64), (128, 128), (192, 128)))
            yield from (
                quantised.config(d, pv, capability, block_q)
                for pv in ("fp8", "16bit", "int8")
                for block_q in (None, 64, 128, 192)
            )
            form = sizes(d, triton.next_power_of_2(d), "none", False)
            yield from (quantise.config(8, form, 64, capability), antidiagonal.config(capability))

    assert list(configs(80)) == list(configs(86)) == list(configs(89))


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
