"""A listener's life: accept, find out who is there, speak the protocol that was agreed, and say how it ended.

Each connection lives in a task of its own, and everything that waits for its peer (first byte, handshake, judgement) happens in
that task under a deadline, so that a silent peer delays nobody. A peer is settled once. Nothing escapes from a connection's
task but cancellation: its one catch-all is here.
"""

from __future__ import annotations

import math
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
from sidecar.wire.admission import Admission, Guest
from sidecar.wire.h1_server import Answering, Handle, Known, Limits, Served
from sidecar.wire.hangups import Hangups
from sidecar.wire.listening import Listener, accept_forever
from sidecar.wire.network import Stream, keep_alive
from sidecar.wire.recent import Memories
from sidecar.wire.settling import Refused, settle
from sidecar.wire.turns import Turns

_ENDED_PATIENCE, _UNANSWERED_PATIENCE = 1.0, 5.0
"""Seconds of silence, within an answer and before it, after which a client that has ended its side counts as gone."""
_LOOK_OUT_INTERVAL = 0.5
"""Seconds; waits end at most that much late."""
_FORGET = 60
"""So many looks from one time that heads are forgotten to the next."""
_MAX_HEADS, _MAX_FULL = 256, 8
"""Heads remembered of one client, and how many such memories may be full of ordinary ones: 8 MiB in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a server may be told anew while it runs."""

    mode: Mode | None
    """None: no TLS is spoken here at all (the agent's side)."""
    limits: Limits
    handshake_timeout: float
    max_connections: int
    max_connections_per_peer: int | None = None
    """None: peers are not told apart (the agent's side, the health port)."""
    max_descriptor: int | None = None
    """See `listening`; None for whoever must be answered to the last."""


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
        self._lives: dict[_Life, None] = {}
        self._admission = Admission()
        self._hangups = Hangups()
        self._turns = Turns()
        self._memories: Memories[Known] = Memories(max_heads=_MAX_HEADS, max_full=_MAX_FULL)
        self._accepting = False
        self._emptied = trio.Event()
        self._draining = False

    @property
    def open_connections(self) -> int:
        return len(self._lives)

    async def serve(self, listener: Listener, accept_failed: Callable[[OSError], bool]) -> None:
        """Accept and serve until the listener is closed and the last connection has ended.

        `accept_failed` is told why nobody could be accepted, and says whether it has made room (`make_room`).
        """
        self._accepting = True

        async with trio.open_nursery() as nursery:

            def connected(sock: socket.socket, remote: Address) -> None:
                life = _Life(connection_id=next(self._ids), remote=remote, patience=self.settings.handshake_timeout)
                self._lives[life] = None  # before the first wait: whoever waits for the last to end must know of it
                nursery.start_soon(self._connection, sock, listener.address, life)

            await nursery.start(self._hangups.run)
            nursery.start_soon(self._turns.run)
            nursery.start_soon(self._look_out)
            try:
                await accept_forever(listener, connected, accept_failed, max_descriptor=self.settings.max_descriptor)
            finally:
                self._accepting = False
                self._look_whether_empty()
            await self.wait_empty()
            nursery.cancel_scope.cancel()

    async def _look_out(self) -> None:
        """End the waits whose time is up, and h1 exchanges whose client went while there was none yet (`wire.hangups`)."""
        for look in count(1):
            await trio.sleep(_LOOK_OUT_INTERVAL)
            now = trio.current_time()
            if look % _FORGET == 0:
                self._memories.forget()
            for life in list(self._lives):
                if life.served is None or life.stream is None:
                    continue
                life.served.check(now)
                if life.served.answering is not None:
                    life.look(now)
                elif life.hung_up and life.served.tunnel is not None:
                    life.look_at_tunnel(life.served.tunnel, now)

    def make_room(self) -> bool:
        """End a connection with which nothing is lost, if there is one, and say whether there was."""
        return self._admission.make_room()

    async def wait_empty(self) -> None:
        """Wait until nothing is accepted any more, and no connection is open."""
        while self._lives or self._accepting:
            await self._emptied.wait()

    def _look_whether_empty(self) -> None:
        if not self._lives and not self._accepting:
            self._emptied.set()
            self._emptied = trio.Event()

    def drain(self) -> None:
        """Let what is open finish; connections close as soon as nothing is under way on them."""
        self._draining = True
        for life in self._lives:
            if life.served is not None:
                life.served.drain()

    async def _connection(self, sock: socket.socket, local: Address, life: _Life) -> None:
        """The whole life of one connection, and its record. Nothing but cancellation comes out of it."""
        try:
            with life.scope:
                await self._live(sock, local, life)
            if life.scope.cancelled_caught:
                life.cut_off()
        except Exception as error:  # noqa: BLE001  (the one catch-all: a defect ends its connection, not the listener)
            life.failed(error)
        except BaseException:
            life.ended("aborted", "drain_timeout")
            raise
        finally:
            if life.stream is not None:
                life.stream.abort()  # what is still open here was cut off
            sock.close()
            self._admission.leave(life)
            del self._lives[life]
            self._look_whether_empty()
            self._ended(life.record(self.direction))

    async def _live(self, sock: socket.socket, local: Address, life: _Life) -> None:
        settings = self.settings
        if settings.mode is not None:
            keep_alive(sock, settings.limits.keepalive_timeout)
        self._admission.enter(
            life, life.remote.host,
            max_connections=settings.max_connections, max_connections_per_peer=settings.max_connections_per_peer,
        )  # fmt: skip
        life.settling = life.scope
        stream, buffer, connection = await settle(
            sock, connection_id=life.connection_id, remote=life.remote, local=local, mode=settings.mode,
            plaintext_peer=self._plaintext_peer, credentials=self._credentials,
            linger_timeout=settings.limits.linger_timeout, turn=self._turns.of(life.remote.host),
        )  # fmt: skip
        life.peer, life.stream = connection.peer, stream
        if not life.scope.cancel_called:  # else the next wait is its last, and time was up before
            life.settling, life.scope.deadline = None, math.inf
        try:
            self._admission.settled(
                life, connection.peer, life.remote.host, max_connections_per_peer=settings.max_connections_per_peer
            )
        except Refused:
            await stream.close_gently(settings.limits.linger_timeout)
            raise
        fresh = _Freshness(stream, connection, self._credentials)
        limits = self.settings.limits
        peer = connection.peer.id if isinstance(connection.peer, Workload) else connection.peer
        recent = self._memories.of((
            limits, peer, connection.remote.host, connection.local, connection.tls, connection.server_name,
        ))  # fmt: skip
        life.served = Served(connection, self._handle, limits, fresh, draining=self._draining, recent=recent)
        with self._hangups.watching(stream.fileno(), life.hang_up):
            await (h2_server if connection.protocol == "h2" else h1_server).serve(stream, buffer, life.served)
        if life.served.evicted:
            life.ended("overloaded", "evicted")


