"""Upstreams as those see them who send there: where a request goes, what must be proven there, and the stream that one gets.

Values and protocols only. `wire.client` is who hands out the streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from sidecar.model import Address, Body, ByteStream, Fields, RequestHead, ResponseHead, SpiffeId, Workload


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
    name: str = field(init=False, compare=False, repr=False)
    """The address as it is written down."""
    _hash: int = field(init=False, compare=False, repr=False)
    """Each request looks for its pool by this, and hashing what holds frozen values costs a call for each of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(self.address))
        object.__setattr__(self, "_hash", hash((self.address, self.tls, self.allowed, self.server_name, self.protocol)))

    def __hash__(self) -> int:
        return self._hash


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

    def failed(self) -> None:
        """Count this exchange against the address that it went to: it broke off or was silent before the head of an
        answer, or the answer was one of a gateway (502, 503, 504). Not for what is tried again since `reused`.

        Called at most once, before `release` or after. What is released with an answer, and is not said to have
        failed, speaks for the address.
        """
        ...

    def release(self) -> None:
        """Keep the connection where both messages ended in order; else make the upstream see the abort."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    connect_timeout: float = 5.0
    """To be resolved and connected to; and apart from that, to be given a place among `max_connections`."""
    handshake_timeout: float = 5.0
    idle_timeout: float = 60.0
    """A kept connection that nobody has used for so long is closed."""
    max_age: float = 3600.0
    """A connection this old takes no new request; ±10 % for each, so that not all end at once."""
    keepalive_timeout: float = 60.0
    """A connection that has been quiet for so long is asked whether its peer is still there."""
    max_connections: int = 512
    """Open or being made to one upstream; and as many requests more may wait for one of them."""
    max_connecting: int = 32
    """Being made at once: a pool that has lost all it had, by a rotation or a restart, is refilled and not stormed."""
    max_idle: int = 256
    """Kept h1 connections per upstream."""
    max_failures: int = 5
    """In a row, after which an address is ejected."""
    ejection: float = 30.0
    """Seconds of the first ejection of an address; see `wire.endpoints`."""
    max_header_bytes: int = 60 * 1024
    max_header_fields: int = 100
