"""Connections to upstreams: made, proven, shared and kept.

The pool's key is the whole `Upstream`: the address, the IDs that will do, the server name and the protocol. A connection is only ever
given to a request that asks for exactly what that connection proved. Each carries the identity generation that judged it; when
a new one is in force it is judged again before its next request, and closed where that fails.

What went wrong is told as `NotSent` (the request provably did not leave) or `MaybeSent`; nothing is retried here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import trio

from sidecar.errors import NotSent, OurFault, PeerRejected, PlaintextOnly, SidecarError
from sidecar.model import Address, Body, ByteStream, Fields, RequestHead, ResponseHead, SpiffeId, Workload
from sidecar.wire import tls
from sidecar.wire.h1_client import H1Connection
from sidecar.wire.h2_client import H2Connection
from sidecar.wire.network import Network, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Where a request goes and what must be proven there. Two that are equal may share connections."""

    address: Address
    tls: bool
    allowed: frozenset[SpiffeId] | None = None
    """The IDs that will do; None for any that is proven. Only with `tls`."""
    server_name: str | None = None
    protocol: Literal["auto", "h1", "h2"] = "h1"
    """auto asks by ALPN, and is h1 without TLS."""


class UpstreamStream(Protocol):
    """One request to an upstream and its answer. `release` is called once, whatever happened."""

    @property
    def reused(self) -> bool:
        """Whether the connection has carried an exchange before this one."""
        ...

    @property
    def peer(self) -> Workload | None: ...

    @property
    def body(self) -> Body:
        """Of the final answer, once `receive` has returned its head."""
        ...

    async def send(self, head: RequestHead, fields: Fields, body: Body) -> None:
        """Send the request and pull its body to the end. `fields` are final, without Host.

        Raises `NotSent` or `MaybeSent`, and lets what `body.receive` raises pass.
        """
        ...

    async def receive(self) -> ResponseHead:
        """Return the next head: any number of 1xx, then the final one. Raises `MaybeSent`."""
        ...

    def tunnel(self) -> ByteStream: ...

    def release(self) -> None:
        """Keep the connection where both messages ended in order; else make the upstream see the abort."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    connect_timeout: float = 5.0
    handshake_timeout: float = 5.0
    idle_timeout: float = 3600.0
    max_idle: int = 256
    """Kept h1 connections per upstream."""
    max_header_bytes: int = 60 * 1024
    max_header_fields: int = 100


_REAP_INTERVAL = 15.0


class Client:
    """The pool. `run` must be running: readers of shared connections live in its nursery."""

    def __init__(
        self, network: Network, credentials: Callable[[], tls.Credentials | None], settings: ClientSettings
    ) -> None:
        self.settings = settings
        self._network = network
        self._credentials = credentials
        self._idle: dict[Upstream, list[_Kept]] = {}
        self._shared: dict[Upstream, list[_Shared]] = {}
        self._connecting: dict[Upstream, _Pending] = {}
        self._h1_only: set[Upstream] = set()
        """Upstreams that chose h1 when they were last asked: nothing is shared there, so that nobody need wait for another."""
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry what shared connections need, and close what has been idle for too long. Ends by cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(_REAP_INTERVAL)
                    self._reap()
        finally:
            self._nursery = None
            self.close()

    async def open(self, upstream: Upstream) -> UpstreamStream:
        """Return a stream on a kept or new connection that has proven what `upstream` asks for.

        Raises `NotSent`, `PlaintextOnly` or `PeerRejected`.
        """
        while (stream := self._take(upstream)) is None:
            if upstream.protocol == "h1" or upstream in self._h1_only:
                return self._opened(*await self._connect(upstream), upstream)
            pending = self._connecting.get(upstream)
            if pending is None:
                return await self._open_for_all(upstream)
            await pending.over.wait()  # it may have become a connection that can be shared
            if pending.fault is not None:
                raise _alike(pending.fault) from pending.fault
        return stream

    async def _open_for_all(self, upstream: Upstream) -> UpstreamStream:
        """Connect while others wait. What failed for one has failed for all who waited: to try in turn would add up timeouts."""
        pending = self._connecting[upstream] = _Pending()
        try:
            return self._opened(*await self._connect(upstream), upstream)
        except SidecarError as fault:
            pending.fault = fault
            raise
        finally:
            del self._connecting[upstream]
            pending.over.set()

    def _opened(self, stream: Stream, proof: _Proof | None, upstream: Upstream) -> UpstreamStream:
        if _speaks_h2(stream, upstream):
            self._h1_only.discard(upstream)
            return self._share(stream, proof, upstream)
        if upstream.protocol == "auto":
            self._h1_only.add(upstream)
        return self._keep_h1(stream, proof, upstream)

    def close(self) -> None:
        for kept in self._idle.values():
            for connection in kept:
                connection.close()
        self._idle.clear()
        for shared in self._shared.values():
            for multiplexed in shared:
                multiplexed.h2.close_when_idle()
        self._shared.clear()

    def _take(self, upstream: Upstream) -> UpstreamStream | None:
        for connection in self._shared.get(upstream, ()):
            if connection.h2.accepting:
                if self._still_proven(connection.proof, upstream):
                    return connection.h2.open()
                connection.h2.close_when_idle()
            elif not connection.h2.claimed:
                connection.h2.close_when_idle()  # it carries nothing, and takes nothing either
        kept = self._idle.get(upstream)
        while kept:
            candidate = kept.pop()
            if not candidate.stale() and self._still_proven(candidate.proof, upstream):
                candidate.renew()
                return candidate
            candidate.close()
        return None

    def _still_proven(self, proof: _Proof | None, upstream: Upstream) -> bool:
        if proof is None:
            return True
        credentials = self._credentials()
        if credentials is None or time.time() >= proof.peer.not_after:
            return False
        if credentials.generation != proof.generation:
            try:
                credentials.judge(proof.facts, upstream.allowed)
            except PeerRejected:
                return False
            proof.generation = credentials.generation
        return True

    async def _connect(self, upstream: Upstream) -> tuple[Stream, _Proof | None]:
        try:
            with trio.fail_after(self.settings.connect_timeout):
                sock = await self._network.connect(upstream.address)
        except trio.TooSlowError as error:
            raise NotSent("no connection in time", code="upstream_connect_timeout", status=504) from error
        except ConnectionRefusedError as error:
            fault = PlaintextOnly if upstream.tls else NotSent
            raise fault(str(error), code="upstream_refused") from error
        except socket.gaierror as error:
            raise NotSent(str(error), code="upstream_unresolved") from error
        except OSError as error:
            raise NotSent(str(error)) from error
        if not upstream.tls:
            return Stream(sock), None
        return await self._secured(sock, upstream)

    async def _secured(self, sock: socket.socket, upstream: Upstream) -> tuple[Stream, _Proof]:
        credentials = self._credentials()
        if credentials is None:
            sock.close()
            raise OurFault("no identity in force", code="identity_missing")
        alpn = {"auto": ("h2", "http/1.1"), "h2": ("h2",), "h1": ("http/1.1",)}[upstream.protocol]
        try:
            with trio.fail_after(self.settings.handshake_timeout):
                stream = await tls.connect(
                    sock,
                    credentials.client_context(alpn),
                    lambda facts: credentials.judge(facts, upstream.allowed),
                    upstream.server_name,
                )
        except trio.TooSlowError as error:
            raise NotSent("no handshake in time", code="upstream_handshake_timeout", status=504) from error
        return stream, _Proof(stream, credentials.generation)

    def _keep_h1(self, stream: Stream, proof: _Proof | None, upstream: Upstream) -> _Kept:
        if upstream.protocol == "h2" and isinstance(stream, tls.TlsStream):
            stream.close()
            raise NotSent("the upstream does not speak HTTP/2", code="upstream_protocol")
        return _Kept(stream, proof, self.settings, lambda kept: self._give_back(kept, upstream))

    def _give_back(self, kept: _Kept, upstream: Upstream) -> None:
        idle = self._idle.setdefault(upstream, [])
        if self._nursery is None or len(idle) >= self.settings.max_idle:
            kept.close()
        else:
            kept.idle_since = trio.current_time()
            idle.append(kept)

    def _share(self, stream: Stream, proof: _Proof | None, upstream: Upstream) -> UpstreamStream:
        if self._nursery is None:
            stream.close()
            raise OurFault("the pool is not running", code="draining")
        h2 = H2Connection(
            stream,
            max_header_bytes=self.settings.max_header_bytes,
            max_header_fields=self.settings.max_header_fields,
            peer=proof.peer if proof else None,
        )
        shared = _Shared(h2, proof)
        self._shared.setdefault(upstream, []).append(shared)
        self._nursery.start_soon(self._carry, shared, upstream)
        return shared.h2.open()

    async def _carry(self, shared: _Shared, upstream: Upstream) -> None:
        try:
            await shared.h2.run()
        finally:
            connections = self._shared.get(upstream, [])
            if shared in connections:
                connections.remove(shared)
                if not connections:
                    del self._shared[upstream]

    def _reap(self) -> None:
        """Close what nobody has used for `idle_timeout`, or what the other side has closed."""
        oldest = trio.current_time() - self.settings.idle_timeout
        for upstream, kept in list(self._idle.items()):
            alive = [connection for connection in kept if connection.idle_since > oldest and not connection.stale()]
            for connection in kept:
                if connection not in alive:
                    connection.close()
            if alive:
                self._idle[upstream] = alive
            else:
                del self._idle[upstream]
        self._h1_only &= self._idle.keys()
        for shared in self._shared.values():
            for multiplexed in shared:
                if multiplexed.h2.idle_since < oldest:
                    multiplexed.h2.close_when_idle()


class _Pending:
    """A connection that is being made, and that others wait for."""

    __slots__ = ("fault", "over")

    def __init__(self) -> None:
        self.over = trio.Event()
        self.fault: SidecarError | None = None


class _Proof:
    """What a connection proved, and under which generation of our trust that was last judged."""

    __slots__ = ("facts", "generation", "peer")

    def __init__(self, stream: tls.TlsStream, generation: int) -> None:
        self.facts = stream.facts
        self.peer = stream.peer
        self.generation = generation


class _Kept(H1Connection):
    """An h1 connection that goes back to the pool when its exchange ends in order."""

    __slots__ = ("_give_back", "proof")

    def __init__(
        self, stream: Stream, proof: _Proof | None, settings: ClientSettings, give_back: Callable[[_Kept], None]
    ) -> None:
        super().__init__(
            stream,
            max_header_bytes=settings.max_header_bytes,
            max_header_fields=settings.max_header_fields,
            opened_at=trio.current_time(),
        )
        self.proof = proof
        self._give_back = give_back

    @property
    def peer(self) -> Workload | None:
        return None if self.proof is None else self.proof.peer

    def release(self) -> None:
        if self.reusable:
            self._give_back(self)
        elif self.untouched or self.finished:
            self.close()
        else:
            self.abort()


class _Shared:
    __slots__ = ("h2", "proof")

    def __init__(self, h2: H2Connection, proof: _Proof | None) -> None:
        self.h2 = h2
        self.proof = proof


def _speaks_h2(stream: Stream, upstream: Upstream) -> bool:
    return stream.alpn == "h2" if isinstance(stream, tls.TlsStream) else upstream.protocol == "h2"


def _alike(fault: SidecarError) -> SidecarError:
    """An exception belongs to the task that raises it: each of those who waited gets one of its own."""
    return type(fault)(fault.detail, code=fault.code, public=fault.public, status=fault.status)
