"""The canonicaliser: request targets, authorities and queries (`sidecar.wire.target`).

What is accepted must have one spelling, be read alike by a second reader, and mean to a file server, to `urllib` and to
libc what it means here. Of origin-form targets what is refused is compared as well.
"""

from __future__ import annotations

import ipaddress
import posixpath
import socket
from urllib.parse import parse_qsl, unquote, urlsplit

from fuzz import reference
from fuzz.registry import Target as Fuzzed
from sidecar.errors import ClientFault
from sidecar.model import Target
from sidecar.wire import target

METHODS = ("GET", "OPTIONS", "CONNECT", "POST")


def origin(data: bytes) -> bool:
    """One byte of flags, then an origin-form target."""
    flags, raw = data[:1], data[1:]
    slash = bool(flags and flags[0] & 1)
    expected = reference.canonical(raw, allow_encoded_slash=slash)
    try:
        found = target.origin_form(raw, allow_encoded_slash=slash)
    except ClientFault as fault:
        assert fault.status == 400
        assert fault.code in target._PUBLIC
        assert not fault.detail
        assert expected is None, f"refused as {fault.code}: {expected}"
        return False
    assert (found.path, found.query, found.segments) == expected
    _one_meaning(found, allow_encoded_slash=slash)
    return True


def _one_meaning(found: Target, *, allow_encoded_slash: bool) -> None:
    text = str(found)
    assert target.origin_form(text.encode("ascii"), allow_encoded_slash=allow_encoded_slash) == found
    assert all("!" <= char <= "~" for char in text)
    assert "//" not in found.path
    assert "\\" not in found.path
    assert "#" not in text
    assert not {".", ".."} & set(found.path.split("/"))
    named = urlsplit("http://h" + text)
    assert (named.path, named.query) == (found.path, found.query or "")
    if "%2F" not in found.path:
        # What a server that decodes first and resolves then makes of it.
        served = posixpath.normpath(unquote(found.path, errors="strict"))
        assert served == "/" + "/".join(found.segments).removesuffix("/")


def request(data: bytes) -> bool:
    """A byte that chooses the method, then a target in any form."""
    method = METHODS[data[0] % len(METHODS)] if data else "GET"
    raw = data[1:]
    try:
        scheme, named, where = target.request_target(method, raw)
    except ClientFault as fault:
        assert fault.status == 400
        assert fault.code in target._PUBLIC
        return False
    if method == "CONNECT":
        assert (scheme, named, where) == (None, raw, target.NO_PATH)
        host, port = target.authority(raw)
        assert port is not None
        return True
    if named is not None:
        assert scheme in ("http", "https")
        parts = urlsplit(raw.decode("ascii"))
        host, port = target.authority(named)
        assert (parts.scheme, parts.port, parts.username) == (scheme, port, None)
        assert _same_host(parts.hostname or "", host)
        again = target.request_target(method, f"{scheme}://{named.decode()}{_sent(where)}".encode())
        assert again == (scheme, named, where)
    if where is target.ASTERISK:
        assert method == "OPTIONS"
    else:
        _one_meaning(where, allow_encoded_slash=False)
    return True


def _sent(where: Target) -> str:
    return "" if where is target.ASTERISK else str(where)


def authority(data: bytes) -> bool:
    """The value of a Host field."""
    try:
        host, port = target.authority(data)
    except ClientFault as fault:
        assert fault.code == "authority_malformed"
        return False
    assert target._authority(data) == (host, port), "what is remembered is what would be found"
    shown = f"[{host}]" if ":" in host else host
    again = shown if port is None else f"{shown}:{port}"
    assert target.authority(again.encode("ascii")) == (host, port)
    assert port is None or 1 <= port <= 65535
    parts = urlsplit("//" + data.decode("ascii"))
    assert _same_host(parts.hostname or "", host)
    assert parts.port == port
    assert parts.username is None
    if ":" in host:
        address = ipaddress.IPv6Address(host)
        assert str(address) == host
        assert address.ipv4_mapped is None
        assert "%" not in host
        return True
    assert host.isascii()
    assert host == host.lower()
    assert len(host) <= 253
    assert all(0 < len(label) <= 63 and not label.startswith("-") for label in host.split("."))
    try:
        number = socket.inet_aton(host)  # whatever libc would take for an address without asking anybody
    except OSError:
        return True
    assert host == socket.inet_ntoa(number) == str(ipaddress.IPv4Address(host))
    return True


def _same_host(named: str, host: str) -> bool:
    return named == host or (":" in host and ipaddress.ip_address(named) == ipaddress.ip_address(host))


def query(data: bytes) -> bool:
    """A query, as it stands behind `?`."""
    try:
        found = target.origin_form(b"/?" + data).query
        pairs = target.query_pairs(found)
    except ClientFault as fault:
        assert fault.status == 400
        assert fault.code in target._PUBLIC
        return False
    assert found is not None
    assert found.encode("ascii") == data
    expected: dict[str, list[str]] = {}
    for name, value in parse_qsl(found, keep_blank_values=True, errors="strict", separator="&"):
        expected.setdefault(name, []).append(value)
    assert {name: list(values) for name, values in pairs.items()} == expected
    for name, values in pairs.items():
        assert name
        assert not {"&", "="} & set(name)
        assert not any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for text in (name, *values) for char in text)
    return True


ORIGIN_GOOD = (
    b"\0/", b"\0/a/b", b"\0/a//b/./c/../d?x=1&y=%zz", b"\0/caf%C3%A9/%7euser/%41", b"\0/a;v=1/b", b"\0/100%25",
    b"\1/a%2Fb/c%20d", b"\0/a/%2e%2E/b", b"\0/%F0%9F%9A%97", b"\0/a/..", b"\0/!$&'()*+,=:@?", b"\1/u/https:%2F%2Fx",
)  # fmt: skip
ORIGIN_BAD = (
    b"\0", b"\0*", b"\0/..", b"\0/a/..;/b", b"\0/;x", b"\0/a%2fb", b"\1/a/..%2Fb", b"\0/%252e", b"\0/%25%32%66", b"\0/%c0%ae",
    b"\0/%00", b"\0/%c2%85", b"\0/a#b", b"\0/a b", b"\0/\xc3\xa9", b"\0/a\\b", b"\0/%zz", b"\0/a?b\x7f", b"\1/a%2F;x", b"\0/%",
)  # fmt: skip
ORIGIN_WORDS = (
    b"%2e", b"%2E", b"%2f", b"%2F", b"%5c", b"%25", b"%3b", b"%00", b"%c3%a9", b"%c0%af", b"%C2%80", b"/../", b"/./", b"//", b"..",
    b";", b"?", b"#", b"%41", b"\\",
)  # fmt: skip
REQUEST_GOOD = (
    b"\0/a/../b?c", b"\0http://h/a", b"\0HTTPS://Host:8443/x/../a", b"\0http://[::1]?q=/x", b"\1*", b"\1http://h", b"\1http://h/",
    b"\2h:443", b"\2[2001:db8::1]:443", b"\3/a%20b",
)  # fmt: skip
REQUEST_BAD = (
    b"\0", b"\0*", b"\0h:443", b"\0ftp://h/a", b"\0http:/a", b"\0http://user@h/a", b"\0http://h\\@x/a", b"\0http://h#/a", b"\2/a",
    b"\2h", b"\2http://h:80", b"\0http://h/..", b"\0http:///a",
)  # fmt: skip
REQUEST_WORDS = (b"http://", b"https://", b"HTTP://", b"@", b":80", b"[::1]", b"/../", b"*", b"?", b"#", b"\\", b"//")
AUTHORITY_GOOD = (
    b"a", b"A.Test:8443", b"localhost:8080", b"127.0.0.1", b"10.0.0.255:1", b"[::1]:443", b"[2001:DB8::0:1]", b"a_b-c.d", b"[::fffe:0:1]",
    b"xn--bcher-kva.example", b"[fe80::]:65535",
)  # fmt: skip
AUTHORITY_BAD = (
    b"", b":80", b"a:", b"a:0", b"a:65536", b"a:080", b"a.", b".a", b"a..b", b"-a", b"u@a", b"127.1", b"0x7f.0.0.1", b"1.2.3.4.5",
    b"256.1.1.1", b"[::ffff:127.0.0.1]", b"[fe80::1%eth0]", b"::1", b"a b", b"a,b", b"%61", b"\xe2\x84\xaa", b"017700000001", b"a.0x1",
)  # fmt: skip
AUTHORITY_WORDS = (
    b"[",
    b"]",
    b"::",
    b"::ffff:",
    b":",
    b".",
    b"0x",
    b"127.",
    b"%",
    b"@",
    b"-",
    b"_",
    b":65535",
    b"255",
    b"\xc4\xb0",
)
QUERY_GOOD = (b"", b"a=1&b=2&a=3", b"a", b"a=%C3%A9+x", b"&&a=b=c", b"a%20b=%26%3D", b'x={"y":1}|^`', b"q=/../?x")
QUERY_BAD = (
    b"a;b",
    b"a=%zz",
    b"=x",
    b"a%26b=1",
    b"a%3D=1",
    b"%ff=1",
    b"a=%00",
    b"a=\xc3\xa9",
    b"a#b",
    b"a b",
    b"&" * 1001,
)
QUERY_WORDS = (b"&", b"=", b"%26", b"%3D", b"+", b"%2B", b";", b"%00", b"%C3%A9", b"%0D%0A", b"?")

TARGETS = (
    Fuzzed(name="target.origin", run=origin, good=lambda: ORIGIN_GOOD, bad=lambda: ORIGIN_BAD, words=ORIGIN_WORDS, max_bytes=96, examples=400),
    Fuzzed(name="target.request", run=request, good=lambda: REQUEST_GOOD, bad=lambda: REQUEST_BAD, words=REQUEST_WORDS, max_bytes=96, examples=300),
    Fuzzed(name="target.authority", share=0.5, run=authority, good=lambda: AUTHORITY_GOOD, bad=lambda: AUTHORITY_BAD, words=AUTHORITY_WORDS, max_bytes=300, examples=300),
    Fuzzed(name="target.query", share=0.5, run=query, good=lambda: QUERY_GOOD, bad=lambda: QUERY_BAD, words=QUERY_WORDS, max_bytes=1200, examples=300),
)  # fmt: skip
