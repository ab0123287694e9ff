"""An agent that reads and writes bytes as each test tells it, and a client to match: what reaches an end, as it came.

A library would make something of a message that was cut short, or end a connection in a way of its own.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from support.pair import HOST_B, PATIENCE


class Wire:
    """One connection, read and written by hand. Raises `ConnectionError`, and `EOFError` at an end that is too early."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._ahead = b""

    def say(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def some(self) -> bytes:
        """What comes next; b"" at the end."""
        data, self._ahead = self._ahead or self.sock.recv(65536), b""
        return data

    def until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            if not (more := self.some()):
                raise EOFError(data)
            data += more
        found, _, self._ahead = data.partition(mark)
        return found + mark

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self.some()):
                raise EOFError(f"{len(data)} of {size}")
            data += more
        self._ahead = data[size:]
        return data[:size]

    def chunk(self) -> bytes:
        """b"" for the last one, whose trailers are then to be read."""
        size = int(self.until(b"\r\n"), 16)
        return self.exactly(size + 2)[:-2] if size else b""

    def chunks(self) -> bytes:
        return b"".join(iter(self.chunk, b""))

    def to_the_end(self) -> int:
        """Read and drop; returns how much it was."""
        size = 0
        while data := self.some():
            size += len(data)
        return size

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def break_off(self) -> None:
        """As a process does that is killed with something unread."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Play = Callable[[Wire, bytes], None]
"""What the agent does on a connection, once the head of a request is there."""


class Agent:
    """`plays`: by path. `met`: what they tell the test; what ends one that did not expect it is told by its name."""

    def __init__(self, port: int) -> None:
        self.plays: dict[bytes, Play] = {}
        self.met: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.listener = socket.create_server((HOST_B, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(PATIENCE)
            wire = Wire(sock)
            with suppress(EOFError, OSError):
                while head := wire.until(b"\r\n\r\n"):
                    met = self.met
                    try:
                        self.plays[head.split(b" ")[1]](wire, head)
                    except (EOFError, OSError) as error:
                        met.put(type(error))
                        return

    def plays_at(self, path: str) -> Callable[[Play], Play]:
        def keep(play: Play) -> Play:
            self.plays[path.encode()] = play
            return play

        return keep
