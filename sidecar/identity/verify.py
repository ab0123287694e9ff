"""The judgement of a finished TLS handshake: which workload is at the other end, if any.

OpenSSL has verified signatures, dates, path length and extended key usage by now, but against the union of all trust
bundles, because it cannot scope a root to a trust domain: for it, an authority of `b.example` may vouch for
`spiffe://a.example/web`. So a second step follows, the same on both sides of a connection: the session was not
resumed (a resumed one skips verification), the leaf is a valid X509-SVID, and the anchor that OpenSSL ended at stands
in the bundle of the leaf's own trust domain.

This file refuses to know sockets, clocks and files; our own SVID is held to the same leaf rules by `svid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidecar.errors import PeerRejected
from sidecar.identity import certificate, spiffe
from sidecar.identity.certificate import CLIENT_AUTH, CRL_SIGN, DIGITAL_SIGNATURE, KEY_CERT_SIGN, SERVER_AUTH
from sidecar.model import HandshakeFacts, SpiffeId, Workload

BOTH_PURPOSES = frozenset({SERVER_AUTH, CLIENT_AUTH})
_PEER_PURPOSE = {"server": frozenset({CLIENT_AUTH}), "client": frozenset({SERVER_AUTH})}
_MAX_SHOWN = 256
"""Characters of a presented name that a detail repeats: the peer chose it, and may have chosen it long."""


def judge(
    facts: HandshakeFacts, trust: Mapping[str, frozenset[bytes]], allowed: frozenset[SpiffeId] | None
) -> Workload:
    """Return the workload that the peer proved to be.

    `trust`: trust domain → DER of its anchors; `allowed`: the IDs that will do, None for any. Raises `PeerRejected`
    with a `code` per kind: `session_resumed`, those of `leaf`, `trust_domain_unknown`, `anchor_foreign` and
    `peer_unexpected`.
    """
    if facts.resumed:
        raise PeerRejected("a resumed session was not verified", code="session_resumed")
    workload = leaf(facts.leaf, _PEER_PURPOSE[facts.side])
    anchors = trust.get(workload.id.trust_domain)
    if anchors is None:
        raise PeerRejected(f"{workload.id}: no bundle for its trust domain", code="trust_domain_unknown")
    if facts.anchor not in anchors:
        raise PeerRejected(f"{workload.id}: its authority is not one of its trust domain's", code="anchor_foreign")
    if allowed is not None and workload.id not in allowed:
        expected = ", ".join(sorted(map(str, allowed))) or "nobody"
        raise PeerRejected(f"{workload.id}: expected {expected}", code="peer_unexpected")
    return workload


def leaf(der: bytes, purposes: frozenset[bytes]) -> Workload:
    """Return the workload that a leaf certificate names, if it has the shape of an X509-SVID (X509-SVID §§2-5).

    `purposes` are the extended key usages that it must allow, where it limits them at all. Signature and dates are
    not looked at. Raises `PeerRejected`: `svid_malformed`, `svid_ext_malformed`, `svid_missing_uri`, `svid_many_uris`,
    `svid_not_spiffe`, `svid_id_malformed`, `svid_is_ca`, `svid_key_usage` or `svid_ext_key_usage`.
    """
    try:
        found = certificate.read(der)
    except certificate.Malformed as error:
        raise PeerRejected(f"not a certificate: {error}", code="svid_malformed") from error
    except certificate.ExtensionMalformed as error:
        raise PeerRejected(f"its extensions cannot be read: {error}", code="svid_ext_malformed") from error
    workload_id = _id(found.uris)
    if found.is_authority:
        raise PeerRejected(f"{workload_id}: it is an authority's certificate, not a workload's", code="svid_is_ca")
    _check_key_usage(workload_id, found.usage)
    if found.purposes is not None and not purposes <= found.purposes:
        raise PeerRejected(f"{workload_id}: its extended key usage is for something else", code="svid_ext_key_usage")
    return Workload(id=workload_id, not_after=found.not_after)


def _id(uris: Sequence[str]) -> SpiffeId:
    if not uris:
        raise PeerRejected("it holds no URI name, and so no SPIFFE ID", code="svid_missing_uri")
    if len(uris) > 1:
        raise PeerRejected(f"it holds {len(uris)} URI names: {_shown(', '.join(uris))}", code="svid_many_uris")
    uri = uris[0]
    if not uri.startswith(spiffe.SCHEME):
        raise PeerRejected(f"its URI name is no SPIFFE ID: {_shown(uri)}", code="svid_not_spiffe")
    try:
        return spiffe.parse(uri)
    except spiffe.SpiffeIdError as error:
        raise PeerRejected(f"{_shown(uri)}: {error}", code="svid_id_malformed") from error


def _check_key_usage(workload_id: SpiffeId, usage: int | None) -> None:
    if usage is None:
        raise PeerRejected(f"{workload_id}: its key usage is missing", code="svid_key_usage")
    if not usage & DIGITAL_SIGNATURE:
        raise PeerRejected(f"{workload_id}: its key usage does not allow digital signatures", code="svid_key_usage")
    if usage & (KEY_CERT_SIGN | CRL_SIGN):
        raise PeerRejected(f"{workload_id}: its key usage lets it sign certificates or CRLs", code="svid_key_usage")


def _shown(presented: object) -> str:
    """Something that the peer chose, fit for a log line: printable, and not longer than it need be."""
    text = ascii(str(presented))[1:-1]
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
