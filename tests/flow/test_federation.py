"""Workloads of other trust domains: bound by their bundle they are somebody, without it they do not come in."""

from __future__ import annotations

import pytest
import trio

from examples.demo.kit import CA, write
from sidecar.errors import PeerRejected
from sidecar.identity import verify
from sidecar.model import Identity, SpiffeId
from sidecar.wire import tls
from support.flow import ask, get, serve_target, status, world

BUNDLES = "{a.test: %s/bundle-a.test.pem, b.test: %s/bundle-b.test.pem}"


def unbound(it) -> None:
    """Take the foreign domain out of the configuration."""
    it.text = it.text.replace(BUNDLES.replace("%s", str(it.directory)), f"{{a.test: {it.directory}/bundle-a.test.pem}}")


def bound(it, domain: str, ca: CA) -> None:
    """Put another domain in."""
    path = it.directory / f"bundle-{domain}.pem"
    path.write_bytes(ca.bundle_pem)
    it.text = it.text.replace("bundles: {", f"bundles: {{{domain}: {path}, ")


def credentials_of(it, ca: CA, **svid) -> tls.Credentials:
    """Of a workload that says what it likes; no sound source of identities would hand these out."""
    made = ca.svid("/ns/demo/sa/partner", **svid)
    trust = {"a.test": frozenset({it.ca.der}), "b.test": frozenset({it.foreign.der})}
    identity = Identity(
        id=SpiffeId(trust_domain=ca.trust_domain, path="/ns/demo/sa/partner"), chain=made.chain_pem, key=made.key_pem,
        trust=trust, not_after=2e9, generation=1,
    )  # fmt: skip
    return tls.Credentials(identity, verify.judge)


async def refused(it, credentials: tls.Credentials, alpn: str = "http/1.1") -> dict:
    """Try to get through, see no answer, and return the record of the connection."""
    before = len(_refusals(it))
    with pytest.raises((PeerRejected, trio.BrokenResourceError, EOFError)):
        stream = await it.client(credentials, alpn=alpn)
        await stream.send_all(get())
        if await stream.receive_some() == b"":
            raise EOFError
    await trio.sleep(3)
    (line,) = _refusals(it)[before:]
    assert line["exchanges"] == 0
    return line


def _refusals(it) -> list[dict]:
    return [line for line in it.access.events("connection.ended") if line["outcome"] != "served"]


async def trust_reloaded(it) -> None:
    """Re-read the configuration: once that is reported, whom we trust has changed."""
    before = it.app.status().identity_generation
    await it.reload()
    assert it.log.events("config.reload_refused") == []
    assert it.app.status().identity_generation > before


async def test_a_caller_of_a_bound_domain_is_served_under_its_own_id(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials("/ns/demo/sa/partner", ca=it.foreign))
        assert status(await ask(stream, get())) == 200
        assert it.opa.questions[-1]["caller"] == "spiffe://b.test/ns/demo/sa/partner"
        assert b"x-forwarded-spiffe-id: spiffe://b.test/ns/demo/sa/partner\r\n" in it.agent.messages[0]
        (line,) = it.access.events("exchange.ended")
        assert line["peer"] == "spiffe://b.test/ns/demo/sa/partner"


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_a_caller_of_an_unbound_domain_is_refused_in_the_handshake(autojump_clock, tmp_path, alpn):
    bundles = BUNDLES.replace("%s", str(tmp_path))
    async with world(tmp_path, change=(bundles, f"{{a.test: {tmp_path}/bundle-a.test.pem}}")) as it:
        line = await refused(it, it.credentials("/ns/demo/sa/partner", ca=it.foreign), alpn)
        assert (line["outcome"], line["reason"]) == ("handshake_failed", "authority_unknown")
        assert it.opa.questions == []
        assert it.agent.received == b""


