"""Heads of HTTP/2 messages, in and through to HTTP/1.1 and back (`sidecar.wire.h2_protocol`, `sidecar.wire.h2_heads`).

Fields are put into a HEADERS frame as they are and go through the connection's own state machine, as a peer's would. What
passes obeys RFC 9113 §8 by a second reading, and is one head of HTTP/1.1 for whoever reads that: a value with a line end in it,
or a name with a colon, would be a second header there, or a second request.
"""

from __future__ import annotations

from dataclasses import replace

import h11
from h2.events import Event, InformationalResponseReceived, RequestReceived, ResponseReceived
from h2.exceptions import ProtocolError
from hyperframe.frame import HeadersFrame, SettingsFrame

from fuzz import heads, inputs, reference
from fuzz.registry import Target
from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import Fields, RequestHead, ResponseHead
from sidecar.wire import h1, h2_heads, headers, target
from sidecar.wire.h2_protocol import Protocol

Field = tuple[bytes, bytes]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HELLO = SettingsFrame(0).serialize()
MAX_HEADER_BYTES = 2048
MAX_HEADER_FIELDS = 24
LIMITS = {"max_header_bytes": MAX_HEADER_BYTES, "max_header_fields": MAX_HEADER_FIELDS}
PSEUDO = (b":method", b":scheme", b":authority", b":path", b":protocol")
ASKED = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/")]
OF_A_CONNECTION = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")


def request(data: bytes) -> bool:
    """A byte of flags (1: over TLS, 2: the message ends with its head), then the fields of a request."""
    flags, fields = (data[0], inputs.fields_of(data[1:])) if data else (0, [])
    tls, ended = bool(flags & 1), bool(flags & 2)
    event = _received(_server(), _headers(1, fields, ended=ended), RequestReceived)
    if event is None:
        return False
    got = list(event.headers or [])
    try:
        head, length = h2_heads.request_head(got, tls=tls, ended=ended, **LIMITS)
    except ClientFault as fault:
        assert 400 <= fault.status < 600
        return False
    obeys(got)
    _same_request(head, length, got, ended=ended)
    _sent_on(head, 0 if head.upgrade is not None else length, tls=tls)
    return True


def _server() -> Protocol:
    protocol = Protocol(client=False, max_header_bytes=MAX_HEADER_BYTES, max_streams=10, window=1 << 20)
    protocol.receive_data(PREFACE + HELLO)
    return protocol


def _headers(stream_id: int, fields: list[Field], *, ended: bool) -> bytes:
    frame = HeadersFrame(stream_id, data=inputs.literal_block(fields)[:16384], flags=["END_HEADERS"])
    if ended:
        frame.flags.add("END_STREAM")
    return bytes(frame.serialize())


def _received(protocol: Protocol, data: bytes, kind: type[Event] | tuple[type[Event], ...]) -> Event | None:
    try:
        events = protocol.receive_data(data)
    except ProtocolError:
        assert protocol.over
        return None
    return next((event for event in events if isinstance(event, kind)), None)


def obeys(fields: list[Field]) -> None:
    """RFC 9113 §8.2 and §8.3, read once more."""
    names = [name for name, _ in fields]
    pseudo = [name for name in names if name[:1] == b":"]
    assert names[: len(pseudo)] == pseudo, "a pseudo-field behind a field"
    assert set(pseudo) <= set(PSEUDO)
    assert len(set(pseudo)) == len(pseudo)
    assert {b":method", b":scheme", b":path"} <= set(pseudo) or dict(fields)[b":method"] == b"CONNECT"
    assert b":authority" in pseudo or names.count(b"host") == 1
    assert len(fields) <= MAX_HEADER_FIELDS
    assert sum(len(name) + len(value) + 32 for name, value in fields) <= MAX_HEADER_BYTES
    for name, value in fields:
        plain = name.lstrip(b":") if name in PSEUDO else name
        assert plain
        assert plain == plain.lower()
        assert all(byte in reference.TOKEN for byte in plain)
        assert all((byte >= 0x20 and byte != 0x7F) or byte == 0x09 for byte in value)
        assert value == value.strip(b" \t")
        assert name not in OF_A_CONNECTION
        assert name != b"te" or value == b"trailers"
    hosts = {target.authority(value) for name, value in fields if name in (b"host", b":authority")}
    assert len(hosts) == 1, "two authorities"


