"""On which terms a bundle is taken, and what becomes of one that meets them: read, verified, packed anew. Blocks; no clock.

OPA verifies again what it is handed, with the one key that vouches for the bundle. Two things it cannot do: it knows no EdDSA
for keys that are configured, and a token that names no key is nobody's to it. Such a bundle is verified here alone, and
handed over with a signature of this process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles import signature
from sidecar.bundles.archive import Bounds, Bundle
from sidecar.bundles.release import Release
from sidecar.bundles.signature import SigningKey, VerifyingKey
from sidecar.errors import OperatorFault
from sidecar.model import PolicyBundle

_OPA_KNOWS = frozenset({f"{kind}{bits}" for kind in ("ES", "PS", "RS") for bits in (256, 384, 512)})
_LOG_PACKAGE = re.compile(rb"\bpackage\s+system\s*(?:\.|\[)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which bundles are taken."""

    keys: Mapping[str, tuple[str, bytes]]
    """Key id → (algorithm of RFC 7518 §3.1, public key or certificate in PEM)."""
    scope: str = "sidecar"
    minimum_serial: int = 0
    max_policy_age: float | None = None
    """Seconds."""
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A bundle that a configured key vouches for."""

    bundle: Bundle
    release: Release
    digest: str
    key_id: str
    archive: bytes = field(repr=False)
    """Packed anew, with the signature that it came with."""
    handed: PolicyBundle
    log_rules: bool
    """Whether it brings rules for OPA's own decision log, which nobody asks."""


def key_of_this_process() -> SigningKey:
    """For what OPA cannot verify by itself."""
    return SigningKey(id="sidecar", algorithm="ES256", key=ec.generate_private_key(ec.SECP256R1()))


def taken(terms: Terms, ours: SigningKey, archive: bytes) -> Verified:
    """Read and verify an archive. Raises `OperatorFault`: `bundle_…`, `policy_key_unusable`."""
    return _verified(terms, ours, archives.read(archive, terms.bounds))


def holds_under(terms: Terms, ours: SigningKey, bundle: Bundle) -> Verified:
    """The same for what was read before, under other terms; its serial must not be below theirs."""
    verified = _verified(terms, ours, bundle)
    if verified.release.serial < terms.minimum_serial:
        raise OperatorFault(
            f"serial {verified.release.serial} runs, and minimum_serial is {terms.minimum_serial}",
            code="bundle_below_minimum",
        )
    return verified


def _verified(terms: Terms, ours: SigningKey, bundle: Bundle) -> Verified:
    key_id = signature.verify(bundle, {name: _key(name, *key) for name, key in terms.keys.items()}, terms.scope)
    release = releases.release(bundle)
    digest = signature.content_digest(bundle)
    archive = archives.pack(bundle)
    if terms.keys[key_id][0] in _OPA_KNOWS and signature.names_its_key(bundle):
        given, key = archive, {key_id: terms.keys[key_id]}
    else:
        given, key = archives.pack(signature.sign(bundle, ours, terms.scope)), _public(ours)
    handed = PolicyBundle(
        archive=given, revision=release.revision, serial=release.serial, created=release.created, digest=digest,
        keys=key, scope=terms.scope,
        pure=MappingProxyType({name: proof.fields for name, proof in release.cache.items() if proof.pure}),
    )  # fmt: skip
    return Verified(
        bundle=bundle, release=release, digest=digest, key_id=key_id, archive=archive, handed=handed,
        log_rules=_brings_log_rules(release, bundle),
    )  # fmt: skip


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
