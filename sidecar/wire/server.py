"""A listener's life: accept, find out who is there, speak the protocol that was agreed, and say how it ended.

Each connection lives in a task of its own, and everything that waits for its peer (first byte, handshake, judgement) happens in
that task under a deadline, so that a silent peer delays nobody. A peer is settled once. Nothing escapes from a connection's
task but cancellation: its one catch-all is here.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import trio

from sidecar.errors import PeerRejected
from sidecar.model import Address, Connection, ConnectionEnded, Mode, Outcome, Peer, Workload
from sidecar.wire import h1_server, h2_server, tls
from sidecar.wire.h1_server import Handle, Limits, Served
from sidecar.wire.network import Listener, Stream, accept_forever, peek

_LOOK_OUT_INTERVAL = 0.5
"""Seconds; waits end at most that much late."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_REFUSAL = b'{"type":"about:blank","title":"this port takes mutual TLS only","status":426,"code":"plaintext_refused"}'
_UPGRADE_REQUIRED = (
    b"HTTP/1.1 426 Upgrade Required\r\nupgrade: TLS/1.3, HTTP/1.1\r\nconnection: Upgrade, close\r\n"
    b"content-type: application/problem+json\r\ncontent-length: %d\r\n\r\n%b" % (len(_REFUSAL), _REFUSAL)
)
_GO_AWAY = b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x08\x07\0\0\0\0\0" + b"\0\0\0\0" + b"\0\0\0\x0d"
"""SETTINGS, empty, then GOAWAY with HTTP_1_1_REQUIRED (RFC 9113 §6.5, §6.8, §7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a server may be told anew while it runs."""

    mode: Mode | None
    """None: no TLS is spoken here at all (the agent's side)."""
    limits: Limits
    handshake_timeout: float
    max_connections: int


