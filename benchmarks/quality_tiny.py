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
from pathlib import Path

import numpy as np
import torch

import videoattn
from videoattn.backend import backends
from videoattn.benchmarks import results
from videoattn.call import Call
from videoattn.policy import PRESETS
from videoattn.quality import compare_videos

EXAMPLES = results.HERE.parent / "examples"
sys.path.append(str(EXAMPLES / "train_tiny"))

PAIRED = 16  # prompts whose videos are compared


def forced(head_dim: int, device: torch.device) -> str:
    """The first of our kernels that computes what "balanced" asks for on this card."""
    decision = PRESETS["balanced"].decision
    sizes = {"batch": 2, "q_len": 4356, "kv_len": 4356, "heads": 2, "kv_heads": 2, "head_dim": head_dim}
    call = Call(kind="full", layout="BNHD", dtype=torch.bfloat16, device=device, **sizes)
    able = [each for each in backends() if each.own and each.computes(decision)]
    names = [each.name for each in able if each.refuses(call, decision) is None]
    if not names:
        raise ValueError(
            f"wanted a kernel of ours for {decision}, got {[each.refuses(call, decision) for each in able] or 'none'}"
        )
    return names[-1]  # the one for this architecture alone stands last


def psnr(videos: np.ndarray, references: np.ndarray) -> tuple[float, float]:
    """dB, mean over the videos and the least; of two that are identical, the greatest that fp32 frames can tell."""
    values = [
        150.0 if (found := compare_videos(a, b)).identical else found.psnr
        for a, b in zip(videos, references, strict=True)
    ]
    return float(np.mean(values)), float(np.min(values))


def main(argv: list[str] | None = None) -> int:
    from checker import read
    from data import LARGEST
    from evaluate import GUIDANCE, STEPS, contact_sheet, generate
    from scenes import held_out_scenes

    parser = argparse.ArgumentParser(description="Quality of the presets on the trained model shipped here.")
    results.add_arguments(parser)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "models" / "tiny-wan")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sheet", type=Path, help="a picture: exact above quantised, prompt by prompt")
    args = parser.parse_args(argv)
    from diffusers import WanPipeline

    device = torch.device("cuda")
    pipe = WanPipeline.from_pretrained(str(args.model), dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts)
    prompts = [scene.caption() for scene in scenes]

    def clips(policy: str, backend: str = "auto", count: int = args.prompts, steps: int = STEPS) -> np.ndarray:
        videoattn.enable_fast_attention(pipe, policy, backend=backend)
        return generate(pipe, prompts[:count], LARGEST, steps=steps, guidance=GUIDANCE, batch=args.batch)

    def followed(made: np.ndarray) -> list[tuple[str, str, str]]:
        return [(seen.colour, seen.shape, seen.direction) for seen in map(read, made)]

    exact = clips("exact", "sdpa")
    kernel = forced(pipe.transformer.config.attention_head_dim, device)
    quantised = clips("balanced", kernel)
    share = videoattn.report(pipe).shares.get(str(PRESETS["balanced"].decision), 0.0)
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
        mean, worst = psnr(made[:PAIRED], exact[:PAIRED])
        figures += [
            {"case": case, "metric": "psnr_mean_db", "value": mean, "unit": "dB"},
            {"case": case, "metric": "psnr_worst_db", "value": worst, "unit": "dB"},
        ]
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
        shown = [name for prompt in prompts[:6] for name in (f"exact: {prompt}", f"quantised: {prompt}")]
        pairs = np.stack([made[i] for i in range(6) for made in (exact, quantised)])
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(shown, pairs).save(args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
