"""HTTP/1.1 heads in both directions, and requests one behind the other (`sidecar.wire.h1`).

Two judges: a strict reader of our own (`reference`), and h11. What we accept, both accept, with the same method, target,
host, fields and framing; what we then send on is one head that all three read alike. A whole connection is read as the
server's driver reads it, beside h11: where we see a request begin and end, so does it, or a request was smuggled.
"""

from __future__ import annotations

from dataclasses import replace

import h11

from fuzz import reference
from fuzz.registry import Target
from sidecar.errors import ClientFault, MaybeSent, UpstreamFault
from sidecar.model import RequestHead, Trailers
from sidecar.wire import h1, headers, target

Field = tuple[bytes, bytes]

MAX_HEAD_BYTES = 4096
MAX_FIELDS = 32
MAX_PIPELINED = 16
VIA = b"1.1 fuzz"
FRAMINGS = {"chunked": h1.CHUNKED, "close": h1.UNTIL_CLOSE}
_TOKENIZER_ONLY = ("head_malformed", "head_control_character")


def request(data: bytes) -> bool:
    """A byte of flags (1: came over TLS), then a request's head."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    raw = without_empty_lines(raw)
    try:
        end = h1.head_end(bytearray(raw), 0, MAX_HEAD_BYTES)
    except ClientFault as fault:
        assert fault.status == 431
        return False
    raw = raw[:end] if end else raw.rstrip(b"\r\n") + b"\r\n\r\n"
    tls = bool(flags & 1)
    expected = reference.request_head(raw)
    try:
        head, framing, keep = _read(raw, tls=tls)
    except ClientFault as fault:
        assert 400 <= fault.status < 600
        assert fault.public
        assert raw not in fault.public.encode()
        # Nor may the tokenizer refuse what is in order; it knows the methods that are registered, and no others.
        plain = expected is not None and expected.start[0] in KNOWN_METHODS and expected.start[1].startswith(b"/")
        assert not plain or fault.code not in _TOKENIZER_ONLY, f"{fault.code}: {fault}"
        return False
    assert expected is not None, "the reference refuses it"
    _same_request(head, framing, expected)
    heard = judged_request(raw)
    assert heard.method == expected.start[0]
    assert heard.target == expected.start[1]
    assert _plain(heard.headers) == _plain(expected.fields)
    # A proxy keeps no connection of HTTP/1.0 (RFC 9112 §9.3), nor one on which a tunnel was hoped for.
    assert keep is (_keeps(expected) and b"HTTP/1.1" in expected.start and head.method != "CONNECT")
    _sent_on(head, framing, tls=tls)
    return True


def without_empty_lines(raw: bytes) -> bytes:
    """As the driver takes them away in front of a request (RFC 9112 §2.2)."""
    while raw[:2] == b"\r\n":
        raw = raw[2:]
    return raw


def _read(raw: bytes, *, tls: bool) -> tuple[RequestHead, int, bool]:
    return h1.request_head(raw, scheme="https" if tls else "http", max_header_fields=MAX_FIELDS)


def judged_request(raw: bytes) -> h11.Request:
    """By h11; raises where h11 refuses it."""
    event = _judge(raw).next_event()
    assert isinstance(event, h11.Request)
    return event


def _judge(raw: bytes) -> h11.Connection:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(raw)
    return connection


def _plain(fields: object) -> list[Field]:
    """h11 writes codings in lower case."""
    pairs = [(bytes(name), bytes(value)) for name, value in fields]  # type: ignore[attr-defined]
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in pairs]


def _same_request(head: RequestHead, framing: int, expected: reference.Head) -> None:
    method, raw_target, version = expected.start
    assert head.method.encode() == method
    assert head.protocol.encode() == version
    left_out = (b"host",) if version == b"HTTP/1.1" else (b"host", b"expect")
    assert list(head.fields) == [field for field in expected.fields if field[0] not in left_out]
    assert framing == FRAMINGS.get(expected.framing, expected.framing)  # type: ignore[call-overload]
    hosts = expected.values(b"host")
    assert len(hosts) == 1 or (not hosts and version == b"HTTP/1.0")
    if hosts:
        assert target.authority(hosts[0]) == (head.host, head.port)
    if raw_target.startswith(b"/"):
        path, query, segments = reference.canonical(raw_target, allow_encoded_slash=False) or ("", None, ())
        assert (head.target.path, head.target.query, head.target.segments) == (path, query, segments)
    assert head.expects_continue is (version == b"HTTP/1.1" and bool(expected.values(b"expect")))
    if head.upgrade is not None:
        assert version == b"HTTP/1.1"
        assert b"upgrade" in _options(expected)
        assert [head.upgrade.encode("latin-1")] == expected.values(b"upgrade")


def _options(head: reference.Head) -> list[bytes]:
    return [option.strip(b" \t") for value in head.values(b"connection") for option in value.lower().split(b",")]


def _keeps(head: reference.Head) -> bool:
    options = _options(head)
    return b"close" not in options and (b"HTTP/1.1" in head.start or b"keep-alive" in options)


def _sent_on(head: RequestHead, framing: int, *, tls: bool) -> None:
    """Write it as it goes to the agent: one head, that means the same to everybody."""
    if not head.host or head.method == "CONNECT":
        return
    try:
        kept = headers.inbound_request(
            head.fields, caller="spiffe://a.test/web", remote="192.0.2.1", scheme_tls=tls, host=head.authority,
            request_id="r1", via=VIA,
        )  # fmt: skip
    except ClientFault:
        return
    raw = h1.encode_request(head, kept, framing)
    assert raw.find(b"\r\n\r\n") == len(raw) - 4, "more than one head is sent"
    again = reference.request_head(raw)
    assert again is not None
    assert again.start == (head.method.encode(), str(head.target).encode(), b"HTTP/1.1")
    assert again.values(b"host") == [head.authority.encode()]
    assert again.framing == ("chunked" if framing == h1.CHUNKED else framing)
    passed = [field for field in again.fields if field[0] not in _MADE]
    assert passed == [field for field in kept if field[0] not in _MADE]
    assert again.values(b"x-forwarded-spiffe-id") == [b"spiffe://a.test/web"]
    heard = judged_request(raw)
    assert (heard.method, heard.target, _plain(heard.headers)) == (*again.start[:2], _plain(again.fields))
    read, length, _ = _read(raw, tls=tls)
    assert (read.method, read.target, read.authority, length) == (head.method, head.target, head.authority, framing)
    assert read.upgrade == head.upgrade


_MADE = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"te"})


def response(data: bytes) -> bool:
    """A byte of flags (1: to HEAD), then an answer's head."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    method = "HEAD" if flags & 1 else "GET"
    end = raw.find(b"\r\n\r\n") + 4
    raw = raw[:end] if end > 3 else raw.rstrip(b"\r\n") + b"\r\n\r\n"
    expected = reference.response_head(raw, method.encode())
    try:
        head, framing, keep = h1.response_head(raw, method=method, max_header_fields=MAX_FIELDS)
    except MaybeSent as fault:
        assert fault.code == "upstream_malformed"
        return False
    assert expected is not None, "the reference refuses it"
    assert head.status == int(expected.start[1])
    assert list(head.fields) == [field for field in expected.fields if field[0] != b"host"]
    assert framing == FRAMINGS.get(expected.framing, expected.framing)  # type: ignore[call-overload]
    assert keep is (framing != h1.UNTIL_CLOSE and _keeps(expected))
    if [coding.lower() for coding in expected.values(b"transfer-encoding")] in ([], [b"chunked"]):  # h11 wants it so
        heard = _judged_response(raw, method)
        assert heard.status_code == head.status
        assert _plain(heard.headers) == _plain(expected.fields)
    if head.status == 101:
        return True
    try:
        kept = headers.response(head.fields, via=VIA)
    except UpstreamFault as fault:
        assert fault.code == "upstream_malformed"
        return True
    _answered(replace(head, fields=kept), framing, method)
    return True


