"""Connections to upstreams: made, proven, shared and kept.

There is a pool (`wire.pool`) for each whole `Upstream`: the address, the IDs that will do, the server name and the protocol. A
connection is only ever given to a request that asks for exactly what that connection proved. Each carries the identity
generation that judged it; when a new one is in force it is judged again before its next request, and closed where that fails.

A kept connection may be ended by the other side at any time. What can be seen of that is seen before it is used; what cannot is
a request that comes back as `NoAnswer`, and whoever may send it again does so on one that is `fresh`. What went wrong is
told as `NotSent` (the request provably did not leave) or `MaybeSent`; nothing is retried here.

Once a second the client looks after what nobody uses: idle times and ages, peers that are gone, addresses that come back from their
ejection. Names that connections are open to are asked for again every half a minute, and what leads to an address that is
no longer in the answer is retired; where there is no answer, what works is left alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Protocol

import trio

from sidecar.errors import NotSent, OurFault, SidecarError
from sidecar.model import Address
from sidecar.wire import tls
from sidecar.wire.connector import Connector, Made
from sidecar.wire.dialling import is_literal
from sidecar.wire.endpoints import Endpoint, Endpoints
from sidecar.wire.network import Network, Stream
from sidecar.wire.pool import Pending, Pool
from sidecar.wire.pooled import SharedConnection
from sidecar.wire.upstream import ClientSettings, Upstream, UpstreamStream

__all__ = ["Client", "ClientSettings", "Upstream", "UpstreamStream"]

_LOOK_INTERVAL = 1.0
_THOROUGH = 15
"""So many looks from one that costs system calls to the next."""
_RESOLVE = 30
"""So many looks from one question for a name to the next."""
_RESOLVE_TIMEOUT = 20.0
_FORGET_AFTER = 600.0
"""What is known of an upstream that nobody asks for."""


class Tell(Protocol):
    """Told of events, by name (docs/events.md)."""

    def __call__(self, name: str, /, **fields: object) -> None: ...


def _nobody(_name: str, /, **_fields: object) -> None:
    pass


class Client:
    """All pools. `run` must be running: readers of shared connections live in its nursery."""

    def __init__(
        self,
        network: Network,
        credentials: Callable[[], tls.Credentials | None],
        settings: ClientSettings,
        *,
        log: Tell = _nobody,
        chance: random.Random | None = None,
    ) -> None:
        """`chance`: where ages and the order of addresses come from."""
        self.settings = settings
        """Replaced by a reload; what is open keeps to those that it began with."""
        self.credentials = credentials
        self.chance = chance or random.Random()  # noqa: S311  (spread, not secrets)
        self.now = 0.0
        self.keeping = False
        self._log = log
        self._connector = Connector(network, credentials, self.blame)
        self._pools: dict[Upstream, Pool] = {}
        self._targets: dict[Address, Endpoints] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry what shared connections need, and look after all of them. Ends by cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.now = trio.current_time()
                self.keeping = True
                task_status.started()
                for number in count(1):
                    await trio.sleep(_LOOK_INTERVAL)
                    self._look(thoroughly=number % _THOROUGH == 0)
                    if number % _RESOLVE == 0:
                        self._resolve_again(nursery)
        finally:
            self._nursery = None
            self.keeping = False
            self.close()

    async def open(self, upstream: Upstream, fresh: bool = False) -> UpstreamStream:
        """Return a stream on a kept or new connection that has proven what `upstream` asks for.

        `fresh`: not on an h1 connection that was kept, which may have ended unseen. Raises `NotSent` (`upstream_overloaded`
        where the bound is reached and nothing becomes free in time), `PlaintextOnly` or `PeerRejected`.
        """
        while True:
            pool = self._pools.get(upstream)
            if pool is None:
                pool = self._added(upstream)
            stream = pool.take(fresh=fresh)
            if stream is not None:
                return stream
            if pool.h1_only or pool.full:
                return await self._obtained(pool, fresh=fresh)
            pending = pool.pending
            if pending is None:
                return await self._obtained_for_all(pool, fresh=fresh)
            await pending.over.wait()  # it may have become a connection that can be shared
            if pending.fault is not None:
                stream = pool.take(fresh=fresh)  # something else may have become free meanwhile
                if stream is not None:
                    return stream
                raise _alike(pending.fault) from pending.fault

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def blame(self, endpoints: Endpoints, endpoint: Endpoint) -> None:
        """Count a failure against an address. Where that ejects it, what is open to it takes no new request."""
        settings = self.settings
        seconds = endpoints.failed(
            endpoint, trio.current_time(), max_failures=settings.max_failures, ejection=settings.ejection
        )
        if seconds:
            self._retire(endpoints, lambda address: address == endpoint.address)
            self._log(
                "upstream.ejected", target=str(endpoints.target), address=str(endpoint.address),
                failures=endpoint.failures, seconds=seconds,
            )  # fmt: skip

    # ── new connections ─────────────────────────────────────────────────────────────────────────────────────────

    def _added(self, upstream: Upstream) -> Pool:
        endpoints = self._targets.get(upstream.address)
        if endpoints is None:
            endpoints = Endpoints(upstream.address, turn=self.chance.randrange(1 << 16))
            self._targets[upstream.address] = endpoints
        pool = self._pools[upstream] = Pool(upstream, endpoints, self)
        return pool

    async def _obtained_for_all(self, pool: Pool, *, fresh: bool) -> UpstreamStream:
        """Connect while others wait. What failed for one has failed for all who waited: to try in turn would add up timeouts."""
        pending = pool.pending = Pending()
        try:
            return await self._obtained(pool, fresh=fresh)
        except SidecarError as fault:
            pending.fault = fault
            raise
        finally:
            pool.pending = None
            pending.over.set()

    async def _obtained(self, pool: Pool, *, fresh: bool) -> UpstreamStream:
        stream = await pool.place(fresh=fresh)
        if stream is not None:
            return stream
        try:
            made = await self._connector.connect(pool.upstream, pool.endpoints, self.settings)
            return self._opened(made, pool)
        finally:
            pool.leave()

    def _opened(self, made: Made, pool: Pool) -> UpstreamStream:
        protocol = pool.upstream.protocol
        if _speaks_h2(made.stream, pool.upstream):
            pool.h1_only = False
            return self._shared(made, pool)
        if protocol == "h2":
            made.stream.close()
            raise NotSent("the upstream does not speak HTTP/2", code="upstream_protocol")
        pool.h1_only = True
        return pool.keep(made)

    def _shared(self, made: Made, pool: Pool) -> UpstreamStream:
        if self._nursery is None:
            made.stream.close()
            raise OurFault("the pool is not running", code="draining")
        connection = pool.share(made)
        self._nursery.start_soon(_carry, connection, pool)
        return connection.open()

    # ── looking after them ──────────────────────────────────────────────────────────────────────────────────────

    def _look(self, *, thoroughly: bool) -> None:
        self.now = now = trio.current_time()
        for upstream, pool in list(self._pools.items()):
            pool.look(thoroughly=thoroughly)
            if pool.unused and now - pool.used_at > _FORGET_AFTER:
                del self._pools[upstream]
        for endpoints in self._targets.values():
            for endpoint in endpoints.returned(now):
                self._log("upstream.returned", target=str(endpoints.target), address=str(endpoint.address))
        if thoroughly:
            in_use = {upstream.address for upstream in self._pools}
            self._targets = {target: known for target, known in self._targets.items() if target in in_use}
            self._connector.resolver.forget(in_use)

    def _resolve_again(self, nursery: trio.Nursery) -> None:
        for target, endpoints in self._targets.items():
            if not is_literal(target.host) and any(
                len(pool) for pool in self._pools.values() if pool.endpoints is endpoints
            ):
                nursery.start_soon(self._follow, endpoints)

    async def _follow(self, endpoints: Endpoints) -> None:
        """Retire what leads to where the name does not lead any more."""
        with trio.move_on_after(_RESOLVE_TIMEOUT):
            try:
                endpoints.update(await self._connector.resolver.resolve(endpoints.target, anew=True))
            except OSError:
                return
            self._retire(endpoints, lambda address: not endpoints.holds(address))

    def _retire(self, endpoints: Endpoints, leads: Callable[[Address], bool]) -> None:
        for pool in self._pools.values():
            if pool.endpoints is endpoints:
                pool.retire(lambda connection: leads(connection.endpoint.address))


async def _carry(connection: SharedConnection, pool: Pool) -> None:
    try:
        await connection.run()
    finally:
        pool.ended(connection)


def _speaks_h2(stream: Stream, upstream: Upstream) -> bool:
    return stream.alpn == "h2" if isinstance(stream, tls.TlsStream) else upstream.protocol == "h2"


def _alike(fault: SidecarError) -> SidecarError:
    """An exception belongs to the task that raises it: each of those who waited gets one of its own."""
    return type(fault)(fault.detail, code=fault.code, public=fault.public, status=fault.status)
