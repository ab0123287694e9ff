"""One way to send a request, planned before anybody is asked: where to, with which head and fields, and the question.

What the programs plan alike stands here too. No I/O.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from sidecar.errors import ClientFault, PlaintextOnly
from sidecar.model import Fields, Inquiry, RequestHead, Workload
from sidecar.wire.client import Upstream
from sidecar.wire.target import query_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to send a request, and the question about exactly that."""

    upstream: Upstream
    head: RequestHead
    """As it is sent: authority and target are those of the question."""
    fields: Fields
    inquiry: Inquiry
    reserved: frozenset[bytes] = frozenset()
    """Folded names that policy sees: what it was shown in the head may not come again in the trailers."""
    proven: Callable[[Workload], Awaitable[None]] | None = None
    """Told when the upstream has proven itself, before anything is sent to it."""
    step_down: Callable[[PlaintextOnly], Attempt] | None = None
    """What to ask for instead where the upstream does not speak TLS; raises the fault where that may not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    exchange: str
    request: str
    trace: str | None
    traceparent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The names that policy sees. Folded and encoded once, since each request asks."""

    headers: frozenset[bytes]
    query: frozenset[str]
    reserved: frozenset[bytes] = frozenset()
    """The same header names, folded."""

    def query_of(self, head: RequestHead) -> dict[str, tuple[str, ...]]:
        if not self.query:
            return {}
        pairs = query_pairs(head.target.query)
        return {name: values for name, values in pairs.items() if name in self.query}


def not_connect(head: RequestHead) -> None:
    """Raise `ClientFault` for CONNECT: it has no target that could be sent on, and no tunnel waits behind it."""
    if head.method == "CONNECT":
        raise ClientFault(code="connect_unsupported", public="CONNECT is not available here", status=501)


_NOT_TUNNELLED = frozenset({"h2c", "h2", "http", "tls"})
"""Upgrades of the connection itself, which would let a second protocol past policy."""


def is_grpc(head: RequestHead) -> bool:
    return any(name == b"content-type" and value.startswith(b"application/grpc") for name, value in head.fields)


def sendable(head: RequestHead, upstream: Upstream) -> RequestHead:
    """The head without an upgrade that the upstream's protocol cannot carry, or that is none of the application's."""
    if head.upgrade is None:
        return head
    token = head.upgrade.partition("/")[0].lower()
    return head if upstream.protocol == "h1" and token not in _NOT_TUNNELLED else replace(head, upgrade=None)
