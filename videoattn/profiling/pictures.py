"""Frames of a pipeline's output, and small pictures of them for a report.

Letters: T frames, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

WIDTH, COUNT = 320, 6
_ROUNDING = 1e-3


def frames_of(output: object) -> np.ndarray | None:
    """The first video of a pipeline's output as [T, H, W, 3] floats in 0..1; None where it has no frames (latents)."""
    frames = _first(output)
    if frames is None:
        return None
    finite = frames[np.isfinite(frames)]  # what is not must be seen
    in_range = not finite.size or (finite.min() >= -_ROUNDING and finite.max() <= 1 + _ROUNDING)
    return frames if in_range else None  # latents may have the shape of frames


def _first(output: object) -> np.ndarray | None:
    found = getattr(output, "frames", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if found is None and isinstance(getattr(output, "values", None), Mapping):  # the state of a ModularPipeline
        found = output.values.get("videos")
    if found is None or len(found) == 0:
        return None
    video = found[0]
    if isinstance(video, Image.Image):  # one video, not in a list
        video = found
    if isinstance(video, list):
        return np.stack([np.asarray(frame, np.float32) / 255 for frame in video])
    if isinstance(video, torch.Tensor):
        if video.ndim != 4 or video.shape[1] != 3:
            return None
        return video.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    if isinstance(video, np.ndarray) and video.ndim == 4 and video.shape[-1] == 3:
        return video.astype(np.float32)
    return None


def thumbnails(frames: np.ndarray | None, count: int = COUNT, width: int = WIDTH) -> tuple[str, ...]:
    """`count` frames spread over the video as PNG in base64, at most `width` pixels wide; none where there are no frames."""
    if frames is None:
        return ()
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return encoded([frames[index] for index in chosen], width)


def encoded(frames: Sequence[np.ndarray], width: int = WIDTH) -> tuple[str, ...]:
    """[H, W, 3] floats as PNG in base64. What is not finite is drawn in magenta, not as black."""
    return tuple(_png(frame, width) for frame in frames)


def _png(frame: np.ndarray, width: int) -> str:
    good = np.where(np.isfinite(frame).all(-1, keepdims=True), frame, (1.0, 0.0, 1.0))
    picture = Image.fromarray((good * 255).round().clip(0, 255).astype(np.uint8))
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
