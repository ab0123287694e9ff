"""Heads of HTTP/2 messages: from fields to the model and back (RFC 9113 §8.3). Does no I/O.

What comes in here is well-formed (`h2_validity`): pseudo-fields that are known, complete, not repeated and in front, lower-case
names, no connection-specific field, one Host that agrees with `:authority`, crumbs of cookies joined. What this file adds: the
meaning of each, the limits, and the stricter grammar that what is sent on as HTTP/1.1 needs.

An extended CONNECT (RFC 8441) becomes what HTTP/1.1 says with `GET` and `Upgrade`, and the other way round, so that nobody
further up need know how a tunnel was asked for. The key of a WebSocket's handshake and the proof that it was read belong to
HTTP/1.1 alone (§5.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import Fields, RequestHead, ResponseHead, maker
from sidecar.wire import target
from sidecar.wire.h2_validity import CONNECTION_FIELDS
from sidecar.wire.headers import check_field

Field = tuple[bytes, bytes]

_FIELD_OVERHEAD = 32
"""What a field counts for on top of its name and value (RFC 9113 §6.5.2)."""
_NOT_FROM_FIELDS = CONNECTION_FIELDS | {b"content-length", b"host"}
_HANDSHAKE = frozenset({b"sec-websocket-key", b"sec-websocket-accept"})
_NOT_IN_TUNNELS = _NOT_FROM_FIELDS | _HANDSHAKE
_METHOD = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-5][0-9]{2}")
_NAMES = re.compile(rb"(?::?[!#$%&'*+\-.^_`|~0-9a-z]+\n)*")
_CONTROLS = bytes([*range(0x09), *range(0x0A, 0x20), 0x7F])
_UPGRADE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}(?:/[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64})?")
_request_head, _response_head = maker(RequestHead), maker(ResponseHead)
_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})
_REST_OF_LINE = len("  HTTP/1.1")
"""What method and path make a request line with."""


def check(fields: Fields, max_header_bytes: int, max_header_fields: int) -> None:
    """Raise `ClientFault` for fields that are too many, too large, or that HTTP/1.1 could not carry."""
    if len(fields) > max_header_fields:
        raise ClientFault(code="head_too_many_fields", public="there are too many header fields", status=431)
    names = b"\n".join([name for name, _ in fields])
    values = b"\n".join([value for _, value in fields])
    if len(names) + len(values) + (_FIELD_OVERHEAD - 2) * len(fields) > max_header_bytes:
        raise ClientFault(code="head_too_large", public="the header section is too large", status=431)
    # All at once, since it nearly always passes; one by one to say which does not. A line feed in a name would make it two.
    if (
        names.count(b"\n") != len(fields) - 1
        or not _NAMES.fullmatch(names + b"\n")
        or len(values.translate(None, _CONTROLS)) + len(fields) - 1 != len(values)
    ):
        for name, value in fields:
            if name[:1] != b":":
                check_field(name, value)
            elif len(value.translate(None, _CONTROLS)) != len(value):
                raise ClientFault(code="head_control_character", public="a pseudo-field holds a control character")


def written(fields: Fields, *, ended: bool) -> bytes:
    """The fields in one text, by which a head can be remembered: different ones differ, since no well-formed field holds a
    line feed; and no head of HTTP/1.1 is one of these, since those hold carriage returns.
    """
    return b"\n".join((b"whole" if ended else b"begun", *chain.from_iterable(fields)))


def request_head(
    fields: Fields,
    *,
    tls: bool,
    ended: bool,
    max_header_bytes: int,
    max_header_fields: int,
    max_request_line_bytes: int = 8192,
    allow_encoded_slash: bool = False,
) -> tuple[RequestHead, int | None]:
    """Read the head of a request whose body has `ended` with it or follows. Returns it and the body's length, if stated.

    A tunnel that is asked for is a `GET` with `upgrade`; what follows has no length then, and is no body. Raises `ClientFault`.
    """
    check(fields, max_header_bytes, max_header_fields)
    pseudo: dict[bytes, bytes] = {}
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    expects_continue = False
    kept: list[Field] = []
    for field in fields:
        name, value = field
        if name[:1] == b":":
            pseudo[name] = value
        elif name == b"host":
            hosts.append(value)
        else:
            if name == b"content-length":
                lengths.append(value)
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise ClientFault(code="expectation_failed", public="this expectation cannot be met", status=417)
                expects_continue = True
            kept.append(field)
    method = pseudo[b":method"]
    upgrade: str | None = None
    if method == b"CONNECT":
        upgrade = _upgrade(pseudo, lengths)
        method, expects_continue = b"GET", False
        kept = [field for field in kept if field[0] not in _HANDSHAKE]
    if not _METHOD.fullmatch(method):
        raise ClientFault(code="method_malformed", public="the method is malformed")
    if pseudo[b":scheme"] != (b"https" if tls else b"http"):
        raise ClientFault(code="scheme_mismatch", public="the scheme of the target is not that of the connection")
    host, port = target.authority(pseudo[b":authority"] if b":authority" in pseudo else hosts[0])
    path = pseudo[b":path"]
    if len(method) + len(path) + _REST_OF_LINE > max_request_line_bytes:
        raise ClientFault(code="request_line_too_long", public="the request line is too long", status=414)
    where = (
        target.ASTERISK
        if path == b"*" and method == b"OPTIONS"
        else target.origin_form(path, allow_encoded_slash=allow_encoded_slash)
    )
    head = _request_head(
        method=method.decode("ascii"), target=where, host=host, port=port, fields=kept, protocol="HTTP/2",
        upgrade=upgrade, expects_continue=expects_continue,
    )  # fmt: skip
    return head, None if upgrade is not None else _request_length(lengths, ended=ended)


def _upgrade(pseudo: dict[bytes, bytes], lengths: list[bytes]) -> str:
    """The protocol that an extended CONNECT asks for (RFC 8441 §4)."""
    protocol = pseudo.get(b":protocol")
    if protocol is None:
        raise ClientFault(code="connect_unsupported", public="CONNECT is not available here", status=501)
    if not _UPGRADE.fullmatch(protocol):
        raise ClientFault(public="the protocol asked for is malformed")
    if b":authority" not in pseudo:
        raise ClientFault(code="authority_malformed", public="the authority is missing")
    if lengths:
        raise ClientFault(code="length_malformed", public="a tunnel has no length")
    return protocol.decode("ascii")


def _request_length(lengths: list[bytes], *, ended: bool) -> int | None:
    if not lengths:
        return 0 if ended else None
    if len(lengths) > 1 or not _DIGITS.fullmatch(lengths[0]):
        raise ClientFault(code="length_malformed", public="Content-Length is malformed")
    length = int(lengths[0])
    if ended and length:
        raise ClientFault(code="length_mismatch", public="the body is not as long as Content-Length says")
    return length


def response_head(fields: Fields, *, max_header_bytes: int, max_header_fields: int) -> tuple[ResponseHead, int | None]:
    """Read the head of an answer: it and the length that it states. Raises `MaybeSent`."""
    try:
        check(fields, max_header_bytes, max_header_fields)
    except ClientFault as fault:
        raise MaybeSent(fault.public, code="upstream_malformed") from fault
    status = b""
    length: int | None = None
    kept: list[Field] = []
    for field in fields:
        name, value = field
        if name == b":status":
            status = value
            continue
        if name == b"content-length":
            if length is not None or not _DIGITS.fullmatch(value):
                raise MaybeSent("Content-Length is malformed", code="upstream_malformed")
            length = int(value)
        kept.append(field)
    if not _STATUS.fullmatch(status) or status == b"101":
        raise MaybeSent("the status is none of HTTP/2", code="upstream_malformed")
    return _response_head(status=int(status), fields=kept), length


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_STATUSES = {status: (b":status", b"%d" % status) for status in range(100, 600)}


def encode_request(head: RequestHead, fields: Iterable[Field], length: int | None, *, tls: bool) -> list[Field]:
    """The fields of a request. `length` is its body's, None where that is not known. One with `upgrade` becomes a CONNECT."""
    if head.upgrade is not None:
        return _encode_connect(head, fields, head.upgrade, tls=tls)
    lines = [
        (b":method", head.method.encode("ascii")),
        (b":scheme", b"https" if tls else b"http"),
        (b":authority", head.authority.encode("ascii")),
        (b":path", str(head.target).encode("ascii")),
    ]
    lines += [field for field in fields if field[0] not in _NOT_FROM_FIELDS]
    if length or (length == 0 and head.method in _WITH_LENGTH):
        lines.append((b"content-length", b"%d" % length))
    return lines


