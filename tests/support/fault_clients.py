"""Clients that note what they were told of each request, and whether they could take it for whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from sidecar.wire.network import Stream
from support.fault_upstreams import (
    CANCEL,
    GONE,
    PAUSE,
    WELCOME,
    Garbled,
    Reader,
    answer_body,
    ended,
    send_now,
    tunnel_answer,
)
from support.h2_frames import Peer, RstStreamFrame

PATIENCE = 40.0
"""Seconds after which a client takes it that nothing will come any more."""
WORDS = (b"one.", b"two.")
"""What is said in a tunnel."""

Dial = Callable[[], Awaitable[Stream]]
Request = tuple[str, str, bytes | None]
"""Method, path, body."""


@dataclass
class Told:
    """What a client was told of one request. `over`: it need not wait any more; `whole`: its answer ended as it should, which
    for a tunnel is a clean end of the stream.
    """

    method: str
    path: str
    want: bytes
    right: int = 200
    """The status that goes with it."""
    tunnel: bool = False
    status: int | None = None
    got: bytes = b""
    whole: bool = False
    over: bool = False
    garbled: str | None = None
    grpc_status: bytes | None = None
    sent: bytes = b""
    """Into a tunnel."""
    recanted: bool = False
    """It has reset the stream itself."""

    @property
    def well(self) -> bool:
        """Whether it has the answer of the upstream, all of it."""
        return self.whole and self.status == self.right and self.got == self.want and self.grpc_status in (None, b"0")

    def __str__(self) -> str:
        end = "whole" if self.whole else "cut short" if self.over else "still waiting"
        return f"{self.method} {self.path}: {self.status} {end} ({len(self.got)} of {len(self.want)} bytes)"


@dataclass
class H1Line:
    """Asks one thing after the other, on one connection as long as that lasts."""

    dial: Dial
    told: list[Told]
    _line: tuple[Stream, Reader] | None = field(default=None, init=False)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Told:
        told = Told(method, path, answer_body(method, path, body or b""))

        async def talk(stream: Stream, reader: Reader) -> None:
            await stream.send_all(_h1_request(method, path, body))
            await _read_answer(reader, told)

        return await self._patiently(told, talk)

    async def tunnel(self, path: str) -> Told:
        """Ask for another protocol, speak it both ways, end our side, and read on to the end of theirs."""
        told = Told("GET", path, tunnel_answer(b"".join(WORDS)), right=101, tunnel=True)

        async def talk(stream: Stream, reader: Reader) -> None:
            await stream.send_all(_h1_request("GET", path, None, "Connection: Upgrade", "Upgrade: chat"))
            if not await _read_answer(reader, told):
                return
            expected = len(WELCOME)
            for words in (*WORDS, b""):
                while len(told.got) < expected:
                    told.got += await reader.some() or ended()
                if words:
                    await stream.send_all(words)
                told.sent += words
                expected += len(words)
            await stream.send_eof()
            while data := await reader.some():
                told.got += data
            told.whole = True

        await self._patiently(told, talk)
        self.hang_up()
        return told

    async def _patiently(self, told: Told, talk: Callable[[Stream, Reader], Awaitable[None]]) -> Told:
        self.told.append(told)
        with trio.move_on_after(PATIENCE):
            try:
                if self._line is None:
                    stream = await self.dial()
                    self._line = stream, Reader(stream)
                await talk(*self._line)
            except GONE:
                pass
            except Garbled as error:
                told.garbled = str(error)
            told.over = True
        if not told.whole:
            self.hang_up(abruptly=True)
        return told

    def hang_up(self, *, abruptly: bool = False) -> None:
        if self._line is not None:
            (self._line[0].abort if abruptly else self._line[0].close)()
        self._line = None

    def recant(self) -> None:
        """A client of HTTP/1.1 cannot."""


def _h1_request(method: str, path: str, body: bytes | None, *extra: str) -> bytes:
    fields = ["Host: target.test", *extra, *(["Transfer-Encoding: chunked"] if body is not None else [])]
    head = f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(line.encode() + b"\r\n" for line in fields) + b"\r\n"
    return head if body is None else head + b"%x\r\n%b\r\n0\r\nx-sum: %d\r\n\r\n" % (len(body), body, len(body))


async def _read_answer(reader: Reader, told: Told) -> bool:
    """Note the answer. Returns whether it switches to the protocol that was asked for."""
    while (head := await reader.head()) is not None:
        line, fields = head
        status = int(line.split(" ")[1])
        if status == 101 and told.tunnel:
            told.status = status
            return True
        if status >= 200:
            told.status = status
            told.got = await reader.body(fields, needs_length=True)
            told.whole = True
            return False
    return False


@dataclass
class H2Line:
    """Asks several things at once, on one connection as long as that lasts."""

    dial: Dial
    told: list[Told]
    scheme: str
    _peer: Peer | None = field(default=None, init=False)
    _next: int = field(default=1, init=False)
    _open: dict[int, Told] = field(default_factory=dict, init=False)
    """What is being waited for, by stream."""
    _waiting: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)

    async def ask(self, *requests: Request, grpc: bool = False) -> list[Told]:
        """Send the heads of all, then their bodies, then read the answers."""
        tolds = [Told(method, path, answer_body(method, path, body or b"")) for method, path, body in requests]

        async def talk(peer: Peer) -> None:
            numbers = [self._number(told) for told in tolds]
            for number, (method, path, body) in zip(numbers, requests, strict=True):
                await peer.request(number, self._fields(method, path, grpc=grpc), end=body is None)
            for number, (_, _, body) in zip(numbers, requests, strict=True):
                if body is not None and number in self._open:
                    await peer.data(number, body[: len(body) // 2])
                    await trio.sleep(PAUSE)
                    if number in self._open:
                        await peer.data(number, body[len(body) // 2 :])
                        await peer.send(peer.head(number, [(b"x-sum", b"1")], end=True))
            while self._unanswered(peer):
                await peer.next()

        await self._patiently(tolds, talk)
        return tolds

    async def tunnel(self, path: str) -> Told:
        """Extended CONNECT (RFC 8441): speak through it both ways, end our side, read on to the end of theirs."""
        told = Told("CONNECT", path, tunnel_answer(b"".join(WORDS)), tunnel=True)

        async def talk(peer: Peer) -> None:
            number = self._number(told)
            fields = self._fields("CONNECT", path, grpc=False)
            await peer.request(number, [fields[0], (b":protocol", b"chat"), *fields[1:]], end=False)
            expected = len(WELCOME)
            for words in (*WORDS, b""):
                while len(((message := peer.messages.get(number)) and message.body) or b"") < expected:
                    if not self._unanswered(peer):
                        return
                    await peer.next()
                if words:
                    await peer.data(number, words)
                told.sent += words
                expected += len(words)
            await peer.data(number, end=True)
            while self._unanswered(peer):
                await peer.next()

        await self._patiently([told], talk)
        return told

    def hang_up(self) -> None:
        if self._peer is not None:
            self._peer.stream.close()
        self._peer = None

    def recant(self) -> None:
        """Reset the first stream that is open, and wait for it no more."""
        if self._peer is not None and self._open:
            number = min(self._open)
            self._open.pop(number).recanted = True
            send_now(self._peer, RstStreamFrame(number, error_code=CANCEL))
            if not self._open:
                self._waiting.cancel()

    def _number(self, told: Told) -> int:
        number, self._next = self._next, self._next + 2
        self._open[number] = told
        return number

    def _fields(self, method: str, path: str, *, grpc: bool) -> list[tuple[bytes, bytes]]:
        pseudo = [(":method", method), (":scheme", self.scheme), (":authority", "target.test"), (":path", path)]
        extra = [("content-type", "application/grpc"), ("te", "trailers")] if grpc else []
        return [(name.encode(), value.encode()) for name, value in (*pseudo, *extra)]

    async def _patiently(self, tolds: list[Told], talk: Callable[[Peer], Awaitable[None]]) -> None:
        self.told += tolds
        self._waiting = trio.move_on_after(PATIENCE)
        with self._waiting:
            try:
                if self._peer is None:
                    peer = Peer(await self.dial())
                    await peer.start()
                    self._peer, self._next = peer, 1
                await talk(self._peer)
            except GONE:
                pass
            for told in tolds:
                told.over = True
        if self._peer is not None:
            self._unanswered(self._peer)
        self._open.clear()
        for told in tolds:
            told.over = told.over or told.recanted or told.whole
        if not all(told.whole or told.recanted for told in tolds):
            self.hang_up()

    def _unanswered(self, peer: Peer) -> bool:
        """Note what has come, and return whether more has to."""
        for number, told in list(self._open.items()):
            message = peer.messages.get(number)
            if message is None:
                continue
            heads = [head for head in map(dict, message.heads) if not head.get(b":status", b"200").startswith(b"1")]
            if heads:
                told.status, told.got = int(heads[0][b":status"]), message.body
                told.whole = message.ended and message.reset in (None, 0)
                told.grpc_status = next((head[b"grpc-status"] for head in heads if b"grpc-status" in head), None)
            if message.ended or message.reset is not None:
                del self._open[number]
        return bool(self._open)
