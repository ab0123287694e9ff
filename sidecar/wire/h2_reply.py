"""The way back on a stream that a client has opened: its answer, or the tunnel that it asked for."""

from __future__ import annotations

import trio
from h2.errors import ErrorCodes

from sidecar.errors import OurFault
from sidecar.model import ByteStream, ClientGone, Response, ResponseHead
from sidecar.wire import h2_heads
from sidecar.wire.h2_channel import Channel
from sidecar.wire.h2_link import Link
from sidecar.wire.h2_tunnel import Tunnel


class ServedStream(Channel):
    """One stream and what ends its handling."""

    __slots__ = ("gone", "scope", "switched")

    def __init__(self, link: Link, stream_id: int, length: int | None) -> None:
        super().__init__(link, stream_id, length)
        self.scope = trio.CancelScope()
        self.switched = False
        """Whether the stream has become a tunnel."""
        self.gone: str | None = None
        """Why the client takes no answer any more."""

    def begin(self, fields: list[tuple[bytes, bytes]], *, end: bool) -> None:
        self.check()
        self.link.protocol.send_headers(self.id, fields, end_stream=end)
        self.link.ring()
        self.ended = end

    def check(self) -> None:
        if self.gone is not None or self.link.broken or self.link.protocol.over:
            raise ClientGone(self.gone or "the connection ended")

    def lost(self, reason: str, code: ErrorCodes | None, *, remote: bool) -> None:
        if self.gone is None:
            self.gone = reason
            self.body.fail(reason)
            self.room.ring()
            self.scope.cancel()


class H2Reply:
    """`model.Reply` to one request."""

    __slots__ = ("_channel", "_method", "started")

    def __init__(self, channel: ServedStream, method: str) -> None:
        self._channel = channel
        self._method = method
        self.started = False

    @property
    def complete(self) -> bool:
        return self._channel.ended

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def gone(self) -> bool:
        return self._channel.gone is not None

    async def interim(self, head: ResponseHead) -> None:
        if not self.started and head.status != 101:
            await self._channel.start(h2_heads.encode_interim(head), end=False)

    async def send(self, response: Response) -> None:
        if self.started:
            raise OurFault("a second final answer to one request")
        self.started = True
        bodiless = self._method == "HEAD" or response.head.status in (204, 304)
        fields = h2_heads.encode_response(response.head, response.body.length, bodiless=bodiless)
        if bodiless:
            await self._channel.start(fields, end=True)
        else:
            await self._channel.transmit(fields, response.body)

    async def tunnel(self, head: ResponseHead) -> ByteStream:
        if self.started:
            raise OurFault("a second final answer to one request")
        if not self._channel.tunnelled:
            raise OurFault("nobody asked for a tunnel", code="tunnel_unsupported")
        self.started = True
        await self._channel.start(h2_heads.encode_tunnel(head), end=False)
        self._channel.switched = True
        return Tunnel(self._channel)
