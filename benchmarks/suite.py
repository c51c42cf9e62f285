"""Seconds that `make test` and `make demo` take on this machine, their .venv made before. Needs a checkout and make.

python -m videoattn.benchmarks.suite
python -m videoattn.benchmarks.suite --only demo
"""

from __future__ import annotations

import argparse
import subprocess
import time

from videoattn.benchmarks import results

TARGETS = ("test", "demo")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, help="one of them (default: both)")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    env = results.environment(args.commit)
    root = results.HERE.parent
    subprocess.run(["make", ".venv/.ready"], cwd=root, check=True)
    for target in (args.only,) if args.only else TARGETS:
        start = time.perf_counter()
        status = subprocess.run(["make", target], cwd=root, check=False).returncode
        seconds = time.perf_counter() - start
        if status:
            print(f"make {target} failed: nothing is written down")
            return status
        row = {"case": f"make {target}", "metric": "seconds", "value": seconds, "unit": "s"}
        print(f"make {target}: {seconds:.0f} s, {results.append_figures('suite', [row], env, args.results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
