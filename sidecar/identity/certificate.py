"""The few parts of a certificate that an X509-SVID is judged by, read from its DER.

OpenSSL has parsed the same bytes, and verified signatures and dates, before anything of this is asked; a second parser with
all that X.509 has room for costs a process 12 MiB and a handshake more time than it takes to read four extensions. So this
reads little and takes little: definite and shortest lengths, tags of one byte, nothing left over (X.690 §10), each extension
once, booleans in one spelling. What it does not look into (names, keys, other extensions) it passes over as a whole.

A property test and a fuzz target hold it against `cryptography`: it must never see anything else in a certificate.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import NamedTuple

SERVER_AUTH = bytes.fromhex("2b06010505070301")
CLIENT_AUTH = bytes.fromhex("2b06010505070302")
"""Key purposes (RFC 5280 §4.2.1.12), as an OBJECT IDENTIFIER's contents."""

DIGITAL_SIGNATURE, KEY_CERT_SIGN, CRL_SIGN = 0x80, 0x04, 0x02
"""Bits of the first octet of a key usage (RFC 5280 §4.2.1.3)."""

_BOOLEAN, _INTEGER, _BIT_STRING, _OCTETS, _OID, _UTC_TIME, _GENERALIZED_TIME, _SEQUENCE = (
    0x01, 0x02, 0x03, 0x04, 0x06, 0x17, 0x18, 0x30,
)  # fmt: skip
_VERSION, _ISSUER_ID, _SUBJECT_ID, _EXTENSIONS = 0xA0, 0x81, 0x82, 0xA3
_V3 = b"\x02\x01\x02"
_TRUE = (_BOOLEAN, b"\xff")
_URI = 0x86
_NAMES = {0xA0, 0x81, 0x82, 0xA3, 0xA4, 0xA5, _URI, 0x87, 0x88}
"""GeneralName (RFC 5280 §4.2.1.6)."""
_SAN, _BASIC_CONSTRAINTS, _KEY_USAGE, _PURPOSES = b"\x55\x1d\x11", b"\x55\x1d\x13", b"\x55\x1d\x0f", b"\x55\x1d\x25"


class Malformed(ValueError):
    """Not the DER of a certificate."""


class ExtensionMalformed(ValueError):
    """One of the extensions is not what it should be, or is there twice."""


class Certificate(NamedTuple):
    not_after: float
    """Unix seconds."""
    uris: tuple[str, ...]
    is_authority: bool
    usage: int | None
    """First octet of the key usage, None where the certificate does not limit it."""
    purposes: frozenset[bytes] | None
    """Extended key usage; None where the certificate does not limit it."""


def read(der: bytes) -> Certificate:
    """Raises `Malformed` or `ExtensionMalformed`, whose words are not those of the certificate."""
    signed = _elements(_only(der, _SEQUENCE, Malformed), Malformed)
    if [tag for tag, _ in signed] != [_SEQUENCE, _SEQUENCE, _BIT_STRING]:
        raise Malformed("it is no signed certificate")
    parts = _elements(signed[0][1], Malformed)
    v3 = bool(parts) and parts[0] == (_VERSION, _V3)
    if parts and parts[0][0] == _VERSION:
        del parts[0]
    expected = (_INTEGER, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE)
    if tuple(tag for tag, _ in parts[:6]) != expected:
        raise Malformed("it is no certificate")
    not_after = _not_after(parts[3][1])
    optional = parts[6:]
    for tag in (_ISSUER_ID, _SUBJECT_ID):
        if optional and optional[0][0] == tag:
            del optional[0]
    if not optional:
        return Certificate(not_after, (), is_authority=False, usage=None, purposes=None)
    if not v3 or len(optional) > 1 or optional[0][0] != _EXTENSIONS:
        raise Malformed("it holds something that no certificate does")
    return _extended(not_after, _extensions(_only(optional[0][1], _SEQUENCE, ExtensionMalformed)))


def _extended(not_after: float, extensions: dict[bytes, bytes]) -> Certificate:
    uris: tuple[str, ...] = ()
    is_authority, usage, purposes = False, None, None
    if (found := extensions.get(_SAN)) is not None:
        uris = _uris(_only(found, _SEQUENCE, ExtensionMalformed))
    if (found := extensions.get(_BASIC_CONSTRAINTS)) is not None:
        is_authority = _is_authority(_only(found, _SEQUENCE, ExtensionMalformed))
    if (found := extensions.get(_KEY_USAGE)) is not None:
        usage = _usage(_only(found, _BIT_STRING, ExtensionMalformed))
    if (found := extensions.get(_PURPOSES)) is not None:
        purposes = _purposes(_only(found, _SEQUENCE, ExtensionMalformed))
    return Certificate(not_after, uris, is_authority, usage, purposes)


