"""How far one video, or one attention output, is from another. Raw frames only: a codec alone costs 41 dB.

PSNR and SSIM are scikit-image's, with data range 1. Public code disagrees by 3 dB on one and the same pair of videos (mean
of frames or pooled, frames before or after mp4), so compare these figures with each other, not with a paper's.

Letters: T frames, H height, W width, C channels; for attention B batch, N tokens, D head dimension.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import videoattn

SSIM_WINDOW = 11  # pixels: a Gaussian of sigma 1.5, cut at 3.5 sigma
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name for the weights under LPIPS


@dataclass(frozen=True, kw_only=True)
class VideoDifference:
    """One video against a reference of the same prompt and seed.

    Attributes:
        identical: every value is equal; then PSNR is infinite, and `str` says "identical" in its place.
        psnr: dB from the squared error pooled over the video, the headline.
        psnr_mean: dB, mean over the frames that differ.
        psnr_frames: dB of each frame; infinite where it is identical.
        worst_frame: index of the frame with the least PSNR, `psnr_worst` its dB.
        ssim: mean over the frames; `ssim_worst` the least.
        flicker_psnr: PSNR of the differences between neighbouring frames, dB: what changed in the motion.
        motion: energy of those differences over the reference's; below 1 the video moves less. NaN if that stands still.
    """

    identical: bool
    psnr: float
    psnr_mean: float
    psnr_frames: tuple[float, ...]
    worst_frame: int
    psnr_worst: float
    ssim: float
    ssim_worst: float
    flicker_psnr: float
    motion: float

    def __str__(self) -> str:
        if self.identical:
            return "identical"
        return (
            f"PSNR {self.psnr:.2f} dB (frame mean {self.psnr_mean:.2f}, worst {self.psnr_worst:.2f} at frame "
            f"{self.worst_frame}), SSIM {self.ssim:.4f} (worst {self.ssim_worst:.4f}), "
            f"frame differences {self.flicker_psnr:.2f} dB, motion x{self.motion:.3f}"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionError:
    """One attention output against a reference, over all elements.

    Attributes:
        rel_l2, rel_l1: norm of the difference over the norm of the reference.
        worst_cosine: the least cosine of a row of D elements with its reference; a flat cosine hides zeroed rows.
        max_abs: greatest absolute difference.
        finite: no NaN and no infinity in the output.
    """

    rel_l2: float
    rel_l1: float
    worst_cosine: float
    max_abs: float
    finite: bool


def compare_videos(video: object, reference: object) -> VideoDifference:
    """`video` against `reference`: frames as a pipeline returns them with output_type "np", "pt" or "pil".

    Args:
        video, reference: [T, H, W, C] or [T, C, H, W] (tensors only), floats in 0..1 or uint8; or a list of images.

    Raises:
        ValueError: shapes differ, values outside 0..1, or frames smaller than the SSIM window.
    """
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

    video, reference = _frames(video), _frames(reference)
    if video.shape != reference.shape:
        raise ValueError(f"compare_videos: wanted two videos of one shape, got {video.shape} and {reference.shape}")
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"compare_videos: wanted frames of {SSIM_WINDOW} x {SSIM_WINDOW} or more, got {video.shape}")

    def psnr(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> float:
        if mean_squared_error(a, b) == 0:
            return float("inf")
        return float(peak_signal_noise_ratio(b, a, data_range=data_range))

    frames = [psnr(a, b) for a, b in zip(video, reference, strict=True)]
    ssim = [
        structural_similarity(
            b, a, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(video, reference, strict=True)
    ]
    differing = [value for value in frames if value != float("inf")]
    motion, reference_motion = np.diff(video, axis=0), np.diff(reference, axis=0)
    energy = float(np.square(reference_motion).sum())
    return VideoDifference(
        identical=not differing,
        psnr=psnr(video, reference),
        psnr_mean=float(np.mean(differing)) if differing else float("inf"),
        psnr_frames=tuple(frames),
        worst_frame=int(np.argmin(frames)),
        psnr_worst=min(frames),
        ssim=float(np.mean(ssim)),
        ssim_worst=float(np.min(ssim)),
        flicker_psnr=psnr(motion, reference_motion) if len(motion) else float("inf"),
        motion=float(np.square(motion).sum()) / energy if energy else float("nan"),
    )


def lpips(video: object, reference: object, weights: Path | None = None) -> float | str:
    """LPIPS of `video` to `reference` with AlexNet, mean over the frames; or why it was not computed.

    Nothing is ever downloaded: the package lpips brings its own heads, the weights of torchvision's AlexNet must be here.

    Args:
        video, reference: as for `compare_videos`.
        weights: file of these weights; None looks where torch.hub keeps them.

    Raises:
        ValueError: shapes differ, values outside 0..1, or `weights` is named and not there.
    """
    if weights is not None and not weights.is_file():
        raise ValueError(f"lpips: wanted a file with the weights of AlexNet, got {weights}")
    missing = [name for name in ("lpips", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        return f"no package {' and '.join(missing)} here"
    weights = weights or Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return f"no weights of AlexNet in {weights}"
    video, reference = _frames(video), _frames(reference)
    if video.shape != reference.shape:
        raise ValueError(f"lpips: wanted two videos of one shape, got {video.shape} and {reference.shape}")
    try:
        import lpips as package
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter where it was built for another torch
        return f"the package lpips does not work here: {' '.join(str(error).split())}"
    model = package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()  # heads of the package, an empty AlexNet
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    # The package cuts AlexNet into slices that keep the layers' numbers: "slice2.3.weight" is "features.3.weight".
    named = itertools.chain(model.net.named_parameters(), model.net.named_buffers())
    model.net.load_state_dict({name: stored[f"features.{name.split('.', 1)[1]}"] for name, _ in named})
    with torch.inference_mode():
        pairs = (
            (torch.from_numpy(frame).permute(2, 0, 1)[None].float() * 2 - 1 for frame in pair)
            for pair in zip(video, reference, strict=True)
        )
        return float(np.mean([model(*pair).item() for pair in pairs]))  # it takes -1..1


def attention_error(out: Tensor, reference: Tensor) -> AttentionError:
    """`out` [..., N, H, D] against `reference` of the same shape; computed in fp64.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != reference.shape:
        raise ValueError(f"attention_error: wanted the shape {tuple(reference.shape)}, got {tuple(out.shape)}")
    a, b = out.double(), reference.double()
    return AttentionError(
        rel_l2=float((a - b).norm() / b.norm()),
        rel_l1=float((a - b).abs().sum() / b.abs().sum()),
        worst_cosine=float(torch.cosine_similarity(a, b, dim=-1).min()),
        max_abs=float((a - b).abs().max()),
        finite=bool(a.isfinite().all()),
    )


