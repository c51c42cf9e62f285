"""The parts of the tiny WanPipeline: their sizes, fresh weights, and how they are written to a folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEEDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_WIDTH = 128
LATENT_CHANNELS = 16
SHIFT = 5.0  # of the sampler's noise levels towards the noisy end, where shape and way are decided

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def new_vae() -> AutoencoderKLWan:
    """3.7 M parameters, 8 x 8 pixels and 4 frames a latent; like Wan 2.2's it has residual samplers and 2 x 2 pixel patches."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=2,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def new_transformer() -> WanTransformer3DModel:
    """7.0 M parameters: Wan's own heads of 64, only fewer."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        ffn_dim=1024,
        num_layers=6,
    )


def new_tokenizer(longest: int = 512) -> PreTrainedTokenizerFast:
    """One token a word; case and punctuation do not matter, unknown words share one token.

    Pipelines that pad every prompt to what the tokenizer calls the longest pad it to `longest` tokens.
    """
    words = ["a", "an", "and", "moves", "over", "background"]
    words += [*SHAPES, *DIRECTIONS, *filter(None, SPEEDS), *dict.fromkeys([*COLOURS, *BACKGROUNDS])]
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=longest
    )


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """0.3 M parameters."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )


def save(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> None:
    """Write the pipeline in diffusers' own format, weights in fp16. Converts the given modules in place."""
    for module in (vae, transformer):
        module.register_to_config(_name_or_path="")  # or the folders they were loaded from are written down too
    WanPipeline(
        tokenizer=new_tokenizer(),
        text_encoder=text_encoder.to(torch.float16),
        vae=vae.to(torch.float16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformer.to(torch.float16),
    ).save_pretrained(folder)
