"""The load generator, fortio, and the plain HTTP server behind both peers (fortio's own echo server).

Fortio checks a server's certificate by its DNS or IP names only. An SVID has neither, so fortio runs with
`-https-insecure`: it does not verify the peer, which saves work on the client's side only. Both peers verify fortio's
certificate in full. The address is an IP, so no SNI is sent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loopback import free_port, get
from benchmarks.material import Material
from benchmarks.processes import Broken, running, wait_until

VERSION = "1.66.0"
SAMPLE_INTERVAL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What fortio saw of one run."""

    answers: int
    """Answers with a 2xx status; the one that opens each connection is among them."""
    per_second: float
    p50_ms: float
    p99_ms: float


def fortio() -> Path:
    """The load generator, built by Go at first use and kept outside the clone."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "policy-sidecar" / f"fortio-{VERSION}"
    binary = home / "fortio"
    if binary.exists():
        return binary
    go = shutil.which("go")
    if go is None:
        raise Broken(
            f"fortio {VERSION} is built by Go, and there is no `go` on PATH. Install Go, or put it at {binary}"
        )
    print(f"building fortio {VERSION} into {home}", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    command = [go, "install", f"fortio.org/fortio@v{VERSION}"]
    if subprocess.run(command, env=os.environ | {"GOBIN": str(home)}, timeout=900, check=False).returncode != 0:
        raise Broken(f"`{' '.join(command)}` failed; its reason stands above")
    return binary


@contextmanager
def agent(binary: Path, work: Path) -> Iterator[int]:
    """The small server behind the peers; yields its port. Its CPU is counted for nobody."""
    port, log = free_port(), work / "agent.log"
    off = [f"-{part}-port=disabled" for part in ("grpc", "tcp", "udp", "redirect")]
    answer = "-echo-server-default-params=size=64"
    argv: list[str | Path] = [
        binary,
        "server",
        f"-http-port=127.0.0.1:{port}",
        *off,
        "-ui-path=",
        "-loglevel=Warning",
        answer,
    ]
    with running(argv, log=log) as child:
        wait_until(lambda: get("/", port=port)[0] == 200, "the agent", child, log)
        yield port


def drive(
    binary: Path,
    material: Material,
    url: str,
    *,
    connections: int,
    seconds: float,
    work: Path,
    sample: Callable[[], None] = lambda: None,
) -> Load:
    """Ask `url` over and over on kept-alive mTLS connections; `sample` is called twice a second meanwhile.

    Raises `Broken` if any answer is not 2xx, or fortio does not end in time.
    """
    result, log = work / "fortio.json", work / "fortio.log"
    result.unlink(missing_ok=True)
    argv: list[str | Path] = [binary, "load", f"-c={connections}", "-qps=0", f"-t={seconds}s", "-keepalive", "-p=50,99", "-r=0.00005",
            f"-cert={material.client_chain}", f"-key={material.client_key}", f"-cacert={material.anchors}",
            "-https-insecure", "-timeout=10s", "-loglevel=Warning", f"-json={result}", url]  # fmt: skip
    with running(argv, log=log) as child:
        for _ in range(int((seconds + 30) / SAMPLE_INTERVAL)):
            try:
                child.wait(SAMPLE_INTERVAL)
                break
            except subprocess.TimeoutExpired:
                sample()
        else:
            raise Broken(f"fortio did not end {seconds:g} s of load on {url}")
    if child.returncode != 0 or not result.exists():
        raise Broken(f"fortio failed on {url}:\n{log.read_text(errors='replace')[-2000:]}")
    return read(json.loads(result.read_text()), connections)


def read(result: Any, connections: int) -> Load:
    codes: dict[str, int] = result["RetCodes"]
    if any(not code.startswith("2") for code in codes) or not codes:
        raise Broken(f"not every answer was 2xx: {codes}")
    percentiles = {entry["Percentile"]: 1000 * entry["Value"] for entry in result["DurationHistogram"]["Percentiles"]}
    return Load(
        answers=sum(codes.values()) + connections,
        per_second=result["ActualQPS"],
        p50_ms=percentiles[50],
        p99_ms=percentiles[99],
    )
