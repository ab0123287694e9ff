"""HTTP/1.1: chunks and the trailers behind them. Each line of the coding is one that a lenient reader ends elsewhere."""

from __future__ import annotations

from corpus.case import NEXT, SMUGGLED, Case, Cases, Expect, chunked, named, passed, refused
from corpus.h1_framing import LAST


def chunk_sizes() -> Cases:
    """RFC 9112 §7.1: hexadecimal digits. A sign, a prefix or an underscore is what `int()` and `strtol()` take as well."""
    for size in (
        b"+3", b"-3", b"-1", b"-0", b"0x3", b"0X3", b"x3", b"3x", b"3h", b"1_0", b" 3", b"3 ", b" 3 ", b"\t3", b"3\t",
        b"3\x0b", b"\x0b3", b"3\x0c", b"3\0", b"\x003", b"", b" ", b"3,3", b"3.0", b"3e0;", b"g", b'"3"', b"'3'",
        b"\xef\xbc\x93", b"\xb3", b"3\xa0", b"FFFFFFFFFFFFFFFF3", b"FFFFFFFFFFFFFFFF", b"8000000000000000",
        b"10000000000000003", b"0" * 40 + b"3", b"3\r", b"3\n", b"3 3", b"-FFFFFFFFFFFFFFFD", b"0x", b"%33", b"3:",
        b"3=", b"3%",
    ):  # fmt: skip
        rest = b"\r\nabc\r\n" + LAST + SMUGGLED
        yield "size-" + named(size), Case(sent=chunked(size + rest), expect=refused(400))
        if size in (b"+3", b"0x3", b" 3", b"3 ", b"", b"3\n", b"FFFFFFFFFFFFFFFF3", b"-3", b"1_0"):
            yield (
                "later-size-" + named(size),
                Case(sent=chunked(b"1\r\nx\r\n" + size + rest), expect=refused(400, cut=True, silent=True)),
            )
    for name, size, body in (
        ("zeros", b"0003", b"abc"),
        ("capitals", b"A", b"abcdefghij"),
        ("small-letters", b"a", b"abcdefghij"),
        ("fourteen-zeros", b"0" * 14 + b"3", b"abc"),
    ):
        yield (
            "size-with-" + name,
            Case(sent=chunked(size + b"\r\n" + body + b"\r\n" + LAST + NEXT), expect=passed(body, b"")),
        )
    for name, last in (("last-of-zeros", b"000\r\n\r\n"), ("last-of-many-zeros", b"0" * 15 + b"\r\n\r\n")):
        yield name, Case(sent=chunked(last + NEXT), expect=passed(b"", b""))
    for last in (b"-0", b"+0", b"0x0", b"00x", b" 0", b"0 ", b"0\x0b", b"", b"0" * 2000):
        yield (
            "last-" + named(last)[:20],
            Case(
                sent=chunked(b"3\r\nabc\r\n" + last + b"\r\n\r\n" + SMUGGLED),
                expect=refused(400, cut=True, silent=True),
            ),
        )