def _same_request(head: RequestHead, length: int | None, fields: list[Field], *, ended: bool) -> None:
    pseudo = {name: value for name, value in fields if name[:1] == b":"}
    named = pseudo.get(b":authority") or dict(fields)[b"host"]
    assert target.authority(named) == (head.host, head.port)
    if b":protocol" in pseudo:  # said as HTTP/1.1 does
        assert (head.method, (head.upgrade or "").encode()) == ("GET", pseudo[b":protocol"])
    else:
        assert head.method.encode() == pseudo[b":method"]
        assert head.upgrade is None
    if pseudo.get(b":path", b"*")[:1] == b"/":
        path, query, segments = reference.canonical(pseudo[b":path"], allow_encoded_slash=False) or ("", None, ())
        assert (head.target.path, head.target.query, head.target.segments) == (path, query, segments)
    stated = [value for name, value in fields if name == b"content-length"]
    assert len(stated) <= 1
    assert length == (int(stated[0]) if stated else 0 if ended else None) or head.upgrade is not None
    rest = [field for field in fields if field[0] not in (*PSEUDO, b"host")]
    assert set(head.fields) <= set(rest)


def _sent_on(head: RequestHead, length: int | None, *, tls: bool) -> None:
    try:
        kept = headers.inbound_request(
            head.fields,
            caller=None,
            remote="192.0.2.1",
            scheme_tls=tls,
            host=head.authority,
            request_id="r1",
            via=heads.VIA,
        )
    except ClientFault:
        return
    framing = h1.CHUNKED if length is None else length
    raw = h1.encode_request(head, kept, framing)
    assert raw.find(b"\r\n\r\n") == len(raw) - 4, "more than one head is sent"
    read = reference.request_head(raw)
    assert read is not None
    assert read.start == (head.method.encode(), str(head.target).encode(), b"HTTP/1.1")
    assert read.values(b"host") == [head.authority.encode()]
    assert read.framing == ("chunked" if length is None else length)
    assert read.values(b"upgrade") == ([] if head.upgrade is None else [head.upgrade.encode()])
    made = (b"host", b"content-length", b"transfer-encoding", b"te", b"connection", b"upgrade")
    assert [field for field in read.fields if field[0] not in made] == [field for field in kept if field[0] not in made]
    heard = heads.judged_request(raw)
    assert (heard.method, heard.target) == read.start[:2]
    if head.method.encode() in heads.KNOWN_METHODS:
        again, found, _ = h1.request_head(raw, scheme="https" if tls else "http", max_header_fields=100)
        assert (again.method, again.target, again.authority, found) == (
            head.method,
            head.target,
            head.authority,
            framing,
        )
    _and_back(head, kept, length, tls=tls)


def _and_back(head: RequestHead, kept: list[Field], length: int | None, *, tls: bool) -> None:
    lines = h2_heads.encode_request(head, kept, length, tls=tls)
    event = _received(_server(), _headers(1, lines, ended=False), RequestReceived)
    assert event is not None, "our own request is refused"
    again, _ = h2_heads.request_head(
        list(event.headers or []), tls=tls, ended=False, max_header_bytes=1 << 16, max_header_fields=100
    )
    assert (again.method, again.target, again.authority) == (head.method, head.target, head.authority)
    assert again.upgrade == head.upgrade
    assert _in_order(again.fields) == _in_order(kept)


def _in_order(fields: Fields) -> list[Field]:
    """Without lengths and hosts, and with cookies at the end, where h2 puts the crumbs that it joins."""
    rest = [field for field in fields if field[0] not in (b"content-length", b"host", b"cookie")]
    return [*rest, *(field for field in fields if field[0] == b"cookie")]


