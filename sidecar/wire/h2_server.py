"""The server's side of an HTTP/2 connection: many requests at once, each handed over with the way back.

One task reads, one writes, and each request has a task of its own, in a cancel scope that a reset by the client ends. What
goes wrong with one stream stays with it: a request without a single meaning is answered there, a malformed one reset.
Only an error of the connection itself ends it for all (RFC 9113 §5.4).

A drain announces itself first, takes what was on its way until then, and says the last stream that it will serve after a
PING has come back, or a second (§6.8): so a request that crosses the announcement is not lost. The open streams finish. A stream
that comes after that, or is too many, is refused: it has certainly not been acted on, and may be tried elsewhere (§8.7).

An extended CONNECT (RFC 8441) is handed over as a `GET` with `upgrade` and without a body: what follows on its stream belongs
to the tunnel, once there is one.
"""

from __future__ import annotations

import math
from typing import Any

import trio
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, PingAckReceived, RequestReceived, StreamReset

from sidecar.errors import ClientFault
from sidecar.model import Aborted, Body, Fields, Request, RequestHead, maker
from sidecar.wire import answers, h1, h2_heads
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Known, NoLongerTrusted, Served
from sidecar.wire.h2_link import GONE, Link
from sidecar.wire.h2_liveness import Liveness
from sidecar.wire.h2_protocol import Protocol
from sidecar.wire.h2_reply import H2Reply, ServedStream
from sidecar.wire.h2_signal import Allowance
from sidecar.wire.network import Stream

_WINDOW_BYTES = 1024 * 1024
"""What one connection may hold of bodies that nobody has read yet. It has one peer, who is in nobody's way but its own."""
_MAX_RESETS = 2
"""Times `max_streams`: how many streams, above those that it lets finish, a client may break off within `_RESET_SECONDS`.
All of them at once, and all again, is what an impatient client does; more is a flood (CVE-2023-44487)."""
_RESET_SECONDS = 10.0
_MAX_TASKS = 2
"""Times `max_streams`: tasks of streams that are over may still be cleaning up."""
_DRAIN_TIMEOUT = 1.0
"""How long requests may have been on their way when a drain was announced, where the client answers no PING."""
_DRAIN_PING = b"draining"
_PROBE_INTERVALS = (0.01, 0.5)
"""Seconds between looks at a client that has ended its side: the first, and the longest."""
_request = maker(Request)


async def serve(stream: Stream, buffer: bytearray, served: Served) -> None:
    """Serve requests until the client or we end the connection. `buffer` holds what was read of it already."""
    first = bytes(buffer)
    buffer.clear()
    connection = _Connection(stream, served)
    served.on_drain, served.on_look = connection.drain, connection.look
    try:
        await connection.run(first)
    finally:
        served.on_drain = served.on_look = served.idle = None
        stream.close()
    if connection.defect is not None:
        raise connection.defect


