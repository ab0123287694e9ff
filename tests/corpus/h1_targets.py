"""HTTP/1.1: what is asked for. Request lines, methods, paths and the other forms of a target."""

from __future__ import annotations

from corpus.case import CONTROLS, NEXT, SMUGGLED, Case, Cases, declined, get, mixed, named, passed, refused


def request_line() -> Cases:
    """RFC 9112 §3: one space between its three parts, and nothing else. §2.2: an empty line before it may be ignored; a
    lenient reader who splits at any white space, or takes a bare CR or LF for a line end, sees another request.
    """
    for name, line in {
        "tab": b"GET\t/k-00000 HTTP/1.1", "tab-before-version": b"GET /k-00000\tHTTP/1.1",
        "two-spaces": b"GET  /k-00000 HTTP/1.1",
        "two-spaces-before-version": b"GET /k-00000  HTTP/1.1", "space-at-end": b"GET /k-00000 HTTP/1.1 ",
        "tab-at-end": b"GET /k-00000 HTTP/1.1\t",
        "space-first": b" GET /k-00000 HTTP/1.1", "tab-first": b"\tGET /k-00000 HTTP/1.1",
        "space-in-target": b"GET /k-00000 /x HTTP/1.1",
        "version-twice": b"GET /k-00000 HTTP/1.1 HTTP/1.1", "target-missing": b"GET HTTP/1.1",
        "target-empty": b"GET  HTTP/1.1",
        "method-missing": b"/k-00000 HTTP/1.1", "vtab": b"GET\x0b/k-00000\x0bHTTP/1.1",
        "formfeed": b"GET\x0c/k-00000 HTTP/1.1",
        "nbsp": b"GET\xa0/k-00000 HTTP/1.1", "nul-before-version": b"GET /k-00000\0 HTTP/1.1",
        "cr-in-target": b"GET /k-00000\r HTTP/1.1",
        "lf-in-target": b"GET /k-00000\nHTTP/1.1", "cr-before-end": b"GET /k-00000 HTTP/1.1\r",
        "lf-before-end": b"GET /k-00000 HTTP/1.1\n",
        "two-lines": b"GET /k-00000\r\n HTTP/1.1", "field-for-line": b"Host: evil",
        "colon": b"GET: /k-00000 HTTP/1.1",
        "quoted": b'"GET" "/k-00000" "HTTP/1.1"', "bom": b"\xef\xbb\xbfGET /k-00000 HTTP/1.1",
        "nul-first": b"\0GET /k-00000 HTTP/1.1",
    }.items():  # fmt: skip
        yield name, Case(sent=get(line=line) + SMUGGLED, expect=refused(400, 505, 408))
    yield "status-line", Case(sent=get(line=b"HTTP/1.1 200 OK") + SMUGGLED, expect=refused(400, 505, silent=True))
    for name, line in {
        "version-1.2": b"HTTP/1.2", "version-2.0": b"HTTP/2.0", "version-2": b"HTTP/2", "version-3.0": b"HTTP/3.0",
        "version-0.9": b"HTTP/0.9",
        "version-1.10": b"HTTP/1.10", "version-01.1": b"HTTP/01.1", "version-1": b"HTTP/1", "version-1.": b"HTTP/1.",
        "version-.1": b"HTTP/.1",
        "version-lower-case": b"http/1.1", "version-mixed-case": b"Http/1.1", "version-signed": b"HTTP/+1.1",
        "version-comma": b"HTTP/1,1",
        "version-spaced": b"HTTP/ 1.1", "version-missing-number": b"HTTP/", "version-no-slash": b"HTTP1.1",
        "version-backslash": b"HTTP\\1.1",
        "version-https": b"HTTPS/1.1", "version-rtsp": b"RTSP/1.0", "version-ice": b"ICE/1.0",
        "version-xhttp": b"XHTTP/1.1", "version-11": b"HTTP/11",
        "version-one-one-one": b"HTTP/1.1.1", "version-trailing-letter": b"HTTP/1.1x", "version-nul": b"HTTP/1.1\0",
        "version-9.9": b"HTTP/9.9",
        "version-fullwidth": b"HTTP/\xef\xbc\x91.1",
    }.items():  # fmt: skip
        yield name, Case(sent=get(line=b"GET /k-00000 " + line) + SMUGGLED, expect=refused(400, 505))
    yield "of-0.9", Case(sent=b"GET /k-00000\r\n\r\n", expect=refused(400, 505))
    yield (
        "of-0.9-with-fields",
        Case(sent=b"GET /k-00000\r\nHost: backend.internal\r\n\r\n" + SMUGGLED, expect=refused(400, 505)),
    )
    yield "preface-of-http2", Case(
        sent=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", expect=refused(400, 505, silent=True),
        on={"out": refused(400, silent=True), "in-plain": refused(400, silent=True)},
    )  # fmt: skip
    yield (
        "half-a-preface-of-http2",
        Case(sent=b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + SMUGGLED, expect=refused(400, 505, silent=True)),
    )
    yield "empty-lines-first", Case(sent=b"\r\n\r\n" + get(), expect=passed())
    yield "empty-line-between", Case(sent=get() + b"\r\n" + NEXT, expect=passed(b"", b""))
    yield "lf-first", Case(sent=b"\n" + get() + SMUGGLED, expect=refused(400, 408))
    yield "cr-first", Case(sent=b"\r" + get() + SMUGGLED, expect=refused(400, 408))
    yield "lfs-between", Case(sent=get() + b"\n\n" + SMUGGLED, expect=mixed(200, 400, arrived=[b""]))
    yield "long", Case(sent=get(line=b"GET /k-00000?" + b"a" * 9000 + b" HTTP/1.1"), expect=refused(414))
    yield (
        "longer-than-a-head",
        Case(sent=get(line=b"GET /k-00000?" + b"a" * 70000 + b" HTTP/1.1"), expect=refused(414, 431)),
    )
    yield "long-enough", Case(sent=get(line=b"GET /k-00000?" + b"a" * 7000 + b" HTTP/1.1"), expect=passed())
    for name, char in CONTROLS.items():
        yield (
            f"control-{name}-in-target",
            Case(sent=get(line=b"GET /k-00000" + char + b"x HTTP/1.1") + SMUGGLED, expect=refused(400, 408, 505)),
        )
        yield (
            f"control-{name}-in-method",
            Case(sent=get(line=b"GE" + char + b"T /k-00000 HTTP/1.1") + SMUGGLED, expect=refused(400, 408, 505)),
        )


