"""Whether the header section of an HTTP/2 message is well-formed (RFC 9113 §8.2, §8.3; RFC 8441 §4). Does no I/O.

A malformed message is an error of its stream, whatever it may have meant (§8.1.1). What is asked here is only what the
RFC asks of everybody; that a message has a meaning, and one only, is asked in `h2_heads`.

hyper-h2 asks the same, a byte at a time; here all fields are looked at together, since nearly always nothing is wrong, and one
by one only to say what is. A test lays the two side by side.
"""

from __future__ import annotations

import re

Field = tuple[bytes, bytes]

CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
"""What HTTP/2 has no use for, and forbids (§8.2.2)."""
_ASKING = frozenset({b":method", b":scheme", b":path"})
_SHAPES = frozenset({_ASKING, _ASKING | {b":authority"}})
"""Pseudo-fields of a request (§8.3.1)."""
_CONNECT = frozenset({b":method"})
_EXTENDED_CONNECT = _ASKING | {b":protocol"}
_CONNECT_SHAPES = frozenset(
    {_CONNECT, _CONNECT | {b":authority"}, _EXTENDED_CONNECT, _EXTENDED_CONNECT | {b":authority"}}
)
_NAMES = re.compile(rb"(?::[a-z]+\n)*(?:[!#$%&'*+\-.^_`|~0-9a-z]+\n)*")
"""All names, an LF behind each: pseudo-fields first. (Stricter than §8.2.1: what fails here is looked at again.)"""
_PSEUDO_NAME = re.compile(rb":[!-9;-@\[-~]*")
_NAME = re.compile(rb"[!-9;-@\[-~]+")
"""§8.2.1: visible characters, no upper case, no colon but the one in front of a pseudo-field."""


class Malformed(Exception):
    """The message is none (RFC 9113 §8.1.1)."""


def request(fields: list[Field]) -> list[Field]:
    """Return the fields of a request, crumbs of cookies joined (§8.2.3). Raises `Malformed`."""
    names = [name for name, _ in fields]
    _sound(fields, names)
    pseudo = _pseudo(fields)
    method = pseudo.get(b":method")
    if frozenset(pseudo) not in (_CONNECT_SHAPES if method == b"CONNECT" else _SHAPES):
        raise Malformed("the pseudo-fields are not those of a request")
    if pseudo.get(b":path") == b"":
        raise Malformed("the path is empty")
    authority = pseudo.get(b":authority")
    if b"host" in names:
        if names.count(b"host") > 1 or authority not in (None, fields[names.index(b"host")][1]):
            raise Malformed("the authority is named twice")
    elif authority is None:
        raise Malformed("the authority is missing")
    return _joined(fields) if names.count(b"cookie") > 1 else fields


def response(fields: list[Field]) -> None:
    """Raise `Malformed` unless these are the fields of an answer, interim or final."""
    _sound(fields, [name for name, _ in fields])
    if not fields or fields[0][0] != b":status" or (len(fields) > 1 and fields[1][0][:1] == b":"):
        raise Malformed("the pseudo-fields are not those of an answer")


def trailers(fields: list[Field]) -> None:
    """Raise `Malformed` unless these may stand behind a body."""
    _sound(fields, [name for name, _ in fields])
    if fields and fields[0][0][:1] == b":":
        raise Malformed("a pseudo-field among the trailers")


def _pseudo(fields: list[Field]) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name[:1] != b":":
            break
        if name in found:
            raise Malformed("a pseudo-field is repeated")
        found[name] = value
    return found


def _joined(fields: list[Field]) -> list[Field]:
    kept = [field for field in fields if field[0] != b"cookie"]
    kept.append((b"cookie", b"; ".join([value for name, value in fields if name == b"cookie"])))
    return kept


def _sound(fields: list[Field], names: list[bytes]) -> None:
    """Raise `Malformed` for what no field of any message may be."""
    values = b"\n%b\n" % b"\n".join([value for _, value in fields])
    joined = b"\n".join(names) + b"\n"
    if (
        joined.count(b"\n") != len(fields)  # a line feed in a name would make it two
        or values.count(b"\n") != len(fields) + 1
        or b"\r" in values
        or b"\0" in values
        or b"\n " in values
        or b" \n" in values
        or b"\t" in values
        or not _NAMES.fullmatch(joined)
        or not CONNECTION_FIELDS.isdisjoint(names)
        or b"te" in names
    ):
        _look_closely(fields)


def _look_closely(fields: list[Field]) -> None:
    behind = False
    for name, value in fields:
        if name[:1] == b":":
            if behind:
                raise Malformed("a pseudo-field behind a field")
            if not _PSEUDO_NAME.fullmatch(name):
                raise Malformed("a character that no name has")
        else:
            behind = True
            if not _NAME.fullmatch(name):
                raise Malformed("a character that no name has")
        if b"\0" in value or b"\r" in value or b"\n" in value:
            raise Malformed("a character that no value has")
        if value.strip(b" \t") != value:
            raise Malformed("white space around a value")
        if name in CONNECTION_FIELDS:
            raise Malformed("a field of the connection")
        if name == b"te" and value.lower() != b"trailers":
            raise Malformed("TE says more than trailers")
