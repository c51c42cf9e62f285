"""What the first generation after ``enable_fast_attention`` takes longer: kernels compiled and checked, plans made.

The first forward of a denoiser less its third, with Triton's cache empty, patched; less the same of the unpatched
denoiser, which has its own first-time costs (cuBLAS and cuDNN set themselves up). Each denoiser in a process of its own.

    python -m videoattn.benchmarks.warmup                          # a minute and a half on an H200
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from os import environ

import torch

import videoattn
from videoattn.benchmarks import forward, models, results

CASES = (
    ("svd-xt", (576, 1024, 25)),
    ("animatediff", (576, 1024, 16)),
    ("modelscope", (256, 256, 16)),
    ("wan-1.3b", (480, 832, 81)),
)


def first_forward(denoiser: torch.nn.Module, inputs: dict[str, object], device: torch.device) -> float:
    """Seconds that the first of three forwards takes longer than the last."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            denoiser(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[-1]


def measure(name: str, size: tuple[int, int, int], preset: str, device: torch.device) -> float:
    """Extra seconds of the first patched forward. The unpatched goes first and pays what both need."""
    plain = models.denoiser(name, device=device)
    inputs = models.inputs(name, *size, device=device)
    first_forward(plain, inputs, device)
    fast = videoattn.enable_fast_attention(forward.twin(plain), preset)
    return first_forward(fast, inputs, device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what the first patched generation takes longer.")
    results.add_arguments(parser)
    parser.add_argument("--preset", default="exact", choices=tuple(forward.TOLERANCE))
    parser.add_argument("--only", default="", help="only denoisers whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", type=int, metavar="N", help="time case N in this process and print the seconds")
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(measure(*CASES[args.measure], args.preset, torch.device(args.device)))
        return 0
    env = results.environment(args.commit)
    chosen = [(index, name, size) for index, (name, size) in enumerate(CASES) if args.only in name]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {[name for name, _ in CASES]}")
    for index, name, size in chosen:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "videoattn.benchmarks.warmup", "--measure", str(index)]
            command += ["--preset", args.preset, "--device", args.device]
            done = subprocess.run(
                command, env={**environ, "TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
            )
        seconds = float(done.stdout.split()[-1])
        case = f"{name} {'x'.join(map(str, size))} {args.preset}"
        print(f"{case}: {seconds:.1f} s", flush=True)
        row = {"case": case, "metric": "seconds", "value": seconds, "unit": "s"}
        results.append_figures("warmup", [row], env, args.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
