"""Every exact backend on every attention call of ``shapes.toml``, on that call's strides, against torch's own choice.

The baseline is what diffusers does: ``F.scaled_dot_product_attention`` with the mask as the model hands it over. A
backend gets what our processors hand it: prefix lengths in the place of a padding mask. So kernel "sdpa" against baseline
"sdpa" is the A/A control where there is no mask, and shows what the mask costs where there is one.

rel_l2 is taken on a sample of query rows (64 of a few batch rows, chosen anew for each check) against the package's fp64
oracle, all keys and all heads; rows of pure padding do not count. tflops counts 4 B H Nq Nk D; gbs counts q, k and v read
once and the output written once.

    python -m videoattn.benchmarks.attention                       # four minutes on an H200
    python -m videoattn.benchmarks.attention --only temporal --seconds 20
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from videoattn import guard
from videoattn.backend import Backend, backends
from videoattn.benchmarks import find_shapes, results, timing
from videoattn.benchmarks.find_shapes import Shape
from videoattn.call import Call
from videoattn.kernels.reference import attend
from videoattn.policy import EXACT, Decision, Dense, Precision

TOLERANCE = 1e-2  # relative L2 of an exact kernel in 16 bits: bf16 makes 3e-3, fp16 4e-4
TOLERANCES = {  # of quantised ones, which make 0.039, 0.011 and 0.03
    "exact": TOLERANCE,
    "int8_qk_fp8_pv": 0.06,
    "int8_qk_16bit_pv": 0.03,
    "int8_qk_int8_pv": 0.06,
}
MATH_SCORES = 2 * 2**30  # bytes of fp32 scores up to which sdpa_math is run
SAMPLE_ROWS = 64
SAMPLE_KEYS = 65536  # batch rows are sampled so that the sample has about as many keys


@dataclass(frozen=True)
class Problem:
    """One row of ``shapes.toml`` as tensors: what is given to the baseline and to the backends."""

    shape: Shape
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.shape.dtype)

    @property
    def has_kv_len(self) -> bool:
        """Our processors turn a padding mask into prefix lengths; text refiners keep the mask they have."""
        return self.shape.mask != "none" and self.shape.kind != "text"

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v [B, N, H, D] in the memory order of the row, the model's mask, and prefix lengths int32 [B]."""
        s, generator = self.shape, torch.Generator(self.device).manual_seed(seed)
        layouts = s.layout.split() if " " in s.layout else [s.layout] * 3
        pitches = dict(item.split(":") for item in s.strides.split()) if s.strides != "contiguous" else {}
        sizes = ((s.q_len, s.heads), (s.kv_len, s.kv_heads), (s.kv_len, s.kv_heads))
        q, k, v = (
            _strided(s.batch, *size, s.head_dim, layout, int(pitches.get(name, 0)), self.dtype, generator)
            for name, size, layout in zip("qkv", sizes, layouts, strict=True)
        )
        return q, k, v, self.mask, self.kv_len

    @functools.cached_property
    def mask(self) -> Tensor | None:
        s = self.shape
        if s.mask == "none":
            return None
        keep = torch.arange(s.kv_len, device=self.device) < s.kv_valid
        if s.mask == "bool":
            keep = keep & (torch.arange(s.q_len, device=self.device) < s.kv_valid)[:, None]
        keep = keep.expand(s.mask_shape).contiguous()
        return keep if s.mask != "additive" else torch.where(keep, 0.0, -10000.0).to(self.dtype)

    @functools.cached_property
    def kv_len(self) -> Tensor | None:
        s = self.shape
        return torch.full((s.batch,), s.kv_valid, dtype=torch.int32, device=self.device) if self.has_kv_len else None

    def call(self) -> Call:
        s = self.shape
        keeps_mask = s.mask != "none" and not self.has_kv_len
        return Call(
            kind=s.kind,
            layout="BNHD",
            batch=s.batch,
            q_len=s.q_len,
            kv_len=s.kv_len,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            dtype=self.dtype,
            device=self.device,
            mask="none" if not keeps_mask else "additive" if s.mask == "additive" else "bool",
            has_kv_len=self.has_kv_len,
            causal=s.causal,
        )

    def as_diffusers(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kv_len: Tensor | None) -> Tensor:
        """SDPA as the model calls it; [B, N, H, D] in and out."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        gqa = self.shape.heads != self.shape.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, self.shape.causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    def planned(self, backend: Backend, decision: Decision = EXACT) -> Callable[..., Tensor]:
        run = backend.plan(self.call(), decision, guard.flag())
        keeps_mask = not self.has_kv_len
        return lambda q, k, v, mask, kv_len: run(q, k, v, mask if keeps_mask else None, kv_len, None)

    def error(self, inputs: tuple, out: Tensor, baseline: Tensor, tolerance: float = TOLERANCE) -> float:
        """Relative L2 error of a sample of rows against the oracle. Raises WrongOutput beyond ``tolerance``."""
        s, (q, k, v, _, _) = self.shape, inputs
        if out.shape != (s.batch, s.q_len, s.heads, s.head_dim) or out.dtype != self.dtype:
            raise timing.WrongOutput(f"{s.name}: wanted the shape and dtype of q, got {tuple(out.shape)} {out.dtype}")
        count = s.kv_valid if s.mask == "bool" else s.q_len
        rows = torch.randperm(count, device=self.device)[:SAMPLE_ROWS]
        batch = torch.randperm(s.batch, device=self.device)[: max(1, SAMPLE_KEYS // s.kv_len)]
        kv_len = None if s.mask == "none" else torch.full((len(batch),), s.kv_valid, device=self.device)
        exact, _ = attend(q[batch][:, rows], k[batch], v[batch], kv_len=kv_len)
        error = float((out[batch][:, rows] - exact).norm() / exact.norm())
        if not (error <= tolerance and bool(out[:, :count].isfinite().all())):
            raise timing.WrongOutput(
                f"{s.name}: wanted a finite output within {tolerance} of fp64, got error {error:.2e}"
            )
        return error

    def affords(self, backend: Backend) -> bool:
        s = self.shape
        return backend.name != "sdpa_math" or 4 * s.batch * s.heads * s.q_len * s.kv_len <= MATH_SCORES


def _strided(batch, tokens, heads, dim, layout, pitch, dtype, generator) -> Tensor:
    """Random [B, N, H, D]: contiguous, head-major, or a slice of rows ``pitch`` elements wide (0: no slice)."""
    options = {"dtype": dtype, "device": generator.device, "generator": generator}
    if pitch:
        return torch.randn(batch, tokens, pitch, **options)[..., : heads * dim].unflatten(-1, (heads, dim))
    if layout == "BHND":
        return torch.randn(batch, heads, tokens, dim, **options).transpose(1, 2)
    return torch.randn(batch, tokens, heads, dim, **options)


def accepting(call: Call) -> list[Backend]:
    return [backend for backend in backends() if backend.refuses(call, EXACT) is None]


def quantising(call: Call) -> list[tuple[Backend, Dense]]:
    """Our kernels that quantise and take a call, each with what it computes."""
    decisions = [Dense(precision) for precision in get_args(Precision) if precision != "exact"]
    return [
        (backend, decision)
        for backend in backends()
        for decision in decisions
        if backend.computes(decision) and backend.refuses(call, decision) is None
    ]


def measure(
    problem: Problem, seconds: float, among: Iterable[Backend], decision: Dense = EXACT
) -> dict[str, timing.Comparison]:
    """Backend name -> its comparison with torch's own choice, for those of ``among`` that can be afforded."""
    candidates = {
        backend.name: problem.planned(backend, decision)
        for backend in among
        if problem.affords(backend)
        and (problem.has_kv_len or backend.name != "sdpa")  # without a mask that is the control
    }
    inputs = problem.inputs(0)
    for name, run in list(candidates.items()):
        try:
            run(*inputs)
        except RuntimeError as error:  # how torch's kernels say that they do not take a call
            del candidates[name]
            print(f"  {name} refuses {problem.shape.name}: {str(error).splitlines()[0]}")
    del inputs
    compared = timing.compare(
        problem.as_diffusers,
        candidates,
        problem.inputs,
        functools.partial(problem.error, tolerance=TOLERANCES[decision.precision]),
        device=problem.device,
        seconds=seconds,
        min_rounds=3,
    )
    control = compared.pop("control")
    return compared if problem.has_kv_len or decision != EXACT else {"sdpa": control, **compared}


