"""The body of a message that comes on an HTTP/2 stream: filled by the connection's reader, pulled by whoever wants it."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.model import Aborted, Data, Trailers
from sidecar.wire.h2_signal import Signal


def _nobody(_: int) -> None:
    """To be told of what was taken out, once there is no stream."""


class Incoming:
    """`model.Body` of one stream, filled by the reader. It holds no more than the stream's window."""

    __slots__ = ("_consumed", "_data", "_failure", "_signal", "_trailers", "complete", "length", "received")

    def __init__(self, consumed: Callable[[int], None], length: int | None) -> None:
        self._consumed = consumed
        """Told how many bytes were taken out, so that their window can be given back."""
        self._data: bytes | bytearray = b""
        self._trailers: Trailers | None = None
        self._failure: str | None = None
        self._signal = Signal()
        self.length = length
        self.received = 0
        self.complete = False
        """Whether the end has come; there may be something left to be read before it."""

    @property
    def ready(self) -> bool:
        return bool(self._data) or self.complete or self._failure is not None

    @property
    def unread(self) -> int:
        return len(self._data)

    def exceeded_by(self, size: int) -> bool:
        return self.length is not None and self.received + size > self.length

    async def receive(self) -> Data | Trailers | None:
        while True:
            if self._data:
                data, self._data = self._data, b""
                self._consumed(len(data))
                return bytes(data)
            if self._failure is not None:
                raise Aborted(self._failure)
            if self.complete:
                trailers, self._trailers = self._trailers, None
                return trailers
            await self._signal.wait()

    def feed(self, data: bytes) -> None:
        """Small frames are put together: each kept apart would weigh many times its bytes."""
        self.received += len(data)
        if not self._data:
            self._data = data
        elif type(self._data) is bytearray:
            self._data += data
        else:
            self._data = bytearray(self._data) + data
        self._signal.ring()

    def end(self, trailers: Trailers | None = None) -> None:
        if trailers is not None and trailers.fields:
            self._trailers = trailers
        self.complete = True
        self._signal.ring()

    def close(self) -> None:
        """Its stream is gone, and has given back the window of what is unread. Each would hold the other, till the collector comes."""
        self._consumed = _nobody

    def fail(self, reason: str) -> None:
        """Break off, unless all has come. What had come before is dropped."""
        if not self.complete and self._failure is None:
            self._failure = reason
            self._consumed(len(self._data))
            self._data = b""
            self._signal.ring()
