"""A sidecar at saturation for as long as one likes: does its memory grow?

    PYTHONPATH=.:tests python -m lanes.soak

One real sidecar with real OPA; two processes of clients that ask as fast as they are answered, over mTLS (HTTP/1.1 on kept
connections and on new ones, HTTP/2 on new ones) and as an agent, through the outbound listener to a port where nobody listens. Among the requests are denied ones, ones that policy has not seen before, bodies up and down, and
clients that leave in the middle. Certificate and key are replaced every 20 s, the configuration is read again every 15 s,
and metrics are asked for every second, as they would be.

Resident memory is read every second. Growth is that between the medians of the first and of the last quarter of the time after a
warm-up; it may be what a rotation leaves behind, and not more. `SOAK_SECONDS` (600) in all.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from examples.demo import kit
from sidecar.decision import install
from support.h2_bulk import Broken, Bulk
from support.live import HOST, Live, client_context, exchange, free_port, running, status

MIB = 1024 * 1024
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
WARM_UP = min(120.0, SECONDS / 3)
"""Until memories that are bounded have filled, and the heap has found most of its shape. (The policy here is not proven pure: no
decision is kept, and that memory stays empty.)"""
LIMIT = 2.0
"""MiB between the quarters."""
CLIENTS = 6
"""Threads in each process of clients."""
RELOAD_INTERVAL, ROTATE_INTERVAL = 15.0, 20.0
PROGRESS_INTERVAL = 10.0
TIMEOUT = 30.0
SPAWN = multiprocessing.get_context("spawn")
_HOST = HOST.encode()
_LINGER_ZERO = struct.pack("ii", 1, 0)


# ── the agent ─────────────────────────────────────────────────────────────────────────────────────────────────────


def agent(port: int) -> None:
    """Answers `/size/N` with N bytes and everything else with two, once the whole request has come."""
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve, args=(sock,), daemon=True).start()


def _serve(sock: socket.socket) -> None:
    with sock, suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ahead = b""
        while True:
            while b"\r\n\r\n" not in ahead:
                if not (data := sock.recv(65536)):
                    return
                ahead += data
            head, _, ahead = ahead.partition(b"\r\n\r\n")
            left = _length(head) - len(ahead)
            ahead = ahead[_length(head) :]
            while left > 0:
                if not (data := sock.recv(65536)):
                    return
                left -= len(data)
            path = head.split(b" ", 2)[1]
            body = bytes(int(path.rpartition(b"/")[2])) if path.startswith(b"/size/") else b"ok"
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


# ── clients ───────────────────────────────────────────────────────────────────────────────────────────────────────


def clients(ports: dict[str, int], directory: Path, number: int, done: Any, ending: Any) -> None:
    """Ask until told to end; `done` counts answers."""
    chance = [random.Random(f"{number} {at}") for at in range(CLIENTS)]
    context = {alpn: client_context(directory / "caller", (alpn,)) for alpn in ("http/1.1", "h2")}
    kinds = (_keeper, _keeper, _keeper, _bulk, _newcomer, _agent)

    def run(at: int) -> None:
        while not ending.is_set():
            with suppress(OSError, ValueError, Broken):
                kinds[at % len(kinds)](ports, context, chance[at], done, ending)

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _connected(port: int, context: Any) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock if context is None else context.wrap_socket(sock, server_hostname=HOST)


def _request(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.05:
        return b"GET /secret/%d HTTP/1.1\r\nHost: %b\r\n\r\n" % (chance.randrange(1 << 30), _HOST)
    if kind < 0.15:
        body = bytes(chance.randrange(1, 1 << 16))
        return b"POST /r HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b" % (_HOST, len(body), body)
    if kind < 0.25:
        return b"GET /size/%d HTTP/1.1\r\nHost: %b\r\n\r\n" % (chance.randrange(1 << 18), _HOST)
    if kind < 0.5:
        path, query = chance.randrange(1 << 40), chance.randrange(1 << 40)
        return b"GET /new/%d?role=%d HTTP/1.1\r\nHost: %b\r\nX-Role: %d\r\n\r\n" % (path, query, _HOST, query)
    return b"GET /r HTTP/1.1\r\nHost: %b\r\nUser-Agent: soak\r\nAccept: */*\r\n\r\n" % _HOST


def _keeper(ports: dict[str, int], context: Any, chance: random.Random, done: Any, ending: Any) -> None:
    """Many requests on one connection, which some leave in the middle."""
    with _connected(ports["strict"], context["http/1.1"]) as sock:
        while not ending.is_set() and chance.random() > 0.002:
            if status(exchange(sock, _request(chance))) is None:
                return
            done.value += 1
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        sock.sendall(_request(chance))


def _newcomer(ports: dict[str, int], context: Any, chance: random.Random, done: Any, _ending: Any) -> None:
    with _connected(ports["strict"], context["http/1.1"]) as sock:
        if status(exchange(sock, _request(chance))) is not None:
            done.value += 1


def _agent(ports: dict[str, int], _context: Any, chance: random.Random, done: Any, _ending: Any) -> None:
    with _connected(ports["outbound"], None) as sock:
        for _ in range(20):
            if status(exchange(sock, _request(chance))) is not None:
                done.value += 1


def _bulk(ports: dict[str, int], context: Any, chance: random.Random, done: Any, _ending: Any) -> None:
    """Over HTTP/2, a connection for each request."""
    with _connected(ports["strict"], context["h2"]) as sock:
        bulk = Bulk(sock, lambda _: None, window=1 << 20)
        path = f"/new/{chance.randrange(1 << 40)}" if chance.random() < 0.5 else f"/size/{chance.randrange(1 << 18)}"
        bulk.begin([(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", path)], end=True)
        bulk.finish()
        done.value += 1


# ── what happens meanwhile ────────────────────────────────────────────────────────────────────────────────────────


class Meanwhile:
    """Rotations, reloads, scrapes; each when its time has come."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._turns = {self._rotate: ROTATE_INTERVAL, self._reload: RELOAD_INTERVAL, self._scrape: 1.0}
        now = time.monotonic()
        self._next = {turn: now + seconds for turn, seconds in self._turns.items()}
        self.counts = dict.fromkeys(("rotate", "reload", "scrape"), 0)

    def look(self) -> None:
        for turn, seconds in self._turns.items():
            if time.monotonic() >= self._next[turn]:
                self._next[turn] = time.monotonic() + seconds
                turn()
                self.counts[turn.__name__.strip("_")] += 1

    def _rotate(self) -> None:
        live = self._live
        kit.write(live.directory, live.ca.svid("/ns/demo/sa/backend"), {"example.org": live.ca.bundle_pem})

    def _reload(self) -> None:
        self._live.process.send_signal(signal.SIGHUP)

    def _scrape(self) -> None:
        with socket.create_connection(("127.0.0.1", self._live.health), timeout=TIMEOUT) as sock:
            exchange(sock, b"GET /metrics HTTP/1.1\r\nHost: health\r\n\r\n")


