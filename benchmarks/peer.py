"""What is read from a running peer: who it is made of, what it has used, what it has written down.

A peer is a proxy and its OPA. It does not matter here which proxy; `sidecar` and `envoy` start them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loopback import get
from benchmarks.opa import Opa
from benchmarks.processes import Broken, cpu_seconds, rss_mib


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One quantity of the proxy and of its OPA: CPU seconds, or MiB."""

    proxy: float
    opa: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    version: str
    port: int
    """Of its mTLS listener on 127.0.0.1."""
    proxy_pids: Callable[[], Sequence[int]]
    opa: Opa
    access_log: Path
    metrics_port: int
    metrics_path: str

    def cpu(self) -> Footprint:
        return Footprint(proxy=cpu_seconds(self.proxy_pids()), opa=cpu_seconds([self.opa.pid]))

    def rss(self) -> Footprint:
        return Footprint(proxy=rss_mib(self.proxy_pids()), opa=rss_mib([self.opa.pid]))

    def logged(self) -> int:
        """Lines in the access log."""
        with self.access_log.open("rb") as lines:
            return sum(1 for _ in lines)

    def check_metrics(self) -> None:
        status, text = get(self.metrics_path, port=self.metrics_port)
        if status != 200 or not text:
            raise Broken(f"{self.name} gives no metrics: {status}")
