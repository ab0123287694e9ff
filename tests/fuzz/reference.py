"""Second readers, written from the RFCs and from the tables of `docs/headers.md`, one byte after the other.

They share no code and no idea with what they judge: where the product uses patterns, these count; where it uses a
tokenizer, these split. They are slow, and strict: None is said to everything that could be read in two ways.
"""

from __future__ import annotations

from dataclasses import dataclass

Field = tuple[bytes, bytes]

_DIGIT = b"0123456789"
_HEX = _DIGIT + b"abcdefABCDEF"
_ALPHA = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_UNRESERVED = _ALPHA + _DIGIT + b"-._~"
_IN_PATH = _UNRESERVED + b"!$&'()*+,;=:@/"
TOKEN = _ALPHA + _DIGIT + b"!#$%&'*+-.^_`|~"


# ── targets (RFC 3986) ────────────────────────────────────────────────────────────────────────────────────────────


def canonical(raw: bytes, *, allow_encoded_slash: bool) -> tuple[str, str | None, tuple[str, ...]] | None:
    """(path, query, segments) of an origin-form target; None where it has no single meaning."""
    if raw[:1] != b"/" or b"#" in raw:
        return None
    path, mark, query = raw.partition(b"?")
    units = _units(path)
    if units is None or any(not 0x21 <= byte <= 0x7E for byte in query):
        return None
    if not _harmless(units, allow_encoded_slash=allow_encoded_slash):
        return None
    resolved = _resolved("".join(units).split("/")[1:])
    if resolved is None:
        return None
    segments = tuple("%2F".join(_plain(piece) for piece in part.split("%2F")) for part in resolved)
    return "/" + "/".join(resolved), query.decode("ascii") if mark else None, segments


def _units(path: bytes) -> list[str] | None:
    """The path as characters and escapes, each spelt in the one way that it has."""
    units = []
    at = 0
    while at < len(path):
        byte = path[at]
        if byte == ord("%"):
            digits = path[at + 1 : at + 3]
            if len(digits) != 2 or digits[0] not in _HEX or digits[1] not in _HEX:
                return None
            escaped = int(digits, 16)
            units.append(chr(escaped) if escaped in _UNRESERVED else f"%{escaped:02X}")
            at += 3
        elif byte in _IN_PATH:
            units.append(chr(byte))
            at += 1
        else:
            return None
    return units


def _harmless(units: list[str], *, allow_encoded_slash: bool) -> bool:
    for at, unit in enumerate(units):
        following = "".join(units[at + 1 : at + 3])
        twice = unit == "%25" and len(following) == 2 and all(ord(char) in _HEX for char in following)
        if unit == "%5C" or twice or (unit == "%2F" and not allow_encoded_slash):
            return False
    try:
        text = bytes(int(unit[1:], 16) if len(unit) == 3 else ord(unit) for unit in units).decode()
    except UnicodeDecodeError:
        return False
    if any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for char in text):
        return False
    return not _disguised(units)


def _disguised(units: list[str]) -> bool:
    """Whether something is an empty or dot segment only for those who cut parameters off, or decode %2F, first."""
    piece: list[str] = []
    left = "/"
    for unit in [*units[1:], "end"]:
        if unit not in ("/", "%2F", "end"):
            piece.append(unit)
            continue
        text = "".join(piece).replace("%3B", ";")
        name, parameters, _ = text.partition(";")
        if parameters and name in ("", ".", ".."):
            return True
        if text in (".", "..") and "%2F" in (left, unit):
            return True
        piece, left = [], unit
    return False


def _resolved(parts: list[str]) -> list[str] | None:
    """Without dot and empty segments; a last "" where the path ended in one of them. None above the root."""
    found: list[str] = []
    for part in parts:
        if part == "..":
            if not found:
                return None
            del found[-1]
        elif part and part != ".":
            found.append(part)
    return [*found, ""] if found and parts[-1] in ("", ".", "..") else found


def _plain(text: str) -> str:
    """Every escape decoded."""
    out = bytearray()
    at = 0
    while at < len(text):
        if text[at] == "%":
            out.append(int(text[at + 1 : at + 3], 16))
            at += 3
        else:
            out.append(ord(text[at]))
            at += 1
    return out.decode()


# ── heads (RFC 9112) ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A request's head, or an answer's: `start` is the three parts of its first line, names are in lower case."""

    start: tuple[bytes, bytes, bytes]
    fields: list[Field]
    framing: int | str
    """The length of the body, "chunked", or "close"."""

    def values(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found == name]