def methods() -> Cases:
    """RFC 9110 §9.1: a method is a token, and case-sensitive. What policy was asked about is what is sent."""
    for method in (b"GET", b"DELETE", b"OPTIONS", b"PUT", b"PATCH", b"PROPFIND", b"M-SEARCH", b"TRACE"):
        yield (
            "sound-" + named(method),
            Case(sent=get(line=method + b" /k-00000 HTTP/1.1"), expect=passed() + refused(400, 405, 501)),
        )
    yield "sound-head", Case(sent=get(line=b"HEAD /k-00000 HTTP/1.1"), expect=passed())
    for method in (
        b"get",
        b"Get",
        b"gET",
        b"G",
        b"GETT",
        b"FOO",
        b"_",
        b"GET2",
        b"BREW",
        b"PRI",
        b"A" * 33,
        b"Q" * 300,
    ):
        yield (
            "unknown-" + named(method)[:20],
            Case(
                sent=get(line=method + b" /k-00000 HTTP/1.1") + NEXT, expect=refused(400, 501, 505) + passed(b"", b"")
            ),
        )
    for method in (
        b"GE(T",
        b"GET,POST",
        b"GET;",
        b"G/T",
        b"[GET]",
        b"{GET}",
        b'"GET"',
        b"GET=",
        b"GET@x",
        b"<GET>",
        b"G\\T",
        b"G?T",
        b"G\xc3\x89T",
        b"\xc7ET",
    ):
        yield (
            "no-token-" + named(method),
            Case(sent=get(line=method + b" /k-00000 HTTP/1.1") + SMUGGLED, expect=refused(400)),
        )
    for field in (
        b"X-HTTP-Method-Override",
        b"X-HTTP-Method",
        b"X-Method-Override",
        b"X_HTTP_Method_Override",
        b"x.http.method",
    ):
        yield (
            "overridden-" + named(field),
            Case(sent=get(field + b": DELETE\r\n"), expect=declined(400), on={"out": passed()}),
        )
    for field in (b"X-Original-URL", b"X-Rewrite-URL", b"X_Original_URL", b"x-original.url"):
        yield (
            "target-overridden-" + named(field),
            Case(sent=get(field + b": /secret/x\r\n"), expect=declined(400), on={"out": passed()}),
        )


