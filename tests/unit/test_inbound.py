"""What is planned for a caller's request: where it goes, as whom, and what is asked about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.attempt import Attempt, Ids, Seen
from sidecar.config import AgentUpstream
from sidecar.errors import ClientFault
from sidecar.inbound import Inbound
from sidecar.model import Address, Anonymous, Connection, Request, RequestHead, SpiffeId, Target, Workload
from sidecar.wire.answers import Whole
from sidecar.wire.client import Upstream

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
    ("token", "protocol", "kept"),
    [("websocket", "auto", "websocket"), ("websocket", "h2c", None), ("h2c", "auto", None), ("TLS/1.3", "auto", None)],
)
def test_only_an_upgrade_that_can_be_carried_is_asked_for(token, protocol, kept):
    by = program(agent=AgentUpstream(address=AGENT, protocol=protocol))
    assert planned(by=by, upgrade=token).head.upgrade == kept


def test_a_second_method_is_refused():
    with pytest.raises(ClientFault) as fault:
        planned(fields=[(b"x-http-method-override", b"DELETE")])
    assert fault.value.code == "request_overridden"
