"""How a head is cut into powers of two, and how far strides are aligned."""

import pytest

pytest.importorskip("triton")
from videoattn.kernels.tiles import MIN_PART, alignment, parts


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_parts_cover_a_head_with_the_least_padding(head_dim):
    powers = [2**n for n in range(4, 9)]
    pairs = [(first, second) for first in powers for second in (0, *powers) if second < first]
    first, second = parts(head_dim)
    assert (first, second) in pairs and powers[0] == MIN_PART
    assert first + second == min(sum(pair) for pair in pairs if sum(pair) >= head_dim)


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16))]
)
def test_parts_of_a_head(head_dim, expected):
    assert parts(head_dim) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((), 8), ((0,), 8), ((120, 40), 8), ((120, 44), 4), ((120, 42, 44), 2), ((120, 41), 1), ((16, 4096), 8)],
    ids=str,
)
def test_alignment_is_that_of_the_worst(numbers, expected):
    assert alignment(*numbers) == expected
