"""What the builders of tiny pipelines share: the recipe, text and image encoders, an image VAE, weights that matter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, T5Config, T5EncoderModel

from videoattn.testing import byte_tokenizer

TEXT_DIM = 32  # width of every tiny text and image encoder
TEXT_LENGTH = 32  # max_sequence_length: the first prompt is padded up to it, the second fills it


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tiny pipeline is built and called.

    ``make(head_dim=, heads=, layers=)`` builds it; ``call`` are its keyword arguments beyond prompt, seed, steps and
    output type. ``media`` is what it takes beside the prompt: one image for the whole batch, one a video, or a clip.
    ``settings`` are attributes of the pipeline object, which ``save_pretrained`` does not keep.
    ``skipped_steps`` of those asked for never run, because generation starts from a noisy clip.
    """

    make: Callable[..., Any]
    call: dict[str, Any] = field(default_factory=dict)
    media: Literal["image", "images", "video"] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    prompted: bool = True


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a random value of sensible size, zero-initialised ones too.

    Weights keep the variance of their input, norms scatter around 1, biases and scalars around 0: no gate is shut, no
    branch is silent, so that an error anywhere shows in the output.
    """
    seen = set()
    for owner in module.modules():
        is_norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if is_norm and name in ("weight", "gamma"):
                value = 1 + 0.1 * noise
            elif parameter.ndim > 1:
                value = noise * (parameter.numel() / parameter.shape[0]) ** -0.5
            else:
                value = 0.1 * noise
            with torch.no_grad():
                parameter.copy_(value)


def t5_encoder(width: int = TEXT_DIM, vocab_size: int = 400):
    """A T5 encoder; 400 tokens hold the byte vocabulary and ByT5's."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
        )
    )


def t5_text() -> dict[str, Any]:
    return {"tokenizer": byte_tokenizer("t5"), "text_encoder": t5_encoder()}


def clip_text() -> dict[str, Any]:
    return {"tokenizer": byte_tokenizer("clip"), "text_encoder": clip_text_encoder()}


def clip_text_encoder(width: int = TEXT_DIM):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=258,
            hidden_size=width,
            projection_dim=width,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
        )
    )


def clip_vision_config(image_size: int = 32):
    """17 image tokens: a class token and 4 x 4 patches."""
    return CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=image_size // 4,
    )


def clip_image_processor():
    return CLIPImageProcessor(size=32, crop_size=32)


def image_vae():
    """AutoencoderKL that shrinks height and width by 2, 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )
