"""HTTP/2: bodies, trailers, frames in the wrong place, and CONNECT."""

from __future__ import annotations

from corpus.case import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    HOST,
    MARK,
    PRIORITY,
    PUSH_PROMISE,
    SMUGGLED,
    Case,
    Cases,
    Expect,
    Fields,
    Head,
    Outcome,
    Pair,
    data,
    frame,
    named,
    one,
    passed,
    reset,
    rst,
    unanswered,
    usual,
    window,
    with_body,
    with_trailers,
)


def bodies() -> Cases:
    """RFC 9113 §8.1.1: a Content-Length that is not the length of the DATA is malformed; RFC 9110 §8.6 says what one looks like."""
    for value in (
        b"+3",
        b"-3",
        b"0x3",
        b"3,3",
        b"3, 3",
        b"3;",
        b"3.0",
        b"3 3",
        b"",
        b"three",
        b"\xef\xbc\x93",
        b"3_0",
        b"99999999999999999999",
        b"18446744073709551619",
        b'"3"',
        b"3\xa0",
        b"3e0",
    ):
        yield (
            "length-" + named(value),
            Case(sent=with_body(usual((b"content-length", value)), data(b"abc")), expect=reset(400, 413)),
        )
        yield (
            f"length-{named(value)}-without-body",
            Case(sent=one(usual((b"content-length", value))), expect=reset(400, 413)),
        )
    for name, lengths, frames in (
        ("zero", (b"0",), (data(SMUGGLED),)), ("too-small", (b"3",), (data(b"abc" + SMUGGLED),)),
        ("too-small-in-two", (b"3",), (data(b"abc", end=False), data(SMUGGLED))),
        ("too-large", (b"30",), (data(b"abc"),)), ("too-large-by-one", (b"4",), (data(b"abc"),)),
        ("too-large-and-empty", (b"3",), (data(b""),)), ("twice", (b"3", b"3"), (data(b"abc"),)),
        ("two-ways", (b"3", b"4"), (data(b"abc"),)), ("two-ways-reversed", (b"4", b"3"), (data(b"abc"),)),
        ("and-zero", (b"3", b"0"), (data(b"abc"),)),
    ):  # fmt: skip
        yield (
            f"length-{name}",
            Case(
                sent=with_body(usual(*((b"content-length", one_) for one_ in lengths)), *frames),
                expect=reset(cut=name.startswith("too")),
            ),
        )
    yield "length-without-body", Case(sent=one(usual((b"content-length", b"30"))), expect=reset())
    yield (
        "length-too-large-with-trailers",
        Case(sent=with_trailers(usual((b"content-length", b"9")), ((b"x", b"y"),)), expect=reset(cut=True)),
    )
    yield (
        "length-too-small-with-trailers",
        Case(sent=with_trailers(usual((b"content-length", b"1")), ((b"x", b"y"),), b"abc"), expect=reset(cut=True)),
    )
    yield (
        "length-right-then-more",
        Case(
            sent=with_body(usual((b"content-length", b"3")), data(b"abc", end=False), data(b"d")),
            expect=reset(cut=True),
        ),
    )
    for name, frames, body in (
        ("plain", (data(b"abc"),), b"abc"), ("a-request", (data(SMUGGLED),), SMUGGLED),
        ("of-chunks", (data(b"0\r\n\r\n" + SMUGGLED),), b"0\r\n\r\n" + SMUGGLED),
        ("in-parts", (data(b"a", end=False), data(b"b", end=False), data(b"c")), b"abc"), ("empty", (data(b""),), b""),
        ("with-empty-parts", (data(b"", end=False), data(b"abc", end=False), data(b"", end=False), data(b"")), b"abc"),
        ("padded", (data(b"abc", padding=200),), b"abc"), ("padded-by-nothing", (data(b"abc", padding=0),), b"abc"),
        ("only-padding", (data(b"", padding=9, end=False), data(b"abc")), b"abc"),
    ):  # fmt: skip
        yield f"sound-{name}", Case(sent=with_body(usual(), *frames), expect=passed(body))
    for name, fields_, body in (
        ("length", (b"content-length", b"3"), b"abc"), ("length-with-zeros", (b"content-length", b"003"), b"abc"),
        ("length-zero", (b"content-length", b"0"), b""),
        ("length-spelt-otherwise", (b"content_length", b"0"), SMUGGLED),
        ("coding-spelt-otherwise", (b"transfer_encoding", b"chunked"), b"0\r\n\r\n" + SMUGGLED),
        ("length-padded", (b"content-length", b"3"), b"abc"),
    ):  # fmt: skip
        yield (
            f"sound-{name}",
            Case(
                sent=with_body(usual(fields_), data(body, padding=7 if "padded" in name else None)), expect=passed(body)
            ),
        )
    yield "sound-body-of-get", Case(sent=with_body(usual(method=b"GET"), data(b"abc")), expect=passed(b"abc"))
    yield (
        "reset-in-the-middle",
        Case(
            sent=with_body(usual((b"content-length", b"30")), data(b"abc", end=False), rst(8)),
            expect=(Outcome(answers=(), cut=True),),
            quits=True,
        ),
    )
    yield (
        "ended-in-the-middle",
        Case(
            sent=with_body(usual((b"content-length", b"30")), data(b"abc", end=False)),
            expect=reset(408, 502, cut=True),
            half=True,
        ),
    )


def trailers() -> Cases:
    """RFC 9113 §8.1: no pseudo-field, and the end of the stream; RFC 9110 §6.5.1: nothing that frames, routes or identifies."""
    yield "one", Case(sent=with_trailers(usual(), ((b"x-ok", b"y"),)), expect=passed(b"a", trailers=[(b"x-ok", b"y")]))
    yield (
        "behind-no-data",
        Case(sent=(Head(usual(), end=False), Head(((b"x-ok", b"y"),))), expect=passed(trailers=[(b"x-ok", b"y")])),
    )
    for name in (
        b"x-spiffe-id", b"x-forwarded-spiffe-id", b"x_forwarded_spiffe_id", b"x-forwarded-client-cert", b"forwarded",
        b"content-length", b"host", b"authorization", b"cookie", b"via", b"expect", b"trailer", b"x-role", b"x_role",
        b"x-seen", b"x-forwarded-for",
        b"x-http-method-override", b"content-type", b"cache-control", b"x-request-id", b"proxy-authorization",
        b"content_length",
    ):  # fmt: skip
        yield (
            f"drops-{named(name)}",
            Case(
                sent=with_trailers(usual(), ((name, b"9"), (b"x-ok", b"y"))),
                expect=passed(b"a", trailers=[(b"x-ok", b"y")]) + reset(cut=True),
            ),
        )
    yield (
        "trailers-of-identity",
        Case(
            sent=with_trailers(
                usual(),
                ((b"x-spiffe-id", b"e"), (b"x_forwarded_spiffe_id", b"e"), (b"content-length", b"9"), (b"host", b"e")),
            ),
            expect=passed(b"a") + reset(cut=True),
        ),
    )
    for name, pair in {
        "crlf": (b"x", b"a\r\n\r\n" + SMUGGLED), "lf": (b"x", b"a\nb"), "nul": (b"x", b"a\0b"),
        "name-with-lf": (b"x\ny", b"a"), "name-with-colon": (b"x:y", b"a"), "name-in-capitals": (b"X", b"a"),
        "name-empty": (b"", b"a"), "coding": (b"transfer-encoding", b"chunked"),
        "connection": (b"connection", b"x"), "upgrade": (b"upgrade", b"h2c"), "keep-alive": (b"keep-alive", b"x"),
        "space-around": (b"x", b" a "), "name-with-space": (b"x y", b"a"),
    }.items():  # fmt: skip
        yield f"with-{name}", Case(sent=with_trailers(usual(), (pair,)), expect=reset(cut=True))
    yield (
        "without-end",
        Case(
            sent=(Head(usual(), end=False), data(b"a", end=False), Head(((b"x", b"y"),), end=False)),
            expect=reset(cut=True),
        ),
    )
    yield (
        "twice",
        Case(
            sent=(Head(usual(), end=False), data(b"a", end=False), Head(((b"x", b"y"),)), Head(((b"x", b"z"),))),
            expect=reset(cut=True) + _trailed(b"a"),
        ),
    )
    yield (
        "too-many",
        Case(
            sent=with_trailers(usual(), tuple((b"x%d" % number, b"y") for number in range(101))),
            expect=reset(431, cut=True),
        ),
    )
    yield (
        "too-large",
        Case(
            sent=(Head(usual(), end=False), data(b"a", end=False), Head(((b"x", b"a" * 70000),), pieces=5)),
            expect=reset(431, cut=True),
        ),
    )
    yield (
        "data-behind",
        Case(
            sent=(Head(usual(), end=False), Head(((b"x", b"y"),)), data(SMUGGLED)),
            expect=reset(cut=True) + _trailed(b""),
        ),
    )


def _trailed(body: bytes) -> Expect:
    trailed = frozenset({(b"x", b"y")})
    return (*passed(body, trailers=trailed), Outcome(answers=(), arrived=(body,), trailers=trailed))


def frames() -> Cases:
    """RFC 9113 §5.1 (what may come when), §6 (what each frame is), §4.3 (one block at a time, HPACK whole)."""
    whole = Head(usual())
    open_ = Head(usual(), end=False)
    block = whole.wire(lambda _name, value: value)[9:]
    gone = reset(cut=True)

    def begun(part: bytes, flags: int = 0) -> bytes:
        return frame(HEADERS, part, flags=flags)

    def goes_on(part: bytes, flags: int = END_HEADERS, stream: int = 1) -> bytes:
        return frame(CONTINUATION, part, flags=flags, stream=stream)

    yield "data-before-head", Case(sent=(data(SMUGGLED), whole), expect=gone)
    yield "data-on-stream-zero", Case(sent=(open_, data(b"a", stream=0)), expect=gone)
    yield "head-on-stream-zero", Case(sent=(Head(usual(), stream=0),), expect=gone)
    yield "head-on-even-stream", Case(sent=(Head(usual(), stream=2),), expect=gone)
    yield (
        "head-on-lower-stream",
        Case(
            sent=(Head(usual(path=b"/k-00000/first"), stream=5), Head(usual(), stream=3)),
            expect=gone + passed() + unanswered(),
        ),
    )
    yield "data-behind-end", Case(sent=(whole, data(SMUGGLED)), expect=gone + passed() + unanswered())
    yield (
        "head-behind-end",
        Case(sent=(whole, Head(usual(path=b"/k-00000/smuggled"))), expect=gone + passed() + unanswered()),
    )
    yield (
        "head-behind-end-of-body",
        Case(
            sent=(open_, data(b"a"), Head(usual(path=b"/k-00000/smuggled"))),
            expect=gone + passed(b"a") + unanswered(b"a"),
        ),
    )
    yield (
        "second-head-without-end",
        Case(sent=(open_, Head(usual(path=b"/k-00000/smuggled"), end=False), data(b"a")), expect=gone),
    )
    yield "second-head-with-end", Case(sent=(open_, Head(usual(path=b"/k-00000/smuggled"))), expect=gone)
    yield "in-many-pieces", Case(sent=(Head(usual(), pieces=20),), expect=passed() + gone)
    yield "in-two-pieces", Case(sent=(Head(usual(), pieces=2),), expect=passed())
    yield "padded", Case(sent=(Head(usual(), padding=100),), expect=passed())
    yield "empty-pieces", Case(sent=(begun(b"", END_STREAM), goes_on(b"", 0), goes_on(block)), expect=passed() + gone)
    yield "between-pieces-data", Case(sent=(begun(block[:9]), data(b"a", end=False), goes_on(block[9:])), expect=gone)
    yield (
        "between-pieces-another",
        Case(
            sent=(begun(block[:9]), Head(usual(path=b"/k-00000/smuggled"), stream=3), goes_on(block[9:])), expect=gone
        ),
    )
    yield "between-pieces-window", Case(sent=(begun(block[:9]), window(1), goes_on(block[9:])), expect=gone)
    yield "piece-of-another", Case(sent=(begun(block[:9]), goes_on(block[9:], stream=3)), expect=gone)
    yield "piece-alone", Case(sent=(goes_on(block),), expect=gone)
    yield "piece-behind-end", Case(sent=(whole, goes_on(block)), expect=gone + passed() + unanswered())
    yield "no-last-piece", Case(sent=(begun(block, END_STREAM),), expect=gone, half=True)
    yield "padding-beyond-frame", Case(sent=(open_, b"\0\0\2\0\x09\0\0\0\1\xffa"), expect=gone)
    yield "padding-of-all", Case(sent=(open_, b"\0\0\2\0\x09\0\0\0\1\2a"), expect=gone)
    yield "padding-without-length", Case(sent=(open_, b"\0\0\0\0\x09\0\0\0\1"), expect=gone)
    yield "head-padding-beyond-frame", Case(sent=(b"\0\0\3\1\x0d\0\0\0\1\xff\x82\x87",), expect=gone)
    yield "hpack-index-beyond", Case(sent=(begun(b"\xff\xff\xff\x7f", END_HEADERS | END_STREAM),), expect=gone)
    yield "hpack-index-zero", Case(sent=(begun(b"\x80", END_HEADERS | END_STREAM),), expect=gone)
    yield "hpack-cut-short", Case(sent=(begun(block[:-3], END_HEADERS | END_STREAM),), expect=gone)
    yield (
        "hpack-table-too-large",
        Case(sent=(begun(b"\x3f\xff\xff\x7f" + block, END_HEADERS | END_STREAM),), expect=gone),
    )
    yield "hpack-table-late", Case(sent=(begun(block + b"\x20", END_HEADERS | END_STREAM),), expect=gone)
    yield (
        "hpack-huffman-padding",
        Case(sent=(begun(block + b"\x10\x01x\x82\x00\x00", END_HEADERS | END_STREAM),), expect=gone),
    )
    yield "hpack-endless-integer", Case(sent=(begun(b"\xff" + b"\x80" * 200, END_HEADERS | END_STREAM),), expect=gone)
    yield "frame-too-large", Case(sent=(open_, b"\x00\x40\x01\0\1\0\0\0\1" + bytes(16385)), expect=gone)
    yield "push-promise", Case(sent=(frame(PUSH_PROMISE, b"\0\0\0\2" + block, flags=END_HEADERS), whole), expect=gone)
    yield (
        "depends-on-itself",
        Case(sent=(b"\0\0\5\2\0\0\0\0\1\0\0\0\1\x10", whole), expect=gone + passed() + unanswered()),
    )
    yield "priority-first", Case(sent=(frame(PRIORITY, b"\0\0\0\0\x0f"), whole), expect=passed())
    yield "window-of-zero", Case(sent=(open_, window(0, stream=1), data(b"a")), expect=gone)
    yield "window-beyond", Case(sent=(open_, window(2**31 - 1, stream=1), data(b"a")), expect=gone)
    yield "window-of-idle", Case(sent=(window(1, stream=1), whole), expect=gone)
    yield "reset-of-idle", Case(sent=(rst(8), whole), expect=gone)
    yield (
        "reset-then-data",
        Case(sent=(open_, rst(8), data(SMUGGLED)), expect=(*gone, Outcome(answers=(), cut=True)), quits=True),
    )
    yield "unknown-frame", Case(sent=(b"\0\0\3\x77\0\0\0\0\1abc", whole), expect=passed())
    yield "unknown-frame-in-body", Case(sent=(open_, b"\0\0\3\x77\0\0\0\0\1abc", data(b"a")), expect=passed(b"a"))
    yield "unknown-flags", Case(sent=(open_, b"\0\0\1\0\xf1\0\0\0\1a"), expect=passed(b"a") + gone)
    yield "reserved-bit", Case(sent=(open_, b"\0\0\1\0\1\x80\0\0\1a"), expect=passed(b"a") + gone)
    yield "settings-on-stream", Case(sent=(b"\0\0\0\4\0\0\0\0\1", whole), expect=gone)
    yield "settings-with-odd-length", Case(sent=(b"\0\0\5\4\0\0\0\0\0abcde", whole), expect=gone)
    yield "settings-window-beyond", Case(sent=(b"\0\0\6\4\0\0\0\0\0\0\4\xff\xff\xff\xff", whole), expect=gone)
    yield "settings-frame-size-beyond", Case(sent=(b"\0\0\6\4\0\0\0\0\0\0\5\0\0\0\1", whole), expect=gone)
    yield "ping-with-odd-length", Case(sent=(b"\0\0\5\6\0\0\0\0\0abcde", whole), expect=gone)
    yield "h1-request-for-frames", Case(sent=(SMUGGLED,), expect=gone)
    yield "h1-request-behind", Case(sent=(whole, SMUGGLED), expect=gone + passed() + unanswered())
    yield (
        "several-streams",
        Case(sent=tuple(Head(usual(), stream=number) for number in (1, 3, 5, 7)), expect=passed(*[b""] * 4)),
    )
    yield (
        "bad-between-good",
        Case(sent=(whole, Head(usual((b"X", b"y")), stream=3), Head(usual(), stream=5)), expect=passed(b"", b"")),
    )
    yield (
        "interleaved",
        Case(
            sent=(
                open_,
                Head(usual(), end=False, stream=3),
                data(b"a", end=False),
                data(b"x", stream=3, end=False),
                data(b"b"),
                data(b"y", stream=3),
            ),
            expect=passed(b"ab", b"xy"),
        ),
    )


