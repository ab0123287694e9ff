"""HTTP/2: heads that would mean something else once they are written as HTTP/1.1, or that mean nothing at all.

A malformed request is an error of its stream (RFC 9113 §8.1.1): reset, or answered, and nothing of it reaches the upstream.
"""

from __future__ import annotations

from corpus.case import (
    CONTROLS,
    HOST,
    SMUGGLED,
    Case,
    Cases,
    Head,
    data,
    declined,
    mixed,
    named,
    one,
    passed,
    reset,
    usual,
    with_body,
    with_trailers,
)
from corpus.h1_targets import TO_THE_SECRET


def pseudo_fields() -> Cases:
    """RFC 9113 §8.3: each once, in front, known, of a request, and not in trailers; §8.3.1: :method, :scheme and :path must be there."""
    for name in (b":method", b":scheme", b":path", b":authority"):
        word = name[1:].decode()
        value = dict(usual())[name]
        if name != b":authority":
            yield f"{word}-missing", Case(sent=one(usual(**{word: None})), expect=reset())
        yield f"{word}-twice", Case(sent=one((*usual()[:4], (name, value), usual()[4])), expect=reset())
        yield f"{word}-twice-and-apart", Case(sent=one((*usual(), (name, value))), expect=reset())
        yield (
            f"{word}-two-ways",
            Case(
                sent=one((*usual()[:4], (name, b"/secret/x" if name == b":path" else b"GET"), usual()[4])),
                expect=reset(),
            ),
        )
        yield f"{word}-late", Case(sent=one((*usual(**{word: None}), (name, value))), expect=reset())
        yield f"{word}-empty", Case(sent=one(usual(**{word: b""})), expect=reset())
        yield f"{word}-in-capitals", Case(sent=one(((name.upper(), value), *usual())), expect=reset())
        yield f"{word}-in-trailers", Case(sent=with_trailers(usual(), ((name, value),)), expect=reset(cut=True))
        for control, char in CONTROLS.items():
            yield f"{word}-with-{control}", Case(sent=one(usual(**{word: value + char + b"x"})), expect=reset())
    yield "unknown", Case(sent=one((*usual()[:4], (b":x", b"y"))), expect=reset())
    yield "unknown-first", Case(sent=one(((b":x", b"y"), *usual())), expect=reset())
    yield "unknown-empty", Case(sent=one(((b":", b"y"), *usual())), expect=reset())
    yield "of-answer", Case(sent=one((*usual()[:4], (b":status", b"200"))), expect=reset())
    yield "host-as-pseudo", Case(sent=one((*usual()[:4], (b":host", b"evil"))), expect=reset())
    yield (
        "protocol-of-get",
        Case(sent=one((*usual(method=b"GET")[:4], (b":protocol", b"websocket"))), expect=reset(400, 501)),
    )
    yield "protocol-of-post", Case(sent=one((*usual()[:4], (b":protocol", b"websocket"))), expect=reset(400, 501))
    yield "all-missing", Case(sent=one(((b"x", b"y"),)), expect=reset())
    yield "nothing-at-all", Case(sent=one(()), expect=reset())
    yield "status-in-trailers", Case(sent=with_trailers(usual(), ((b":status", b"200"),)), expect=reset(cut=True))
    yield "unknown-in-trailers", Case(sent=with_trailers(usual(), ((b":x", b"y"),)), expect=reset(cut=True))


