"""Every attention call of the video denoisers in ``models.toml`` at their default sizes -> ``shapes.toml``.

The denoisers run whole on the meta device: shapes, dtypes and strides are exact, nothing is computed, no GPU is needed.
``F.scaled_dot_product_attention`` is where all of them end, directly or through diffusers' ``dispatch_attention_fn``.
Calls that are alike in everything but the layer are one row; ``used_by`` counts them per forward of each configuration.

    python -m videoattn.benchmarks.find_shapes            # rewrites shapes.toml, two minutes
    python -m videoattn.benchmarks.find_shapes --model ltx --print
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from videoattn.benchmarks import models, results
from videoattn.benchmarks.denoiser_inputs import PROMPT_TOKENS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SHAPES = Path(__file__).parent / "shapes.toml"
HEADER = """\
# Written by find_shapes.py from models.toml: every attention call of the video families of diffusers, one row a kind of call.
#
# kind       as videoattn.call.Kind: full (all video tokens), joint (video and text in one sequence), spatial (one frame),
#            temporal (one place over the frames), cross (to text, image or audio), text and audio (among themselves)
# layout     order in memory of q, k, v (one word where they agree); [B, N, H, D] is how projections leave them
# strides    contiguous, or which of q, k, v are views of a wider projection, with their row pitch in elements
# mask       none; prefix (bool, padding behind the first kv_valid keys); bool and additive, in their broadcast shape
# used_by    calls in one forward of a model at height x width x frames; empty: a reference row, see find_shapes.py
"""

JOINT = ("CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel")
JOINT += ("MochiTransformer3DModel",)
FACTORISED = ("UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet")
FACTORISED += ("LatteTransformer3DModel",)
TEMPORAL = re.compile(r"temporal_transformer_blocks|temp_attentions|motion_modules|transformer_in|temporal_encoder")
TEXT = re.compile(r"^$|token_refiner|text_transformer_blocks")

# Parts of HunyuanVideo 1.5 that decide by value which text is kept: they run on the CPU, the rest stays on meta.
BY_VALUE = {
    "HunyuanVideo15Transformer3DModel": (
        "time_embed",
        "cond_type_embed",
        "context_embedder",
        "context_embedder_2",
        "image_embedder",
    )
}

# Temporal attention in both layouts, whatever the models do: (rows, heads, frames, head_dim), all fp16.
TEMPORAL_REFERENCE = (
    (8192, 8, 16, 40),  # AnimateDiff, 64x64 latents
    (2048, 8, 16, 80),  # AnimateDiff, 32x32
    (512, 8, 16, 160),  # AnimateDiff, 16x16
    (18432, 5, 25, 64),  # SVD-XT, level 0
    (2048, 16, 16, 64),  # ModelScope's head, 16 of them
    (2048, 16, 16, 72),  # Latte
    (8192, 8, 32, 40),  # AnimateDiff, 32 frames
)
# Long sequences of the heads between 64 and 128 and beyond, of which the models make few: (batch, heads, tokens, head_dim).
LONG_REFERENCE = tuple(
    (batch, heads, tokens, head_dim)
    for head_dim in (40, 72, 80, 96, 112, 160)
    for batch, heads, tokens in ((4, 8, 4096), (1, 8, 16384))
)


@dataclass(frozen=True, order=True, kw_only=True)
class Shape:
    """One attention call; the fields are explained in ``HEADER``. ``mask_shape`` is () without a mask."""

    kind: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    layout: str
    strides: str = "contiguous"
    mask: str = "none"
    mask_shape: tuple[int, ...] = ()
    kv_valid: int
    causal: bool = False

    @property
    def name(self) -> str:
        extra = "" if self.layout == "BNHD" else f" {self.layout}"
        return f"{self.batch}x{self.heads}x{self.q_len}x{self.kv_len}x{self.head_dim}{extra}"


def find(name: str, size: Iterable[int] = ()) -> Counter[Shape]:
    """The calls of one forward of ``name`` at ``size`` (height, width, frames; its default if empty), with their counts."""
    denoiser = models.denoiser(name, device="meta")
    cls = type(denoiser).__name__
    inputs = models.inputs(name, *size, device=prepare(denoiser))
    recorder = _Recorder(cls, models.spec(name))
    for path, module in denoiser.named_modules():
        if hasattr(module, "processor"):
            module.register_forward_pre_hook(lambda *_, path=path: recorder.enter(path))
    with torch.no_grad(), recorder:
        denoiser(**inputs)
    return recorder.calls


def prepare(denoiser: nn.Module) -> str:
    """Make a denoiser on the meta device run there. Returns the device on which it needs its inputs."""
    cls = type(denoiser).__name__
    if cls == "MochiTransformer3DModel":  # its RoPE enters autocast, which the meta device does not have
        angle = torch.empty(
            1, denoiser.config.num_attention_heads, denoiser.config.attention_head_dim // 2, device="meta"
        )
        denoiser.rope.forward = lambda *args, **kwargs: (angle, angle)
    if cls not in BY_VALUE:
        return "meta"
    _keep_values(denoiser, BY_VALUE[cls])
    return "cpu"


def _keep_values(denoiser: nn.Module, by_value: tuple[str, ...]) -> None:
    """Give the parts named in ``by_value`` memory on the CPU; the others move what they are called with to meta."""

    def to_meta(module, args, kwargs):
        move = torch.utils._pytree.tree_map_only
        return move(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))

    for name, child in denoiser.named_children():
        if name in by_value:
            child.to_empty(device="cpu")
        else:
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                module.register_forward_pre_hook(to_meta, with_kwargs=True)


class _Recorder(TorchFunctionMode):
    """Counts calls of SDPA instead of computing them."""

    def __init__(self, denoiser: str, spec: models.Spec):
        super().__init__()
        self.denoiser, self.spec, self.site = denoiser, spec, ""
        self.calls: Counter[Shape] = Counter()

    def enter(self, site: str) -> None:
        self.site = site

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if func is torch.nonzero and args[0].is_meta:  # Mochi gathers the tokens of the prompt
            return torch.empty(PROMPT_TOKENS, 1, dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        batch, heads, q_len, head_dim = query.shape
        kv_heads, kv_len = key.shape[1:3]
        layouts, pitches = zip(*(_layout(x) for x in (query, key, value)), strict=True)
        shape = Shape(
            kind=self.kind(q_len, kv_len),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            dtype=str(query.dtype).removeprefix("torch."),
            layout=layouts[0] if len(set(layouts)) == 1 else " ".join(layouts),
            strides=" ".join(f"{x}:{p}" for x, p in zip("qkv", pitches, strict=True) if p) or "contiguous",
            kv_valid=kv_len,
            causal=is_causal,
        )
        if attn_mask is not None:
            shape = replace(shape, **self.mask(attn_mask, shape))
        self.calls[shape] += 1
        # laid out as the fused kernels leave it: rows of tokens
        return torch.empty(batch, q_len, heads, value.shape[-1], dtype=query.dtype, device=query.device).transpose(1, 2)

    def kind(self, q_len: int, kv_len: int) -> str:
        if TEXT.search(self.site):
            return "text"
        if self.denoiser in JOINT:
            return "joint"
        if q_len != kv_len:
            return "cross"
        if "audio_attn" in self.site:
            return "audio"
        if TEMPORAL.search(self.site):
            return "temporal"
        return "spatial" if self.denoiser in FACTORISED else "full"

    def mask(self, mask: torch.Tensor, shape: Shape) -> dict[str, object]:
        """Every mask hides padding behind the prompt; a "bool" one hides the padding's own rows as well."""
        text = sum(self.spec[key]["tokens"] for key in ("text", "text_2", "image") if key in self.spec)
        if shape.kind != "joint":
            text = shape.kv_len
        registers = self.denoiser == "LTX2VideoTransformer3DModel"  # in the place of padding: nothing is hidden
        kind = "additive" if mask.dtype != torch.bool else "prefix" if mask.shape[-2] == 1 else "bool"
        return {
            "mask": kind,
            "mask_shape": tuple(1 if step == 0 else n for n, step in zip(mask.shape, mask.stride(), strict=True)),
            "kv_valid": shape.kv_len if registers else shape.kv_len - text + PROMPT_TOKENS,
        }


