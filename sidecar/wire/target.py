"""Request targets: one canonical form, which policy sees and the upstream gets (RFC 3986 §6, RFC 9112 §3.2).

A proxy is trusted for what it refuses. Wherever two servers might read one spelling in two ways, the answer is 400
with a code of its own, and what passes has one spelling: for every target t made here, `origin_form(str(t)) == t`.
What is accepted, changed and refused stands in `docs/headers.md`.

This file refuses to know connections, schemes that were spoken, routes and policy. It raises `ClientFault`, with
nothing of the target in it: targets carry secrets.

The order matters. Escapes are settled first, so that `%2e%2e` is a dot segment like any other; then disguised dot
segments are refused; then empty and dot segments are resolved from left to right, so `..` never meets an empty one.
Segments are decoded last: nothing that decoding brings to light is taken for structure.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from sidecar.errors import ClientFault
from sidecar.model import Target, maker

MAX_QUERY_PAIRS = 1000
_target = maker(Target)

ASTERISK = Target(path="*", query=None, segments=())
"""The target of `OPTIONS *`: the server as a whole."""
NO_PATH = Target(path="", query=None, segments=())
"""The target of CONNECT, which names an authority and nothing else."""

_UNRESERVED = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
_PCHAR = r"A-Za-z0-9._~!$&'()*+,;=:@\-"
# Most paths need nothing: no escape, no empty segment, none that begins with a dot or is nothing but parameters.
_PLAIN = re.compile(rf"((?:/(?![/.;])[{_PCHAR}]*)+)(?:\?([!-\"$-~]*))?")
_STRANGE_IN_PATH = re.compile(rf"[^{_PCHAR}/%]|%(?![0-9A-Fa-f]{{2}})")
_STRANGE_IN_QUERY = re.compile(r"[^!-\"$-~]")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_SETTLED = {f"%{byte:02X}": chr(byte) if chr(byte) in _UNRESERVED else f"%{byte:02X}" for byte in range(256)}
_HAZARD = re.compile(r"%(?:2F|5C|25[0-9A-Fa-f]{2})")
# Some servers cut `;parameters` off, or decode %2F, before they resolve: to them these are "", "." or "..".
_DISGUISED = re.compile(r"(?:/|%2F)\.{0,2}(?:;|%3B)|%2F\.{1,2}(?:/|%2F|\Z)|/\.{1,2}%2F")
_RUN = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_RUN_BUT_SLASH = re.compile(r"(?:%(?!2F)[0-9A-F]{2})+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)

_PUBLIC = {
    "target_form_invalid": "the request target is not in a form that this method allows",
    "target_fragment": "the request target holds a fragment",
    "authority_malformed": "the authority is not a plain host and port",
    "path_whitespace": "the path holds white space",
    "path_control": "the path holds a control character",
    "path_not_ascii": "the path holds bytes that must be percent-encoded",
    "path_backslash": "the path holds a backslash",
    "path_character": "the path holds a character that must be percent-encoded",
    "path_escape_malformed": "the path holds a % that begins no escape",
    "path_escape_doubled": "the path is percent-encoded twice",
    "path_slash_encoded": "the path holds an encoded slash",
    "path_encoding_invalid": "the path does not decode to UTF-8",
    "path_segment_disguised": "the path holds a dot segment or an empty segment in disguise",
    "path_escapes_root": "the path leads above the root",
    "query_whitespace": "the query holds white space",
    "query_control": "the query holds a control character",
    "query_not_ascii": "the query holds bytes that must be percent-encoded",
    "query_semicolon": "the query holds a semicolon, which some take for a separator",
    "query_escape_malformed": "the query holds a % that begins no escape",
    "query_encoding_invalid": "the query does not decode to UTF-8",
    "query_name_missing": "the query holds a value without a name",
    "query_name_ambiguous": "the query holds a name with an encoded separator",
    "query_too_long": "the query holds too many pairs",
}


def _fault(code: str) -> ClientFault:
    return ClientFault(code=code, public=_PUBLIC[code])


# ── targets ───────────────────────────────────────────────────────────────────────────────────────────────────────


def request_target(
    method: str, raw: bytes, *, allow_encoded_slash: bool = False
) -> tuple[str | None, bytes | None, Target]:
    """Read a target in the form that the method allows (RFC 9112 §3.2): (scheme, authority, target).

    Scheme (lower case) and authority are None where the form names none. CONNECT gives its authority, which must have
    a port, and `NO_PATH`. An authority that is returned has passed `authority`.
    """
    if method == "CONNECT":
        if authority(raw)[1] is None:
            raise _fault("authority_malformed")
        return None, raw, NO_PATH
    if raw[:1] == b"/":
        return None, None, origin_form(raw, allow_encoded_slash=allow_encoded_slash)
    if raw == b"*" and method == "OPTIONS":
        return None, None, ASTERISK
    match = _ABSOLUTE.fullmatch(raw)
    if match is None:
        raise _fault("target_form_invalid")
    scheme, named, rest = match.groups()
    authority(named)
    if not rest and method == "OPTIONS":  # RFC 9112 §3.2.4
        return scheme.lower().decode(), named, ASTERISK
    where = origin_form(rest if rest[:1] == b"/" else b"/" + rest, allow_encoded_slash=allow_encoded_slash)
    return scheme.lower().decode(), named, where


def origin_form(raw: bytes, *, allow_encoded_slash: bool = False) -> Target:
    """Return the canonical target for `/path` or `/path?query`.

    The path has unreserved escapes decoded, the others in upper case, and neither dot segments nor empty ones but a
    last (RFC 3986 §6.2.2); its segments are decoded. With `allow_encoded_slash`, %2F stays as it is in both. The
    query passes unchanged.
    """
    text = raw.decode("latin-1")
    if match := _PLAIN.fullmatch(text):
        path, query = match.groups()
        return _target(path=path, query=query, segments=tuple(path[1:].split("/")) if path != "/" else ())
    if text[:1] != "/":
        raise _fault("target_form_invalid")
    path, mark, rest = text.partition("?")
    if "#" in text:
        raise _fault("target_fragment")
    _refuse_strange("path", _STRANGE_IN_PATH, path)
    _refuse_strange("query", _STRANGE_IN_QUERY, rest)
    parts = _parts(_settled(path, allow_encoded_slash=allow_encoded_slash))
    segments = tuple(_decoded("path", _RUN_BUT_SLASH, part) if "%" in part else part for part in parts)
    return Target(path="/" + "/".join(parts), query=rest if mark else None, segments=segments)


def _refuse_strange(where: str, strange: re.Pattern[str], text: str) -> None:
    """Raise for the first character that may not stand here, with the code that names its kind."""
    match = strange.search(text)
    if match is None:
        return
    char = match[0]
    if char in " \t":
        kind = "whitespace"
    elif char < " " or char == "\x7f":
        kind = "control"
    elif char > "~":
        kind = "not_ascii"
    else:
        kind = {"%": "escape_malformed", "\\": "backslash"}.get(char, "character")
    raise _fault(f"{where}_{kind}")


def _settled(path: str, *, allow_encoded_slash: bool) -> str:
    """Give every escape its one spelling, and refuse those that would be read in two ways."""
    path = _ESCAPE.sub(lambda match: _SETTLED[match[0].upper()], path)
    for hazard in _HAZARD.finditer(path):
        if hazard[0] == "%5C":
            raise _fault("path_backslash")
        if hazard[0] != "%2F":
            raise _fault("path_escape_doubled")
        if not allow_encoded_slash:
            raise _fault("path_slash_encoded")
    if "%" in path:
        _decoded("path", _RUN, path)  # also of what a dot segment is about to remove
    if _DISGUISED.search(path):
        raise _fault("path_segment_disguised")
    return path


def _parts(path: str) -> list[str]:
    """Resolve dot segments and repeated slashes. A last empty part stands for a slash at the end; [] is the root."""
    parts: list[str] = []
    part = ""
    for part in path.split("/"):
        if part == "..":
            if not parts:
                raise _fault("path_escapes_root")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if parts and part in ("", ".", ".."):
        parts.append("")
    return parts


def _decoded(where: str, run: re.Pattern[str], text: str) -> str:
    """Decode each run of escapes as UTF-8 (runs stand between ASCII, so no character reaches over their ends)."""
    try:
        text = run.sub(lambda match: bytes.fromhex(match[0].replace("%", "")).decode(), text)
    except UnicodeDecodeError:
        raise _fault(f"{where}_encoding_invalid") from None
    if _CONTROL.search(text):
        raise _fault(f"{where}_control")
    return text


# ── authorities ───────────────────────────────────────────────────────────────────────────────────────────────────

_AUTHORITY = re.compile(r"(?:([a-z0-9._-]{1,253})|\[([0-9a-f:.]{2,45})\])(?::([1-9][0-9]{0,4}))?")
_NAME = re.compile(r"(?:[a-z0-9_][a-z0-9_-]{0,62}\.)*[a-z0-9_][a-z0-9_-]{0,62}")
_NUMBER_LAST = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_MAX_REMEMBERED_BYTES = 255


def authority(raw: bytes) -> tuple[str, int | None]:
    """Read `host` or `host:port` strictly: (host in lower case without brackets, port or None).

    A host is a name of letters, digits, `-` and `_` in dotted labels (at most 253), four plain decimal octets, or an
    IPv6 address in brackets, returned as RFC 5952 writes it. No userinfo, escapes, dot at the end, empty port, zone, or
    other spelling of an IPv4 address (`127.1`, `0x7f.0.0.1`, `[::ffff:127.0.0.1]`).
    """
    # A memory of a pure function, bounded in entries and in the size of each; faults are not kept.
    return _remembered(raw) if len(raw) <= _MAX_REMEMBERED_BYTES else _authority(raw)


def _authority(raw: bytes) -> tuple[str, int | None]:
    # Not str.lower: it would make ASCII letters of others.
    match = _AUTHORITY.fullmatch(raw.lower().decode("latin-1"))
    if match is None:
        raise _fault("authority_malformed")
    name, v6, digits = match.groups()
    port = None if digits is None else int(digits)
    if port is not None and port > 65535:
        raise _fault("authority_malformed")
    if v6 is not None:
        return _ipv6(v6), port
    if _NAME.fullmatch(name) is None or (_NUMBER_LAST.fullmatch(name) and not _IPV4.fullmatch(name)):
        raise _fault("authority_malformed")
    return name, port


_remembered = lru_cache(maxsize=1024)(_authority)


def _ipv6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise _fault("authority_malformed") from None
    if address.ipv4_mapped is not None:
        raise _fault("authority_malformed")
    return str(address)


# ── queries ───────────────────────────────────────────────────────────────────────────────────────────────────────

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SEPARATOR = re.compile(r"[&=]")


def query_pairs(query: str | None) -> dict[str, tuple[str, ...]]:
    """Read a query by the one grammar that policy relies on: name → its values in order.

    Pairs are split at `&` (empty ones are skipped), name and value at the first `=` (none: the value is ""); `+` is a
    space, escapes are UTF-8. What other parsers read differently is refused: a raw `;`, bad escapes or UTF-8, control
    characters, an empty name, an encoded `&` or `=` in a name, more than `MAX_QUERY_PAIRS`.
    """
    if not query:
        return {}
    if ";" in query:
        raise _fault("query_semicolon")
    if _BAD_ESCAPE.search(query):
        raise _fault("query_escape_malformed")
    if query.count("&") >= MAX_QUERY_PAIRS:
        raise _fault("query_too_long")
    pairs: dict[str, list[str]] = {}
    for piece in query.split("&"):
        if piece:
            raw_name, _, raw_value = piece.partition("=")
            name = _form_decoded(raw_name)
            if not name:
                raise _fault("query_name_missing")
            if _SEPARATOR.search(name):
                raise _fault("query_name_ambiguous")
            pairs.setdefault(name, []).append(_form_decoded(raw_value))
    return {name: tuple(values) for name, values in pairs.items()}


def _form_decoded(text: str) -> str:
    text = text.replace("+", " ")
    return _decoded("query", _RUN, text) if "%" in text else text
