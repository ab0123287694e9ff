"""One way to send a request, planned before anybody is asked: where to, with which head and fields, and the question.
Or who answers it here, where nothing is sent on.

What the programs plan alike stands here too. No I/O.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from sidecar.config import Rate
from sidecar.errors import ClientFault, PlaintextOnly, RateLimited
from sidecar.model import Connection, Fields, Inquiry, Permit, Request, RequestHead, Response, Workload, maker
from sidecar.wire import headers
from sidecar.wire.target import query_pairs
from sidecar.wire.upstream import Upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to send a request, and the question about exactly that."""

    upstream: Upstream
    head: RequestHead
    """As it is sent: authority and target are those of the question."""
    fields: Fields = field(repr=False)
    inquiry: Inquiry
    reserved: frozenset[bytes] = frozenset()
    """Folded names that policy sees: what it was shown in the head may not come again in the trailers."""
    proven: Callable[[Workload], Awaitable[None]] | None = None
    """Told when the upstream has proven itself, before anything is sent to it."""
    step_down: Callable[[PlaintextOnly], Attempt] | None = None
    """What to ask for instead where the upstream does not speak TLS; raises the fault where that may not be."""
    timeout: float | None = None
    """Seconds from the head of the request to the end of its answer; None: as long as something moves."""
    retries: int = 1
    """How often what was provably not sent is tried again."""
    bucket: Bucket | None = None
    """What a token is taken from before anybody is asked."""
    upstream_decides: bool = False
    """Whether the upstream is a sidecar, whose `X-Decision-Id` tells of a decision. From others it is a claim, and removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAnswer:
    """A request that is answered here, and the question about it."""

    head: RequestHead
    inquiry: Inquiry
    answer: Callable[[Permit], Awaitable[Response]]
    """Asked for it once that is permitted. Raises `SidecarError`, or `Aborted` where the body of the request broke off."""
    timeout: float | None = None
    bucket: Bucket | None = None
    upstream: None = None


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

    def headers_of(self, head: RequestHead, fields: Fields) -> dict[str, tuple[str, ...]]:
        """What policy sees of the fields that are sent. `Upgrade` is none of them, being of one connection only: it is
        taken from the head that is sent, in lower case, since the names of protocols have no other (RFC 9110 §7.8).
        """
        if not self.headers:
            return {}
        seen = headers.policy_headers(fields, self.headers)
        if head.upgrade is not None and b"upgrade" in self.headers:
            seen["upgrade"] = (head.upgrade.lower(),)
        return seen


_attempt = maker(Attempt)
_OF_EACH = frozenset({b"x-request-id", b"traceparent"})
"""Fields that differ from one request to the next that is otherwise the same."""


class Plan:
    """An attempt that serves again for the same head of the same client, under other ids.

    `terms`: all that it followed from besides, and which holds for as long as it is what it was.
    """

    __slots__ = ("attempt", "ids_at", "terms")

    def __init__(self, attempt: Attempt, terms: tuple[object, ...]) -> None:
        self.attempt = attempt
        self.terms = terms
        self.ids_at = headers.ids_at(attempt.fields)

    def again(self, ids: Ids) -> Attempt:
        first = self.attempt
        return _attempt(
            upstream=first.upstream, head=first.head,
            fields=headers.with_ids(first.fields, self.ids_at, ids.request, ids.traceparent),
            inquiry=first.inquiry, reserved=first.reserved, timeout=first.timeout, retries=first.retries,
            bucket=first.bucket, upstream_decides=first.upstream_decides,
        )  # fmt: skip


def keep_plan(request: Request, attempt: Attempt, seen: Seen, *terms: object) -> None:
    """Keep an attempt for the next request with this head, where the head is remembered and nothing of the attempt is of this
    request alone: ids that policy sees, a proof that is still to be had, a way down, or a `tracestate`, which goes on with the
    parent that it came with and with no other.
    """
    kept = request.kept
    if (
        kept is not None
        and attempt.proven is None
        and attempt.step_down is None
        and not (seen.headers | seen.reserved) & _OF_EACH
        and not any(name == b"tracestate" for name, _ in request.head.fields)
    ):
        kept["plan"] = Plan(attempt, (seen, *terms))


_WHOLE = 1 - 1e-6
"""A token, but for what is lost in counting: whoever waits for just as long as was said must get it."""


class Bucket:
    """The tokens of one route or listener (`config.Rate`). The clock is its caller's, in seconds, and never goes back."""

    __slots__ = ("_at", "_tokens", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._tokens = float(rate.burst)
        self._at = -math.inf

    def take(self, now: float) -> None:
        """Take a token. Raises `RateLimited`, with the seconds until there is one again."""
        rate = self.rate
        tokens = min(float(rate.burst), self._tokens + (now - self._at) * rate.per_second)
        self._at = now
        if tokens < _WHOLE:
            self._tokens = tokens
            raise RateLimited((1 - tokens) / rate.per_second)
        self._tokens = tokens - 1


def not_connect(head: RequestHead) -> None:
    """Raise `ClientFault` for CONNECT: it has no target that could be sent on, and no tunnel waits behind it."""
    if head.method == "CONNECT":
        raise ClientFault(code="connect_unsupported", public="CONNECT is not available here", status=501)


def not_elsewhere(connection: Connection, head: RequestHead) -> None:
    """Raise `ClientFault` (421) where the client asked for another host when it connected (SNI) than it does now."""
    if connection.server_name is not None and head.host != connection.server_name:
        raise ClientFault(
            f"{head.host} was asked of {connection.server_name}",
            code="authority_mismatch", public="this connection was made for another host", status=421,
        )  # fmt: skip


_NOT_TUNNELLED = ("http", "tls", "h2")
"""How the names of protocols begin that would take over the connection itself, and let requests past policy."""


def is_grpc(head: RequestHead) -> bool:
    return any(name == b"content-type" and value.startswith(b"application/grpc") for name, value in head.fields)


def offered(head: RequestHead) -> RequestHead:
    """The head without an upgrade that is none of the application's. An ordinary request is what remains, since a server
    may ignore an upgrade (RFC 9110 §7.8). Over HTTP/2 nothing would remain (RFC 8441 §4): there it is `ClientFault` 501.
    """
    if head.upgrade is None or not head.upgrade.lower().startswith(_NOT_TUNNELLED):
        return head
    if head.protocol == "HTTP/2":
        raise ClientFault(code="tunnel_unsupported", public="there is no tunnel for this protocol", status=501)
    return replace(head, upgrade=None)


def sendable(head: RequestHead, upstream: Upstream) -> RequestHead:
    """The head as this upstream can be sent it. Extended CONNECT stands for GET: another method's upgrade is left out."""
    if head.upgrade is None or upstream.protocol == "h1" or head.method == "GET":
        return head
    return replace(head, upgrade=None)
