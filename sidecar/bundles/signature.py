"""Signatures over bundles, as OPA makes and checks them: one JWS over the hashes of all files.

The hash of a JSON file is that of its canonical spelling, so white space may change and meaning may not; of a rule it is
that of its bytes. `kid` and `scope` are always written: without a key id OPA must be told which key, and a scope keeps
a bundle that was signed for one use from another. The algorithm is the verifier's, by key, and never the token's word.
Sources: RFC 7515, RFC 7518 §3, OPA's documentation of bundle signing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from sidecar.bundles import canonical
from sidecar.bundles.archive import DATA, MANIFEST, SIGNATURES, Bundle, BundleRefused, json_of
from sidecar.bundles.canonical import NotJson
from sidecar.errors import OperatorFault

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

_HASHES: Mapping[str, type[hashes.HashAlgorithm]] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
_CURVES: Mapping[str, tuple[type[ec.EllipticCurve], int]] = {
    "ES256": (ec.SECP256R1, 32), "ES384": (ec.SECP384R1, 48), "ES512": (ec.SECP521R1, 66),
}  # fmt: skip
_DIGESTS = {"SHA-256": hashlib.sha256, "SHA-384": hashlib.sha384, "SHA-512": hashlib.sha512}
_MIN_RSA_BITS = 2048
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyingKey:
    """A public key and the one algorithm (RFC 7518 §3.1) that it is used with."""

    algorithm: str
    key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    id: str
    algorithm: str
    key: PrivateKey


def sign(bundle: Bundle, key: SigningKey, scope: str) -> Bundle:
    """Return the bundle with a signature in place of any that it had. The same input gives the same bytes."""
    header = {"alg": key.algorithm, "kid": key.id, "typ": "JWT"}
    payload = {
        "files": [
            {"algorithm": "SHA-256", "hash": digest(name, content), "name": name}
            for name, content in sorted(bundle.files.items())
        ],
        "keyid": key.id,
        "scope": scope,
    }
    signed = f"{_encoded(header)}.{_encoded(payload)}"
    token = f"{signed}.{_unpadded(_signature(key, signed.encode()))}"
    return Bundle(files=bundle.files, signatures=json.dumps({"signatures": [token]}).encode())


def verify(bundle: Bundle, keys: Mapping[str, VerifyingKey], scope: str) -> str:
    """Return the id of the key that vouches for every file of the bundle, and for no other.

    Raises `BundleRefused` (`bundle_unsigned`, `bundle_signature_invalid`, `bundle_scope_mismatch`, `bundle_key_unknown`).
    """
    token = _token(bundle)
    try:
        head, body, signature = token.split(".")
        header, raw = _object(head), _decoded(signature)
        claims = _object(body)
    except (ValueError, binascii.Error) as error:
        raise _invalid(f"it cannot be read: {error}") from error
    key_id = _key_id(header, claims, keys)
    key = keys[key_id]
    if header.get("alg") != key.algorithm:
        raise _invalid(f"it says {str(header.get('alg'))[:20]}, and key {key_id} is for {key.algorithm}")
    if "crit" in header:
        raise _invalid("it has a critical header that is not understood")
    try:
        _check(key, raw, f"{head}.{body}".encode("ascii"))
    except (InvalidSignature, ValueError) as error:
        raise _invalid(f"it was not made with key {key_id}") from error
    if claims.get("scope", "") != scope:
        raise BundleRefused(
            f"it was signed for scope {str(claims.get('scope'))[:60]!r}, not {scope!r}", code="bundle_scope_mismatch"
        )
    _compare(claims.get("files"), bundle)
    return key_id


def digest(name: str, content: bytes, algorithm: str = "SHA-256") -> str:
    """Hex hash of a file of a bundle, as it is signed."""
    if name in {MANIFEST, DATA} or name.endswith(f"/{DATA}"):
        content = canonical.encode(json_of(name, content))
    return _DIGESTS[algorithm](content).hexdigest()


def content_digest(bundle: Bundle) -> str:
    """Hex SHA-256 of what the bundle says, whoever signed it and however it was packed."""
    lines = [f"{name}\0{digest(name, content)}\n" for name, content in sorted(bundle.files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def public_key(algorithm: str, pem: bytes) -> VerifyingKey:
    """Read a public key, or the one in a certificate. Raises `OperatorFault` (`policy_key_unusable`)."""
    try:
        key = (
            x509.load_pem_x509_certificate(pem).public_key()
            if b"-----BEGIN CERTIFICATE" in pem
            else serialization.load_pem_public_key(pem)
        )
    except (ValueError, UnsupportedAlgorithm) as error:
        raise OperatorFault(f"not a public key or certificate in PEM: {error}", code="policy_key_unusable") from error
    found = cast("PublicKey", key)
    _fits(algorithm, found)
    return VerifyingKey(algorithm=algorithm, key=found)


def private_key(path: Path, *, key_id: str, algorithm: str | None = None) -> SigningKey:
    """Read a private key (PEM: PKCS#8, PKCS#1 or SEC1) that only its owner may read. Blocks.

    `algorithm` is that of the key's kind where it is not given: ES256/384/512 by curve, EdDSA, RS256.
    Raises `OperatorFault` (`signing_key_unusable`).
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            pem = file.read(1 << 16)
    except OSError as error:
        raise OperatorFault(f"{path}: {error.strerror}", code="signing_key_unusable") from error
    if mode & _OTHERS:
        raise OperatorFault(
            f"{path}: others may read it (mode {mode:04o}); chmod 600 {path.name}", code="signing_key_unusable"
        )
    try:
        key = cast("PrivateKey", serialization.load_pem_private_key(pem, password=None))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OperatorFault(
            f"{path}: not a private key in PEM without passphrase", code="signing_key_unusable"
        ) from error
    algorithm = algorithm or _natural(key)
    try:
        _fits(algorithm, key.public_key())
    except OperatorFault as fault:
        raise OperatorFault(f"{path}: {fault}", code="signing_key_unusable") from fault
    return SigningKey(id=key_id, algorithm=algorithm, key=key)


def _natural(key: PrivateKey) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return next((name for name, (curve, _) in _CURVES.items() if isinstance(key.curve, curve)), "ES256")
    return "EdDSA" if isinstance(key, ed25519.Ed25519PrivateKey) else "RS256"


def _fits(algorithm: str, key: PublicKey) -> None:
    """Raise `OperatorFault` where the key cannot be used with the algorithm, or is too weak."""
    if algorithm in _CURVES:
        sound = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES[algorithm][0])
    elif algorithm == "EdDSA":
        sound = isinstance(key, ed25519.Ed25519PublicKey)
    else:
        sound = algorithm[:2] in {"RS", "PS"} and algorithm[2:] in _HASHES and isinstance(key, rsa.RSAPublicKey)
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
            raise OperatorFault(f"an RSA key of {key.key_size} bits is too short", code="policy_key_unusable")
    if not sound:
        raise OperatorFault(f"this key is not one for {algorithm}", code="policy_key_unusable")


