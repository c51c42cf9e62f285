"""Host time that ``enable_fast_attention`` adds to an attention call: no sync, SDPA underneath on both sides.

Denoisers of the real families, so thin and on so small a video that the device is never the bottleneck. A forward is
timed from an empty queue until it returns; both sides are divided by the attention calls of the unpatched forward.
The table's medians are per attention call; what a call costs more is baseline_ms * (1 / ratio - 1), printed in us.

    python -m videoattn.benchmarks.host_time            # a minute; on a machine without a GPU a first look
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

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


class _Counter(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def attention_calls(run: Callable[[], object]) -> int:
    with _Counter() as counter:
        run()
    return counter.calls


def measure(name: str, preset: str, device: torch.device, seconds: float) -> tuple[timing.Comparison, int]:
    """Patched against unpatched host time of a whole forward, and its attention calls."""
    dtype = torch.float32 if device.type == "cpu" else None  # a CPU is slow in 16 bits, and would be all one sees
    plain = models.denoiser(name, device=device, dtype=dtype, overrides=THIN[name])
    fast = videoattn.enable_fast_attention(forward.twin(plain), preset)

    def run(denoiser: nn.Module) -> Callable[..., torch.Tensor]:
        @torch.no_grad()
        def call(kwargs: dict[str, object]) -> torch.Tensor:
            return denoiser(**kwargs)[0]

        return call

    # one set of inputs, as in a denoising loop: prefix lengths of a prompt's mask are found once a generation
    inputs = (models.inputs(name, *SIZE, device=device, dtype=dtype, overrides=THIN[name]),)
    result = timing.compare(
        run(plain),
        {preset: run(fast)},
        lambda seed: inputs,
        forward.check(forward.TOLERANCE[preset]),
        device=device,
        seconds=seconds,
        max_rounds=1000,
        clock="host",
    )[preset]
    return result, attention_calls(lambda: run(plain)(*inputs))


def added_us(result: timing.Comparison, calls: int) -> float:
    return 1e3 * result.baseline_ms * (1 / result.ratio - 1) / calls


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what a patched attention call costs the host more.")
    results.add_arguments(parser)
    parser.add_argument("--preset", default="exact", choices=tuple(forward.TOLERANCE))
    parser.add_argument("--seconds", type=float, default=7.0, help="a family")
    parser.add_argument("--only", default="", help="only families whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    chosen = [name for name in THIN if args.only in name]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {list(THIN)}")
    for name in chosen:
        result, calls = measure(name, args.preset, torch.device(args.device), args.seconds)
        bounds = [1e3 * result.baseline_ms * (1 / bound - 1) / calls for bound in (result.ci_hi, result.ci_lo)]
        print(
            f"{name:14s} {calls:3d} calls  added {added_us(result, calls):6.2f} us a call "
            f"[{bounds[0]:.2f}, {bounds[1]:.2f}]  {result}",
            flush=True,
        )
        row = {
            "case": name,
            "shape": f"{calls} calls, {'x'.join(map(str, SIZE))}",
            "dtype": models.spec(name)["dtype"] if args.device == "cuda" else "float32",
            "layout": None,
            "kernel": args.preset,
            "baseline": "eager",
            "median_ms": result.median_ms / calls,
            "baseline_ms": result.baseline_ms / calls,
            "ratio": result.ratio,
            "ci_lo": result.ci_lo,
            "ci_hi": result.ci_hi,
            "tflops": None,
            "gbs": None,
            "rel_l2": result.error,
            "verdict": result.verdict,
        }
        results.append("host_time", [row], env, args.results)
        results.append_samples("host_time", row, result, args.samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
