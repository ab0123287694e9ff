"""HTTP/1.1: fields that act on the way: what `Connection` takes away, who one says to be, what `Upgrade` and `Expect` ask for."""

from __future__ import annotations

from corpus.case import (
    NEXT,
    SMUGGLED,
    Case,
    Cases,
    Expect,
    chunked,
    declined,
    get,
    mixed,
    named,
    passed,
    post,
    refused,
)

IDENTITY = (b"X-SPIFFE-ID", b"X-Forwarded-SPIFFE-ID", b"X-Forwarded-Client-Cert", b"Forwarded")


def nominations() -> Cases:
    """RFC 9110 §7.6.1: what `Connection` names ends here. Whoever names what rights, framing or records depend on would undo
    our work at the next hop: 400. Its options are tokens.
    """
    protected = (
        b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie", b"set-cookie", b"origin",
        b"via", b"expect", b"cache-control", b"content-type", b"content-encoding", b"x-spiffe-id",
        b"x-forwarded-spiffe-id",
        b"x-forwarded-client-cert", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
        b"x-request-id", b"traceparent", b"tracestate", b"x-real-ip", b"x-decision-id",
    )  # fmt: skip
    for name in protected:
        yield f"takes-{name.decode()}", Case(sent=get(b"Connection: " + name + b"\r\n"), expect=declined(400))
        yield (
            f"takes-{name.decode()}-in-list",
            Case(sent=get(b"Connection: close, " + name.upper() + b"\r\n"), expect=declined(400)),
        )
    for name in (
        b"X_Forwarded.SPIFFE_id",
        b"x_spiffe_id",
        b"X!SPIFFE!ID",
        b"Content_Length",
        b"TRANSFER.ENCODING",
        b"Authorization",
    ):
        yield (
            f"takes-{named(name)}-spelt-otherwise",
            Case(sent=get(b"Connection: " + name + b"\r\n"), expect=declined(400)),
        )
    yield (
        "takes-identity-in-second-field",
        Case(sent=get(b"Connection: keep-alive\r\nConnection: x-forwarded-spiffe-id\r\n"), expect=declined(400)),
    )
    yield (
        "takes-authorization-that-is-there",
        Case(sent=get(b"Authorization: x\r\nConnection: authorization\r\n"), expect=declined(400)),
    )
    yield (
        "takes-length-of-body",
        Case(
            sent=post(b"Connection: content-length\r\nContent-Length: %d\r\n" % len(SMUGGLED), SMUGGLED),
            expect=declined(400),
        ),
    )
    yield (
        "takes-coding-of-body",
        Case(
            sent=post(b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
            expect=refused(400),
        ),
    )
    for value in (
        b"x y",
        b"a;b",
        b'"x-spiffe-id"',
        b"x/y",
        b"a b c",
        b"(close)",
        b"close;",
        b"x=y",
        b"\xc3\xa9",
        b"x\xa0y",
        b"@",
    ):
        yield f"malformed-{named(value)}", Case(sent=get(b"Connection: " + value + b"\r\n"), expect=declined(400))
    for name, fields in {
        "what-policy-sees": b"X-Role: reader\r\nConnection: x-role\r\n",
        "what-is-there": b"X-Y: z\r\nConnection: x-y\r\n", "what-is-not-there": b"Connection: x-y\r\n",
        "in-capitals": b"X-Y: z\r\nConnection: X-Y\r\n",
        "empty": b"Connection:\r\n", "commas": b"Connection: ,, ,\r\n",
        "keep-alive": b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n",
        "te": b"Connection: te\r\nTE: trailers\r\n",
        "te-of-codings": b"Connection: te\r\nTE: gzip, trailers;q=0.5\r\n",
        "trailer": b"Trailer: x-ok\r\n",
        "proxy-connection": b"Proxy-Connection: keep-alive\r\nProxy-Authorization: x\r\n",
        "x-seen": b"Connection: x-seen\r\nX-Seen: forged\r\n",
        "tabs": b"Connection:\tkeep-alive\t,\tx-y\r\n",
        "many": b"Connection: " + b", ".join(b"x%d" % number for number in range(500)) + b"\r\n",
    }.items():  # fmt: skip
        yield f"sound-{name}", Case(sent=get(fields) + NEXT, expect=passed(b"", b""))


def identities() -> Cases:
    """Nobody's word but ours says who asks. Servers that make variables of names write `_` for what is no letter or digit
    (RFC 3875 §4.1.18), so that every spelling is the same name.
    """
    spellings = {
        "lower": bytes.lower, "upper": bytes.upper, "underscores": lambda name: name.replace(b"-", b"_"),
        "dots": lambda name: name.replace(b"-", b"."), "mixed": lambda name: name.replace(b"-", b"_", 1),
        "marks": lambda name: name.replace(b"-", b"!"),
    }  # fmt: skip
    for name in IDENTITY:
        for how, spelt in spellings.items():
            if name == b"Forwarded" and how not in ("lower", "upper"):
                continue
            yield (
                f"{named(name)}-{how}",
                Case(sent=get(spelt(name) + b": spiffe://example.org/forged\r\n") + NEXT, expect=passed(b"", b"")),
            )
        yield f"{named(name)}-twice", Case(sent=get((name + b": spiffe://example.org/forged\r\n") * 2), expect=passed())
        yield f"{named(name)}-empty", Case(sent=get(name + b":\r\n"), expect=passed())
    yield "x-seen-forged", Case(sent=get(b"X-Seen: forged\r\nx_seen: forged\r\nX.Seen: forged\r\n"), expect=passed())
    for name, fields in {
        "role-spelt-otherwise": b"X_Role: admin\r\n", "role-spelt-both-ways": b"X-Role: reader\r\nx.role: admin\r\n",
        "role-spelt-by-marks": b"X!Role: admin\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=get(fields), expect=declined(400))
    yield "role-twice", Case(sent=get(b"X-Role: reader\r\nX-Role: admin\r\n"), expect=passed())
    yield "role-list", Case(sent=get(b"X-Role: reader, admin\r\n"), expect=passed())
    yield "role-not-ascii", Case(sent=get(b"X-Role: \xe9\xff\r\n"), expect=passed())


def upgrades() -> Cases:
    """RFC 9110 §7.8: an upgrade may be ignored, and one that would turn the connection itself into another protocol is: h2c
    (RFC 9113 §3.1 took it out of the standard), h2, HTTP, TLS. §7.8 too: a server must ignore it in HTTP/1.0.
    """
    settings = b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    for name, fields in {
        "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + settings,
        "h2c-without-settings": b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
        "h2c-in-capitals": b"Connection: UPGRADE\r\nUpgrade: H2C\r\n" + settings,
        "h2c-in-list": b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
        "h2c-first-in-list": b"Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n",
        "h2c-in-second-field": b"Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
        "h2c-with-version": b"Connection: Upgrade\r\nUpgrade: h2c/1\r\n",
        "h2c-not-nominated": b"Upgrade: h2c\r\n" + settings, "h2": b"Connection: Upgrade\r\nUpgrade: h2\r\n",
        "http-2": b"Connection: Upgrade\r\nUpgrade: HTTP/2.0\r\n",
        "http-1.1": b"Connection: Upgrade\r\nUpgrade: HTTP/1.1\r\n",
        "tls": b"Connection: Upgrade\r\nUpgrade: TLS/1.3\r\n",
        "tls-and-http": b"Connection: Upgrade\r\nUpgrade: TLS/1.3, HTTP/1.1\r\n",
        "two-settings": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + settings * 2,
        "settings-alone": b"Connection: HTTP2-Settings\r\n" + settings,
        "nominated-and-missing": b"Connection: Upgrade\r\n",
        "websocket-not-nominated": b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", "malformed": b"Connection: Upgrade\r\nUpgrade: web socket\r\n", "empty": b"Connection: Upgrade\r\nUpgrade:\r\n",
        "h2c-nominated-twice": b"Connection: Upgrade\r\nConnection: upgrade\r\nUpgrade: h2c\r\n",
        "tab-in-token": b"Connection: Upgrade\r\nUpgrade: web\tsocket\r\n",
        "h2c-quoted": b'Connection: Upgrade\r\nUpgrade: "h2c"\r\n',
        "h2c-obs-text": b"Connection: Upgrade\r\nUpgrade: h2c\xe9\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=get(fields) + NEXT, expect=passed(b"", b"") + passed(ends=True) + refused(400))
    yield (
        "h2c-with-body",
        Case(
            sent=post(b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n", b"abc" + NEXT),
            expect=passed(b"abc", b""),
        ),
    )
    yield (
        "h2c-then-preface",
        Case(
            sent=get(b"Connection: Upgrade\r\nUpgrade: h2c\r\n") + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            expect=passed(ends=True) + mixed(200, (400, 505), arrived=[b""], ends=True),
        ),
    )
    yield (
        "in-1.0",
        Case(
            sent=get(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", line=b"GET /k-00000 HTTP/1.0") + SMUGGLED,
            expect=passed(ends=True),
        ),
    )

    # The agent here answers 200: what was asked for was declined, and what follows is a request like any other.
    # An agent of HTTP/2 gets it as extended CONNECT (RFC 8441 §5), and says 501.
    def over_h2(*statuses: int, more: int = 0) -> dict[str, Expect]:
        expect = mixed(501, *[200] * more, arrived=[b""] * (1 + more)) + declined(*statuses)
        return dict.fromkeys(("in-h1-h2", "out-h1-h2"), expect)

    websocket = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    yield "websocket-declined", Case(sent=get(websocket), expect=passed() + declined(502), on=over_h2(501, 502))
    yield (
        "websocket-declined-and-more",
        Case(
            sent=get(websocket) + NEXT,
            expect=passed(b"", b"") + passed(ends=True) + refused(502),
            on=over_h2(502, more=1),
        ),
    )
    yield (
        "websocket-with-length",
        Case(sent=get(websocket + b"Content-Length: 3\r\n") + b"abc", expect=passed(b"abc") + declined(400, 502)),
    )
    yield (
        "websocket-with-chunks",
        Case(
            sent=get(websocket + b"Transfer-Encoding: chunked\r\n") + b"3\r\nabc\r\n0\r\n\r\n",
            expect=passed(b"abc") + declined(400, 502),
        ),
    )
    yield (
        "websocket-of-post",
        Case(sent=post(websocket + b"Content-Length: 3\r\n", b"abc"), expect=passed(b"abc") + declined(400, 502)),
    )
    yield (
        "websocket-two-lengths",
        Case(
            sent=get(websocket + b"Content-Length: 0\r\nContent-Length: 3\r\n") + b"abc" + SMUGGLED, expect=refused(400)
        ),
    )
    yield (
        "websocket-to-the-secret",
        Case(sent=get(websocket, line=b"GET /secret/k-00000 HTTP/1.1"), expect=declined(403)),
    )
    yield (
        "websocket-nominates-identity",
        Case(sent=get(websocket.replace(b": Upgrade", b": Upgrade, x-forwarded-spiffe-id", 1)), expect=declined(400)),
    )
    yield (
        "unknown-token",
        Case(
            sent=get(b"Connection: Upgrade\r\nUpgrade: x-of-ours/1\r\n"),
            expect=passed() + declined(502),
            on=over_h2(502),
        ),
    )


def expectations() -> Cases:
    """RFC 9110 §10.1.1: 100-continue is known, anything else is 417; in HTTP/1.0 it is ignored. A body that follows is a
    body whatever was expected.
    """
    for value in (
        b"200-ok",
        b"100-continue, x",
        b"100-continue;q=1",
        b"100",
        b"continue",
        b"",
        b"100-continue 100-continue",
        b"x=100-continue",
        b'"100-continue"',
        b"100_continue",
        b"\xe9",
    ):
        yield f"unknown-{named(value)}", Case(sent=get(b"Expect: " + value + b"\r\n"), expect=declined(400, 417))
        yield (
            f"unknown-{named(value)}-with-body",
            Case(
                sent=post(b"Expect: " + value + b"\r\nContent-Length: %d\r\n" % len(SMUGGLED), SMUGGLED),
                expect=declined(400, 417),
            ),
        )
    yield "twice-and-unknown", Case(sent=get(b"Expect: 100-continue\r\nExpect: x\r\n"), expect=declined(400, 417))
    for name, fields, body, arrived in (
        ("length", b"Content-Length: 3\r\n", b"abc", b"abc"),
        ("chunks", b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"abc"), ("no-body", b"", b"", b""),
        ("length-zero", b"Content-Length: 0\r\n", b"", b""),
        ("a-request", b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED, SMUGGLED),
    ):  # fmt: skip
        yield (
            f"continue-{name}",
            Case(sent=post(b"Expect: 100-continue\r\n" + fields, body + NEXT), expect=passed(arrived, b"")),
        )
    yield (
        "continue-in-capitals",
        Case(sent=post(b"Expect: 100-CONTINUE\r\nContent-Length: 3\r\n", b"abc" + NEXT), expect=passed(b"abc", b"")),
    )
    yield (
        "continue-twice",
        Case(
            sent=post(b"Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 3\r\n", b"abc"),
            expect=passed(b"abc") + declined(400, 417),
        ),
    )
    yield "continue-of-get", Case(sent=get(b"Expect: 100-continue\r\n") + NEXT, expect=passed(b"", b""))
    yield (
        "continue-in-1.0",
        Case(
            sent=post(b"Expect: 100-continue\r\nContent-Length: 3\r\n", b"abc", version=b"HTTP/1.0"),
            expect=passed(b"abc", ends=True),
        ),
    )
    yield (
        "continue-and-both-lengths",
        Case(
            sent=post(
                b"Expect: 100-continue\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED
            ),
            expect=refused(400),
        ),
    )
    yield (
        "continue-denied",
        Case(
            sent=get(
                b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(SMUGGLED), line=b"POST /secret/k-00000 HTTP/1.1"
            )
            + SMUGGLED,
            expect=refused(403),
        ),
    )
    yield (
        "continue-and-bad-chunk",
        Case(
            sent=chunked(b"zz\r\n" + SMUGGLED).replace(b"Host", b"Expect: 100-continue\r\nHost", 1), expect=refused(400)
        ),
    )
