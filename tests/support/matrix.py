"""The accept and reject table of peer verification: one row for each kind of certificate, good or bad."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509

from examples.demo.kit import CA, Svid, new_key
from sidecar.model import HandshakeFacts, Side
from support.handshake import context, handshake


@dataclass
class World:
    """We are of `a.test`, which has two roots of one name; `b.test` is federated; `stranger` is nobody's root."""

    a: CA = field(default_factory=lambda: CA("a.test"))
    a_next: CA = field(default_factory=lambda: CA("a.test"))
    b: CA = field(default_factory=lambda: CA("b.test"))
    stranger: CA = field(default_factory=lambda: CA("a.test"))

    def __post_init__(self) -> None:
        self.ours = self.a.svid("/ours")
        self.trust = {"a.test": frozenset({self.a.der, self.a_next.der}), "b.test": frozenset({self.b.der})}
        self.roots = [self.a.pem, self.a_next.pem, self.b.pem]
        self.serving = self._context("server", self.ours)
        self.dialling = self._context("client", self.ours)

    def _context(self, side: Side, svid: Svid) -> ssl.SSLContext:
        return context(side, svid.chain_pem, svid.key_pem, self.roots)

    def meet(self, svid: Svid, side: Side) -> HandshakeFacts:
        """What we learn on our `side` of a handshake with `svid`. Raises `ssl.SSLError` where OpenSSL refuses it."""
        if side == "server":
            pair = handshake(self.serving, self._context("client", svid))
        else:
            pair = handshake(self._context("server", svid), self.dialling)
        with pair as ends:
            return ends.facts(side)


Row = Callable[[World, Side], Svid]

ACCEPTED: dict[str, Row] = {
    "own trust domain": lambda w, side: w.a.svid(),
    "next root of the same name": lambda w, side: w.a_next.svid(),
    "via intermediate": lambda w, side: CA("a.test", parent=w.a, path_length=0).svid(),
    "via two intermediates": lambda w, side: CA("a.test", parent=CA("a.test", parent=w.a)).svid(),
    "federated domain": lambda w, side: w.b.svid(),
    "with a subject": lambda w, side: w.a.svid(subject="web"),
    "RSA leaf": lambda w, side: w.a.svid(key_type="rsa2048"),
    "P-384 leaf": lambda w, side: w.a.svid(key_type="p384"),
    "extra DNS name": lambda w, side: w.a.svid(dns=["web.a.test"]),
    "no basic constraints": lambda w, side: w.a.svid(ca=None),
    "no extended key usage": lambda w, side: w.a.svid(eku=None),
    "extended key usage for this direction only": lambda w, side: w.a.svid(
        eku=["client" if side == "server" else "server"]
    ),
    "no authority key identifier": lambda w, side: w.b.svid(aki=False),
    "key encipherment too": lambda w, side: w.a.svid(ku=["digital_signature", "key_encipherment"]),
}

