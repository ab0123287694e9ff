"""HTTP/1.1: who is asked. Absolute targets, Host, and the name that the handshake asked for, which two readers may rank in two ways."""

from __future__ import annotations

from corpus.case import NEXT, SMUGGLED, Case, Cases, declined, get, mixed, named, passed, refused


def absolute_form() -> Cases:
    """RFC 9112 §3.2.2: a proxy must take the target's authority and ignore Host. Upstreams differ in which they believe,
    so that where the two differ we refuse. §3.2: no userinfo; RFC 9110 §4.2.1: no empty host. An origin server may
    refuse a scheme that is not that of the connection (§7.4), since it would be answered under the wrong one.
    """

    def line(target: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
        return method + b" " + target + b" " + version

    def both(target: bytes, host: bytes) -> bytes:
        return get(line=line(target), host=b"Host: " + host + b"\r\n")

    yield "absolute", Case(sent=get(line=line(b"https://backend.internal/k-00000")), expect=passed())
    yield "scheme-in-capitals", Case(sent=get(line=line(b"HTTPS://backend.internal/k-00000")), expect=passed(), on={
        "out": refused(400), "in-plain": refused(400)})  # fmt: skip
    yield "host-in-capitals", Case(sent=get(line=line(b"https://BACKEND.Internal/k-00000")), expect=passed())
    yield (
        "same-port",
        Case(sent=both(b"https://backend.internal:8443/k-00000", b"backend.internal:8443"), expect=passed()),
    )
    yield "no-path", Case(sent=get(line=line(b"https://backend.internal")), expect=passed())
    yield (
        "no-path-but-query",
        Case(sent=get(line=line(b"https://backend.internal?a=b")), expect=passed() + refused(400)),
    )
    yield (
        "options-without-path",
        Case(
            sent=get(line=line(b"https://backend.internal", b"OPTIONS")),
            expect=passed(),
            on={"out": passed() + declined(404)},
        ),
    )
    yield "with-dots", Case(sent=get(line=line(b"https://backend.internal/x/../k-00000")), expect=passed())
    for name, target in {
        "other-scheme": b"http://backend.internal/k-00000", "scheme-unknown": b"ftp://backend.internal/k-00000",
        "scheme-websocket": b"wss://backend.internal/k-00000", "scheme-file": b"file:///k-00000",
        "scheme-script": b"javascript:/k-00000", "scheme-empty": b"://backend.internal/k-00000",
        "other-host": b"https://evil/k-00000", "other-port": b"https://backend.internal:1/k-00000",
        "userinfo": b"https://backend.internal@evil/k-00000",
        "userinfo-before": b"https://evil@backend.internal/k-00000",
        "userinfo-empty": b"https://@backend.internal/k-00000",
        "userinfo-and-password": b"https://a:b@backend.internal/k-00000",
        "no-host": b"https:///k-00000", "no-host-but-port": b"https://:8443/k-00000",
        "one-slash": b"https:/backend.internal/k-00000",
        "no-slash": b"https:backend.internal/k-00000", "backslashes": b"https:\\\\backend.internal/k-00000",
        "backslash-host": b"https://evil\\.backend.internal/k-00000",
        "backslash-userinfo": b"https://evil\\@backend.internal/k-00000",
        "port-empty": b"https://backend.internal:/k-00000", "port-zero": b"https://backend.internal:0/k-00000",
        "port-beyond": b"https://backend.internal:65536/k-00000",
        "port-with-zeros": b"https://backend.internal:08443/k-00000",
        "host-escaped": b"https://%62ackend.internal/k-00000",
        "host-with-dot-at-end": b"https://backend.internal./k-00000",
        "fragment": b"https://backend.internal/k-00000#x", "fragment-for-path": b"https://backend.internal#/k-00000",
        "host-list": b"https://backend.internal,evil/k-00000",
        "to-the-secret": b"https://backend.internal/k-00000/../../secret/a",
    }.items():  # fmt: skip
        yield name, Case(sent=get(line=line(target)) + SMUGGLED, expect=refused(400))
    yield (
        "host-missing",
        Case(sent=get(line=line(b"https://backend.internal/k-00000"), host=b"") + SMUGGLED, expect=refused(400)),
    )
    yield (
        "host-empty",
        Case(
            sent=get(line=line(b"https://backend.internal/k-00000"), host=b"Host:\r\n") + SMUGGLED, expect=refused(400)
        ),
    )
    yield (
        "host-twice",
        Case(
            sent=get(b"Host: backend.internal\r\n", line=line(b"https://backend.internal/k-00000")) + SMUGGLED,
            expect=refused(400),
        ),
    )
    for name, host in {
        "host-of-another": b"evil", "host-with-other-port": b"backend.internal:1",
        "host-with-default-port": b"backend.internal:443",
        "host-below": b"x.backend.internal", "host-userinfo": b"x@backend.internal",
    }.items():  # fmt: skip
        yield name, Case(sent=both(b"https://backend.internal/k-00000", host) + SMUGGLED, expect=refused(400))
    yield (
        "in-1.0-without-host",
        Case(
            sent=get(line=line(b"https://backend.internal/k-00000", version=b"HTTP/1.0"), host=b""),
            expect=passed(ends=True),
        ),
    )
    yield (
        "in-1.0-with-other-host",
        Case(
            sent=get(line=line(b"https://backend.internal/k-00000", version=b"HTTP/1.0"), host=b"Host: evil\r\n")
            + SMUGGLED,
            expect=refused(400),
        ),
    )


def hosts() -> Cases:
    """RFC 9112 §3.2: none, two, or a malformed Host is 400. RFC 9110 §7.4: a connection made for another name is 421;
    outbound, a name that no route has is 404.
    """

    def host(value: bytes) -> bytes:
        return get(host=b"Host: " + value + b"\r\n")

    for name, fields in {
        "missing": b"", "empty": b"Host:\r\n", "blank": b"Host: \t \r\n",
        "twice": b"Host: backend.internal\r\nHost: backend.internal\r\n",
        "two": b"Host: backend.internal\r\nHost: evil\r\n",
        "two-reversed": b"Host: evil\r\nHost: backend.internal\r\n",
        "two-one-empty": b"Host: backend.internal\r\nHost:\r\n",
        "two-first-empty": b"Host:\r\nHost: backend.internal\r\n",
        "two-in-cases": b"Host: backend.internal\r\nhOST: evil\r\n",
        "three": b"Host: backend.internal\r\n" * 3,
        "two-far-apart": b"Host: backend.internal\r\nX: y\r\nHost: evil\r\n",
        "space-before-colon": b"Host : backend.internal\r\n", "tab-before-colon": b"Host\t: backend.internal\r\n",
        "folded": b"Host:\r\n backend.internal\r\n", "folded-more": b"Host: backend.internal\r\n .evil\r\n",
        "name-with-nul": b"Host\0: backend.internal\r\n", "name-with-cr": b"\rHost: backend.internal\r\n",
        "second-behind-lf": b"Host: backend.internal\nHost: evil\r\n",
        "second-behind-cr": b"Host: backend.internal\rHost: evil\r\n",
        "indented-first": b" Host: evil\r\nHost: backend.internal\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=get(host=fields) + SMUGGLED, expect=refused(400))
    for value in (
        b"backend.internal, evil", b"backend.internal,backend.internal", b"evil backend.internal",
        b"backend.internal evil",
        b"evil@backend.internal", b"a:b@backend.internal", b"@backend.internal", b"backend.internal/secret",
        b"backend.internal/",
        b"/backend.internal", b"https://backend.internal", b"backend.internal?x", b"backend.internal#x",
        b"backend.internal\\x",
        b"backend.internal\x01", b"backend.internal\0", b"back\tend.internal", b"backend.internal\x7f",
        b"%62ackend.internal",
        b"backend.internal%00", b"backend%2einternal", b"backend.internal.", b"backend.internal..",
        b".backend.internal",
        b"backend..internal", b"-backend.internal:x", b"backend.internal:", b"backend.internal:0",
        b"backend.internal:00080",
        b"backend.internal:65536", b"backend.internal:99999999999", b"backend.internal:-1", b"backend.internal:+80",
        b"backend.internal:80:80", b"backend.internal: 80", b"backend.internal :80", b"backend.internal:8o",
        b"backend.internal:0x50",
        b'"backend.internal"', b"<backend.internal>", b"*.internal", b"back\xc3\xa9nd.internal",
        b"back\xe9nd.internal",
        b"backend.internal\xc2\xad", b"backend\xef\xbc\x8einternal", b"127.1", b"127.0.1", b"0x7f.0.0.1",
        b"0177.0.0.1", b"2130706433",
        b"127.0.0.256", b"[::1", b"::1", b"[::1]x", b"[::1%25lo]", b"[::ffff:127.0.0.1]", b"[v1.x]", b"[]",
        b"[1::2::3]",
        b"a" * 64 + b".internal", b"a." * 127 + b"aa", b"backend.internal;x", b"backend.internal=x",
        b"$(backend).internal",
        b"backend.internal'", b"_", b"localhost:8080",
    ):  # fmt: skip
        if value in (b"_", b"localhost:8080"):  # sound, but somebody else
            yield (
                named(value),
                Case(sent=host(value), expect=declined(421), on={"out": declined(404), "in-plain": passed()}),
            )
        else:
            yield named(value), Case(sent=host(value) + SMUGGLED, expect=refused(400))
    for value in (
        b"BACKEND.internal",
        b"backend.internal:443",
        b"backend.internal:1",
        b"backend.internal:65535",
        b"\tbackend.internal \t",
    ):
        yield "sound-" + named(value), Case(sent=host(value), expect=passed())
    for value in (
        b"evil",
        b"x.backend.internal",
        b"backend.internal.evil",
        b"127.0.0.1",
        b"[::1]",
        b"[0:0:0:0:0:0:0:1]:8443",
        b"[2001:DB8::1]",
    ):
        yield (
            "other-" + named(value),
            Case(sent=host(value), expect=declined(421), on={"out": declined(404), "in-plain": passed()}),
        )
    yield "of-1.0-missing", Case(
        sent=get(line=b"GET /k-00000 HTTP/1.0", host=b""), expect=declined(400, 421), on={"out": declined(400, 404), "in-plain": declined(400) + passed()}
    )  # fmt: skip
    yield (
        "of-1.0-empty",
        Case(sent=get(line=b"GET /k-00000 HTTP/1.0", host=b"Host:\r\n") + SMUGGLED, expect=refused(400)),
    )
    yield "other-spelling", Case(sent=get(b"Host_: evil\r\nHo.st: evil\r\nX-Host: evil\r\n"), expect=passed())
    yield (
        "behind-all-others",
        Case(
            sent=b"GET /k-00000 HTTP/1.1\r\nX-Case: k-00000\r\nX: y\r\nHost: backend.internal\r\n\r\n", expect=passed()
        ),
    )


def names_beside_the_asked_one() -> Cases:
    """RFC 9110 §7.4: the authority against the name that the handshake asked for."""
    yield "none-asked-for", Case(sent=get(), expect=passed(), server_name=None)
    yield "none-asked-for-other-host", Case(sent=get(host=b"Host: evil\r\n"), expect=passed(), server_name=None)
    yield "other-asked-for", Case(sent=get(), expect=declined(421), server_name="evil")
    yield "below-asked-for", Case(sent=get(), expect=declined(421), server_name="x.backend.internal")
    yield "asked-for-in-capitals", Case(sent=get(), expect=passed(), server_name="BACKEND.Internal")
    yield (
        "second-request-for-another",
        Case(
            sent=get() + NEXT.replace(b"Host: backend.internal", b"Host: evil"),
            expect=mixed(200, 421, arrived=[b""]),
        ),
    )
