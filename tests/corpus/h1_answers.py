"""Answers of an upstream that lies over HTTP/1.1, to callers of either protocol.

What has no single meaning becomes 502, or is broken off where the answer has begun; it never looks whole, and what stands behind
it reaches nobody. Whoever asks next on the same connection gets an answer of its own.
"""

from __future__ import annotations

from corpus.case import BAD, CONTROLS, Answer, Answers, End, Seen, broken, get, good, named, post

OK = b"HTTP/1.1 200 OK\r\n"
EVIL = OK + b"Content-Length: 4\r\n\r\nevil"
"""What must reach nobody: it stands behind each answer in doubt."""


def lie(said: bytes, *expect: Seen, asked: bytes = b"", behind: bool = True) -> Answer:
    return Answer(said=(said + (EVIL if behind else b""), End()), expect=expect or BAD, asked=asked)


def framing() -> Answers:
    """RFC 9112 §6.3: two lengths, or a length with a coding, in an answer is what splits it (rule 3, rule 5): 502. §6.1: a coding
    that is not understood cannot be read to its end.
    """
    for name, fields, body in (
        ("both-lengths", b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
        ("both-lengths-reversed", b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"0\r\n\r\n"),
        ("length-zero-and-coding", b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
        ("length-twice", b"Content-Length: 2\r\nContent-Length: 3\r\n", b"ok"),
        ("length-twice-and-equal", b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ok"),
        ("length-list", b"Content-Length: 2, 2\r\n", b"ok"),
        ("length-and-identity", b"Content-Length: 2\r\nTransfer-Encoding: identity\r\n", b"ok"),
    ):  # fmt: skip
        yield name, lie(OK + fields + b"\r\n" + body)
    for value in (
        b"+2",
        b"-2",
        b"0x2",
        b"2,",
        b"",
        b"2 2",
        b"two",
        b"2.0",
        b"99999999999999999999",
        b"18446744073709551618",
        b"\x0b2",
        b"2;",
        b'"2"',
        b"\xef\xbc\x92",
        b"2_0",
        b"-0",
    ):
        yield "length-" + named(value), lie(OK + b"Content-Length: " + value + b"\r\n\r\nok")
    for value in (
        b"gzip",
        b"identity",
        b"xchunked",
        b"chunked, identity",
        b"gzip, chunked",
        b"chunked, chunked",
        b'"chunked"',
        b"",
        b"chunked;x",
        b"\x0bchunked",
        b"chunked,",
        b"identity, chunked",
    ):
        yield "coding-" + named(value), lie(OK + b"Transfer-Encoding: " + value + b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    yield "coding-twice", lie(OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n")
    yield "coding-folded", lie(OK + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n")
    yield "coding-space-before-colon", lie(OK + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n")
    yield "length-space-before-colon", lie(OK + b"Content-Length : 2\r\n\r\nok")
    yield (
        "coding-in-1.0",
        Answer(
            said=(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End()),
            expect=(*BAD, *good(b"ok")),
        ),
    )
    for name, said, body in (
        ("length", OK + b"Content-Length: 2\r\n\r\nok", b"ok"),
        ("length-with-zeros", OK + b"Content-Length: 002\r\n\r\nok", b"ok"),
        ("chunks", OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok"),
        ("chunk-extensions", OK + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0;c\r\n\r\n", b"ok"),
        ("length-zero", OK + b"Content-Length: 0\r\n\r\n", b""),
        ("coding-in-capitals", OK + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok"),
        ("a-response", OK + b"Content-Length: %d\r\n\r\n" % len(EVIL) + EVIL, EVIL),
        ("a-response-in-a-chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(EVIL) + EVIL + b"\r\n0\r\n\r\n", EVIL),
    ):  # fmt: skip
        yield f"sound-{name}", Answer(said=(said,), expect=good(body))
    yield "sound-until-close", Answer(said=(OK + b"\r\nok", End()), expect=good(b"ok"))
    yield "sound-until-close-of-1.0", Answer(said=(b"HTTP/1.0 200 OK\r\n\r\nok", End()), expect=good(b"ok"))
    yield (
        "length-spelt-otherwise",
        Answer(said=(OK + b"Content_Length: 9\r\nContent-Length: 2\r\n\r\nok",), expect=good(b"ok")),
    )


def chunks() -> Answers:
    """RFC 9112 §7.1, §8: a chunked answer in doubt is broken off, and no last chunk says that it was whole."""
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    for name, body in {
        "size-malformed": b"zz\r\nok\r\n", "size-signed": b"+2\r\nok\r\n0\r\n\r\n",
        "size-prefixed": b"0x2\r\nok\r\n0\r\n\r\n", "size-negative": b"-2\r\nok\r\n0\r\n\r\n",
        "size-spaced": b" 2\r\nok\r\n0\r\n\r\n", "size-empty": b"\r\nok\r\n0\r\n\r\n",
        "size-beyond": b"FFFFFFFFFFFFFFFF2\r\nok\r\n0\r\n\r\n",
        "bare-lf": b"2\nok\n0\n\n", "bare-cr": b"2\rok\r0\r\r", "extension-with-lf": b"2;a\nb\r\nok\r\n0\r\n\r\n",
        "extension-very-long": b"2;" + b"a" * 5000 + b"\r\nok\r\n0\r\n\r\n",
        "size-underscore": b"0_2\r\nok\r\n0\r\n\r\n",
    }.items():  # fmt: skip
        yield name, Answer(said=(head + body + EVIL, End()), expect=(*BAD, *broken()))
        yield f"later-{name}", Answer(said=(head + b"1\r\nx\r\n" + body + EVIL, End()), expect=(*BAD, *broken()))
    for name, body in {
        "data-longer": b"2\r\nokay\r\n0\r\n\r\n", "data-shorter": b"5\r\nok\r\n0\r\n\r\n",
        "nothing-behind-data": b"2\r\nok0\r\n\r\n", "trailer-folded": b"2\r\nok\r\n0\r\nX: a\r\n b\r\n\r\n",
        "trailer-with-nul": b"2\r\nok\r\n0\r\nX: a\0\r\n\r\n",
        "trailer-with-lf": b"2\r\nok\r\n0\r\nX: a\nY: b\r\n\r\n",
        "trailer-without-colon": b"2\r\nok\r\n0\r\nfoo\r\n\r\n",
        "trailer-too-long": b"2\r\nok\r\n0\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
        "trailers-too-many": b"2\r\nok\r\n0\r\n" + b"X: a\r\n" * 101 + b"\r\n",
        "trailer-pseudo": b"2\r\nok\r\n0\r\n:status: 500\r\n\r\n", "trailer-is-a-response": b"2\r\nok\r\n0\r\n" + EVIL,
    }.items():  # fmt: skip
        yield name, Answer(said=(head + body, End()), expect=(*BAD, *broken()))


def trailers() -> Answers:
    """RFC 9110 §6.5.1: trailers say nothing about framing, routing or who somebody is; what may pass, passes where the caller's
    protocol carries it.
    """
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    ok = frozenset({(b"x-ok", b"y")})
    yield "sound", Answer(said=(head + b"X-Ok: y\r\n\r\n",), expect=good(b"ok", trailers=ok))
    for name in (
        b"Content-Length", b"Transfer-Encoding", b"Connection", b"Host", b"Set-Cookie", b"Cache-Control",
        b"X-SPIFFE-ID", b"x_forwarded_spiffe_id", b"X-Forwarded-Client-Cert", b"Forwarded", b"Trailer", b"Upgrade",
        b"Location", b"Content-Type", b"X-Decision-ID", b"Via",
    ):  # fmt: skip
        yield (
            "drops-" + named(name),
            Answer(said=(head + name + b": 9\r\nX-Ok: y\r\n\r\n",), expect=(*good(b"ok", trailers=ok), *broken())),
        )


def heads() -> Answers:
    """RFC 9112 §4, §5: a status line is version, three digits and a reason; fields as those of requests. §5.2: folded ones are
    replaced or refused, and here refused. RFC 9110 §5.5: no control in a value.
    """
    for name, said in {
        "field-folded": OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        "field-folded-with-tab": OK + b"X: a\r\n\tb\r\nContent-Length: 0\r\n\r\n",
        "first-line-folded": OK + b" X: y\r\nContent-Length: 0\r\n\r\n",
        "cookie-behind-cr": OK + b"X: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
        "cookie-behind-lf": OK + b"X: a\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
        "name-with-space": OK + b"X Y: z\r\nContent-Length: 0\r\n\r\n",
        "space-before-colon": OK + b"X : z\r\nContent-Length: 0\r\n\r\n",
        "name-empty": OK + b": z\r\nContent-Length: 0\r\n\r\n", "no-colon": OK + b"foo\r\nContent-Length: 0\r\n\r\n",
        "name-not-ascii": OK + b"X\xc3\xa9: z\r\nContent-Length: 0\r\n\r\n",
        "name-of-pseudo-field": OK + b":status: 500\r\nContent-Length: 0\r\n\r\n",
        "head-too-large": OK + b"X: " + b"a" * 70000 + b"\r\n\r\n", "head-too-many": OK + b"X: a\r\n" * 200 + b"\r\n",
        "separator-in-name": OK + b"X@: z\r\nContent-Length: 0\r\n\r\n",
        "status-line-twice": OK + OK + b"Content-Length: 0\r\n\r\n",
        "request-line": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not-http": b"hello\r\n\r\n",
        "version-unknown": b"HTTP/2 200 OK\r\n\r\n", "version-2.0": b"HTTP/2.0 200 OK\r\n\r\n",
        "version-1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
        "version-0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
        "version-lower-case": b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "version-missing": b"200 OK\r\nContent-Length: 0\r\n\r\n",
        "version-rtsp": b"RTSP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        "icy": b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
        "status-missing": b"HTTP/1.1 \r\nContent-Length: 0\r\n\r\n",
        "status-word": b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n",
        "status-99": b"HTTP/1.1 99 X\r\nContent-Length: 0\r\n\r\n",
        "status-099": b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n",
        "status-000": b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
        "status-600": b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n",
        "status-999": b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n",
        "status-1000": b"HTTP/1.1 1000 X\r\nContent-Length: 0\r\n\r\n",
        "status-20": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        "status-2000": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        "status-signed": b"HTTP/1.1 +200 OK\r\nContent-Length: 0\r\n\r\n",
        "status-negative": b"HTTP/1.1 -200 OK\r\nContent-Length: 0\r\n\r\n",
        "status-spaced": b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
        "status-tab": b"HTTP/1.1\t200 OK\r\nContent-Length: 0\r\n\r\n",
        "status-hex": b"HTTP/1.1 0xC8 OK\r\nContent-Length: 0\r\n\r\n",
        "reason-with-cr": b"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
        "reason-with-lf": b"HTTP/1.1 200 O\nX: y\r\nContent-Length: 0\r\n\r\n",
        "reason-with-nul": b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
        "line-lf": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "line-cr": b"HTTP/1.1 200 OK\rContent-Length: 0\r\r",
        "field-lf": OK + b"Content-Length: 0\n\r\n", "empty-line-first": b"\r\n" + OK + b"Content-Length: 0\r\n\r\n",
        "space-first": b" " + OK + b"Content-Length: 0\r\n\r\n",
        "nul-first": b"\0" + OK + b"Content-Length: 0\r\n\r\n", "tls-record": b"\x15\x03\x03\x00\x02\x02\x28",
        "h2-settings": b"\0\0\0\4\0\0\0\0\0",
    }.items():  # fmt: skip
        yield name, lie(said)
    for name, char in CONTROLS.items():
        yield f"value-with-{name}", lie(OK + b"X: a" + char + b"b\r\nContent-Length: 0\r\n\r\n")
        yield f"name-with-{name}", lie(OK + b"X" + char + b"Y: b\r\nContent-Length: 0\r\n\r\n")
    for name, said, seen in (
        ("no-reason", b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok", good(b"ok")),
        ("no-reason-nor-space", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", (*good(b"ok"), *BAD)),
        ("reason-of-its-own", b"HTTP/1.1 200 Fine by me\r\nContent-Length: 2\r\n\r\nok", good(b"ok")),
        ("reason-not-ascii", b"HTTP/1.1 200 \xe9\r\nContent-Length: 2\r\n\r\nok", (*good(b"ok"), *BAD)),
        ("status-418", b"HTTP/1.1 418 X\r\nContent-Length: 2\r\n\r\nok", good(b"ok", 418)),
        ("status-599", b"HTTP/1.1 599 X\r\nContent-Length: 2\r\n\r\nok", good(b"ok", 599)),
        ("status-299", b"HTTP/1.1 299 X\r\nContent-Length: 2\r\n\r\nok", good(b"ok", 299)),
        ("obs-text", OK + b"X: \xe9\r\nContent-Length: 2\r\n\r\nok", good(b"ok")),
        ("empty-value", OK + b"X:\r\nContent-Length: 2\r\n\r\nok", good(b"ok")),
        ("version-1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", good(b"ok")),
    ):  # fmt: skip
        yield f"sound-{name}", Answer(said=(said, End()), expect=seen)


def connections() -> Answers:
    """RFC 9110 §7.6.1: hop-by-hop fields and what `Connection` names end here; identity is not an answer's to claim. Framing is
    ours: an answer that names it in `Connection` changes nothing of it.
    """
    for names in (
        b"x-y",
        b"close, x-y",
        b"X-Y",
        b"x-y, content-length",
        b"x-y, transfer-encoding",
        b"x-y, via",
        b"x-y, set-cookie, x-decision-id",
        b"x-y, host, authorization",
    ):
        yield (
            "nominates-" + named(names),
            Answer(
                said=(OK + b"Connection: " + names + b"\r\nX-Y: z\r\nContent-Length: 2\r\n\r\nok", End()),
                expect=good(b"ok", absent=frozenset({b"x-y"})),
            ),
        )
    for value in (b"x y", b"a;b", b'"x"', b"\xe9"):
        yield (
            "malformed-" + named(value),
            Answer(
                said=(OK + b"Connection: " + value + b"\r\nContent-Length: 2\r\n\r\nok",), expect=(*BAD, *good(b"ok"))
            ),
        )
    for name in (
        b"Keep-Alive", b"Proxy-Connection", b"Proxy-Authenticate", b"Proxy-Authentication-Info", b"TE", b"Trailer",
        b"Upgrade", b"HTTP2-Settings", b"X-SPIFFE-ID", b"X-Forwarded-SPIFFE-ID", b"X-Forwarded-Client-Cert",
        b"Forwarded", b"x_spiffe_id", b"X.Forwarded.Spiffe.Id", b"Content_Type", b"Set_Cookie", b"Host",
    ):  # fmt: skip
        yield (
            "drops-" + named(name),
            Answer(
                said=(OK + name + b": forged\r\nContent-Length: 2\r\n\r\nok",),
                expect=good(b"ok", absent=frozenset({name.lower()})),
            ),
        )
    yield (
        "drops-coding-that-is-nominated",
        Answer(
            said=(OK + b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",),
            expect=good(b"ok"),
        ),
    )
    yield (
        "keeps-the-rest",
        Answer(
            said=(OK + b"X-Y: z\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nContent-Length: 2\r\n\r\nok",),
            expect=good(b"ok", present=frozenset({b"x-y", b"set-cookie"})),
        ),
    )


def bodiless() -> Answers:
    """RFC 9112 §6.3 rule 1: no body to HEAD, 1xx, 204 and 304, whatever length is stated; what comes all the same belongs to
    nobody. RFC 9110 §15.3.5, §15.4.5, §9.3.2.
    """
    head = get(line=b"HEAD /k-00000 HTTP/1.1")
    for name, said, status, asked in (
        ("204", b"HTTP/1.1 204 X\r\n\r\n", 204, b""),
        ("204-with-length", b"HTTP/1.1 204 X\r\nContent-Length: 4\r\n\r\n", 204, b""),
        ("304-with-length", b"HTTP/1.1 304 X\r\nContent-Length: 4\r\n\r\n", 304, b""),
        ("304", b"HTTP/1.1 304 X\r\n\r\n", 304, b""),
        ("head-with-length", OK + b"Content-Length: 4\r\n\r\n", 200, head),
        ("head-with-coding", OK + b"Transfer-Encoding: chunked\r\n\r\n", 200, head),
        ("head-without-length", OK + b"\r\n", 200, head),
        ("204-with-coding", b"HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n", 204, b""),
        ("304-with-coding", b"HTTP/1.1 304 X\r\nTransfer-Encoding: chunked\r\n\r\n", 304, b""),
        ("head-of-404", b"HTTP/1.1 404 X\r\nContent-Length: 4\r\n\r\n", 404, head),
    ):  # fmt: skip
        yield name, Answer(said=(said,), expect=good(b"", status), asked=asked)
        yield f"{name}-and-a-body", Answer(said=(said + b"body",), expect=good(b"", status), asked=asked)
        yield f"{name}-and-an-answer", Answer(said=(said + EVIL,), expect=good(b"", status), asked=asked)
        yield f"{name}-and-an-answer-later", Answer(said=(said, 0.02, EVIL), expect=good(b"", status), asked=asked)
    yield "head-with-two-lengths", lie(OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n", asked=head)
    yield "head-with-both", lie(OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", asked=head)
    yield "204-with-two-lengths", lie(b"HTTP/1.1 204 X\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n")
    yield "204-with-both", lie(b"HTTP/1.1 204 X\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n")


def ends() -> Answers:
    """RFC 9112 §8: an answer that ends before its length, its last chunk or (over TLS) a close_notify is incomplete, and must not
    look otherwise (§9.8). What stands behind its end belongs to nobody (§9.2: not to the next request either).
    """
    sound = OK + b"Content-Length: 2\r\n\r\nok"
    for how in ("end", "drop", "reset"):
        for name, said in {
            "length": OK + b"Content-Length: 10\r\n\r\nok", "length-and-nothing": OK + b"Content-Length: 10\r\n\r\n",
            "length-by-one": OK + b"Content-Length: 3\r\n\r\nok",
            "chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nok",
            "no-last-chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
            "no-end": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n",
            "no-chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n",
            "half-a-size": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n1",
            "half-a-trailer": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Ok: y\r\n",
        }.items():  # fmt: skip
            yield f"{name}-{how}", Answer(said=(said, 0.02, End(how)), expect=(*broken(), *BAD))
        for name, said in {
            "half-a-head": OK + b"X: ",
            "half-a-line": b"HTTP/1.1 2",
            "only-interim": b"HTTP/1.1 100 Continue\r\n\r\n",
            "half-behind-interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2",
        }.items():
            yield f"{name}-{how}", Answer(said=(said, End(how)), expect=BAD, repeats=name == "only-interim")
        yield f"nothing-{how}", Answer(said=(End(how),), expect=BAD, repeats=True)
        yield (
            f"nothing-to-post-{how}",
            Answer(said=(End(how),), expect=BAD, asked=post(b"Content-Length: 3\r\n", b"abc")),
        )
        yield (
            f"whole-{how}",
            Answer(said=(sound, 0.3, End(how)), expect=good(b"ok")),
        )  # a reset takes back what was not read
    yield "until-close-reset", Answer(said=(OK + b"\r\nok", 0.05, End("reset")), expect=(*broken(), *BAD))
    yield (
        "until-close-dropped",
        Answer(said=(OK + b"\r\nok", 0.05, End("drop")), expect=(*broken(), *BAD), on={"in": good(b"ok")}),
    )
    for name, said in {"second-answer": sound + EVIL, "second-answer-of-chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + EVIL, "longer-than-length": OK + b"Content-Length: 2\r\n\r\nokEVIL", "line-ends-behind": sound + b"\r\n\r\n", "garbage-behind": sound + b"\0\0",
                       "half-an-answer-behind": sound + EVIL[:9],
                       "interim-behind": sound + b"HTTP/1.1 100 Continue\r\n\r\n"}.items():  # fmt: skip
        yield name, Answer(said=(said,), expect=good(b"ok"))
        yield f"{name}-and-end", Answer(said=(said, End()), expect=good(b"ok"))
    yield "second-answer-later", Answer(said=(sound, 0.01, EVIL), expect=good(b"ok"))
    yield (
        "close-and-second-answer",
        Answer(said=(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok" + EVIL,), expect=good(b"ok")),
    )
    late = post(b"Content-Length: 30\r\n", b"abc")
    yield (
        "before-the-request-is-whole",
        Answer(
            said=(b"HTTP/1.1 413 X\r\nContent-Length: 2\r\n\r\nno", End()),
            expect=good(b"no", 413),
            asked=late,
            early=True,
        ),
    )
    yield "before-the-request-is-whole-and-kept", Answer(said=(sound,), expect=good(b"ok"), asked=late, early=True)
    yield (
        "before-the-chunks-are-whole",
        Answer(
            said=(sound,),
            expect=good(b"ok"),
            asked=post(b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n"),
            early=True,
        ),
    )
    yield (
        "before-the-request-is-whole-and-two",
        Answer(said=(sound + EVIL,), expect=good(b"ok"), asked=late, early=True),
    )


def interims() -> Answers:
    """RFC 9110 §15.2: any number of 1xx may come first, and a flood of them is bounded; 101 only where it was asked for
    (§7.8; `tunnels` has the others).
    """
    final = OK + b"Content-Length: 2\r\n\r\nok"
    for status in (100, 102, 103, 104, 199):
        yield f"sound-{status}", Answer(said=(b"HTTP/1.1 %d X\r\n\r\n" % status + final,), expect=good(b"ok"))
    yield "sound-several", Answer(said=((b"HTTP/1.1 103 X\r\nLink: a\r\n\r\n" * 5) + final,), expect=good(b"ok"))
    yield (
        "with-length",
        Answer(said=(b"HTTP/1.1 103 X\r\nContent-Length: 2\r\n\r\n" + final,), expect=(*good(b"ok"), *BAD)),
    )
    yield (
        "with-coding",
        Answer(said=(b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\n" + final,), expect=(*good(b"ok"), *BAD)),
    )
    yield "with-body", Answer(said=(b"HTTP/1.1 103 X\r\nContent-Length: 2\r\n\r\nxx" + final, End()), expect=BAD)
    yield "with-control", lie(b"HTTP/1.1 103 X\r\nX: \0\r\n\r\n" + final)
    yield "with-fold", lie(b"HTTP/1.1 103 X\r\nX: a\r\n b\r\n\r\n" + final)
    yield (
        "with-identity",
        Answer(
            said=(b"HTTP/1.1 103 X\r\nX-SPIFFE-ID: forged\r\nConnection: x-y\r\nX-Y: z\r\n\r\n" + final,),
            expect=good(b"ok"),
        ),
    )
    yield (
        "flood",
        Answer(said=(b"HTTP/1.1 103 X\r\n\r\n" * 5000 + final, End()), expect=(*BAD, *broken(), *good(b"ok"))),
    )
    yield (
        "flood-without-end",
        Answer(said=(b"HTTP/1.1 103 X\r\n\r\n" * 20000, End()), expect=(*BAD, *broken()), repeats=True),
    )
    yield "too-many-fields", lie(b"HTTP/1.1 103 X\r\n" + b"X: a\r\n" * 101 + b"\r\n" + final)
    yield "too-large", lie(b"HTTP/1.1 103 X\r\nX: " + b"a" * 70000 + b"\r\n\r\n" + final)
    yield "unasked-switch", lie(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
    yield "unasked-switch-to-h2c", lie(b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n")
    yield (
        "unasked-switch-of-post",
        lie(
            b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", asked=post(b"Content-Length: 3\r\n", b"abc")
        ),
    )
    yield (
        "unasked-switch-of-head",
        lie(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", asked=get(line=b"HEAD /k-00000 HTTP/1.1")),
    )