def curve(readings: list[int], columns: int = 12) -> str:
    """The readings in a few medians, MiB."""
    size = max(1, len(readings) // columns)
    return " ".join(f"{median(readings[at : at + size]) / MIB:.1f}" for at in range(0, len(readings), size))


def main() -> int:
    opa, agent_port = install.install(report=print), free_port()
    done, ending = SPAWN.Value("Q", 0, lock=False), SPAWN.Event()
    served = SPAWN.Process(target=agent, args=(agent_port,), daemon=True)
    served.start()
    inbound = [{"listen": f"127.0.0.1:{free_port()}", "upstream": f"http://127.0.0.1:{agent_port}"}]
    readings: list[int] = []
    with tempfile.TemporaryDirectory() as place, running(Path(place), opa, inbound=inbound) as live:
        ports = {"strict": int(inbound[0]["listen"].rpartition(":")[2]), "outbound": live.ports["outbound"]}
        crowds = [
            SPAWN.Process(target=clients, args=(ports, Path(place), number, done, ending), daemon=True)
            for number in range(2)
        ]
        for crowd in crowds:
            crowd.start()
        meanwhile, began, told_at = Meanwhile(live), time.monotonic(), 0.0
        try:
            while (seconds := time.monotonic() - began) < SECONDS:
                time.sleep(1)
                if live.process.poll() is not None:
                    print(f"soak: FAILED: the sidecar has ended: {live.news()[-2000:]}")
                    return 1
                meanwhile.look()
                if seconds >= WARM_UP:
                    readings.append(live.rss())
                if seconds - told_at >= PROGRESS_INTERVAL:
                    told_at = seconds
                    live.news()  # read, so that what is not is what is told when it ends
                    print(f"{seconds:5.0f} s, {done.value} answers, resident {live.rss() / MIB:.1f} MiB", flush=True)
        finally:
            ending.set()
            for crowd in crowds:
                crowd.join(TIMEOUT)
                crowd.terminate()
            served.terminate()
    quarter = max(1, len(readings) // 4)
    grown = (median(readings[-quarter:]) - median(readings[:quarter])) / MIB
    told = ", ".join(f"{count} × {name}" for name, count in meanwhile.counts.items())
    print(f"soak: {done.value} answers in {SECONDS:.0f} s ({told})")
    print(f"soak: resident, MiB, after {WARM_UP:.0f} s: {curve(readings)}; highest {max(readings) / MIB:.1f}")
    print(f"soak: growth {grown:+.2f} MiB from the first quarter to the last (limit {LIMIT:g})")
    return int(grown > LIMIT or done.value == 0)


if __name__ == "__main__":
    sys.exit(main())
