"""The client's side of an HTTP/2 connection: many requests at once to one upstream that has proven itself.

The connection is shared by requests of different callers, so nothing of one may hold up another: the connection's window is
given back as data arrives, and only the window of its own stream waits for a slow reader; what is malformed in one
answer is an error of its stream.

What may be tried again is said by the protocol: a stream that was refused, or that lies above the last one of a GOAWAY,
has not been acted on (RFC 9113 §8.7), nor has one whose first byte we never wrote: `NotSent`. All else is `MaybeSent`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial

import trio
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, InformationalResponseReceived, ResponseReceived
from h2.exceptions import ProtocolError

from sidecar.errors import MaybeSent, NoAnswer, NotSent, OurFault, UpstreamFault
from sidecar.model import Body, ByteStream, Fields, RequestHead, ResponseHead, Workload
from sidecar.wire import h2_heads
from sidecar.wire.h2_protocol import STREAM_WINDOW, Protocol
from sidecar.wire.h2_streams import GONE, Channel, Link, Signal
from sidecar.wire.network import Stream
from sidecar.wire.tls import TlsStream

_MAX_STREAMS = 200
"""Open at once, where the upstream allows more. Each holds a stream's window of an answer at most."""
_ASSUMED_STREAMS = 100
"""Until the upstream has said how many it allows (RFC 9113 §6.5.2 recommends no fewer)."""
_WINDOW_BYTES = 2 * _MAX_STREAMS * STREAM_WINDOW
_LAST_STREAM_ID = 2**31 - 1 - 2 * _MAX_STREAMS
_MAX_INTERIM = 32
"""Interim answers that may wait to be taken."""
_FLUSH_TIMEOUT = 1.0
_UNOPENED = 0