def targets() -> Cases:
    """RFC 9113 §8.3.1: :path begins with a slash, or is `*` for OPTIONS; no fragment. What it may hold is what HTTP/1.1 may (§8.2.1)."""
    for path in (
        b"k-00000", b"*", b"https://backend.internal/k-00000", b"https://evil/k-00000",
        b"http://backend.internal/k-00000", b"/k-00000#x", b"/k-00000 HTTP/1.1",
        b"/k-00000 HTTP/1.1\r\nHost: evil\r\n\r\n", b"/k-00000 x", b"/k-00000\tx",
        b" /k-00000", b"/k-00000 ", b"/k-00000/%00", b"/k-00000/%2f", b"/k-00000/%5c", b"/k-00000/\\", b"/k-00000/%zz",
        b"/k-00000/%", b"/k-00000/\xc3\xa9", b"/k-00000/\xff", b"/k-00000/%c0%af", b"/k-00000/%252e",
        b"/k-00000/../..", b"backend.internal:443",
        b"?k-00000", b"//", b"/k-00000?a b", b"/k-00000?a#b", b"/k-00000?role=a;role=b", b"/k-00000/<",
        b"/k-00000/..;/x", b"./k-00000", b"\\k-00000", b"**", b"*/k-00000", b"/k-00000/\x85", b"%2fk-00000",
    ):  # fmt: skip
        expect = passed() if path == b"//" else reset()
        yield "path-" + named(path), Case(sent=one(usual(path=path)), expect=expect)
    for path in TO_THE_SECRET:
        yield "secret-" + named(path.encode()), Case(sent=one(usual(path=path.encode())), expect=reset(400, 403))
    for path in (
        b"/k-00000",
        b"//k-00000",
        b"/x/../k-00000",
        b"/x%79/k-00000",
        b"/k-00000?",
        b"/k-00000?a=/../",
        b"//backend.internal/k-00000",
        b"/https://evil/k-00000",
        b"/k-00000;v=1",
        b"/k-00000?role=a&role=b",
    ):
        yield "path-sound-" + named(path), Case(sent=one(usual(path=path)), expect=passed())
    yield (
        "asterisk",
        Case(sent=one(usual(method=b"OPTIONS", path=b"*")), expect=passed(), on={"out": passed() + declined(404)}),
    )
    yield "path-long", Case(sent=one(usual(path=b"/k-00000?" + b"a" * 9000)), expect=reset(414, 431) + passed())
    for method in (
        b"GET /smuggled",
        b"GET /k-00000/smuggled HTTP/1.1\r\nx: y",
        b"GET ",
        b" GET",
        b"G T",
        b"GET\tx",
        b"get",
        b"G(T",
        b"GET,POST",
        b"GET:",
        b'"GET"',
        b"G\xc3\x89T",
        b"A" * 40,
    ):
        yield (
            "method-" + named(method),
            Case(sent=one(usual(method=method)), expect=reset(400, 501) + (passed() if method == b"get" else ())),
        )
    for method in (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"PROPFIND"):
        yield "method-sound-" + named(method), Case(sent=one(usual(method=method)), expect=passed())
    for scheme in (
        b"http",
        b"ftp",
        b"wss",
        b"https ",
        b"https:",
        b"https://evil/?",
        b"https\r\nx: y",
        b"h",
        b"://",
        b"HTTPS",
    ):
        yield (
            "scheme-" + named(scheme),
            Case(sent=one(usual(scheme=scheme)), expect=reset() + (passed() if scheme == b"HTTPS" else ())),
        )


