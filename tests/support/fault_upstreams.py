"""Upstreams that note what reached them, and misbehave when they are told to.

Every answer names the request that it answers and repeats its body, so that an answer that was cut, mixed up or put together
of two cannot be taken for the right one. Answers come in several pieces, so that there is an I/O in their middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from hyperframe.frame import Frame

from sidecar.wire.network import Stream
from support.flow import H2Agent
from support.h2_frames import DataFrame, GoAwayFrame, Message, Peer, RstStreamFrame

GONE = (EOFError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
PAUSE = 0.01
WELCOME, BYE = b"welcome.", b"bye."
_ENABLE_CONNECT_PROTOCOL = 8
CANCEL, REFUSED_STREAM = 8, 7


class Garbled(Exception):
    """What came is no HTTP/1.1 as it is spoken here."""


def answer_body(method: str, path: str, body: bytes) -> bytes:
    """What an upstream answers: long enough for several pieces."""
    filler = b"-" * (200_000 if path.startswith("/large") else 40)
    return f"{method} {path} said ".encode() + body + filler


def tunnel_answer(words: bytes) -> bytes:
    """What comes out of a tunnel into which these words were said."""
    return WELCOME + words.upper() + BYE


@dataclass
class Arrival:
    """A request whose head has reached an upstream."""

    method: str
    path: str
    whole: bool = False
    body: bytes = b""


@dataclass
class TunnelEnd:
    """What came through a tunnel to its upstream's end, and whether that ended in order: None while it is open."""

    path: str
    received: bytes = b""
    clean: bool | None = None


