"""What stands between the projections and attention, in one pass of ours: against the host's own operations, and a copy.

The baseline "eager" is the prologue in torch: norm of q and k, rotation and layout as diffusers runs them, on the host's
norms and tables of the family's shapes. Kernel "prepare" does the same in 16 bits, for exact attention; "quantise" goes on
to the operands of INT8/FP8 attention, which the baseline does not make. Against "copy", a copy of as many bytes as the
pass must move (inputs read once, outputs written once), ratio is the share of the copy bandwidth.

    python -m videoattn.benchmarks.prologue                        # a minute on an H200
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from videoattn.benchmarks import results, timing
from videoattn.kernels import prepare
from videoattn.kernels.quantise import quantise_streams
from videoattn.kernels.triton_backend import LOG2_E
from videoattn.pipelines import cogvideox, hunyuan_video, ltx, wan
from videoattn.prologue import Prologue, Rope, Stream

TOLERANCE = {"prepare": 1e-2, "quantise": 2e-2}  # relative L2 of q: two roundings of bf16; INT8 makes 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family's projections.

    Args:
        prologue: of its processor; norm: makes one of its norms from its width. tables: (tokens turned, heads, head_dim,
            device) -> cos and sin.
        batch, tokens, heads, head_dim: sizes; text: tokens that are not turned, a stream of their own if `two_streams`.
    """

    prologue: Prologue
    norm: Callable[[int], nn.Module]
    tables: Callable[[int, int, int, torch.device], Rope]
    batch: int
    tokens: int
    heads: int
    head_dim: int
    text: int = 0
    two_streams: bool = False

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens + self.text}x{self.head_dim}"


def _angles(tokens: int, count: int, device: torch.device) -> Tensor:
    return torch.rand(tokens, count, device=device, generator=torch.Generator(device).manual_seed(0)) * 100


