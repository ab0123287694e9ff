"""A flood of connections against a sidecar with few descriptors: health answers meanwhile, and afterwards all is well."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support import live as stage
from support.live import Live, exchange, status

pytestmark = pytest.mark.live

DESCRIPTORS = 96
FLOOD = 200
GOOD = b"GET /good HTTP/1.1\r\nHost: backend.internal\r\n\r\n"


@pytest.fixture(scope="module")
def live(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    prefix = ("sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh")
    with stage.running(tmp_path_factory.mktemp("descriptors"), opa, prefix) as running:
        yield running


def _health(live: Live, path: str = "/readyz") -> bytes:
    with socket.create_connection(("127.0.0.1", live.health), timeout=5) as sock:
        return exchange(sock, f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())


def _descriptors(live: Live) -> int:
    return len(list(Path(f"/proc/{live.process.pid}/fd").iterdir()))


def _cpu(live: Live) -> float:
    """Seconds of processor time so far."""
    fields = Path(f"/proc/{live.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("kind", ["silent", "idle", "of the agent"])
def test_a_flood_keeps_neither_health_nor_the_next_caller_out(live: Live, kind: str) -> None:
    live.news()
    before = _descriptors(live)
    with ExitStack() as stack:
        for number in range(FLOOD):
            port = live.ports["outbound" if kind == "of the agent" else "strict"]
            if kind == "idle" and number < DESCRIPTORS:
                stack.enter_context(live.connect())
            else:
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                if kind == "of the agent" and number < DESCRIPTORS // 2:
                    assert status(exchange(sock, GOOD)) == 503, "there is no target; the connection is kept"
        assert _descriptors(live) < DESCRIPTORS
        for _ in range(10):
            assert status(_health(live)) == 200
            time.sleep(0.1)
        assert b"connection.accept_failed" in _health(live, "/metrics")
        with socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=20) as sock:
            with live.context("http/1.1").wrap_socket(sock, server_hostname=stage.HOST) as secured:
                assert status(exchange(secured, GOOD)) == 200
    until = time.monotonic() + 20
    while _descriptors(live) > before + 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert _descriptors(live) <= before + 4
    with live.connect() as sock:
        assert status(exchange(sock, GOOD)) == 200
    told = live.news()
    assert told.count("connection.accept_failed") <= 5
    assert "internal_error" not in told
    assert live.process.poll() is None


def test_where_all_who_are_connected_are_busy_the_next_waits_and_nothing_spins_or_fails(live: Live) -> None:
    """Nobody can make way. What is left is for those who are in: each of them gets to OPA and to the agent."""

    def hold(sock: socket.socket, _head: bytes) -> None:
        released.wait(30)
        with suppress(OSError):
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    released = threading.Event()
    live.upstream.scripts[b"/held"] = hold
    busy: list[socket.socket] = []
    with ExitStack() as stack:
        while len(busy) < DESCRIPTORS:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=1))
            try:
                sock = stack.enter_context(live.context("http/1.1").wrap_socket(sock, server_hostname=stage.HOST))
            except TimeoutError:
                break
            sock.settimeout(30)
            sock.sendall(GOOD.replace(b"/good", b"/held/%d" % len(busy)))
            until = time.monotonic() + 5
            while not live.upstream.about(f"/held/{len(busy)} ") and time.monotonic() < until:
                time.sleep(0.01)
            busy.append(sock)
        assert 8 < len(busy) < DESCRIPTORS
        began = _cpu(live)
        time.sleep(2)
        assert _cpu(live) - began < 1
        assert status(_health(live)) == 200
        released.set()
        assert {status(stage.read_answer(sock)) for sock in busy} == {200}
    with live.connect() as sock:
        assert status(exchange(sock, GOOD)) == 200
