"""Load of every kind, each request with an id of its own: servers count what reaches them, clients what comes back.

A request is lost unless its whole answer comes back with status 200 and that id, and duplicated where the servers saw its id
twice. No client tries anything again, but for what HTTP/2 says was not acted on: a stream that is refused, or above the last
one that a GOAWAY names (RFC 9113 §6.8, §8.7). These are counted apart.
"""

from __future__ import annotations

import itertools
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import trio

from support.live import HOST

BODY = b"x" * 3000
SLOW_PIECES = 10
SLOW_SECONDS = 1.5

Stream = trio.abc.Stream
Connect = Callable[[], Awaitable[Stream]]


@dataclass
class Tally:
    """What became of the requests."""

    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """Streams that were said not to be acted on, and sent again."""
    lost: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    """Id → how often a server saw it."""
    stopping: bool = False
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def new(self, kind: str) -> str:
        self.sent[kind] += 1
        return f"{kind}-{next(self._ids)}"

    @property
    def duplicated(self) -> list[str]:
        return [name for name, times in self.seen.items() if times > 1]

    @property
    def unanswered(self) -> int:
        return sum(self.sent.values()) - sum(self.answered.values())

    def summary(self) -> str:
        return (
            f"{sum(self.sent.values()):,} requests sent, {len(self.lost)} lost, {len(self.duplicated)} duplicated"
            f" ({self.refused} HTTP/2 streams refused and sent again)"
        )


# ── servers ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def read_head(stream: Stream, buffer: bytearray) -> bytes | None:
    while b"\r\n\r\n" not in buffer:
        data = await stream.receive_some(65536)
        if not data:
            return None
        buffer += data
    head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
    buffer[:] = rest
    return head


async def read_exactly(stream: Stream, buffer: bytearray, size: int) -> bytes:
    while len(buffer) < size:
        data = await stream.receive_some(65536)
        if not data:
            raise EOFError("cut short")
        buffer += data
    data = bytes(buffer[:size])
    del buffer[:size]
    return data


async def read_chunked(stream: Stream, buffer: bytearray) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in buffer:
            data = await stream.receive_some(65536)
            if not data:
                raise EOFError("cut short")
            buffer += data
        line, _, rest = bytes(buffer).partition(b"\r\n")
        buffer[:] = rest
        size = int(line, 16)
        body += (await read_exactly(stream, buffer, size + 2))[:size]
        if not size:
            return body


def header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def server(tally: Tally) -> Callable[[Stream], Awaitable[None]]:
    """Answers each request with the id at the end of its path, and counts it."""

    async def serve(stream: Stream) -> None:
        buffer = bytearray()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, EOFError, ssl.SSLError):
            async with stream:
                while (head := await read_head(stream, buffer)) is not None:
                    path = head.split(b" ", 2)[1].decode()
                    name = path.rpartition("/")[2]
                    tally.seen[name] += 1
                    if header(head, b"transfer-encoding"):
                        await read_chunked(stream, buffer)
                    else:
                        await read_exactly(stream, buffer, int(header(head, b"content-length") or 0))
                    if path.startswith("/slow"):
                        await _slowly(stream, name)
                    else:
                        body = name.encode()
                        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    return serve


async def _slowly(stream: Stream, name: str) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(SLOW_PIECES):
        await stream.send_all(b"1\r\n.\r\n")
        await trio.sleep(SLOW_SECONDS / SLOW_PIECES)
    await stream.send_all(b"%x\r\n%b\r\n0\r\n\r\n" % (len(name), name.encode()))


# ── clients ───────────────────────────────────────────────────────────────────────────────────────────────────────


def request(name: str, *, path: str = "/r", method: str = "GET", close: bool = False) -> bytes:
    body = BODY if method == "POST" else b""
    length = f"content-length: {len(body)}\r\n" if body else ""
    ending = "connection: close\r\n" if close else ""
    return f"{method} {path}/{name} HTTP/1.1\r\nhost: {HOST}\r\n{length}{ending}\r\n".encode() + body


async def ask(stream: Stream, buffer: bytearray, tally: Tally, name: str, data: bytes) -> bool:
    """Send one request and read its answer. Returns whether the connection may carry another."""
    kind = name.partition("-")[0]
    try:
        await stream.send_all(data)
        head = await read_head(stream, buffer)
        if head is None:
            raise EOFError("the connection ended without an answer")
        length = header(head, b"content-length")
        body = await read_chunked(stream, buffer) if length is None else await read_exactly(stream, buffer, int(length))
        if not head.startswith(b"HTTP/1.1 200 ") or not body.endswith(name.encode()):
            raise EOFError(f"answered {head[:80]!r} {body[:80]!r}")
    except (OSError, EOFError, trio.BrokenResourceError, ssl.SSLError) as error:
        tally.lost.append(f"{name}: {error!r}")
        return False
    tally.answered[kind] += 1
    return header(head, b"connection") != b"close"


