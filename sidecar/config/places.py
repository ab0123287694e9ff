"""Host names, addresses and path prefixes as text: one spelling for each, and what reaches what.

Looks no name up. A name is whatever is not an IP literal, so the odd spellings of IPv4 (`127.1`, `0x7f.1`) are refused
rather than passed to a resolver that would read them as an address.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

from sidecar.config.document import Wrong
from sidecar.model import Address

_Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_PREFIX = re.compile(r"(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})+)*/?")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_REFUSED_ESCAPES = frozenset(b"/\\\x7f") | frozenset(range(32))
_SEGMENT = r"/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_SPIFFE_ID = re.compile(rf"spiffe://([a-z0-9._-]{{1,255}})((?:{_SEGMENT})+)")
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")


def host(text: str) -> str:
    """A host name in lower case, or an IP address in its one spelling, without brackets."""
    if text.startswith("[") and text.endswith("]"):
        return str(_ip(text[1:-1], version=6))
    if ":" in text:
        raise Wrong(f"`{text}` is not a host; a port has no place here, and an IPv6 address stands in brackets")
    name = text.lower()
    if re.fullmatch(r"[0-9.]+", name):
        return str(_ip(name, version=4))
    if not _NAME.fullmatch(name) or len(name) > 253 or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
        raise Wrong(f"`{text}` is not a host name or an IP address")
    return name


def authority(text: str) -> tuple[str, int | None]:
    """`host` or `host:port`."""
    if re.fullmatch(r"(\[.*\]|[^:\[\]]*):.*", text):
        where = target(text)
        return where.host, where.port
    return host(text), None


def address(text: str) -> Address:
    """`host:port`, with an IPv6 address in brackets."""
    name, colon, port = text.rpartition(":")
    if ":" in name and not name.startswith("["):
        raise Wrong(f"`{text}` is not host:port; write an IPv6 address in brackets, like [::1]:8443")
    if not colon or not name or "]" in port:
        raise Wrong(f"`{text}` is not host:port, like 127.0.0.1:8443")
    if not _PORT.fullmatch(port) or int(port) > 65_535:
        raise Wrong(f"`{port}` is not a port: a number up to 65535")
    return Address(host=host(name), port=int(port))


def target(text: str) -> Address:
    """An address that can be dialled."""
    where = address(text)
    if where.port == 0:
        raise Wrong("port 0 cannot be dialled")
    if (ip := _literal(where.host)) and (ip.is_unspecified or ip.is_multicast):
        raise Wrong(f"{where.host} cannot be dialled")
    return where


def listener(text: str) -> Address:
    """An address that can be listened on: an IP address or `localhost`; port 0 lets the kernel choose."""
    where = address(text)
    if where.host != "localhost" and _literal(where.host) is None:
        raise Wrong(f"listen on an IP address or localhost, not on the name {where.host}")
    return where


def agent_url(text: str) -> Address:
    """The address in `http://host[:port]`."""
    if not (found := re.fullmatch(r"http://([^/?#@]+)/?", text, re.IGNORECASE)):
        raise Wrong(f"`{text}` is not http://host:port: plain HTTP, and no user, path or query")
    name, port = authority(found[1])
    return target(str(Address(host=name, port=80 if port is None else port)))


def https_url(text: str) -> tuple[Address, str, str]:
    """The address, the authority as it is spelt, and the path with its query, of `https://host[:port]/path`."""
    if not (found := re.fullmatch(r"https://([^/?#@\s]+)(/[!-~]*)?", text, re.IGNORECASE)) or "#" in text:
        raise Wrong(f"`{text[:100]}` is not https://host:port/path, without user or fragment")
    name, port = authority(found[1])
    return target(str(Address(host=name, port=443 if port is None else port))), found[1].lower(), found[2] or "/"


def prefix(text: str) -> str:
    """A path prefix in the spelling that a request's canonical path has."""
    if not text.startswith("/"):
        raise Wrong("must begin with a slash")
    if not _PREFIX.fullmatch(text):
        raise Wrong(
            f"`{text}` is not a plain path: no repeated slash, query or fragment, and what a path cannot hold is "
            "percent-encoded in upper case"
        )
    if {".", ".."} & set(text.split("/")):
        raise Wrong("must not have `.` or `..` as a segment")
    for escape in re.findall(r"%..", text):
        byte = int(escape[1:], 16)
        if _UNRESERVED.fullmatch(chr(byte)):
            raise Wrong(f"write {chr(byte)} instead of {escape}: that is how a request's path is spelt here")
        if byte in _REFUSED_ESCAPES:
            raise Wrong(f"must not hold {escape}")
    try:
        unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise Wrong("its escapes are not UTF-8") from None
    return text


def spiffe_id(text: str) -> str:
    """A workload's ID (SPIFFE-ID §2): lower-case trust domain, a path, no empty or dot segments, 2048 bytes at most."""
    if not _SPIFFE_ID.fullmatch(text) or len(text) > 2048:
        raise Wrong(f"`{text[:100]}` is not a workload's SPIFFE ID, like spiffe://example.org/ns/demo/sa/budget")
    return text


def trust_domain(text: str) -> str:
    if not _TRUST_DOMAIN.fullmatch(text):
        raise Wrong(f"`{text[:100]}` is not a trust domain, like example.org")
    return text


def trust_domain_of(workload: str) -> str:
    """The trust domain of a string that `spiffe_id` has passed."""
    return workload.split("/")[2]


def is_loopback(where: Address) -> bool:
    ip = _literal(where.host)
    return where.host == "localhost" if ip is None else ip.is_loopback


def reaches(target: Address, listen: Address) -> bool:
    """Whether a connection to `target` may end at our own listener, as far as the text tells."""
    if target.port != listen.port or listen.port == 0:
        return False
    return any(_covers(ours, theirs) for ours in _ips(listen.host) for theirs in _ips(target.host))


def collides(one: Address, other: Address) -> bool:
    """Whether two listeners cannot both be bound."""
    if one.port != other.port or one.port == 0:
        return False
    pairs = [(a, b) for a in _ips(one.host) for b in _ips(other.host) if a.version == b.version]
    return any(a == b or a.is_unspecified or b.is_unspecified for a, b in pairs)


def _covers(listen: _Ip, target: _Ip) -> bool:
    if listen.is_unspecified:
        return target.is_loopback and (listen.version == 6 or target.version == 4)
    return listen == target


def _ips(name: str) -> list[_Ip]:
    if name == "localhost":
        return [ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1")]
    ip = _literal(name)
    return [] if ip is None else [ip]


def _literal(name: str) -> _Ip | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _ip(text: str, *, version: int) -> _Ip:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        raise Wrong(f"`{text}` is not an IP address") from None
    if ip.version != version or "%" in text:
        raise Wrong(f"`{text}` is not an IPv{version} address without zone")
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip
