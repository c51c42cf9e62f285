"""What each pipeline calls its denoiser with: one function a denoiser class of diffusers.

Letters: B rows of the call, T, Y, X latent frames, height and width, C latent channels, L text tokens, W text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PROMPT_TOKENS = 60  # of a prompt of about 45 words; the rest of the text is padding

Kwargs = dict[str, Any]


class _Call:
    """The sizes of one call, and tensors on its device: values on CPU and CUDA are seeded, on meta there are none."""

    def __init__(self, spec, config, height, width, frames, batch, device, dtype, seed):
        self.spec, self.config, self.device, self.dtype = spec, config, torch.device(device), dtype
        latent = spec["latent"]
        self.height, self.width, self.frames = height, width, frames
        self.B, self.C = batch, latent["channels"]
        self.T = (frames - 1) // latent["temporal"] + 1
        self.Y, self.X = height // latent["spatial"], width // latent["spatial"]
        meta = self.device.type == "meta"
        self.generator = None if meta else torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype or self.dtype)

    def timestep(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.full((self.B,), 500.0, dtype)

    def text(self, key: str = "text") -> torch.Tensor:
        return self.randn(self.B, self.spec[key]["tokens"], self.spec[key]["width"])

    def text_mask(self, key: str = "text", dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """[B, L], 1 where the prompt has a token: padding is on the right."""
        position = torch.arange(self.spec[key]["tokens"], device=self.device)
        return (position < PROMPT_TOKENS).to(dtype).expand(self.B, -1).contiguous()

    def video(self, channels: int | None = None) -> torch.Tensor:
        return self.randn(self.B, channels or self.C, self.T, self.Y, self.X)


def make(spec, config, height, width, frames, batch, *, device, dtype, seed) -> Kwargs:
    """Keyword arguments for the denoiser that ``config`` describes; see ``models.inputs``."""
    call = _Call(spec, config, height, width, frames, batch, device, dtype, seed)
    return {**_MAKERS[config["_class_name"]](call), "return_dict": False}


def _wan(call: _Call) -> Kwargs:
    kwargs = {
        "hidden_states": call.video(call.config["in_channels"]),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
    }
    if call.spec.get("token_timesteps"):
        tokens = call.T * (call.Y // 2) * (call.X // 2)
        kwargs["timestep"] = call.full((call.B, tokens), 500.0, torch.float32)
    if "image" in call.spec:
        kwargs["encoder_hidden_states_image"] = call.text("image")
    if call.config.get("inject_sample_info"):
        kwargs["fps"] = call.full((call.B,), 1, torch.int64)  # an index: 0 is 16 frames a second, 1 is 24
    return kwargs


def _hunyuan(call: _Call) -> Kwargs:
    return {
        "hidden_states": call.video(),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
        "encoder_attention_mask": call.text_mask(dtype=call.dtype),
        "pooled_projections": call.randn(call.B, call.config["pooled_projection_dim"]),
        "guidance": call.full((call.B,), 6000.0),
    }


def _hunyuan15(call: _Call) -> Kwargs:
    image = call.spec["image"]
    return {
        "hidden_states": call.video(call.config["in_channels"]),
        "timestep": call.timestep(call.dtype),
        "encoder_hidden_states": call.text(),
        "encoder_attention_mask": call.text_mask(),
        "encoder_hidden_states_2": call.text("text_2"),
        "encoder_attention_mask_2": torch.zeros_like(call.text_mask("text_2")),  # no text in quotes to draw
        "image_embeds": call.full((call.B, image["tokens"], image["width"]), 0.0),  # text to video
    }


def _cogvideox(call: _Call) -> Kwargs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    kwargs = {
        "hidden_states": call.randn(call.B, call.T, call.C, call.Y, call.X),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
    }
    if call.config["use_rotary_positional_embeddings"]:
        rows, columns = call.Y // 2, call.X // 2
        kwargs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            call.config["attention_head_dim"], ((0, 0), (rows, columns)), (rows, columns), call.T, device=call.device
        )
    return kwargs


def _ltx(call: _Call) -> Kwargs:
    return {
        "hidden_states": call.randn(call.B, call.T * call.Y * call.X, call.C),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
        "encoder_attention_mask": call.text_mask(),
        "num_frames": call.T,
        "height": call.Y,
        "width": call.X,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # the VAE's steps; 25 frames a second
    }


def _ltx2(call: _Call) -> Kwargs:
    audio = call.spec["audio"]
    samples = round(call.frames / audio["fps"] * audio["per_second"])
    mask = torch.ones_like(call.text_mask())  # the text connectors put registers in the place of padding
    return {
        "hidden_states": call.randn(call.B, call.T * call.Y * call.X, call.C),
        "audio_hidden_states": call.randn(call.B, samples, audio["channels"]),
        "encoder_hidden_states": call.text(),
        "audio_encoder_hidden_states": call.text(),
        "timestep": call.timestep(),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": call.T,
        "height": call.Y,
        "width": call.X,
        "fps": audio["fps"],
        "audio_num_frames": samples,
    }


def _mochi(call: _Call) -> Kwargs:
    return {
        "hidden_states": call.video(),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
        "encoder_attention_mask": call.text_mask(dtype=torch.bool),
    }


def _latte(call: _Call) -> Kwargs:
    return {
        "hidden_states": call.video(),
        "timestep": call.full((call.B,), 500, torch.int64),
        "encoder_hidden_states": call.text(),
        "enable_temporal_attentions": True,
    }


def _allegro(call: _Call) -> Kwargs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    rows, columns = call.Y // 2, call.X // 2
    scale = tuple(
        call.config.get(f"interpolation_scale_{axis}", default)
        for axis, default in (("t", 2.2), ("h", 2.0), ("w", 2.0))
    )
    *freqs, t, y, x = get_3d_rotary_pos_embed_allegro(
        call.config["attention_head_dim"], ((0, 0), (rows, columns)), (rows, columns), call.T, scale, device=call.device
    )
    grid = torch.cartesian_prod(t.long(), y.long(), x.long()).reshape(-1, 3).T.reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": call.video(),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.text(),
        "encoder_attention_mask": call.text_mask(),
        "image_rotary_emb": (tuple(freqs), tuple(grid)),
    }


def _cosmos(call: _Call) -> Kwargs:
    return {
        "hidden_states": call.video(),
        "timestep": call.timestep(call.dtype),
        "encoder_hidden_states": call.text(),
        "fps": 30,
    }


def _kandinsky5(call: _Call) -> Kwargs:
    channels = 2 * call.C + 1 if call.config["visual_cond"] else call.C  # latents, first frame, its mask
    return {
        "hidden_states": call.randn(call.B, call.T, call.Y, call.X, channels),
        "timestep": call.timestep(call.dtype),
        "encoder_hidden_states": call.text(),
        "pooled_projections": call.randn(call.B, call.config["in_text_dim2"]),
        "visual_rope_pos": [torch.arange(n, device=call.device) for n in (call.T, call.Y // 2, call.X // 2)],
        "text_rope_pos": torch.arange(call.spec["text"]["tokens"], device=call.device),
        "scale_factor": (1, 2, 2) if 480 <= call.height <= 854 and 480 <= call.width <= 854 else (1, 3.16, 3.16),
    }


def _motion(call: _Call) -> Kwargs:
    text = call.spec["text"]
    return {
        "sample": call.video(),
        "timestep": call.full((), 500, torch.int64),
        "encoder_hidden_states": call.randn(call.B * call.T, text["tokens"], text["width"]),
    }


def _svd(call: _Call) -> Kwargs:
    return {
        "sample": call.randn(call.B, call.T, call.config["in_channels"], call.Y, call.X),
        "timestep": call.full((), 1.0, torch.float32),
        "encoder_hidden_states": call.text(),
        "added_time_ids": call.full((call.B, 3), 6.0),
    }


def _unet3d(call: _Call) -> Kwargs:
    return {
        "sample": call.video(),
        "timestep": call.full((), 500, torch.int64),
        "encoder_hidden_states": call.text(),
    }


def _i2vgen(call: _Call) -> Kwargs:
    return {
        **_unet3d(call),
        "fps": call.full((call.B,), 16, torch.int64),
        "image_latents": call.video(),
        "image_embeddings": call.randn(call.B, 1, call.config["cross_attention_dim"]),
    }


_MAKERS: dict[str, Callable[[_Call], Kwargs]] = {
    "WanTransformer3DModel": _wan,
    "SkyReelsV2Transformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
    "MochiTransformer3DModel": _mochi,
    "LatteTransformer3DModel": _latte,
    "AllegroTransformer3DModel": _allegro,
    "CosmosTransformer3DModel": _cosmos,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "UNetMotionModel": _motion,
    "UNetSpatioTemporalConditionModel": _svd,
    "UNet3DConditionModel": _unet3d,
    "I2VGenXLUNet": _i2vgen,
}
