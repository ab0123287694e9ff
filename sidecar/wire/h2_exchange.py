"""One request to an upstream that speaks HTTP/2, and its answer or the tunnel that it grants: a stream of `h2_client`.

What failed says whether the upstream may have acted on the request; whoever sends and whoever receives are told alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from sidecar.errors import MaybeSent, NoAnswer, NotSent, OurFault, UpgradeUnsupported, UpstreamFault
from sidecar.model import Body, ByteStream, Fields, RequestHead, ResponseHead, Workload
from sidecar.wire import h2_heads
from sidecar.wire.h2_channel import AnsweredEarly, Channel
from sidecar.wire.h2_signal import Signal
from sidecar.wire.h2_tunnel import Tunnel

if TYPE_CHECKING:
    from sidecar.wire.h2_client import H2Connection

_MAX_INTERIM = 32
"""Interim answers that may wait to be taken."""
_UNOPENED = 0


class UpstreamExchange(Channel):
    """One request and its answer (`client.UpstreamStream`)."""

    __slots__ = (
        "_fault",
        "_heads",
        "_mark",
        "_method",
        "_released",
        "_signal",
        "_unanswered",
        "_upgrade",
        "connection",
        "reused",
    )

    def __init__(self, connection: H2Connection, *, reused: bool) -> None:
        super().__init__(connection, _UNOPENED, None)
        self.connection = connection
        self.reused = reused
        self._method = ""
        self._upgrade = False
        self._heads: deque[ResponseHead] = deque()
        self._signal = Signal()
        self._fault: Callable[[], UpstreamFault] | None = None
        self._unanswered = True
        self._mark = 0
        self._released = False

    @property
    def peer(self) -> Workload | None:
        return self.connection.peer

    # ── the request ─────────────────────────────────────────────────────────────────────────────────────────────

    async def send(self, head: RequestHead, fields: Fields, body: Body) -> None:
        """Send the request and pull its body to the end, or to where the upstream has answered without wanting it all.

        Of a request with `upgrade` there is nothing but the head. Raises `NotSent`, `MaybeSent` or `UpgradeUnsupported`, and
        lets what `body.receive` raises pass.
        """
        if head.method == "CONNECT":
            raise self._failed(NotSent, "no CONNECT over HTTP/2", "upstream_protocol")
        self._method = head.method
        self._upgrade = head.upgrade is not None
        lines = h2_heads.encode_request(head, fields, body.length, tls=self.connection.tls)
        try:
            if self._upgrade:
                await self._tunnels_taken()
                await self.start(lines, end=False)
            else:
                await self.transmit(lines, body)
        except AnsweredEarly:
            pass

    async def _tunnels_taken(self) -> None:
        """Raise unless the upstream has said that it takes extended CONNECT (RFC 8441 §3)."""
        await self.connection.greeted()
        self.check()
        protocol = self.connection.protocol
        if not protocol.greeted:
            raise self._failed(NotSent, "no SETTINGS came", "upstream_handshake_timeout")
        if not protocol.tunnels:
            raise self._failed(UpgradeUnsupported, "the upstream takes no extended CONNECT", UpgradeUnsupported.code)

    def begin(self, fields: list[tuple[bytes, bytes]], *, end: bool) -> None:
        connection = self.connection
        protocol = connection.protocol
        self.check()
        if connection.over or connection.broken or protocol.over:
            raise self._failed(NotSent, "the connection has ended", "upstream_ended")
        if connection.forsaken:
            raise self._failed(NotSent, "the upstream goes away", "upstream_draining")
        try:
            stream_id = protocol.get_next_available_stream_id()
            mark = connection.taken + protocol.pending
            protocol.send_headers(stream_id, fields, end_stream=end)
        except ProtocolError as error:  # no id is left, or the upstream allows fewer streams than it did
            raise self._failed(NotSent, str(error), "upstream_streams_exhausted") from error
        self.id = stream_id
        self._mark = mark
        self.ended = end
        connection.channels[stream_id] = self
        connection.ring()

    def check(self) -> None:
        if self._fault is not None:
            if self.body.complete:
                raise AnsweredEarly
            raise self._fault()

    # ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────

    async def receive(self) -> ResponseHead:
        """Return the next head: any number of 1xx, then the final one. Raises `NotSent` or `MaybeSent`."""
        while not self._heads:
            if self._fault is not None:
                raise self._fault()
            await self._signal.wait()
        return self._heads.popleft()

    def answered(self, head: ResponseHead, length: int | None, *, ended: bool) -> None:
        if self._upgrade and 200 <= head.status < 300:
            head, length = h2_heads.tunnel_head(head), None
            self.tunnelled = True
        elif self._method == "HEAD" or head.status in (204, 304):
            length = 0
        elif ended and length:
            self.malformed("the body is shorter than its length")
            return
        self.body.length = 0 if ended else length
        if ended:
            self.body.end()
        self._add(head)

    def interim(self, head: ResponseHead) -> None:
        if len(self._heads) >= _MAX_INTERIM:
            self.malformed("too many interim answers")
        else:
            self._add(head)

    def _add(self, head: ResponseHead) -> None:
        self._unanswered = False
        self._heads.append(head)
        self._signal.ring()

    def tunnel(self) -> ByteStream:
        """The stream, once `receive` has returned 101."""
        if not self.tunnelled:
            raise OurFault("no tunnel was opened", code="tunnel_unsupported")
        return Tunnel(self)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def release(self) -> None:
        """Free the stream. The upstream sees a reset where either message is not whole."""
        if self._released:
            return
        self._released = True
        if self.id:
            if not self.over:
                self.reset(ErrorCodes.CANCEL)
            self.connection.close_channel(self)
        self.body.close()
        self.connection.released()

    def lost(self, reason: str, code: ErrorCodes | None, *, remote: bool) -> None:
        if code is None:
            if self.connection.taken <= self._mark:
                self._failed(NotSent, reason, "upstream_ended")
            elif self._unanswered:
                self._failed(NoAnswer, reason, NoAnswer.code)
            else:
                self._failed(MaybeSent, reason, "upstream_reset")
        elif not remote:
            self._failed(MaybeSent, reason, "upstream_malformed")
        elif code is ErrorCodes.REFUSED_STREAM:
            self.refused(reason, "upstream_refused_stream")
        else:
            self._failed(MaybeSent, reason, "upstream_reset")

    def refused(self, reason: str, code: str) -> None:
        """The upstream says that it has not acted on this request, and will not."""
        self._failed(NotSent if self._unanswered else MaybeSent, reason, code)

    def malformed(self, reason: str) -> None:
        self.reset(ErrorCodes.PROTOCOL_ERROR)
        self.lost(reason, ErrorCodes.PROTOCOL_ERROR, remote=False)

    def _failed(self, fault: type[UpstreamFault], reason: str, code: str) -> UpstreamFault:
        """Remember what went wrong first; whoever sends or receives is told. Returns it, to be raised."""
        if self._fault is None:
            self._fault = partial(fault, reason, code=code)
            self.body.fail(reason)
            self.room.ring()
            self._signal.ring()
        return self._fault()
