"""An HTTP/2 client for one large body: as little work for each frame as there can be, so that it is not what is measured.

It knows one request on one connection, and what a healthy server says to it; anything else is `Broken`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable

import hpack

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_INITIAL_WINDOW_SIZE = 4
_FRAME = 16384
_BURST = 16
"""Frames that go out in one write."""
_STREAM = 1


class Broken(Exception):
    """The exchange went another way than a healthy one does."""


class Bulk:
    """One request on a connected socket. `take` gets each part of the answer's body; `window` is what may be on its way to us."""

    def __init__(self, sock: socket.socket, take: Callable[[memoryview], object], *, window: int) -> None:
        self.status = 0
        self.ended = False
        self._sock = sock
        self.take = take
        self._window = window
        self._owed = 0
        self._stream_room = self._connection_room = self._initial_room = 65535
        self._decoder = hpack.Decoder()
        self._ahead = bytearray()
        settings = _frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window))
        sock.sendall(_PREFACE + settings + _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - 65535)))

    def begin(self, fields: Iterable[tuple[str, str]], *, end: bool) -> None:
        block = hpack.Encoder().encode(list(fields))
        self._sock.sendall(_frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), _STREAM, block))

    def send(self, block: bytes) -> None:
        """Send a part of the body as the windows allow."""
        rest = memoryview(block)
        while rest:
            frames: list[bytes | memoryview] = []
            while rest and len(frames) < 2 * _BURST and (room := min(self._stream_room, self._connection_room, _FRAME)):
                part, rest = rest[:room], rest[room:]
                frames += [_head(len(part), DATA, 0, _STREAM), part]
                self._stream_room -= len(part)
                self._connection_room -= len(part)
            if frames:
                self._sock.sendall(b"".join(frames))
            else:
                self.read()

    def end(self) -> None:
        self._sock.sendall(_frame(DATA, END_STREAM, _STREAM, b""))

    def finish(self) -> None:
        """Read until the answer is whole."""
        while not self.ended:
            self.read()

    def read(self, size: int = 1 << 18) -> None:
        """Read once, and take what came."""
        data = self._sock.recv(size)
        if not data:
            raise Broken("the server ended the connection")
        buffer = self._ahead
        buffer += data
        at = 0
        with memoryview(buffer) as view:
            while len(view) - at >= 9:
                length = int.from_bytes(view[at : at + 3], "big")
                if len(view) - at < 9 + length:
                    break
                kind, flags = view[at + 3], view[at + 4]
                with view[at + 9 : at + 9 + length] as payload:
                    self._came(kind, flags, int.from_bytes(view[at + 5 : at + 9], "big"), payload)
                at += 9 + length
        del buffer[:at]

    def _came(self, kind: int, flags: int, stream: int, payload: memoryview) -> None:
        if kind == DATA:
            self.take(payload)
            self._owed += len(payload)
            if self._owed >= self._window // 2:
                self._sock.sendall(_frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._owed)))
                self._sock.sendall(_frame(WINDOW_UPDATE, 0, _STREAM, struct.pack(">I", self._owed)))
                self._owed = 0
            self.ended = bool(flags & END_STREAM)
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream:
                self._stream_room += more
            else:
                self._connection_room += more
        elif kind == HEADERS:
            self.status = int(dict(self._decoder.decode(bytes(payload)))[":status"])
            self.ended = bool(flags & END_STREAM)
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW_SIZE:
                    self._stream_room += value - self._initial_room
                    self._initial_room = value
            self._sock.sendall(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._sock.sendall(_frame(PING, ACK, 0, bytes(payload)))
        elif kind in {RST_STREAM, GOAWAY}:
            raise Broken(f"frame of type {kind}: {bytes(payload)!r}")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _head(len(payload), kind, flags, stream) + payload


def _head(length: int, kind: int, flags: int, stream: int) -> bytes:
    return length.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
