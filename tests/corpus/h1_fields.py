"""HTTP/1.1: how fields are written, and how many of them."""

from __future__ import annotations

from corpus.case import (
    CONTROLS,
    NEXT,
    SMUGGLED,
    Case,
    Cases,
    get,
    named,
    passed,
    refused,
)


def syntax() -> Cases:
    """RFC 9112 §5.1: no white space before the colon; §2.2: none before the first field; §5.2: no folded lines. RFC 9110
    §5.1: a name is a token.
    """
    for name, lines in {
        "folded": b"X: a\r\n b\r\n", "folded-with-tab": b"X: a\r\n\tb\r\n", "folded-empty": b"X: a\r\n \r\n",
        "folded-twice": b"X: a\r\n b\r\n c\r\n", "folded-by-lf": b"X: a\n b\r\n", "folded-by-cr": b"X: a\r b\r\n",
        "folded-to-field": b"X: a\r\n Host: evil\r\n", "folded-to-end": b"X: a\r\n \r\n\r\n", "no-colon": b"foo\r\n",
        "no-colon-but-space": b"foo bar\r\n", "name-empty": b": foo\r\n", "name-blank": b" : foo\r\n",
        "only-colon": b":\r\n",
        "name-with-space": b"X Y: foo\r\n", "space-before-colon": b"X : foo\r\n", "tab-before-colon": b"X\t: foo\r\n",
        "name-not-ascii": b"X\xc3\xa9: foo\r\n", "name-latin-1": b"X\xe9: foo\r\n",
        "name-of-pseudo-field": b":path: /secret/x\r\n",
        "name-of-method": b":method: DELETE\r\n", "name-quoted": b'"X": foo\r\n',
        "request-line": b"GET /k-00000/smuggled HTTP/1.1\r\n", "status-line": b"HTTP/1.1 200 OK\r\n",
        "bom": b"\xef\xbb\xbfX: y\r\n", "nul-line": b"\0\r\n", "soft-hyphen-in-name": b"X\xadY: z\r\n",
        "lf-line": b"X: y\nZ: z\r\n", "cr-line": b"X: y\rZ: z\r\n", "lfcr-line": b"X: y\n\rZ: z\r\n",
        "cr-cr-lf": b"X: y\r\r\n", "lf-lf": b"X: y\n\nGET /k-00000/smuggled HTTP/1.1\r\n",
        "cr-cr": b"X: y\r\rGET /k-00000/smuggled HTTP/1.1\r\n",
        "nul-crlf": b"X: y\0\r\nZ: z\r\n", "line-separator-name": b"X\xe2\x80\xa8: y\r\n",
        "nel-in-name": b"X\x85: y\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=get(lines) + SMUGGLED, expect=refused(400, 408))
    for separator in b'()<>@,;\\"/[]?={}':
        yield (
            f"separator-{named(bytes([separator]))}-x{separator:02x}-in-name",
            Case(sent=get(b"X" + bytes([separator]) + b"Y: z\r\n") + SMUGGLED, expect=refused(400)),
        )
    for name, sent in {
        "first-line-folded": b"GET /k-00000 HTTP/1.1\r\n Host: evil\r\nHost: backend.internal\r\n\r\n",
        "first-line-tab": b"GET /k-00000 HTTP/1.1\r\n\tX: y\r\nHost: backend.internal\r\n\r\n",
        "first-line-blank": b"GET /k-00000 HTTP/1.1\r\n \r\nHost: backend.internal\r\n\r\n",
        "lf-in-head": b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\nX: y\r\n\r\n",
        "lf-in-line": b"GET /k-00000 HTTP/1.1\nHost: backend.internal\r\n\r\n",
        "cr-ends-only": b"GET /k-00000 HTTP/1.1\rHost: backend.internal\r\r",
        "lf-ends-only": b"GET /k-00000 HTTP/1.1\nHost: backend.internal\n\n",
        "lf-ends-last": b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\r\n\n",
        "lf-ends-field": b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\n\r\n",
        "cr-cr-lf-ends": b"GET /k-00000 HTTP/1.1\r\r\nHost: backend.internal\r\r\n\r\r\n",
        "lf-cr-lf-ends": b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\n\r\n\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=sent + SMUGGLED, expect=refused(400, 408))
    for name, fields in {
        "empty-value": b"X:\r\n", "no-space": b"X:y\r\n",
        "much-space": b"X: " + b" " * 500 + b"y" + b"\t" * 500 + b"\r\n", "colon-in-value": b"X: y: z\r\n",
        "obs-text-in-value": b"X: \xe9\xff\x80\r\n",
        "token-of-all": b"!#$%&'*+-.^_`|~09azAZ: y\r\n", "same-name-twice": b"X: a\r\nX: b\r\n",
        "quotes": b'X: "a, b\\" c\r\n', "percent-escapes": b"X: %0d%0aHost: evil\r\n", "tab-in-value": b"X: a\tb\r\n",
        "utf-8-in-value": b"X: \xc3\xa9\xe2\x80\xa8\r\n",
        "comma-list": b"X: a,, b ,\r\n", "name-of-digits": b"0: y\r\n",
    }.items():  # fmt: skip
        yield f"sound-{name}", Case(sent=get(fields) + NEXT, expect=passed(b"", b""))
    yield (
        "half-a-head",
        Case(
            sent=b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\r\nX: ",
            expect=refused(400, 408, silent=True),
            half=True,
        ),
    )
    yield (
        "half-an-end",
        Case(
            sent=b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\r\n\r",
            expect=refused(400, 408, silent=True),
            half=True,
        ),
    )
    yield (
        "head-that-stops",
        Case(sent=b"GET /k-00000 HTTP/1.1\r\nHost: backend.internal\r\n", expect=refused(400, 408, silent=True)),
    )


def controls() -> Cases:
    """RFC 9110 §5.5, RFC 9112 §2.2: CR, LF and NUL in a field are what splits messages; the other controls have no meaning there."""
    for name, char in CONTROLS.items():
        expect = refused(400, 408)
        yield f"{name}-in-value", Case(sent=get(b"X: a" + char + b"b\r\n") + SMUGGLED, expect=expect)
        yield f"{name}-first-in-value", Case(sent=get(b"X:" + char + b"b\r\n") + SMUGGLED, expect=expect)
        yield f"{name}-last-in-value", Case(sent=get(b"X: a" + char + b"\r\n") + SMUGGLED, expect=expect)
        yield f"{name}-in-name", Case(sent=get(b"X" + char + b"Y: z\r\n") + SMUGGLED, expect=expect)
        yield f"{name}-before-name", Case(sent=get(char + b"X: z\r\n") + SMUGGLED, expect=expect)
        yield f"{name}-before-colon", Case(sent=get(b"X" + char + b": z\r\n") + SMUGGLED, expect=expect)
        yield (
            f"{name}-in-what-policy-sees",
            Case(sent=get(b"X-Role: reader" + char + b"\r\n") + SMUGGLED, expect=expect),
        )


def sizes() -> Cases:
    """RFC 6585 §5: 431 for fields that are too many or too large; nothing of them is kept, and the connection ends."""
    yield "head-too-large", Case(sent=get(b"X: " + b"a" * 70000 + b"\r\n"), expect=refused(431))
    yield "head-too-large-by-name", Case(sent=get(b"a" * 70000 + b": x\r\n"), expect=refused(431))
    yield "head-too-large-without-end", Case(sent=b"GET /k-00000 HTTP/1.1\r\nX: " + b"a" * 70000, expect=refused(431))
    yield "head-too-many", Case(sent=get(b"X: a\r\n" * 101), expect=refused(431))
    yield "head-too-many-small", Case(sent=get(b"a:\r\n" * 5000), expect=refused(431))
    yield "head-full", Case(sent=get(b"X: a\r\n" * 97) + NEXT, expect=passed(b"", b""))
    yield "head-large", Case(sent=get(b"X: " + b"a" * 50000 + b"\r\n") + NEXT, expect=passed(b"", b""))
    yield "name-long", Case(sent=get(b"a" * 5000 + b": x\r\n"), expect=passed() + refused(400, 431))
