"""Host time that ``enable_fast_attention`` adds to an attention call: no sync, the same weights on both sides.

Denoisers of the real families, so thin and on so small a video that the device is never the bottleneck. What is timed
is the attention modules alone: one forward of the unpatched denoiser records what it calls them with, and from then on
a forward of either denoiser, patched or not, replays these calls and does nothing else. The denoiser is still called as
a pipeline calls it, so our pre-hook on it is part of the figure. A forward is timed from an empty queue until it returns.

An attention call is a call of an attention module, also where the module attends twice (Wan I2V: text, then image).
The table's medians are per attention call; what a call costs more is baseline_ms * (1 / ratio - 1), printed in us.

    python -m videoattn.benchmarks.host_time            # a minute; on a machine without a GPU a first look
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import videoattn
from videoattn.benchmarks import forward, models, results, timing

SIZE = (64, 64, 9)
THIN: dict[str, models.Spec] = {
    "wan-1.3b": {"num_layers": 8, "num_attention_heads": 2, "ffn_dim": 256},
    "hunyuan": {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 2, "num_refiner_layers": 1},
    "cogvideox-5b": {"num_layers": 12, "num_attention_heads": 2},
    "ltx": {"num_layers": 8, "num_attention_heads": 2, "cross_attention_dim": 128},
    "animatediff": {"block_out_channels": [64] * 4, "num_attention_heads": 2, "motion_num_attention_heads": 2},
    "svd-xt": {"block_out_channels": [64] * 4, "num_attention_heads": [1] * 4},
    "modelscope": {"block_out_channels": [64] * 4},
}


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of an attention module, named by its path; the very tensors, so strides and identities are the model's.

    Where the host writes into one later on, both sides are given the later values: those cost a call the same.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def record(denoiser: nn.Module, names: Iterable[str], inputs: dict[str, Any]) -> list[AttentionCall]:
    """The calls that one forward makes of the modules ``names``, in order; a module called twice is there twice."""
    calls: list[AttentionCall] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: calls.append(AttentionCall(name=name, args=args, kwargs=kwargs))

    hooks = [denoiser.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    denoiser(**inputs)
    for handle in hooks:
        handle.remove()
    return calls


def replay(denoiser: nn.Module, calls: Sequence[AttentionCall]) -> None:
    """Make ``denoiser.forward`` these calls of its own modules; it returns their outputs. Its hooks stay."""
    bound = [(denoiser.get_submodule(call.name), call.args, call.kwargs) for call in calls]
    denoiser.forward = lambda **_: [attn(*args, **kwargs) for attn, args, kwargs in bound]


def check(limit: float) -> timing.Check:
    """``forward.check`` of every tensor that a replay returns: the largest error."""
    error = forward.check(limit)

    def largest(inputs: timing.Inputs, outputs: list, references: list) -> float:
        return max(error(inputs, *pair) for pair in zip(_tensors(outputs), _tensors(references), strict=True))

    return largest


def _tensors(outputs: list) -> list[torch.Tensor]:
    """Some modules return one tensor, those of two streams return two."""
    return [tensor for out in outputs for tensor in ((out,) if torch.is_tensor(out) else out)]


def measure(
    name: str, preset: str, device: torch.device, seconds: float, backend: str = "auto"
) -> tuple[timing.Comparison, int]:
    """Patched against unpatched host time of all attention calls of a forward, and how many they are."""
    dtype = torch.float32 if device.type == "cpu" else None  # a CPU is slow in 16 bits, and would be all one sees
    plain = models.denoiser(name, device=device, dtype=dtype, overrides=THIN[name])
    fast = videoattn.enable_fast_attention(forward.twin(plain), preset, backend=backend)
    # one set of inputs, as in a denoising loop: prefix lengths of a prompt's mask are found once a generation
    inputs = models.inputs(name, *SIZE, device=device, dtype=dtype, overrides=THIN[name])
    calls = record(plain, {site.name for site in videoattn.report(fast).sites}, inputs)
    replay(plain, calls)
    replay(fast, calls)

    def run(denoiser: nn.Module) -> Callable[[], list]:
        return torch.no_grad()(lambda: denoiser(**inputs))

    result = timing.compare(
        run(plain),
        {preset: run(fast)},
        lambda seed: (),
        check(forward.TOLERANCE[preset]),
        device=device,
        seconds=seconds,
        min_rounds=20,
        max_rounds=2000,
        clock="host",
    )[preset]
    return result, len(calls)


def added_us(result: timing.Comparison, calls: int) -> float:
    return 1e3 * result.baseline_ms * (1 / result.ratio - 1) / calls


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what a patched attention call costs the host more.")
    results.add_arguments(parser)
    parser.add_argument("--preset", default="exact", choices=tuple(forward.TOLERANCE))
    parser.add_argument("--backend", default="auto", help="who computes; auto is what a user gets")
    parser.add_argument("--seconds", type=float, default=5.0, help="a family")
    parser.add_argument("--only", default="", help="only families whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    chosen = [name for name in THIN if args.only in name]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(THIN)}")
    for name in chosen:
        result, calls = measure(name, args.preset, torch.device(args.device), args.seconds, args.backend)
        bounds = [1e3 * result.baseline_ms * (1 / bound - 1) / calls for bound in (result.ci_hi, result.ci_lo)]
        print(
            f"{name:14s} {calls:3d} calls  added {added_us(result, calls):6.2f} us a call "
            f"[{bounds[0]:.2f}, {bounds[1]:.2f}]  {result}",
            flush=True,
        )
        row = results.timing(
            result,
            case=name,
            shape=f"{calls} calls, {'x'.join(map(str, SIZE))}",
            dtype=models.spec(name)["dtype"] if args.device == "cuda" else "float32",
            kernel=args.preset if args.backend == "auto" else f"{args.preset}/{args.backend}",
            baseline="eager",
            calls=calls,
        )
        results.append("host_time", [row], env, args.results)
        results.append_samples("host_time", row, result, args.samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
