"""Signatures over bundles, as OPA makes and checks them: one JWS over the hashes of all files.

The hash of a JSON file is that of its canonical spelling, so white space may change and meaning may not; of a rule it is
that of its bytes. `kid` and `scope` are always written: without a key id OPA must be told which key, and a scope keeps
a bundle that was signed for one use from another. The algorithm is the verifier's, by key, and never the token's word.

Of what a stranger wrote nothing is parsed but a short header before a signature holds: the file around the token has one
form, and the claims are bytes until a key vouches for them.

Sources: RFC 7515, RFC 7518 §3, OPA's documentation of bundle signing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import cast

from sidecar.bundles import canonical
from sidecar.bundles.archive import DATA, MANIFEST, SIGNATURES, Bundle, BundleRefused, canonical_of
from sidecar.bundles.canonical import NotJson, Number
from sidecar.bundles.keys import SigningKey, VerifyingKey, check, private_key, public_key, signature
from sidecar.errors import OperatorFault

__all__ = [
    "SigningKey",
    "VerifyingKey",
    "content_digest",
    "digest",
    "names_its_key",
    "private_key",
    "public_key",
    "sign",
    "verify",
]

_DIGESTS = {"SHA-256": hashlib.sha256, "SHA-384": hashlib.sha384, "SHA-512": hashlib.sha512}
_MAX_HEADER_CHARACTERS = 4096
_WORD = rb"[A-Za-z0-9_-]+"
_TOKENS = [rb"\{", rb'"signatures"', rb":", rb"\[", rb'"(%b\.%b\.%b)"' % (_WORD, _WORD, _WORD), rb"\]"]
_PLUGIN = rb"[ \t\r\n]*".join([rb"(?:,", rb'"plugin"', rb":", rb'"(?:_default)?"', rb")?"])
_ONE_TOKEN = re.compile(rb"[ \t\r\n]*".join([b"", *_TOKENS, _PLUGIN, rb"\}", b""]))
"""`.signatures.json` as OPA writes it: a JWS in its compact form, and the name of the signer that OPA has built in."""


def sign(bundle: Bundle, key: SigningKey, scope: str) -> Bundle:
    """Return the bundle with a signature in place of any that it had. The same input gives the same bytes.

    Raises `OperatorFault` (`signing_key_unusable`) where OPA could not tell the key or the scope from none.
    """
    if not key.id or not scope:
        raise OperatorFault("a signature names its key and its scope", code="signing_key_unusable")
    header = {"alg": key.algorithm, "kid": key.id, "typ": "JWT"}
    payload = {
        "files": [
            {"algorithm": "SHA-256", "hash": _digest(bundle, name), "name": name} for name in sorted(bundle.files)
        ],
        "keyid": key.id,
        "scope": scope,
    }
    signed = f"{_encoded(header)}.{_encoded(payload)}"
    token = f"{signed}.{_unpadded(signature(key, signed.encode()))}"
    return Bundle(files=bundle.files, signatures=json.dumps({"signatures": [token]}).encode())


def verify(bundle: Bundle, keys: Mapping[str, VerifyingKey], scope: str) -> str:
    """Return the id of the key that vouches for every file of the bundle, and for no other.

    Raises `BundleRefused` (`bundle_unsigned`, `bundle_signature_invalid`, `bundle_scope_mismatch`, `bundle_key_unknown`).
    """
    head, body, raw = _token(bundle)
    header, signed = _header(head), f"{head}.{body}".encode("ascii")
    stated = _stated(header.get("kid"), "kid")
    holding = _holding(header, stated, signed, raw, keys)
    try:
        claims = _object(_decoded(body))
    except ValueError as error:
        raise _invalid(f"its claims cannot be read: {error}") from error
    key_id = _key_id(stated, _stated(claims.get("keyid"), "keyid"), holding, keys)
    said = _stated(claims.get("scope"), "scope") or ""
    if said != scope:
        raise BundleRefused(f"it was signed for scope {said[:60]!a}, not {scope!a}", code="bundle_scope_mismatch")
    _compare(claims.get("files"), bundle)
    return key_id


def names_its_key(bundle: Bundle) -> bool:
    """Whether OPA can tell which key to verify this bundle with. For a bundle whose signature holds."""
    head, body, _ = _token(bundle)
    return bool(_header(head).get("kid") or _object(_decoded(body)).get("keyid"))


def digest(name: str, content: bytes, algorithm: str = "SHA-256") -> str:
    """Hex hash of a file of a bundle, as it is signed."""
    if name in {MANIFEST, DATA} or name.endswith(f"/{DATA}"):
        content = canonical_of(name, content)
    return _DIGESTS[algorithm](content).hexdigest()


def _digest(bundle: Bundle, name: str, algorithm: str = "SHA-256") -> str:
    """The same, worked out once for each file of a bundle."""
    known = bundle.hashes.get((name, algorithm))
    if known is None:
        known = bundle.hashes[name, algorithm] = digest(name, bundle.files[name], algorithm)
    return known


def content_digest(bundle: Bundle) -> str:
    """Hex SHA-256 of what the bundle says, whoever signed it and however it was packed."""
    lines = [f"{name}\0{_digest(bundle, name)}\n" for name in sorted(bundle.files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ── the token ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _token(bundle: Bundle) -> tuple[str, str, bytes]:
    """Header and claims as they are encoded, and the bytes of the signature."""
    if bundle.signatures is None:
        raise BundleRefused(f"is not signed: it has no {SIGNATURES}", code="bundle_unsigned")
    found = _ONE_TOKEN.fullmatch(bundle.signatures)
    if found is None:
        raise _invalid(f"{SIGNATURES} does not hold exactly one, in the form that OPA writes")
    head, body, raw = found[1].decode("ascii").split(".")
    try:
        return head, body, _decoded(raw)
    except ValueError as error:
        raise _invalid(f"it cannot be read: {error}") from error


def _header(head: str) -> dict[str, object]:
    if len(head) > _MAX_HEADER_CHARACTERS:
        raise _invalid("its header is too long")
    try:
        header = _object(_decoded(head))
    except ValueError as error:
        raise _invalid(f"its header cannot be read: {error}") from error
    if "crit" in header:
        raise _invalid("it has a critical header that is not understood")
    if header.get("kid", "") is None:
        raise _invalid("its kid is not text")  # OPA would say so later
    return header


def _stated(value: object, what: str) -> str | None:
    """A text of the token; None where there is none, or an empty one, which OPA takes for none."""
    if value is None or (isinstance(value, str) and not isinstance(value, Number)):
        return value or None
    raise _invalid(f"its {what} is not text")


def _holding(
    header: Mapping[str, object], stated: str | None, signed: bytes, raw: bytes, keys: Mapping[str, VerifyingKey]
) -> frozenset[str]:
    """The keys with which the signature holds: the one that the header names, or of all that are there."""
    if stated is not None and stated not in keys:
        raise BundleRefused(f"no key {stated[:60]!a} is configured", code="bundle_key_unknown")
    said = header.get("alg")
    asked = {stated: keys[stated]} if stated is not None else keys
    fitting = {name: key for name, key in asked.items() if said == key.algorithm}
    if not fitting:
        theirs = ", ".join(f"{name} is for {key.algorithm}" for name, key in sorted(asked.items()))
        raise _invalid(f"it says {str(said)[:20]!a}, and key {theirs}")
    holding: set[str] = set()
    for name, key in fitting.items():
        try:
            check(key, raw, signed)
            holding.add(name)
        except ValueError:
            pass  # perhaps with another
    if not holding:
        raise _invalid(f"it was not made with key {' or '.join(sorted(fitting))}")
    return frozenset(holding)


def _key_id(header: str | None, claim: str | None, holding: frozenset[str], keys: Mapping[str, VerifyingKey]) -> str:
    """Which key it names: header before claim, as OPA looks; where both speak they must agree."""
    if header is not None and claim is not None and header != claim:
        raise _invalid("it names two keys")
    named = header or claim
    if named is None:
        if len(keys) == 1:
            return next(iter(holding))
        raise _invalid("it names no key, and there are several")
    if named not in keys:
        raise BundleRefused(f"no key {named[:60]!a} is configured", code="bundle_key_unknown")
    if named not in holding:
        raise _invalid(f"it was not made with key {named}")
    return named


def _compare(files: object, bundle: Bundle) -> None:
    listed: dict[str, str] = {}
    if not isinstance(files, list):
        raise _invalid("its list of files is malformed")
    for entry in files:
        name, algorithm, claimed = _listed(entry)
        if name not in bundle.files:
            raise _invalid(f"{name[:80]!a} was signed and is missing")
        if name in listed or algorithm not in _DIGESTS:
            raise _invalid(f"{name[:80]!a} is listed twice, or hashed in a way that is not accepted")
        listed[name] = claimed
        if _digest(bundle, name, algorithm) != claimed:
            raise _invalid(f"{name[:80]!a} is not what was signed")
    if added := sorted(bundle.files.keys() - listed.keys()):
        raise _invalid(f"{added[0][:80]!a} was not signed")


def _listed(entry: object) -> tuple[str, str, str]:
    found = tuple(entry.get(key) for key in ("name", "algorithm", "hash")) if isinstance(entry, dict) else ()
    if len(found) != 3 or not all(isinstance(one, str) for one in found):
        raise _invalid("its list of files is malformed")
    return cast("tuple[str, str, str]", found)


def _object(text: bytes) -> dict[str, object]:
    """Raises `NotJson`, for half a character too: what is said of it can be written down."""
    found = canonical.parse(text)
    canonical.encode(found)
    if not isinstance(found, dict):
        raise NotJson("is not an object")
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