def attempt(
    problem: Problem, seconds: float, among: Iterable[Backend], decision: Dense = EXACT
) -> dict[str, timing.Comparison] | timing.WrongOutput | torch.OutOfMemoryError:
    """`measure`, or why this row shows nothing. The GPU's memory is free for the next row."""
    try:
        return measure(problem, seconds, among, decision)
    except (timing.WrongOutput, torch.OutOfMemoryError) as error:
        return error.with_traceback(None)  # whose frames hold the tensors
    finally:
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()


def work(shape: Shape) -> int:
    """Floating-point operations of the two matrix products, masks not deducted."""
    return 4 * shape.batch * shape.heads * shape.q_len * shape.kv_len * shape.head_dim


def identity(case: str, shape: Shape) -> dict[str, str]:
    """The columns that tell one row of ``shapes.toml`` from another."""
    return {
        "case": case,
        "shape": f"{shape.batch}x{shape.heads}x{shape.q_len}x{shape.kv_len}x{shape.head_dim}",
        "dtype": shape.dtype,
        "layout": shape.layout if shape.strides == "contiguous" else f"{shape.layout} {shape.strides}",
    }


def row(case: str, shape: Shape, name: str, result: timing.Comparison) -> dict[str, object]:
    elements = shape.batch * shape.head_dim * (2 * shape.q_len * shape.heads + 2 * shape.kv_len * shape.kv_heads)
    return results.timing(
        result,
        **identity(case, shape),
        kernel=name,
        baseline="sdpa",
        tflops=work(shape) / result.median_ms / 1e9,
        gbs=elements * getattr(torch, shape.dtype).itemsize / result.median_ms / 1e6,
    )