async def keeper(
    tally: Tally, connect: Connect, kind: str, *, path: str = "/r", pause: float = 0.005, uses: int | None = None
) -> None:
    """Requests one after the other, GET and POST in turn, on a connection that is kept as long as the server keeps it."""
    methods = itertools.cycle(("GET", "POST"))
    while not tally.stopping:
        name = tally.new(kind)
        try:
            stream = await connect()
        except (OSError, trio.BrokenResourceError, ssl.SSLError) as error:
            tally.lost.append(f"{name}: connecting: {error!r}")
            await trio.sleep(0.05)
            continue
        buffer = bytearray()
        for used in itertools.count(1):
            last = used == uses
            kept = await ask(stream, buffer, tally, name, request(name, path=path, method=next(methods), close=last))
            if not kept or last or tally.stopping:
                break
            await trio.sleep(pause)
            name = tally.new(kind)
        await trio.aclose_forcefully(stream)
        await trio.sleep(pause)


async def multiplexer(tally: Tally, connect: Connect, *, streams: int = 4) -> None:
    """Over HTTP/2, with so many requests at once."""
    again: list[str] = []
    while not tally.stopping:
        try:
            stream = await connect()
        except (OSError, trio.BrokenResourceError, ssl.SSLError) as error:
            tally.lost.append(f"{tally.new('h2')}: connecting: {error!r}")
            await trio.sleep(0.05)
            continue
        again = await _H2(stream, tally, again).run(streams)


class _Patient(h2.connection.H2Connection):
    """h2's takes a GOAWAY for the end of everything, even of streams that it says will be answered (RFC 9113 §6.8)."""

    def _receive_goaway_frame(self, frame: Any) -> Any:
        before = self.state_machine.state
        result = super()._receive_goaway_frame(frame)
        self.state_machine.state = before
        return result


class _H2:
    """One connection. Ends with a GOAWAY and the last answer, and returns what was not acted on."""

    def __init__(self, stream: Stream, tally: Tally, again: list[str]) -> None:
        self._stream = stream
        self._tally = tally
        self._again = again
        self._connection = _Patient(h2.config.H2Configuration(header_encoding=None))
        self._open: dict[int, str] = {}
        self._bodies: Counter[int] = Counter()
        self._answers: dict[int, bytes] = {}
        self._leaving = False
        self._methods = itertools.cycle((b"GET", b"POST"))

    async def run(self, streams: int) -> list[str]:
        refused: list[str] = []
        self._connection.initiate_connection()
        try:
            async with self._stream:
                while True:
                    while len(self._open) < streams and not self._leaving and not self._tally.stopping:
                        self._begin()
                    await self._flush()
                    if not self._open:
                        break
                    data = await self._stream.receive_some(65536)
                    if not data:
                        raise EOFError("the connection ended")
                    for event in self._connection.receive_data(data):
                        self._take(event, refused)
        except (OSError, EOFError, trio.BrokenResourceError, ssl.SSLError, h2.exceptions.ProtocolError) as error:
            self._tally.lost += [f"{name}: {error!r}" for name in self._open.values()]
        self._tally.refused += len(refused)
        return refused + self._again

    def _begin(self) -> None:
        name = self._again.pop() if self._again else self._tally.new("h2")
        stream_id, method = self._connection.get_next_available_stream_id(), next(self._methods)
        fields = [
            (b":method", method), (b":scheme", b"https"), (b":authority", HOST.encode()), (b":path", f"/r/{name}".encode()),
        ]  # fmt: skip
        self._connection.send_headers(stream_id, fields, end_stream=method == b"GET")
        if method == b"POST":
            self._connection.send_data(stream_id, BODY, end_stream=True)
        self._open[stream_id] = name
        self._answers[stream_id] = b""

    async def _flush(self) -> None:
        if data := self._connection.data_to_send():
            await self._stream.send_all(data)

    def _take(self, event: Any, refused: list[str]) -> None:
        match event:
            case h2.events.ResponseReceived():
                self._answers[event.stream_id] = dict(event.headers)[b":status"] + b" "
            case h2.events.DataReceived():
                self._answers[event.stream_id] += event.data
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                name, answer = self._open.pop(event.stream_id), self._answers.pop(event.stream_id)
                if answer == f"200 {name}".encode():
                    self._tally.answered["h2"] += 1
                else:
                    self._tally.lost.append(f"{name}: answered {answer[:80]!r}")
            case h2.events.StreamReset(error_code=7):
                refused.append(self._open.pop(event.stream_id))
            case h2.events.StreamReset():
                self._tally.lost.append(f"{self._open.pop(event.stream_id)}: reset with {event.error_code}")
            case h2.events.ConnectionTerminated():
                self._leaving = True
                last = event.last_stream_id or 0
                refused += [self._open.pop(stream_id) for stream_id in list(self._open) if stream_id > last]