def _layout(x: torch.Tensor) -> tuple[str, int]:
    """Order in memory of x [B, H, N, D], and its row pitch in elements if x is a view of something wider, else 0."""
    _, heads, tokens, dim = x.shape
    _, head_step, token_step, _ = x.stride()
    if tokens > 1 and (token_step == dim or head_step > token_step) and heads > 1:
        return "BHND", 0 if token_step == dim else token_step
    return "BNHD", 0 if tokens == 1 or token_step == heads * dim else token_step


def find_all(names: Iterable[str]) -> dict[Shape, dict[str, int]]:
    """Shape -> calls per forward of "model heightxwidthxframes", for every size of every model, in their order."""
    found: dict[Shape, dict[str, int]] = {}
    for name in names:
        for size in models.spec(name)["sizes"]:
            for shape, count in find(name, size).items():
                found.setdefault(shape, {})[f"{name} {'x'.join(map(str, size))}"] = count
    return found


def square(kind: str, batch: int, heads: int, tokens: int, head_dim: int, dtype: str, layout: str = "BNHD") -> Shape:
    """Self-attention without a mask; q, k and v contiguous in the given order."""
    return Shape(
        kind=kind,
        batch=batch,
        heads=heads,
        kv_heads=heads,
        q_len=tokens,
        kv_len=tokens,
        kv_valid=tokens,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
    )


