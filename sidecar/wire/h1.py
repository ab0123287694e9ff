"""HTTP/1.1 as bytes: heads in and out, and where a body ends (RFC 9112). Does no I/O and knows no clock.

`httptools` (llhttp) is the tokenizer of heads, not their judge. What this file adds to it:

- one complete head at a time is fed to it, and nothing else, so that it cannot lose its place in the stream: bodies,
  chunks, trailers, answers to HEAD and pipelined requests never reach it;
- size and number of fields are limited before anything is parsed;
- bare CR or LF, NUL, other controls and folded lines are refused wherever they stand;
- only HTTP/1.1 and 1.0; exactly one Host in 1.1 and at most one in 1.0; the target in the form that its method allows;
- Content-Length once, digits only; Transfer-Encoding once and only `chunked`; never both;
- chunk sizes and extensions by the grammar, extensions dropped; trailers are trailers and not headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus

import httptools

from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import Data, Fields, RequestHead, ResponseHead, Trailers, maker
from sidecar.wire import target

_CONTROLS = bytes([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F])
"""Without tab, CR and LF."""
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,15})"
    rb'(?:[ \t]*;[ \t]*[!#$%&\'*+\-.^_`|~0-9A-Za-z]+(?:=(?:[!#$%&\'*+\-.^_`|~0-9A-Za-z]+|"[^\x00-\x08\x0a-\x1f\x7f"\\]*"))?)*'
)
_REQUEST_LINE = re.compile(rb"[^ ]+ [^ ]+ HTTP/1\.[01]\r\n")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_UPGRADE = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:/[!#$%&'*+\-.^_`|~0-9A-Za-z]+)?")

_request_head, _response_head = maker(RequestHead), maker(ResponseHead)

MAX_CHUNK_LINE_BYTES = 1024

UNTIL_CLOSE = -1
CHUNKED = -2
Framing = int
"""How a body is framed: its length in bytes, `CHUNKED`, or `UNTIL_CLOSE` (answers only)."""


class _Head:
    """Collects what the tokenizer calls back with. `noted`: the values of what a connection is run by, under their names."""

    __slots__ = ("fields", "noted", "target")

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.noted: dict[bytes, list[bytes]] = {}

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.rstrip(b" \t")
        if name in _NOTED:
            self.noted.setdefault(name, []).append(value)
            if name == b"host":  # it is the authority of the head, and no field of it
                return
        self.fields.append((name, value))

    def keeps(self, modern: bool) -> bool:
        """Whether the sender means to keep the connection (RFC 9112 §9.3)."""
        if b"connection" not in self.noted:
            return modern
        options = self.options()
        return b"close" not in options and (modern or b"keep-alive" in options)

    def options(self) -> Sequence[bytes]:
        """What `Connection` lists, in lower case."""
        values = self.noted.get(b"connection")
        return [option.strip() for option in b",".join(values).lower().split(b",")] if values else ()


_NOTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"})


def head_end(buffer: bytearray, searched: int, max_header_bytes: int) -> int:
    """Index behind the empty line that ends a head, or 0 where it is not there yet. `searched` bytes hold no such end.

    Raises `ClientFault` 431 once more than `max_header_bytes` have come without it.
    """
    found = buffer.find(b"\r\n\r\n", max(0, searched - 3), max_header_bytes)
    if found >= 0:
        return found + 4
    if len(buffer) >= max_header_bytes:
        raise ClientFault(code="head_too_large", public="the header section is too large", status=431)
    return 0


def could_begin_request(buffer: bytearray) -> bool:
    """Whether the first line can still become a request line: what cannot need not be waited for."""
    end = buffer.find(b"\n", 0, 64)
    return _FORBIDDEN_START.search(buffer, 0, 64 if end < 0 else end) is None


def is_no_request_line(raw: bytes) -> bool:
    """Whether the first line ends in a word that is no version of anything (RFC 9112 §2.3): who says that does not speak HTTP,
    and would not understand it. A bad preface of HTTP/2 is of this kind, and wants the connection closed (RFC 9113 §3.4).
    """
    words = raw[: raw.find(b"\r\n")].split(b" ")
    return len(words) == 3 and b"/" not in words[2] and words[2][:4].upper() != b"HTTP"


_FORBIDDEN_START = re.compile(rb"^[^!#$%&'*+\-.^_`|~0-9A-Za-z\r\n]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]")


def request_line_fits(raw: bytes | bytearray, max_request_line_bytes: int) -> None:
    """Raise `ClientFault` 414 where the first line, as far as it has come, is longer than that (RFC 9110 §15.5.15)."""
    if len(raw) > max_request_line_bytes and raw.find(b"\r\n", 0, max_request_line_bytes + 2) < 0:
        raise ClientFault(code="request_line_too_long", public="the request line is too long", status=414)


def _holds_forbidden(raw: bytes) -> bool:
    """Whether there is a control character, a CR or LF by itself, or a folded line. Counting costs a fifth of a pattern."""
    lines = raw.count(b"\r\n")
    return (
        len(raw.translate(None, _CONTROLS)) != len(raw)
        or raw.count(b"\n") != lines
        or raw.count(b"\r") != lines
        or b"\n " in raw
        or b"\n\t" in raw
    )


def request_head(
    raw: bytes,
    *,
    scheme: str,
    max_header_fields: int,
    max_request_line_bytes: int = 8192,
    allow_encoded_slash: bool = False,
) -> tuple[RequestHead, Framing, bool]:
    """Parse one whole request head, up to and with its empty line.

    Returns it, how its body is framed, and whether the client means to keep the connection. Raises `ClientFault`.

    `upgrade` of the head is what `Upgrade` offers where `Connection` names it, and None where a server may ignore the
    offer and we do (RFC 9110 §7.8): in HTTP/1.0, where it lists more than one protocol, and where a body is announced,
    which would have to come first and would be sent to the one server that may not want it.
    """
    if len(raw) > max_request_line_bytes:
        request_line_fits(raw, max_request_line_bytes)
    if raw.count(b"\n") - 2 > max_header_fields:
        raise ClientFault(code="head_too_many_fields", public="there are too many header fields", status=431)
    if _holds_forbidden(raw):
        raise ClientFault(
            code="head_control_character", public="the header section holds a character that is not allowed"
        )
    collected = _Head()
    parser = httptools.HttpRequestParser(collected)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise ClientFault(str(error), code="head_malformed") from error
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise ClientFault(code="version_unsupported", public="only HTTP/1.1 and HTTP/1.0 are spoken here", status=505)
    if not _REQUEST_LINE.match(raw):  # RTSP, ICE and two spaces pass the tokenizer
        raise ClientFault(code="head_malformed")
    method = parser.get_method().decode("ascii")
    return _request(method, collected, version == "1.1", scheme, allow_encoded_slash)


def _request(
    method: str,
    head: _Head,
    modern: bool,
    scheme: str,
    allow_encoded_slash: bool,
) -> tuple[RequestHead, Framing, bool]:
    noted, fields = head.noted, head.fields
    framing = _request_framing(noted.get(b"content-length"), noted.get(b"transfer-encoding"), modern)
    expectations = noted.get(b"expect", ())
    for expected in expectations:
        if expected.lower() != b"100-continue":
            raise ClientFault(code="expectation_failed", public="this expectation cannot be met", status=417)
    if expectations and not modern:  # who speaks 1.0 does not wait for a 100 (RFC 9110 §10.1.1)
        fields = [field for field in fields if field[0] != b"expect"]
    form, authority, where = target.request_target(method, head.target, allow_encoded_slash=allow_encoded_slash)
    if form is not None and form != scheme and method != "CONNECT":
        # An absolute target names the scheme: https for what came in plaintext (or the reverse) has two meanings.
        raise ClientFault(code="scheme_mismatch", public="the scheme of the target is not that of the connection")
    host, port = _authority(noted.get(b"host", ()), authority, modern)
    upgrade = _upgrade(noted[b"upgrade"], head.options()) if b"upgrade" in noted and modern and not framing else None
    parsed = _request_head(
        method=method, target=where, host=host, port=port, fields=fields, protocol="HTTP/1.1" if modern else "HTTP/1.0",
        upgrade=upgrade, expects_continue=bool(expectations) and modern,
    )  # fmt: skip
    # What stands behind a CONNECT is meant for a tunnel, and there will be none. A proxy keeps no connection of HTTP/1.0, asked
    # or not (RFC 9112 §9.3): such a client would wait for its end as the end of the answer.
    return parsed, framing, modern and parsed.method != "CONNECT" and head.keeps(modern)


def _upgrade(offers: list[bytes], options: Sequence[bytes]) -> str | None:
    if len(offers) > 1 or b"upgrade" not in options:
        return None
    offer = offers[0].decode("latin-1")
    return offer if _UPGRADE.fullmatch(offer) else None


def _authority(hosts: Sequence[bytes], absolute: bytes | None, modern: bool) -> tuple[str, int | None]:
    if len(hosts) > 1:
        raise ClientFault(code="host_repeated", public="there is more than one Host")
    if not hosts:
        if modern:
            raise ClientFault(code="host_missing", public="there is no Host")
        return target.authority(absolute) if absolute is not None else ("", None)
    named = target.authority(hosts[0])
    if absolute is not None and target.authority(absolute) != named:
        raise ClientFault(code="host_mismatch", public="the Host is not that of the target")
    return named


def _request_framing(lengths: list[bytes] | None, codings: list[bytes] | None, modern: bool) -> Framing:
    if not codings:
        return _length(lengths) if lengths else 0
    if lengths:
        raise ClientFault(code="framing_ambiguous", public="both Content-Length and Transfer-Encoding are given")
    if not modern:
        raise ClientFault(code="framing_ambiguous", public="HTTP/1.0 has no Transfer-Encoding")
    if len(codings) > 1 or codings[0].lower() != b"chunked":
        raise ClientFault(
            code="coding_unsupported", public="only the chunked transfer coding is understood", status=501
        )
    return CHUNKED


def _length(values: list[bytes]) -> int:
    if len(values) > 1 or not _DIGITS.fullmatch(values[0]):
        raise ClientFault(code="length_malformed", public="Content-Length is malformed")
    return int(values[0])


def response_head(
    raw: bytes, *, method: str, max_header_fields: int, kept: bool = False
) -> tuple[ResponseHead, Framing, bool]:
    """Parse one whole response head to a request of `method`.

    Returns it, how its body is framed (0 also for HEAD, 1xx, 204 and 304, whatever length they state), and whether the
    connection can be used again. Raises `MaybeSent` for what is no HTTP/1.1 or 1.0 answer with a single meaning. `kept`: whether
    the head will be used again, and so gets room for what is made of it.
    """
    if raw.count(b"\n") - 2 > max_header_fields or _holds_forbidden(raw):
        raise MaybeSent("forbidden characters or too many fields in the head", code="upstream_malformed")
    collected = _Head()
    parser = httptools.HttpResponseParser(collected)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise MaybeSent(str(error), code="upstream_malformed") from error
    modern = parser.get_http_version() == "1.1"
    if not modern and parser.get_http_version() != "1.0":
        raise MaybeSent("neither HTTP/1.1 nor HTTP/1.0", code="upstream_malformed")
    if raw[:5] != b"HTTP/":  # the tokenizer passes over empty lines in front, which only a request may have
        raise MaybeSent("the answer does not begin with its status line", code="upstream_malformed")
    status = parser.get_status_code()
    noted = collected.noted
    if not modern and b"transfer-encoding" in noted:  # RFC 9112 §6.1
        raise MaybeSent("HTTP/1.0 has no Transfer-Encoding", code="upstream_malformed")
    framing = _response_framing(method, status, noted.get(b"content-length"), noted.get(b"transfer-encoding"))
    head = _response_head(status=status, fields=collected.fields, kept={} if kept else None)
    return head, framing, framing != UNTIL_CLOSE and collected.keeps(modern)


def _response_framing(method: str, status: int, lengths: list[bytes] | None, codings: list[bytes] | None) -> Framing:
    if lengths and codings:
        raise MaybeSent("both Content-Length and Transfer-Encoding", code="upstream_malformed")
    try:
        length = _length(lengths) if lengths else UNTIL_CLOSE
    except ClientFault as error:
        raise MaybeSent(error.public, code="upstream_malformed") from error
    if not 100 <= status <= 599:
        raise MaybeSent(f"status {status}", code="upstream_malformed")
    if method == "HEAD" or status < 200 or status in (204, 304) or (method == "CONNECT" and status < 300):
        return 0
    if codings:
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise MaybeSent("a transfer coding other than chunked", code="upstream_malformed")
        return CHUNKED
    return length


class Chunks:
    """Decodes a chunked body from a buffer that its owner fills (RFC 9112 §7.1)."""

    __slots__ = ("_left", "_max_bytes", "_max_fields", "_state", "_trailers", "ended")

    def __init__(self, *, max_header_bytes: int, max_header_fields: int) -> None:
        self._state = "size"
        self._left = 0
        self._trailers: list[tuple[bytes, bytes]] = []
        self._max_bytes = max_header_bytes
        self._max_fields = max_header_fields
        self.ended = False

    def next(self, buffer: bytearray) -> Data | Trailers | None:
        """Take the next item out of `buffer`; None where the end has been reached (`ended`) or more bytes are needed.

        Raises `ClientFault` for what is not chunked coding; whose fault it is in the end, the caller knows.
        """
        while not self.ended:
            if self._state == "data":
                if not buffer:
                    return None
                data = bytes(buffer[: self._left])
                del buffer[: len(data)]
                self._left -= len(data)
                if not self._left:
                    self._state = "gap"
                return data
            if self._state == "gap":
                if len(buffer) < 2:
                    if buffer and buffer[0] != 13:
                        raise _bad_chunk("data is longer than its chunk")
                    return None
                if buffer[:2] != b"\r\n":
                    raise _bad_chunk("data is longer than its chunk")
                del buffer[:2]
                self._state = "size"
            line = self._line(buffer)
            if line is None:
                return None
            if self._state == "size":
                self._size(line)
            elif line:
                self._trailer(line)
            else:
                self.ended = True
                return Trailers(self._trailers) if self._trailers else None
        return None

    def _line(self, buffer: bytearray) -> bytes | None:
        limit = MAX_CHUNK_LINE_BYTES if self._state == "size" else self._max_bytes
        end = buffer.find(b"\n", 0, limit)
        if end < 0:
            if len(buffer) >= limit:
                raise _bad_chunk("a line is too long")
            return None
        if end == 0 or buffer[end - 1] != 13:
            raise _bad_chunk("a line ends without CR")
        line = bytes(buffer[: end - 1])
        del buffer[: end + 1]
        return line

    def _size(self, line: bytes) -> None:
        found = _CHUNK.fullmatch(line)
        if found is None:
            raise _bad_chunk("a chunk size is malformed")
        self._left = int(found[1], 16)
        self._state = "data" if self._left else "trailers"

    def _trailer(self, line: bytes) -> None:
        # Cut and stripped, not matched whole: a pattern with white space on both sides of a value backtracks for minutes.
        name, colon, value = line.partition(b":")
        self._max_bytes -= len(line)
        sound = colon and _NAME.fullmatch(name) and not _CONTROL.search(value)
        if not sound or self._max_bytes <= 0 or len(self._trailers) >= self._max_fields:
            raise _bad_chunk("the trailers are malformed or too large")
        self._trailers.append((name.lower(), value.strip(b" \t")))


def _bad_chunk(detail: str) -> ClientFault:
    return ClientFault(detail, code="body_malformed", public="the chunked body is malformed")


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES = {code: b"HTTP/1.1 %d %s\r\n" % (code, reason) for code, reason in _REASONS.items()}
LAST_CHUNK = b"0\r\n\r\n"


def encode_request(head: RequestHead, fields: Iterable[tuple[bytes, bytes]], framing: Framing) -> bytes:
    """The head of a request. `fields` hold neither Host nor framing; the authority and `framing` of the head are written."""
    lines = [f"{head.method} {head.target} HTTP/1.1\r\nhost: {head.authority}\r\n".encode("ascii")]
    lines += [b"%b: %b\r\n" % field for field in fields if field[0] not in _NOT_FROM_FIELDS]
    if head.upgrade is not None:
        lines.append(f"connection: upgrade\r\nupgrade: {head.upgrade}\r\n".encode("latin-1"))
    if framing == CHUNKED:
        lines.append(b"transfer-encoding: chunked\r\n\r\n")
    elif framing or head.method in _WITH_LENGTH:
        lines.append(b"content-length: %d\r\n\r\n" % framing)
    else:
        lines.append(b"\r\n")
    return b"".join(lines)


_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})
_NOT_FROM_FIELDS = frozenset({b"content-length", b"te"})
"""TE would need a Connection field that names it (RFC 9110 §10.1.4); it was kept for an upstream that may have spoken h2."""


def encode_response(head: ResponseHead, framing: Framing, *, bodiless: bool, close: bool) -> bytes:
    """The head of an answer. A length that `head.fields` state is kept where there is no body to contradict it."""
    if head.kept is None:
        return _encoded(head, framing, bodiless=bodiless, close=close)
    manner = (framing, bodiless, close)
    encoded: bytes | None = head.kept.get(manner)
    if encoded is None:
        encoded = head.kept[manner] = _encoded(head, framing, bodiless=bodiless, close=close)
    return encoded


def _encoded(head: ResponseHead, framing: Framing, *, bodiless: bool, close: bool) -> bytes:
    status = head.status
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    if bodiless and status != 204:
        lines += [b"%b: %b\r\n" % field for field in head.fields]
    elif bodiless:  # not even a length (RFC 9110 §8.6)
        lines += [b"%b: %b\r\n" % field for field in head.fields if field[0] != b"content-length"]
    else:
        lines += [b"%b: %b\r\n" % field for field in head.fields if field[0] != b"content-length"]
        if framing == CHUNKED:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif framing != UNTIL_CLOSE:
            lines.append(b"content-length: %d\r\n" % framing)
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines)


def encode_interim(head: ResponseHead) -> bytes:
    return b"".join([_STATUS_LINES.get(head.status) or b"HTTP/1.1 %d \r\n" % head.status,
                     *(b"%b: %b\r\n" % field for field in head.fields if field[0] != b"content-length"),
                     b"\r\n"])  # fmt: skip


def encode_switch(head: ResponseHead, upgrade: str) -> bytes:
    """101, with the two hop-by-hop fields that make it mean something (RFC 9110 §7.8)."""
    fields = [*head.fields, (b"connection", b"upgrade"), (b"upgrade", upgrade.encode("latin-1"))]
    return encode_interim(ResponseHead(status=101, fields=fields))


def encode_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_trailers(fields: Fields) -> bytes:
    return b"".join([b"0\r\n", *(b"%b: %b\r\n" % field for field in fields), b"\r\n"])
