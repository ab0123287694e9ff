"""What is planned for a caller's request: where it goes, as whom, and what is asked about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.attempt import Attempt, Ids, Seen
from sidecar.config import AgentUpstream, Rate
from sidecar.errors import ClientFault, RateLimited
from sidecar.inbound import Inbound
from sidecar.model import Address, Anonymous, Connection, Request, RequestHead, SpiffeId, Target, Workload
from sidecar.wire.answers import Whole
from sidecar.wire.upstream import Upstream

AGENT = Address(host="127.0.0.1", port=8000)
CALLER = Workload(id=SpiffeId(trust_domain="a.test", path="/ns/demo/caller"), not_after=2e9)
MTLS = Connection(
    id="c1", peer=CALLER, remote=Address(host="10.0.0.9", port=40000), local=Address(host="10.0.0.1", port=8443), tls=True,
    server_name=None, protocol="h1", generation=1,
)  # fmt: skip
PLAINTEXT = replace(MTLS, peer=Anonymous(reason="plaintext"), tls=False, generation=0)
IDS = Ids(exchange="e1", request="r1", trace="t1", traceparent="00-t1-p1-00")
HEAD = RequestHead(
    method="POST", target=Target(path="/a/b", query="q=1&q=2&secret=3", segments=("a", "b")), host="me.test", port=None,
    fields=(), protocol="HTTP/1.1",
)  # fmt: skip


def program(**given: Any) -> Inbound:
    settings: dict[str, Any] = {
        "mode": "strict", "agent": AgentUpstream(address=AGENT), "xfcc": False, "pseudonym": b"us",
        "seen": lambda: Seen(headers=frozenset({b"x-tenant"}), query=frozenset({"q"})),
    }  # fmt: skip
    return Inbound(**settings | given)


def planned(connection: Connection = MTLS, by: Inbound | None = None, **head: Any) -> Attempt:
    request = Request(head=replace(HEAD, **head), body=Whole())
    return (by or program()).attempt(connection, request, IDS)


def test_a_proven_caller_goes_to_the_agent_under_its_id():
    attempt = planned(fields=[(b"x-tenant", b"t"), (b"x-forwarded-spiffe-id", b"spiffe://a.test/admin")])
    assert attempt.upstream == Upstream(address=AGENT, tls=False, protocol="h1")
    assert attempt.head.target == HEAD.target
    assert attempt.head.authority == "me.test"
    fields = dict(attempt.fields)
    assert fields[b"x-forwarded-spiffe-id"] == b"spiffe://a.test/ns/demo/caller"
    assert (fields[b"x-request-id"], fields[b"traceparent"]) == (b"r1", b"00-t1-p1-00")
    assert (fields[b"x-forwarded-for"], fields[b"x-forwarded-proto"]) == (b"10.0.0.9", b"https")
    assert fields[b"via"] == b"1.1 us"
    assert b"x-forwarded-client-cert" not in fields
    assert len(fields) == len(attempt.fields)
    assert (attempt.proven, attempt.step_down) == (None, None)


def test_the_question_holds_what_is_sent_and_of_the_rest_only_what_is_listed():
    inquiry = planned(fields=[(b"x-tenant", b"t"), (b"x-tenant", b"u"), (b"authorization", b"secret")]).inquiry
    assert (inquiry.direction, inquiry.caller, inquiry.caller_reason) == (
        "inbound", "spiffe://a.test/ns/demo/caller", None,
    )  # fmt: skip
    assert (inquiry.method, inquiry.path, tuple(inquiry.segments)) == ("POST", "/a/b", ("a", "b"))
    assert inquiry.query == {"q": ("1", "2")}
    assert inquiry.headers == {"x-tenant": ("t", "u")}
    assert (inquiry.mtls_mode, inquiry.tls, inquiry.host, inquiry.port) == ("strict", True, "me.test", 8443)
    assert (inquiry.target, inquiry.claims, inquiry.credential) == (None, None, None)


def test_nobody_is_asked_about_as_nobody():
    attempt = planned(PLAINTEXT, program(mode="permissive", xfcc=True))
    assert (attempt.inquiry.caller, attempt.inquiry.caller_reason) == (None, "plaintext")
    assert (attempt.inquiry.tls, attempt.inquiry.mtls_mode) == (False, "permissive")
    names = {name for name, _ in attempt.fields}
    assert not any(b"spiffe" in name or b"client-cert" in name for name in names)
    assert dict(attempt.fields)[b"x-forwarded-proto"] == b"http"


def test_a_port_in_the_authority_is_the_one_that_is_asked_about():
    assert planned(port=9443).inquiry.port == 9443


def test_the_certificate_header_is_set_where_it_was_asked_for():
    peer = replace(CALLER, id=SpiffeId(trust_domain="a.test", path="/a.b-c_d"))
    attempt = planned(replace(MTLS, peer=peer), program(xfcc=True), fields=[(b"x-forwarded-client-cert", b"URI=evil")])
    assert [value for name, value in attempt.fields if name == b"x-forwarded-client-cert"] == [
        b"URI=spiffe://a.test/a.b-c_d"
    ]


@pytest.mark.parametrize(
    ("server_name", "host", "refused"),
    [("me.test", "me.test", False), ("me.test", "other.test", True), (None, "any.test", False), ("me.test", "", True)],
)
def test_the_authority_is_the_name_that_the_handshake_asked_for(server_name, host, refused):
    connection = replace(MTLS, server_name=server_name)
    if not refused:
        assert planned(connection, host=host).head.host == host
        return
    with pytest.raises(ClientFault) as fault:
        planned(connection, host=host)
    assert (fault.value.status, fault.value.code) == (421, "authority_mismatch")


def test_what_comes_back_to_where_it_was_goes_round_no_more():
    with pytest.raises(ClientFault) as fault:
        planned(fields=[(b"via", b"1.1 other, 1.1 us")])
    assert fault.value.status == 508
    assert planned(fields=[(b"via", b"1.1 other, 1.1 us-too")])


@pytest.mark.parametrize(
    ("protocol", "content_type", "spoken"),
    [
        ("auto", b"application/json", "h1"),
        ("auto", b"application/grpc+proto", "h2"),
        ("h1", b"application/grpc", "h1"),
        ("h2c", b"application/json", "h2"),
    ],
)
def test_the_agent_is_spoken_to_in_what_it_understands(protocol, content_type, spoken):
    by = program(agent=AgentUpstream(address=AGENT, protocol=protocol))
    attempt = planned(by=by, fields=[(b"content-type", content_type), (b"te", b"trailers")])
    assert attempt.upstream.protocol == spoken
    assert ((b"te", b"trailers") in attempt.fields) == (spoken == "h2")


@pytest.mark.parametrize(
    ("token", "method", "protocol", "kept", "spoken"),
    [
        ("websocket", "GET", "auto", "websocket", "h1"),
        ("websocket", "GET", "h1", "websocket", "h1"),
        ("websocket", "GET", "h2c", "websocket", "h2"),
        ("tcp", "POST", "auto", "tcp", "h1"),
        ("tcp", "POST", "h2c", None, "h2"),
        *((token, "GET", "auto", None, "h1") for token in ("h2c", "H2C", "h2", "TLS/1.3", "tls", "HTTP/3", "http/1.1")),
    ],
)
def test_only_an_upgrade_that_can_be_carried_is_asked_for(token, method, protocol, kept, spoken):
    by = program(agent=AgentUpstream(address=AGENT, protocol=protocol))
    attempt = planned(by=by, upgrade=token, method=method)
    assert (attempt.head.upgrade, attempt.upstream.protocol) == (kept, spoken)


def test_an_upgrade_is_for_an_agent_that_says_grpc_what_it_is_for_any():
    attempt = planned(upgrade="websocket", method="GET", fields=[(b"content-type", b"application/grpc")])
    assert (attempt.head.upgrade, attempt.upstream.protocol) == ("websocket", "h1")


@pytest.mark.parametrize("token", ["h2c", "TLS/1.3", "http/1.1"])
def test_a_tunnel_that_would_take_over_the_connection_is_refused_where_there_is_nothing_else_to_ask_for(token):
    with pytest.raises(ClientFault) as fault:
        planned(upgrade=token, method="GET", protocol="HTTP/2")
    assert (fault.value.code, fault.value.status) == ("tunnel_unsupported", 501)


@pytest.mark.parametrize(("token", "shown"), [("WebSocket", ("websocket",)), ("h2c", None), (None, None)])
def test_policy_sees_the_upgrade_that_is_asked_for_where_it_is_listed(token, shown):
    by = program(seen=lambda: Seen(headers=frozenset({b"upgrade"}), query=frozenset()))
    attempt = planned(by=by, upgrade=token, method="GET", fields=[(b"upgrade", b"forged"), (b"connection", b"upgrade")])
    assert attempt.inquiry.headers.get("upgrade") == shown
    assert planned(upgrade=token, method="GET").inquiry.headers == {}


def test_the_limits_of_the_listener_hold_for_each_request():
    attempt = planned(by=program(timeout=3.0, retries=2, rate=Rate(per_second=1.0, burst=1)))
    assert (attempt.timeout, attempt.retries, attempt.upstream_decides) == (3.0, 2, False)
    assert attempt.bucket is not None
    attempt.bucket.take(0.0)
    with pytest.raises(RateLimited):
        attempt.bucket.take(0.5)
    attempt = planned()
    assert (attempt.timeout, attempt.retries, attempt.bucket) == (None, 1, None)


def test_a_second_method_is_refused():
    with pytest.raises(ClientFault) as fault:
        planned(fields=[(b"x-http-method-override", b"DELETE")])
    assert fault.value.code == "request_overridden"


# ── a head that comes again ───────────────────────────────────────────────────────────────────────────────────────

OTHER_IDS = Ids(exchange="e2", request="r2", trace="t2", traceparent="00-t2-p2-01")
AGAIN: list[dict[str, Any]] = [
    {},
    {"fields": [(b"x-tenant", b"t"), (b"accept", b"*/*"), (b"x-request-id", b"theirs")]},
    {"fields": [(b"traceparent", b"00-t2-p2-01"), (b"tracestate", b"a=b")]},
    {"upgrade": "websocket", "method": "GET"},
    {"fields": [(b"content-type", b"application/grpc"), (b"te", b"trailers")]},
    {"host": "", "protocol": "HTTP/1.0"},
]


@pytest.mark.parametrize("head", AGAIN)
@pytest.mark.parametrize("connection", [MTLS, PLAINTEXT])
def test_what_was_planned_once_is_what_would_be_planned_again(connection: Connection, head: dict[str, Any]) -> None:
    names, kept = frozenset({b"x-tenant"}), {}
    seen = Seen(headers=names, query=frozenset({"q"}), reserved=names)
    by = program(seen=lambda: seen, xfcc=True, timeout=5.0, retries=3, rate=Rate(per_second=5, burst=50))
    first = Request(head=replace(HEAD, **head), body=Whole(), kept=kept)
    by.attempt(connection, first, IDS)
    again = by.attempt(connection, first, OTHER_IDS)
    anew = by.attempt(connection, replace(first, kept=None), OTHER_IDS)
    assert again == anew
    assert by.attempt(connection, first, IDS) == by.attempt(connection, replace(first, kept=None), IDS)


def test_a_plan_is_used_again() -> None:
    seen, kept = Seen(headers=frozenset(), query=frozenset()), {}
    by, request = program(seen=lambda: seen), Request(head=HEAD, body=Whole(), kept=kept)
    assert by.attempt(MTLS, request, IDS).inquiry is by.attempt(MTLS, request, OTHER_IDS).inquiry


def test_what_policy_sees_since_a_reload_is_planned_anew() -> None:
    seen, kept = [Seen(headers=frozenset(), query=frozenset())], {}
    by = program(seen=lambda: seen[0])
    request = Request(head=replace(HEAD, fields=[(b"x-tenant", b"t")]), body=Whole(), kept=kept)
    assert by.attempt(MTLS, request, IDS).inquiry.headers == {}
    seen[0] = Seen(headers=frozenset({b"x-tenant"}), query=frozenset())
    assert by.attempt(MTLS, request, IDS).inquiry.headers == {"x-tenant": ("t",)}


@pytest.mark.parametrize("name", [b"x-request-id", b"traceparent"])
def test_ids_that_policy_sees_are_those_of_each_request(name: bytes) -> None:
    seen, kept = Seen(headers=frozenset({name}), query=frozenset()), {}
    by = program(seen=lambda: seen)
    request = Request(head=HEAD, body=Whole(), kept=kept)
    asked = [by.attempt(MTLS, request, ids).inquiry.headers[name.decode()] for ids in (IDS, OTHER_IDS)]
    assert asked == ([("r1",), ("r2",)] if name == b"x-request-id" else [("00-t1-p1-00",), ("00-t2-p2-01",)])


def test_a_refusal_is_not_remembered_as_a_plan() -> None:
    kept: dict[str, Any] = {}
    request = Request(head=replace(HEAD, method="CONNECT"), body=Whole(), kept=kept)
    for _ in range(2):
        with pytest.raises(ClientFault):
            program().attempt(MTLS, request, IDS)
    assert kept == {}
