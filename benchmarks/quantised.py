"""Quantised attention, pre-pass included, against cuDNN and against SageAttention 1; and what it errs.

Times go to quantised.csv: for each precision the fastest of our kernels that compute it, on q, k, v as projections make
them, so that quantisation is part of the time. The case "chosen ..." is what preset balanced takes there, quantised or not.
SageAttention is the one that pip installs (1.0.6, Triton; kernel "sageattention"), where it is installed.

Errors go to quantised_error.csv: on normal inputs, on inputs with outlier channels, a large common offset of the keys, and
heavy tails (``testing.make_hard_qkv``), relative L2 over that of SageAttention 2's algorithm emulated on the same tensors
(kernels/quantised_reference.py); and the cosine of INT4 with and without smoothing, which is emulated too.

    python -m videoattn.benchmarks.quantised                       # two minutes on an H200
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from videoattn.backend import backends
from videoattn.benchmarks import attention, find_shapes, results, timing
from videoattn.kernels import quantised_reference
from videoattn.kernels.reference import attend
from videoattn.policy import PRESETS, Precision
from videoattn.quality import attention_error
from videoattn.testing import HardKind, make_hard_qkv
from videoattn.verify import select_verified

PRECISIONS: tuple[Precision, ...] = ("int8_qk_fp8_pv", "int8_qk_16bit_pv", "int8_qk_int8_pv")
CASES: dict[str, tuple[int, int, int, int]] = {  # batch, heads, tokens, head_dim
    "wan-1.3b 480p": (1, 12, 32760, 128),
    "aligned 32768": (1, 12, 32768, 128),
    "aligned 16384": (1, 12, 16384, 128),
    "cogvideox-5b": (2, 48, 17776, 64),
    "cogvideox-5b short": (2, 48, 8192, 64),
    "ltx": (1, 32, 4992, 64),
    "wan-14b 720p": (1, 40, 75600, 128),
}
CHOSEN = {"chosen 5k": "ltx"}
CUDNN, SAGE = "sdpa_cudnn", "sageattention"
HARD: tuple[HardKind, ...] = ("normal", "outlier channels", "common k offset", "heavy tails")
HARD_SIZE = (1, 4096, 4, 128)  # batch, tokens, heads, head_dim
SMOOTHED = {"none": (False, False), "k": (True, False), "q": (False, True), "both": (True, True)}  # smooth_k, smooth_q


def computing(problem: attention.Problem, precision: Precision) -> dict[str, Callable[..., Tensor]]:
    """Our kernels of a precision on a call, by backend name; quantisation included."""
    return {
        backend.name: problem.planned(backend, decision)
        for backend, decision in attention.quantising(problem.call())
        if decision.precision == precision
    }


def peer() -> Callable[..., Tensor] | None:
    """SageAttention as its package offers it, None where it is not installed."""
    try:
        from sageattention import sageattn
    except ModuleNotFoundError:
        return None
    return lambda q, k, v, mask, kv_len: sageattn(q, k, v, tensor_layout="NHD")


def measure(problem: attention.Problem, seconds: float) -> dict[tuple[str, str], timing.Comparison]:
    """(precision, baseline) -> the fastest of our kernels against it; (SAGE, CUDNN) as well."""
    cudnn = problem.planned(next(backend for backend in backends() if backend.name == CUDNN))
    sage = peer()

    def against(baseline, candidates: dict[str, Callable], limit: float) -> dict[str, timing.Comparison]:
        check = functools.partial(problem.error, tolerance=limit)
        options = {"device": problem.device, "seconds": seconds, "min_rounds": 3}
        compared = timing.compare(baseline, candidates, problem.inputs, check, **options)
        compared.pop("control")
        return compared

    found = {}
    for precision in PRECISIONS:
        candidates = computing(problem, precision)
        if not candidates:
            continue
        limit = attention.TOLERANCES[precision]
        compared = against(cudnn, candidates, limit)
        fastest = max(compared, key=lambda name: compared[name].ratio)
        found[precision, CUDNN] = compared[fastest]
        if sage is not None and precision == PRECISIONS[0]:
            found[precision, SAGE] = against(sage, {fastest: candidates[fastest]}, limit)[fastest]
    if sage is not None:
        found[SAGE, CUDNN] = against(cudnn, {SAGE: sage}, attention.TOLERANCES["int8_qk_16bit_pv"])[SAGE]
    return found


def chosen(problem: attention.Problem, seconds: float) -> tuple[str, timing.Comparison]:
    """What preset balanced takes on a call, and that against cuDNN."""
    choice = select_verified(problem.call(), PRESETS["balanced"].decision)
    run = problem.planned(choice.backend, choice.decision)
    cudnn = problem.planned(next(backend for backend in backends() if backend.name == CUDNN))
    check = functools.partial(problem.error, tolerance=attention.TOLERANCES[choice.decision.precision])
    options = {"device": problem.device, "seconds": seconds, "min_rounds": 5}
    compared = timing.compare(cudnn, {choice.backend.name: run}, problem.inputs, check, **options)
    return str(choice.decision), compared[choice.backend.name]


def errors(device: torch.device) -> list[dict[str, object]]:
    """The figures of quantised_error.csv."""
    figures: list[dict[str, object]] = []

    def add(case: str, metric: str, value: float, unit: str) -> None:
        figures.append({"case": case, "metric": metric, "value": value, "unit": unit})

    batch, tokens, heads, head_dim = HARD_SIZE
    shape = find_shapes.square("full", batch, heads, tokens, head_dim, "bfloat16")
    problem = attention.Problem(shape, device)
    for kind in HARD:
        q, k, v = make_hard_qkv(kind, *HARD_SIZE, dtype=torch.bfloat16, device=device)
        exact, _ = attend(q, k, v)
        sage2 = attention_error(quantised_reference.sage2(q, k, v)[0], exact)
        add(kind, "rel_l2 sage2 emulated", sage2.rel_l2, "relative L2")
        for precision in PRECISIONS:
            for name, run in computing(problem, precision).items():
                found = attention_error(run(q, k, v, None, None), exact)
                add(kind, f"rel_l2 {precision} {name}", found.rel_l2, "relative L2")
                if precision == "int8_qk_fp8_pv":
                    add(kind, "error_ratio", found.rel_l2 / sage2.rel_l2, "ours/SageAttention 2 emulated")
    q, k, v = make_hard_qkv("biased channels", *HARD_SIZE, device=device)
    exact, _ = attend(q, k, v)
    for smoothed, (smooth_k, smooth_q) in SMOOTHED.items():
        out, _ = quantised_reference.attend(q, k, v, precision="int4_qk_fp8_pv", smooth_k=smooth_k, smooth_q=smooth_q)
        cosine = torch.cosine_similarity(out.double().flatten(), exact.flatten(), dim=0)
        case = f"int4 {smoothed} smoothing{'s' if smoothed == 'both' else ''}"
        add(case, "cosine", float(cosine), "all elements together")
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time quantised attention against cuDNN and SageAttention 1.")
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.5, help="a pair of kernels; long ones take what they need")
    parser.add_argument("--only", default="", help='only cases whose name contains this; "errors" for those')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env, device = results.environment(args.commit), torch.device(args.device)
    cases = [case for case in (*CASES, *CHOSEN, "errors") if args.only in case]
    if not cases:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {[*CASES, *CHOSEN, 'errors']}")
    wrong = []
    for case in cases:
        if case == "errors":
            figures = errors(device)
            results.append_figures("quantised_error", figures, env, args.results)
            for figure in figures:
                print(f"{figure['case']:20s} {figure['metric']:40s} {figure['value']:.5f}", flush=True)
            continue
        batch, heads, tokens, head_dim = CASES[CHOSEN.get(case, case)]
        problem = attention.Problem(find_shapes.square("full", batch, heads, tokens, head_dim, "bfloat16"), device)
        try:
            if case in CHOSEN:
                kernel, result = chosen(problem, args.seconds)
                found = {(kernel, CUDNN): result}
            else:
                found = measure(problem, args.seconds)
        except (timing.WrongOutput, torch.OutOfMemoryError) as error:
            wrong.append(f"{case}: {error}")
            continue
        for (kernel, baseline), result in found.items():
            line = attention.row(case, problem.shape, kernel, result) | {"baseline": baseline}
            results.append("quantised", [line], env, args.results)
            results.append_samples("quantised", line, result, args.samples)
            print(f"{case:20s} {problem.shape.name:24s} {kernel} / {baseline}: {result}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(f"FAILED {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