def case_name(shape: Shape, used_by: dict[str, int]) -> str:
    """ "wan-1.3b 480x832x81 full": the first configuration that makes this call, and what kind of call it is."""
    return f"{next(iter(used_by), 'reference')} {shape.kind}"


def add_arguments(parser: argparse.ArgumentParser, *, max_gflop: float = math.inf) -> None:
    """Which rows of ``shapes.toml``."""
    parser.add_argument("--only", default="", help="only rows whose case or shape contains this")
    parser.add_argument(
        "--max-gflop", type=float, default=max_gflop, help="leave out calls with more work than this (%(default)s)"
    )


def rows(only: str = "", max_gflop: float = math.inf) -> list[tuple[str, Shape]]:
    """(case, shape) of rows of ``shapes.toml``, least work first: a run that is cut short loses the giants."""
    every = [(case_name(shape, used_by), shape) for shape, used_by in find_shapes.read().items()]
    chosen = [
        (case, shape) for case, shape in every if only in f"{case} {shape.name}" and work(shape) <= 1e9 * max_gflop
    ]
    if not chosen:
        raise ValueError(f"--only {only!r} --max-gflop {max_gflop}: no row of shapes.toml is left")
    return sorted(chosen, key=lambda item: work(item[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time every exact backend on every attention call of shapes.toml.")
    results.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="for the whole table; giant rows take what they need"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    chosen = rows(args.only, args.max_gflop)
    wrong = []
    for case, shape in chosen:
        print(f"{case} {shape.name}", flush=True)
        problem = Problem(shape, torch.device(args.device))
        compared = attempt(problem, args.seconds / len(chosen), accepting(problem.call()))
        if isinstance(compared, Exception):
            wrong.append(f"{case} {shape.name}: {compared}")
            continue
        best = min(compared.values(), key=lambda result: result.median_ms)
        lines = [row(case, shape, name, result) for name, result in compared.items()]
        results.append("attention", lines, env, args.results)
        for line, (name, result) in zip(lines, compared.items(), strict=True):
            results.append_samples("attention", line, result, args.samples)
            print(f"  {'*' if result is best else ' '} {name:14s} {result}", flush=True)
    print("\n".join(f"FAILED {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
