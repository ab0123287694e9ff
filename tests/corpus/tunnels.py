"""Answers to a request for an upgrade, by upstreams of either protocol: 101 and the tunnel that was asked for, or none.

The caller of HTTP/1.1 says `Upgrade`, that of HTTP/2 extended CONNECT (RFC 8441), and the same answer means the same to both. What
is declined is an ordinary answer.
"""

from __future__ import annotations

from corpus.case import BAD, HOST, Answer, Answers, End, Head, Seen, broken, data, frame, get, good, rst
from corpus.h1_answers import EVIL, OK

UPGRADE = get(b"Connection: Upgrade\r\nUpgrade: x-of-ours\r\n")
WEBSOCKET = get(
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
H2C = get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n")
SWITCH = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: "
IN_H2 = ("in-h2", "out-h2")


def tunnel(body: bytes | None = None) -> tuple[Seen, ...]:
    return good(body, 101)


def over_h1() -> Answers:
    """RFC 9110 §7.8: no protocol that was not asked for, one at a time, and both fields; §15.2.2. RFC 6455 §4.2.2: a WebSocket's
    Accept belongs to its Key. RFC 9110 §8.6: 101 has no length, and what stands behind it is the tunnel's.
    """
    hello = SWITCH + b"x-of-ours\r\n\r\nhello"
    capitals, forged = hello.replace(b"x-of", b"X-Of"), hello.replace(b"\r\n\r\n", b"\r\nX-SPIFFE-ID: forged\r\n\r\n")
    yield "sound", Answer(said=(hello, End()), expect=tunnel(b"hello"), asked=UPGRADE)
    yield "sound-in-capitals", Answer(said=(capitals, End()), expect=tunnel(b"hello"), asked=UPGRADE)
    yield (
        "sound-behind-interim",
        Answer(said=(b"HTTP/1.1 103 X\r\n\r\n" + hello, End()), expect=tunnel(b"hello"), asked=UPGRADE),
    )
    yield "with-identity", Answer(said=(forged, End()), expect=tunnel(b"hello"), asked=UPGRADE)
    for name, fields in (("length", b"Content-Length: 5\r\n"), ("coding", b"Transfer-Encoding: chunked\r\n")):
        said = SWITCH + b"x-of-ours\r\n" + fields + b"\r\nhello"
        yield f"with-{name}", Answer(said=(said, End()), expect=(*BAD, *tunnel(b"hello")), asked=UPGRADE)
    for name, said in {
        "with-both-lengths": SWITCH + b"x-of-ours\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        "with-two-lengths": SWITCH + b"x-of-ours\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
        "with-control": SWITCH + b"x-of-ours\r\nX: \0\r\n\r\n", "with-fold": SWITCH + b"x-of-ours\r\nX: a\r\n b\r\n\r\n",
        "to-another": SWITCH + b"y\r\n\r\n", "to-nothing": b"HTTP/1.1 101 X\r\nConnection: upgrade\r\n\r\n",
        "to-the-empty": SWITCH + b"\r\n\r\n", "to-h2c": SWITCH + b"h2c\r\n\r\n", "to-h2c-too": SWITCH + b"x-of-ours, h2c\r\n\r\n",
        "to-h2c-in-second-field": SWITCH + b"x-of-ours\r\nUpgrade: h2c\r\n\r\n", "to-longer": SWITCH + b"x-of-ours2\r\n\r\n",
        "to-shorter": SWITCH + b"x-of-our\r\n\r\n", "to-websocket": SWITCH + b"websocket\r\n\r\n",
    }.items():  # fmt: skip
        yield name, Answer(said=(said + EVIL, End()), expect=BAD, asked=UPGRADE)
    yield (
        "without-connection",
        Answer(said=(b"HTTP/1.1 101 X\r\nUpgrade: x-of-ours\r\n\r\n", End()), expect=(*BAD, *tunnel()), asked=UPGRADE),
    )
    yield (
        "in-1.0",
        Answer(said=(hello.replace(b"HTTP/1.1", b"HTTP/1.0"), End()), expect=(*BAD, *tunnel()), asked=UPGRADE),
    )
    yield "to-h2c-that-was-asked-for", Answer(said=(SWITCH + b"h2c\r\n\r\n" + EVIL, End()), expect=BAD, asked=H2C)
    # To a caller of HTTP/2 any 2xx would be the tunnel (RFC 8441 §5).
    yield (
        "declined",
        Answer(
            said=(OK + b"Content-Length: 2\r\n\r\nok",), expect=good(b"ok"), asked=UPGRADE, on=dict.fromkeys(IN_H2, BAD)
        ),
    )
    yield (
        "declined-by-204",
        Answer(said=(b"HTTP/1.1 204 X\r\n\r\n",), expect=good(b"", 204), asked=UPGRADE, on=dict.fromkeys(IN_H2, BAD)),
    )
    yield "behind-final", Answer(
        said=(OK + b"Content-Length: 2\r\n\r\nok" + SWITCH + b"x-of-ours\r\n\r\n" + EVIL,), expect=good(b"ok"),
        asked=UPGRADE, on=dict.fromkeys(IN_H2, BAD),
    )  # fmt: skip
    for status in (302, 400, 403, 426, 501):
        said = b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nno" % status
        yield f"declined-by-{status}", Answer(said=(said,), expect=good(b"no", status), asked=UPGRADE)
    # A caller of HTTP/2 has no key: ours was used, and is checked.
    yield "websocket-with-accept", Answer(
        said=(SWITCH + b"websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nhello", End()),
        expect=tunnel(b"hello"), asked=WEBSOCKET, on=dict.fromkeys(IN_H2, BAD),
    )  # fmt: skip
    for name, accept in {
        "wrong": b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n", "no": b"", "empty": b"Sec-WebSocket-Accept:\r\n",
        "two": b"Sec-WebSocket-Accept: a\r\nSec-WebSocket-Accept: b\r\n",
    }.items():  # fmt: skip
        yield f"websocket-with-{name}-accept", Answer(
            said=(SWITCH + b"websocket\r\n" + accept + b"\r\n", End()), expect=(*BAD, *tunnel()), asked=WEBSOCKET,
            on=dict.fromkeys(IN_H2, BAD),
        )  # fmt: skip
    yield "silent", Answer(said=(End(),), expect=BAD, asked=UPGRADE, repeats=True)
    yield "half-a-head", Answer(said=(SWITCH + b"x-of", End()), expect=BAD, asked=UPGRADE)


def over_h2() -> Answers:
    """RFC 8441 §5: 2xx to extended CONNECT is the switch, and 101 is no status of HTTP/2 (RFC 9113 §8.6). RFC 9110 §9.3.6: a length
    in it means nothing. RFC 9113 §8.5: nothing but DATA belongs to a tunnel.
    """
    fine = (b":status", b"200")
    begun, hello, early = Head((fine,), end=False), data(b"hello"), data(b"hello", end=False)
    response = OK + b"Content-Length: 2\r\n\r\nok"
    cut = (*tunnel(b"hello"), *broken(101), *BAD)

    def said(*parts: bytes | float | Head | End, expect: tuple[Seen, ...], repeats: bool = False) -> Answer:
        return Answer(said=parts, expect=expect, asked=UPGRADE, early=True, repeats=repeats)

    yield "sound", said(begun, hello, expect=tunnel(b"hello"))
    yield "sound-in-parts", said(begun, data(b"hel", end=False), 0.01, data(b"lo"), expect=tunnel(b"hello"))
    yield "sound-and-over", said(Head((fine,)), expect=(*tunnel(b""), *BAD))
    yield "sound-behind-interim", said(Head(((b":status", b"103"),), end=False), begun, hello, expect=tunnel(b"hello"))
    yield "sound-unknown-frame", said(begun, frame(0x77, b"abc"), hello, expect=tunnel(b"hello"))
    yield "a-response-in-it", said(begun, data(response), expect=tunnel(response))
    yield "with-204", said(Head(((b":status", b"204"),)), expect=(*tunnel(b""), *good(b"", 204), *BAD))
    yield "with-identity", said(Head((fine, (b"x-spiffe-id", b"forged")), end=False), hello, expect=tunnel(b"hello"))
    yield "with-length", said(Head((fine, (b"content-length", b"2")), end=False), hello, expect=cut)
    for name, fields in {
        "101": ((b":status", b"101"), (b"x", b"y")), "status-twice": (fine, fine), "status-missing": ((b"x", b"y"),),
        "upgrade": (fine, (b"upgrade", b"x-of-ours")), "connection": (fine, (b"connection", b"upgrade")),
        "crlf": (fine, (b"x", b"a\r\nb")), "authority": (fine, (b":authority", HOST)), "protocol": (fine, (b":protocol", b"x")),
    }.items():  # fmt: skip
        yield f"with-{name}", said(Head(fields, end=False), data(b"evil"), expect=BAD, repeats=True)
    for status in (302, 400, 403, 426, 501):
        head = Head(((b":status", b"%d" % status),), end=False)
        yield f"declined-by-{status}", said(head, data(b"no"), expect=good(b"no", status))
    for code in (1, 2, 8):
        yield f"reset-{code}", said(rst(code), expect=BAD)
    yield "reset-in-tunnel", said(begun, early, 0.02, rst(2), expect=cut)
    yield "trailers", said(begun, early, Head(((b"x", b"y"),)), expect=cut)
    yield "second-head", said(begun, early, Head((fine,)), expect=cut)