def request_head(raw: bytes) -> Head | None:
    """One request's head with its empty line, and nothing behind it."""
    lines = _lines(raw)
    if lines is None:
        return None
    start = lines[0].split(b" ")
    fields = _fields(lines[1:])
    if len(start) != 3 or fields is None or start[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        return None
    method, target, version = start
    if not _is_token(method) or not target or any(not 0x21 <= byte <= 0x7E for byte in target):
        return None
    framing = _framing(fields, modern=version == b"HTTP/1.1", otherwise=0)
    return None if framing is None else Head(start=(method, target, version), fields=fields, framing=framing)


def response_head(raw: bytes, method: bytes) -> Head | None:
    """One answer's head to a request of `method`."""
    lines = _lines(raw)
    if lines is None:
        return None
    version, _, rest = lines[0].partition(b" ")
    status, space, reason = rest.partition(b" ")
    fields = _fields(lines[1:])
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or fields is None or (rest and not space and len(rest) != 3):
        return None
    if len(status) != 3 or any(byte not in _DIGIT for byte in status) or not 100 <= int(status) <= 599:
        return None
    bodiless = method == b"HEAD" or int(status) < 200 or int(status) in (204, 304)
    codings = [name for name, _ in fields if name == b"transfer-encoding"]
    framing = _framing(fields, modern=version == b"HTTP/1.1", otherwise="close")
    if bodiless and (framing is not None or (codings and version == b"HTTP/1.1" and not _states_length(fields))):
        framing = 0  # it ends with its head, whatever the coding of a body would have been (RFC 9112 §6.3, rule 1)
    if framing is None:
        return None
    return Head(start=(version, status, reason), fields=fields, framing=framing)


def _states_length(fields: list[Field]) -> bool:
    return any(name == b"content-length" for name, _ in fields)


def _lines(raw: bytes) -> list[bytes] | None:
    if not raw.endswith(b"\r\n\r\n") or raw.index(b"\r\n\r\n") != len(raw) - 4:
        return None
    lines = raw[:-4].split(b"\r\n")
    sound = all((byte >= 0x20 and byte != 0x7F) or byte == 0x09 for line in lines for byte in line)
    return lines if sound else None


def _fields(lines: list[bytes]) -> list[Field] | None:
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _is_token(name):
            return None
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def _is_token(text: bytes) -> bool:
    return bool(text) and all(byte in TOKEN for byte in text)


def _framing(fields: list[Field], *, modern: bool, otherwise: int | str) -> int | str | None:
    """RFC 9112 §6.3, without its repairs: None for whatever it allows a recipient to repair or to refuse."""
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    if codings:
        return "chunked" if modern and not lengths and [coding.lower() for coding in codings] == [b"chunked"] else None
    if not lengths:
        return otherwise
    digits = lengths[0]
    sound = len(lengths) == 1 and 0 < len(digits) <= 18 and all(byte in _DIGIT for byte in digits)
    return int(digits) if sound else None


# ── chunked bodies (RFC 9112 §7.1) ────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, kw_only=True)
class Chunked:
    """How far a chunked body goes. `state`: "whole", "short" where more is to come, "wrong" where it is none."""

    data: bytes = b""
    trailers: list[Field]
    state: str = "short"
    rest: bytes = b""


MAX_CHUNK_LINE = 1024


def chunked(raw: bytes, *, max_trailer_bytes: int, max_trailers: int) -> Chunked:
    found = Chunked(trailers=[])
    at = 0
    while True:
        line = _line(raw, at, MAX_CHUNK_LINE)
        if not isinstance(line, bytes):
            return _stopped(found, line)
        at += len(line) + 2
        size = _chunk_size(line)
        if size is None:
            return _stopped(found, "wrong")
        if size == 0:
            break
        found.data += raw[at : at + size]
        at += size
        if raw[at : at + 2] != b"\r\n":
            return _stopped(found, "short" if b"\r\n".startswith(raw[at:]) else "wrong")
        at += 2
    left = max_trailer_bytes
    while True:
        line = _line(raw, at, left)
        if not isinstance(line, bytes):
            return _stopped(found, line)
        at += len(line) + 2
        if not line:
            found.state, found.rest = "whole", raw[at:]
            return found
        name, colon, value = line.partition(b":")
        left -= len(line)
        sound = colon and _is_token(name) and all((byte >= 0x20 and byte != 0x7F) or byte == 0x09 for byte in value)
        if not sound or left <= 0 or len(found.trailers) >= max_trailers:
            return _stopped(found, "wrong")
        found.trailers.append((name.lower(), value.strip(b" \t")))


def _stopped(found: Chunked, state: str) -> Chunked:
    found.state = state
    found.trailers = []
    return found


def _line(raw: bytes, at: int, limit: int) -> bytes | str:
    """The line at a place, without its end; "short" where it goes on, "wrong" where it is too long or has no CR."""
    end = raw.find(b"\n", at, at + limit)
    if end < 0:
        return "wrong" if len(raw) - at >= limit else "short"
    return raw[at : end - 1] if end > at and raw[end - 1] == 0x0D else "wrong"


def _chunk_size(line: bytes) -> int | None:
    """The size in `size *( BWS ";" BWS name [ "=" ( token / quoted ) ] )`; quoted strings without escapes."""
    at = 0
    while at < len(line) and line[at] in _HEX:
        at += 1
    if not 1 <= at <= 15:
        return None
    size = int(line[:at], 16)
    while at < len(line):
        at = _skip(line, at, b" \t")
        if line[at : at + 1] != b";":
            return None
        at = _skip(line, at + 1, b" \t")
        end = _skip(line, at, TOKEN)
        if end == at:
            return None
        at = end
        if line[at : at + 1] == b"=":
            if line[at + 1 : at + 2] == b'"':
                end = line.find(b'"', at + 2)
                inside = line[at + 2 : end]
                if end < 0 or any((byte < 0x20 and byte != 0x09) or byte in b"\x7f\\" for byte in inside):
                    return None
                at = end + 1
            else:
                end = _skip(line, at + 1, TOKEN)
                if end == at + 1:
                    return None
                at = end
    return size


def _skip(line: bytes, at: int, kind: bytes) -> int:
    while at < len(line) and line[at] in kind:
        at += 1
    return at
