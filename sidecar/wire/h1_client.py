"""The client's side of an HTTP/1.1 connection: one request, its answer, then the next."""

from __future__ import annotations

import trio

from sidecar.errors import ClientFault, MaybeSent, NoAnswer
from sidecar.model import Body, ByteStream, Fields, RequestHead, ResponseHead
from sidecar.wire import h1
from sidecar.wire.h1_body import Incoming, Outgoing
from sidecar.wire.h1_server import Buffered
from sidecar.wire.network import Stream

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class H1Connection:
    """A connection that carries one exchange at a time. `reusable` once the last one left it in order."""

    __slots__ = (
        "_buffer", "_head", "_keep", "_max_bytes", "_max_fields", "_sent", "_switched", "body", "exchanges", "idle_since",
        "opened_at", "stream",
    )  # fmt: skip

    def __init__(self, stream: Stream, *, max_header_bytes: int, max_header_fields: int, opened_at: float) -> None:
        self.stream = stream
        self.exchanges = 0
        self.opened_at = opened_at
        self.idle_since = opened_at
        self.body: Incoming
        self._max_bytes = max_header_bytes
        self._max_fields = max_header_fields
        self._buffer = bytearray()
        self._start()

    def _start(self) -> None:
        self._head: RequestHead | None = None
        self._sent = False
        self._keep = False
        self._switched = False
        self.body = Incoming(self.stream, self._buffer, h1.UNTIL_CLOSE)  # no end has come while no head has

    @property
    def reused(self) -> bool:
        return self.exchanges > 0

    @property
    def reusable(self) -> bool:
        """Whether the last exchange ended so that another can follow: both messages whole, and nothing behind them."""
        return self._sent and self._keep and self.body.ended and not self._buffer and not self.stream.closed

    @property
    def untouched(self) -> bool:
        return self._head is None

    @property
    def finished(self) -> bool:
        """Whether both messages are whole, or the stream was handed over to a tunnel that has ended."""
        return (self._sent and self.body.ended) or self._switched

    def stale(self) -> bool:
        return self.stream.closed or self.stream.readable_now()

    def renew(self) -> None:
        self.exchanges += 1
        self._start()

    async def send(self, head: RequestHead, fields: Fields, body: Body) -> None:
        """Send one request and pull its body to the end. Raises `MaybeSent` for this connection, `Aborted` for the body."""
        self._head = head
        length = body.length
        framing = h1.CHUNKED if length is None else length
        try:
            await Outgoing(self.stream).send(h1.encode_request(head, fields, framing), body, framing)
        except _GONE as error:
            raise MaybeSent(str(error), code="upstream_reset") from error
        self._sent = True

    async def receive(self) -> ResponseHead:
        """Return the next head of the answer: any number of 1xx, then the final one, whose body is `body`."""
        raw = await self._raw_head()
        if self._head is None:
            raise MaybeSent("answered before it was asked", code="upstream_malformed")
        head, framing, keep = h1.response_head(raw, method=self._head.method, max_header_fields=self._max_fields)
        if head.status == 101:
            if self._head.upgrade is None:
                raise MaybeSent("switched protocols without being asked", code="upstream_malformed")
            self._switched = True
        elif head.status >= 200:
            self._keep = keep
            self.body = Incoming(
                self.stream, self._buffer, framing,
                max_header_bytes=self._max_bytes, max_header_fields=self._max_fields,
            )  # fmt: skip
        return head

    async def _raw_head(self) -> bytes:
        searched = 0
        buffer = self._buffer
        while True:
            try:
                end = h1.head_end(buffer, searched, self._max_bytes) if buffer else 0
            except ClientFault as error:
                raise MaybeSent("the head of the answer is too large", code="upstream_malformed") from error
            if end:
                raw = bytes(buffer[:end])
                del buffer[:end]
                return raw
            searched = len(buffer)
            try:
                data = await self.stream.receive_some()
            except _GONE as error:
                raise NoAnswer(str(error)) if not buffer else MaybeSent(str(error)) from error
            if not data:
                raise NoAnswer("ended without an answer") if not buffer else MaybeSent("ended in the middle of a head")
            buffer += data

    def tunnel(self) -> ByteStream:
        """The stream behind a 101, or behind a 2xx to CONNECT."""
        self._keep = False
        return Buffered(self.stream, self._buffer)

    def close(self) -> None:
        self.stream.close()

    def abort(self) -> None:
        self.stream.abort()
