"""The accept and reject table of peer verification, through real handshakes in both directions."""

import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.demo.kit import CA, Svid
from sidecar.errors import PeerRejected
from sidecar.identity import verify
from sidecar.identity.spiffe import parse
from sidecar.model import HandshakeFacts, Side, SpiffeId, Workload
from support.certificates import resigned, second_opinion
from support.handshake import context, handshake
from support.matrix import ACCEPTED, REFUSED_BY_EITHER, REFUSED_BY_OPENSSL, REFUSED_BY_US, World


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def chain_of(svid: Svid) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(svid.chain_pem)


def bare_facts(svid: Svid, side: Side, anchor: bytes) -> HandshakeFacts:
    return HandshakeFacts(side=side, leaf=svid.leaf.public_bytes(Encoding.DER), anchor=anchor, resumed=False)


def refusal(facts: HandshakeFacts, world: World, allowed: frozenset[SpiffeId] | None = None) -> PeerRejected:
    with pytest.raises(PeerRejected) as caught:
        verify.judge(facts, world.trust, allowed)
    return caught.value


def judged(facts: HandshakeFacts, world: World) -> Workload | str:
    try:
        return verify.judge(facts, world.trust, None)
    except PeerRejected as rejected:
        return rejected.code


both_sides = pytest.mark.parametrize("side", ["server", "client"])


@both_sides
@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted(world: World, row: str, side: Side) -> None:
    svid = ACCEPTED[row](world, side)
    workload = verify.judge(world.meet(svid, side), world.trust, None)
    uri = svid.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(workload.id)] == uri.get_values_for_type(x509.UniformResourceIdentifier)
    assert workload.not_after == svid.leaf.not_valid_after_utc.timestamp()
    assert second_opinion(chain_of(svid), world.trust[workload.id.trust_domain])


@both_sides
@pytest.mark.parametrize("row", REFUSED_BY_US)
def test_refused_by_us_where_openssl_is_content(world: World, row: str, side: Side) -> None:
    code, make = REFUSED_BY_US[row]
    assert refusal(world.meet(make(world, side), side), world).code == code


@both_sides
@pytest.mark.parametrize("row", REFUSED_BY_OPENSSL)
def test_refused_by_openssl_and_by_us_behind_it(world: World, row: str, side: Side) -> None:
    code, make = REFUSED_BY_OPENSSL[row]
    svid = make(world, side)
    with pytest.raises(ssl.SSLError):
        world.meet(svid, side)
    if code is not None:
        anchor = world.stranger.der if code == "anchor_foreign" else world.a.der
        assert refusal(bare_facts(svid, side, anchor), world).code == code


@both_sides
@pytest.mark.parametrize("row", REFUSED_BY_EITHER)
def test_refused_by_us_whatever_openssl_says(world: World, row: str, side: Side) -> None:
    code, make = REFUSED_BY_EITHER[row]
    svid = make(world, side)
    assert refusal(bare_facts(svid, side, world.a.der), world).code == code
    try:
        facts = world.meet(svid, side)
    except ssl.SSLError:
        return
    assert refusal(facts, world).code == code


def test_an_anchor_need_not_be_self_signed(world: World) -> None:
    middle = CA("a.test", parent=world.stranger)
    serving = context("server", world.ours.chain_pem, world.ours.key_pem, [middle.pem])
    svid = middle.svid()
    with handshake(serving, context("client", svid.chain_pem, svid.key_pem, world.roots)) as ends:
        facts = ends.facts("server")
    assert facts.anchor == middle.der
    trust = {"a.test": frozenset({middle.der})}
    assert verify.judge(facts, trust, None).id == parse("spiffe://a.test/workload")
    assert second_opinion(chain_of(svid), trust["a.test"])


def test_a_resumed_session_is_refused(world: World) -> None:
    svid = world.a.svid()
    serving = context("server", world.ours.chain_pem, world.ours.key_pem, world.roots, tickets=2)
    dialling = context("client", svid.chain_pem, svid.key_pem, world.roots)
    with handshake(serving, dialling) as first:
        first.talk()
        assert isinstance(first.client, ssl.SSLSocket)
        session = first.client.session
        assert verify.judge(first.facts("server"), world.trust, None)
    with handshake(serving, dialling, session=session) as second:
        for side in ("server", "client"):
            assert refusal(second.facts(side), world).code == "session_resumed"


