"""Frames on disk: an mp4, and a contact sheet that shows several videos at a glance.

Shape letters: T frames, H height, W width in pixels. Frames are [T, H, W, 3], floating, in 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FPS = 16
_TEXT, _MARGIN = 16, 8  # pixels


def write_video(frames: np.ndarray, path: Path, *, fps: int = FPS) -> None:
    """An H.264 mp4 of the frames.

    Raises:
        ValueError: frames of another shape, or with NaN or infinities in them.
    """
    from diffusers.utils import export_to_video

    path.parent.mkdir(parents=True, exist_ok=True)
    # macro_block_size 2: H.264 needs even sides; imageio's default would rescale everything to multiples of 16.
    export_to_video(list(_checked("frames", frames)), str(path), fps=fps, macro_block_size=2)


def write_contact_sheet(videos: Mapping[str, np.ndarray], path: Path, *, columns: int = 8) -> None:
    """A picture with one labelled row a video, `columns` frames spread evenly over its length, first and last included.

    Raises:
        ValueError: frames of another shape, or with NaN or infinities in them.
    """
    rows = [(label, _spread(_checked(label, frames), columns)) for label, frames in videos.items()]
    width = max(_MARGIN + sum(frame.shape[1] + _MARGIN for frame in frames) for _, frames in rows)
    height = _MARGIN + sum(_TEXT + 2 * _MARGIN + frames[0].shape[0] for _, frames in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT), _MARGIN
    for label, frames in rows:
        draw.text((_MARGIN, top), label, fill="black", font=font)
        top += _TEXT + _MARGIN
        for column, frame in enumerate(frames):
            pixels = Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8))
            sheet.paste(pixels, (_MARGIN + column * (frame.shape[1] + _MARGIN), top))
        top += frames[0].shape[0] + _MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _spread(frames: np.ndarray, columns: int) -> list[np.ndarray]:
    return [frames[i] for i in np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]


def _checked(name: str, frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{name}: wanted [T, H, W, 3] with T > 0, got {frames.shape}")
    if not np.isfinite(frames).all():
        raise ValueError(f"{name}: wanted finite pixels, got NaN or infinities")
    return frames
