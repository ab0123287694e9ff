"""Messages between a supervisor and one of its workers, over a stream socket pair that only these two hold.

A frame is one byte that says of which kind it is, four bytes of length (network order), and so many bytes. What they mean is
not known here. Sending never waits: what the other side does not take stays in a queue. Orders always get into it; what may
be lost where too much waits (lines of a log) is offered.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from contextlib import suppress

import trio

_HEAD = struct.Struct("!cI")
_MAX_FRAME_BYTES = 64 << 20
_PIECE = 131_072


class Channel:
    """One end, which is ours to close. `run` has to be running. One task may receive."""

    def __init__(self, sock: socket.socket, *, max_pending_bytes: int = 4 << 20) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._max_pending_bytes = max_pending_bytes
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._read = bytearray()
        self._blocked = trio.Event()
        self._broken = False

    def send(self, kind: bytes, payload: bytes) -> None:
        """Nothing is said where the other side has ended: whoever receives finds out."""
        frame = memoryview(_HEAD.pack(kind, len(payload)) + payload)  # in one piece: it wakes the other side once
        self._pending.append(frame)
        self._pending_bytes += len(frame)
        self._write()

    def offer(self, kind: bytes, payload: bytes) -> bool:
        """Send unless too much waits already, and say whether it was taken."""
        if self._broken or self._pending_bytes + len(payload) > self._max_pending_bytes:
            return False
        self.send(kind, payload)
        return True

    async def run(self) -> None:
        """Send on what had to wait, for ever."""
        while True:
            await self._blocked.wait()
            self._blocked = trio.Event()
            await trio.lowlevel.wait_writable(self._sock)
            self._write()

    async def receive(self) -> tuple[bytes, bytes]:
        """Return kind and payload. Raises EOFError where the other side has ended, ValueError for what is no frame."""
        while True:
            if len(self._read) >= _HEAD.size:
                kind, size = _HEAD.unpack_from(self._read)
                if size > _MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {size} bytes")
                end = _HEAD.size + size
                if len(self._read) >= end:
                    payload = bytes(memoryview(self._read)[_HEAD.size : end])
                    del self._read[:end]
                    return kind, payload
            await self._more()

    def finish(self, timeout: float) -> None:
        """Send what waits, blocking, for so many seconds at most."""
        with suppress(OSError):
            self._sock.settimeout(timeout)
            while self._pending and not self._broken:
                self._sock.sendall(self._pending.popleft())

    def close(self) -> None:
        self._broken = True
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def _more(self) -> None:
        try:
            data = self._sock.recv(_PIECE)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(self._sock)
        except OSError as error:
            raise EOFError(str(error)) from error
        else:
            if not data:
                raise EOFError("the other side has ended")
            self._read += data
            await trio.lowlevel.checkpoint()

    def _write(self) -> None:
        try:
            while self._pending and not self._broken:
                first = self._pending[0]
                sent = self._sock.send(first)
                self._pending_bytes -= sent
                if sent < len(first):
                    self._pending[0] = first[sent:]
                else:
                    self._pending.popleft()
        except BlockingIOError:
            self._blocked.set()
        except OSError:
            self._broken = True
            self._pending.clear()
            self._pending_bytes = 0
