"""Every part of a pipeline once on the meta device, where tensors have a shape and no memory: its operators, its shapes, what
it allocates, without weights and without a GPU.

Attention is one fused operator here, as every GPU computes it. Nothing is masked: which text is padding changes no FLOP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from videoattn.benchmarks import denoiser_inputs, find_shapes
from videoattn.profiling.counts import Counts, Where
from videoattn.profiling.described import Model, Size
from videoattn.profiling.scopes import Scopes
from videoattn.slicing.decoder_switches import OF_FRAMES

_CANNOT = (RuntimeError, ValueError, TypeError)  # what torch and the hosts raise where something does not run on meta
_INSTRUCTION = {
    "HunyuanVideoPipeline": 95
}  # tokens in front of the prompt: diffusers' DEFAULT_PROMPT_TEMPLATE, crop_start
_CONDITION = {  # frames that the VAE encodes; 0: as many as the video has
    "I2VGenXLPipeline": 1,
    "StableVideoDiffusionPipeline": 1,
    "WanImageToVideoPipeline": 0,
    "WanVideoToVideoPipeline": 0,
}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One call of a part.

    Args:
        name: "transformer", "vae.decode", "text_encoder".
        kind: its class. dtype: of most of its weights.
        calls: how often a generation makes it.
        counts: of the call. What it made, its output included, is in `counts.peak_bytes`, its inputs are not.
        weights_bytes: of parameters and buffers.
    """

    name: str
    kind: str
    dtype: str
    calls: int
    counts: Counts
    weights_bytes: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A part that was not rehearsed, and why."""

    name: str
    why: str


def rehearse(model: Model, size: Size, steps: int) -> Iterator[Rehearsal | Refusal]:
    """The parts of a generation in the order in which it calls them; the denoisers are always there.

    Raises ValueError where a denoiser does not run at this size.
    """
    yield from _encoders(model)
    yield from _conditions(model, size)
    for name, own_steps in model.split(steps).items():
        yield _denoiser(model, name, size, own_steps * model.calls_a_step, steps)
    if "vae" in model.components:
        yield _tried("vae.decode", lambda: _decode(model, size))
    else:
        yield Refusal(name="vae.decode", why="benchmarks/models.toml does not describe the VAE")
    for name in model.others():
        yield Refusal(name=name, why="how a generation calls it is not known here")


def _denoiser(model: Model, name: str, size: Size, calls: int, steps: int) -> Rehearsal:
    config = model.components[name]
    module = model.built(name)
    inputs = denoiser_inputs.make(
        model.spec,
        config,
        size.height,
        size.width,
        size.frames,
        model.spec["batch"],
        device=find_shapes.prepare(module),
        dtype=model.dtype,
        seed=0,
    )
    try:
        return _run(name, module, partial(module, **inputs), calls, lambda: (0, steps, "0"))
    except _CANNOT as error:
        raise ValueError(
            f"{model.name} does not run at {size} (its pipeline's own is {model.size}) with the inputs of "
            f"{model.spec['pipeline']}: {' '.join(str(error).split())}"
        ) from error


def _encoders(model: Model) -> Iterator[Rehearsal | Refusal]:
    """Text encoders, one call a prompt, and the image encoder."""
    for name in sorted(model.encoders()):
        if name not in model.components:
            yield Refusal(name=name, why="benchmarks/models.toml does not describe it")
        elif name.startswith("image"):
            yield _tried(name, lambda name=name: _encode_image(model, name))
        else:
            yield _tried(name, lambda name=name: _encode_text(model, name))


def _encode_text(model: Model, name: str) -> Rehearsal:
    module = model.built(name)
    text = model.spec["text_2"] if name == "text_encoder_2" and "text_2" in model.spec else model.spec["text"]
    tokens = text["tokens"] + _INSTRUCTION.get(model.spec["pipeline"], 0)
    if type(module).__name__.startswith("CLIP"):
        tokens = module.config.max_position_embeddings
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    return _run(name, module, lambda: module(input_ids=ids), model.branches)


def _encode_image(model: Model, name: str) -> Rehearsal:
    module = model.built(name)
    edge = module.config.image_size
    pixels = torch.empty(1, 3, edge, edge, dtype=_dtype(module), device="meta")
    return _run(name, module, lambda: module(pixels), 1)


def _conditions(model: Model, size: Size) -> Iterator[Rehearsal | Refusal]:
    """The picture or video that the VAE encodes, where the pipeline takes one."""
    if not {"image", "video"} & model.argument.keys():
        return
    pipeline = model.spec["pipeline"]
    if "vae" not in model.components:
        yield Refusal(name="vae.encode", why="benchmarks/models.toml does not describe the VAE")
    elif pipeline not in _CONDITION:
        yield Refusal(name="vae.encode", why=f"how many frames {pipeline} encodes is not known here")
    else:
        yield _tried("vae.encode", lambda: _encode(model, size, _CONDITION[pipeline] or size.frames))


def _encode(model: Model, size: Size, frames: int) -> Rehearsal:
    vae = model.built("vae")
    shape = (1, 3, size.height, size.width)
    if type(vae).__name__ not in OF_FRAMES:
        shape = (1, 3, frames, size.height, size.width)
    pixels = torch.empty(shape, dtype=_dtype(vae), device="meta")
    return _run("vae.encode", vae, lambda: vae.encode(pixels), 1)


def _decode(model: Model, size: Size) -> Rehearsal:
    """All frames of the video, in the chunks that the pipeline makes of them."""
    vae = model.built("vae")
    if type(vae).__name__ == "AutoencoderKLAllegro":
        vae.enable_tiling()  # it decodes no other way
    latent = model.spec["latent"]
    frames = (size.frames - 1) // latent["temporal"] + 1
    rows, columns = size.height // latent["spatial"], size.width // latent["spatial"]
    empty = partial(torch.empty, dtype=_dtype(vae), device="meta")
    if type(vae).__name__ not in OF_FRAMES:
        latents = empty(1, latent["channels"], frames, rows, columns)
        return _run("vae.decode", vae, lambda: vae.decode(latents), 1)
    latents = empty(frames, latent["channels"], rows, columns)
    chunks = latents.split(model.argument.get("decode_chunk_size") or frames)
    options = [{"num_frames": len(x)} if "Temporal" in type(vae).__name__ else {} for x in chunks]

    def decode() -> list:
        return [vae.decode(chunk, **option).sample for chunk, option in zip(chunks, options, strict=True)]

    return _run("vae.decode", vae, decode, 1)


def _run(
    name: str, module: nn.Module, call: Callable[[], object], calls: int, where: Where = lambda: (-1, 0, "")
) -> Rehearsal:
    counts = Counts(where=where, memory=True)
    with torch.no_grad(), OnMeta(), Scopes({name.split(".")[0]: module}, counts), counts:
        call()
    return Rehearsal(
        name=name,
        kind=type(module).__name__,
        dtype=str(_dtype(module)).removeprefix("torch."),
        calls=calls,
        counts=counts,
        weights_bytes=sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())),
    )


def _tried(name: str, run: Callable[[], Rehearsal]) -> Rehearsal | Refusal:
    try:
        return run()
    except _CANNOT as error:
        return Refusal(name=name, why=f"did not run on the meta device: {' '.join(str(error).split())[:200]}")


def _dtype(module: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__)


class OnMeta(TorchFunctionMode):
    """Stands in for what the meta device does not do as a GPU does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused(
                *args[:3], **{key: value for key, value in kwargs.items() if key in ("query", "key", "value")}
            )
        if func is torch.nonzero and args[0].is_meta:  # Mochi gathers the tokens of the prompt
            return torch.empty(denoiser_inputs.PROMPT_TOKENS, 1, dtype=torch.int64, device="meta")
        return func(*args, **kwargs)


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Uninitialised, in memory as the fused kernels leave it: rows of tokens."""
    if query.ndim < 4:
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    *batch, heads, tokens, _ = query.shape
    return query.new_empty(*batch, tokens, heads, value.shape[-1]).transpose(-2, -3)