def authorities() -> Cases:
    """RFC 9113 §8.3.1: :authority has no userinfo, and a Host that differs from it is malformed. RFC 9110 §7.4: 421 where it is
    not what the handshake asked for.
    """
    for value in (
        b"evil@backend.internal", b"backend.internal@evil", b"@backend.internal", b"backend.internal/x",
        b"backend.internal?x", b"backend.internal#x", b"backend.internal\\x", b"backend.internal evil",
        b"backend.internal,evil", b"backend.internal, backend.internal",
        b"backend.internal\r\nx: y", b"backend.internal:", b"backend.internal:0", b"backend.internal:65536",
        b"backend.internal:0443", b"backend.internal:x", b"backend.internal:443:443", b"backend.internal.",
        b"%62ackend.internal", b"back\xc3\xa9nd.internal",
        b"https://backend.internal", b"//backend.internal", b"[::1", b"::1", b"127.1", b" backend.internal",
        b"backend.internal ", b"*", b"/",
    ):  # fmt: skip
        yield "authority-" + named(value), Case(sent=one(usual(authority=value)), expect=reset())
        if value[:1] not in b" *":
            yield "host-" + named(value), Case(sent=one(usual((b"host", value), authority=None)), expect=reset())
    for value in (b"BACKEND.internal", b"backend.internal:443", b"backend.internal:65535"):
        yield "authority-sound-" + named(value), Case(sent=one(usual(authority=value)), expect=passed())
    for value in (b"evil", b"x.backend.internal", b"[::1]", b"127.0.0.1:8443"):
        yield (
            "authority-of-" + named(value),
            Case(sent=one(usual(authority=value)), expect=declined(421), on={"out": declined(404)}),
        )
        yield (
            "host-of-" + named(value),
            Case(sent=one(usual((b"host", value), authority=None)), expect=declined(421), on={"out": declined(404)}),
        )
    for name, fields in {
        "and-other-host": usual((b"host", b"evil")), "and-two-hosts": usual((b"host", b"evil"), (b"host", HOST)),
        "and-two-equal-hosts": usual((b"host", HOST), (b"host", HOST)),
        "and-host-with-port": usual((b"host", b"backend.internal:443")),
        "and-empty-host": usual((b"host", b"")), "and-host-list": usual((b"host", b"backend.internal,evil")),
        "missing": usual(authority=None),
        "missing-and-two-hosts": usual((b"host", HOST), (b"host", HOST), authority=None),
        "missing-and-two-other-hosts": usual((b"host", HOST), (b"host", b"evil"), authority=None),
        "missing-and-empty-host": usual((b"host", b""), authority=None),
        "empty-and-host": usual((b"host", HOST), authority=b""),
    }.items():  # fmt: skip
        yield f"authority-{name}", Case(sent=one(fields), expect=reset())
    yield "authority-and-same-host", Case(sent=one(usual((b"host", HOST))), expect=passed())
    yield "authority-and-host-in-capitals", Case(sent=one(usual((b"host", HOST.upper()))), expect=passed() + reset())
    yield "host-and-no-authority", Case(sent=one(usual((b"host", HOST), authority=None)), expect=passed())
    yield "host-spelt-otherwise", Case(sent=one(usual((b"host_", b"evil"), (b"x-host", b"evil"))), expect=passed())
    yield "none-asked-for", Case(sent=one(usual()), expect=passed(), server_name=None)
    yield "other-asked-for", Case(sent=one(usual()), expect=declined(421), on={"out": passed()}, server_name="evil")
    yield (
        "none-asked-for-other-authority",
        Case(sent=one(usual(authority=b"evil")), expect=passed(), on={"out": declined(404)}, server_name=None),
    )
    yield (
        "second-request-for-another",
        Case(
            sent=(Head(usual()), Head(usual(authority=b"evil"), stream=3)),
            expect=mixed(200, 421, arrived=[b""]),
            on={"out": mixed(200, 404, arrived=[b""])},
        ),
    )