def _halves(tokens: int, heads: int, head_dim: int, device: torch.device) -> Rope:
    """As Wan's processor takes them: every second of [1, N, 1, D]."""
    both = _angles(tokens, head_dim // 2, device).repeat_interleave(2, -1)[None, :, None]
    return both.cos()[..., 0::2], both.sin()[..., 1::2]


def _repeated(tokens: int, heads: int, head_dim: int, device: torch.device) -> Rope:
    both = _angles(tokens, head_dim // 2, device).repeat_interleave(2, -1)
    return both.cos(), both.sin()


def _across(tokens: int, heads: int, head_dim: int, device: torch.device) -> Rope:
    both = _angles(tokens, heads * head_dim // 2, device).repeat_interleave(2, -1)[None]
    return both.cos(), both.sin()


_WAN = {"prologue": wan.WanProcessor.prologue, "norm": lambda c: nn.RMSNorm(c, 1e-6), "tables": _halves}
CASES = {
    "wan-1.3b 480x832x81": Case(**_WAN, batch=1, tokens=32760, heads=12, head_dim=128),
    "wan-14b 720x1280x81": Case(**_WAN, batch=1, tokens=75600, heads=40, head_dim=128),
    "ltx 512x704x161": Case(
        prologue=ltx.LTXProcessor.prologue,
        norm=lambda c: nn.RMSNorm(c, 1e-5),
        tables=_across,
        batch=2,
        tokens=7392,
        heads=32,
        head_dim=64,
    ),
    "cogvideox-5b 480x720x49": Case(
        prologue=cogvideox.CogVideoXProcessor.prologue,
        norm=lambda c: nn.LayerNorm(c, 1e-6),
        tables=_repeated,
        batch=2,
        tokens=17550,
        heads=48,
        head_dim=64,
        text=226,
    ),
    "hunyuan 720x1280x129": Case(
        prologue=hunyuan_video.JointProcessor.prologue,
        norm=lambda c: RMSNorm(c, 1e-6),
        tables=_repeated,
        batch=1,
        tokens=118800,
        heads=24,
        head_dim=128,
        text=256,
        two_streams=True,
    ),
}


@torch.no_grad()
def measure(case: Case, device: torch.device, seconds: float) -> dict[tuple[str, str], timing.Comparison]:
    """(kernel, baseline) -> its comparison, for both kernels against eager and against a copy."""
    dtype, width = torch.bfloat16, case.heads * case.head_dim
    across = case.prologue.norm == "across_heads"
    norms = [case.norm(width if across else case.head_dim).to(device, dtype).requires_grad_(False) for _ in range(4)]
    for norm in norms:
        norm.weight.normal_(1.0, 0.1)
    rope = case.tables(case.tokens, case.heads, case.head_dim, device)

    def inputs(seed: int) -> timing.Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        counts = (case.tokens, case.text) if case.two_streams else (case.tokens + case.text,)
        return tuple(
            torch.randn(case.batch, count, width, device=device, dtype=dtype, generator=generator)
            for count in counts
            for _ in "qkv"
        )

    def streams(given: tuple[Tensor, ...]) -> list[Stream]:
        span = slice(case.text, None) if case.text and not case.two_streams else None
        made = [Stream(*given[:3], *norms[:2], rope, span)]
        return made + ([Stream(*given[3:], *norms[2:])] if case.two_streams else [])

    def eager(*given: Tensor) -> tuple[Tensor, ...]:
        return case.prologue(case.heads, *streams(given))

    def prepared(*given: Tensor) -> tuple[Tensor, ...]:
        return prepare.prepare(case.prologue, case.heads, *streams(given))

    def quantised(*given: Tensor) -> tuple[Tensor, ...]:
        return quantise_streams(case.prologue, case.heads, *streams(given), pv="fp8")

    def check(kernel: str) -> timing.Check:
        def error(given: timing.Inputs, out: tuple, baseline: object) -> float:
            if isinstance(out, Tensor):
                return 0.0  # a copy
            q = eager(*given)[0].float()
            if len(out) == 3:
                found = out[0].float()
            else:
                scale = case.head_dim**-0.5 * LOG2_E
                found = (out.q[..., : case.head_dim] * out.q_scale[..., None]).transpose(1, 2) / scale
            rel_l2 = float((found - q).norm() / q.norm())
            if not rel_l2 <= TOLERANCE[kernel]:
                raise timing.WrongOutput(f"{kernel}: wanted q within {TOLERANCE[kernel]} of eager, got {rel_l2:.2e}")
            return rel_l2

        return error

    elements = case.batch * (case.tokens + case.text) * width
    joined = 1 if case.two_streams else 0
    moved = {"prepare": elements * 2 * (4 + 2 * joined), "quantise": elements * (3 * 2 + 3)}
    options = {"device": device, "seconds": seconds, "min_rounds": 5}
    found = {}
    for kernel, run in (("prepare", prepared), ("quantise", quantised)):
        source = torch.zeros(moved[kernel] // 4, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        for baseline, call in (("eager", eager), ("copy", lambda *given: target.copy_(source))):  # noqa: B023
            found[kernel, baseline] = timing.compare(call, {kernel: run}, inputs, check(kernel), **options)[kernel]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the pass before attention against diffusers' own operations.")
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="a pair")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    args = parser.parse_args(argv)
    env, device = results.environment(args.commit), torch.device("cuda")
    chosen = {name: case for name, case in CASES.items() if args.only in name}
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(CASES)}")
    wrong = []
    for name, case in chosen.items():
        try:
            found = measure(case, device, args.seconds)
        except (timing.WrongOutput, torch.OutOfMemoryError) as error:
            wrong.append(f"{name}: {error}")
            continue
        for (kernel, baseline), result in found.items():
            row = results.timing(
                result, case=name, shape=case.shape, dtype="bfloat16", kernel=kernel, baseline=baseline
            )
            results.append("prologue", [row], env, args.results)
            results.append_samples("prologue", row, result, args.samples)
            print(f"{name:26s} {baseline:6s} {result}", flush=True)
        torch.cuda.empty_cache()
    print("\n".join(f"FAILED {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