class _Connection(Link):
    _handled = {**Link._handled, RequestReceived: "_request_received"}  # noqa: RUF012

    def __init__(self, stream: Stream, served: Served) -> None:
        limits = served.limits
        super().__init__(
            stream,
            Protocol(
                client=False,
                max_header_bytes=limits.max_header_bytes,
                max_streams=limits.max_streams,
                window=_WINDOW_BYTES,
            ),
            Liveness(limits.keepalive_timeout, trio.current_time()),
            max_header_bytes=limits.max_header_bytes,
            max_header_fields=limits.max_header_fields,
        )
        self.served = served
        self.defect: Exception | None = None
        """What a handler raised that it should have dealt with. The connection takes nothing new and ends with it."""
        self._resets = Allowance(_MAX_RESETS * limits.max_streams, _RESET_SECONDS)
        self._leaving_at: float | None = None
        """When a drain that was announced is carried out, at the latest."""
        self._leaving = False
        """Whether new streams are refused."""
        self._peer_leaves = False
        self._half_closed = False
        """Whether the client has ended its side of the connection."""
        self._idle_until = trio.current_time() + limits.idle_timeout
        self._pressed = False
        self._waiting_scope = trio.CancelScope()
        self._tasks: trio.Nursery

    async def run(self, first: bytes) -> None:
        linger_timeout = self.served.limits.linger_timeout
        async with trio.open_nursery() as writer:
            writer.start_soon(self.write)
            async with trio.open_nursery() as self._tasks:
                orderly = await self._serve(first)
                self.lose_all("the connection ended")
            with trio.move_on_after(linger_timeout):
                await self.flushed()
            writer.cancel_scope.cancel()
        if orderly and not self.broken:
            await self.stream.close_gently(linger_timeout)

    # ── the life of the connection ──────────────────────────────────────────────────────────────────────────────

    async def _serve(self, first: bytes) -> bool:
        """Read, and let requests be handled, until the connection is over. False where the client has gone."""
        if self.served.draining:
            self.drain()
        if first and not self.feed(first):
            return self._failed()
        while True:
            with trio.CancelScope() as self._waiting_scope:
                self._watch()
                try:
                    await self.read()
                except GONE:
                    pass
                else:
                    if self.error is not None:
                        return self._failed()
                    await self._see_out()
                return self._left()
            if self.broken:
                return self._left()
            if not self.channels:
                return self._idled()

    def _failed(self) -> bool:
        self.served.reason = self.error
        return True

    async def _see_out(self) -> None:
        """The client has ended its side. What it has asked for whole is answered; half a request is none.

        Whether it still takes answers, the kernel knows once something was sent: one that is gone answers with a reset.
        """
        self._half_closed = self._peer_leaves = True
        for channel in list(self.channels.values()):
            if not channel.body.complete:
                channel.lost("the client ended the connection", None, remote=True)
                self.served.reason = "exchange_aborted"
        if self.channels:
            self.ask()
        interval, longest = _PROBE_INTERVALS
        while self.channels and not self.broken and self.stream.left() != "reset":
            for channel in list(self.waiting):  # nobody is left who could widen its window
                channel.lost("the client ended the connection", None, remote=True)
                self.served.reason = "exchange_aborted"
            await trio.sleep(interval)
            interval = min(2 * interval, longest)

    def _left(self) -> bool:
        """On a connection without open streams a client that ends, or resets, has done nothing wrong."""
        if self.liveness.dead:
            self.served.reason = "keepalive_timeout"
        elif self.channels:
            self.served.reason = "exchange_aborted"
        elif not self.served.exchanges and not self._leaving:
            self.served.reason = "reset_by_peer" if self.protocol.greeted else "head_incomplete"
        return False

    def _idled(self) -> bool:
        if self._leaving or self.served.draining:
            self.served.reason = self.served.reason or "draining"
        elif not self._peer_leaves:
            self.served.reason = "head_timeout" if self._pressed else "idle_timeout"
        self._go_away()
        return True

    def stop(self) -> None:
        self._waiting_scope.cancel()

    def drain(self) -> None:
        """Announce the end; take what crosses that, then nothing new, and end with the last open stream."""
        if self._leaving_at is None and not self._leaving and not self.protocol.over:
            self._leaving_at = trio.current_time() + _DRAIN_TIMEOUT
            self.protocol.go_away(soon=True)
            self.ask(_DRAIN_PING)

    def look(self, now: float) -> None:
        if self._leaving_at is not None and now >= self._leaving_at:
            self._leave()
        if not self._half_closed:
            super().look(now)

    def _answered(self, event: PingAckReceived) -> None:
        super()._answered(event)
        if event.ping_data == _DRAIN_PING and self._leaving_at is not None:
            self._leave()

    def _leave(self) -> None:
        """Take nothing new from here on, and end with the last open stream."""
        self._go_away()
        if not self.channels:
            self.stop()

    def _go_away(self) -> None:
        if not self._leaving:
            self._leaving = True
            if not self.protocol.over:
                self.protocol.go_away()
                self.ring()

    def peer_goes_away(self, event: ConnectionTerminated) -> None:
        self._peer_leaves = True
        if not self.channels:
            self.stop()

    def feed(self, data: bytes) -> bool:
        fine = super().feed(data)
        if fine and not self.channels:
            self._watch()
        return fine

    def _watch(self) -> None:
        """Set how long the client may be silent: not at all bounded while streams are open."""
        scope = self._waiting_scope
        if self.channels:
            self.served.idle = None
            scope.deadline = math.inf
            return
        self.served.idle = scope
        if self._leaving or self._peer_leaves:
            scope.cancel()
        elif self.protocol.partial or not self.protocol.greeted:
            if not self._pressed or scope.deadline == math.inf:
                self._pressed = True
                scope.deadline = min(self._idle_until, trio.current_time() + self.served.limits.header_timeout)
        else:
            self._pressed = False
            scope.deadline = self._idle_until

    # ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _request_received(self, event: RequestReceived) -> None:
        limits = self.served.limits
        if self._leaving or len(self.channels) >= _MAX_TASKS * limits.max_streams:
            self.protocol.drop(event.stream_id, ErrorCodes.REFUSED_STREAM)
            self.protocol.forget(event.stream_id)
            return
        ended = event.stream_ended is not None
        fields = event.headers or []
        length: int | None = 0 if ended else None
        kept: dict[str, Any] | None = None
        request: RequestHead | ClientFault
        try:
            raw = h2_heads.written(fields, ended=ended)
            known = self.served.recent.get(raw)
            request, framing, _, kept = known if known is not None else self._read(raw, fields, ended=ended)
            length = None if framing == h1.CHUNKED else framing
            if not self.served.fresh():
                request = NoLongerTrusted()
        except ClientFault as fault:
            request = fault
        channel = ServedStream(self, event.stream_id, length)
        channel.tunnelled = isinstance(request, RequestHead) and request.upgrade is not None
        if ended:
            channel.body.end()
        if not self.channels:
            self._waiting_scope.deadline = math.inf
            self.served.idle = None
        self.channels[channel.id] = channel
        if isinstance(request, ClientFault):
            self._tasks.start_soon(self._refuse, channel, request, fields)
        else:
            self.served.exchanges += 1
            self._tasks.start_soon(self._handle, channel, request, kept)

    def _read(self, raw: bytes, fields: Fields, *, ended: bool) -> Known:
        """What `h2_heads.request_head` makes of a head, and where it comes again room for what others make of it.

        A length that is not stated is `h1.CHUNKED`. Raises `ClientFault`.
        """
        limits, recent = self.served.limits, self.served.recent
        head, length = h2_heads.request_head(
            fields,
            tls=self.served.connection.tls,
            ended=ended,
            max_header_bytes=limits.max_header_bytes,
            max_header_fields=limits.max_header_fields,
            max_request_line_bytes=limits.max_request_line_bytes,
            allow_encoded_slash=limits.allow_encoded_slash,
        )
        framing = h1.CHUNKED if length is None else length
        if not recent.wants(raw):
            return head, framing, True, None
        known: Known = (head, framing, True, {})
        recent.keep(raw, known)
        return known

    async def _handle(self, channel: ServedStream, head: RequestHead, kept: dict[str, Any] | None) -> None:
        reply = H2Reply(channel, head.method)
        body: Body = Whole() if channel.tunnelled else channel.body
        try:
            with channel.scope:
                await self.served.handle(self.served.connection, _request(head=head, body=body, kept=kept), reply)
        except Aborted:
            pass
        except Exception as error:  # noqa: BLE001  (a defect ends its own stream now, and the connection after the others)
            self.defect = self.defect or error
            self._go_away()
        finally:
            self._finish(channel)

    async def _refuse(self, channel: ServedStream, fault: ClientFault, fields: Fields) -> None:
        method = next((value for name, value in fields if name == b":method"), b"")
        try:
            with channel.scope:
                await H2Reply(channel, method.decode("latin-1")).send(answers.fault(fault, request_fields=fields))
        except Aborted:
            pass
        finally:
            self._finish(channel)
        self.served.reason = fault.code  # all that is written down of it, since there is no exchange
        if isinstance(fault, NoLongerTrusted):
            self._leave()

    def _finish(self, channel: ServedStream) -> None:
        """Close what the exchange left open. What a client still sends of a body that nobody wants is not waited for."""
        if channel.ended and not channel.switched:
            self._resets.earn()
            self._nuisances.earn()
            if not channel.body.complete:
                self.protocol.drop(channel.id, ErrorCodes.NO_ERROR)  # RFC 9113 §8.1
        elif not channel.over:
            # A tunnel that breaks is cancelled (RFC 8441 §5), and half of one is no message that was whole.
            self.protocol.drop(channel.id, ErrorCodes.CANCEL if channel.switched else ErrorCodes.INTERNAL_ERROR)
        self.close_channel(channel)
        if not self.channels:
            self._idle_until = trio.current_time() + self.served.limits.idle_timeout
            self._watch()

    def _stream_reset(self, event: StreamReset) -> None:
        # Also of streams that our own side reset for what the client sent: the work is lost in the same way.
        self._resets.spend()
        super()._stream_reset(event)

    def consumed(self, size: int) -> None:
        self.protocol.credit(size)
