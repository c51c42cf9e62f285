"""Frames of two runs, as the measures of quality take them and as a report shows them.

Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import numpy as np

from videoattn.profiling import pictures
from videoattn.profiling.comparison import Pair

WIDTH, COUNT = 240, 6  # of the frames shown: pixels and number
GAIN = 8  # of the differences shown


def pairs(video: np.ndarray, reference: np.ndarray) -> tuple[Pair, ...]:
    """Frames spread over the video with the worst of them, both and their difference."""
    worst = int(np.argmax(np.square(video - reference).mean((1, 2, 3))))
    spread = np.linspace(0, len(video) - 1, min(COUNT, len(video))).round().astype(int)
    chosen = sorted({worst, *spread.tolist()})
    rows = ((reference[i], video[i], _heat(np.abs(video[i] - reference[i]).mean(-1) * GAIN)) for i in chosen)
    encoded = (pictures.encoded(row, WIDTH) for row in rows)
    return tuple(
        Pair(index=i, base=base, patched=patched, difference=difference)
        for i, (base, patched, difference) in zip(chosen, encoded, strict=True)
    )


def _heat(values: np.ndarray) -> np.ndarray:
    """[H, W] in 0..1 as black, red, yellow, white [H, W, 3]."""
    return np.clip(np.stack([3 * values, 3 * values - 1, 3 * values - 2], axis=-1), 0, 1)


def of(output: object) -> np.ndarray:
    """The frames of a pipeline's output as floats. Raises ValueError where it has none."""
    frames = pictures.frames_of(output)
    if frames is None:
        raise ValueError(f"compare: wanted a pipeline that returns frames, got {type(output).__name__} without")
    return frames


def unsound(frames: np.ndarray, whose: str) -> list[str]:
    bad = (~np.isfinite(frames).all((1, 2, 3))).sum()
    return [f"{whose}: {bad} of {len(frames)} frames are not finite; such values count as black"] if bad else []


def sound(frames: np.ndarray) -> np.ndarray:
    """What the measures of quality take: finite, 0..1."""
    return np.nan_to_num(frames, nan=0.0, posinf=0.0, neginf=0.0).clip(0.0, 1.0)
