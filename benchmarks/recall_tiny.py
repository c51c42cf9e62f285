"""How much of the exact softmax mass each selector keeps at what density, on q and k of the trained model, layer by layer.

tiny-wan at its largest size (9 x 22 x 22 tokens) generates in exact attention; in some steps every self-attention call is
looked at: a selector's blocks, with what is required (the diagonal, the first frame), and the share of the softmax mass of
some queries that lies in them. "random" is the control: what a block mask keeps without looking, in the order of the
selector that it stands beside; what is required differs with the order, so rows compare by the density that they came to.

Blocks are of 64 tokens, for 69 of them: with 128 there would be 35. Runs without a GPU.

Needs a checkout: the prompts are examples/train_tiny's.

    python -m videoattn.benchmarks.recall_tiny                     # ten minutes on two cores
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import videoattn
from videoattn import runner
from videoattn.benchmarks import results
from videoattn.call import Grid
from videoattn.selection.arrangement import ORDERS, Tokens, arrange
from videoattn.selection.bands import Bands
from videoattn.selection.pooled import Pooled
from videoattn.selection.radial import Radial
from videoattn.selection.random import Random
from videoattn.selection.recall import recall
from videoattn.selection.selector import Selector, select
from videoattn.selection.sharded import Sharded
from videoattn.selection.sliding_tiles import SlidingTiles
from videoattn.selection.xattention import XAttention
from videoattn.session import Session

EXAMPLES = results.HERE.parent / "examples"
sys.path.append(str(EXAMPLES / "train_tiny"))

BLOCK = 64
ROWS = 256  # queries a call
DENSITIES = (0.1, 0.2, 0.35, 0.5)
SELECTORS: dict[str, Selector] = {
    **{f"random {order} {each}": Random(density=each, order=order) for order in ORDERS for each in DENSITIES},
    **{f"pooled {each}": Pooled(density=each) for each in DENSITIES},
    **{f"pooled raster {each}": Pooled(density=each, order="raster") for each in DENSITIES},
    **{f"xattention {each}": XAttention(stride=8, density=each) for each in DENSITIES},
    **{f"xattention morton {each}": XAttention(stride=8, density=each, order="morton") for each in DENSITIES},
    **{f"bands {each}": Bands(density=each) for each in DENSITIES},
    **{
        f"sliding_tiles {'x'.join(map(str, each))}": SlidingTiles(windows=(each,))
        for each in ((3, 12, 12), (9, 12, 12), (9, 18, 18))
    },
    **{f"radial {each}": Radial(decay_factor=each) for each in (0.25, 0.5, 1.0)},
    **{f"sharded {each}": Sharded(shards=each) for each in (2,)},
}


def judge(selector: Selector, grid: Grid, q: Tensor, k: Tensor) -> tuple[float, float]:
    """(density, recall) of a selector on a call, q and k [B, N, H, D] in the model's own order; over rows and heads."""
    arrangement = arrange(Tokens(grid=grid), selector.order, q.device, block_q=BLOCK, block_k=BLOCK)
    q, k = arrangement.arranged(q), arrangement.arranged(k)
    looked = (q, k) if selector.dynamic else (None, None)
    lists = select(selector, arrangement, q.shape[2], *looked)
    return lists.density.item(), recall(q, k, lists.keep, arrangement, rows=ROWS).mean().item()


@contextmanager
def watching(session: Session, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """`see(site, q, k)` for every self-attention call of a session."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    def observe(plan: runner.Plan, q: Tensor, k: Tensor, *rest: object) -> None:
        if running and plan.call.layout == "BNHD":
            see(running[-1], q, k)

    handles = []
    for patch in session.patches:
        if patch.site.kind == "full":
            handles.append(patch.attn.register_forward_pre_hook(enter(patch.site.name)))
            handles.append(patch.attn.register_forward_hook(leave, always_call=True))
    runner.observers.append(observe)
    try:
        yield
    finally:
        runner.observers.remove(observe)
        for handle in handles:
            handle.remove()


def main(argv: list[str] | None = None) -> int:
    from data import LARGEST
    from diffusers import WanPipeline
    from evaluate import GUIDANCE, STEPS, generate
    from scenes import held_out_scenes

    parser = argparse.ArgumentParser(description="Recall of the selectors on the trained model shipped here.")
    results.add_arguments(parser)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "models" / "tiny-wan")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 12, 20], help=f"looked at, of {STEPS}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not set(args.steps) <= set(range(STEPS)):
        parser.error(f"--steps: wanted some of 0 to {STEPS - 1}, got {args.steps}")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a CPU is slow in 16 bits
    pipe = WanPipeline.from_pretrained(str(args.model), dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [scene.caption() for scene in held_out_scenes(args.prompts)]
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    with videoattn.fast_attention(pipe, "exact") as (session,):

        def see(site: str, q: Tensor, k: Tensor) -> None:
            if session.step.index in args.steps:
                for name, selector in SELECTORS.items():
                    figures = judge(selector, session.step.grid, q, k)
                    found.setdefault((name, site, session.step.index), []).append(figures)

        with watching(session, see):
            generate(pipe, prompts, LARGEST, steps=STEPS, guidance=GUIDANCE, batch=1)
    figures = []
    for (name, site, step), of_calls in found.items():
        for metric, values in zip(("density", "recall"), zip(*of_calls, strict=True), strict=True):
            mean = sum(values) / len(values)
            figures.append({"case": name, "metric": f"{metric} {site} step {step}", "value": mean, "unit": "share"})
    results.append_figures("recall", figures, results.environment(args.commit), args.results)
    print(f"{'selector':28s} density  recall   worst layer and step")
    for name in SELECTORS:
        density, kept = (
            [f["value"] for f in figures if f["case"] == name and f["metric"].startswith(what)]
            for what in ("density", "recall")
        )
        print(f"{name:28s} {sum(density) / len(density):7.3f} {sum(kept) / len(kept):7.3f} {min(kept):7.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