class Reader:
    """Strict HTTP/1.1 from a stream. Raises EOFError for what is not whole."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def some(self) -> bytes:
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            return data
        return await self._stream.receive_some()

    async def head(self) -> tuple[str, dict[str, str]] | None:
        """First line and fields; None where the stream ended before there was any."""
        try:
            line, *lines = (await self._until(b"\r\n\r\n")).decode().split("\r\n")
        except EOFError:
            if self._buffer:
                raise
            return None
        return line, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    async def body(self, fields: dict[str, str], *, needs_length: bool) -> bytes:
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self._until(b"\r\n"), 16):
                body += await self._exactly(size)
                if await self._until(b"\r\n"):
                    raise Garbled("a chunk is longer than its size")
            while await self._until(b"\r\n"):
                pass
            return body
        if "content-length" in fields:
            return await self._exactly(int(fields["content-length"]))
        if needs_length:
            raise Garbled("an answer without a length")
        return b""

    async def _more(self) -> None:
        self._buffer += await self._stream.receive_some() or ended()

    async def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            await self._more()
        return self._taken(at + len(mark))[:at]

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        return self._taken(size)

    def _taken(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def ended() -> bytes:
    raise EOFError


class H1Upstream:
    """A raw HTTP/1.1 server."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.tunnels: list[TunnelEnd] = []
        self.busy = 0
        self._streams: list[Stream] = []

    async def serve(self, stream: Stream) -> None:
        self._streams.append(stream)
        reader = Reader(stream)
        try:
            while (head := await reader.head()) is not None:
                self.busy += 1
                try:
                    kept = await self._one(stream, reader, *head)
                finally:
                    self.busy -= 1
                if not kept:
                    return
        except GONE:
            pass
        finally:
            stream.close()

    def desert(self) -> None:
        """Close every connection, in order."""
        for stream in self._streams:
            stream.close()

    async def _one(self, stream: Stream, reader: Reader, line: str, fields: dict[str, str]) -> bool:
        method, path, _ = line.split(" ")
        arrival = Arrival(method, path)
        self.arrivals.append(arrival)
        if "upgrade" in fields:
            arrival.whole = True
            await self._tunnel(stream, reader, path, fields["upgrade"])
            return False
        arrival.body = await reader.body(fields, needs_length=False)
        arrival.whole = True
        await self._answer(stream, arrival)
        return True

    async def _answer(self, stream: Stream, request: Arrival) -> None:
        body = answer_body(request.method, request.path, request.body)
        half = len(body) // 2
        if request.method == "POST":
            await stream.send_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
            await trio.sleep(PAUSE)
            await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%b" % _chunk(body[:half]))
            await trio.sleep(PAUSE)
            await stream.send_all(b"%b0\r\nx-sum: %d\r\n\r\n" % (_chunk(body[half:]), len(body)))
        else:
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body[:half]))
            await trio.sleep(PAUSE)
            await stream.send_all(body[half:])

    async def _tunnel(self, stream: Stream, reader: Reader, path: str, token: str) -> None:
        """Welcome, repeat in capitals what comes, and at its end say goodbye and end too."""
        end = TunnelEnd(path)
        self.tunnels.append(end)
        head = f"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {token}\r\n\r\n".encode()
        try:
            await stream.send_all(head + WELCOME)
            while data := await reader.some():
                end.received += data
                await stream.send_all(data.upper())
            end.clean = True
            await trio.sleep(PAUSE)
            await stream.send_all(BYE)
            await stream.send_eof()
        finally:
            end.clean = bool(end.clean)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class H2Upstream(H2Agent):
    """A raw HTTP/2 server, that lets itself be asked for tunnels too (RFC 8441)."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {_ENABLE_CONNECT_PROTOCOL: 1}
        self.at_head = self._answer_at_head
        self.tunnels: list[TunnelEnd] = []
        self.busy = 0
        self.disowned: set[str] = set()
        """Paths of requests that it has reset or refused."""
        self._refused: set[tuple[int, int]] = set()
        """What it has said that it has not acted on, and will not: nobody may hold that against a second sending."""
        self._last: dict[int, int] = {}
        """Of a connection that it is leaving: the last stream that it will serve."""
        self._answering: dict[tuple[int, int], tuple[Peer, Message]] = {}
        self._begun: set[tuple[int, int]] = set()

    @property
    def arrivals(self) -> list[Arrival]:
        """Those that it has acted on, or may have."""
        found = []
        for peer in self.peers:
            for number, message in peer.messages.items():
                if number and message.heads and not self._is_refused(peer, number):
                    fields = dict(message.heads[0])
                    method, path = fields[b":method"].decode(), fields[b":path"].decode()
                    found.append(Arrival(method, path, message.ended, message.body))
        return found

    def _is_refused(self, peer: Peer, number: int) -> bool:
        return (id(peer), number) in self._refused or number > self._last.get(id(peer), number)

    def desert(self) -> None:
        for peer in self.peers:
            peer.stream.close()

    def goaway(self) -> None:
        """Take nothing new on any connection, and finish what has come."""
        for peer in self.peers:
            if not peer.frames:
                continue  # it has not said its SETTINGS, which come first
            self._last[id(peer)] = last = max(peer.messages, default=0)
            send_now(peer, GoAwayFrame(0, last_stream_id=last))

    def reset(self) -> None:
        self._disown(CANCEL, answered=True)

    def refuse(self) -> None:
        self._disown(REFUSED_STREAM, answered=False)

    def _disown(self, code: int, *, answered: bool) -> None:
        """Reset the first open stream; `answered`: also one whose answer has begun."""
        for key, (peer, message) in self._answering.items():
            if answered or key not in self._begun:
                self.disowned.add(dict(message.heads[0])[b":path"].decode())
                if code == REFUSED_STREAM:
                    self._refused.add(key)
                send_now(peer, RstStreamFrame(key[1], error_code=code))
                del self._answering[key]
                return

    async def _answer_at_head(self, peer: Peer, number: int) -> None:
        if self._is_refused(peer, number):
            return
        key, message = (id(peer), number), peer.messages[number]
        fields = dict(message.heads[0])
        self._answering[key] = peer, message
        self.busy += 1
        try:
            if b":protocol" in fields:
                await self._tunnel(peer, number, fields[b":path"].decode(), message)
            else:
                await self._answer_whole(peer, number, fields, message)
        except GONE:
            pass
        finally:
            self.busy -= 1
            self._answering.pop(key, None)

    async def _answer_whole(self, peer: Peer, number: int, fields: dict[bytes, bytes], message: Message) -> None:
        while not message.ended:
            if message.reset is not None or (id(peer), number) not in self._answering or peer.stream.closed:
                return
            await trio.sleep(PAUSE)
        body = answer_body(fields[b":method"].decode(), fields[b":path"].decode(), message.body)
        half = len(body) // 2
        grpc = fields.get(b"content-type", b"").startswith(b"application/grpc")
        head = [(b":status", b"200"), *([(b"content-type", b"application/grpc")] if grpc else [])]
        trailers = [(b"grpc-status", b"0") if grpc else (b"x-sum", b"1")]
        # Headers are encoded when they are sent, and in that order: the compression has a state.
        for frame in (
            lambda: peer.head(number, head),
            lambda: DataFrame(number, data=body[:half]),
            lambda: DataFrame(number, data=body[half:]),
            lambda: peer.head(number, trailers, end=True),
        ):
            if message.reset is not None or (id(peer), number) not in self._answering:
                return
            self._begun.add((id(peer), number))
            await peer.send(frame())
            await trio.sleep(PAUSE)

    async def _tunnel(self, peer: Peer, number: int, path: str, message: Message) -> None:
        end = TunnelEnd(path)
        self.tunnels.append(end)
        self._begun.add((id(peer), number))
        try:
            await peer.send(peer.head(number, [(b":status", b"200")]), DataFrame(number, data=WELCOME))
            while message.reset is None and not peer.stream.closed and (id(peer), number) in self._answering:
                said = message.body[len(end.received) :]
                end.received += said
                if said:
                    await peer.send(DataFrame(number, data=said.upper()))
                elif message.ended:
                    end.clean = True
                    await trio.sleep(PAUSE)
                    await peer.send(DataFrame(number, data=BYE, flags=["END_STREAM"]))
                    return
                await trio.sleep(PAUSE)
        finally:
            end.clean = bool(end.clean)


def send_now(peer: Peer, frame: Frame) -> None:
    """Send a small frame without waiting, in the middle of whatever happens."""
    try:
        if not peer.stream.closed:
            peer.stream._send(frame.serialize())
    except OSError:
        pass
