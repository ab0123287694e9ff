"""Raw callers, in HTTP/1.1 and HTTP/2: they send what a case says, read strictly, and then ask once more on the same connection."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from corpus.case import Pair
from corpus.upstreams import frames_in

PATIENCE = 5.0
"""Seconds without a byte after which a connection counts as hung."""


@dataclass(slots=True)
class Reply:
    """One final answer. `whole`: its end came, and came as it should."""

    status: int
    fields: list[Pair] = field(default_factory=list)
    body: bytes = b""
    trailers: list[Pair] = field(default_factory=list)
    whole: bool = False
    faults: list[str] = field(default_factory=list)
    stream: int = 0

    @property
    def closes(self) -> bool:
        return any(name == b"connection" and b"close" in value.lower() for name, value in self.fields)


@dataclass(slots=True)
class Got:
    """What became of a case, as its caller sees it."""

    replies: list[Reply] = field(default_factory=list)
    end: str = "open"
    """`open`, `closed` (with close_notify, over TLS), `broken` (without, or by a reset), `hung` (nothing came in time)."""
    next: Reply | None = None
    """The answer to the good request that was sent behind the case, if the connection was still open."""
    raw: bytes = b""
    resets: int = 0
    fault: str = ""


class H1Caller:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.end = "open"
        self.raw = b""

    def send(self, data: bytes) -> None:
        with suppress(OSError):
            self.sock.sendall(data)

    def more(self) -> bool:
        self.sock.settimeout(PATIENCE)
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            self.end = "hung"
        except (OSError, ssl.SSLError):
            self.end = "broken"
        else:
            self.buffer += data
            self.raw += data
            self.end = self.end if data else "closed"
            return bool(data)
        return False

    def line_end(self, what: bytes) -> int:
        """Index of `what` in the buffer, reading until it is there; -1 where it never comes."""
        while (at := self.buffer.find(what)) < 0:
            if not self.more():
                return -1
        return at

    def reply(self, *, head_only: bool) -> Reply | None:
        """The next final answer, or None where the connection ends before its head."""
        while True:
            at = self.line_end(b"\r\n\r\n")
            if at < 0:
                return None
            head, self.buffer = self.buffer[: at + 4], self.buffer[at + 4 :]
            reply = _h1_head(head)
            if reply.status >= 200 or reply.status == 101:
                break
            if reply.faults:
                return reply
        lengths = [value for name, value in reply.fields if name == b"content-length"]
        codings = [value for name, value in reply.fields if name == b"transfer-encoding"]
        if head_only or reply.status in (101, 204, 304):
            reply.whole = True
        elif codings:
            self._chunked(reply)
        elif lengths:
            size = int(lengths[0])
            while len(self.buffer) < size and self.more():
                pass
            reply.body, self.buffer = self.buffer[:size], self.buffer[size:]
            reply.whole = len(reply.body) == size
        else:
            while self.more():
                pass
            reply.body, self.buffer = self.buffer, b""
            reply.whole = self.end == "closed"
        return reply

    def _chunked(self, reply: Reply) -> None:
        while (at := self.line_end(b"\r\n")) >= 0:
            line, self.buffer = self.buffer[:at], self.buffer[at + 2 :]
            if not re.fullmatch(rb"[0-9a-fA-F]+", line):
                reply.faults.append(f"a strange chunk size {line[:40]!r}")
                return
            size = int(line, 16)
            if not size:
                while (at := self.line_end(b"\r\n")) > 0:
                    name, _, value = self.buffer[:at].partition(b":")
                    reply.trailers.append((name.lower(), value.strip()))
                    self.buffer = self.buffer[at + 2 :]
                reply.whole = at == 0
                self.buffer = self.buffer[2:] if at == 0 else self.buffer
                return
            while len(self.buffer) < size + 2 and self.more():
                pass
            reply.body += self.buffer[:size]
            if self.buffer[size : size + 2] != b"\r\n":
                return
            self.buffer = self.buffer[size + 2 :]


def _h1_head(head: bytes) -> Reply:
    line, _, rest = head.partition(b"\r\n")
    match = re.match(rb"HTTP/1\.1 ([1-5][0-9]{2}) ", line)
    fields = [
        (name.strip().lower(), value.strip())
        for name, _, value in (one.partition(b":") for one in rest.split(b"\r\n") if one)
    ]
    reply = Reply(int(match[1]) if match else 0, fields)
    names = [name for name, _ in fields]
    if match is None or re.search(rb"[^\r]\n|\r[^\n]|\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head):
        reply.faults.append(f"a strange head {head[:80]!r}")
    if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        reply.faults.append("framed twice")
    return reply


def call_h1(
    sock: socket.socket,
    sent: bytes,
    *,
    wanted: int,
    following: bytes | None,
    half: bool = False,
    pause: Callable[[], object] = bool,
) -> Got:
    """Send, read as many answers as are wanted (fewer where one refuses), and ask `following` if the connection
    goes on, after `pause`.
    """
    caller, got = H1Caller(sock), Got()
    caller.send(sent)
    if half:
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_WR)
    head_only = sent.startswith(b"HEAD ")
    while len(got.replies) < wanted:
        reply = caller.reply(head_only=head_only)
        if reply is None:
            break
        head_only = False
        got.replies.append(reply)
        if reply.closes or not reply.whole or reply.status == 101:
            break
    last = got.replies[-1] if got.replies else None
    if last is not None and last.status == 101:
        while caller.more():
            pass
        last.body = caller.buffer
    elif caller.end == "open" and (last is None or last.closes or not last.whole or half):
        while caller.more():
            pass
        if caller.buffer and got.replies:
            got.fault = f"more behind the last answer: {caller.buffer[:60]!r}"
    elif caller.end == "open" and following is not None:
        pause()
        caller.send(following)
        got.next = caller.reply(head_only=False)
    got.end, got.raw = caller.end, caller.raw
    return got


# ── HTTP/2 ────────────────────────────────────────────────────────────────────────────────────────────────────────

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize() + WindowUpdateFrame(0, 1 << 24).serialize()
_NEXT_STREAM = 1001


def call_h2(
    sock: socket.socket,
    sent: bytes,
    *,
    streams: int,
    following: Callable[[int], bytes] | None,
    half: bool = False,
    pause: Callable[[], object] = bool,
) -> Got:
    """Send frames, read until as many streams as are expected have ended, and ask once more on another stream."""
    got = Got()
    connection = _H2(sock, got)
    connection.send(PREFACE + sent)
    if half:
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_WR)
    connection.until(lambda: len(connection.over) >= streams)
    goes_on = got.end == "open" and not half and not connection.leaving
    if goes_on and following is not None:
        pause()
        connection.send(following(_NEXT_STREAM))
        connection.until(lambda: _NEXT_STREAM in connection.over)
        got.next = connection.replies.pop(_NEXT_STREAM, None)
    elif got.end == "open" and not goes_on:
        connection.until(lambda: False)
    got.replies = [connection.replies[stream] for stream in sorted(connection.replies)]
    return got


class _H2:
    def __init__(self, sock: socket.socket, got: Got) -> None:
        self.sock = sock
        self.got = got
        self.decoder = hpack.Decoder()
        self.replies: dict[int, Reply] = {}
        self.over: set[int] = set()
        self.leaving = False
        self.block = b""
        self.ends = False
        self.rest = b""

    def send(self, data: bytes) -> None:
        with suppress(OSError):
            self.sock.sendall(data)

    def until(self, done: Callable[[], bool]) -> None:
        self.sock.settimeout(PATIENCE)
        while not done():
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                self.got.end = "hung"
                return
            except (OSError, ssl.SSLError):
                self.got.end = "broken"
                return
            if not data:
                self.got.end = "closed"
                return
            self.got.raw += data
            self.rest += data
            for frame in (taken := list(frames_in(self.rest))):
                self.rest = self.rest[9 + frame.body_len :]
            for frame in taken:
                self.take(frame)

    def take(self, frame: object) -> None:
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            self.block += frame.data
            self.ends = self.ends or "END_STREAM" in frame.flags
            if "END_HEADERS" in frame.flags:
                fields = [(bytes(name), bytes(value)) for name, value in self.decoder.decode(self.block, raw=True)]
                ends, self.block, self.ends = self.ends, b"", False
                self.head(frame.stream_id, fields)
                if ends:
                    self.end(frame.stream_id)
        elif isinstance(frame, DataFrame):
            reply = self.replies.get(frame.stream_id)
            if reply is not None:
                reply.body += frame.data
            if "END_STREAM" in frame.flags:
                self.end(frame.stream_id)
        elif isinstance(frame, RstStreamFrame):
            if frame.stream_id not in self.over:
                self.got.resets += 1
            self.over.add(frame.stream_id)
        elif isinstance(frame, GoAwayFrame):
            self.leaving = self.leaving or frame.error_code != 0
        elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.send(SettingsFrame(0, flags=["ACK"]).serialize())

    def head(self, stream: int, fields: list[Pair]) -> None:
        reply = self.replies.get(stream)
        if reply is not None:
            reply.trailers = fields
            return
        status = [value for name, value in fields if name == b":status"]
        reply = Reply(int(status[0]) if status else 0, fields, stream=stream)
        names = [name for name, _ in fields]
        if (
            len(status) != 1
            or names.index(b":status")
            or any(name[:1] == b":" and name != b":status" for name in names)
        ):
            reply.faults.append("strange pseudo-fields")
        for name, value in fields:
            if not re.fullmatch(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+", name) or re.search(
                rb"[\x00-\x08\x0a-\x1f\x7f]", value
            ):
                reply.faults.append(f"a strange field {name[:40]!r}")
            if name in (b"connection", b"transfer-encoding", b"upgrade", b"keep-alive", b"proxy-connection"):
                reply.faults.append("a connection-specific field")
        if reply.status >= 200 or reply.faults:
            self.replies[stream] = reply

    def end(self, stream: int) -> None:
        reply = self.replies.get(stream)
        if reply is not None:
            reply.whole = True
            stated = [value for name, value in reply.fields if name == b"content-length"]
            if stated and reply.body and stated != [b"%d" % len(reply.body)]:
                reply.faults.append("a length that is not the body's")
        self.over.add(stream)