def noise_floor(
    pipe: object, generate: Callable[[], object], backends: tuple[str, str] | None = None
) -> VideoDifference:
    """How far two exact kernels are apart on one generation: less than that says nothing about a third kernel.

    Args:
        pipe: the pipeline or denoiser; what is enabled on it is put back afterwards.
        generate: runs it and returns frames (see `compare_videos`), from the same seed each time.
        backends: two exact backends; by default torch's own choice against its memory-efficient kernel, or, without a
            GPU, against plain matrix products.
    """
    if backends is None:
        backends = ("sdpa", "sdpa_efficient" if torch.cuda.is_available() else "sdpa_math")
    videos = []
    for backend in backends:
        with videoattn.fast_attention(pipe, "exact", backend=backend):
            videos.append(generate())
    return compare_videos(videos[1], videos[0])


def _frames(video: object) -> np.ndarray:
    """[T, H, W, C] in fp64, 0..1."""
    if isinstance(video, Tensor):
        video = video.detach().cpu()
        if video.ndim == 4 and video.shape[-1] not in (1, 3) and video.shape[1] in (1, 3):
            video = video.permute(0, 2, 3, 1)
        video = (video.float() if video.is_floating_point() else video).numpy()
    frames = np.stack([np.asarray(frame) for frame in video])
    if frames.ndim != 4:
        raise ValueError(f"wanted one video [T, H, W, C], got the shape {frames.shape}")
    if frames.dtype == np.uint8:
        return frames / 255.0
    if not (np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1):
        raise ValueError(f"wanted floats in 0..1 or uint8, got {frames.dtype} in {frames.min()}..{frames.max()}")
    return frames.astype(np.float64)
