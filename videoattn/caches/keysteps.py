"""Which steps run the network: the key steps. The first and the last always do."""

from __future__ import annotations

import functools

import numpy as np

from videoattn.caches.weights import Rule, error

FARTHEST = 6  # steps from one key step to the next, where the search is for the least error


def uniform(total: int, count: int) -> list[int]:
    """`count` of `total` steps, as even as can be.

    >>> uniform(25, 13)
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]
    """
    return sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})


def similar(cosine: np.ndarray, least: float) -> list[int]:
    """The search of Step Rehash (Zhan et al., NeurIPS 2024, section 4.3): a step runs where the cosine similarity to the last
    one that ran is below `least`.

    Args:
        cosine: between the features of any two steps, [N, N].
    """
    keys = [0]
    for step in range(1, len(cosine)):
        if cosine[keys[-1], step] < least:
            keys.append(step)
    return keys if keys[-1] == len(cosine) - 1 else [*keys, len(cosine) - 1]


def similar_count(cosine: np.ndarray, count: int) -> list[int]:
    """The same with the greatest `least` that leaves `count` steps at most; where that leaves fewer, steps are added one by one
    that are the least similar to the key step before them.
    """
    low, high = -1.0, 1.0 + 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if len(similar(cosine, middle)) > count else (middle, high)
    keys = set(similar(cosine, low))
    while len(keys) < min(count, len(cosine)):
        others = [step for step in range(len(cosine)) if step not in keys]
        keys.add(min(others, key=lambda step: cosine[max(key for key in keys if key < step), step]))
    return sorted(keys)


def least_error(
    gram: np.ndarray, rule: Rule, steps: range, count: int, *, corrected: bool, shares: np.ndarray
) -> list[int]:
    """The `count` of `steps` with the least sum of squared relative errors of all others, on the calibration's generations.

    By dynamic programming over the last two key steps, so with two terms at most.

    Args:
        corrected: whether what counts is the error that is left once the next key step is known.
        shares: what the squared error of a step counts, [N].
    """

    @functools.cache
    def between(before: int | None, last: int, following: int) -> float:
        known = [step for step in (before, last) if step is not None][-rule.terms :]
        if corrected:
            known = [*known, following][-rule.terms - 1 :]
        skipped = range(last + 1, following)
        return sum(shares[step] * error(gram, known, rule.weights(known, step), step) for step in skipped)

    best: dict[tuple[int | None, int], tuple[float, list[int]]] = {(None, steps[0]): (0.0, [steps[0]])}
    farthest = max(FARTHEST, -(-2 * len(steps) // count))
    for left in range(count - 2, -1, -1):
        found: dict[tuple[int | None, int], tuple[float, list[int]]] = {}
        for (before, last), (sum_, keys) in best.items():
            for following in range(last + 1, min(steps[-1] - left, last + farthest) + 1):
                if left == 0 and following != steps[-1]:
                    continue
                cost = sum_ + between(before, last, following)
                if (last, following) not in found or cost < found[last, following][0]:
                    found[last, following] = (cost, [*keys, following])
        best = found
    return min(best.values())[1]