def _encode_connect(head: RequestHead, fields: Iterable[Field], protocol: str, *, tls: bool) -> list[Field]:
    return [
        (b":method", b"CONNECT"),
        (b":protocol", protocol.encode("ascii")),
        (b":scheme", b"https" if tls else b"http"),
        (b":authority", head.authority.encode("ascii")),
        (b":path", str(head.target).encode("ascii")),
        *(field for field in fields if field[0] not in _NOT_IN_TUNNELS),
    ]


def encode_response(head: ResponseHead, length: int | None, *, bodiless: bool) -> list[Field]:
    """The fields of an answer. A length that `head.fields` state is kept where there is no body to contradict it."""
    lines = [_STATUSES[head.status]]
    dropped = CONNECTION_FIELDS if bodiless and head.status != 204 else _NOT_FROM_FIELDS
    lines += [field for field in head.fields if field[0] not in dropped]
    if length is not None and not bodiless:
        lines.append((b"content-length", b"%d" % length))
    return lines


def encode_interim(head: ResponseHead) -> list[Field]:
    return [_STATUSES[head.status], *(field for field in head.fields if field[0] not in _NOT_FROM_FIELDS)]


def tunnel_head(head: ResponseHead) -> ResponseHead:
    """The head that accepts an extended CONNECT, said as HTTP/1.1 does (RFC 8441 §5)."""
    return ResponseHead(status=101, fields=[field for field in head.fields if field[0] not in _NOT_IN_TUNNELS])


def encode_tunnel(head: ResponseHead) -> list[Field]:
    """The fields that accept an extended CONNECT."""
    return [_STATUSES[200], *(field for field in head.fields if field[0] not in _NOT_IN_TUNNELS)]