class H2Connection(Link):
    """A connection that carries any number of exchanges. `run` must be running for them to get anywhere."""

    def __init__(
        self, stream: Stream, *, max_header_bytes: int, max_header_fields: int, peer: Workload | None = None
    ) -> None:
        super().__init__(
            stream,
            Protocol(client=True, max_header_bytes=max_header_bytes, max_streams=0, window=_WINDOW_BYTES),
            max_header_bytes=max_header_bytes,
            max_header_fields=max_header_fields,
        )
        self.peer = peer
        self.tls = isinstance(stream, TlsStream)
        self.claimed = 0
        """Exchanges that were opened and not released."""
        self.exchanges = 0
        self.over = False
        self.forsaken = False
        """Whether the upstream has said that it takes no more requests here."""
        self._closing = False
        self._idle_since = trio.current_time()
        self._reading = trio.CancelScope()
        self._handlers[ResponseReceived] = self._response_received
        self._handlers[InformationalResponseReceived] = self._interim_received

    @property
    def accepting(self) -> bool:
        """Whether another exchange can be opened now."""
        return (
            not (self._closing or self.forsaken or self.over or self.broken)
            and self.claimed < self._max_streams
            and self.protocol.highest_outbound_stream_id < _LAST_STREAM_ID
        )

    @property
    def idle_since(self) -> float:
        """When the last exchange was released; infinity while one is open."""
        return math.inf if self.claimed else self._idle_since

    @property
    def _max_streams(self) -> int:
        if not self.protocol.greeted:
            return _ASSUMED_STREAMS
        return min(self.protocol.remote_settings.max_concurrent_streams, _MAX_STREAMS)

    def open(self) -> UpstreamExchange:
        """Claim a stream. It is opened by sending on it."""
        self.claimed += 1
        self.exchanges += 1
        return UpstreamExchange(self, reused=self.exchanges > 1)

    def close_when_idle(self) -> None:
        """Open nothing new, and end with the last open exchange."""
        self._closing = True
        if not self.claimed:
            self.stop()

    async def run(self) -> None:
        """Carry the connection until it is closed, by either side. Raises nothing but cancellation."""
        reason = "the upstream ended the connection"
        try:
            async with trio.open_nursery() as writer:
                writer.start_soon(self.write)
                with self._reading:
                    try:
                        await self.read()
                    except GONE as error:
                        reason = str(error)
                        self.broken = True
                self._over(self.error or reason)
                with trio.move_on_after(_FLUSH_TIMEOUT):
                    await self._say_goodbye()
                writer.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001  (the one catch-all of this connection: a defect ends it, and no other)
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._over(reason)
            self.stream.close()

    def _over(self, reason: str) -> None:
        """What was not written is told as `NotSent`, and so must not be written any more."""
        self.over = True
        if self.channels:
            self.protocol.clear_outbound_data_buffer()
        self.lose_all(reason)

    async def _say_goodbye(self) -> None:
        if self.taken:
            self.protocol.go_away(self.error_code)
            await self.flushed()

    def stop(self) -> None:
        self._reading.cancel()

    def released(self) -> None:
        self.claimed -= 1
        self._idle_since = trio.current_time()
        if (self._closing or self.forsaken) and not self.claimed:
            self.stop()

    def arrived(self, size: int) -> None:
        self.protocol.credit(size)

    # ── what comes ──────────────────────────────────────────────────────────────────────────────────────────────

    def peer_goes_away(self, event: ConnectionTerminated) -> None:
        self.forsaken = True
        last = event.last_stream_id or 0
        for channel in list(self.channels.values()):
            if channel.id > last and isinstance(channel, UpstreamExchange):
                channel.refused("the upstream goes away", "upstream_draining")
        if not self.claimed:
            self.stop()

    def _response_received(self, event: ResponseReceived) -> None:
        channel = self.channels.get(event.stream_id)
        if isinstance(channel, UpstreamExchange):
            try:
                head, length = h2_heads.response_head(
                    event.headers or [],
                    max_header_bytes=self._max_header_bytes,
                    max_header_fields=self._max_header_fields,
                )
                if head.status < 200:
                    raise MaybeSent("an interim answer that ends the stream", code="upstream_malformed")
            except MaybeSent as fault:
                channel.malformed(fault.detail)
            else:
                channel.answered(head, length, ended=event.stream_ended is not None)

    def _interim_received(self, event: InformationalResponseReceived) -> None:
        channel = self.channels.get(event.stream_id)
        if isinstance(channel, UpstreamExchange):
            try:
                head, _ = h2_heads.response_head(
                    event.headers or [],
                    max_header_bytes=self._max_header_bytes,
                    max_header_fields=self._max_header_fields,
                )
            except MaybeSent as fault:
                channel.malformed(fault.detail)
            else:
                channel.interim(head)


class _AnsweredEarly(Exception):
    """The upstream has sent its whole answer and wants no more of the request (RFC 9113 §8.1)."""


class UpstreamExchange(Channel):
    """One request and its answer (`client.UpstreamStream`)."""

    __slots__ = ("_fault", "_heads", "_mark", "_method", "_released", "_signal", "_unanswered", "connection", "reused")

    def __init__(self, connection: H2Connection, *, reused: bool) -> None:
        super().__init__(connection, _UNOPENED, None)
        self.connection = connection
        self.reused = reused
        self._method = ""
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

        Raises `NotSent` or `MaybeSent`, and lets what `body.receive` raises pass.
        """
        if head.method == "CONNECT":
            raise self._failed(NotSent, "no CONNECT over HTTP/2", "upstream_protocol")
        self._method = head.method
        try:
            await self.transmit(h2_heads.encode_request(head, fields, body.length, tls=self.connection.tls), body)
        except _AnsweredEarly:
            pass

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
                raise _AnsweredEarly
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
        if self._method == "HEAD" or head.status in (204, 304):
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
        raise OurFault("no tunnels over HTTP/2", code="tunnel_unsupported")

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def release(self) -> None:
        """Free the stream. The upstream sees a reset where either message is not whole."""
        if self._released:
            return
        self._released = True
        if self.id:
            if not (self.ended and self.body.complete):
                self.reset(ErrorCodes.CANCEL)
            self.connection.close_channel(self)
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
