"""The client's side of an HTTP/2 connection: many requests at once to one upstream that has proven itself.

The connection is shared by requests of different callers, so nothing of one may hold up another: the connection's window is
given back as data arrives, and only the window of its own stream waits for a slow reader; what is malformed in one
answer is an error of its stream.

What may be tried again is said by the protocol: a stream that was refused, or that lies above the last one of a GOAWAY,
has not been acted on (RFC 9113 §8.7), nor has one whose first byte we never wrote: `NotSent`. All else is `MaybeSent`.

A request with `upgrade` is sent as an extended CONNECT (RFC 8441), where the upstream has said that it takes them; a 2xx that
answers it is told as what HTTP/1.1 would say, 101.
"""

from __future__ import annotations

import math

import trio
from h2.events import ConnectionTerminated, InformationalResponseReceived, RemoteSettingsChanged, ResponseReceived

from sidecar.errors import MaybeSent
from sidecar.model import Workload
from sidecar.wire import h2_heads
from sidecar.wire.h2_exchange import UpstreamExchange
from sidecar.wire.h2_link import GONE, Link
from sidecar.wire.h2_liveness import Liveness
from sidecar.wire.h2_protocol import STREAM_WINDOW, Protocol
from sidecar.wire.network import Stream
from sidecar.wire.tls import TlsStream

_MAX_STREAMS = 200
"""Open at once, where the upstream allows more. Each holds a stream's window of an answer at most."""
_ASSUMED_STREAMS = 100
"""Until the upstream has said how many it allows (RFC 9113 §6.5.2 recommends no fewer)."""
_WINDOW_BYTES = 2 * _MAX_STREAMS * STREAM_WINDOW
_LAST_STREAM_ID = 2**31 - 1 - 2 * _MAX_STREAMS
_FLUSH_TIMEOUT = 1.0
_LAST_WORDS_TIMEOUT = 0.1
"""For a goodbye when we are cancelled: as much as a socket that takes it at once needs."""
_SETTINGS_TIMEOUT = 5.0
"""For the upstream to say whether it takes tunnels: its SETTINGS come first of all."""
_SLOWER = 5
"""See `Liveness`."""


class H2Connection(Link):
    """A connection that carries any number of exchanges. `run` must be running for them to get anywhere."""

    _handled = {  # noqa: RUF012
        **Link._handled,
        ResponseReceived: "_response_received",
        InformationalResponseReceived: "_interim_received",
    }

    def __init__(
        self,
        stream: Stream,
        *,
        max_header_bytes: int,
        max_header_fields: int,
        keepalive_timeout: float = 60.0,
        peer: Workload | None = None,
    ) -> None:
        super().__init__(
            stream,
            Protocol(client=True, max_header_bytes=max_header_bytes, max_streams=0, window=_WINDOW_BYTES),
            Liveness(keepalive_timeout, trio.current_time(), slower=_SLOWER),
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
        self._greeted = trio.Event()
        self._heard_of = 0
        """Exchanges that had been opened when anything was last heard of the upstream, as of a look."""
        self._idle_since = trio.current_time()
        self._reading = trio.CancelScope()

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

    async def greeted(self) -> None:
        """Wait for the upstream's SETTINGS, but not for long."""
        if not self.protocol.greeted:
            with trio.move_on_after(_SETTINGS_TIMEOUT):
                await self._greeted.wait()

    def look(self, now: float) -> None:
        """As `Link.look`. A connection that carries nothing is not asked: it is closed in time. Unless what it carried last
        was given up without a word from the upstream, since the next exchange would fare no better.
        """
        if self.liveness.heard:
            self._heard_of = self.exchanges
        elif not self.channels and self.exchanges == self._heard_of:
            self.liveness.heard = True
        super().look(now)

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
                        reason = "the upstream gave no sign of life" if self.liveness.dead else str(error)
                        self.broken = True
                self._over(self.error or reason)
                with trio.move_on_after(_FLUSH_TIMEOUT):
                    await self._say_goodbye()
                writer.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001  (the one catch-all of this connection: a defect ends it, and no other)
            reason = f"{type(error).__name__}: {error}"
        finally:
            # Of what was cut off a part may have left: then there is no telling where a frame would begin.
            well = self._resting and not self.over and not self.broken
            self._over(reason)
            if well:
                await self._last_words()
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

    async def _last_words(self) -> None:
        """Cancelled, tell the upstream that nothing is wrong with it (RFC 9113 §6.8), as far as that goes at once."""
        self.protocol.go_away()
        with trio.move_on_after(_LAST_WORDS_TIMEOUT, shield=True):
            try:
                await self.stream.send_all(self.protocol.data_to_send())
            except GONE:
                pass

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

    def _settings_changed(self, event: RemoteSettingsChanged) -> None:
        super()._settings_changed(event)
        self._greeted.set()

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