def _signature(key: SigningKey, signed: bytes) -> bytes:
    if isinstance(key.key, ed25519.Ed25519PrivateKey):
        return key.key.sign(signed)
    if isinstance(key.key, rsa.RSAPrivateKey):
        return key.key.sign(signed, _padding(key.algorithm), _hash(key.algorithm))
    size = _CURVES[key.algorithm][1]
    r, s = utils.decode_dss_signature(key.key.sign(signed, _ecdsa(key.algorithm)))
    return r.to_bytes(size) + s.to_bytes(size)


def _check(key: VerifyingKey, signature: bytes, signed: bytes) -> None:
    """Raise `InvalidSignature` or ValueError."""
    if isinstance(key.key, ed25519.Ed25519PublicKey):
        key.key.verify(signature, signed)
    elif isinstance(key.key, rsa.RSAPublicKey):
        key.key.verify(signature, signed, _padding(key.algorithm), _hash(key.algorithm))
    else:
        size = _CURVES[key.algorithm][1]
        if len(signature) != 2 * size:
            raise ValueError("not of the length of this curve")
        pair = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
        key.key.verify(utils.encode_dss_signature(*pair), signed, ec.ECDSA(_hash(key.algorithm)))


def _ecdsa(algorithm: str) -> ec.ECDSA:
    """With a nonce made of key and message (RFC 6979), where OpenSSL can: a bundle signed twice is the same bundle."""
    try:
        return ec.ECDSA(_hash(algorithm), deterministic_signing=True)
    except UnsupportedAlgorithm:
        return ec.ECDSA(_hash(algorithm))


