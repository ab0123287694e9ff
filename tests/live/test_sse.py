"""Server-sent events as a library's client reads them: through both sidecars, and over HTTP/2 from sidecar B.

Nothing is measured by sleeping: the server sends an event only when the test has read the one before, so that an event that is
held back anywhere ends the test.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import httpx_sse
import pytest

from support import pair
from support.pair import HOST_A, HOST_B, PATIENCE, Pair

pytestmark = pytest.mark.live

QUIET = 2.0
"""Seconds: longer than each timeout that is none of idleness (see `both`)."""
EVENTS = 20


class Agent(ThreadingHTTPServer):
    """`heard`: the ids of the events that the test has read. `left`: what came of a stream that the client left."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__((HOST_B, port), Handler)
        self.heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.left: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Agent

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            {"/turns": self.turns, "/quiet": self.quiet, "/watched": self.watched, "/dies": self.dies}[self.path]()

    def turns(self) -> None:
        for number in range(EVENTS):
            self.event(number)
            assert self.server.heard.get(timeout=PATIENCE) == str(number)
        self.wfile.write(b"0\r\n\r\n")

    def quiet(self) -> None:
        self.event(0)
        self.server.heard.get(timeout=PATIENCE)
        with pytest.raises(queue.Empty):
            self.server.heard.get(timeout=QUIET)
        self.event(1)
        self.wfile.write(b"0\r\n\r\n")

    def watched(self) -> None:
        """Says one thing, and then only listens for the client's leaving."""
        self.event(0)
        self.connection.settimeout(PATIENCE / 2)
        try:
            self.server.left.put("ended" if not self.connection.recv(1) else "said something")
        except ConnectionError:
            self.server.left.put("reset")
        except TimeoutError:
            self.server.left.put("nothing")

    def dies(self) -> None:
        self.event(0)
        self.server.heard.get(timeout=PATIENCE)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def event(self, number: int) -> None:
        text = b"id: %d\nevent: step\ndata: {\ndata: }\n\n" % number
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name in http.server)
        pass


@pytest.fixture(scope="module")
def both(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With timeouts that a healthy stream outlives, so that one that cuts it shows."""
    timeouts = {"header": 1, "body": 1, "keepalive": 1, "lingering": 0.5, "drain": 5}
    with pair.running(tmp_path_factory.mktemp("sse"), opa, timeouts=timeouts) as running:
        yield running


@pytest.fixture(scope="module")
def server(both: Pair) -> Iterator[Agent]:
    with Agent(both.agent) as agent:
        yield agent
        agent.shutdown()


@pytest.fixture
def agent(both: Pair, server: Agent) -> Iterator[Agent]:
    server.heard, server.left = queue.SimpleQueue(), queue.SimpleQueue()
    yield server
    assert both.defects() == []


@pytest.fixture(params=["outbound", "strict-h1", "strict-h2"])
def client(request: pytest.FixtureRequest, both: Pair, agent: Agent) -> Iterator[httpx.Client]:
    """`outbound`: of agent A, through both sidecars. `strict`: of a workload, by mTLS to sidecar B."""
    way, _, version = request.param.partition("-")
    where = f"http://{HOST_A}:{both.outbound}" if way == "outbound" else f"https://{HOST_B}:{both.inbound['strict']}"
    with httpx.Client(
        base_url=where, http1=version != "h2", http2=version == "h2", verify=both.context(), timeout=PATIENCE,
        trust_env=False,
    ) as opened:  # fmt: skip
        yield opened


@contextmanager
def listening(client: httpx.Client, path: str) -> Iterator[Iterator[httpx_sse.ServerSentEvent]]:
    with httpx_sse.connect_sse(client, "GET", path) as source:
        assert source.response.status_code == 200
        assert source.response.http_version == (
            "HTTP/2" if client.base_url.scheme == "https" and _h2(client) else "HTTP/1.1"
        )
        yield source.iter_sse()


def _h2(client: httpx.Client) -> bool:
    transport = client._transport
    assert isinstance(transport, httpx.HTTPTransport)
    return bool(transport._pool._http2)


def test_each_event_arrives_before_the_next_is_sent(client: httpx.Client, agent: Agent) -> None:
    seen = []
    with listening(client, "/turns") as events:
        for event in events:
            seen.append((event.event, event.id, event.data))
            agent.heard.put(event.id)
    assert seen == [("step", str(number), "{\n}") for number in range(EVENTS)]


def test_quiet_stream_is_not_cut(client: httpx.Client, agent: Agent) -> None:
    with listening(client, "/quiet") as events:
        assert next(events).id == "0"
        agent.heard.put("0")
        assert next(events).id == "1"
        assert list(events) == []


def test_client_that_leaves_ends_the_servers_stream_at_once(client: httpx.Client, agent: Agent) -> None:
    """Though the server has nothing to say just then, and nothing would have failed to be delivered."""
    with listening(client, "/watched") as events:
        assert next(events).id == "0"
    client.close()  # httpx resets no stream of HTTP/2 that it reads no further
    assert agent.left.get(timeout=PATIENCE) in {"ended", "reset"}


def test_server_that_dies_is_no_end_of_the_stream(client: httpx.Client, agent: Agent) -> None:
    with listening(client, "/dies") as events:
        assert next(events).id == "0"
        agent.heard.put("0")
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            list(events)
