"""HTTP/1.1 bodies on a stream, in both directions; the server's side and the client's share them."""

from __future__ import annotations

import trio

from sidecar.errors import ClientFault
from sidecar.model import Aborted, Body, ByteStream, Data, Trailers
from sidecar.wire import h1

_READ_BYTES = 65536
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Incoming:
    """`model.Body` read from a stream and the buffer in front of it, which keeps what lies behind the body."""

    __slots__ = ("_ahead", "_buffer", "_chunks", "_fault", "_left", "_stream", "ended", "length")

    def __init__(
        self,
        stream: ByteStream,
        buffer: bytearray,
        framing: h1.Framing,
        *,
        max_header_bytes: int = 0,
        max_header_fields: int = 0,
    ) -> None:
        self._stream = stream
        self._buffer = buffer
        self._left = framing
        self.length: int | None = framing if framing >= 0 else None
        self.ended = framing == 0
        self._ahead: Data | Trailers | None = None
        """Of a chunked body: the next item, where that is there already; or what is wrong with it."""
        self._fault: ClientFault | None = None
        self._chunks = (
            h1.Chunks(max_header_bytes=max_header_bytes, max_header_fields=max_header_fields)
            if framing == h1.CHUNKED
            else None
        )

    @property
    def ready(self) -> bool:
        if self.ended or self._chunks is None:
            return self.ended or bool(self._buffer)
        return self._decoded(self._chunks)

    @property
    def left(self) -> int | None:
        """Bytes still to come, where that is known."""
        return self._left if self.length is not None else None

    async def receive(self) -> Data | Trailers | None:
        if self.ended:
            return None
        if self._chunks is not None:
            return await self._chunk(self._chunks)
        data = await self._some()
        if self.length is None:
            self.ended = not data
            return data or None
        if not data:
            raise Aborted("the body is shorter than its length")
        self._left -= len(data)
        self.ended = self._left == 0
        return data

    async def _some(self) -> bytes:
        buffer = self._buffer
        limit = _READ_BYTES if self.length is None else min(_READ_BYTES, self._left)
        if buffer:
            data = bytes(buffer[:limit])
            del buffer[:limit]
            return data
        try:
            return await self._stream.receive_some(limit)
        except _GONE as error:
            raise Aborted(str(error)) from error

    async def _chunk(self, chunks: h1.Chunks) -> Data | Trailers | None:
        while not self._decoded(chunks):
            try:
                more = await self._stream.receive_some(_READ_BYTES)
            except _GONE as error:
                raise Aborted(str(error)) from error
            if not more:
                raise Aborted("the body ended in the middle of its chunks")
            self._buffer += more
        if self._fault is not None:
            raise Aborted(self._fault.detail) from self._fault
        item, self._ahead = self._ahead, None
        self.ended = chunks.ended
        return item

    def _decoded(self, chunks: h1.Chunks) -> bool:
        """Whether the next item, the end or a fault is there. That bytes are there says nothing: they may be half a line."""
        if self._ahead is None and self._fault is None and not chunks.ended:
            try:
                self._ahead = chunks.next(self._buffer)
            except ClientFault as fault:
                self._fault = fault
        return self._ahead is not None or self._fault is not None or chunks.ended


class Outgoing:
    """Writes a head and the body behind it. `sent` counts the bytes of the body."""

    __slots__ = ("_stream", "sent")

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.sent = 0

    async def send(self, head: bytes, body: Body, framing: h1.Framing) -> None:
        """Send the head at once, with as much of the body as is there, then the rest as it comes.

        Raises what `body.receive` raises, and trio's resource errors for the stream: the caller knows which side that is.
        """
        pending = head
        while True:
            if pending and not body.ready:
                await self._stream.send_all(pending)
                pending = b""
            item = await body.receive()
            if item is None:
                if framing == h1.CHUNKED:
                    pending += h1.LAST_CHUNK
                break
            if type(item) is Trailers:
                if framing == h1.CHUNKED:
                    pending += h1.encode_trailers(item.fields)
                    break
                continue
            assert isinstance(item, bytes)  # noqa: S101  (for the type checker)
            self.sent += len(item)
            if framing == h1.CHUNKED:
                await self._stream.send_all(pending + h1.encode_chunk(item))
            elif framing >= 0 and self.sent > framing:
                raise Aborted("the body is longer than its length")
            else:
                await self._stream.send_all(pending + item if pending else item)
            pending = b""
        if framing >= 0 and self.sent != framing:
            raise Aborted("the body is shorter than its length")
        if pending:
            await self._stream.send_all(pending)