def _hash(algorithm: str) -> hashes.HashAlgorithm:
    return _HASHES[algorithm[2:]]()


def _padding(algorithm: str) -> padding.PSS | padding.PKCS1v15:
    if algorithm.startswith("PS"):
        return padding.PSS(mgf=padding.MGF1(_hash(algorithm)), salt_length=padding.PSS.DIGEST_LENGTH)
    return padding.PKCS1v15()


# ── the token ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _token(bundle: Bundle) -> str:
    if bundle.signatures is None:
        raise BundleRefused("it is not signed", code="bundle_unsigned")
    found = json_of(SIGNATURES, bundle.signatures)
    tokens = found.get("signatures") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or len(tokens) != 1 or not isinstance(tokens[0], str):
        raise _invalid(f"{SIGNATURES} does not hold exactly one")
    return tokens[0]


def _key_id(header: Mapping[str, object], claims: Mapping[str, object], keys: Mapping[str, VerifyingKey]) -> str:
    """Which key it says: header before claim, as OPA looks; where both speak they must agree."""
    stated = {value for value in (header.get("kid"), claims.get("keyid")) if value is not None}
    if not stated and len(keys) == 1:
        return next(iter(keys))
    if len(stated) != 1:
        raise _invalid("it names two keys" if stated else "it names no key, and there are several")
    (name,) = stated
    if not isinstance(name, str) or name not in keys:
        raise BundleRefused(f"no key {str(name)[:60]!r} is configured", code="bundle_key_unknown")
    return name


def _compare(files: object, bundle: Bundle) -> None:
    listed: dict[str, str] = {}
    try:
        for entry in cast("list[dict[str, str]]", files):
            name, content = entry["name"], bundle.files.get(entry["name"])
            if content is None:
                raise _invalid(f"{name[:80]} was signed and is missing")
            if name in listed or entry["algorithm"] not in _DIGESTS:
                raise _invalid(f"{name[:80]} is listed twice, or hashed in a way that is not accepted")
            listed[name] = entry["hash"]
            if digest(name, content, entry["algorithm"]) != entry["hash"]:
                raise _invalid(f"{name[:80]} is not what was signed")
    except (TypeError, LookupError, AttributeError) as error:
        raise _invalid("its list of files is malformed") from error
    if added := sorted(bundle.files.keys() - listed.keys()):
        raise _invalid(f"{added[0][:80]} was not signed")


def _object(part: str) -> dict[str, object]:
    found = canonical.parse(_decoded(part))
    if not isinstance(found, dict):
        raise NotJson("a part of it is not an object")
    return cast("dict[str, object]", found)


def _encoded(value: Mapping[str, object]) -> str:
    return _unpadded(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decoded(part: str) -> bytes:
    """Base64url without padding (RFC 7515 §2), and each value in one spelling only."""
    data = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if _unpadded(data) != part:
        raise ValueError("it is not base64url")
    return data


def _invalid(reason: str) -> BundleRefused:
    return BundleRefused(f"the signature does not hold: {reason}", code="bundle_signature_invalid")