def reference_rows() -> list[Shape]:
    temporal = [
        square("temporal", *sizes, "float16", layout) for layout in ("BNHD", "BHND") for sizes in TEMPORAL_REFERENCE
    ]
    return temporal + [square("full", *sizes, "bfloat16") for sizes in LONG_REFERENCE]


def read(path: Path = SHAPES) -> dict[Shape, dict[str, int]]:
    """The rows of ``shapes.toml``, as ``find_all`` returns them."""
    rows = tomllib.loads(path.read_text())["shape"]
    found = {}
    for row in rows:
        used_by = row.pop("used_by")
        found[Shape(**{**row, "mask_shape": tuple(row["mask_shape"])})] = used_by
    return found


def write(found: dict[Shape, dict[str, int]], path: Path = SHAPES) -> None:
    lines = [_line(shape, used_by) for shape, used_by in found.items()]
    path.write_text(HEADER + "\nshape = [\n" + "".join(f"  {line},\n" for line in lines) + "]\n")


def _line(shape: Shape, used_by: dict[str, int]) -> str:
    fields = [f"{key} = {_toml(value)}" for key, value in asdict(shape).items()]
    users = ", ".join(f'"{user}" = {count}' for user, count in used_by.items())
    return "{ " + ", ".join([*fields, f"used_by = {{ {users} }}"]) + " }"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find every attention call of the models and write shapes.toml.")
    results.add_arguments(parser)
    parser.add_argument("--model", action="append", help="only these; implies --print")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    args = parser.parse_args(argv)
    found = find_all(args.model or [name for name in models.names() if name != "wan-14b-8l"])
    if args.model or args.print:
        print("\n".join(_line(shape, used_by) for shape, used_by in found.items()))
        return 0
    for shape in reference_rows():
        found.setdefault(shape, {})
    write(found)
    row = {"case": "shapes.toml", "metric": "rows", "value": len(found), "unit": "rows"}
    results.append_figures("shapes", [row], results.environment(args.commit), args.results)
    print(f"{len(found)} rows written to {SHAPES}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