REFUSED_BY_US: dict[str, tuple[str, Row]] = {
    "own trust domain, signed by the federated authority": (
        "anchor_foreign",
        lambda w, side: w.b.svid(uris=["spiffe://a.test/web"]),
    ),
    "federated trust domain, signed by our own authority": (
        "anchor_foreign",
        lambda w, side: w.a.svid(uris=["spiffe://b.test/web"]),
    ),
    "own trust domain, signed by an intermediate of the federated authority": (
        "anchor_foreign",
        lambda w, side: CA("a.test", parent=w.b).svid(),
    ),
    "trust domain without bundle, signed by a known authority": (
        "trust_domain_unknown",
        lambda w, side: w.a.svid(uris=["spiffe://c.test/web"]),
    ),
    "two URI names": (
        "svid_many_uris",
        lambda w, side: w.a.svid(uris=["spiffe://a.test/web", "spiffe://a.test/admin"]),
    ),
    "two URI names, one of them no SPIFFE ID": (
        "svid_many_uris",
        lambda w, side: w.a.svid(uris=["spiffe://a.test/web", "https://a.test/web"]),
    ),
    "https URI": ("svid_not_spiffe", lambda w, side: w.a.svid(uris=["https://a.test/web"])),
    "DNS name only": ("svid_missing_uri", lambda w, side: w.a.svid(uris=[], dns=["a.test"])),
    "no alternative name": ("svid_missing_uri", lambda w, side: w.a.svid(uris=[], subject="spiffe://a.test/web")),
    "ID without path": ("svid_id_malformed", lambda w, side: w.a.svid(uris=["spiffe://a.test"])),
    "dot segment": ("svid_id_malformed", lambda w, side: w.a.svid("/x/../web")),
    "upper-case trust domain": ("svid_id_malformed", lambda w, side: w.a.svid(uris=["spiffe://A.test/web"])),
    "trailing slash": ("svid_id_malformed", lambda w, side: w.a.svid("/web/")),
    "percent escape": ("svid_id_malformed", lambda w, side: w.a.svid("/w%65b")),
    "too long": ("svid_id_malformed", lambda w, side: w.a.svid("/" + "x" * 2048)),
    "may sign certificates": ("svid_key_usage", lambda w, side: w.a.svid(ku=["digital_signature", "key_cert_sign"])),
    "may sign CRLs": ("svid_key_usage", lambda w, side: w.a.svid(ku=["digital_signature", "crl_sign"])),
    "no key usage": ("svid_key_usage", lambda w, side: w.a.svid(ku=None)),
}

# Refused by OpenSSL before we are asked; the code is what we would have said, where we look at it at all.
REFUSED_BY_OPENSSL: dict[str, tuple[str | None, Row]] = {
    "extended key usage for the other direction": (
        "svid_ext_key_usage",
        lambda w, side: w.a.svid(eku=["server" if side == "server" else "client"]),
    ),
    "extended key usage for code signing": ("svid_ext_key_usage", lambda w, side: w.a.svid(eku=["code"])),
    "expired": (None, lambda w, side: w.a.svid(ttl=-1)),
    "not yet valid": (None, lambda w, side: w.a.svid(not_before=datetime.now(UTC) + timedelta(seconds=600))),
    "unknown authority of our trust domain": ("anchor_foreign", lambda w, side: w.stranger.svid()),
    "path length exceeded": (
        "anchor_foreign",
        lambda w, side: CA("a.test", parent=CA("a.test", parent=w.a, path_length=0)).svid(),
    ),
    "signed by a workload": ("anchor_foreign", lambda w, side: signed_by_workload(w.a)),
    "expired intermediate": (
        "anchor_foreign",
        lambda w, side: CA("a.test", parent=w.a, ttl=-1).svid(),
    ),
    "an unknown critical extension": (
        None,
        lambda w, side: w.a.svid(
            extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.1.1"), b"\x05\0"), True)]
        ),
    ),
}

# Refused by us; whether OpenSSL got there first depends on its version and on our side.
REFUSED_BY_EITHER: dict[str, tuple[str, Row]] = {
    "an authority's": ("svid_is_ca", lambda w, side: w.a.svid(ca=True)),
    "an authority's in full": ("svid_is_ca", lambda w, side: w.a.svid(ca=True, ku=["key_cert_sign", "crl_sign"])),
    "key agreement only": ("svid_key_usage", lambda w, side: w.a.svid(ku=["key_agreement"])),
    "key encipherment only": ("svid_key_usage", lambda w, side: w.a.svid(ku=["key_encipherment"])),
}


def signed_by_workload(ca: CA) -> Svid:
    key = new_key()
    workload = ca.svid(subject="workload", key=key)
    impostor = CA("a.test", parent=ca)
    impostor.key, impostor.certificate, impostor.name = key, workload.leaf, workload.leaf.subject
    return impostor.svid("/admin")