def _not_after(validity: bytes) -> float:
    times = _elements(validity, Malformed)
    if len(times) != 2:
        raise Malformed("it has no dates")
    tag, text = times[1]
    digits, size = text[:-1], {_UTC_TIME: 12, _GENERALIZED_TIME: 14}.get(tag)
    if len(digits) != size or not digits.isdigit() or text[-1:] != b"Z":
        raise Malformed("its end is no date")
    if tag == _UTC_TIME:
        digits = (b"19" if digits >= b"50" else b"20") + digits  # RFC 5280 §4.1.2.5.1
    year = int(digits[:4])
    month, day, hour, minute, second = (int(digits[at : at + 2]) for at in range(4, 14, 2))
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Malformed("its end is no date") from error


# ── extensions ────────────────────────────────────────────────────────────────────────────────────────────────────


def _extensions(listed: bytes) -> dict[bytes, bytes]:
    """Identifier → value."""
    found: dict[bytes, bytes] = {}
    for tag, entry in _elements(listed, ExtensionMalformed):
        parts = _elements(entry, ExtensionMalformed) if tag == _SEQUENCE else []
        if len(parts) == 3 and parts[1] == _TRUE:
            del parts[1]
        if len(parts) != 2 or parts[0][0] != _OID or parts[1][0] != _OCTETS:
            raise ExtensionMalformed("one is no extension")
        identifier, value = parts[0][1], parts[1][1]
        _check_identifier(identifier)
        if identifier in found:
            raise ExtensionMalformed("one is there twice")
        found[identifier] = value
    if not found:
        raise ExtensionMalformed("there are none, where some were announced")
    return found


def _uris(names: bytes) -> tuple[str, ...]:
    uris: list[str] = []
    for tag, name in _elements(names, ExtensionMalformed):
        if tag not in _NAMES:
            raise ExtensionMalformed("one of its names is of no kind")
        if tag == _URI:
            if not name.isascii():
                raise ExtensionMalformed("one of its names is not ASCII")
            uris.append(name.decode("ascii"))
    return tuple(uris)


def _is_authority(constraints: bytes) -> bool:
    parts = _elements(constraints, ExtensionMalformed)
    authority = bool(parts) and parts[0] == _TRUE
    if authority:
        del parts[0]
    if len(parts) > 1 or (parts and (parts[0][0] != _INTEGER or not parts[0][1])):
        raise ExtensionMalformed("its basic constraints are none")
    return authority


def _usage(bits: bytes) -> int:
    unused = bits[0] if bits else 8
    if unused > 7 or (len(bits) == 1 and unused) or bits[-1] & ((1 << unused) - 1 if len(bits) > 1 else 0):
        raise ExtensionMalformed("its key usage is none")
    return bits[1] if len(bits) > 1 else 0


def _purposes(listed: bytes) -> frozenset[bytes]:
    found = _elements(listed, ExtensionMalformed)
    for tag, identifier in found:
        if tag != _OID:
            raise ExtensionMalformed("one of its purposes is none")
        _check_identifier(identifier)
    return frozenset(identifier for _, identifier in found)


def _check_identifier(contents: bytes) -> None:
    """Sub-identifiers in as few octets as will do, the last one ended (X.690 §8.19)."""
    if not contents or contents[-1] & 0x80 or contents[0] == 0x80:
        raise ExtensionMalformed("one of its identifiers is none")
    if b"\x80" in contents and any(
        octet == 0x80 and not before & 0x80 for before, octet in itertools.pairwise(contents)
    ):
        raise ExtensionMalformed("one of its identifiers is none")


# ── DER ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _only(data: bytes, tag: int, wrong: type[ValueError]) -> bytes:
    """The contents of the one element that the data is."""
    found = _elements(data, wrong)
    if len(found) != 1 or found[0][0] != tag:
        raise wrong("it is not one element of the kind that belongs there")
    return found[0][1]


def _elements(data: bytes, wrong: type[ValueError]) -> list[tuple[int, bytes]]:
    """Tag and contents of each element; what they hold together is all of the data."""
    found: list[tuple[int, bytes]] = []
    at, end = 0, len(data)
    while at < end:
        tag = data[at]
        start = at + 2
        if start > end or tag & 0x1F == 0x1F:
            raise wrong("an element is cut short, or of a kind that no certificate has")
        size = data[at + 1]
        if size >= 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[start : start + count])
            start += count
            if not 1 <= count <= 4 or start > end or size < max(0x80, 1 << 8 * (count - 1)):
                raise wrong("a length is cut short, or not in its shortest form")
        at = start + size
        if at > end:
            raise wrong("an element is longer than what holds it")
        found.append((tag, data[start:at]))
    return found
