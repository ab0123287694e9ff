"""What policy is asked about a request to the bundle server, and what is refused before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.attempt import Ids, Seen
from sidecar.errors import ClientFault, PeerRejected
from sidecar.fleet.program import Served
from sidecar.model import Address, Allow, Anonymous, Connection, Permit
from support.fleet import request, server, workload

IDS = Ids(exchange="e1", request="q1", trace=None, traceparent="00-0-0-00")
CONNECTION = Connection(
    id="c1", peer=workload("agent/a"), remote=Address(host="10.0.0.9", port=5), local=Address(host="10.0.0.1", port=9443),
    tls=True, server_name="fleet.test", protocol="h1", generation=1,
)  # fmt: skip


def served(fleet, *, headers=frozenset(), query=frozenset()):
    seen = Seen(headers=headers, query=query, reserved=headers)
    return Served(fleet, seen=lambda: seen, pseudonym=b"us")


def test_policy_is_asked_about_caller_method_and_path():
    inquiry = served(None).attempt(CONNECTION, request("GET", "/v1/bundles/sidecar?label=a:b"), IDS).inquiry
    assert (inquiry.direction, inquiry.caller, inquiry.caller_reason) == ("fleet", "spiffe://example.org/agent/a", None)
    assert (inquiry.method, inquiry.path, inquiry.segments) == (
        "GET", "/v1/bundles/sidecar", ("v1", "bundles", "sidecar"),
    )  # fmt: skip
    assert (inquiry.mtls_mode, inquiry.tls, inquiry.host, inquiry.port) == ("strict", True, "fleet.test", 9443)
    assert (inquiry.query, inquiry.headers, inquiry.target) == ({}, {}, None)


def test_what_the_configuration_names_is_seen_and_no_claim_of_the_caller_is_believed():
    program = served(None, headers=frozenset({b"x-team", b"x-spiffe-id"}), query=frozenset({"label"}))
    asked = request(
        "GET", "/v1/bundles/sidecar?label=a:b", fields=[(b"x-team", b"t"), (b"x-spiffe-id", b"spiffe://evil/x")]
    )
    inquiry = program.attempt(CONNECTION, asked, IDS).inquiry
    assert inquiry.query == {"label": ("a:b",)}
    assert inquiry.headers == {"x-team": ("t",)}


@pytest.mark.parametrize("name", ["other.test", "FLEET.test"])
def test_a_connection_that_was_made_for_another_host_is_421(name):
    with pytest.raises(ClientFault) as refused:
        served(None).attempt(replace(CONNECTION, server_name=name), request("GET", "/v1/bundles/sidecar"), IDS)
    assert (refused.value.status, refused.value.code) == (421, "authority_mismatch")


def test_a_connection_that_named_no_host_is_for_any():
    served(None).attempt(replace(CONNECTION, server_name=None), request("GET", "/v1/bundles/sidecar"), IDS)


def test_whoever_proves_nothing_is_not_even_decided_on():
    nobody = replace(CONNECTION, peer=Anonymous(reason="plaintext"))
    with pytest.raises(PeerRejected):
        served(None).attempt(nobody, request("GET", "/v1/bundles/sidecar"), IDS)


def test_there_are_no_tunnels():
    with pytest.raises(ClientFault) as refused:
        served(None).attempt(CONNECTION, request("CONNECT", "/"), IDS)
    assert refused.value.code == "connect_unsupported"


async def test_the_answer_is_for_the_caller_of_the_connection_and_a_failure_is_raised(tmp_path: Path):
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as asker:
        await asker.settled(1)
        program = served(asker.fleet)
        asked = request("GET", "/v1/bundles/sidecar")
        found = await program.attempt(CONNECTION, asked, IDS).answer(permit(asked))
        assert found.head.status == 200
        assert list(await asker.lines()) == ["agent/a"]
        unknown = request("GET", "/v1/bundles/other")
        with pytest.raises(ClientFault) as refused:
            await program.attempt(CONNECTION, unknown, IDS).answer(permit(unknown))
        assert refused.value.code == "fleet_bundle_unknown"
        wrong = request("DELETE", "/v1/bundles/sidecar")
        answer = await program.attempt(CONNECTION, wrong, IDS).answer(permit(wrong))
        assert (answer.head.status, dict(answer.head.fields)[b"allow"]) == (405, b"GET")


def permit(asked):
    return Permit(
        request=asked, allow=Allow(decision_id="d", revision="r"), peer_generation=1, not_after=None, lease_until=None,
        cancel=lambda: None,
    )  # fmt: skip
