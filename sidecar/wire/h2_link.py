"""What both sides of an HTTP/2 connection share: its reader, its writer, and what comes for its streams.

Three kinds of tasks meet at one `Protocol`, which is only ever touched between two awaits. The reader feeds it and hands
on what came. Whoever sends queues frames in it and rings; the one writer takes all that is queued at its next turn, so
that the frames of many streams leave together and a cancelled sender leaves no half frame behind.

What serves no request is counted (`Allowance`), whatever kind of frame it is: a flood of any of them ends the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import trio
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import DenialOfServiceError, ProtocolError

from sidecar.errors import ClientFault
from sidecar.model import Fields, Trailers
from sidecar.wire import h2_heads
from sidecar.wire.h2_channel import Channel
from sidecar.wire.h2_liveness import Finding, Liveness
from sidecar.wire.h2_protocol import Ignored, Protocol, error_code
from sidecar.wire.h2_signal import Allowance, Signal
from sidecar.wire.network import Stream

GONE = (trio.BrokenResourceError, trio.ClosedResourceError)

_READ_BYTES = 16384
"""Of small frames this many bytes take us some 15 ms, in which nobody else has a turn."""
_QUEUED_BYTES = 65536
"""Bodies wait while this much waits for the writer."""
_MAX_QUEUED_BYTES = 1024 * 1024
"""With this much waiting (answers to PING, SETTINGS and the like, then) the peer is taken not to read at all."""
_MAX_NUISANCES = 1000
_MAX_UPDATES = 1000
_UPDATES_AHEAD = 100_000
"""Updates of windows are many where a client says so for each small frame that it has read, and it may read them late."""
_NUISANCE_SECONDS = 10.0
_PING = b"there?\0\0"


class Link:
    """One connection: a reader (`read`), a writer (`write`), and the streams between them."""

    _handled: ClassVar[Mapping[type[Event], str]] = {
        DataReceived: "_data_received",
        StreamEnded: "_stream_ended",
        TrailersReceived: "_trailers_received",
        StreamReset: "_stream_reset",
        WindowUpdated: "_window_updated",
        RemoteSettingsChanged: "_settings_changed",
        ConnectionTerminated: "peer_goes_away",
        SettingsAcknowledged: "_nuisance",
        PingReceived: "_nuisance",
        PingAckReceived: "_answered",
        PriorityUpdated: "_nuisance",
        UnknownFrameReceived: "_nuisance",
        Ignored: "_nuisance",
    }
    """What is done about each event; each side adds its own."""
    _handlers: ClassVar[dict[type[Event], Callable[[Any, Any], None]]]
    """The same as functions, of each side's class. Bound methods would be a kilobyte in each connection, and a circle of
    references that only the collector undoes."""

    def __init_subclass__(cls) -> None:
        cls._handlers = {event: getattr(cls, name) for event, name in cls._handled.items()}

    def __init__(
        self, stream: Stream, protocol: Protocol, liveness: Liveness, *, max_header_bytes: int, max_header_fields: int
    ) -> None:
        self.stream = stream
        self.protocol = protocol
        self.channels: dict[int, Channel] = {}
        self.waiting: dict[Channel, None] = {}
        """Senders that wait for a window. (A dict: an empty set takes three times the room.)"""
        self.held: dict[Channel, None] = {}
        """Senders that wait for the writer."""
        self.broken = False
        """Whether nothing can be sent any more."""
        self.error_code = ErrorCodes.NO_ERROR
        """Of the error that ended the connection."""
        self.taken = 0
        """Bytes that the writer has taken. What was queued behind them has certainly not left."""
        self.liveness = liveness
        self._bell = Signal()
        self._rested = Signal()
        self._resting = False
        self._max_header_bytes = max_header_bytes
        self._max_header_fields = max_header_fields
        self._nuisances = Allowance(_MAX_NUISANCES, _NUISANCE_SECONDS)
        self._updates = Allowance(_MAX_UPDATES, _NUISANCE_SECONDS, _UPDATES_AHEAD)

    @property
    def error(self) -> str | None:
        """Our name for the error that ended the connection."""
        return f"h2_{self.error_code.name.lower()}" if self.error_code else None

    # ── the writer ──────────────────────────────────────────────────────────────────────────────────────────────

    def ring(self) -> None:
        self._bell.ring()

    async def write(self) -> None:
        """Send what is queued, as it is queued. Ends by cancellation, or when the stream breaks."""
        protocol, stream = self.protocol, self.stream
        try:
            while True:
                data = protocol.data_to_send()
                if data:
                    self.taken += len(data)
                    await stream.send_all(data)
                    for channel in self.held:
                        channel.room.ring()
                else:
                    self._resting = True
                    self._rested.ring()
                    await self._bell.wait()
                    self._resting = False
        except GONE:
            self.broken = True
            self._rested.ring()
            self.stop()

    async def flushed(self) -> None:
        """Wait until all that is queued has been handed to the kernel, or cannot be."""
        while not self.broken and (self.protocol.pending or not self._resting):
            self.ring()
            await self._rested.wait()

    @property
    def backed_up(self) -> bool:
        return self.protocol.pending >= _QUEUED_BYTES

    def allowed(self, stream_id: int) -> int:
        """How many bytes may be sent on a stream in one frame now."""
        if self.backed_up:
            return 0
        protocol = self.protocol
        return min(protocol.local_flow_control_window(stream_id), protocol.max_outbound_frame_size)

    async def wait_for_room(self, channel: Channel) -> None:
        queue = self.held if self.backed_up else self.waiting
        queue[channel] = None
        try:
            await channel.room.wait()
        finally:
            queue.pop(channel, None)

    def _wake_waiting(self) -> None:
        for channel in self.waiting:
            channel.room.ring()

    # ── the reader ──────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self) -> None:
        """Read until the peer ends or breaks off, or an error ends the connection. Raises trio's resource errors."""
        while True:
            data = await self.stream.receive_some(_READ_BYTES)
            self.liveness.heard = True
            if not data or not self.feed(data):
                return

    def feed(self, data: bytes) -> bool:
        """Take in what was read. False after an error of the connection, which `error` names and a GOAWAY will tell."""
        try:
            for event in self.protocol.receive_data(data):
                handler = self._handlers.get(type(event))
                if handler is not None:
                    handler(self, event)
            if self.protocol.pending > _MAX_QUEUED_BYTES:
                raise DenialOfServiceError("the peer does not read")
        except ProtocolError as error:
            self.protocol.fail(error.error_code)
            self.error_code = error.error_code
            return False
        finally:
            self.ring()
        return True

    def _data_received(self, event: DataReceived) -> None:
        size = event.flow_controlled_length
        channel = self.channels.get(event.stream_id)
        if channel is None:
            self.protocol.credit(size)
            return
        self.arrived(size)
        data = event.data
        if channel.body.exceeded_by(len(data)):
            self.consumed(size)
            self._malformed(channel, "the body is longer than its length")
            return
        if data:
            channel.body.feed(data)
            self._nuisances.earn()
        elif event.stream_ended is None:
            self._nuisance(event)
        if size > len(data):
            channel.consumed(size - len(data))  # padding

    def _stream_ended(self, event: StreamEnded) -> None:
        channel = self.channels.get(event.stream_id)
        if channel is not None and not channel.body.complete:
            self._end(channel, None)

    def _trailers_received(self, event: TrailersReceived) -> None:
        channel = self.channels.get(event.stream_id)
        if channel is not None:
            self._end(channel, event.headers or [])

    def _end(self, channel: Channel, trailers: Fields | None) -> None:
        """The peer has ended its message. What h2 lets pass is an error of the stream too (RFC 9113 §8.1.1)."""
        body = channel.body
        try:
            if body.length is not None and body.received != body.length:
                raise ClientFault("the body is shorter than its length")
            if trailers is not None:
                if channel.tunnelled:
                    raise ClientFault("a header section in a tunnel")
                h2_heads.check(trailers, self._max_header_bytes, self._max_header_fields)
        except ClientFault as fault:
            self._malformed(channel, fault.detail or fault.public)
        else:
            body.end(None if trailers is None else Trailers(trailers))

    def _malformed(self, channel: Channel, reason: str) -> None:
        channel.reset(ErrorCodes.PROTOCOL_ERROR)
        channel.lost(reason, ErrorCodes.PROTOCOL_ERROR, remote=False)

    def _stream_reset(self, event: StreamReset) -> None:
        channel = self.channels.get(event.stream_id)
        code = error_code(event.error_code)
        if channel is not None:
            channel.lost(f"the stream was reset: {code.name}", code, remote=event.remote_reset)
        else:
            self.protocol.forget(event.stream_id)

    def _window_updated(self, event: WindowUpdated) -> None:
        self._updates.spend()
        if event.stream_id:
            channel = self.channels.get(event.stream_id)
            if channel is not None:
                channel.room.ring()
        else:
            self._wake_waiting()

    def _settings_changed(self, event: RemoteSettingsChanged) -> None:
        self._nuisance(event)
        self._wake_waiting()  # the windows of all streams may have grown

    def sent(self, size: int) -> None:
        """Data was sent: that earns updates of two windows for each frame, and for each KiB of it."""
        self._nuisances.earn()
        self._updates.earn(2 + (size >> 10))

    def _nuisance(self, _: Event) -> None:
        self._nuisances.spend()

    def _answered(self, event: PingAckReceived) -> None:
        if not self.liveness.asked:
            self._nuisance(event)
        self.liveness.asked = False

    # ── signs of life ───────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, data: bytes = _PING) -> None:
        """Send a PING with these 8 bytes."""
        if not (self.broken or self.protocol.over):
            self.liveness.asked = True
            self.protocol.ping(data)
            self.ring()

    def look(self, now: float) -> None:
        """Ask a peer that has been quiet for long, and end the connection of one that does not answer. Called now and then."""
        finding = self.liveness.look(now)
        if finding is Finding.ASK:
            self.ask()
        elif finding is Finding.DEAD:
            self.stream.abort()  # the reader and the writer notice

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def lose_all(self, reason: str) -> None:
        """The connection is gone, and with it every message that is not whole."""
        for channel in list(self.channels.values()):
            channel.lost(reason, None, remote=True)

    def close_channel(self, channel: Channel) -> None:
        """Keep nothing of a stream that is over on both sides, or has been reset."""
        if self.channels.pop(channel.id, None) is not None:
            self.consumed(channel.body.unread)
            channel.body.close()
            self.protocol.forget(channel.id)
            self.ring()

    # ── what each side adds ─────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Nothing can be sent any more: let `read` end."""
        raise NotImplementedError

    def peer_goes_away(self, event: ConnectionTerminated) -> None:
        raise NotImplementedError

    def arrived(self, size: int) -> None:
        """`size` bytes of the connection's window are used up."""

    def consumed(self, size: int) -> None:
        """`size` bytes of a body that had arrived are no longer held."""