def chunk_ends() -> Cases:
    """RFC 9112 §7.1: CRLF behind the size and behind the data. §2.2's leniency for a bare LF is for the lines of heads."""
    for name, body, cut in (
        ("bare-lf", b"3\nabc\n0\n\n", False), ("bare-lf-behind-size", b"3\nabc\r\n0\r\n\r\n", False),
        ("bare-lf-behind-data", b"3\r\nabc\n0\r\n\r\n", True), ("bare-cr-behind-size", b"3\rabc\r\n0\r\n\r\n", False),
        ("bare-cr-behind-data", b"3\r\nabc\r0\r\n\r\n", True),
        ("cr-cr-lf-behind-size", b"3\r\r\nabc\r\n0\r\n\r\n", False),
        ("lf-cr-behind-size", b"3\n\rabc\r\n0\r\n\r\n", False), ("nothing-behind-data", b"3\r\nabc0\r\n\r\n", True),
        ("space-behind-data", b"3\r\nabc \r\n0\r\n\r\n", True),
        ("two-ends-behind-data", b"3\r\nabc\r\n\r\n0\r\n\r\n", True), ("data-longer", b"3\r\nabcd\r\n0\r\n\r\n", True),
        ("data-longer-by-a-chunk", b"3\r\nabc5\r\nhello\r\n0\r\n\r\n", True),
        ("data-shorter", b"5\r\nabc\r\n0\r\n\r\n", True), ("bare-lf-behind-last", b"0\n\r\n", False),
        ("bare-lf-behind-all", b"0\r\n\n", True), ("bare-cr-behind-all", b"0\r\n\r", True),
        ("lf-lf-behind-last", b"3\r\nabc\r\n0\n\n", True),
        ("letters-behind-last", b"0\r\nxx\r\n\r\n", True),
        ("space-before-first", b" \r\n3\r\nabc\r\n0\r\n\r\n", False),
        ("empty-line-first", b"\r\n3\r\nabc\r\n0\r\n\r\n", False), ("x-for-crlf", b"3\r\nabcXX0\r\n\r\n", True),
    ):  # fmt: skip
        yield name, Case(sent=chunked(body + SMUGGLED), expect=refused(400, 408, cut=cut, silent=cut))
    for name, body in (
        ("no-last", b"3\r\nabc\r\n"), ("no-end-behind-last", b"3\r\nabc\r\n0\r\n"), ("no-chunk", b""),
        ("half-a-size", b"3"), ("half-a-chunk", b"5\r\nab"), ("half-an-end", b"3\r\nabc\r"),
        ("half-a-trailer", b"0\r\nX: y\r\n"),
        ("half-a-last", b"3\r\nabc\r\n0"),
    ):  # fmt: skip
        yield name, Case(sent=chunked(body), expect=refused(400, 408, 502, cut=True, silent=True), half=True)
    yield "many-small", Case(sent=chunked(b"1\r\nx\r\n" * 500 + LAST + NEXT), expect=passed(b"x" * 500, b""))
    yield (
        "with-line-ends-in-data",
        Case(sent=chunked(b"9\r\n\r\n0\r\n\r\n\r\n\r\n" + LAST + NEXT), expect=passed(b"\r\n0\r\n\r\n\r\n", b"")),
    )