def response(data: bytes) -> bool:
    """A byte of flags (2: the message ends with its head), then the fields of an answer to a GET."""
    flags, fields = (data[0], inputs.fields_of(data[1:])) if data else (0, [])
    protocol = Protocol(client=True, max_header_bytes=MAX_HEADER_BYTES, max_streams=0, window=1 << 20)
    protocol.receive_data(HELLO)
    protocol.send_headers(1, ASKED, end_stream=True)
    event = _received(
        protocol, _headers(1, fields, ended=bool(flags & 2)), (ResponseReceived, InformationalResponseReceived)
    )
    if event is None:
        return False
    got = list(event.headers or [])
    try:
        head, length = h2_heads.response_head(got, **LIMITS)
    except MaybeSent as fault:
        assert fault.code == "upstream_malformed"
        return False
    assert [name for name, _ in got].count(b":status") == 1
    assert b":" not in {name[:1] for name, _ in got[1:]}
    assert dict(got)[b":status"] == b"%d" % head.status
    assert head.status != 101
    assert length is None or b"%d" % length == dict(got)[b"content-length"].lstrip(b"0") or not length
    for name, value in head.fields:
        assert all(byte in reference.TOKEN for byte in name)
        assert name == name.lower()
        assert all((byte >= 0x20 and byte != 0x7F) or byte == 0x09 for byte in value)
        assert name not in OF_A_CONNECTION
    _answered(replace(head, fields=headers.response(head.fields, via=heads.VIA)), length)
    return True


def _answered(head: ResponseHead, length: int | None) -> None:
    bodiless = head.status in (204, 304)
    framing = 0 if bodiless else h1.CHUNKED if length is None else length
    raw = (
        h1.encode_interim(head)
        if head.status < 200
        else h1.encode_response(head, framing, bodiless=bodiless, close=False)
    )
    assert raw.find(b"\r\n\r\n") == len(raw) - 4, "more than one head is sent"
    read = reference.response_head(raw, b"GET")
    assert read is not None
    assert int(read.start[1]) == head.status
    assert read.framing == (0 if head.status < 200 or bodiless else "chunked" if length is None else length)
    assert [field for field in read.fields if field[0] not in heads.FRAMING_FIELDS] == [
        field for field in head.fields if field[0] != b"content-length"
    ]
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    heard = connection.next_event()
    assert isinstance(heard, h11.Response | h11.InformationalResponse)
    assert heard.status_code == head.status


def _of(flags: int, *fields: Field) -> bytes:
    return bytes([flags]) + inputs.field_bytes(fields)


