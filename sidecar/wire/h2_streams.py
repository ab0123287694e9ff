"""What both sides of an HTTP/2 connection share: its reader, its writer, and the way of bodies through its streams.

Three kinds of tasks meet at one `Protocol`, which is only ever touched between two awaits. The reader feeds it and hands
on what came. Whoever sends queues frames in it and rings; the one writer takes all that is queued at its next turn, so
that the frames of many streams leave together and a cancelled sender leaves no half frame behind. Bodies are pulled:
a sender waits for the windows of the peer and for the writer, a receiver gives window back as it consumes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
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
from sidecar.model import Aborted, Body, Data, Fields, Trailers
from sidecar.wire import h2_heads
from sidecar.wire.h2_heads import CONNECTION_FIELDS
from sidecar.wire.h2_protocol import Protocol, error_code
from sidecar.wire.network import Stream

GONE = (trio.BrokenResourceError, trio.ClosedResourceError)

_READ_BYTES = 16384
"""Of small frames this many bytes take us some 15 ms, in which nobody else has a turn."""
_QUEUED_BYTES = 65536
"""Bodies wait while this much waits for the writer."""
_MAX_QUEUED_BYTES = 1024 * 1024
"""With this much waiting (answers to PING, SETTINGS and the like, then) the peer is taken not to read at all."""
_MAX_NUISANCES = 1000
_NUISANCE_SECONDS = 10.0
_LATER: Final = object()


class Signal:
    """Wakes the one task that waits for it. What a ring means must be seen elsewhere: it is not kept."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    @property
    def awaited(self) -> bool:
        return self._task is not None

    async def wait(self) -> None:
        assert self._task is None  # noqa: S101  (a second waiter would be a defect of ours)
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def ring(self) -> None:
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)


class Allowance:
    """How much a peer may ask for that serves no request: `limit` units above what it earns, within `seconds`."""

    __slots__ = ("_limit", "_seconds", "_since", "_spent")

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._since = 0.0
        self._spent = 0

    def spend(self, now: float) -> None:
        """Raises `DenialOfServiceError` (ENHANCE_YOUR_CALM) where the limit is passed."""
        if now - self._since > self._seconds:
            self._since = now
            self._spent = min(self._spent, 0)
        self._spent += 1
        if self._spent > self._limit:
            raise DenialOfServiceError("too much that serves no request")

    def earn(self) -> None:
        if self._spent > -self._limit:
            self._spent -= 1


class Incoming:
    """`model.Body` of one stream, filled by the reader. It holds no more than the stream's window."""

    __slots__ = ("_channel", "_data", "_failure", "_signal", "_trailers", "complete", "length", "received")

    def __init__(self, channel: Channel, length: int | None) -> None:
        self._channel = channel
        self._data: bytes | bytearray = b""
        self._trailers: Trailers | None = None
        self._failure: str | None = None
        self._signal = Signal()
        self.length = length
        self.received = 0
        self.complete = False
        """Whether the end has come; there may be something left to be read before it."""

    @property
    def ready(self) -> bool:
        return bool(self._data) or self.complete or self._failure is not None

    @property
    def unread(self) -> int:
        return len(self._data)

    def exceeded_by(self, size: int) -> bool:
        return self.length is not None and self.received + size > self.length

    async def receive(self) -> Data | Trailers | None:
        while True:
            if self._data:
                data, self._data = self._data, b""
                self._channel.consumed(len(data))
                return bytes(data)
            if self._failure is not None:
                raise Aborted(self._failure)
            if self.complete:
                trailers, self._trailers = self._trailers, None
                return trailers
            await self._signal.wait()

    def feed(self, data: bytes) -> None:
        """Small frames are put together: each kept apart would weigh many times its bytes."""
        self.received += len(data)
        if not self._data:
            self._data = data
        elif type(self._data) is bytearray:
            self._data += data
        else:
            self._data = bytearray(self._data) + data
        self._signal.ring()

    def end(self, trailers: Trailers | None = None) -> None:
        if trailers is not None and trailers.fields:
            self._trailers = trailers
        self.complete = True
        self._signal.ring()

    def fail(self, reason: str) -> None:
        """Break off, unless all has come. What had come before is dropped."""
        if not self.complete and self._failure is None:
            self._failure = reason
            self._channel.consumed(len(self._data))
            self._data = b""
            self._signal.ring()