def _answered(head: h1.ResponseHead, framing: int, method: str) -> None:
    """Write it as it goes to the caller."""
    bodiless = method == "HEAD" or head.status in (204, 304)
    interim = head.status < 200
    raw = h1.encode_interim(head) if interim else h1.encode_response(head, framing, bodiless=bodiless, close=False)
    assert raw.find(b"\r\n\r\n") == len(raw) - 4, "more than one head is sent"
    again = reference.response_head(raw, method.encode())
    assert again is not None
    assert int(again.start[1]) == head.status
    assert again.framing == {h1.CHUNKED: "chunked", h1.UNTIL_CLOSE: "close"}.get(framing, framing)
    assert [field for field in again.fields if field[0] not in _MADE] == [
        field for field in head.fields if field[0] not in _MADE
    ]
    assert _judged_response(raw, method).status_code == head.status


def _judged_response(raw: bytes, method: str) -> h11.Response | h11.InformationalResponse:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=OFFER))
    connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    return event


def requests(data: bytes) -> bool:
    """All that one client sends on its connection. Accepted are at least two requests."""
    rest = data
    for count in range(MAX_PIPELINED):
        rest = without_empty_lines(rest)
        buffer = bytearray(rest)
        try:
            end = h1.head_end(buffer, 0, MAX_HEAD_BYTES)
            if not end or not h1.could_begin_request(buffer):
                return count > 1
            head, framing, keep = _read(rest[:end], tls=False)
            body, trailers, behind = _body(rest[end:], framing)
        except ClientFault:
            return count > 1
        _same_message(rest, end, head, body, trailers, behind)
        if behind is None or not keep or head.upgrade or head.method == "CONNECT":
            return count > 1
        rest = behind
    return True


