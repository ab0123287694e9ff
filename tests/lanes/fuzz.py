"""`make fuzz`: every target of `fuzz.registry` under atheris, which looks for inputs that reach code that none has reached.

    python -m lanes.fuzz                    all targets; FUZZ_SECONDS in all (120), FUZZ_JOBS at a time (one for each CPU)
    python -m lanes.fuzz NAME [NAME…]       these
    python -m lanes.fuzz NAME FILE          one saved input, without atheris: raises what it raised

Each target runs in a process of its own, which may crash, hang or eat memory. `build/fuzz/NAME/` holds its `corpus` (kept, so
that the next run begins where this one ended), its `log`, and what made it fail: `crash-…`, `timeout-…`, `oom-…`.
FUZZ_SEED makes libFuzzer's choices repeatable.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fuzz import registry
from fuzz.registry import NAMES, Target

BUILD = Path("build/fuzz")
DEFAULT_SECONDS = 120
STARTING_SECONDS = 1.5
"""What a target's process needs to import and instrument what it watches."""
MAX_INPUT_SECONDS = 25
"""For one input, in real time on a machine that others use too. What backtracks takes minutes."""
MAX_RSS_MB = 1024
GRACE_SECONDS = 60
_CHILD = "--child"
_COUNTS = struct.Struct("=QQ")
_COVERAGE = re.compile(rb"\bcov: (\d+)")
_ARTIFACTS = ("crash-*", "timeout-*", "oom-*", "slow-unit-*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    name: str
    runs: int
    accepted: int
    seconds: float
    coverage: int
    status: int
    """Of the process: 0, or how it failed."""
    saved: tuple[Path, ...]
    """The inputs that failed."""

    def __str__(self) -> str:
        share = 100 * self.accepted / max(self.runs, 1)
        rate = self.runs / max(self.seconds, 0.001)
        end = "ok" if not self.status else f"FAILED ({self.status})"
        return (
            f"{self.name:20} {self.runs:>9,} runs {self.seconds:6.1f} s {rate:>8,.0f}/s "
            f"{share:4.1f}% accepted {self.coverage:>5} places  {end}"
        )


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [_CHILD]:
        return _fuzz(arguments[1], Path(arguments[2]), arguments[3:])
    if len(arguments) == 2 and arguments[0] in NAMES and Path(arguments[1]).is_file():
        accepted = registry.target(arguments[0]).run(Path(arguments[1]).read_bytes())
        print(f"{arguments[0]}: no failure; the input is {'accepted' if accepted else 'refused'}")
        return 0
    if unknown := [name for name in arguments if name not in NAMES]:
        print(f"no target or file: {', '.join(unknown)}. Targets: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("atheris") is None:
        print(
            "fuzz: NOTHING WAS FUZZED: atheris is not installed (it has wheels for Linux on x86_64; group `fuzz`)",
            file=sys.stderr,
        )
        return 2
    return _run_all([*(arguments or NAMES)])


def _run_all(names: list[str]) -> int:
    os.nice(10)
    jobs = min(int(os.environ.get("FUZZ_JOBS", "0")) or len(os.sched_getaffinity(0)), len(names))
    total = float(os.environ.get("FUZZ_SECONDS", DEFAULT_SECONDS))
    found = [registry.target(name) for name in names]
    unit = max(0.0, total * jobs - STARTING_SECONDS * len(names)) / sum(target.share for target in found)
    print(f"fuzz: {len(names)} targets, {total:.0f} s, {jobs} at a time", flush=True)
    began = time.monotonic()
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(lambda target: _run(target, max(1, round(unit * target.share))), found):
            print(outcome, flush=True)
            for saved in outcome.saved:
                print(f"    reproduce: PYTHONPATH=.:tests {_python()} -m lanes.fuzz {outcome.name} {saved}", flush=True)
            if outcome.status:
                print(f"    log: {BUILD / outcome.name / 'log'}", flush=True)
            outcomes.append(outcome)
    failures = sum(1 for outcome in outcomes if outcome.status)
    runs = sum(outcome.runs for outcome in outcomes)
    spent = time.monotonic() - began
    print(f"fuzz: {len(names)} targets, {runs:,} executions in {spent:.0f} s, {failures} failures", flush=True)
    return 1 if failures else 0


def _python() -> str:
    return os.path.relpath(sys.executable)


def _run(target: Target, seconds: int) -> Outcome:
    """One target in its own process, for so long."""
    name, home = target.name, BUILD / target.name
    for folder in ("corpus", "seeds"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (home / "seeds" / f"{number:03}").write_bytes(seed)
    (home / "words").write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    counts = home / "counts"
    counts.write_bytes(bytes(_COUNTS.size))
    earlier = set(_saved(home))
    options = [
        f"-max_total_time={seconds}", f"-max_len={target.max_bytes}", f"-dict={home / 'words'}", f"-artifact_prefix={home}/",
        f"-timeout={MAX_INPUT_SECONDS}", f"-rss_limit_mb={MAX_RSS_MB}", f"-seed={os.environ.get('FUZZ_SEED', '0')}",
        str(home / "corpus"), str(home / "seeds"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "lanes.fuzz", _CHILD, name, str(counts), *options]
    began = time.monotonic()
    with (home / "log").open("wb") as log:
        try:
            done = subprocess.run(
                command, check=False, stdout=log, stderr=log, timeout=seconds + MAX_INPUT_SECONDS + GRACE_SECONDS
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -1
    seen = _COVERAGE.findall((home / "log").read_bytes())
    runs, accepted = _COUNTS.unpack(counts.read_bytes())
    return Outcome(
        name=name, runs=runs, accepted=accepted, seconds=time.monotonic() - began, coverage=int(seen[-1]) if seen else 0,
        status=status, saved=tuple(sorted(set(_saved(home)) - earlier)),
    )  # fmt: skip


def _saved(home: Path) -> list[Path]:
    return [path for pattern in _ARTIFACTS for path in home.glob(pattern)]


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in word)


def _fuzz(name: str, counts: Path, options: Sequence[str]) -> int:
    """In the child: instrument what is to be covered as it is imported, and hand over to libFuzzer, which exits."""
    import atheris

    with atheris.instrument_imports(include=[*registry.GUIDED_BY.get(registry.room_of(name), ("sidecar",))]):
        target = registry.target(name)
    warnings.simplefilter("ignore")  # of libraries, about what is to be refused some day
    atheris.Setup([name, *options], _counted(target.run, counts))
    atheris.Fuzz()
    return 0


def _counted(run: Callable[[bytes], bool], counts: Path) -> Callable[[bytes], None]:
    """Counts in a mapped file: libFuzzer ends the process without a word to Python."""
    with counts.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), _COUNTS.size)
    runs = accepted = 0

    def one(data: bytes) -> None:
        nonlocal runs, accepted
        runs += 1
        accepted += run(data)
        _COUNTS.pack_into(shared, 0, runs, accepted)

    return one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
