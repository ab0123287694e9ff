"""Answers of an upstream that lies over HTTP/2, to callers of either protocol: 502, or broken off so that nobody takes it for whole."""

from __future__ import annotations

from corpus.case import (
    BAD,
    END_HEADERS,
    HEADERS,
    HOST,
    PUSH_PROMISE,
    Answer,
    Answers,
    End,
    Head,
    Pair,
    Seen,
    broken,
    data,
    frame,
    get,
    goaway,
    good,
    named,
    post,
    rst,
    window,
)
from corpus.h1_answers import EVIL

FINE: Pair = (b":status", b"200")


def two(*fields: Pair, body: bytes | None = b"ok") -> tuple[Head | bytes, ...]:
    return (Head(fields, end=body is None), *(() if body is None else (data(body),)))


def heads() -> Answers:
    """RFC 9113 §8.3.2: :status once, in front, three digits, and no other pseudo-field; §8.2: fields as those of requests; §8.6 of
    RFC 9110 and §8.1.1: one length, and that of the DATA. A malformed answer is an error of its stream: 502.
    """
    lies: dict[str, tuple[Pair, ...]] = {
        "status-missing": ((b"x", b"y"),), "status-twice": (FINE, FINE),
        "status-two-ways": (FINE, (b":status", b"500")), "status-late": ((b"x", b"y"), FINE),
        "status-empty": ((b":status", b""),), "status-word": ((b":status", b"OK"),),
        "status-with-reason": ((b":status", b"200 OK"),),
        "status-20": ((b":status", b"20"),), "status-2000": ((b":status", b"2000"),),
        "status-099": ((b":status", b"099"),), "status-600": ((b":status", b"600"),),
        "status-000": ((b":status", b"000"),), "status-signed": ((b":status", b"+20"),),
        "status-spaced": ((b":status", b" 200"),), "status-hex": ((b":status", b"0xc8"),),
        "status-101": ((b":status", b"101"),), "status-100-that-ends": ((b":status", b"100"),),
        "status-with-crlf": ((b":status", b"200\r\nx: y"),),
        "status-fullwidth": ((b":status", b"\xef\xbc\x92\xef\xbc\x90\xef\xbc\x90"),),
        "status-in-capitals": ((b":STATUS", b"200"),),
        "path": (FINE, (b":path", b"/x")), "method": (FINE, (b":method", b"GET")),
        "authority": (FINE, (b":authority", HOST)), "unknown": (FINE, (b":x", b"y")),
        "name-in-capitals": (FINE, (b"X", b"y")), "name-empty": (FINE, (b"", b"y")),
        "name-with-space": (FINE, (b"x y", b"z")), "name-with-colon": (FINE, (b"x:y", b"z")),
        "name-with-crlf": (FINE, (b"x: y\r\nz", b"a")), "value-with-crlf": (FINE, (b"x", b"a\r\nset-cookie: b")),
        "value-with-nul": (FINE, (b"x", b"a\0b")), "value-with-lf": (FINE, (b"x", b"a\nb")),
        "value-with-space-around": (FINE, (b"x", b" a ")), "connection": (FINE, (b"connection", b"close")),
        "keep-alive": (FINE, (b"keep-alive", b"x")),
        "coding": (FINE, (b"transfer-encoding", b"chunked")), "upgrade": (FINE, (b"upgrade", b"h2c")),
        "proxy-connection": (FINE, (b"proxy-connection", b"x")), "length-list": (FINE, (b"content-length", b"2, 2")),
        "length-twice": (FINE, (b"content-length", b"2"), (b"content-length", b"2")),
        "length-signed": (FINE, (b"content-length", b"+2")), "length-empty": (FINE, (b"content-length", b"")),
        "length-word": (FINE, (b"content-length", b"two")), "too-many": (FINE, *((b"x", b"y") for _ in range(101))),
        "name-not-ascii": (FINE, (b"x\xe9", b"y")),
    }  # fmt: skip
    for name, fields in lies.items():
        # What the protocol library takes for an error of the connection costs a GET no more than another try.
        yield name, Answer(said=two(*fields), expect=BAD, repeats=True)
        if name.startswith(("status", "connection", "coding", "length")):
            yield f"{name}-without-body", Answer(said=two(*fields, body=None), expect=BAD, repeats=True)
    yield "too-large", Answer(said=(Head((FINE, (b"x", b"a" * 70000)), end=False, pieces=5), data(b"ok")), expect=BAD)
    for name, said, expect in (
        ("length", two(FINE, (b"content-length", b"2")), good(b"ok")), ("no-length", two(FINE), good(b"ok")),
        ("no-body", two(FINE, body=None), good(b"")), ("204", two((b":status", b"204"), body=None), good(b"", 204)),
        ("interim", (Head(((b":status", b"103"),), end=False), *two(FINE)), good(b"ok")),
        ("several-interims", (*(Head(((b":status", b"103"), (b"link", b"a")), end=False),) * 5, *two(FINE)), good(b"ok")), ("padded", (Head((FINE,), end=False, padding=9), data(b"ok", padding=9)), good(b"ok")), ("pieces", (Head((FINE, (b"x", b"y")), end=False, pieces=3), data(b"ok")), good(b"ok")),
        ("status-599", two((b":status", b"599")), good(b"ok", 599)),
        ("obs-text", two(FINE, (b"x", b"\xe9")), good(b"ok")), ("a-response", two(FINE, body=EVIL), good(EVIL)),
    ):  # fmt: skip
        yield f"sound-{name}", Answer(said=said, expect=expect)
    for name in (
        b"x-spiffe-id",
        b"x-forwarded-spiffe-id",
        b"x_forwarded_client_cert",
        b"forwarded",
        b"http2-settings",
        b"trailer",
        b"proxy-authenticate",
        b"host",
        b"set_cookie",
    ):
        yield (
            "drops-" + named(name),
            Answer(said=two(FINE, (name, b"forged")), expect=(*good(b"ok", absent=frozenset({name})), *BAD)),
        )


