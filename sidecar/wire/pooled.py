"""Connections that belong to a pool: each knows its address and its time, and tells when it has become free.

What they carry is the business of `h1_client` and `h2_client`. Here stands what a pool adds: that an exchange speaks for the
address of its connection or against it, and that what ends in order goes back.
"""

from __future__ import annotations

import random
from typing import Protocol

import trio

from sidecar.model import Workload
from sidecar.wire import tls
from sidecar.wire.connector import Made
from sidecar.wire.endpoints import Endpoint, Endpoints
from sidecar.wire.h1_client import H1Connection, Known
from sidecar.wire.h2_client import H2Connection
from sidecar.wire.h2_exchange import UpstreamExchange
from sidecar.wire.recent import Recent
from sidecar.wire.upstream import ClientSettings

_JITTER = 0.1


class Terms(Protocol):
    """What holds for all pools of a client."""

    settings: ClientSettings
    now: float
    """trio's clock, as of the client's last look: a second old at most, and free to read."""

    keeping: bool
    """Whether connections that come back are kept."""
    chance: random.Random

    def credentials(self) -> tls.Credentials | None: ...

    def blame(self, endpoints: Endpoints, endpoint: Endpoint) -> None: ...


class Home(Protocol):
    """The pool, as its connections know it."""

    @property
    def endpoints(self) -> Endpoints: ...

    @property
    def terms(self) -> Terms: ...

    @property
    def recent(self) -> Recent[Known]: ...

    def give_back(self, kept: KeptConnection) -> None: ...

    def serve(self) -> None: ...

    def ended(self, connection: KeptConnection | SharedConnection) -> None: ...


def _expires_at(terms: Terms) -> float:
    return trio.current_time() + terms.settings.max_age * terms.chance.uniform(1 - _JITTER, 1 + _JITTER)


class KeptConnection(H1Connection):
    """An h1 connection that goes back to its pool when its exchange ends in order."""

    __slots__ = ("_blamed", "_pool", "endpoint", "expires_at", "proof", "retired")

    def __init__(self, made: Made, pool: Home) -> None:
        settings = pool.terms.settings
        super().__init__(
            made.stream,
            max_header_bytes=settings.max_header_bytes,
            max_header_fields=settings.max_header_fields,
            opened_at=trio.current_time(),
            recent=pool.recent,
        )
        self.proof = made.proof
        self.endpoint = made.endpoint
        self.expires_at = _expires_at(pool.terms)
        self.retired = False
        self._blamed = False
        self._pool = pool

    @property
    def peer(self) -> Workload | None:
        return None if self.proof is None else self.proof.peer

    def failed(self) -> None:
        self._blamed = True
        self._pool.terms.blame(self._pool.endpoints, self.endpoint)

    def release(self) -> None:
        if self.endpoint.failures:
            if not self._blamed and self.finished:
                self.endpoint.failures = 0
            self._blamed = False
        if self.reusable and not self.retired:
            self._pool.give_back(self)
        elif self.untouched or self.finished:
            self.close()
        else:
            self.abort()

    def close(self) -> None:
        super().close()
        self._pool.ended(self)

    def abort(self) -> None:
        super().abort()
        self._pool.ended(self)


class SharedConnection(H2Connection):
    """An h2 connection that tells its pool when a stream has become free."""

    def __init__(self, made: Made, pool: Home) -> None:
        settings = pool.terms.settings
        super().__init__(
            made.stream,
            max_header_bytes=settings.max_header_bytes,
            max_header_fields=settings.max_header_fields,
            keepalive_timeout=settings.keepalive_timeout,
            peer=made.proof.peer if made.proof else None,
        )
        self.proof = made.proof
        self.endpoint = made.endpoint
        self.expires_at = _expires_at(pool.terms)
        self.pool = pool

    def open(self) -> _Exchange:
        self.claimed += 1
        self.exchanges += 1
        return _Exchange(self, reused=self.exchanges > 1)

    def released(self) -> None:
        super().released()
        self.pool.serve()


class _Exchange(UpstreamExchange):
    """A stream that speaks for the address of its connection, or against it."""

    __slots__ = ("_blamed", "_on")

    def __init__(self, connection: SharedConnection, *, reused: bool) -> None:
        super().__init__(connection, reused=reused)
        self._on = connection
        self._blamed = False

    def failed(self) -> None:
        self._blamed = True
        self._on.pool.terms.blame(self._on.pool.endpoints, self._on.endpoint)

    def release(self) -> None:
        if self._on.endpoint.failures and not (self._blamed or self._unanswered or self._released):
            self._on.endpoint.failures = 0
        super().release()
