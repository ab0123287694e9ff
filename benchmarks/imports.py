"""What each import costs a running sidecar, in memory and in CPU at the start.

Each module is imported in a fresh interpreter, alone, and once more in the order below in one interpreter: what two
modules share is paid by the first. Resident memory is that of /proc/self/smaps_rollup; CPU is of the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import material, sidecar
from benchmarks.loopback import free_port
from benchmarks.processes import Broken

MODULES = (
    "ssl",
    "trio",
    "httptools",
    "h2.connection",
    "yaml",
    "prometheus_client",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.x509",
    "sidecar.app",
    "httpx",
    "requests",
    "opa_client",
)
REPEATS = 3

PROBE = """
import sys, time
def used():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
steps = [(used(), time.process_time())]
for name in sys.argv[1:]:
    __import__(name)
    steps.append((used(), time.process_time()))
print([[(b[0] - a[0]) / 1024, 1000 * (b[1] - a[1])] for a, b in zip([(0, 0)] + steps, steps)])
"""

LOADED = (
    "import sys; import sidecar.__main__, sidecar.app; print(list(map(int, (m in sys.modules for m in sys.argv[1:]))))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    mib: float
    cpu_ms: float


def costs(modules: Sequence[str]) -> list[Cost]:
    """Of a bare interpreter, then of each module after the ones before it; medians of a few runs."""
    runs = [json.loads(_python(PROBE, *modules)) for _ in range(REPEATS)]
    return [
        Cost(mib=median(run[i][0] for run in runs), cpu_ms=median(run[i][1] for run in runs))
        for i in range(len(modules) + 1)
    ]


def report(work: Path) -> str:
    loaded = dict(zip(MODULES, json.loads(_python(LOADED, *MODULES)), strict=True))
    bare, *in_order = costs(MODULES)
    lines = [
        "What imports cost (a fresh interpreter; then each module alone, and after the ones above it)",
        f"{'':<48}{'alone':>18}{'in order':>20}",
        f"{'':<48}{'MiB':>9}{'CPU ms':>9}{'MiB':>11}{'CPU ms':>9}   in `sidecar run`",
        f"{'python -I':<48}{bare.mib:>9.1f}{bare.cpu_ms:>9.0f}{bare.mib:>11.1f}{bare.cpu_ms:>9.0f}   yes",
    ]
    for module, cost in zip(MODULES, in_order, strict=True):
        alone = costs([module])[1]
        said = "yes" if loaded[module] else "no"
        figures = f"{alone.mib:>9.1f}{alone.cpu_ms:>9.0f}{cost.mib:>11.1f}{cost.cpu_ms:>9.0f}"
        lines.append(f"{module:<48}{figures}   {said}")
    used, used_opa = idle(work)
    lines.append(f"{'a running `sidecar run`, idle':<48}{used:>9.1f} MiB, and its OPA {used_opa:.1f} MiB")
    return "\n".join(lines)


def idle(work: Path) -> tuple[float, float]:
    """RSS in MiB of a sidecar that is ready and has had no request, and of its OPA."""
    work.mkdir()
    with sidecar.inbound("sidecar", material.make(work / "material"), free_port(), work / "sidecar") as peer:
        time.sleep(2)
        rss = peer.rss()
        return rss.proxy, rss.opa


def _python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if result.returncode != 0:
        raise Broken(f"cannot measure imports: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout
