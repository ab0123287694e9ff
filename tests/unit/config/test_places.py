"""Hosts, addresses and prefixes: one spelling each, and what reaches what."""

from __future__ import annotations

import pytest

from sidecar.config import places
from sidecar.config.document import Wrong
from sidecar.model import Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8443", "127.0.0.1", 8443),
        ("Budget.Internal:1", "budget.internal", 1),
        ("my_service:65535", "my_service", 65535),
        ("[::1]:80", "::1", 80),
        ("[0:0:0:0:0:0:0:1]:80", "::1", 80),
        ("[2001:DB8::1]:80", "2001:db8::1", 80),
        ("[::ffff:127.0.0.1]:80", "127.0.0.1", 80),
    ],
)
def test_an_address_has_one_spelling(text: str, host: str, port: int) -> None:
    assert places.address(text) == Address(host=host, port=port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "a",
        "a:",
        "a:x",
        "a:-1",
        "a:080",
        "a:65536",
        "a:٨٠",
        "a b:80",
        "a..b:80",
        "a.:80",
        "-a:80",
        "a/b:80",
        "u@a:80",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[::1:80",
        "[127.0.0.1]:80",
        "[fe80::1%eth0]:80",
        "[a]:80",
        "127.1:80",
        "256.0.0.1:80",
        "0x7f.0.0.1:80",
        "0x7f000001:80",
        "127.0.0.01:80",
        "2130706433:80",
        "127.0.0.0x1:80",
        "1.2.3.4.5:80",
        "bücher.example:80",
        "*.internal:80",
        "x" * 64 + ":80",
        ".".join(["x" * 60] * 5) + ":80",
    ],
)
def test_what_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(Wrong):
        places.address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backend.internal", ("backend.internal", None)),
        ("Backend.internal:443", ("backend.internal", 443)),
        ("[::1]", ("::1", None)),
        ("[::1]:443", ("::1", 443)),
    ],
)
def test_an_authority_may_leave_the_port_out(text: str, expected: tuple[str, int | None]) -> None:
    assert places.authority(text) == expected


@pytest.mark.parametrize("text", ["::1", "a:", "a:0", "a:b:80", "a/b", "u@a", ""])
def test_what_is_not_an_authority_is_refused(text: str) -> None:
    with pytest.raises(Wrong):
        places.authority(text)


@pytest.mark.parametrize("text", ["/", "/budget", "/budget/", "/a/b;c=1/~d", "/caf%C3%A9", "/a%20b"])
def test_a_canonical_prefix_stays_as_it_is(text: str) -> None:
    assert places.prefix(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "budget",
        "//",
        "/a//b",
        "/a?b",
        "/a#b",
        "/a b",
        "/café",
        "/./a",
        "/a/..",
        "/a/../b",
        "/%2e%2e/a",
        "/%61",
        "/%7e",
        "/a%2Fb",
        "/a%5Cb",
        "/a%00",
        "/a%0A",
        "/a%7F",
        "/a%c3%a9",
        "/a%C3",
        "/a%",
        "/a%2",
        "/a\\b",
    ],
)
def test_a_prefix_that_no_request_has_is_refused(text: str) -> None:
    with pytest.raises(Wrong):
        places.prefix(text)


@pytest.mark.parametrize(
    "text",
    ["spiffe://example.org/a", "spiffe://example.org/ns/demo/sa/a.b-c_D", "spiffe://a/...", "spiffe://127.0.0.1/a"],
)
def test_a_workload_id_is_taken_as_it_is(text: str) -> None:
    assert places.spiffe_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe://example.org",
        "spiffe://example.org/",
        "spiffe://example.org/a/",
        "spiffe://example.org//a",
        "spiffe://example.org/a/../b",
        "spiffe://example.org/.",
        "spiffe://Example.org/a",
        "SPIFFE://example.org/a",
        "spiffe://example.org:80/a",
        "spiffe://u@example.org/a",
        "spiffe://example.org/a?b",
        "spiffe://example.org/a%20",
        "spiffe://example.org/*",
        "spiffe://example.org/a\n",
        "https://example.org/a",
        "spiffe://example.org/" + "a" * 2048,
        "spiffe://" + "a" * 256 + "/a",
    ],
)
def test_what_is_not_a_workload_id_is_refused(text: str) -> None:
    with pytest.raises(Wrong):
        places.spiffe_id(text)


@pytest.mark.parametrize(
    ("target", "listen", "expected"),
    [
        ("127.0.0.1:80", "0.0.0.0:80", True),
        ("127.0.0.9:80", "0.0.0.0:80", True),
        ("localhost:80", "0.0.0.0:80", True),
        ("[::1]:80", "0.0.0.0:80", False),
        ("[::1]:80", "[::]:80", True),
        ("127.0.0.1:80", "[::]:80", True),
        ("10.0.0.1:80", "0.0.0.0:80", False),
        ("127.0.0.2:80", "127.0.0.1:80", False),
        ("localhost:80", "127.0.0.1:80", True),
        ("localhost:80", "localhost:80", True),
        ("10.0.0.1:80", "10.0.0.1:80", True),
        ("127.0.0.1:81", "0.0.0.0:80", False),
        ("backend.internal:80", "0.0.0.0:80", False),
    ],
)
def test_what_reaches_a_listener(target: str, listen: str, *, expected: bool) -> None:
    assert places.reaches(places.target(target), places.listener(listen)) is expected
