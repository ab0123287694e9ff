"""One stream of an HTTP/2 connection: our message going out, the other one coming in, and the windows of both.

Bodies are pulled: a sender waits for the windows of the peer and for the writer, a receiver gives window back as it consumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio
from h2.errors import ErrorCodes

from sidecar.model import Aborted, Body, Fields, Trailers
from sidecar.wire.h2_body import Incoming
from sidecar.wire.h2_signal import Signal
from sidecar.wire.h2_validity import CONNECTION_FIELDS

if TYPE_CHECKING:
    from sidecar.wire.h2_link import Link

_LATER: Final = object()


class AnsweredEarly(Exception):
    """The other side has sent its whole message and wants no more of ours (RFC 9113 §8.1)."""


class Channel:
    """One stream, as its connection sees it. Each side adds how messages begin and what a loss means to its users."""

    __slots__ = ("_owed", "body", "bytes_sent", "ended", "id", "link", "room", "tunnelled")

    def __init__(self, link: Link, stream_id: int, length: int | None) -> None:
        self.link = link
        self.id = stream_id
        self.body = Incoming(self.consumed, length)
        self.room = Signal()
        self.bytes_sent = 0
        self.ended = False
        """Whether our own message is whole: its last frame is queued."""
        self.tunnelled = False
        """Whether the data belongs to another protocol, so that only data may come (RFC 9113 §8.5)."""
        self._owed = 0

    @property
    def over(self) -> bool:
        """Whether both messages are whole."""
        return self.ended and self.body.complete

    # ── what each side adds ─────────────────────────────────────────────────────────────────────────────────────

    def begin(self, fields: list[tuple[bytes, bytes]], *, end: bool) -> None:
        """Queue the head of our message. Raises where it can no longer be sent."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise where our message can no longer be sent: `Aborted`, `UpstreamFault` or `AnsweredEarly`."""
        raise NotImplementedError

    def lost(self, reason: str, code: ErrorCodes | None, *, remote: bool) -> None:
        """The stream is over before its time: by a reset with `code`, or (None) with its connection."""
        raise NotImplementedError

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, fields: list[tuple[bytes, bytes]], *, end: bool) -> None:
        """Send a head. Windows do not count it, but it too waits while the peer does not read."""
        link = self.link
        while link.backed_up:
            self.check()
            await link.wait_for_room(self)
        self.begin(fields, end=end)

    async def transmit(self, fields: list[tuple[bytes, bytes]], body: Body) -> None:
        """Send a head and pull the body behind it to its end. The last frame carries END_STREAM.

        Raises what `body.receive` and `check` raise, and `Aborted` where the body is not as long as it said.
        """
        item: Any = await body.receive() if body.ready else _LATER
        if item is None or type(item) is Trailers:
            self._check_length(body)
        await self.start(fields, end=item is None)
        while item is not None:
            if item is _LATER:
                item = await body.receive()
                if item is None:
                    self._check_length(body)
                    await self.send_data(b"", end=True)
            elif type(item) is Trailers:
                self._check_length(body)
                await self._send_trailers(item.fields)
                return
            else:
                if body.length is not None and self.bytes_sent + len(item) > body.length:
                    raise Aborted("the body is longer than its length")
                # Looking ahead, where that costs no time, lets the last data carry the end.
                following: Any = await body.receive() if body.ready else _LATER
                if following is None and body.length is not None and self.bytes_sent + len(item) != body.length:
                    raise Aborted("the body is shorter than its length")
                await self.send_data(item, end=following is None)
                item = following

    def _check_length(self, body: Body) -> None:
        if body.length is not None and self.bytes_sent != body.length:
            raise Aborted("the body is shorter than its length")

    async def send_data(self, data: bytes, *, end: bool) -> None:
        """Send bytes as the windows allow. Raises what `check` raises."""
        link = self.link
        size = len(data)
        if not size and not end:
            return
        view = memoryview(data)
        sent = 0
        while True:
            self.check()
            allowed = link.allowed(self.id) if size else 1
            if allowed <= 0:
                await link.wait_for_room(self)
                continue
            part = view[sent : sent + allowed]
            sent += len(part)
            link.protocol.send_data(self.id, part, end_stream=end and sent == size)
            link.ring()
            link.sent(len(part))
            self.bytes_sent += len(part)
            if sent == size:
                self.ended = end
                return
            if link.waiting or link.held:
                await trio.lowlevel.checkpoint()  # others wait for the same room: a frame each, in turn

    async def _send_trailers(self, fields: Fields) -> None:
        kept = [field for field in fields if field[0] not in CONNECTION_FIELDS and field[0][:1] != b":"]
        if not kept:
            await self.send_data(b"", end=True)
            return
        self.check()
        self.link.protocol.send_headers(self.id, kept, end_stream=True)
        self.link.ring()
        self.ended = True

    def reset(self, code: ErrorCodes) -> None:
        """Tell the peer that the stream ends here, unless both sides know."""
        self.link.protocol.drop(self.id, code)
        self.link.ring()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def consumed(self, size: int) -> None:
        """Give window back for `size` bytes."""
        self.link.consumed(size)
        if not self.body.complete:
            self._owed += size
            if self.link.protocol.widen(self.id, self._owed):
                self._owed = 0
                self.link.ring()
