"""What a case of the corpus is: bytes that a careful server must doubt, and what may become of them.

The theory is one sentence: a message is refused, or it is passed on with one meaning. `Outcome` is that sentence in
numbers: which answers the caller gets, which requests reach the upstream whole, and whether the connection ends. A case
names every outcome that will do. Mostly that is one; where RFC 9110, 9112 or 9113 leave the choice it is two, and
where they leave it to the stricter reader it is the stricter one.

Cases are written once and run on several sides (`sides`). They say `k-00000` for a mark of their own, `backend.internal`
for the host and `https` for the scheme of the connection; each side puts its own in their places, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import hpack

MARK = b"k-00000"
"""Stands in paths and in X-Case, and is replaced by the case's own mark. No letter of it is hexadecimal or base64."""
HOST = b"backend.internal"
Pair = tuple[bytes, bytes]
Fields = tuple[Pair, ...]


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One thing that may become of a case."""

    answers: tuple[frozenset[int], ...]
    """For each final answer, in order, the statuses that will do."""
    arrived: tuple[bytes, ...] = ()
    """The bodies of the requests that reach the upstream whole, in order."""
    trailers: frozenset[Pair] = frozenset()
    """Of the last of them."""
    ends: bool | None = None
    """Whether the connection must end with it (True), must serve another request (False), or may do either."""
    cut: bool = False
    """Whether a part of the request may have reached the upstream, as a message that everybody sees is not whole."""
    silent: bool = False
    """Whether an abort will do instead of the answer (h1: the connection breaks off; h2: reset or GOAWAY)."""


Expect = tuple[Outcome, ...]


def refused(*statuses: int, ends: bool | None = True, cut: bool = False, silent: bool = False) -> Expect:
    """Answered with one of `statuses`; nothing reaches the upstream (with `cut`: nothing whole)."""
    return (Outcome(answers=(frozenset(statuses),), ends=ends, cut=cut, silent=silent),)


def declined(*statuses: int) -> Expect:
    """Refused, though there is no doubt where it ends: the connection may go on."""
    return refused(*statuses, ends=None)


def reset(*statuses: int, cut: bool = False) -> Expect:
    """h2: the stream is reset, the connection ends, or an answer says why."""
    return refused(*(statuses or (400,)), ends=None, cut=cut, silent=True)


def passed(*bodies: bytes, trailers: Iterable[Pair] = (), ends: bool | None = None, status: int = 200) -> Expect:
    """Each body arrives as one request of its own, and is answered."""
    arrived = bodies or (b"",)
    return (
        Outcome(
            answers=(frozenset({status}),) * len(arrived), arrived=arrived, trailers=frozenset(trailers), ends=ends
        ),
    )


def unanswered(*bodies: bytes) -> Expect:
    """Each body arrived as one request; the connection ended before it was answered."""
    return (Outcome(answers=(), arrived=bodies or (b"",)),)


def mixed(*statuses: int | tuple[int, ...], arrived: Iterable[bytes], ends: bool | None = None) -> Expect:
    """Several requests of one case that fare differently."""
    answers = tuple(frozenset(one if isinstance(one, tuple) else (one,)) for one in statuses)
    return (Outcome(answers=answers, arrived=tuple(arrived), ends=ends),)


# ── cases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 1) -> bytes:
    """A frame of HTTP/2 as its bytes (RFC 9113 §4.1). A library would not let most of those out that stand here."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