def bodies() -> Answers:
    """RFC 9113 §8.1, §8.1.1: DATA as long as was stated, trailers that end the stream and hold no pseudo-field; §8.2.2. Whatever
    breaks off never looks whole.
    """
    begun = Head((FINE,), end=False)
    gone = (*BAD, *broken())
    for name, length, frames in (
        ("longer", b"2", (data(b"okay"),)), ("shorter", b"5", (data(b"ok"),)),
        ("shorter-by-one", b"3", (data(b"ok"),)), ("shorter-and-empty", b"5", (data(b""),)),
    ):  # fmt: skip
        yield (
            f"length-{name}",
            Answer(said=(Head((FINE, (b"content-length", length)), end=False), *frames), expect=gone),
        )
    # What a caller of HTTP/1.1 was told of has come, and it gets nothing more.
    yield (
        "length-longer-in-two",
        Answer(
            said=(Head((FINE, (b"content-length", b"2")), end=False), data(b"ok", end=False), data(b"evil")),
            expect=(*gone, *good(b"ok")),
        ),
    )
    yield (
        "length-zero-and-data",
        Answer(said=(Head((FINE, (b"content-length", b"0")), end=False), data(b"evil")), expect=(*gone, *good(b""))),
    )
    yield (
        "length-and-no-data",
        Answer(
            said=(
                Head(
                    (FINE, (b"content-length", b"5")),
                ),
            ),
            expect=gone,
        ),
    )
    for code in (0, 1, 2, 3, 5, 7, 8, 11, 13, 99, 0xFFFFFFFF):
        yield f"reset-{code}-behind-head", Answer(said=(begun, data(b"ok", end=False), 0.02, rst(code)), expect=gone)
    for code in (1, 2, 3, 5, 8, 11, 13, 99):
        yield f"reset-{code}-for-answer", Answer(said=(rst(code),), expect=BAD)
    yield "reset-refused", Answer(said=(rst(7),), expect=(Seen(status=503), Seen(status=502)), repeats=True)
    yield "reset-behind-end", Answer(said=(begun, data(b"ok"), rst(0)), expect=good(b"ok"))
    yield "reset-with-error-behind-end", Answer(said=(begun, data(b"ok"), rst(2)), expect=(*good(b"ok"), *gone))
    yield "data-before-head", Answer(said=(data(b"ok"),), expect=gone, repeats=True)
    yield (
        "data-behind-end",
        Answer(said=(begun, data(b"ok"), data(b"evil")), expect=(*good(b"ok"), *gone), repeats=True),
    )
    yield (
        "head-behind-end",
        Answer(said=(begun, data(b"ok"), Head((FINE,))), expect=(*good(b"ok"), *gone), repeats=True),
    )
    yield "second-head", Answer(said=(begun, data(b"ok", end=False), Head((FINE,))), expect=gone)
    yield (
        "second-head-without-end",
        Answer(said=(begun, Head(((b":status", b"404"),), end=False), data(b"ok")), expect=gone),
    )
    yield (
        "interim-behind-head",
        Answer(said=(begun, Head(((b":status", b"103"),), end=False), data(b"ok")), expect=gone),
    )
    yield (
        "interim-flood",
        Answer(
            said=(*(Head(((b":status", b"103"),), end=False),) * 500, begun, data(b"ok")), expect=(*gone, *good(b"ok"))
        ),
    )
    yield (
        "empty-data-flood",
        Answer(said=(begun, data(b"", end=False) * 3000, data(b"ok")), expect=(*gone, *good(b"ok"))),
    )
    ok = frozenset({(b"x-ok", b"y")})
    yield (
        "trailers",
        Answer(said=(begun, data(b"ok", end=False), Head(((b"x-ok", b"y"),))), expect=good(b"ok", trailers=ok)),
    )
    yield "only-trailers", Answer(said=(begun, Head(((b"x-ok", b"y"),))), expect=good(b"", trailers=ok))
    for name in (
        b"content-length",
        b"host",
        b"set-cookie",
        b"x-spiffe-id",
        b"x_forwarded_spiffe_id",
        b"forwarded",
        b"trailer",
        b"cache-control",
        b"via",
    ):
        yield (
            "trailers-drop-" + named(name),
            Answer(
                said=(begun, data(b"ok", end=False), Head(((name, b"9"), (b"x-ok", b"y")))),
                expect=(*good(b"ok", trailers=ok), *gone),
            ),
        )
    for name, pair in {
        "status": (b":status", b"500"), "path": (b":path", b"/x"), "coding": (b"transfer-encoding", b"chunked"),
        "connection": (b"connection", b"x"), "crlf": (b"x", b"a\r\nb"), "capitals": (b"X", b"y"),
        "name-empty": (b"", b"y"), "nul": (b"x", b"\0"),
    }.items():  # fmt: skip
        yield f"trailers-with-{name}", Answer(said=(begun, data(b"ok", end=False), Head((pair,))), expect=gone)
    yield (
        "trailers-without-end",
        Answer(said=(begun, data(b"ok", end=False), Head(((b"x", b"y"),), end=False), data(b"evil")), expect=gone),
    )
    yield (
        "trailers-too-many",
        Answer(said=(begun, data(b"ok", end=False), Head(tuple((b"x", b"y") for _ in range(101)))), expect=gone),
    )
    yield (
        "trailers-too-large",
        Answer(said=(begun, data(b"ok", end=False), Head(((b"x", b"a" * 70000),), pieces=5)), expect=gone),
    )
    yield (
        "head-with-data-for-head",
        Answer(said=(begun, data(b"ok")), expect=(*good(b""), *gone), asked=get(line=b"HEAD /k-00000 HTTP/1.1")),
    )
    yield (
        "head-with-length",
        Answer(
            said=(Head((FINE, (b"content-length", b"4"))),), expect=good(b""), asked=get(line=b"HEAD /k-00000 HTTP/1.1")
        ),
    )
    yield "204-with-data", Answer(said=two((b":status", b"204")), expect=(*good(b"", 204), *gone))
    yield (
        "304-with-length",
        Answer(said=two((b":status", b"304"), (b"content-length", b"4"), body=None), expect=good(b"", 304)),
    )
    yield (
        "before-the-request-is-whole",
        Answer(
            said=(Head(((b":status", b"413"),), end=False), data(b"no"), rst(0)),
            expect=good(b"no", 413),
            asked=post(b"Content-Length: 30\r\n", b"abc"),
            early=True,
        ),
    )


