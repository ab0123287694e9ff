"""What is read from a running peer: who it is made of, what it has used, what it has written down.

A peer is a proxy and its OPA, or two such in a row, or a proxy alone. It does not matter here which proxy; `sidecar`,
`envoy` and `nginx` start them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.books import Own
from benchmarks.loopback import get
from benchmarks.opa import Opa
from benchmarks.processes import Broken, cpu_seconds, rss_mib


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One quantity of the proxies and of their OPAs: CPU seconds, or MiB."""

    proxy: float
    opa: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    version: str
    port: int
    """Of the listener on 127.0.0.1 that is loaded."""
    tls: bool = True
    """Whether that listener wants mTLS; where not, it is the first of a chain, and behind an agent."""
    proxy_pids: Callable[[], Sequence[int]]
    opas: Sequence[Opa] = ()
    access_logs: Sequence[Path]
    metrics: Sequence[tuple[int, str]]
    """Port and path of each page of metrics."""
    own: Callable[[], Own] | None = None
    """What the proxy itself says of its decisions, if it may repeat or share them."""

    def cpu(self) -> Footprint:
        return Footprint(proxy=cpu_seconds(self.proxy_pids()), opa=cpu_seconds([opa.pid for opa in self.opas]))

    def rss(self) -> Footprint:
        return Footprint(proxy=rss_mib(self.proxy_pids()), opa=rss_mib([opa.pid for opa in self.opas]))

    def asked(self) -> Sequence[int]:
        """How many queries each OPA has answered."""
        return [opa.decisions() for opa in self.opas]

    def logged(self) -> Sequence[int]:
        """Lines in each access log."""
        return [_lines(log) for log in self.access_logs]

    def check_metrics(self) -> None:
        for port, path in self.metrics:
            status, text = get(path, port=port)
            if status != 200 or not text:
                raise Broken(f"{self.name} gives no metrics: {status}")


def chained(first: Peer, second: Peer) -> Peer:
    """Two peers in a row as one: the first sends to the second."""
    one, other = first.own, second.own
    return replace(
        first,
        proxy_pids=lambda: [*first.proxy_pids(), *second.proxy_pids()],
        opas=[*first.opas, *second.opas],
        access_logs=[*first.access_logs, *second.access_logs],
        metrics=[*first.metrics, *second.metrics],
        own=(lambda: one() + other()) if one and other else None,
    )


def _lines(log: Path) -> int:
    with log.open("rb") as lines:
        return sum(1 for line in lines if line.startswith(b"{") and line.endswith(b"}\n"))