def _same_message(
    rest: bytes, end: int, head: RequestHead, body: bytes, trailers: list[Field], behind: bytes | None
) -> None:
    expected = reference.request_head(rest[:end])
    assert expected is not None
    assert expected.start[0] == head.method.encode()
    if expected.framing == "chunked":
        chunks = reference.chunked(rest[end:], max_trailer_bytes=MAX_HEAD_BYTES, max_trailers=MAX_FIELDS)
        assert (body, trailers) == (chunks.data, chunks.trailers), "the body ends elsewhere"
        assert behind == (chunks.rest if chunks.state == "whole" else None), "the next request begins elsewhere"
    connection = _judge(rest)
    first = connection.next_event()
    assert isinstance(first, h11.Request)
    assert first.method == expected.start[0]
    assert _plain(first.headers) == _plain(expected.fields)
    heard = b""
    try:
        while isinstance(event := connection.next_event(), h11.Data):
            heard += bytes(event.data)
    except h11.RemoteProtocolError as error:
        # It knows no white space before `;` (RFC 9112 §7.1.1 allows it), and reads framing fields in trailers.
        assert str(error).startswith("illegal chunk header") or set(FRAMING_FIELDS) & {name for name, _ in trailers}
        return
    assert heard == body, "the body ends elsewhere"
    assert isinstance(event, h11.EndOfMessage) is (behind is not None)
    if isinstance(event, h11.EndOfMessage):
        assert [(bytes(name), bytes(value)) for name, value in event.headers] == trailers
        assert connection.trailing_data[0] == behind, "the next request begins elsewhere"


def _body(raw: bytes, framing: int) -> tuple[bytes, list[Field], bytes | None]:
    """(data, trailers, what lies behind it); None for the last where it is not whole. Raises `ClientFault`."""
    if framing >= 0:
        return raw[:framing], [], raw[framing:] if len(raw) >= framing else None
    chunks, buffer, data = h1.Chunks(max_header_bytes=MAX_HEAD_BYTES, max_header_fields=MAX_FIELDS), bytearray(raw), b""
    trailers: list[Field] = []
    while (item := chunks.next(buffer)) is not None:
        if isinstance(item, Trailers):
            trailers = list(item.fields)
        else:
            data += item
    return data, trailers, bytes(buffer) if chunks.ended else None


