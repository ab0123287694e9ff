"""What the certificate kit does not offer: certificates that its library refuses to make, and a second opinion."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

from examples.demo.kit import CA


def der_length(size: int) -> bytes:
    if size < 0x80:
        return bytes([size])
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(digits)]) + digits


def der(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + der_length(len(body)) + body


def resigned(certificate: x509.Certificate, old: bytes, new: bytes, ca: CA) -> bytes:
    """The certificate's DER with `old` replaced by `new` of the same length, under a signature that is good."""
    assert len(old) == len(new)
    body = certificate.tbs_certificate_bytes
    assert body.count(old) == 1
    body = body.replace(old, new)
    assert isinstance(ca.key, ec.EllipticCurvePrivateKey)
    signature = ca.key.sign(body, ec.ECDSA(hashes.SHA256()))
    algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"))  # ecdsa-with-SHA256
    return der(0x30, body + algorithm + der(0x03, b"\0" + signature))


def second_opinion(chain: list[x509.Certificate], anchors: Iterable[bytes]) -> list[x509.Certificate]:
    """Verify the chain, leaf first, with another implementation than OpenSSL. Raises `VerificationError`.

    Only a client verifier does without a DNS name; the extension policies leave to us what X509-SVID asks of a leaf.
    """
    authority = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    store = Store([x509.load_der_x509_certificate(anchor) for anchor in anchors])
    policy = PolicyBuilder().store(store).time(datetime.now(UTC)).max_chain_depth(4)
    policy = policy.extension_policies(ca_policy=authority, ee_policy=ExtensionPolicy.permit_all())
    return policy.build_client_verifier().verify(chain[0], chain[1:]).chain
