"""Reads colour, shape and direction of the one thing in a clip off its pixels. Plain NumPy, nothing learned.

Shape letters: T frames, H x W pixels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from render import render
from scenes import ABSENT, COLOURS, DIRECTIONS, SHAPES

GRID = 32  # a silhouette is compared on GRID x GRID points
REACH = 0.9  # they span this many times the square root of the silhouette's area, to each side of its centre
VISIBLE = 0.15  # RGB distance from the background below which nothing counts as visible
SAMPLED = 2  # every second frame, row and column are enough for the statistics of the background
SMALLEST = 0.004  # part of the frame that a thing covers at least


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the checker saw; None where there is nothing to see."""

    colour: str | None
    shape: str | None
    direction: str | None


def read(video: np.ndarray) -> Reading:
    """video: [T, H, W, 3] in 0..1, one thing that moves over a background whose rows are of one colour each."""
    background = np.median(video[::SAMPLED, :, ::SAMPLED], axis=(0, 2), keepdims=True)
    contrast = np.linalg.norm(video - background, axis=-1)
    strength = np.quantile(contrast[::SAMPLED, ::SAMPLED, ::SAMPLED], 0.985)
    mask = contrast > max(0.5 * strength, VISIBLE)
    seen = mask.mean(axis=(1, 2)) > SMALLEST
    if seen.sum() < 2:
        return Reading(colour=None, shape=None, direction=None)
    core = mask & (contrast > 0.85 * strength)
    return Reading(
        colour=_nearest_colour(video[core].mean(0)),
        shape=_nearest_shape(mask[seen]),
        direction=_nearest_direction(mask[seen]),
    )


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: np.linalg.norm(rgb - COLOURS[name]))


def _centre(mask: np.ndarray) -> np.ndarray:
    """Mean (x, y) of a mask [H, W], in pixels."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def _nearest_direction(masks: np.ndarray) -> str:
    way = _centre(masks[-1]) - _centre(masks[0])
    return max(DIRECTIONS, key=lambda name: way @ DIRECTIONS[name])


def _silhouette(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] moved to its centre of mass and scaled to unit area, on GRID x GRID points, False outside the frame."""
    offsets = np.linspace(-REACH, REACH, GRID) * np.sqrt(mask.sum())
    x, y = np.rint(_centre(mask)[:, None] + offsets).astype(int)
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))
    return mask[np.ix_(y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1))] & inside


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    things = [[(index, 1, 1, 1, 0.3, 0.5, 0.5, 0, 0), ABSENT] for index in range(len(SHAPES))]
    pictures, _ = render(torch.tensor(things), torch.zeros(len(SHAPES), 6), 1, 256, 256)
    return {shape: _silhouette(picture[0, 0].numpy() > 0) for shape, picture in zip(SHAPES, pictures, strict=True)}


def _nearest_shape(masks: np.ndarray) -> str:
    """The shape whose silhouette has the largest mean overlap (intersection over union) with the masks [T, H, W]."""
    silhouettes = np.stack([_silhouette(mask) for mask in masks])

    def overlap(shape: str) -> float:
        template = _templates()[shape]
        return ((silhouettes & template).sum((1, 2)) / (silhouettes | template).sum((1, 2))).mean()

    return max(SHAPES, key=overlap)
