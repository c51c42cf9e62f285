"""What a preset costs in quality on a trained model: tiny-wan at its largest size, against the same seeds in exact attention.

The quantised kernel is forced on every self-attention call, since at 4,356 tokens it may not be the faster one; what
"auto" dispatches to stands beside it ("... dispatched"). Three yardsticks on the same prompts: the noise floor (two exact
kernels of torch), a run with one step fewer, and how many of 64 held-out prompts are followed otherwise than before.

Needs a checkout: the prompts, and who reads the clips, are examples/train_tiny's.

    python -m videoattn.benchmarks.quality_tiny                    # four minutes on an H200
    python -m videoattn.benchmarks.quality_tiny --sheet outputs/balanced.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import videoattn
from videoattn.backend import backends
from videoattn.benchmarks import results
from videoattn.call import Call, Grid
from videoattn.policy import PRESETS, Decision
from videoattn.quality import VideoDifference, compare_videos
from videoattn.selection.arrangement import Tokens

if TYPE_CHECKING:
    from data import Size
    from diffusers import WanPipeline

EXAMPLES = results.HERE.parent / "examples"
sys.path.append(str(EXAMPLES / "train_tiny"))

MODEL = EXAMPLES / "models" / "tiny-wan"
PAIRED = 16  # prompts whose videos are compared
SHOWN = 6  # prompts on a contact sheet
IDENTICAL = 150.0  # dB, the greatest that fp32 frames can tell


def load(model: Path, device: torch.device) -> WanPipeline:
    """In bfloat16, on a CPU in fp32."""
    from diffusers import WanPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(str(model), dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: WanPipeline, size: Size, batch: int) -> Call:
    """The self-attention call of clips of a size."""
    grid = Grid(frames=1 + size.frames // 4, height=size.height // 16, width=size.width // 16)
    model = pipe.transformer
    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    sizes = {"q_len": grid.tokens, "kv_len": grid.tokens, "heads": heads, "kv_heads": heads, "head_dim": head_dim}
    weight = model.blocks[0].attn1.to_q.weight  # the model's own dtype may be that of a norm, kept in fp32
    where = {"dtype": weight.dtype, "device": weight.device, "tokens": Tokens(grid=grid)}
    return Call(kind="full", layout="BNHD", batch=batch, **sizes, **where)


def able(decision: Decision, call: Call) -> dict[str, str | None]:
    """The backends that are for a decision, and why one refuses the call all the same; None where it does not."""
    return {each.name: each.refuses(call, decision) for each in backends() if each.computes(decision)}


def forced(decision: Decision, call: Call) -> str:
    """The first of our kernels that computes a decision on this card."""
    own = {each.name for each in backends() if each.own}
    asked = {name: reason for name, reason in able(decision, call).items() if name in own}
    names = [name for name, reason in asked.items() if reason is None]
    if not names:
        raise ValueError(f"wanted a kernel of ours for {decision}, got {list(asked.values()) or 'none'}")
    return names[-1]  # the one for this architecture alone stands last


def compare(videos: np.ndarray, references: np.ndarray) -> list[VideoDifference]:
    """One by one, on all cores: SSIM takes seconds a clip."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compare_videos, videos, references))


def psnr(found: Sequence[VideoDifference]) -> tuple[float, float]:
    """dB, mean over the videos and the least."""
    values = [IDENTICAL if each.identical else each.psnr for each in found]
    return float(np.mean(values)), float(np.min(values))


def psnr_figures(case: str, found: Sequence[VideoDifference]) -> list[dict[str, object]]:
    mean, worst = psnr(found)
    return [
        {"case": case, "metric": "psnr_mean_db", "value": mean, "unit": "dB"},
        {"case": case, "metric": "psnr_worst_db", "value": worst, "unit": "dB"},
    ]


def save_sheet(
    path: Path, prompts: Sequence[str], above: tuple[str, np.ndarray], below: tuple[str, np.ndarray]
) -> None:
    """The first prompts, each with its clip of two runs (name, clips)."""
    from evaluate import contact_sheet

    shown = min(SHOWN, len(prompts), len(above[1]), len(below[1]))
    titles = [f"{name}: {prompt}" for prompt in prompts[:shown] for name, _ in (above, below)]
    pairs = np.stack([clips[i] for i in range(shown) for _, clips in (above, below)])
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(titles, pairs).save(path)


def main(argv: list[str] | None = None) -> int:
    from checker import read
    from data import LARGEST
    from evaluate import GUIDANCE, STEPS, generate
    from scenes import held_out_scenes

    parser = argparse.ArgumentParser(description="Quality of the presets on the trained model shipped here.")
    results.add_arguments(parser)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sheet", type=Path, help="a picture: exact above quantised, prompt by prompt")
    args = parser.parse_args(argv)

    pipe = load(args.model, torch.device("cuda"))
    scenes = held_out_scenes(args.prompts)
    prompts = [scene.caption() for scene in scenes]

    def clips(policy: str, backend: str = "auto", count: int = args.prompts, steps: int = STEPS) -> np.ndarray:
        videoattn.enable_fast_attention(pipe, policy, backend=backend)
        return generate(pipe, prompts[:count], LARGEST, steps=steps, guidance=GUIDANCE, batch=args.batch)

    def followed(made: np.ndarray) -> list[tuple[str, str, str]]:
        return [(seen.colour, seen.shape, seen.direction) for seen in map(read, made)]

    exact = clips("exact", "sdpa")
    balanced = PRESETS["balanced"].decision
    kernel = forced(balanced, call_of(pipe, LARGEST, args.batch))
    quantised = clips("balanced", kernel)
    share = videoattn.report(pipe).shares.get(str(balanced), 0.0)
    wanted = [(s.things[0].colour, s.things[0].shape, s.things[0].direction) for s in scenes]
    before, after = ([a == b for a, b in zip(followed(made), wanted, strict=True)] for made in (exact, quantised))
    runs = {
        "tiny-wan balanced": quantised,
        "tiny-wan balanced dispatched": clips("balanced", count=PAIRED),
        "tiny-wan noise floor": clips("exact", "sdpa_efficient", count=PAIRED),
        "tiny-wan one step fewer": clips("exact", "sdpa", count=PAIRED, steps=STEPS - 1),
    }
    figures = []
    for case, made in runs.items():
        figures += psnr_figures(case, compare(made[:PAIRED], exact[:PAIRED]))
    figures += [
        {"case": "tiny-wan balanced", "metric": "forced_share", "value": share, "unit": kernel},
        {
            "case": "tiny-wan balanced",
            "metric": "prompts_changed",
            "value": sum(a != b for a, b in zip(before, after, strict=True)),
            "unit": f"of {len(prompts)}, followed before or after alone",
        },
        {"case": "tiny-wan exact", "metric": "prompts_followed", "value": sum(before), "unit": "prompts"},
        {"case": "tiny-wan balanced", "metric": "prompts_followed", "value": sum(after), "unit": "prompts"},
    ]
    results.append_figures("quality", figures, results.environment(args.commit), args.results)
    for figure in figures:
        print(f"{figure['case']:30s} {figure['metric']:18s} {figure['value']:.4g} {figure['unit']}")
    if args.sheet is not None:
        save_sheet(args.sheet, prompts, ("exact", exact), ("quantised", quantised))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
