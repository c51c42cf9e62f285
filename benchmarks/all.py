"""Every benchmark of this folder in one go.

python -m videoattn.benchmarks.all --results FOLDER --commit HASH        # a quarter of an hour on an H200
"""

from __future__ import annotations

import argparse

from videoattn.benchmarks import attention, dense, dispatch, forward, host_time, results, temporal

# in the order of worth: a run that is cut short has shown most
SCRIPTS = (host_time, forward, temporal, dense, dispatch, attention)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every benchmark, each with its defaults.")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    common = ["--results", str(args.results), *(["--commit", args.commit] if args.commit else [])]
    if args.samples:
        common += ["--samples", str(args.samples)]
    return max([script.main(common) for script in SCRIPTS])


if __name__ == "__main__":
    raise SystemExit(main())