def fields() -> Cases:
    """RFC 9113 §8.2.1: lower-case tokens; no CR, LF or NUL, no white space around a value; §10.3: what a translation to HTTP/1.1
    could not carry is malformed. §8.2.2: no connection-specific field, and of TE only `trailers`.
    """
    for name, char in CONTROLS.items():
        yield f"value-with-{name}", Case(sent=one(usual((b"x", b"a" + char + b"b"))), expect=reset())
        yield f"value-first-{name}", Case(sent=one(usual((b"x", char + b"b"))), expect=reset())
        yield f"value-last-{name}", Case(sent=one(usual((b"x", b"a" + char))), expect=reset())
        yield f"name-with-{name}", Case(sent=one(usual((b"x" + char + b"y", b"a"))), expect=reset())
    for name, value in {
        "crlf": b"a\r\ny: z", "crlf-host": b"a\r\nhost: evil", "crlf-end": b"a\r\n\r\n" + SMUGGLED,
        "crlf-length": b"a\r\ncontent-length: 0", "lf-coding": b"a\ntransfer-encoding: chunked",
        "space-around": b" a ", "space-first": b" a", "space-last": b"a ",
        "tab-first": b"\ta", "tab-last": b"a\t", "crlf-fold": b"a\r\n b", "only-space": b" ",
    }.items():  # fmt: skip
        yield f"value-with-{name}", Case(sent=one(usual((b"x", value))), expect=reset())
    for name in (
        b"x: y\r\nz", b"x\ny", b"x:y", b"x:", b"x ", b" x", b"x y", b"X", b"xY", b"X-Spiffe-Id", b"", b"x\xc3\xa9",
        b"x\xff", b"x(", b"x)", b"x/y", b"x@y", b"x[y", b"x=y", b'x"', b"x,y", b"x;y", b"x{", b"host ", b"host:",
        b"content-length ",
        b"content-length:0\r\nx", b"transfer-encoding:", b"Content-Length", b"Transfer-Encoding", b"Host",
        b"get /k-00000/smuggled http/1.1\r\nx",
    ):  # fmt: skip
        yield (
            "name-" + named(name) + ("-" if name[:1] == b" " else ""),
            Case(sent=one(usual((name, b"a"))), expect=reset()),
        )
    for name, value in (
        (b"connection", b"x"), (b"connection", b"close"), (b"connection", b"x-forwarded-spiffe-id"),
        (b"connection", b"upgrade"), (b"connection", b""), (b"keep-alive", b"timeout=5"),
        (b"proxy-connection", b"keep-alive"), (b"transfer-encoding", b"chunked"),
        (b"transfer-encoding", b"identity"), (b"transfer-encoding", b""), (b"upgrade", b"h2c"),
        (b"upgrade", b"websocket"), (b"te", b"gzip"), (b"te", b"trailers, gzip"), (b"te", b"trailers;q=0.5"),
        (b"te", b"chunked"), (b"te", b""),
    ):  # fmt: skip
        yield f"connection-field-{named(name)}-{named(value)}", Case(sent=one(usual((name, value))), expect=reset())
    yield (
        "coding",
        Case(sent=with_body(usual((b"transfer-encoding", b"chunked")), data(b"0\r\n\r\n" + SMUGGLED)), expect=reset()),
    )
    for name, more in {
        "te-trailers": ((b"te", b"trailers"),), "te-in-capitals": ((b"te", b"Trailers"),),
        "empty-value": ((b"x", b""),), "tab-in-value": ((b"x", b"a\tb"),), "obs-text": ((b"x", b"\xe9\xff"),),
        "colon-in-value": ((b"x", b": a"),), "token-of-all": ((b"!#$%&'*+-.^_`|~09az", b"y"),),
        "same-name-twice": ((b"x", b"a"), (b"x", b"b")),
        "cookies-in-crumbs": ((b"cookie", b"a=b"), (b"cookie", b"c=d")),
        "http2-settings": ((b"http2-settings", b"AAMAAABkAAQAAP__"),), "trailer": ((b"trailer", b"x"),),
        "proxy-authorization": ((b"proxy-authorization", b"x"),),
        "role": ((b"x-role", b"reader"),), "role-twice": ((b"x-role", b"reader"), (b"x-role", b"admin")),
        "expect-continue": ((b"expect", b"100-continue"),), "priority": ((b"priority", b"u=1, i"),),
    }.items():  # fmt: skip
        yield (
            f"sound-{name}",
            Case(sent=one(usual(*more)), expect=passed() + (reset() if name == "te-in-capitals" else ())),
        )
    for name in (
        b"x-spiffe-id",
        b"x-forwarded-spiffe-id",
        b"x-forwarded-client-cert",
        b"forwarded",
        b"x_spiffe_id",
        b"x.forwarded.spiffe.id",
        b"x_forwarded.spiffe-id",
        b"x!forwarded!client!cert",
        b"x-seen",
        b"x_seen",
    ):
        yield f"identity-{named(name)}", Case(sent=one(usual((name, b"spiffe://example.org/forged"))), expect=passed())
    yield (
        "identity",
        Case(
            sent=one(
                usual((b"x-spiffe-id", b"forged"), (b"x_forwarded.spiffe-id", b"forged"), (b"forwarded", b"forged"))
            ),
            expect=passed(),
        ),
    )
    for name in (b"x_role", b"x.role"):
        yield (
            f"role-{named(name)}",
            Case(sent=one(usual((b"x-role", b"reader"), (name, b"admin"))), expect=declined(400)),
        )
    for name in (b"x-http-method-override", b"x-original-url", b"x_rewrite_url"):
        yield (
            f"override-{named(name)}",
            Case(sent=one(usual((name, b"/secret/x"))), expect=declined(400), on={"out": passed()}),
        )
    yield "expect-unknown", Case(sent=one(usual((b"expect", b"x"))), expect=declined(400, 417))
    yield (
        "too-many-fields",
        Case(sent=one(usual(*((b"x%d" % number, b"y") for number in range(101)))), expect=reset(431)),
    )
    yield (
        "far-too-many-fields",
        Case(sent=(Head(usual(*((b"x", b"y") for _ in range(3000))), pieces=4),), expect=reset(431)),
    )
    yield "head-too-large", Case(sent=(Head(usual((b"x", b"a" * 70000)), pieces=5),), expect=reset(431))
    yield "head-far-too-large", Case(sent=(Head(usual((b"x", b"a" * 400000)), pieces=30),), expect=reset(431))
    yield "head-large", Case(sent=(Head(usual((b"x", b"a" * 40000)), pieces=3),), expect=passed())
