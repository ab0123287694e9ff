"""What an idle connection costs: mTLS connections to one real sidecar with real OPA, each kept after one request.

    PYTHONPATH=.:tests python -m lanes.idle

Resident memory is read when as many connections have come, been asked over and gone as a warm-up takes, and again when all are
open and quiet. What is in between, divided by their number, is what one costs; the kernel's own buffers are not in it.
With h2, one connection carries one request too. `IDLE_CONNECTIONS` (1000) of each; fails above 40 KiB for one over either.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from sidecar.decision import install
from support.h2_bulk import Bulk
from support.live import HOST, Live, exchange, running, status

KIB = 1024
CONNECTIONS = int(os.environ.get("IDLE_CONNECTIONS", "1000"))
WARM_UP = 50
LIMIT = 40 * KIB
REQUEST = b"GET /budget/report HTTP/1.1\r\nHost: %s\r\nUser-Agent: idle\r\nAccept: */*\r\n\r\n" % HOST.encode()
SETTLE_SECONDS = 2.0


def connected(live: Live, protocol: str) -> socket.socket:
    """A connection over which one request was answered."""
    sock = live.connect(alpn="h2" if protocol == "h2" else "http/1.1")
    if protocol == "h2":
        bulk = Bulk(sock, lambda _: None, window=1 << 20)
        bulk.begin([(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/x")], end=True)
        bulk.finish()
    elif (found := status(exchange(sock, REQUEST))) != 200:
        raise SystemExit(f"idle: FAILED: answered {found}: {live.news()}")
    return sock


def cost(live: Live, protocol: str, count: int) -> float:
    """Resident bytes for one idle connection."""
    for _ in range(WARM_UP):
        connected(live, protocol).close()
    time.sleep(SETTLE_SECONDS)
    before = live.rss()
    with ExitStack() as kept:
        for _ in range(count):
            kept.enter_context(connected(live, protocol))
        time.sleep(SETTLE_SECONDS)
        after = live.rss()
    return (after - before) / count


def main() -> int:
    opa = install.install(report=print)
    limits = {"max_connections": 2 * CONNECTIONS, "max_connections_per_peer": 2 * CONNECTIONS}
    costs: dict[str, float] = {}
    for protocol in ("h1", "h2"):  # in a process each: what one has freed, the other would use
        with tempfile.TemporaryDirectory() as place, running(Path(place), opa, limits=limits) as live:
            time.sleep(SETTLE_SECONDS)
            alone = live.rss() / KIB / KIB
            costs[protocol] = cost(live, protocol, CONNECTIONS)
        told = f"{costs[protocol] / KIB:.1f} KiB for one of {CONNECTIONS} connections"
        print(f"idle: {protocol} {told}; resident without any {alone:.1f} MiB", flush=True)
    print(f"idle: the limit is {LIMIT // KIB} KiB")
    return int(max(costs.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
