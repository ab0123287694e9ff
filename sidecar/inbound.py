"""Inbound: callers of the agent, proven by mTLS or known to be nobody, on their way to the agent's local port.

Plans what goes to the agent: the caller's proven ID in `X-Forwarded-SPIFFE-ID`, everything that could claim an identity
removed. A request whose authority is not the name that its handshake asked for gets 421. An upgrade goes to the agent as
its protocol has it: `Upgrade` over HTTP/1.1, extended CONNECT where the agent is said to speak h2c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

from sidecar.attempt import (
    Attempt,
    Bucket,
    Ids,
    Plan,
    Seen,
    is_grpc,
    keep_plan,
    not_connect,
    not_elsewhere,
    offered,
    sendable,
)
from sidecar.config import AgentUpstream, Rate
from sidecar.model import Anonymous, Connection, Direction, Inquiry, Mode, Request, RequestHead, Workload, maker
from sidecar.wire import headers
from sidecar.wire.upstream import Upstream

_attempt, _inquiry = maker(Attempt), maker(Inquiry)


class Inbound:
    """`exchange.Program` of one inbound listener."""

    direction: Direction = "inbound"

    def __init__(
        self,
        *,
        mode: Mode,
        agent: AgentUpstream,
        xfcc: bool,
        seen: Callable[[], Seen],
        pseudonym: bytes,
        timeout: float | None = None,
        retries: int = 1,
        rate: Rate | None = None,
    ) -> None:
        """`timeout`, `retries` and `rate` are those of the listener (`config.InboundListener`)."""
        self.mode = mode
        self.via = b"1.1 " + pseudonym
        self._pseudonym = pseudonym
        self._xfcc = xfcc
        self._seen = seen
        self._timeout = timeout
        self._retries = retries
        self._bucket = Bucket(rate) if rate is not None else None
        self._protocol = agent.protocol
        self._h1 = Upstream(address=agent.address, tls=False, protocol="h1")
        self._h2 = replace(self._h1, protocol="h2")

    def attempt(self, connection: Connection, request: Request, ids: Ids) -> Attempt:
        kept, seen = request.kept, self._seen()
        plan: Plan | None = kept.get("plan") if kept is not None else None
        if plan is not None and plan.terms[0] is seen:
            return plan.again(ids)
        attempt = self._planned(connection, request, ids, seen)
        keep_plan(request, attempt, seen)
        return attempt

    def _planned(self, connection: Connection, request: Request, ids: Ids, seen: Seen) -> Attempt:
        head = request.head
        if head.upgrade is not None:
            head = offered(head)
        not_connect(head)
        not_elsewhere(connection, head)
        headers.via_loops(head.fields, self._pseudonym)
        caller = str(connection.peer.id) if isinstance(connection.peer, Workload) else None
        upstream = self._upstream(head)
        fields = headers.inbound_request(
            head.fields, caller=caller, remote=connection.remote.host, scheme_tls=connection.tls, host=head.authority,
            request_id=ids.request, traceparent=ids.traceparent, via=self.via,
            xfcc=_xfcc(caller) if self._xfcc and caller else None, te_trailers=upstream.protocol == "h2",
        )  # fmt: skip
        sent = head if head.upgrade is None else sendable(head, upstream)
        inquiry = _inquiry(
            direction="inbound", caller=caller,
            caller_reason=connection.peer.reason if isinstance(connection.peer, Anonymous) else None,
            method=head.method, path=head.target.path, segments=head.target.segments, query=seen.query_of(head),
            headers=seen.headers_of(sent, fields), mtls_mode=self.mode, tls=connection.tls,
            host=head.host, port=head.port or connection.local.port, protocol=head.protocol,
        )  # fmt: skip
        return _attempt(
            upstream=upstream, head=sent, fields=fields, inquiry=inquiry, reserved=seen.reserved,
            timeout=self._timeout, retries=self._retries, bucket=self._bucket,
        )  # fmt: skip

    def _upstream(self, head: RequestHead) -> Upstream:
        if self._protocol == "h1":
            return self._h1
        if self._protocol == "h2c" or (is_grpc(head) and head.upgrade is None):
            return self._h2
        return self._h1


def _xfcc(caller: str) -> str:
    return f"URI={quote(caller, safe=':/')}"
