"""WebSocket as a library's own client and server speak it, through both sidecars; and over HTTP/2 (RFC 8441).

The agent behind sidecar B is a WebSocket server on HTTP/1.1, which is what there is. A caller that speaks HTTP/2 asks by
extended CONNECT, and its side is made of an HTTP/2 library and a WebSocket one, since no client offers both.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage
from wsproto.events import Event as WebSocketEvent

from support import h2_client, pair
from support.h2_client import Answer
from support.pair import HOST_A, HOST_B, PATIENCE, Pair, wait_until

pytestmark = pytest.mark.live

MIB = 1024 * 1024
LARGE = bytes(range(256)) * (4 * MIB // 256)
QUIET = 2.5
"""Seconds: longer than each timeout that is none of idleness (see `both`)."""
WAYS = ("outbound", "plain")
OFFERED = [Subprotocol("chat.v2"), Subprotocol("chat.v1")]


class Agent:
    """The WebSocket server. What each path does is told by its method; what it met shows in `seen`."""

    def __init__(self, port: int) -> None:
        self.seen: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.go_on = threading.Event()
        self.server = serve(
            self.handle, HOST_B, port, subprotocols=OFFERED, select_subprotocol=self.select, process_request=self.judge,
            max_size=None, ping_interval=None, close_timeout=PATIENCE,
        )  # fmt: skip
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def judge(self, connection: ServerConnection, request: Request) -> Response | None:
        self.seen.put(dict(request.headers.raw_items()))
        return connection.respond(401, "say who you are\n") if request.path == "/reject" else None

    def select(self, connection: ServerConnection, asked: Sequence[Subprotocol]) -> Subprotocol | None:
        return next((name for name in OFFERED if name in asked), None)

    def handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        seen = self.seen
        try:
            {"echo": self.echo, "close": self.close, "break": self.break_off, "quiet": self.quiet}[
                connection.request.path.removeprefix("/")
            ](connection)
        except ConnectionClosed as closed:
            seen.put(closed)

    def echo(self, connection: ServerConnection) -> None:
        while True:
            connection.send(connection.recv())

    def close(self, connection: ServerConnection) -> None:
        connection.send("goodbye")
        connection.close(4001, "told to")

    def break_off(self, connection: ServerConnection) -> None:
        connection.send("not the la")
        self.go_on.wait(PATIENCE)
        break_off(connection.socket)

    def quiet(self, connection: ServerConnection) -> None:
        time.sleep(QUIET)
        connection.send("still here")
        connection.recv()


def break_off(sock: socket.socket) -> None:
    """As a process does that is killed. Whether that is an end or a reset is a race here: a thread of the library reads too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # wakes whoever reads
    sock.close()


