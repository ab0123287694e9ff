"""Heads of HTTP/2 messages: from fields to the model and back (RFC 9113 §8.3). Does no I/O.

`h2` has validated what comes in here: pseudo-fields that are known, complete, not repeated and in front, lower-case names, no
connection-specific field, one Host that agrees with `:authority`, crumbs of cookies joined. What this file adds: the
meaning of each, the limits, and the stricter grammar that what is sent on as HTTP/1.1 needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import Fields, RequestHead, ResponseHead
from sidecar.wire import target
from sidecar.wire.headers import check_field

Field = tuple[bytes, bytes]

CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
"""What HTTP/2 has no use for, and forbids (RFC 9113 §8.2.2)."""
_FIELD_OVERHEAD = 32
"""What a field counts for on top of its name and value (RFC 9113 §6.5.2)."""
_NOT_FROM_FIELDS = CONNECTION_FIELDS | {b"content-length", b"host"}
_METHOD = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-5][0-9]{2}")
_NAMES = re.compile(rb"(?::?[!#$%&'*+\-.^_`|~0-9a-z]+\n)*")
_CONTROLS = bytes([*range(0x09), *range(0x0A, 0x20), 0x7F])
_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})


def check(fields: Fields, max_header_bytes: int, max_header_fields: int) -> None:
    """Raise `ClientFault` for fields that are too many, too large, or that HTTP/1.1 could not carry."""
    if len(fields) > max_header_fields:
        raise ClientFault(code="head_too_many_fields", public="there are too many header fields", status=431)
    names = b"\n".join([name for name, _ in fields])
    values = b"\n".join([value for _, value in fields])
    if len(names) + len(values) + (_FIELD_OVERHEAD - 2) * len(fields) > max_header_bytes:
        raise ClientFault(code="head_too_large", public="the header section is too large", status=431)
    # All at once, since it nearly always passes; one by one to say which does not.
    if not _NAMES.fullmatch(names + b"\n") or len(values.translate(None, _CONTROLS)) + len(fields) - 1 != len(values):
        for name, value in fields:
            if name[:1] != b":":
                check_field(name, value)
            elif len(value.translate(None, _CONTROLS)) != len(value):
                raise ClientFault(code="head_control_character", public="a pseudo-field holds a control character")


def request_head(
    fields: Fields,
    *,
    tls: bool,
    ended: bool,
    max_header_bytes: int,
    max_header_fields: int,
    allow_encoded_slash: bool = False,
) -> tuple[RequestHead, int | None]:
    """Read the head of a request whose body has `ended` with it or follows. Returns it and the body's length, if stated.

    Raises `ClientFault`.
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
    if method == b"CONNECT" or b":protocol" in pseudo:
        raise ClientFault(code="connect_unsupported", public="CONNECT is not available here", status=501)
    if not _METHOD.fullmatch(method):
        raise ClientFault(code="method_malformed", public="the method is malformed")
    if pseudo[b":scheme"] != (b"https" if tls else b"http"):
        raise ClientFault(code="scheme_mismatch", public="the scheme of the target is not that of the connection")
    host, port = target.authority(pseudo[b":authority"] if b":authority" in pseudo else hosts[0])
    path = pseudo[b":path"]
    where = (
        target.ASTERISK
        if path == b"*" and method == b"OPTIONS"
        else target.origin_form(path, allow_encoded_slash=allow_encoded_slash)
    )
    head = RequestHead(
        method=method.decode("ascii"), target=where, host=host, port=port, fields=kept, protocol="HTTP/2",
        expects_continue=expects_continue,
    )  # fmt: skip
    return head, _request_length(lengths, ended=ended)


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
    return ResponseHead(status=int(status), fields=kept), length


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_STATUSES = {status: (b":status", b"%d" % status) for status in range(100, 600)}


def encode_request(head: RequestHead, fields: Iterable[Field], length: int | None, *, tls: bool) -> list[Field]:
    """The fields of a request. `length` is its body's, None where that is not known."""
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