def connects() -> Cases:
    """RFC 9113 §8.5: CONNECT has :authority and neither :scheme nor :path, and there is no tunnel here: 501. RFC 8441 §4: extended
    CONNECT has all of them and :protocol. The agent declines: with 200 in HTTP/1.1, where only 101 is a switch, and with 501.
    """
    connect = ((b":method", b"CONNECT"), (b":authority", b"backend.internal:443"), (b"x-case", MARK))
    yield "plain", Case(sent=one(connect), expect=reset(501))
    yield "plain-with-data", Case(sent=with_body(connect, data(SMUGGLED)), expect=reset(501))
    yield "plain-without-port", Case(sent=one((connect[0], (b":authority", HOST))), expect=reset(400, 501))
    yield "plain-with-path", Case(sent=one((*connect[:2], (b":path", b"/k-00000"))), expect=reset(400, 501))
    yield "plain-with-scheme", Case(sent=one((*connect[:2], (b":scheme", b"https"))), expect=reset(400, 501))
    yield "plain-with-both", Case(sent=one(usual(method=b"CONNECT")), expect=reset(400, 501))
    yield (
        "plain-without-authority",
        Case(sent=one((connect[0], (b"host", b"backend.internal:443"))), expect=reset(400, 501)),
    )
    yield (
        "plain-to-another",
        Case(sent=one((connect[0], (b":authority", b"evil:443"))), expect=reset(400, 404, 421, 501)),
    )

    def extended(protocol: bytes = b"websocket", *more: Pair, **changed: bytes | None) -> Fields:
        head = usual(*more, **{"method": b"CONNECT", **changed})
        return (*head[: -1 - len(more)], (b":protocol", protocol), *head[-1 - len(more) :])

    refusals = reset(400, 501)
    for name, fields_ in {
        "path": extended(path=None), "scheme": extended(scheme=None), "authority": extended(authority=None),
        "path-and-scheme": extended(path=None, scheme=None),
    }.items():  # fmt: skip
        yield f"extended-without-{name}", Case(sent=with_body(fields_), expect=refusals)
    for protocol in (
        b"",
        b"web socket",
        b"websocket\r\nx: y",
        b"websocket, h2c",
        b"web\0socket",
        b"websocket ",
        b'"websocket"',
    ):
        yield f"extended-protocol-{named(protocol)}", Case(sent=with_body(extended(protocol)), expect=refusals)
    for protocol in (b"h2c", b"h2", b"HTTP/2.0", b"TLS/1.3", b"connect-udp", b"websocket"):
        # What the upstream makes of it is an upgrade declined: 502 (HTTP/1.1), or its own refusal (HTTP/2).
        yield (
            f"extended-declined-{named(protocol)}",
            Case(sent=with_body(extended(protocol)), expect=reset(400, 501, 502, cut=True) + _declined_upstream()),
        )
    yield (
        "extended-protocol-twice",
        Case(sent=with_body((*extended()[:5], (b":protocol", b"websocket"), *extended()[5:])), expect=refusals),
    )
    yield (
        "extended-protocol-late",
        Case(sent=with_body((*usual(method=b"CONNECT"), (b":protocol", b"websocket"))), expect=refusals),
    )
    yield (
        "extended-with-length",
        Case(
            sent=with_body(extended(b"websocket", (b"content-length", b"3")), data(b"abc")),
            expect=reset(400, 501, 502, cut=True) + _declined_upstream(),
        ),
    )
    yield "extended-with-end", Case(sent=one(extended()), expect=reset(400, 501, 502, cut=True) + _declined_upstream())
    yield (
        "extended-with-a-request",
        Case(
            sent=with_body(extended(), data(SMUGGLED, end=False)),
            expect=reset(400, 501, 502, cut=True) + _declined_upstream(),
        ),
    )
    yield "extended-with-other-host", Case(sent=with_body(extended(b"websocket", (b"host", b"evil"))), expect=refusals)
    yield "extended-of-another", Case(sent=with_body(extended(authority=b"evil")), expect=reset(400, 404, 421, 501))
    yield "extended-to-the-secret", Case(sent=with_body(extended(path=b"/secret/k-00000")), expect=reset(403, 501))
    yield (
        "extended-with-upgrade",
        Case(sent=with_body(extended(b"websocket", (b"upgrade", b"websocket"))), expect=refusals),
    )
    yield "extended-method-in-lower-case", Case(sent=with_body(extended(method=b"connect")), expect=refusals)


def _declined_upstream() -> Expect:
    """The upgrade reached the agent as one request, which it declined."""
    return passed(status=502) + passed(status=501)