class _Life(Guest):
    """What the record of a connection will say."""

    def __init__(self, *, connection_id: str, remote: Address, patience: float) -> None:
        """`patience`: seconds until its peer must be settled."""
        self.connection_id = connection_id
        self.remote = remote
        self._started_at, self._started = time.time(), trio.current_time()
        self.scope = trio.CancelScope(deadline=self._started + patience)
        """What ends it: its deadline while its peer is not settled, then whoever has found out that the client has gone."""
        self.stream: Stream | None = None
        self.peer: Peer | None = None
        self.hung_up = False
        """Whether the client is known to have gone."""
        self._seen: tuple[Answering, int] | None = None
        """Of a client that has ended its side: its exchange, and how far the answer was at the last look."""
        self._quiet_since = 0.0
        self._outcome: Outcome = "served"
        self._reason: str | None = None
        self._detail: str | None = None

    def cut_off(self) -> None:
        """Its scope was cancelled: while it was being settled by its deadline or to make room, else by `hang_up`."""
        if self.settling is None:
            self.ended("aborted", "reset_by_peer")
        elif self.evicted:
            self.ended("overloaded", "evicted")
        else:
            self.ended("handshake_failed", "handshake_timeout")

    def look(self, now: float) -> None:
        """See whether the client is still there to take its answer. One that has ended its side may be, and is waited for
        while something moves; of one that has left there will never be another sign (RFC 9112 §9.6).
        """
        assert self.stream is not None  # noqa: S101  (for the type checker)
        assert self.served is not None  # noqa: S101
        reply, left = self.served.answering, self.stream.left()
        if reply is None or (left is None and not self.hung_up):
            return
        if self.hung_up or left == "reset":
            self.hang_up()
            return
        seen = (reply, reply.bytes_sent)
        if seen != self._seen or self.stream.unsent():
            self._seen, self._quiet_since = seen, now
        elif now - self._quiet_since >= (_ENDED_PATIENCE if reply.started else _UNANSWERED_PATIENCE):
            self.hang_up()

    def look_at_tunnel(self, tunnel: Answering, now: float) -> None:
        """Its client was reset, or both sides have ended it. Who reads it will find out, unless it cannot read for an agent
        that does not: then nobody ever would.
        """
        if self._seen != (tunnel, 0):
            self._seen, self._quiet_since = (tunnel, 0), now
        elif not tunnel.complete and now - self._quiet_since >= _ENDED_PATIENCE:
            tunnel.gone = True
            self.scope.cancel()

    def hang_up(self) -> None:
        """The client has gone. Ends what is done for it; where that is nothing, whoever reads will find out."""
        self.hung_up = True
        if self.served is not None and self.served.answering is not None:
            self.served.answering.gone = True
            self.scope.cancel()

    def ended(self, outcome: Outcome, reason: str, detail: str | None = None) -> None:
        self._outcome, self._reason, self._detail = outcome, reason, detail

    def failed(self, error: Exception) -> None:
        match error:
            case Refused():
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
            peer=self.peer,
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