OFFER = [("host", "h"), ("upgrade", "x"), ("connection", "upgrade")]
"""A 101 is heard only by who asked for one."""
FRAMING_FIELDS = (b"content-length", b"transfer-encoding")
KNOWN_METHODS = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"QUERY"}
)


def _lines(*lines: bytes) -> bytes:
    return b"\r\n".join([*lines, b"", b""])


_HOST = b"Host: a.test"
REQUEST_GOOD = (
    _lines(b"\1GET /a/b?c=d HTTP/1.1", b"Host: A.test:8443", b"X-One: 1 "),
    _lines(b"\1POST https://a.test/x HTTP/1.1", _HOST, b"Transfer-Encoding: Chunked", b"TE: trailers"),
    _lines(b"\0PUT /a HTTP/1.1", _HOST, b"Content-Length: 5", b"Expect: 100-continue"),
    _lines(b"\0GET / HTTP/1.0", b"Connection: Keep-Alive"),
    _lines(b"\0GET /chat HTTP/1.1", _HOST, b"Upgrade: websocket", b"Connection: keep-alive, Upgrade"),
    _lines(b"\0OPTIONS * HTTP/1.1", _HOST),
    _lines(b"\0GET / HTTP/1.1", b"X-Spiffe_Id: spiffe://a/b", b"host:\ta", b"Connection: x-hop, close", b"X-Hop: \xff \x80"),
    _lines(b"\0DELETE /%41//b/../c HTTP/1.1", b"X: ", _HOST, b"Cookie: a=b; c=d", b"traceparent: 00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"),
)  # fmt: skip
REQUEST_BAD = (
    b"", b"\0GET /\r\n\r\n", _lines(b"\0GET / HTTP/1.1"), _lines(b"\0GET / HTTP/1.2", _HOST), _lines(b"\0GET / HTTP/1.1", _HOST, _HOST),
    _lines(b"\0GET https://a.test/ HTTP/1.1", _HOST), _lines(b"\0GET http://b/ HTTP/1.1", _HOST), _lines(b"\0GET /a#b HTTP/1.1", _HOST),
    _lines(b"\0GET / HTTP/1.1", _HOST, b"X : y"), _lines(b"\0GET / HTTP/1.1", _HOST, b"X: a", b" b"), _lines(b"\0GET / HTTP/1.1", _HOST, b"X: a\rb"),
    _lines(b"\0GET / HTTP/1.1", _HOST, b"X: a\nY: b"), _lines(b"\0GET / HTTP/1.1", _HOST, b"X: \0"), _lines(b"\0GET  / HTTP/1.1", _HOST),
    _lines(b"\0POST / HTTP/1.1", _HOST, b"Content-Length: 1", b"Transfer-Encoding: chunked"), _lines(b"\0GET / HTTP/1.1 ", _HOST),
    _lines(b"\0POST / HTTP/1.1", _HOST, b"Content-Length: 1", b"Content-Length: 1"), _lines(b"\0POST / HTTP/1.1", _HOST, b"Content-Length: +1"),
    _lines(b"\0POST / HTTP/1.1", _HOST, b"Transfer-Encoding: gzip, chunked"), _lines(b"\0POST / HTTP/1.1", _HOST, b"Transfer-Encoding:\x0bchunked"),
    _lines(b"\0POST / HTTP/1.0", _HOST, b"Transfer-Encoding: chunked"), _lines(b"\0GET / RTSP/1.0", _HOST), b"\0GET / HTTP/1.1\n\n",
)  # fmt: skip
WORDS = (
    b"\r\n", b"\r\n\r\n", b"\r\n ", b"\n", b"\r", b": ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: ", b"Content-Length: ", b"Transfer-Encoding: ",
    b"chunked", b"Connection: ", b"close", b"keep-alive", b"Upgrade: ", b"Expect: 100-continue", b"GET ", b"POST ", b"http://a.test", b"\x0b", b"\x0c",
    b"identity", b"X-Forwarded-Spiffe-Id: ", b"CONNECT ", b"M-SEARCH ", b"gzip, ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 ", b"0\r\n\r\n", b"5\r\nhello\r\n",
)  # fmt: skip
RESPONSE_GOOD = (
    _lines(b"\0HTTP/1.1 200 OK", b"Content-Length: 5", b"X: y"), _lines(b"\1HTTP/1.1 200 OK", b"Content-Length: 5"),
    _lines(b"\0HTTP/1.1 200 ", b"Transfer-Encoding: chunked", b"Connection: close"), _lines(b"\0HTTP/1.0 404 Not Found"),
    _lines(b"\0HTTP/1.1 100 Continue"), _lines(b"\0HTTP/1.1 204 No Content", b"Connection: x-a", b"X-A: b"), _lines(b"\0HTTP/1.1 304 \xff"),
    _lines(b"\0HTTP/1.1 101 Switching Protocols", b"Connection: upgrade", b"Upgrade: x"), _lines(b"\0HTTP/1.1 103 Early Hints", b"Link: </a>"),
)  # fmt: skip
RESPONSE_BAD = (
    b"", _lines(b"\0HTTP/1.1 200 OK", b"Content-Length: 5", b"Transfer-Encoding: chunked"), _lines(b"\0HTTP/1.1 200 OK", b"X: a", b" b"),
    _lines(b"\0HTTP/1.1 200 OK", b"Content-Length: 5", b"Content-Length: 6"), _lines(b"\0HTTP/2 200 OK"), _lines(b"\0HTTP/1.1 99 OK"),
    _lines(b"\0HTTP/1.1 600 OK"), _lines(b"\0HTTP/1.1 200 OK", b"Transfer-Encoding: gzip"), _lines(b"\0ICY 200 OK"), _lines(b"\0HTTP/1.1 200 OK", b"X : y"),
    b"\0HTTP/1.1 200 OK\nX: a\n\n\r\n\r\n", _lines(b"\0HTTP/1.0 200 OK", b"Transfer-Encoding: chunked"),
    _lines(b"\0", b"HTTP/1.1 200 OK"),
)  # fmt: skip
_GET = _lines(b"GET /1 HTTP/1.1", _HOST)
_CHUNKED = _lines(b"POST /2 HTTP/1.1", _HOST, b"Transfer-Encoding: chunked")
REQUESTS_GOOD = (
    _GET * 3, _GET + b"\r\n" + _GET,
    _lines(b"POST / HTTP/1.1", _HOST, b"Content-Length: 5") + b"GET /" + _GET,
    _CHUNKED + b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n" + _GET,
    _CHUNKED + b"0\r\n\r\n" + _CHUNKED + b"00A\r\n0123456789\r\n0\r\n\r\n" + _GET,
)  # fmt: skip
REQUESTS_BAD = (
    b"", _GET, _GET + b"\x16\x03\x01", _lines(b"POST / HTTP/1.1", _HOST, b"Content-Length: 500") + _GET,
    _lines(b"POST / HTTP/1.1", _HOST, b"Content-Length: 4", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + _GET,
    _CHUNKED + b"0 \r\n\r\n" + _GET, _CHUNKED + b"5\r\nhello0\r\n\r\n" + _GET, _CHUNKED + b"0\r\nX: y\n\r\n" + _GET,
    _lines(b"GET / HTTP/1.1", _HOST, b"Connection: close") + _GET + _GET,
)  # fmt: skip

TARGETS = (
    Target(name="h1.request", run=request, good=lambda: REQUEST_GOOD, bad=lambda: REQUEST_BAD, words=WORDS, examples=300),
    Target(name="h1.response", run=response, good=lambda: RESPONSE_GOOD, bad=lambda: RESPONSE_BAD, words=WORDS, examples=300),
    Target(name="h1.requests", run=requests, good=lambda: REQUESTS_GOOD, bad=lambda: REQUESTS_BAD, words=WORDS, max_bytes=768, examples=300),
)  # fmt: skip