async def test_an_authority_vouches_for_no_id_of_another_domain(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        line = await refused(it, credentials_of(it, it.foreign, uris=["spiffe://a.test/ns/demo/sa/admin"]))
        assert (line["outcome"], line["reason"]) == ("peer_rejected", "anchor_foreign")
        assert "spiffe://a.test/ns/demo/sa/admin" in line["detail"]
        line = await refused(it, credentials_of(it, it.ca, uris=["spiffe://b.test/ns/demo/sa/admin"]))
        assert (line["outcome"], line["reason"]) == ("peer_rejected", "anchor_foreign")
        assert it.opa.questions == []


async def test_a_domain_that_nobody_has_bound_is_unknown_whoever_vouches_for_it(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        line = await refused(it, credentials_of(it, it.foreign, uris=["spiffe://c.test/ns/demo/sa/x"]))
        assert (line["outcome"], line["reason"]) == ("peer_rejected", "trust_domain_unknown")
        line = await refused(it, credentials_of(it, CA("c.test")))
        assert (line["outcome"], line["reason"]) == ("handshake_failed", "authority_unknown")
        assert it.opa.questions == []


async def test_a_domain_bound_by_a_reload_is_known_at_the_next_handshake(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        third = CA("c.test")
        assert (await refused(it, credentials_of(it, third)))["reason"] == "authority_unknown"
        bound(it, "c.test", third)
        await trust_reloaded(it)
        (line,) = it.log.events("config.reloaded")
        assert line["changed"] == ["identity.bundles"]
        stream = await it.client(credentials_of(it, third))
        assert status(await ask(stream, get())) == 200
        assert it.opa.questions[-1]["caller"] == "spiffe://c.test/ns/demo/sa/partner"


async def test_a_domain_unbound_by_a_reload_is_unknown_at_the_next_handshake_and_request(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials("/ns/demo/sa/partner", ca=it.foreign))
        ours = await it.client(it.credentials())
        assert status(await ask(stream, get())) == 200
        unbound(it)
        await trust_reloaded(it)
        assert status(await ask(stream, get())) == 421
        assert (await refused(it, it.credentials("/p", ca=it.foreign)))["reason"] == "authority_unknown"
        assert status(await ask(ours, get())) == 200
        assert len(it.opa.questions) == 2


async def test_a_bundle_that_is_no_authority_of_its_domain_refuses_the_reload_and_changes_nothing(
    autojump_clock, tmp_path
):
    async with world(tmp_path) as it:
        bound(it, "c.test", CA("d.test"))
        await it.reload()
        (line,) = it.log.events("config.reload_refused")
        assert "identity.bundles" in line["detail"]
        assert line["code"] == "bundle_foreign"
        stream = await it.client(it.credentials("/ns/demo/sa/partner", ca=it.foreign))
        assert status(await ask(stream, get())) == 200


async def test_a_target_of_a_bound_domain_is_reached_and_its_domain_cannot_be_unbound_under_its_route(
    autojump_clock, tmp_path
):
    route = ("spiffe://a.test/ns/demo/sa/target", "spiffe://b.test/ns/demo/sa/target")
    async with world(tmp_path, change=route) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery, ca=it.foreign)
        assert status(await ask(await it.agent_client(), get())) == 200
        (line,) = it.access.events("exchange.ended")
        assert line["upstream_id"] == "spiffe://b.test/ns/demo/sa/target"
        unbound(it)
        await it.reload()
        (line,) = it.log.events("config.reload_refused")
        assert "outbound.routes[0].spiffe_ids" in line["detail"]
        assert status(await ask(await it.agent_client(), get())) == 200
        nursery.cancel_scope.cancel()


async def test_an_authority_that_replaces_another_is_taken_up_while_both_overlap(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        new = CA("b.test")
        both = it.foreign.bundle_pem + new.bundle_pem
        old = await it.client(it.credentials("/ns/demo/sa/partner", ca=it.foreign))
        assert status(await ask(old, get())) == 200
        write(tmp_path, it.ca.svid("/ns/demo/sa/me"), {"a.test": it.ca.bundle_pem, "b.test": both})
        await trio.sleep(5)
        assert status(await ask(old, get())) == 200
        renewed = await it.client(credentials_of(it, new))
        assert status(await ask(renewed, get())) == 200
