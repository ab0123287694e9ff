"""A new connection to an upstream: resolved, connected, secured and proven.

What goes wrong is told as `NotSent`, since nothing was sent: `PlaintextOnly` where every address refuses or the answer is not
TLS, `PeerRejected` where somebody else answers. What speaks against the address is counted against it (`wire.endpoints`): refusals,
resets, silence, broken handshakes. Being the wrong one does not, nor does refusing us: that is about identities, and the
next address would say the same. Nor does what this machine lacks.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

import trio

from sidecar.errors import NotSent, OperatorFault, OurFault, PeerRejected, PlaintextOnly
from sidecar.model import SpiffeId
from sidecar.wire import tls
from sidecar.wire.dialling import Resolver, race
from sidecar.wire.endpoints import Endpoint, Endpoints
from sidecar.wire.network import Network, Stream, keep_alive
from sidecar.wire.upstream import ClientSettings, Upstream

_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
"""Descriptors, memory, local ports."""
_BROKE_OFF = {"handshake_aborted", "handshake_failed"}


class Proof:
    """What a connection proved, and under which generation of our trust that was last judged."""

    __slots__ = ("facts", "generation", "peer")

    def __init__(self, stream: tls.TlsStream, generation: int) -> None:
        self.facts = stream.facts
        self.peer = stream.peer
        self.generation = generation

    def holds(self, credentials: tls.Credentials | None, allowed: frozenset[SpiffeId] | None) -> bool:
        """Whether it is still good under what is in force now. Judges again where that has changed."""
        if credentials is None or time.time() >= self.peer.not_after:
            return False
        if credentials.generation != self.generation:
            try:
                credentials.judge(self.facts, allowed)
            except PeerRejected:
                return False
            self.generation = credentials.generation
        return True


class Made(NamedTuple):
    stream: Stream
    proof: Proof | None
    """None without TLS."""
    endpoint: Endpoint


class Connector:
    """Makes connections. Keeps none."""

    def __init__(
        self,
        network: Network,
        credentials: Callable[[], tls.Credentials | None],
        blame: Callable[[Endpoints, Endpoint], None],
    ) -> None:
        self.resolver = Resolver(network)
        self._network = network
        self._credentials = credentials
        self._blame = blame

    async def connect(self, upstream: Upstream, endpoints: Endpoints, settings: ClientSettings) -> Made:
        """Connect to one of the addresses. Raises `NotSent`, `PlaintextOnly`, `PeerRejected`, or `OurFault`."""
        endpoint, sock = await self._reached(upstream, endpoints, settings)
        keep_alive(sock, settings.keepalive_timeout)
        if not upstream.tls:
            return Made(Stream(sock), None, endpoint)
        try:
            stream, proof = await self._secured(sock, upstream, settings)
        except (NotSent, tls.HandshakeFailed) as fault:
            if isinstance(fault, NotSent) or fault.code in _BROKE_OFF:
                self._blame(endpoints, endpoint)
            raise
        return Made(stream, proof, endpoint)

    async def _reached(
        self, upstream: Upstream, endpoints: Endpoints, settings: ClientSettings
    ) -> tuple[Endpoint, socket.socket]:
        under_way: set[Endpoint] = set()

        async def attempt(endpoint: Endpoint) -> socket.socket:
            under_way.add(endpoint)
            try:
                sock = await self._network.connect(endpoint.address)
            except OSError as error:
                under_way.remove(endpoint)
                if error.errno not in _OURS:
                    self._blame(endpoints, endpoint)
                raise
            under_way.remove(endpoint)
            return sock

        try:
            with trio.fail_after(settings.connect_timeout):
                endpoints.update(await self.resolver.resolve(upstream.address))
                return await race(attempt, endpoints.in_order())
        except trio.TooSlowError as error:
            for endpoint in under_way:
                self._blame(endpoints, endpoint)
            raise NotSent("no connection in time", code="upstream_connect_timeout", status=504) from error
        except ConnectionRefusedError as error:
            fault = PlaintextOnly if upstream.tls else NotSent
            raise fault(str(error), code="upstream_refused") from error
        except socket.gaierror as error:
            raise NotSent(str(error), code="upstream_unresolved") from error
        except OSError as error:
            raise NotSent(str(error)) from error

    async def _secured(self, sock: socket.socket, upstream: Upstream, settings: ClientSettings) -> tuple[Stream, Proof]:
        credentials = self._credentials()
        if credentials is None:
            sock.close()
            raise OurFault("no identity in force", code="identity_missing")
        alpn = {"auto": ("h2", "http/1.1"), "h2": ("h2",), "h1": ("http/1.1",)}[upstream.protocol]
        try:
            context = credentials.client_context(alpn)
        except OperatorFault as fault:
            sock.close()
            raise OurFault(str(fault), code=fault.code) from fault
        try:
            with trio.fail_after(settings.handshake_timeout):
                stream = await tls.connect(
                    sock,
                    context,
                    lambda facts: credentials.judge(facts, upstream.allowed),
                    upstream.server_name,
                )
        except trio.TooSlowError as error:
            raise NotSent("no handshake in time", code="upstream_handshake_timeout", status=504) from error
        return stream, Proof(stream, credentials.generation)
