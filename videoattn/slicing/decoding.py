"""What a pipeline will decode, as far as its denoiser's inputs tell: so that a budget is known to hold before the first step.

Shape letters: B rows of the batch (two of a prompt under guidance), C channels, T latent frames, Y x X latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from videoattn.slicing.session import Slicing

AT_ONCE = 16  # frames that AnimateDiffPipeline decodes at once


def _images(sample: Tensor, channels: int) -> tuple[tuple[int, ...], dict]:
    """sample [B, C, T, Y, X]: frames as rows of a batch."""
    _, _, frames, rows, columns = sample.shape
    return (min(frames, AT_ONCE), channels, rows, columns), {}


def _frames(sample: Tensor, channels: int) -> tuple[tuple[int, ...], dict]:
    """sample [B, T, C, Y, X], whose channels hold the condition too."""
    _, frames, _, rows, columns = sample.shape
    return (frames, channels, rows, columns), {"num_frames": frames}


def _video(sample: Tensor, channels: int) -> tuple[tuple[int, ...], dict]:
    """sample [B, C, T, Y, X]."""
    return (1, channels, *sample.shape[2:]), {}


LATENTS: dict[str, tuple[Callable[[Tensor, int], tuple[tuple[int, ...], dict]], str]] = {
    "AutoencoderKL": (_images, "latent_channels"),
    "AutoencoderKLTemporalDecoder": (_frames, "latent_channels"),
    "AutoencoderKLWan": (_video, "z_dim"),
}
"""VAE's class -> (sample and channels -> shape of the latents and options of `decode`, where its config has the channels)."""


def check_ahead(made: Sequence[Slicing]) -> None:
    """Have denoisers, before the first call of a size, look at what the VAE will take."""
    decodes = [slicing for slicing in made if slicing.entry == "decode" and type(slicing.model).__name__ in LATENTS]
    for denoiser in (slicing for slicing in made if slicing.entry == "forward"):
        for decode in decodes:
            denoiser.then = _Ahead(decode)


class _Ahead:
    """See `check_ahead`."""

    def __init__(self, decode: Slicing) -> None:
        self.decode = decode

    def __call__(self, args: tuple, kwargs: dict) -> None:
        model = self.decode.model
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        latents_of, channels = LATENTS[type(model).__name__]
        shape, options = latents_of(sample, model.config[channels])
        if self.decode.frames is not None:
            frames = min(self.decode.frames, shape[0])
            shape, options = (frames, *shape[1:]), {name: frames for name in options}
        self.decode.chosen((torch.empty(shape, dtype=model.dtype, device="meta"),), options)
