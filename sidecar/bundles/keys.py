"""Keys that sign bundles and keys that verify them: read from PEM, held with the one algorithm that each is used with.

What a key is for is the configuration's word, and never that of what was signed; a key that does not fit is refused when
it is read. A private key is read from a file that its owner alone may read, and is never shown.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from sidecar.errors import OperatorFault

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

_HASHES: Mapping[str, type[hashes.HashAlgorithm]] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
_CURVES: Mapping[str, tuple[type[ec.EllipticCurve], int]] = {
    "ES256": (ec.SECP256R1, 32), "ES384": (ec.SECP384R1, 48), "ES512": (ec.SECP521R1, 66),
}  # fmt: skip
_MIN_RSA_BITS = 2048
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyingKey:
    """A public key and the one algorithm (RFC 7518 §3.1) that it is used with."""

    algorithm: str
    key: PublicKey = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    id: str
    algorithm: str
    key: PrivateKey = field(repr=False)


def public_key(algorithm: str, pem: bytes) -> VerifyingKey:
    """Read a public key, or the one in a certificate: the first thing in the PEM, as OPA does.

    Raises `OperatorFault` (`policy_key_unusable`), whose text goes on after the name of a file.
    """
    kind = re.search(rb"-----BEGIN ([A-Z0-9 ]+)-----", pem)
    if kind is not None and b"PRIVATE KEY" in kind[1]:
        raise OperatorFault("holds a private key; only the public one belongs here", code="policy_key_unusable")
    try:
        key = (
            x509.load_pem_x509_certificate(pem).public_key()
            if kind is not None and kind[1] == b"CERTIFICATE"
            else serialization.load_pem_public_key(pem)
        )
    except (ValueError, UnsupportedAlgorithm) as error:
        raise OperatorFault("is not a public key in PEM, nor a certificate", code="policy_key_unusable") from error
    found = cast("PublicKey", key)
    _fits(algorithm, found)
    return VerifyingKey(algorithm=algorithm, key=found)


def private_key(path: Path, *, key_id: str, algorithm: str | None = None) -> SigningKey:
    """Read a private key (PEM: PKCS#8, PKCS#1 or SEC1) that only its owner may read. Blocks.

    `algorithm` is that of the key's kind where it is not given: ES256/384/512 by curve, EdDSA, RS256.
    Raises `OperatorFault` (`signing_key_unusable`).
    """
    try:
        # Not blocking: a pipe in the file's place must not hang us.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OperatorFault(f"{path}: is not a regular file", code="signing_key_unusable")
            pem = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise OperatorFault(f"{path}: {error.strerror}", code="signing_key_unusable") from error
    if (mode := stat.S_IMODE(found.st_mode)) & _OTHERS:
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
    few = isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_RSA_BITS
    if not sound or few:
        why = f": {key.key_size} bits are too few" if few and isinstance(key, rsa.RSAPublicKey) else ""
        raise OperatorFault(f"is a key that cannot be used with {algorithm}{why}", code="policy_key_unusable")


def signature(key: SigningKey, signed: bytes) -> bytes:
    """As JWS has it (RFC 7518 §3): for elliptic curves the two numbers beside each other, and not in DER."""
    if isinstance(key.key, ed25519.Ed25519PrivateKey):
        return key.key.sign(signed)
    if isinstance(key.key, rsa.RSAPrivateKey):
        return key.key.sign(signed, _padding(key.algorithm), _hash(key.algorithm))
    size = _CURVES[key.algorithm][1]
    r, s = utils.decode_dss_signature(key.key.sign(signed, _ecdsa(key.algorithm)))
    return r.to_bytes(size) + s.to_bytes(size)


def check(key: VerifyingKey, signature: bytes, signed: bytes) -> None:
    """Raise ValueError unless this is the signature of that key over `signed`."""
    try:
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
    except InvalidSignature as error:
        raise ValueError("not of this key") from error


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