TO_THE_SECRET = (
    "/secret/a", "//secret/a", "/./secret/a", "/x/../secret/a", "/%73ecret/a", "/x/%2e%2e/secret/a",
    "/x/.%2E/secret/a",
    "/secret%2fa", "/x%2f..%2fsecret/a", "/secret%5ca", "/x\\..\\secret/a", "/;/secret/a", "/x/..;/secret/a",
    "/x/..;a=b/secret/a", "/%3b/secret/a", "/x/..%3B/secret/a", "/secret%00/a", "/secret%0a/a", "/%c0%afsecret/a",
    "/%e0%80%afsecret/a", "/%c0%ae%c0%ae/secret/a", "/%2573ecret/a", "/%252e%252e/secret/a", "/%u0073ecret/a",
    "/x#/../secret/a", "/..", "/../secret/a", "/x//..//secret/a", "/a/b/../../secret/a", "/secret/*", "/secret?x",
    "/ secret/a", "/x/.%2F../secret/a", "\\secret\\a", "/%zz/secret", "/x/%2e./secret/a", "/x/.;/../secret/a",
    "/secret;v=1/../secret/a", "/./././secret/a", "/x/..//secret/a", "/x///../secret/a", "/%2e/%2e/secret/a",
    "/x/%5c../secret/a",
    "/%ef%bc%8fsecret/%zz", "/x/%c0%2e%c0%2e/secret/a", "/secret/%2e", "/secret/.", "/x/../x/../secret/",
    "/%53ecret/../secret/a",
    "/x/%252e%252e/secret/a", "/x/%u002e%u002e/secret/a", "/..%2fsecret/a", "/..%5csecret/a", "/%2e%2e%2fsecret/a",
    "/.%00./secret/a",
)  # fmt: skip
"""Spellings of a way to what policy denies: each is denied or refused, and none passes."""


def ways_to_the_secret() -> Cases:
    """RFC 3986 §6.2.2: dot segments, escapes of what needs none. RFC 3629 §3: overlong forms. What else two readers read
    in two ways (§3.3: parameters; encoded slashes and backslashes) is refused.
    """
    for path in TO_THE_SECRET:
        yield (
            named(path.encode()),
            Case(sent=get(line=b"GET " + path.encode() + b" HTTP/1.1"), expect=refused(400, 403, ends=None)),
        )