def chunk_extensions() -> Cases:
    """RFC 9112 §7.1.1: a recipient must ignore extensions that it does not know, and may limit their length. A line end
    within one is where two readers part.
    """
    for name, extension in {
        "name": b";a", "value": b";a=b", "quoted": b';a="b"', "several": b';a=b;c="d";e', "space-before": b" ;a=b",
        "space-behind": b"; a=b", "tabs": b"\t;\ta=b", "quoted-semicolon": b';a="b;c"',
    }.items():  # fmt: skip
        yield (
            f"sound-{name}",
            Case(
                sent=chunked(b"3" + extension + b"\r\nabc\r\n" + LAST + NEXT), expect=passed(b"abc", b"") + refused(400)
            ),
        )
        yield (
            f"sound-{name}-of-last",
            Case(
                sent=chunked(b"3\r\nabc\r\n0" + extension + b"\r\n\r\n" + NEXT),
                expect=passed(b"abc", b"") + refused(400, cut=True, silent=True),
            ),
        )
    yield (
        "sound-everywhere",
        Case(sent=chunked(b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n' + NEXT), expect=passed(b"abc", b"")),
    )
    for name, extension in {
        "bare-lf": b";a\n", "bare-lf-for-end": b";a\nabc", "bare-lf-then-more": b";a\nabc\r\n0\r\n\r\n",
        "bare-cr": b";a\rb", "bare-cr-at-end": b";a\r", "lf-in-quotes": b';a="\n"', "cr-in-quotes": b';a="\r"',
        "crlf-in-quotes": b';a="\r\n"', "quote-open": b';a="b',
        "quote-escaped": b';a="\\"', "nul": b";a=\0", "nul-in-quotes": b';a="\0"', "bell": b";a\x07", "del": b";a\x7f",
        "name-missing": b";", "name-missing-but-value": b";=b", "value-missing": b";a=", "two-semicolons": b";;a",
        "no-semicolon": b" a=b", "comma": b",a=b",
        "separators": b";a=b@c", "not-ascii": b";a=\xc3\xa9", "vtab": b"\x0b;a", "very-long": b";" + b"a" * 5000,
        "very-many": b";a" * 2000, "space-in-value": b";a=b c", "size-behind": b";a 5", "brackets": b";[a]",
        "header-like": b";a: b",
    }.items():  # fmt: skip
        yield name, Case(sent=chunked(b"3" + extension + b"\r\nabc\r\n" + LAST + SMUGGLED), expect=refused(400, 408))
        if name in (
            "bare-lf",
            "bare-cr",
            "lf-in-quotes",
            "crlf-in-quotes",
            "nul",
            "very-long",
            "quote-open",
            "two-semicolons",
        ):
            yield (
                f"{name}-of-last",
                Case(
                    sent=chunked(b"3\r\nabc\r\n0" + extension + b"\r\n\r\n" + SMUGGLED),
                    expect=refused(400, cut=True, silent=True),
                ),
            )


def trailers() -> Cases:
    """RFC 9110 §6.5.1: nothing that frames, routes, modifies or says who somebody is. RFC 9112 §7.1.2: trailers are kept apart
    from the fields of the head. They are fields as others are, so that what a head may not hold they may not either.
    """

    def trailing(lines: bytes, more: bytes = NEXT) -> bytes:
        return chunked(b"3\r\nabc\r\n0\r\n" + lines + b"\r\n" + more)

    yield "one", Case(sent=trailing(b"X-Ok: y\r\n"), expect=passed(b"abc", b""))
    yield "alone", Case(sent=chunked(b"0\r\nX-Ok: y\r\n\r\n"), expect=passed(trailers=[(b"x-ok", b"y")]))
    yield (
        "several",
        Case(
            sent=chunked(b"0\r\nX-Ok: y\r\nX-Also: z\r\n\r\n"),
            expect=passed(trailers=[(b"x-ok", b"y"), (b"x-also", b"z")]),
        ),
    )
    for name in (
        b"Content-Length", b"Transfer-Encoding", b"Host", b"Connection", b"Upgrade", b"TE", b"Trailer", b"Keep-Alive",
        b"Proxy-Connection", b"Proxy-Authorization", b"HTTP2-Settings", b"Authorization", b"Cookie", b"Set-Cookie",
        b"Expect", b"Via", b"Origin",
        b"Content-Type", b"Content-Encoding", b"Content-Range", b"Cache-Control", b"Max-Forwards", b"X-SPIFFE-ID",
        b"X-Forwarded-SPIFFE-ID", b"X-Forwarded-Client-Cert", b"Forwarded", b"x_spiffe_id", b"X.Forwarded.SPIFFE.ID",
        b"x_forwarded_client_cert", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto", b"X-Real-IP",
        b"X-HTTP-Method-Override", b"X-Original-URL", b"X-Rewrite-URL", b"X-Request-Id", b"Traceparent",
        b"X-Decision-ID", b"X-Role", b"x_role", b"X.Role", b"X-Seen",
        b"content_length", b"transfer_encoding", b"If-Match", b"Range",
    ):  # fmt: skip
        yield (
            "drops-" + named(name),
            Case(
                sent=chunked(b"3\r\nabc\r\n0\r\n" + name + b": 1\r\nX-Ok: y\r\n\r\n"),
                expect=passed(b"abc", trailers=[(b"x-ok", b"y")]) + refused(400, cut=True, silent=True),
            ),
        )
    yield (
        "trailer-of-identity",
        Case(
            sent=chunked(
                b"0\r\nX-SPIFFE-ID: e\r\nx_forwarded_spiffe_id: e\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
                b"Host: e\r\nAuthorization: e\r\nX-Ok: y\r\n\r\n"
            ),
            expect=passed(trailers=[(b"x-ok", b"y")]),
        ),
    )
    for name, lines in {
        "folded": b"X: a\r\n b\r\n", "folded-with-tab": b"X: a\r\n\tb\r\n", "pseudo": b":path: /secret/x\r\n",
        "no-colon": b"foo\r\n", "name-empty": b": foo\r\n", "space-before-colon": b"X : a\r\n",
        "name-with-space": b"X Y: a\r\n", "indented": b" X: a\r\n",
        "name-not-ascii": b"X\xc3\xa9: a\r\n", "lf-end": b"X: a\n", "lf-in-value": b"X: a\nY: b\r\n",
        "cr-in-value": b"X: a\rY: b\r\n", "nul-in-value": b"X: a\0\r\n", "nul-in-name": b"X\0: a\r\n",
        "request-line": b"GET /k-00000/smuggled HTTP/1.1\r\n",
        "too-long": b"X: " + b"a" * 70000 + b"\r\n",
        "too-many": b"".join(b"X%d: a\r\n" % number for number in range(101)),
        "too-many-bytes": b"".join(b"X%d: " % number + b"a" * 1000 + b"\r\n" for number in range(80)),
        "vtab-in-value": b"X: \x0b\r\n", "del-in-value": b"X: \x7f\r\n", "separators-in-name": b"X@Y: a\r\n",
        "bracket-in-name": b"X(Y): a\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=trailing(lines, SMUGGLED), expect=refused(400, 431, cut=True, silent=True))
        yield f"{name}-alone", Case(sent=chunked(b"0\r\n" + lines + b"\r\n" + SMUGGLED), expect=_alone(name))


def _alone(name: str) -> Expect:
    return refused(400, 431, cut=name.startswith("too-"), silent=name.startswith("too-"))