def test_without_tickets_no_session_is_resumed(world: World) -> None:
    svid = world.a.svid()
    dialling = context("client", svid.chain_pem, svid.key_pem, world.roots)
    with handshake(world.serving, dialling) as first:
        first.talk()
        assert isinstance(first.client, ssl.SSLSocket)
        session = first.client.session
    with handshake(world.serving, dialling, session=session) as second:
        assert verify.judge(second.facts("server"), world.trust, None)
        assert verify.judge(second.facts("client"), world.trust, None)


def test_a_removed_bundle_ends_what_it_had_allowed(world: World) -> None:
    facts = world.meet(world.b.svid(), "server")
    assert verify.judge(facts, world.trust, None)
    with pytest.raises(PeerRejected) as caught:
        verify.judge(facts, {"a.test": world.trust["a.test"]}, None)
    assert caught.value.code == "trust_domain_unknown"


def test_only_the_expected_peer_will_do(world: World) -> None:
    facts = world.meet(world.a.svid("/web"), "client")
    web, admin = parse("spiffe://a.test/web"), parse("spiffe://a.test/admin")
    assert verify.judge(facts, world.trust, frozenset({web, admin})).id == web
    rejected = refusal(facts, world, frozenset({admin}))
    assert rejected.code == "peer_unexpected"
    assert rejected.detail == "spiffe://a.test/web: expected spiffe://a.test/admin"
    assert refusal(facts, world, frozenset()).code == "peer_unexpected"


def test_a_foreign_anchor_is_told_before_an_unexpected_name(world: World) -> None:
    svid = world.b.svid(uris=["spiffe://a.test/web"])
    rejected = refusal(world.meet(svid, "server"), world, frozenset())
    assert rejected.code == "anchor_foreign"
    assert "spiffe://a.test/web" in rejected.detail


def test_duplicate_extensions_are_a_refusal(world: World) -> None:
    # The second one is made as an unknown extension, whose identifier is then turned into that of key usage.
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), bytes.fromhex("03020780"))
    leaf = world.a.svid(extensions=[(unknown, False)]).leaf
    der = resigned(leaf, bytes.fromhex("0603551d63"), bytes.fromhex("0603551d0f"), world.a)
    facts = HandshakeFacts(side="server", leaf=der, anchor=world.a.der, resumed=False)
    assert refusal(facts, world).code == "svid_ext_malformed"


def test_a_name_that_cannot_be_parsed_is_a_refusal(world: World) -> None:
    leaf = world.a.svid("/web").leaf
    der = resigned(leaf, b"spiffe://a.test/web", b"spiffe://a.test/w\xff\xfe", world.a)
    facts = HandshakeFacts(side="server", leaf=der, anchor=world.a.der, resumed=False)
    assert refusal(facts, world).code == "svid_ext_malformed"


def test_a_presented_name_is_told_short_and_printable(world: World) -> None:
    facts = bare_facts(world.a.svid(uris=["https://a.test/\n\x1b[2J" + "x" * 4000]), "server", world.a.der)
    detail = refusal(facts, world).detail
    assert detail.isprintable()
    assert len(detail) < 400


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_leaf_crashes_the_judge(world: World, data: st.DataObject) -> None:
    leaf = bytearray(world.ours.leaf.public_bytes(Encoding.DER))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(leaf) - 1))
        leaf[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    facts = HandshakeFacts(side="server", leaf=bytes(leaf), anchor=world.a.der, resumed=False)
    outcome = judged(facts, world)
    assert isinstance(outcome, Workload) or outcome != PeerRejected.code  # every kind has a code of its own


@given(st.binary(max_size=64))
def test_bytes_that_are_no_certificate_are_refused(leaf: bytes) -> None:
    facts = HandshakeFacts(side="client", leaf=leaf, anchor=b"", resumed=False)
    with pytest.raises(PeerRejected) as caught:
        verify.judge(facts, {}, None)
    assert caught.value.code == "svid_malformed"
