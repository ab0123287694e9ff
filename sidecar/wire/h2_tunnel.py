"""A stream of bytes over one stream of HTTP/2, after an extended CONNECT (RFC 8441 §5).

END_STREAM is the end of one direction, and the other goes on. Whatever else ends it is a reset, on either side, and raises:
a tunnel that broke must never look like one that ended.
"""

from __future__ import annotations

import trio
from h2.errors import ErrorCodes

from sidecar.errors import UpstreamFault
from sidecar.model import Aborted, Trailers
from sidecar.wire.h2_channel import AnsweredEarly, Channel

_LOST = (Aborted, UpstreamFault, AnsweredEarly)
"""What a channel raises where its stream is over: to those who asked, to those who were asked, and after a reset that followed
the other side's end."""


class Tunnel:
    """`model.ByteStream`. Windows hold back whoever writes faster than the other side reads."""

    __slots__ = ("_channel", "_closed", "_unread")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._closed = False
        self._unread = b""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError("this tunnel was already closed")
        data, self._unread = self._unread, b""
        if not data:
            try:
                item = await self._channel.body.receive()
            except _LOST as error:
                raise trio.BrokenResourceError(str(error)) from error
            data = b"" if item is None or isinstance(item, Trailers) else item
        if len(data) > max_bytes:
            data, self._unread = data[:max_bytes], data[max_bytes:]
        return data

    async def send_all(self, data: bytes) -> None:
        await self._send(data, end=False)

    async def send_eof(self) -> None:
        if not self._channel.ended:
            await self._send(b"", end=True)

    async def aclose(self) -> None:
        """End both directions at once: in order where both have ended, else by a reset."""
        self._closed = True
        if not self._channel.over:
            self._channel.reset(ErrorCodes.CANCEL)
        await trio.lowlevel.checkpoint()

    async def _send(self, data: bytes, *, end: bool) -> None:
        if self._closed or self._channel.ended:
            raise trio.ClosedResourceError("this direction of the tunnel has ended")
        try:
            await self._channel.send_data(data, end=end)
        except _LOST as error:
            raise trio.BrokenResourceError(str(error)) from error