class _Refused(Exception):
    def __init__(self, outcome: Outcome, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason


class Server:
    """Serves one listener. `direction` names it in records."""

    def __init__(
        self,
        *,
        direction: str,
        plaintext_peer: Peer,
        settings: Settings,
        handle: Handle,
        ended: Callable[[ConnectionEnded], None],
        credentials: Callable[[], tls.Credentials | None],
    ) -> None:
        self.direction = direction
        self.settings = settings
        self._plaintext_peer = plaintext_peer
        self._handle = handle
        self._ended = ended
        self._credentials = credentials
        prefix = os.urandom(4).hex()
        self._ids = (f"{prefix}-{number}" for number in count(1))
        self._lives: set[_Life] = set()
        self._served: dict[Served, None] = {}
        self._settling: dict[trio.CancelScope, None] = {}
        """Connections whose peer is not settled yet, oldest first."""
        self._open = 0
        self._emptied = trio.Event()
        self._draining = False

    @property
    def open_connections(self) -> int:
        return self._open

    async def serve(self, listener: Listener, accept_failed: Callable[[OSError], None]) -> None:
        """Accept and serve until the listener is closed and the last connection has ended."""

        async def failed(error: OSError) -> None:
            accept_failed(error)

        async with trio.open_nursery() as nursery:

            def connected(sock: socket.socket, remote: Address) -> None:
                self._open += 1
                nursery.start_soon(self._connection, sock, remote, listener.address)

            nursery.start_soon(self._look_out)
            await accept_forever(listener, connected, failed)
            await self.wait_empty()
            nursery.cancel_scope.cancel()

    async def _look_out(self) -> None:
        """End the waits whose time is up, and h1 connections whose client has reset while its answer is made.

        Nobody reads from those to find out. A client that has only ended its side still gets its answer (RFC 9112 §9.6).
        """
        while True:
            await trio.sleep(_LOOK_OUT_INTERVAL)
            now = trio.current_time()
            for life in list(self._lives):
                if life.served is None or life.stream is None:
                    continue
                life.served.check(now)
                if life.served.connection.protocol == "h1" and life.stream.was_reset():
                    life.scope.cancel()

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self._open:
            await self._emptied.wait()

    def drain(self) -> None:
        """Let what is open finish; connections close as soon as nothing is under way on them."""
        self._draining = True
        for served in self._served:
            served.drain()

    async def _connection(self, sock: socket.socket, remote: Address, local: Address) -> None:
        """The whole life of one connection, and its record. Nothing but cancellation comes out of it."""
        life = _Life(connection_id=next(self._ids), remote=remote)
        self._lives.add(life)
        try:
            with life.scope:
                await self._live(sock, local, life)
            if life.scope.cancelled_caught:
                life.ended("aborted", "reset_by_peer")
        except Exception as error:  # noqa: BLE001  (the one catch-all: a defect ends its connection, not the listener)
            life.failed(error)
        except BaseException:
            life.ended("aborted", "drain_timeout")
            raise
        finally:
            if life.stream is not None:
                life.stream.abort()  # what is still open here was cut off
            sock.close()
            self._lives.discard(life)
            self._open -= 1
            if self._open == 0:
                self._emptied.set()
                self._emptied = trio.Event()
            if life.served is not None:
                self._served.pop(life.served, None)
            self._ended(life.record(self.direction))

    async def _live(self, sock: socket.socket, local: Address, life: _Life) -> None:
        if self._open > self.settings.max_connections:
            self._make_room()
        with trio.move_on_after(self.settings.handshake_timeout) as patience:
            self._settling[patience] = None
            try:
                stream, buffer, connection = await self._settle(sock, life.connection_id, life.remote, local)
            finally:
                self._settling.pop(patience, None)
        if patience.cancelled_caught:
            if trio.current_time() < patience.deadline:
                raise _Refused("overloaded", "evicted")
            raise _Refused("handshake_failed", "handshake_timeout")
        fresh = _Freshness(stream, connection, self._credentials)
        life.stream = stream
        life.served = Served(connection, self._handle, self.settings.limits, fresh, draining=self._draining)
        self._served[life.served] = None
        await (h2_server if connection.protocol == "h2" else h1_server).serve(stream, buffer, life.served)
        if life.served.evicted:
            life.ended("overloaded", "evicted")

    def _make_room(self) -> None:
        """End a connection for the one that has come: the oldest whose peer is not settled, else the oldest that is idle.

        So the silent cannot keep out who has something to say. Refuses the newcomer where all are busy.
        """
        if (patience := next(iter(self._settling), None)) is not None:
            del self._settling[patience]
            patience.cancel()
            return
        for served in self._served:
            if served.idle is not None and not served.evicted:
                served.evicted = True
                served.idle.cancel()
                return
        raise _Refused("overloaded", "connections_exhausted")

    async def _settle(
        self, sock: socket.socket, connection_id: str, remote: Address, local: Address
    ) -> tuple[Stream, bytearray, Connection]:
        """Find out who is there and what is spoken. Runs in the connection's own task, under its caller's deadline."""
        mode = self.settings.mode
        buffer = bytearray()
        credentials = None
        if mode in ("strict", "permissive"):
            first = await peek(sock)
            if not first:
                sock.close()
                raise _Refused("aborted", "no_bytes")
            if first == tls.HANDSHAKE_RECORD:
                credentials = self._credentials()
                if credentials is None:
                    raise _Refused("handshake_failed", "identity_missing")
            elif mode == "strict":
                await _refuse_plaintext(Stream(sock), self.settings.limits.linger_timeout)
                raise _Refused("plaintext_refused", "plaintext_refused")
        stream: Stream
        peer: Peer
        if credentials is not None:
            secured = await tls.accept(sock, credentials.server_context, credentials.judge)
            stream, peer, server_name = secured, secured.peer, secured.server_name
            protocol = "h2" if secured.alpn == "h2" else "h1"
        else:
            stream, peer, server_name = Stream(sock), self._plaintext_peer, None
            protocol = "h2" if await _prior_knowledge(stream, buffer) else "h1"
        connection = Connection(
            id=connection_id, peer=peer, remote=remote, local=local, tls=credentials is not None,
            server_name=server_name, protocol="h2" if protocol == "h2" else "h1",
            generation=credentials.generation if credentials is not None else 0,
        )  # fmt: skip
        return stream, buffer, connection


class _Life:
    """What the record of a connection will say."""

    def __init__(self, *, connection_id: str, remote: Address) -> None:
        self.connection_id = connection_id
        self.remote = remote
        self.scope = trio.CancelScope()
        self.stream: Stream | None = None
        self.served: Served | None = None
        self._started_at, self._started = time.time(), trio.current_time()
        self._outcome: Outcome = "served"
        self._reason: str | None = None
        self._detail: str | None = None

    def ended(self, outcome: Outcome, reason: str, detail: str | None = None) -> None:
        self._outcome, self._reason, self._detail = outcome, reason, detail

    def failed(self, error: Exception) -> None:
        match error:
            case _Refused():
                self.ended(error.outcome, error.reason)
            case tls.HandshakeFailed():
                self.ended("handshake_failed", error.code, error.detail)
            case PeerRejected():
                self.ended("peer_rejected", error.code, error.detail)
            case OSError() | trio.BrokenResourceError() | trio.ClosedResourceError():
                self.ended("aborted", "reset_by_peer", str(error))
            case _:
                self.ended("aborted", "internal_error", f"{type(error).__name__}: {error}")

    def record(self, direction: str) -> ConnectionEnded:
        served = self.served
        return ConnectionEnded(
            connection_id=self.connection_id, listener=direction, remote=self.remote, started_at=self._started_at,
            seconds=trio.current_time() - self._started, outcome=self._outcome,
            reason=self._reason or (served.reason if served is not None else None),
            peer=served.connection.peer if served is not None else None,
            exchanges=served.exchanges if served is not None else 0, detail=self._detail,
        )  # fmt: skip


class _Freshness:
    """Whether a connection's peer would still be accepted: judged again when our trust has changed."""

    __slots__ = ("_credentials", "_facts", "_generation", "_not_after")

    def __init__(
        self, stream: Stream, connection: Connection, credentials: Callable[[], tls.Credentials | None]
    ) -> None:
        self._facts = stream.facts if isinstance(stream, tls.TlsStream) else None
        self._not_after = connection.peer.not_after if isinstance(connection.peer, Workload) else 0.0
        self._generation = connection.generation
        self._credentials = credentials

    def __call__(self) -> bool:
        if self._facts is None:
            return True
        credentials = self._credentials()
        if credentials is None or time.time() >= self._not_after:
            return False
        if credentials.generation != self._generation:
            try:
                credentials.judge(self._facts)
            except PeerRejected:
                return False
            self._generation = credentials.generation
        return True


async def _prior_knowledge(stream: Stream, buffer: bytearray) -> bool:
    """Read until it is clear whether the client begins with the preface of HTTP/2 (RFC 9113 §3.4). Keeps what was read."""
    while len(buffer) < len(_PREFACE) and _PREFACE.startswith(buffer):
        data = await stream.receive_some()
        if not data:
            break
        buffer += data
    return buffer.startswith(_PREFACE)


async def _refuse_plaintext(stream: Stream, linger_timeout: float) -> None:
    """Say in the client's own protocol that this port takes mTLS. Reads the preface of HTTP/2 at most, and parses nothing."""
    seen = b""
    while len(seen) < len(_PREFACE) and _PREFACE.startswith(seen):
        data = await stream.receive_some(len(_PREFACE) - len(seen))
        if not data:
            break
        seen += data
    try:
        await stream.send_all(_GO_AWAY if seen == _PREFACE else _UPGRADE_REQUIRED)
    finally:
        await stream.close_gently(linger_timeout)
