"""Seconds that the tests, the compilation ahead of time among them, and the demo take here, their .venv made before.

Needs a checkout and make.

python -m videoattn.benchmarks.suite
python -m videoattn.benchmarks.suite --only "make demo"
"""

from __future__ import annotations

import argparse
import subprocess
import time

from videoattn.benchmarks import results
from videoattn.kernels.triton_backend import TUNED_WITH

COMMANDS = {
    "make test": ["make", "test"],
    "make demo": ["make", "demo"],
    "aot": [".venv/bin/python", "-m", "pytest", "tests/test_aot.py"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=COMMANDS, help="one of them (default: all)")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    root = results.HERE.parent
    subprocess.run(["make", ".venv/.ready", f".venv/triton-{TUNED_WITH}"], cwd=root, check=True)
    for case in (args.only,) if args.only else COMMANDS:
        start = time.perf_counter()
        status = subprocess.run(COMMANDS[case], cwd=root, check=False).returncode
        seconds = time.perf_counter() - start
        if status:
            print(f"{case} failed: nothing is written down")
            return status
        row = {"case": case, "metric": "seconds", "value": seconds, "unit": "s"}
        print(f"{case}: {seconds:.0f} s, {results.append_figures('suite', [row], env, args.results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
