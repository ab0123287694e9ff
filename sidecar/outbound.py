"""Outbound: the agent's own requests, on their way to the sidecar of the target that a route names.

The agent says `Host: localhost:8080` or whatever it knows the target by; the route says where that leads, what name is
decided on and sent, and which SPIFFE IDs the target must prove. In permissive mode a route may name a plaintext address
too. It is stepped down to only where the mTLS port is closed or does not speak TLS, never to a target that has once
proven itself, and as a new question.

An upgrade takes an HTTP/1.1 connection of its own, which every server that has upgrades understands; only a route that says
`protocol: h2` has it go as extended CONNECT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import trio

from sidecar.attempt import Attempt, Bucket, Ids, Plan, Seen, is_grpc, keep_plan, not_connect, offered, sendable
from sidecar.config import Route, RouteTable
from sidecar.errors import ClientFault, NoRoute, NotSent, PlaintextOnly
from sidecar.identity.proven import Proven
from sidecar.identity.spiffe import parse
from sidecar.model import Connection, Direction, Inquiry, Mode, Request, RequestHead, Workload, maker
from sidecar.wire import headers
from sidecar.wire.upstream import Upstream

_attempt, _inquiry, _request_head = maker(Attempt), maker(Inquiry), maker(RequestHead)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leg:
    """What a route comes to, worked out once."""

    route: Route
    upstream: Upstream
    plaintext: Upstream | None
    bucket: Bucket | None
    target: Mapping[str, object]
    plaintext_target: Mapping[str, object]


class Routes:
    """The routes in force, replaced whole by a reload."""

    def __init__(self, routes: Sequence[Route], mode: Mode, before: Routes | None = None) -> None:
        """`before`: those that these replace. Where the rate of a route is the same, its bucket stays."""
        self._table = RouteTable(routes)
        old: Mapping[str, _Leg] = {} if before is None else before._legs
        buckets = {name: leg.bucket for name, leg in old.items()}
        self._legs: Mapping[str, _Leg] = {route.name: _leg(route, mode, buckets.get(route.name)) for route in routes}
        self.allow_encoded_slash = any(route.allow_encoded_slash for route in routes)

    def leg(self, host: str, path: str) -> _Leg:
        """Raises `NoRoute`, or `ClientFault` for an encoded slash on a route that takes none.

        `OPTIONS *` asks about the server as a whole (RFC 9110 §9.3.7), and takes the route of `/`.
        """
        route = self._table.match(host, "/" if path == "*" else path)
        if route is None:
            raise NoRoute(f"{host}{path}")
        if self.allow_encoded_slash and not route.allow_encoded_slash and "%2F" in path:
            raise ClientFault(code="path_slash_encoded", public="the path holds an encoded slash")
        return self._legs[route.name]


def _leg(route: Route, mode: Mode, bucket: Bucket | None = None) -> _Leg:
    if route.rate is None or bucket is None or bucket.rate != route.rate:
        bucket = Bucket(route.rate) if route.rate is not None else None
    target = {"address": str(route.target), "spiffe_ids": sorted(route.spiffe_ids), "route": route.name}
    secured = mode != "disabled"
    return _Leg(
        route=route,
        upstream=Upstream(
            address=route.target, tls=secured, allowed=frozenset(map(parse, route.spiffe_ids)) if secured else None,
            server_name=route.authority_host if secured else None, protocol=_protocol(route, secured),
        ),
        plaintext=Upstream(address=route.plaintext, tls=False, protocol=_protocol(route, secured=False))
        if route.plaintext is not None and mode == "permissive"
        else None,
        bucket=bucket,
        target=target,
        plaintext_target={**target, "address": str(route.plaintext)},
    )  # fmt: skip


def _protocol(route: Route, secured: bool) -> Literal["auto", "h1", "h2"]:
    return "h1" if route.protocol == "auto" and not secured else route.protocol


class Outbound:
    """`exchange.Program` of the agent's listener."""

    direction: Direction = "outbound"

    def __init__(
        self,
        *,
        mode: Mode,
        routes: Callable[[], Routes],
        own_id: Callable[[], str | None],
        seen: Callable[[], Seen],
        proven: Proven,
        remember_failed: Callable[[str, OSError], None],
        pseudonym: bytes,
    ) -> None:
        self.mode = mode
        self.via = b"1.1 " + pseudonym
        self._pseudonym = pseudonym
        self._routes = routes
        self._own_id = own_id
        self._seen = seen
        self._proven = proven
        self._remember_failed = remember_failed

    def attempt(self, connection: Connection, request: Request, ids: Ids) -> Attempt:
        kept, seen, routes, own_id = request.kept, self._seen(), self._routes(), self._own_id()
        plan: Plan | None = kept.get("plan") if kept is not None else None
        if plan is not None:
            terms = plan.terms
            if terms[0] is seen and terms[1] is routes and terms[2] == own_id:
                return plan.again(ids)
        not_connect(request.head)
        headers.via_loops(request.head.fields, self._pseudonym)
        leg = routes.leg(request.head.host, request.head.target.path)
        first = self._attempt(leg, leg.upstream, leg.target, request, ids, seen, own_id)
        if leg.plaintext is not None:
            first = replace(first, step_down=lambda fault: self._stepped_down(leg, request, ids, fault))
        keep_plan(request, first, seen, routes, own_id)
        return first

    def _attempt(
        self, leg: _Leg, upstream: Upstream, target: Mapping[str, object], request: Request, ids: Ids, seen: Seen,
        own_id: str | None,
    ) -> Attempt:  # fmt: skip
        original, route = offered(request.head), leg.route
        if original.upgrade is not None:
            if upstream.protocol == "auto":
                upstream = replace(upstream, protocol="h1")
        elif is_grpc(original) and not upstream.tls:
            upstream = replace(upstream, protocol="h2")
        head = _request_head(
            method=original.method, target=original.target, host=route.authority_host, port=route.authority_port,
            fields=original.fields, protocol="HTTP/1.1", upgrade=original.upgrade,
            expects_continue=original.expects_continue,
        )  # fmt: skip
        if head.upgrade is not None:
            head = sendable(head, upstream)
        fields = headers.outbound_request(
            original.fields, own_id=own_id if upstream.tls else None, original_host=original.authority,
            request_id=ids.request, traceparent=ids.traceparent, via=self.via,
            te_trailers=original.protocol == "HTTP/2" and upstream.protocol != "h1",
        )  # fmt: skip
        inquiry = _inquiry(
            direction="outbound", caller=own_id, caller_reason="local_process", method=head.method,
            path=head.target.path, segments=head.target.segments, query=seen.query_of(head),
            headers=seen.headers_of(head, fields), mtls_mode=self.mode, tls=upstream.tls,
            host=route.authority_host, port=route.authority_port or route.target.port, protocol=original.protocol,
            target=target,
        )  # fmt: skip
        name = str(route.target)
        known = not upstream.tls or name in self._proven

        async def remember(_peer: Workload) -> None:
            try:
                await trio.to_thread.run_sync(self._proven.add, name)
            except OSError as error:
                self._remember_failed(name, error)

        return _attempt(
            upstream=upstream, head=head, fields=fields, inquiry=inquiry, reserved=seen.reserved,
            proven=None if known else remember, timeout=route.timeout, retries=route.retries, bucket=leg.bucket,
            upstream_decides=upstream.tls,
        )  # fmt: skip

    def _stepped_down(self, leg: _Leg, request: Request, ids: Ids, fault: PlaintextOnly) -> Attempt:
        """The plaintext attempt, or the fault where the target has proven itself before: then a closed port is no excuse."""
        if str(leg.route.target) in self._proven or leg.plaintext is None:
            raise NotSent(f"proven before: {fault.detail}", code="plaintext_refused_after_proof") from fault
        return self._attempt(leg, leg.plaintext, leg.plaintext_target, request, ids, self._seen(), self._own_id())