def paths() -> Cases:
    """What passes has one spelling, and policy saw that one. RFC 3986 §3.3, RFC 9112 §3.2.1."""
    for path in (
        "/k-00000", "//k-00000", "/k-00000/", "/k-00000//x", "/k-00000/./x", "/x/../k-00000", "/x%79/k-00000",
        "/k-00000/%7euser",
        "/k-00000/caf%c3%a9", "/k-00000/a%20b", "/k-00000/a:b", "/k-00000/a%3ab", "/k-00000;v=1/b", "/k-00000/a=b,c;d",
        "/k-00000?", "/k-00000?a=b&a=c",
        "/k-00000?role=a&role=b", "/k-00000?a=%2e%2e/", "/k-00000?a=/../secret", "/k-00000?x=https://evil/",
        "/k-00000/...", "/k-00000/.x", "/k-00000/x..",
        "/k-00000/..x", "/k-00000/%2ex", "//backend.internal/k-00000", "/https://evil/k-00000", "/k-00000/@evil",
        "/k-00000/a+b", "/k-00000/'(x)*!",
        "/k-00000/%25", "/k-00000?role=%26", "/k-00000?role=a+b",
    ):  # fmt: skip
        yield (
            "sound-" + named(path.encode()),
            Case(sent=get(line=b"GET " + path.encode() + b" HTTP/1.1"), expect=passed() + refused(400)),
        )
    for path in (
        b"/k-00000/a%2fb", b"/k-00000/a%5cb", b"/k-00000/a\\b", b"/k-00000/%00", b"/k-00000/%0d%0aX:y",
        b"/k-00000/%7f", b"/k-00000/%c2%85", b"/k-00000/%",
        b"/k-00000/%4", b"/k-00000/%zz", b"/k-00000/%2", b"/k-00000/%u0041", b"/k-00000/%-1", b"/k-00000/%2525",
        b"/k-00000/%252f", b"/k-00000/%c0%af",
        b"/k-00000/%ed%a0%80", b"/k-00000/%ff", b"/k-00000/%f8%88%80%80%80", b"/k-00000/\xc3\xa9", b"/k-00000/\xe9",
        b"/k-00000/\xff", b"/k-00000#x",
        b"/k-00000?a#b", b"/k-00000/a b", b"/k-00000?a b", b"/k-00000/<x>", b"/k-00000/{x}", b"/k-00000/a|b",
        b"/k-00000/a^b", b"/k-00000/`", b'/k-00000/"',
        b"/k-00000/..;/x", b"/k-00000/.;x/y", b"/k-00000/;x", b"/k-00000/..%3bx/y", b"/k-00000?\xc3\xa9",
        b"/k-00000?a\x01", b"/k-00000?role=%zz",
        b"/k-00000?role=a;role=b", b"/k-00000?%72ole=a&=b", b"/k-00000?role=%c0%af", b"/k-00000?role=%00",
        b"/k-00000?ro%26le=a", b"k-00000",
        b"?k-00000", b"./k-00000", b"../k-00000", b"\\k-00000", b"%2fk-00000", b"/k-00000/../..", b"/k-00000/../../x",
        b"/k-00000/%e2%80%a8%zz",
    ):  # fmt: skip
        yield (
            "doubtful-" + named(path),
            Case(sent=get(line=b"GET " + path + b" HTTP/1.1"), expect=refused(400, ends=None)),
        )


def other_forms() -> Cases:
    """RFC 9112 §3.2.3, §3.2.4: the authority form is CONNECT's, the asterisk OPTIONS's. There is no tunnel here: 501,
    and the end, since what a hopeful client has sent behind CONNECT was meant for the tunnel and is no request of its own.
    """
    for name, line in {
        "asterisk-of-get": b"GET *", "asterisk-of-head": b"HEAD *", "asterisk-of-post": b"POST *",
        "asterisk-and-path": b"OPTIONS */k-00000",
        "two-asterisks": b"OPTIONS **", "asterisk-with-query": b"OPTIONS *?k-00000",
        "authority-of-get": b"GET backend.internal:443",
        "authority-of-options": b"OPTIONS backend.internal:443", "host-of-get": b"GET backend.internal",
        "mail-of-get": b"GET mailto:k-00000@evil",
        "urn-of-get": b"GET urn:k-00000", "connect-path": b"CONNECT /k-00000", "connect-asterisk": b"CONNECT *",
        "connect-absolute": b"CONNECT https://backend.internal/k-00000",
        "connect-without-port": b"CONNECT backend.internal", "connect-port-zero": b"CONNECT backend.internal:0",
        "connect-port-beyond": b"CONNECT backend.internal:65536",
        "connect-userinfo": b"CONNECT x@backend.internal:443",
        "connect-list": b"CONNECT backend.internal:443,evil:443",
        "connect-fragment": b"CONNECT backend.internal:443#x",
    }.items():  # fmt: skip
        yield name, Case(sent=get(line=line + b" HTTP/1.1") + SMUGGLED, expect=refused(400, 501))
    yield "asterisk", Case(sent=get(line=b"OPTIONS * HTTP/1.1"), expect=passed(), on={"out": passed() + declined(404)})
    yield (
        "connect",
        Case(
            sent=b"CONNECT backend.internal:443 HTTP/1.1\r\nHost: backend.internal:443\r\nX-Case: k-00000\r\n\r\n"
            + SMUGGLED,
            expect=refused(501),
        ),
    )
    yield (
        "connect-with-other-host",
        Case(sent=get(line=b"CONNECT evil:443 HTTP/1.1") + SMUGGLED, expect=refused(400, 501)),
    )
    yield (
        "connect-with-length",
        Case(
            sent=b"CONNECT backend.internal:443 HTTP/1.1\r\nHost: backend.internal:443\r\nX-Case: k-00000\r\nContent-Length: 9\r\n\r\n"
            + SMUGGLED,
            expect=refused(400, 501),
        ),
    )