class Channel:
    """One stream, as its connection sees it. Each side adds how messages begin and what a loss means to its users."""

    __slots__ = ("_owed", "body", "bytes_sent", "ended", "id", "link", "room")

    def __init__(self, link: Link, stream_id: int, length: int | None) -> None:
        self.link = link
        self.id = stream_id
        self.body = Incoming(self, length)
        self.room = Signal()
        self.bytes_sent = 0
        self.ended = False
        """Whether our own message is whole: its last frame is queued."""
        self._owed = 0

    # ── what each side adds ─────────────────────────────────────────────────────────────────────────────────────

    def begin(self, fields: list[tuple[bytes, bytes]], *, end: bool) -> None:
        """Queue the head of our message. Raises where it can no longer be sent."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise where our message can no longer be sent."""
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
                    await self._send(b"", end=True)
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
                await self._send(item, end=following is None)
                item = following

    def _check_length(self, body: Body) -> None:
        if body.length is not None and self.bytes_sent != body.length:
            raise Aborted("the body is shorter than its length")

    async def _send(self, data: bytes, *, end: bool) -> None:
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
            link.earn()
            self.bytes_sent += len(part)
            if sent == size:
                self.ended = end
                return
            if link.waiting or link.held:
                await trio.lowlevel.checkpoint()  # others wait for the same room: a frame each, in turn

    async def _send_trailers(self, fields: Fields) -> None:
        kept = [field for field in fields if field[0] not in CONNECTION_FIELDS and field[0][:1] != b":"]
        if not kept:
            await self._send(b"", end=True)
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


class Link:
    """One connection: a reader (`read`), a writer (`write`), and the streams between them."""

    def __init__(self, stream: Stream, protocol: Protocol, *, max_header_bytes: int, max_header_fields: int) -> None:
        self.stream = stream
        self.protocol = protocol
        self.channels: dict[int, Channel] = {}
        self.waiting: set[Channel] = set()
        """Senders that wait for a window."""
        self.held: set[Channel] = set()
        """Senders that wait for the writer."""
        self.broken = False
        """Whether nothing can be sent any more."""
        self.error_code = ErrorCodes.NO_ERROR
        """Of the error that ended the connection."""
        self.taken = 0
        """Bytes that the writer has taken. What was queued behind them has certainly not left."""
        self._bell = Signal()
        self._rested = Signal()
        self._resting = False
        self._max_header_bytes = max_header_bytes
        self._max_header_fields = max_header_fields
        self._nuisances = Allowance(_MAX_NUISANCES, _NUISANCE_SECONDS)
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            DataReceived: self._data_received,
            StreamEnded: self._stream_ended,
            TrailersReceived: self._trailers_received,
            StreamReset: self._stream_reset,
            WindowUpdated: self._window_updated,
            RemoteSettingsChanged: self._settings_changed,
            ConnectionTerminated: self.peer_goes_away,
            SettingsAcknowledged: self._nuisance,
            PingReceived: self._nuisance,
            PriorityUpdated: self._nuisance,
            UnknownFrameReceived: self._nuisance,
        }

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
        queue.add(channel)
        try:
            await channel.room.wait()
        finally:
            queue.discard(channel)

    def _wake_waiting(self) -> None:
        for channel in self.waiting:
            channel.room.ring()

    # ── the reader ──────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self) -> None:
        """Read until the peer ends or breaks off, or an error ends the connection. Raises trio's resource errors."""
        while True:
            data = await self.stream.receive_some(_READ_BYTES)
            if not data or not self.feed(data):
                return

    def feed(self, data: bytes) -> bool:
        """Take in what was read. False after an error of the connection, which `error` names and a GOAWAY will tell."""
        try:
            for event in self.protocol.receive_data(data):
                handler = self._handlers.get(type(event))
                if handler is not None:
                    handler(event)
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
        if event.stream_id:
            channel = self.channels.get(event.stream_id)
            if channel is not None:
                channel.room.ring()
        else:
            self._wake_waiting()

    def _settings_changed(self, event: RemoteSettingsChanged) -> None:
        self._nuisance(event)
        self._wake_waiting()  # the windows of all streams may have grown

    def earn(self) -> None:
        self._nuisances.earn()

    def _nuisance(self, _: Event) -> None:
        self._nuisances.spend(trio.current_time())

    def lose_all(self, reason: str) -> None:
        """The connection is gone, and with it every message that is not whole."""
        for channel in list(self.channels.values()):
            channel.lost(reason, None, remote=True)

    def close_channel(self, channel: Channel) -> None:
        """Keep nothing of a stream that is over on both sides, or has been reset."""
        if self.channels.pop(channel.id, None) is not None:
            self.consumed(channel.body.unread)
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