_GET = ((b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.test"), (b":path", b"/a/b?c=d"))
_POST = ((b":method", b"POST"), *_GET[1:])
REQUEST_GOOD = (
    _of(2, *_GET), _of(3, _GET[0], (b":scheme", b"https"), *_GET[2:], (b"cookie", b"a=b"), (b"cookie", b"c=d")), _of(0, *_POST, (b"content-length", b"5")),
    _of(0, *_POST, (b"te", b"trailers"), (b"content-type", b"application/grpc")), _of(2, *_GET[:2], _GET[3], (b"host", b"A.test:80")),
    _of(2, *_GET, (b"x-spiffe-id", b"spiffe://a/b"), (b"x_forwarded_spiffe.id", b"z"), (b"x", b"\xe9"), (b"host", b"a.test")),
    _of(0, (b":method", b"CONNECT"), (b":protocol", b"websocket"), *_GET[1:], (b"sec-websocket-key", b"x"), (b"sec-websocket-version", b"13")),
    _of(2, (b":method", b"OPTIONS"), *_GET[1:3], (b":path", b"*")), _of(2, (b":method", b"M-SEARCH"), *_GET[1:]),
)  # fmt: skip
REQUEST_BAD = (
    b"", _of(2), _of(2, *_GET[1:]), _of(2, *_GET, _GET[0]), _of(2, (b"x", b"1"), *_GET), _of(2, *_GET, (b"x", b"a\r\nb: c")), _of(2, *_GET, (b"x", b"\0")),
    _of(2, *_GET, (b"X", b"1")), _of(2, *_GET, (b"a b", b"1")), _of(2, *_GET, (b"a:b", b"1")), _of(2, *_GET, (b"connection", b"close")),
    _of(2, *_GET, (b"transfer-encoding", b"chunked")), _of(2, *_GET, (b"te", b"gzip")), _of(2, *_GET, (b"host", b"b.test")), _of(1, *_GET),
    _of(2, *_GET[:3], (b":path", b"/ HTTP/1.1\r\nx: y")), _of(2, (b":method", b"GET /x"), *_GET[1:]), _of(2, *_GET[:3], (b":path", b"")),
    _of(2, *_GET[:2], (b":authority", b"a,b"), _GET[3]), _of(2, *_GET, (b":status", b"200")), _of(0, *_POST, (b"content-length", b"1"), (b"content-length", b"1")),
    _of(0, *_POST, (b"content-length", b"+1")), _of(2, *_POST, (b"content-length", b"1")), _of(2, (b":method", b"CONNECT"), _GET[2]), _of(0, *_GET, (b":protocol", b"x")), _of(0, (b":method", b"CONNECT"), (b":protocol", b"a b"), *_GET[1:]), _of(2, *_GET, (b"x", b" a")),
    _of(2, *_GET[:3], (b":path", b"/%2e%2e/a")), _of(2, *_GET, *((b"x", b"y"),) * 30), _of(2, *_GET, (b"x", b"y" * 2000)),
)  # fmt: skip
WORDS = (
    inputs.NAME_END, inputs.FIELD_END, *PSEUDO, b":status", b"200", b"103", b"101", b"GET", b"POST", b"CONNECT", b"OPTIONS", b"http", b"https", b"a.test",
    b"/", b"*", b"host", b"content-length", b"te", b"trailers", b"transfer-encoding", b"connection", b"upgrade", b"expect", b"100-continue", b"websocket",
    b"cookie", b"\r\n", b"x-spiffe-id", b"0", b"5",
)  # fmt: skip
_OK = (b":status", b"200")
RESPONSE_GOOD = (
    _of(0, _OK), _of(2, _OK, (b"content-length", b"0")), _of(0, _OK, (b"content-length", b"5"), (b"x", b"\xe9")), _of(2, (b":status", b"204")),
    _of(0, (b":status", b"103"), (b"link", b"</a>")), _of(2, (b":status", b"304"), (b"content-length", b"5")), _of(0, _OK, (b"grpc-status", b"0"), (b"te", b"trailers")),
)  # fmt: skip
RESPONSE_BAD = (
    b"", _of(0), _of(0, (b"x", b"y")), _of(0, _OK, _OK), _of(0, (b":status", b"20")), _of(0, (b":status", b"101")), _of(0, (b":status", b"600")),
    _of(0, _OK, (b"x", b"a\r\nb: c")), _of(0, _OK, (b"X", b"y")), _of(0, _OK, (b"connection", b"close")), _of(0, _OK, (b":path", b"/")), _of(0, (b"x", b"y"), _OK),
    _of(0, _OK, (b"content-length", b"5"), (b"content-length", b"6")), _of(0, _OK, (b"content-length", b"-1")), _of(0, _OK, (b"a b", b"c")), _of(0, _OK, (b"x", b"\0")),
    _of(0, _OK, (b"transfer-encoding", b"chunked")),
)  # fmt: skip

TARGETS = (
    Target(name="h2.request", run=request, good=lambda: REQUEST_GOOD, bad=lambda: REQUEST_BAD, words=WORDS, max_bytes=2600, examples=200),
    Target(name="h2.response", run=response, good=lambda: RESPONSE_GOOD, bad=lambda: RESPONSE_BAD, words=WORDS, max_bytes=2600, examples=200),
)  # fmt: skip
