"""Attention that leaves key blocks out: how much of the saving the kernels keep, what selecting costs, and both together.

efficiency  time of the dense kernel x density / time along lists of that density; random lists, which are the worst to L2
selection   time of a selector alone, from quantised operands to lists, over that of dense cuDNN attention
attention   quantisation, selection and kernel against dense cuDNN attention, as a plan runs them, with and without the
            pooled remainder
presets     what "fast" runs on the self-attention rows of shapes.toml, against what "balanced" runs; also where these are
            shorter than what a video needs for "fast" to leave anything out

Tokens lie in the selector's order, as a denoiser's do (pipelines/token_order.py). Figures go to sparse.csv.

    python -m videoattn.benchmarks.sparse                          # two minutes on an H200
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from videoattn import guard
from videoattn.backend import backends
from videoattn.benchmarks import attention, find_shapes, results, timing
from videoattn.call import Call, Grid
from videoattn.kernels import flash_hopper, quantised_hopper, quantised_sparse_backend
from videoattn.kernels.quantise import quantise
from videoattn.kernels.reference import attend
from videoattn.policy import PRESETS, Sparse
from videoattn.selection.arrangement import Tokens
from videoattn.selection.block_list import BlockList
from videoattn.selection.pooled import Pooled
from videoattn.selection.radial import Radial
from videoattn.selection.selector import Selector
from videoattn.selection.xattention import XAttention
from videoattn.verify import fault, select_verified

CASES = {  # batch, heads, grid, head_dim
    "wan-1.3b 480p": (1, 12, Grid(frames=21, height=30, width=52), 128),
    "wan-14b 720p": (1, 40, Grid(frames=21, height=45, width=80), 128),
    "cogvideox-5b": (1, 48, Grid(frames=13, height=30, width=45), 64),
}
DENSITIES = (0.1, 0.2, 0.35, 0.6)
DENSITY = 0.35  # of whole attention
SELECTORS: dict[str, Selector] = {
    "pooled": Pooled(density=DENSITY),
    "pooled tau": Pooled(tau=0.5),
    "xattention s16": XAttention(stride=16, density=DENSITY, order="morton"),
    "xattention s8": XAttention(stride=8, density=DENSITY, order="morton"),
}
TOLERANCES = {"exact": 1e-2, "fp8": 0.08, "16bit": 0.04}  # relative L2 on random lists of few keys
ROWS = 64
TEXT_TOKENS = {"wan": 0, "ltx": 0, "hunyuan": 256, "hunyuan15": 1985, "cogvideox": 226}  # of families with known grids


def problem_of(case: str, device: torch.device) -> attention.Problem:
    batch, heads, grid, head_dim = CASES[case]
    return attention.Problem(find_shapes.square("full", batch, heads, grid.tokens, head_dim, "bfloat16"), device)


def call_of(case: str, device: torch.device, selector: Selector) -> Call:
    """A call whose tokens lie as the selector wants them."""
    tokens = Tokens(grid=CASES[case][2])
    return replace(problem_of(case, device).call(), tokens=tokens, order=selector.order)


def random_lists(call: Call, block_q: int, block_k: int, density: float) -> BlockList:
    """As many key blocks for every query block, its own among them."""
    nq, nk = -(-call.q_len // block_q), -(-call.kv_len // block_k)
    generator = torch.Generator(call.device).manual_seed(0)
    score = torch.rand(call.batch, call.heads, nq, nk, generator=generator, device=call.device)
    own = (torch.arange(nq, device=call.device) * block_q // block_k)[:, None].expand(*score.shape[:3], 1)
    best = score.scatter(-1, own, 2.0).topk(max(1, round(density * nk)), dim=-1).indices
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    live = torch.full((nk,), block_k, dtype=torch.int32, device=call.device)
    live[-1] = call.kv_len - (nk - 1) * block_k
    return BlockList.of(keep, live, block_q, block_k)


def check_of(tolerance: float) -> timing.Check:
    """The error of some rows of one head against the oracle on the keys of their lists; of an output and its lists."""

    def check(inputs: timing.Inputs, output: tuple[Tensor, BlockList | None], _baseline: object) -> float:
        (q, k, v), (out, lists) = inputs[:3], output
        rows = torch.randperm(q.shape[1], device=q.device)[:ROWS]
        mask = None
        if lists is not None:
            mask = lists.keep[:1, -1:, rows // lists.block_q].repeat_interleave(lists.block_k, -1)[..., : k.shape[1]]
        exact, _ = attend(q[:1, rows, -1:], k[:1, :, -1:], v[:1, :, -1:], mask=mask)
        error = float((out[:1, rows, -1:] - exact).norm() / exact.norm())
        if not error <= tolerance:
            raise timing.WrongOutput(f"wanted the oracle within {tolerance}, got {error:.2e}")
        return error

    return check


def check_finite(inputs: timing.Inputs, out: Tensor, _baseline: object) -> float:
    """Of an output along lists that a selector made on its way; the kernel is held against the oracle before (`fault`)."""
    if out.shape != inputs[0].shape or not out.isfinite().all():
        raise timing.WrongOutput(f"wanted a finite output {tuple(inputs[0].shape)}, got {tuple(out.shape)}")
    return 0.0


def kernels(head_dim: int) -> Iterator[tuple[str, tuple[int, int], Callable[..., Tensor]]]:
    """(name, queries and keys of a block, (q, k, v, x, lists) -> out) of what runs on this card."""
    built = flash_hopper.config(head_dim)

    def exact(q, k, v, x, lists):
        return flash_hopper.attend(q, k, v, lists=lists)[0], lists

    yield "exact", (64 * built.GROUPS, built.N), exact
    for pv in ("fp8", "16bit"):

        def quantised(q, k, v, x, lists, pv=pv):
            return quantised_hopper.attend_quantised(x[pv], head_dim=head_dim, dtype=q.dtype, lists=lists)[0], lists

        yield pv, (64 * quantised_hopper.config(head_dim, pv).GROUPS, 128), quantised


def efficiency(case: str, device: torch.device, seconds: float) -> Iterator[dict[str, object]]:
    problem = problem_of(case, device)

    def inputs(seed: int) -> timing.Inputs:
        q, k, v, _, _ = problem.inputs(seed)
        return q, k, v, {pv: quantise(q, k, v, pv=pv) for pv in ("fp8", "16bit")}

    for name, blocks, run in kernels(CASES[case][3]):
        for density in DENSITIES:
            lists = random_lists(problem.call(), *blocks, density)
            compared = timing.compare(
                lambda *x, run=run: run(*x, None),
                {name: lambda *x, run=run, lists=lists: run(*x, lists)},
                inputs,
                check_of(TOLERANCES[name]),
                device=device,
                seconds=seconds,
                min_rounds=3,
            )[name]
            share = lists.density.item()
            yield {
                "case": case,
                "metric": f"efficiency {name} {density}",
                "value": compared.ratio * share,
                "unit": "dense time x density / time",
            }
            yield {"case": case, "metric": f"ms {name} {density}", "value": compared.median_ms, "unit": "ms"}


def plan_of(
    call: Call, selector: Selector, *, remainder: bool = False
) -> tuple[quantised_sparse_backend.QuantisedSparseBackend, Sparse]:
    decision = Sparse(selector, PRESETS["balanced"].decision.precision, remainder=remainder)
    found = [each for each in backends() if each.own and each.computes(decision) and not each.refuses(call, decision)]
    return found[-1], decision  # the one for this architecture alone stands last


def selection(case: str, device: torch.device, seconds: float) -> Iterator[dict[str, object]]:
    problem = problem_of(case, device)
    cudnn = problem.planned(next(each for each in backends() if each.name == "sdpa_cudnn"))

    def inputs(seed: int) -> timing.Inputs:
        q, k, v, _, _ = problem.inputs(seed)
        return q, k, v, quantise(q, k, v, pv="fp8")

    def check(inputs, out, baseline) -> float:
        if isinstance(out, BlockList) and not (out.counts.min() > 0 and out.density <= 1):
            raise timing.WrongOutput("wanted a block for every query")
        return 0.0

    candidates = {}
    for name, selector in SELECTORS.items():
        call = call_of(case, device, selector)
        backend, decision = plan_of(call, selector)
        chosen = backend.selection(call, decision)
        candidates[name] = lambda q, k, v, x, chosen=chosen, call=call: quantised_sparse_backend.select(
            chosen, x, call, None
        )
    compared = timing.compare(
        lambda q, k, v, x: cudnn(q, k, v, None, None),
        candidates,
        inputs,
        check,
        device=device,
        seconds=seconds,
        min_rounds=3,
    )
    for name in candidates:
        yield {
            "case": case,
            "metric": f"selection {name}",
            "value": 1 / compared[name].ratio,
            "unit": "of dense cuDNN time",
        }
        yield {"case": case, "metric": f"selection ms {name}", "value": compared[name].median_ms, "unit": "ms"}


def whole(case: str, device: torch.device, seconds: float) -> Iterator[dict[str, object]]:
    """Random q and k: which blocks are kept says nothing, how many does.

    Raises:
        WrongOutput: a kernel that is wrong on random lists, or an output that is not finite.
    """
    problem = problem_of(case, device)
    cudnn = problem.planned(next(each for each in backends() if each.name == "sdpa_cudnn"))
    selectors = {"pooled": SELECTORS["pooled"], "xattention s16": SELECTORS["xattention s16"], "radial": Radial()}
    candidates, density = {}, {}
    for (selected, selector), remainder in itertools.product(selectors.items(), (False, True)):
        name = f"{selected} remainder" if remainder else selected
        call = call_of(case, device, selector)
        backend, decision = plan_of(call, selector, remainder=remainder)
        wrong = fault(backend, call, decision)
        if wrong is not None:
            raise timing.WrongOutput(f"{backend.name}: {wrong}")
        run = backend.plan(call, decision)
        density[name] = backend.expected_density(call, decision)
        candidates[name] = lambda q, k, v, mask, kv_len, run=run: run(q, k, v, None, None, None)
    compared = timing.compare(
        cudnn,
        candidates,
        problem.inputs,
        check_finite,
        device=device,
        seconds=seconds,
        min_rounds=3,
    )
    for name in candidates:
        yield {
            "case": case,
            "metric": f"attention {name} {density[name]:.2f}",
            "value": compared[name].ratio,
            "unit": "cuDNN/ours",
        }


def presets(device: torch.device, seconds: float) -> Iterator[tuple[str, str, timing.Comparison | None]]:
    """(case, what "fast" computes, its comparison with "balanced", None where both run the same)."""
    fast, balanced = (PRESETS[name].decision for name in ("fast", "balanced"))
    for case, shape in attention.rows():
        family = case.split()[0].split("-")[0]
        if shape.kind not in ("full", "joint") or family not in TEXT_TOKENS:
            continue
        problem = attention.Problem(shape, device)
        video = shape.q_len - TEXT_TOKENS[family]
        tokens = Tokens(grid=Grid(frames=video, height=1, width=1), after=shape.q_len - video)
        sparse = replace(problem.call(), tokens=tokens, order=fast.selector.order)
        choice, dense = select_verified(sparse, fast), select_verified(problem.call(), balanced)
        if choice.backend is dense.backend:
            yield case, str(choice.decision), None
            continue
        run = choice.backend.plan(sparse, choice.decision, guard.flag())
        compared = timing.compare(
            problem.planned(dense.backend, dense.decision),
            {"fast": lambda q, k, v, mask, kv_len, run=run: run(q, k, v, None, kv_len, None)},
            problem.inputs,
            check_finite,
            device=device,
            seconds=seconds,
            min_rounds=3,
        )
        yield case, str(choice.decision), compared["fast"]
        if device.type == "cuda":
            torch.cuda.empty_cache()


PARTS = {"efficiency": efficiency, "selection": selection, "attention": whole}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="a pair of kernels")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--part", choices=(*PARTS, "presets"), help="one of them (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env, device = results.environment(args.commit), torch.device(args.device)
    cases = [case for case in CASES if args.only in case]
    if not cases:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {[*CASES]}")
    wrong = []
    for part, measure in PARTS.items():
        for case in cases if args.part in (None, part) else ():
            try:
                for figure in measure(case, device, args.seconds):
                    results.append_figures("sparse", [figure], env, args.results)
                    print(
                        f"{figure['case']:16s} {figure['metric']:28s} {figure['value']:.4g} {figure['unit']}",
                        flush=True,
                    )
            except (timing.WrongOutput, torch.OutOfMemoryError) as error:
                wrong.append(f"{case} {part}: {error}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.part in (None, "presets"):
        for case, computed, result in presets(device, args.seconds):
            print(f"{case:32s} {computed:40s} {result or 'the same call'}", flush=True)
            verdict = timing.NOT_SHOWN if result is None else result.verdict
            figures = [
                {
                    "case": case,
                    "metric": "fast/balanced",
                    "value": 1.0 if result is None else result.ratio,
                    "unit": computed,
                },
                {
                    "case": case,
                    "metric": "fast slower than balanced",
                    "value": int(verdict == timing.SLOWER),
                    "unit": verdict,
                },
            ]
            results.append_figures("sparse", figures, env, args.results)
    print("\n".join(f"FAILED {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