@pytest.fixture(scope="module")
def both(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With timeouts that a healthy tunnel outlives, so that one that cuts it shows."""
    timeouts = {"header": 1, "body": 1, "keepalive": 1, "lingering": 0.5, "drain": 5}
    with pair.running(tmp_path_factory.mktemp("websocket"), opa, timeouts=timeouts) as running:
        yield running


@pytest.fixture(scope="module")
def server(both: Pair) -> Iterator[Agent]:
    agent = Agent(both.agent)
    yield agent
    agent.server.shutdown()


@pytest.fixture
def agent(server: Agent, both: Pair) -> Iterator[Agent]:
    """With nothing seen yet; and afterwards the sidecars have met no defect of their own."""
    server.seen = queue.SimpleQueue()
    server.go_on.clear()
    yield server
    assert both.defects() == []


def dial(both: Pair, path: str, way: str = "outbound", **settings: object) -> ClientConnection:
    where = f"{HOST_A}:{both.outbound}" if way == "outbound" else f"{HOST_B}:{both.inbound['plain']}"
    settings = {"max_size": None, "ping_interval": None, "close_timeout": PATIENCE, **settings}
    opened = connect(f"ws://{where}{path}", proxy=None, **settings)  # type: ignore[arg-type]
    assert isinstance(opened, ClientConnection)
    return opened


def closing(agent: Agent, timeout: float = PATIENCE) -> ConnectionClosed:
    """How the server saw it end."""
    while not isinstance(seen := agent.seen.get(timeout=timeout), ConnectionClosed):
        pass
    return seen


# ── over HTTP/1.1 ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_messages_come_back_as_they_were_sent(both: Pair, agent: Agent, way: str) -> None:
    with dial(both, "/echo", way) as client:
        for message in ("größer als 100 €", b"\x00\xff", "", LARGE, "last"):
            client.send(message)
            assert client.recv(timeout=PATIENCE) == message


def test_compressed_messages_stay_compressed(both: Pair, agent: Agent) -> None:
    with dial(both, "/echo") as client, dial(both, "/echo", compression=None) as plain:
        assert client.response is not None
        assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]
        client.send("again and again " * 100_000)
        assert client.recv(timeout=PATIENCE) == "again and again " * 100_000
        assert plain.response is not None
        assert "Sec-WebSocket-Extensions" not in plain.response.headers


def test_pings_are_answered_by_the_other_end(both: Pair, agent: Agent) -> None:
    with dial(both, "/echo") as client:
        assert client.ping(b"are you there").wait(PATIENCE)


def test_subprotocol_is_agreed_on_by_client_and_server(both: Pair, agent: Agent) -> None:
    with dial(both, "/echo", subprotocols=[Subprotocol("chat.v1"), Subprotocol("chat.v3")]) as client:
        assert client.subprotocol == "chat.v1"


def test_server_learns_who_calls(both: Pair, agent: Agent) -> None:
    with dial(both, "/echo", additional_headers={"X-Forwarded-SPIFFE-ID": "spiffe://evil/x"}):
        headers = agent.seen.get(timeout=PATIENCE)
    assert isinstance(headers, dict)
    assert {name.lower(): value for name, value in headers.items()}["x-forwarded-spiffe-id"] == pair.ID_A


@pytest.mark.parametrize("way", WAYS)
def test_close_of_the_client_reaches_the_server_with_its_code(both: Pair, agent: Agent, way: str) -> None:
    with dial(both, "/echo", way) as client:
        began = time.monotonic()
        client.close(4000, "that is all")
        assert time.monotonic() - began < PATIENCE / 2, "the end of the connection was not passed on"
    seen = closing(agent)
    assert seen.rcvd is not None
    assert (seen.rcvd.code, seen.rcvd.reason) == (4000, "that is all")


@pytest.mark.parametrize("way", WAYS)
def test_close_of_the_server_reaches_the_client_with_its_code(both: Pair, agent: Agent, way: str) -> None:
    with dial(both, "/close", way) as client:
        assert client.recv(timeout=PATIENCE) == "goodbye"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=PATIENCE)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "told to")


def test_client_that_breaks_off_is_gone_for_the_server_at_once(both: Pair, agent: Agent) -> None:
    with dial(both, "/echo") as client:
        break_off(client.socket)
        seen = closing(agent)
    assert isinstance(seen, ConnectionClosedError)
    assert seen.rcvd is None


def test_server_that_breaks_off_is_gone_for_the_client_at_once(both: Pair, agent: Agent) -> None:
    with dial(both, "/break") as client:
        assert client.recv(timeout=PATIENCE) == "not the la"
        agent.go_on.set()
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv(timeout=PATIENCE)
    assert closed.value.rcvd is None


@pytest.mark.parametrize(("path", "way"), [("/forbidden", "outbound"), ("/secret", "outbound"), ("/secret", "plain")])
def test_denied_handshake_is_answered_like_any_request(both: Pair, agent: Agent, path: str, way: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(both, path, way)
    response = refused.value.response
    assert (response.status_code, response.headers["Content-Type"]) == (403, "application/problem+json")
    assert response.body is not None
    assert json.loads(response.body)["code"] == "policy_denied"
    assert agent.seen.empty()


def test_refusal_of_the_server_passes_through(both: Pair, agent: Agent) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(both, "/reject")
    response = refused.value.response
    assert (response.status_code, response.body) == (401, b"say who you are\n")


def test_quiet_tunnel_is_not_cut(both: Pair, agent: Agent) -> None:
    with dial(both, "/quiet") as client:
        assert client.recv(timeout=QUIET + PATIENCE) == "still here"


def test_many_at_once_do_not_mix(both: Pair, agent: Agent) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(dial(both, "/echo")) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(f"{number} " * 1000)
        for number, client in reversed(list(enumerate(clients))):
            assert client.recv(timeout=PATIENCE) == f"{number} " * 1000


def test_tunnel_is_one_exchange_in_the_records(both: Pair, agent: Agent) -> None:
    """Written when it ends, with the status that began it."""
    before = {side: len(both.exchanges(side, "/close")) for side in ("a", "b")}
    with dial(both, "/close") as client:
        assert client.recv(timeout=PATIENCE) == "goodbye"
    for side, known in before.items():
        wait_until(partial(_known, both, side, known + 1), f"no record of {side}")
        record = both.exchanges(side, "/close")[-1]
        assert (record["status"], record["outcome"], record["error"]) == (101, "allowed", None)


def _known(both: Pair, side: str, count: int) -> bool:
    return len(both.exchanges(side, "/close")) == count


# ── over HTTP/2 ───────────────────────────────────────────────────────────────────────────────────────────────────


class Tunnel:
    """A WebSocket client on one stream of an HTTP/2 connection. `version` is asked for in vain where it is not 13."""

    def __init__(self, client: h2_client.Client, path: str, fields: list[tuple[bytes, bytes]] | None = None) -> None:
        self._client = client
        self._websocket = WebSocket(ConnectionType.CLIENT)
        self._taken = 0
        asked = [(b":protocol", b"websocket"), (b"sec-websocket-version", b"13"), *(fields or [])]
        self.stream = client.open("CONNECT", path, asked)
        client.until(lambda: self.answer.head is not None or self.answer.over)

    @property
    def answer(self) -> Answer:
        return self._client.answers[self.stream]

    def send(self, event: WebSocketEvent) -> None:
        self._client.send(self.stream, self._websocket.send(event))

    def receive(self) -> WebSocketEvent:
        """The next whole message, or another event."""
        parts: list[Message] = []
        while True:
            for event in self._events():
                if not isinstance(event, Message):
                    return event
                parts.append(event)
                if event.message_finished:
                    whole: str | bytearray = parts[0].data
                    for part in parts[1:]:
                        whole += part.data
                    return type(event)(data=whole)
            before = len(self.answer.body)
            self._client.until(lambda before=before: len(self.answer.body) > before or self.answer.over)  # type: ignore[misc]
            if len(self.answer.body) == before:
                raise ConnectionError("the tunnel has ended")

    def _events(self) -> Iterator[WebSocketEvent]:
        fresh = bytes(self.answer.body[self._taken :])
        self._taken += len(fresh)
        if fresh:
            self._websocket.receive_data(fresh)
        return self._websocket.events()


def test_h2_server_says_that_it_takes_extended_connect(h2: h2_client.Client) -> None:
    assert h2.extended_connect


def test_h2_messages_come_back_as_they_were_sent(h2: h2_client.Client, agent: Agent) -> None:
    tunnel = Tunnel(h2, "/echo")
    assert tunnel.answer.status == 200
    for message in (TextMessage("größer"), BytesMessage(b"\x00\xff"), BytesMessage(LARGE), TextMessage("last")):
        tunnel.send(message)
        assert tunnel.receive() == message
    tunnel.send(Ping(b"there?"))
    assert tunnel.receive() == Pong(b"there?")


def test_h2_handshake_fields_are_those_of_http2(h2: h2_client.Client, agent: Agent) -> None:
    """The key and its answer are HTTP/1.1's alone (RFC 8441 §5.1); the agent's server, which needs them, gets a key of ours."""
    tunnel = Tunnel(h2, "/echo", [(b"sec-websocket-protocol", b"chat.v2")])
    assert tunnel.answer.status == 200
    assert tunnel.answer.value(b"sec-websocket-protocol") == b"chat.v2"
    names = {name for name, _ in tunnel.answer.head or []}
    assert names.isdisjoint({b"sec-websocket-accept", b"upgrade", b"connection"})
    asked = agent.seen.get(timeout=PATIENCE)
    assert isinstance(asked, dict)
    assert len({name.lower(): value for name, value in asked.items()}["sec-websocket-key"]) == 24


def test_h2_close_of_the_client_ends_the_stream_on_both_sides(h2: h2_client.Client, agent: Agent) -> None:
    tunnel = Tunnel(h2, "/echo")
    tunnel.send(CloseConnection(4000, "that is all"))
    assert tunnel.receive() == CloseConnection(4000, "that is all")
    h2.until(lambda: tunnel.answer.over)
    assert tunnel.answer.ended
    h2.send(tunnel.stream, b"", end=True)  # the end of a TCP connection is END_STREAM here (RFC 8441 §5)
    seen = closing(agent, PATIENCE / 2)
    assert seen.rcvd is not None
    assert seen.rcvd.code == 4000


def test_h2_close_of_the_server_ends_the_stream(h2: h2_client.Client, agent: Agent) -> None:
    tunnel = Tunnel(h2, "/close")
    assert tunnel.receive() == TextMessage("goodbye")
    assert tunnel.receive() == CloseConnection(4001, "told to")
    tunnel.send(CloseConnection(4001))
    h2.until(lambda: tunnel.answer.over)
    assert tunnel.answer.ended


def test_h2_client_that_resets_is_gone_for_the_server_at_once(h2: h2_client.Client, agent: Agent) -> None:
    tunnel = Tunnel(h2, "/echo")
    h2.reset(tunnel.stream)
    seen = closing(agent)
    assert isinstance(seen, ConnectionClosedError)
    assert seen.rcvd is None


def test_h2_server_that_breaks_off_is_gone_for_the_client_at_once(h2: h2_client.Client, agent: Agent) -> None:
    tunnel = Tunnel(h2, "/break")
    assert tunnel.receive() == TextMessage("not the la")
    agent.go_on.set()
    with pytest.raises(ConnectionError, match="the tunnel has ended"):
        tunnel.receive()


def test_h2_tunnel_shares_its_connection_with_other_requests(h2: h2_client.Client, agent: Agent) -> None:
    tunnels = [Tunnel(h2, "/echo") for _ in range(5)]
    assert h2.request("GET", "/secret").status == 403
    for number, tunnel in enumerate(tunnels):
        tunnel.send(TextMessage(f"{number}"))
    for number, tunnel in reversed(list(enumerate(tunnels))):
        assert tunnel.receive() == TextMessage(f"{number}")


@pytest.mark.parametrize(("path", "status"), [("/secret", 403), ("/reject", 401)])
def test_h2_handshake_that_is_refused_is_answered_like_any_request(
    h2: h2_client.Client, agent: Agent, path: str, status: int
) -> None:
    tunnel = Tunnel(h2, path)
    assert tunnel.answer.status == status
    h2.until(lambda: tunnel.answer.over)
    assert tunnel.answer.ended or tunnel.answer.reset == 0