def connections() -> Answers:
    """RFC 9113 §5.4.1, §6.8: an error of the connection costs those whose answers it cut, and nobody is given half of one. What a
    GOAWAY says was not acted on may be asked again elsewhere (§8.7), and so may a GET whose connection has failed (RFC 9110
    §9.2.2).
    """
    begun = Head((FINE,), end=False)
    gone = (*BAD, *broken())
    for name, bad in {
        "data-on-stream-zero": data(b"x", stream=0), "data-on-idle-stream": data(b"x", stream=99991),
        "head-on-idle-stream": Head((FINE,), stream=99991).wire(lambda _name, value: value),
        "head-on-even-stream": Head((FINE,), stream=2).wire(lambda _name, value: value),
        "push-promise": frame(PUSH_PROMISE, b"\0\0\0\2\x88", flags=END_HEADERS),
        "settings-on-stream": b"\0\0\0\4\0\0\0\0\1", "settings-with-odd-length": b"\0\0\5\4\0\0\0\0\0abcde",
        "ping-with-odd-length": b"\0\0\5\6\0\0\0\0\0abcde", "window-of-zero": window(0),
        "window-beyond": window(2**31 - 1), "piece-alone": b"\0\0\1\x09\4\0\0\0\1\x88",
        "hpack-index-beyond": frame(HEADERS, b"\xff\xff\xff\x7f", flags=END_HEADERS),
        "frame-too-large": b"\x00\x40\x01\0\0\0\0\0\1" + bytes(16385),
        "padding-beyond-frame": b"\0\0\2\0\x09\0\0\0\1\xffa", "enable-push": b"\0\0\6\4\0\0\0\0\0\0\2\0\0\0\1",
        "h1-answer": EVIL,
    }.items():  # fmt: skip
        yield f"{name}-for-answer", Answer(said=(bad, 0.05, End()), expect=gone, repeats=True)
        yield (
            f"{name}-in-body",
            Answer(said=(begun, data(b"ok", end=False), bad, 0.05, End()), expect=gone, repeats=True),
        )
    for how in ("end", "drop", "reset"):
        yield f"{how}-for-answer", Answer(said=(End(how),), expect=gone, repeats=True)
        yield f"{how}-in-body", Answer(said=(begun, data(b"ok", end=False), 0.02, End(how)), expect=gone)
    yield "goaway-then-answer", Answer(said=(goaway(1), begun, data(b"ok")), expect=good(b"ok"))
    yield "goaway-above-all", Answer(said=(goaway(2**31 - 1), begun, data(b"ok")), expect=good(b"ok"))
    yield (
        "goaway-below",
        Answer(said=(goaway(0), 0.05, End()), expect=(Seen(status=503), Seen(status=502)), repeats=True),
    )
    yield "goaway-in-body", Answer(said=(begun, data(b"o", end=False), goaway(1), data(b"k")), expect=good(b"ok"))
    yield "goaway-with-error-then-end", Answer(said=(goaway(1, 2), End()), expect=gone, repeats=True)
    yield "unknown-frame", Answer(said=(b"\0\0\3\x77\0\0\0\0\1abc", begun, data(b"ok")), expect=good(b"ok"))
    yield "trickled", Answer(said=(begun, data(b"o", end=False), 0.02, data(b"k")), expect=good(b"ok"))
