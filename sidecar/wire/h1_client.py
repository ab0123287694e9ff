"""The client's side of an HTTP/1.1 connection: one request, its answer, then the next, or a tunnel.

An upstream may only switch to the protocol that it was asked for, and has to name it (RFC 9110 §15.2.2). A WebSocket that
comes without a key, from HTTP/2, gets one here, and the upstream's proof that it has read it ends here too.
"""

from __future__ import annotations

from typing import TypeAlias

import trio

from sidecar.errors import ClientFault, MaybeSent, NoAnswer
from sidecar.model import Body, ByteStream, Fields, RequestHead, ResponseHead
from sidecar.wire import h1
from sidecar.wire.h1_body import Incoming, Outgoing
from sidecar.wire.h1_tunnel import ACCEPT, KEY, Tunnel, accept_of, is_websocket, made_key
from sidecar.wire.network import Stream
from sidecar.wire.recent import Recent

Known: TypeAlias = tuple[str, int, ResponseHead, h1.Framing, bool]
"""The method that was answered, how many fields there might be (a reload may say so anew), and what `h1.response_head` makes of
the head of the answer then."""

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class H1Connection:
    """A connection that carries one exchange at a time. `reusable` once the last one left it in order."""

    __slots__ = (
        "_buffer", "_head", "_heard", "_keep", "_key", "_max_bytes", "_max_fields", "_recent", "_sent", "_tunnelled",
        "_unanswered", "body", "exchanges", "idle_since", "opened_at", "stream",
    )  # fmt: skip

    def __init__(
        self,
        stream: Stream,
        *,
        max_header_bytes: int,
        max_header_fields: int,
        opened_at: float,
        recent: Recent[Known] | None = None,
    ) -> None:
        """`recent`: the last heads of whoever is there, on whichever connection they came; None: it has a memory of its own."""
        self.stream = stream
        self._recent = recent if recent is not None else Recent(1)
        self.exchanges = 0
        self.opened_at = opened_at
        self.idle_since = opened_at
        self.body: Incoming
        self._max_bytes = max_header_bytes
        self._max_fields = max_header_fields
        self._buffer = bytearray()
        self._unanswered = Incoming(stream, self._buffer, h1.UNTIL_CLOSE)
        """The body while no head has come: no end has come either."""
        self._start()

    def _start(self) -> None:
        self._head: RequestHead | None = None
        self._sent = False
        self._keep = False
        self._heard = False
        self._key: bytes | None = None
        self._tunnelled = False
        """Whether there was a tunnel, and our side of it has ended in order."""
        self.body = self._unanswered

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
        """Whether both messages are whole, or all was sent that went through a tunnel."""
        return (self._sent and self.body.ended) or self._tunnelled

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
        if head.upgrade is not None and is_websocket(head.upgrade) and all(name != KEY for name, _ in fields):
            self._key = made_key()
            fields = [*fields, (KEY, self._key)]
        encoded = h1.encode_request(head, fields, framing)
        try:
            if type(body) is Incoming and body.ended:  # as most have: there is none
                await self.stream.send_all(encoded)
            else:
                await Outgoing(self.stream).send(encoded, body, framing)
        except _GONE as error:
            raise MaybeSent(str(error), code="upstream_reset") from error
        self._sent = True

    async def receive(self) -> ResponseHead:
        """Return the next head of the answer: any number of 1xx, then the final one, whose body is `body`."""
        raw = await self._raw_head()
        if self._head is None:
            raise MaybeSent("answered before it was asked", code="upstream_malformed")
        known = self._recent.get(raw)
        if known is None or known[0] != self._head.method or known[1] != self._max_fields:
            known = self._read(raw, self._head.method)
        _, _, head, framing, keep = known
        self._heard = True
        if head.status == 101:
            return self._switched(head, self._head.upgrade)
        if head.status >= 200:
            self._keep = keep
            self.body = Incoming(
                self.stream, self._buffer, framing,
                max_header_bytes=self._max_bytes, max_header_fields=self._max_fields,
            )  # fmt: skip
        return head

    def _read(self, raw: bytes, method: str) -> Known:
        wanted = self._recent.wants(raw)
        limit = self._max_fields
        known = (method, limit, *h1.response_head(raw, method=method, max_header_fields=limit, kept=wanted))
        if wanted:
            self._recent.keep(raw, known)
        return known

    def _switched(self, head: ResponseHead, asked: str | None) -> ResponseHead:
        if asked is None:
            raise MaybeSent("switched protocols without being asked", code="upstream_malformed")
        if [value.lower() for name, value in head.fields if name == b"upgrade"] != [asked.lower().encode("latin-1")]:
            raise MaybeSent("switched to another protocol than the one asked for", code="upgrade_malformed")
        if self._key is None:
            return head
        if [value for name, value in head.fields if name == ACCEPT] != [accept_of(self._key)]:
            raise MaybeSent("the WebSocket was accepted without its key", code="upgrade_malformed")
        return ResponseHead(status=101, fields=[field for field in head.fields if field[0] != ACCEPT])

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
                raise self._cut(str(error)) from error
            if not data:
                raise self._cut("ended in the middle of a head" if buffer else "ended without an answer")
            buffer += data

    def _cut(self, reason: str) -> MaybeSent:
        """An interim answer is one too: whoever gave it was there, and had the request."""
        return MaybeSent(reason) if self._buffer or self._heard else NoAnswer(reason)

    def tunnel(self) -> ByteStream:
        """The stream behind a 101."""
        self._keep = False
        return Tunnel(self.stream, self._buffer, self._tunnel_ended)

    def _tunnel_ended(self) -> None:
        self._tunnelled = True

    def close(self) -> None:
        self.stream.close()

    def abort(self) -> None:
        self.stream.abort()