@dataclass(frozen=True, slots=True)
class Head:
    """A HEADERS frame that no library would let out. Nothing is indexed, so that each block stands alone."""

    fields: tuple[Pair, ...]
    end: bool = True
    stream: int = 1
    pieces: int = 1
    """Into how many frames (CONTINUATION) the block is cut."""
    padding: int = 0

    def wire(self, said: Callable[[bytes, bytes], bytes]) -> bytes:
        """`said`: what the side puts in the place of a value, given the field's name."""
        fields = [hpack.NeverIndexedHeaderTuple(name, said(name, value)) for name, value in self.fields]
        block = hpack.Encoder().encode(fields, huffman=False)
        step = max(1, -(-len(block) // self.pieces))
        parts = [block[at : at + step] for at in range(0, len(block), step)] or [b""]
        flags = (END_STREAM if self.end else 0) | (PADDED if self.padding else 0)
        if self.padding:
            parts[0] = bytes([self.padding]) + parts[0] + bytes(self.padding)
        last = len(parts) - 1
        return b"".join(
            frame(CONTINUATION if at else HEADERS, part, flags=(0 if at else flags) | (END_HEADERS if at == last else 0), stream=self.stream)
            for at, part in enumerate(parts)
        )  # fmt: skip


Frames = tuple[Head | bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is sent, as bytes (HTTP/1.1) or as frames (HTTP/2), and what may become of it."""

    sent: bytes | Frames
    expect: Expect
    on: Mapping[str, Expect] = field(default_factory=dict)
    """Where a side (`in-h1`) or a direction (`in`, `out`) expects something else."""
    half: bool = False
    """Whether the caller ends its side of the connection behind it."""
    quits: bool = False
    """Whether the caller (h2) has reset its stream, and waits for nothing on it."""
    server_name: str | None = HOST.decode()
    """What the handshake asks for, where there is one."""

    def expected(self, side: str) -> Expect:
        return self.on.get(side) or self.on.get(side.partition("-")[0]) or self.expect


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an upstream says to a good request, and what its caller may see of it.

    `said` are parts: bytes to send, seconds to wait, and how to end. For an h2 upstream the frames are of stream 1,
    and a `Head` may stand among them.
    """

    said: Sequence[bytes | float | Head | End]
    expect: Sequence[Seen]
    on: Mapping[str, Sequence[Seen]] = field(default_factory=dict)
    asked: bytes = b""
    """The request, as of HTTP/1.1; empty: a GET."""
    early: bool = False
    """Whether the upstream answers as soon as it has the head of the request."""
    repeats: bool = False
    """Whether the upstream may be asked again: nothing of an answer came, on a connection that had been used before."""

    def expected(self, side: str) -> Sequence[Seen]:
        return self.on.get(side) or self.on.get(side.partition("-")[0]) or self.expect


@dataclass(frozen=True, slots=True)
class End:
    """How an upstream leaves: `end` says so (close_notify over TLS), `drop` does not, `reset` breaks off."""

    how: str = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An answer as its caller may see it. `whole` False: begun, and broken off so that nobody takes it for the end."""

    status: int
    body: bytes | None = None
    """None: whatever it is (our own answers)."""
    trailers: frozenset[Pair] = frozenset()
    whole: bool = True
    absent: frozenset[bytes] = frozenset()
    """Names that must not be among its fields."""
    present: frozenset[bytes] = frozenset()


BAD = (Seen(status=502),)
"""The upstream's answer had no single meaning: ours instead."""


def good(body: bytes | None = b"", status: int = 200, **more: object) -> tuple[Seen, ...]:
    return (replace(Seen(status=status, body=body), **more),)  # type: ignore[arg-type]


def broken(status: int = 200) -> tuple[Seen, ...]:
    return (Seen(status=status, whole=False),)


# ── how cases are written ─────────────────────────────────────────────────────────────────────────────────────────

Cases = Iterator[tuple[str, Case]]
Answers = Iterator[tuple[str, Answer]]

SMUGGLED = b"GET /k-00000/smuggled HTTP/1.1\r\nHost: backend.internal\r\nX-Case: k-00000\r\n\r\n"
"""What must never arrive: it stands behind each doubt."""
NEXT = b"GET /k-00000/next HTTP/1.1\r\nHost: backend.internal\r\nX-Case: k-00000\r\n\r\n"
"""What must arrive, as a request of its own."""


def get(
    fields: bytes = b"", *, line: bytes = b"GET /k-00000 HTTP/1.1", host: bytes = b"Host: backend.internal\r\n"
) -> bytes:
    return line + b"\r\n" + host + b"X-Case: k-00000\r\n" + fields + b"\r\n"


def post(fields: bytes, body: bytes = b"", *, version: bytes = b"HTTP/1.1") -> bytes:
    return get(fields, line=b"POST /k-00000 " + version) + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", body)


USUAL: tuple[Pair, ...] = (
    (b":method", b"POST"), (b":scheme", b"https"), (b":authority", HOST), (b":path", b"/k-00000"), (b"x-case", MARK),
)  # fmt: skip


def usual(*more: Pair, **changed: bytes | None) -> tuple[Pair, ...]:
    """The usual head of an h2 request with pseudo-fields changed (None: left out) and fields added."""
    fields = [(name, changed.get(name[1:].decode(), value)) for name, value in USUAL]
    return (*((name, value) for name, value in fields if value is not None), *more)


def data(content: bytes, *, end: bool = True, stream: int = 1, padding: int | None = None) -> bytes:
    flags = (END_STREAM if end else 0) | (0 if padding is None else PADDED)
    return frame(
        DATA, content if padding is None else bytes([padding]) + content + bytes(padding), flags=flags, stream=stream
    )


def one(fields: Fields) -> Frames:
    return (Head(fields),)


def with_body(fields: Fields, *frames: bytes) -> Frames:
    return (Head(fields, end=False), *frames)


def with_trailers(fields: Fields, trailers: Fields, body: bytes = b"a") -> Frames:
    return (Head(fields, end=False), data(body, end=False), Head(trailers))


def rst(code: int, *, stream: int = 1) -> bytes:
    return frame(RST_STREAM, code.to_bytes(4), stream=stream)


def window(increment: int, *, stream: int = 0) -> bytes:
    return frame(WINDOW_UPDATE, increment.to_bytes(4), stream=stream)


def goaway(last: int, code: int = 0) -> bytes:
    return frame(GOAWAY, last.to_bytes(4) + code.to_bytes(4), stream=0)


CONTROLS = {
    "nul": b"\0", "soh": b"\x01", "bell": b"\x07", "backspace": b"\x08", "vtab": b"\x0b", "formfeed": b"\x0c",
    "cr": b"\r",
    "lf": b"\n", "escape": b"\x1b", "us": b"\x1f", "del": b"\x7f",
}  # fmt: skip
"""Of the controls (RFC 9110 §5.5: CR, LF and NUL are the dangerous ones; the others are invalid)."""


def named(value: bytes) -> str:
    """A readable name for a value: what is no letter or digit is spelt out."""
    parts = []
    for index, byte in enumerate(value):
        around = value[index - 1 : index] + value[index + 1 : index + 2] if index else b""
        if (chr(byte).isalnum() and byte < 128) or (byte in b"-_" and len(around) == 2 and around.isalnum()):
            parts.append(chr(byte))
        else:
            parts.append(f"-{_SPELT.get(byte) or f'x{byte:02x}'}-")
    return "".join(parts).strip("-").replace("--", "-")[:80] or "empty"


_SPELT = {
    ord(" "): "sp", ord("\t"): "tab", ord("+"): "plus", ord(","): "comma", ord(";"): "semi", ord('"'): "quote", ord("-"): "minus",
    ord("_"): "underscore", ord("."): "dot", ord("/"): "slash", ord("\\"): "backslash", ord("%"): "pct", ord(":"): "colon", ord("@"): "at",
    ord("*"): "star", ord("="): "eq", ord("#"): "hash", ord("?"): "qm", ord("["): "lb", ord("]"): "rb", ord("'"): "apos", ord("\r"): "cr",
    ord("\n"): "lf", ord("\0"): "nul",
}  # fmt: skip
