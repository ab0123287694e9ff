"""Our own SVID: whether certificate, key and trust bundles that were read hold together, and the identity that they are.

One bundle file may speak for one trust domain only. Where several were merged, authorities of one could vouch for IDs
of another: such a file is refused where it can be told.

This file refuses to know where the bytes come from, and what time it is. It needs all of `cryptography`, and no handshake
needs it: a sidecar has it done apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import combinations
from types import MappingProxyType
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from sidecar.errors import OperatorFault, PeerRejected
from sidecar.identity import spiffe, verify
from sidecar.identity.contents import Contents, File, Reading
from sidecar.model import Identity, Workload

MIN_RSA_BITS = 2048
MAX_INTERMEDIATES = 8

_Kind = TypeVar("_Kind", bound=x509.ExtensionType)
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s(?:[^-]|-(?!----))*-----END \1-----")
_KEY_LABELS = {b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY"}


def check(contents: Contents, now: float) -> Reading:
    """Make one identity of what was read. Raises `OperatorFault`, as `pem_files.read` does."""
    certificate = contents.certificate
    chain = _certificates(certificate)
    own = _own_workload(certificate, chain[0])
    _check_dates(certificate, chain[0], now)
    trust = _trust(contents.bundles)
    if own.id.trust_domain not in trust:
        raise OperatorFault(
            f"identity.bundles: no bundle for {own.id.trust_domain}, the trust domain of our own {own.id}",
            code="bundle_missing",
        )
    verified = _verified_chain(certificate, chain, trust[own.id.trust_domain], now)
    key = _key(contents.key)
    _check_match(contents, key, chain[0])
    identity = Identity(
        id=own.id,
        chain=b"".join(one.public_bytes(Encoding.PEM) for one in (chain if len(chain) > 1 else verified)),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        trust=MappingProxyType({domain: frozenset(map(_der, anchors)) for domain, anchors in trust.items()}),
        # An authority may end before its leaf, and then nobody believes the leaf.
        not_after=min(one.not_valid_after_utc.timestamp() for one in verified),
        generation=0,
    )
    return Reading(identity=identity, warnings=tuple(_warnings(contents, identity.trust)))


# ── PEM ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _blocks(file: File) -> list[tuple[bytes, bytes]]:
    """The PEM blocks of a file as (label, block). Text around them is a comment; a block cut short is not.

    The parser of `cryptography` passes over a truncated last block, which is what a half-written bundle ends in.
    """
    blocks = [(match[1], match[0]) for match in _BLOCK.finditer(file.data)]
    if b"-----" in _BLOCK.sub(b"", file.data):
        raise file.fault(f"{file.kind}_malformed", "a PEM block is cut short or badly framed")
    if not blocks:
        if file.data.strip():
            raise file.fault(f"{file.kind}_malformed", "holds no PEM block")
        raise file.fault(f"{file.kind}_empty", "is empty")
    return blocks


def _certificates(file: File) -> list[x509.Certificate]:
    certificates = []
    for number, (label, block) in enumerate(_blocks(file), 1):
        if label != b"CERTIFICATE":
            raise file.fault(f"{file.kind}_malformed", f"holds a {label.decode()}, where only certificates belong")
        try:
            certificates.append(x509.load_pem_x509_certificate(block))
        except Exception as error:
            raise file.fault(f"{file.kind}_malformed", f"certificate {number} cannot be parsed: {error}") from error
    return certificates


# ── our own SVID ──────────────────────────────────────────────────────────────────────────────────────────────────


def _own_workload(file: File, leaf: x509.Certificate) -> Workload:
    try:
        return verify.leaf(_der(leaf), verify.BOTH_PURPOSES)
    except PeerRejected as rejection:
        raise file.fault(rejection.code, f"is not an X509-SVID: {rejection.detail}") from rejection


def _check_dates(file: File, leaf: x509.Certificate, now: float) -> None:
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if end.timestamp() <= now:
        raise file.fault("certificate_expired", f"expired at {end.isoformat()}")
    if begin.timestamp() > now:
        raise file.fault("certificate_not_yet_valid", f"is not valid before {begin.isoformat()}")


def _verified_chain(
    file: File, chain: list[x509.Certificate], anchors: list[x509.Certificate], now: float
) -> list[x509.Certificate]:
    """The path from our leaf to an anchor of our own trust domain.

    The extension policies of `cryptography` are those of the web and ask more of a leaf than X509-SVID does, so only
    what makes an authority is kept of them; signatures, dates and path length are checked all the same. Its client
    verifier serves both directions, since the server's wants a DNS name.
    """
    authority = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    policy = PolicyBuilder().store(Store(anchors)).time(datetime.fromtimestamp(now, UTC))
    policy = policy.max_chain_depth(MAX_INTERMEDIATES)
    policy = policy.extension_policies(ca_policy=authority, ee_policy=ExtensionPolicy.permit_all())
    try:
        return policy.build_client_verifier().verify(chain[0], chain[1:]).chain
    except (VerificationError, ValueError) as error:
        cause = f"does not verify against the bundle of its own trust domain: {error}"
        raise file.fault("certificate_untrusted", cause) from error


def _key(file: File) -> _Key:
    blocks = [(label, block) for label, block in _blocks(file) if label != b"EC PARAMETERS"]
    if any(b"ENCRYPTED" in label or b"Proc-Type: 4,ENCRYPTED" in block for label, block in blocks):
        raise file.fault("key_encrypted", "is encrypted; a key without a passphrase is needed")
    if len(blocks) != 1 or blocks[0][0] not in _KEY_LABELS:
        raise file.fault("key_malformed", "must hold one private key (PKCS#8, PKCS#1 or SEC1) and nothing else")
    try:
        # Checking the primes of an RSA key takes 30 ms. `_check_match` proves that the key works, and takes one.
        key = load_pem_private_key(blocks[0][1], None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without the parser's words: nothing of a key reaches a log.
        raise file.fault("key_malformed", "cannot be parsed as a private key") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= MIN_RSA_BITS:
        return key
    raise file.fault("key_unsupported", f"must be P-256, P-384, or RSA of at least {MIN_RSA_BITS} bits")


def _check_match(contents: Contents, key: _Key, leaf: x509.Certificate) -> None:
    """Sign with the key and verify with the leaf: that proves more than equal numbers do."""
    probe = b"does this key belong to this certificate"
    try:
        public = leaf.public_key()
        if isinstance(key, rsa.RSAPrivateKey) and isinstance(public, rsa.RSAPublicKey):
            signature = key.sign(probe, padding.PKCS1v15(), hashes.SHA256())
            return public.verify(signature, probe, padding.PKCS1v15(), hashes.SHA256())
        if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey):
            signature = key.sign(probe, ec.ECDSA(hashes.SHA256()))
            return public.verify(signature, probe, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        pass
    raise contents.key.fault("key_mismatched", f"does not belong to the certificate in {contents.certificate.path}")


# ── whom we trust ─────────────────────────────────────────────────────────────────────────────────────────────────


def _trust(bundles: Mapping[str, File]) -> dict[str, list[x509.Certificate]]:
    seen: dict[tuple[int, int], File] = {}
    trust = {}
    for domain, file in bundles.items():
        try:
            spiffe.parse_trust_domain(domain)
        except spiffe.SpiffeIdError as error:
            raise OperatorFault(f"identity.bundles: {domain!r}: {error}", code="trust_domain_malformed") from error
        if (twin := seen.setdefault(file.inode, file)) is not file:
            cause = f"is also {twin.name}; one file may speak for one trust domain only"
            raise file.fault("bundle_shared", cause)
        trust[domain] = _certificates(file)
        for number, certificate in enumerate(trust[domain], 1):
            _check_anchor(file, domain, number, certificate)
    return trust


def _check_anchor(file: File, domain: str, number: int, certificate: x509.Certificate) -> None:
    try:
        constraints = _value(certificate.extensions, x509.BasicConstraints)
        usage = _value(certificate.extensions, x509.KeyUsage)
        names = _value(certificate.extensions, x509.SubjectAlternativeName)
    except Exception as error:
        raise file.fault("bundle_malformed", f"certificate {number} cannot be parsed: {error}") from error
    if constraints is None or not constraints.ca or (usage is not None and not usage.key_cert_sign):
        raise file.fault("bundle_not_authority", f"certificate {number} is not an authority's")
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if names is not None else ():
        # An authority may say for which trust domain it speaks (X509-SVID §4.1), and then it must be this one.
        if uri.startswith(spiffe.SCHEME) and uri.removeprefix(spiffe.SCHEME).partition("/")[0] != domain:
            raise file.fault("bundle_foreign", f"certificate {number} is an authority of {uri!r}, not of {domain}")


def _warnings(contents: Contents, trust: Mapping[str, frozenset[bytes]]) -> Iterator[str]:
    if contents.key.exposed:
        yield f"identity.key: {contents.key.path}: others than owner and group may access it"
    for one, other in combinations(sorted(trust), 2):
        if trust[one] & trust[other]:
            yield f"identity.bundles: {one} and {other} share an authority, which can vouch for IDs of both"


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _value(extensions: x509.Extensions, kind: type[_Kind]) -> _Kind | None:
    """The extension of this kind, None where the certificate has none."""
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
