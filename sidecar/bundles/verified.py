"""What becomes of a bundle that meets the terms: read, verified, packed anew. Blocks; no clock.

OPA verifies again what it is handed, with the one key that vouches for the bundle. Two things it cannot do: it knows no EdDSA
for keys that are configured, and a token that names no key is nobody's to it. Such a bundle is verified here alone, and
handed over with a signature of this process, whose key is made of a seed: this runs in a process that ends (`apart`).
"""

from __future__ import annotations

import re
import sys
from types import MappingProxyType

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles import signature
from sidecar.bundles.archive import Bounds, Bundle
from sidecar.bundles.release import Release
from sidecar.bundles.signature import SigningKey, VerifyingKey
from sidecar.bundles.terms import Terms, Verified
from sidecar.errors import OperatorFault
from sidecar.model import PolicyBundle

_OPA_KNOWS = frozenset({f"{kind}{bits}" for kind in ("ES", "PS", "RS") for bits in (256, 384, 512)})
_LOG_PACKAGE = re.compile(rb"\bpackage\s+system\s*(?:\.|\[)")
_ANY = Bounds(**dict.fromkeys(Bounds.__slots__, sys.maxsize))
"""For what we packed ourselves, of something that had met its bounds."""
_ORDER_OF_P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""SP 800-186 §3.2.1.3."""


def taken(terms: Terms, seed: bytes, archive: bytes) -> Verified:
    """Read and verify an archive. Raises `OperatorFault`: `bundle_…`, `policy_key_unusable`."""
    return _verified(terms, seed, archives.read(archive, terms.bounds))


def holds_under(terms: Terms, seed: bytes, archive: bytes) -> Verified:
    """The same for what was packed here, under other terms; its serial must not be below theirs."""
    verified = _verified(terms, seed, archives.read(archive, _ANY))
    if verified.release.serial < terms.minimum_serial:
        raise OperatorFault(
            f"serial {verified.release.serial} runs, and minimum_serial is {terms.minimum_serial}",
            code="bundle_below_minimum",
        )
    return verified


def _verified(terms: Terms, seed: bytes, bundle: Bundle) -> Verified:
    key_id = signature.verify(bundle, {name: _key(name, *key) for name, key in terms.keys.items()}, terms.scope)
    release = releases.release(bundle)
    digest = signature.content_digest(bundle)
    archive = archives.pack(bundle)
    if terms.keys[key_id][0] in _OPA_KNOWS and signature.names_its_key(bundle):
        given, key = archive, {key_id: terms.keys[key_id]}
    else:
        ours = _key_of(seed)
        given, key = archives.pack(signature.sign(bundle, ours, terms.scope)), _public(ours)
    handed = PolicyBundle(
        archive=given, revision=release.revision, serial=release.serial, created=release.created, digest=digest,
        keys=key, scope=terms.scope,
        pure=MappingProxyType({name: proof.fields for name, proof in release.cache.items() if proof.pure}),
        batch=frozenset(name for name, proof in release.cache.items() if proof.batch),
    )  # fmt: skip
    return Verified(
        release=release, digest=digest, key_id=key_id, archive=archive, handed=handed,
        signatures=bundle.signatures or b"",
        log_rules=_brings_log_rules(release, bundle),
    )  # fmt: skip


def _key_of(seed: bytes) -> SigningKey:
    """A seed of 32 random bytes, reduced: the bias is 2⁻³² (FIPS 186-5 A.2.1 takes 64 bits more, for keys that last)."""
    number = int.from_bytes(seed) % (_ORDER_OF_P256 - 1) + 1
    return SigningKey(id="sidecar", algorithm="ES256", key=ec.derive_private_key(number, ec.SECP256R1()))


def _key(name: str, algorithm: str, pem: bytes) -> VerifyingKey:
    try:
        return signature.public_key(algorithm, pem)
    except OperatorFault as fault:
        raise OperatorFault(f"key {name} {fault}", code=fault.code) from fault


def _public(key: SigningKey) -> dict[str, tuple[str, bytes]]:
    pem = key.key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {key.id: (key.algorithm, pem)}


def _brings_log_rules(release: Release, bundle: Bundle) -> bool:
    """By its roots, outside of which OPA takes no rule; where they leave it open, by its rules."""
    roots = {root.strip("/") for root in release.roots}
    if any(root == "system/log" or root.startswith("system/log/") for root in roots):
        return True
    return "system" in roots and any(b"log" in text and _LOG_PACKAGE.search(text) for text in bundle.files.values())
