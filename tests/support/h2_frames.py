"""A peer that speaks HTTP/2 frame by frame: it keeps no state of streams, so that it can do what no library would."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import hpack
import trio
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from sidecar.wire.network import Stream

__all__ = [
    "ContinuationFrame", "DataFrame", "GoAwayFrame", "HeadersFrame", "Message", "Peer", "PingFrame", "PriorityFrame",
    "RstStreamFrame", "SettingsFrame", "WindowUpdateFrame", "stream_pair",
]  # fmt: skip

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"backend.internal"), (b":path", b"/items")]
POST = [(b":method", b"POST"), *GET[1:]]


def stream_pair(buffer_bytes: int | None = None) -> tuple[Stream, Stream]:
    """Two ends; `buffer_bytes` is about what one that nobody reads from holds (else what the kernel likes)."""
    ours, theirs = socket.socketpair()
    if buffer_bytes is not None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    ours.setblocking(False)
    theirs.setblocking(False)
    return Stream(ours), Stream(theirs)


@dataclass
class Message:
    """What came on one stream until its end: the last head, everything before it, and how it ended."""

    heads: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(dict(self.heads[0])[b":status"])

    @property
    def fields(self) -> dict[bytes, bytes]:
        return dict(self.heads[0])


class Peer:
    """`frames` holds all that came; `messages` what that means for each stream."""

    def __init__(self, stream: Stream | None = None) -> None:
        if stream is not None:
            self.stream = stream
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.frames: list[Frame] = []
        self.messages: dict[int, Message] = {}
        self.acknowledges = True
        """Whether the other side's SETTINGS and PINGs are acknowledged as they come."""
        self._sent: dict[int, int] = {}
        self._input = bytearray()
        self._block = b""

    async def start(self, settings: dict[int, int] | None = None, *, preface: bool = True) -> None:
        await self.raw((PREFACE if preface else b"") + SettingsFrame(0, settings=settings or {}).serialize())

    async def raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def send(self, *frames: Frame) -> None:
        for frame in frames:
            if isinstance(frame, DataFrame):
                self._sent[frame.stream_id] = self.sent(frame.stream_id) + len(frame.data)
        await self.raw(b"".join(frame.serialize() for frame in frames))

    def sent(self, stream_id: int) -> int:
        """Bytes of data that were sent on a stream."""
        return self._sent.get(stream_id, 0)

    def head(self, stream_id: int, fields: list[tuple[bytes, bytes]], *, end: bool = False) -> HeadersFrame:
        frame = HeadersFrame(stream_id, data=self.encoder.encode(fields), flags=["END_HEADERS"])
        if end:
            frame.flags.add("END_STREAM")
        return frame

    async def request(
        self, stream_id: int, fields: list[tuple[bytes, bytes]] | None = None, *, end: bool = True
    ) -> None:
        await self.send(self.head(stream_id, GET if fields is None else fields, end=end))

    async def data(self, stream_id: int, data: bytes = b"", *, end: bool = False) -> None:
        await self.send(DataFrame(stream_id, data=data, flags=["END_STREAM"] if end else []))

    async def next(self, *kinds: type[Frame]) -> Frame:
        """The next frame, or the next of these kinds. Raises EOFError where there is none."""
        while True:
            frame = await self._next()
            if not kinds or isinstance(frame, kinds):
                return frame

    async def message(self, stream_id: int) -> Message:
        """Read until the message of this stream has ended, or was reset."""
        while True:
            message = self.messages.setdefault(stream_id, Message())
            if message.ended or message.reset is not None:
                return message
            await self._next()

    async def goaway(self) -> GoAwayFrame:
        for frame in self.frames:
            if isinstance(frame, GoAwayFrame):
                return frame
        frame = await self.next(GoAwayFrame)
        assert isinstance(frame, GoAwayFrame)
        return frame

    async def rest(self) -> None:
        """Read to the end."""
        while True:
            try:
                await self._next()
            except EOFError:
                return

    async def settle(self) -> None:
        """Read all that the other side sends until it has nothing more to say."""
        with trio.move_on_after(0.01):
            await self.rest()

    def resets(self) -> dict[int, int]:
        return {frame.stream_id: frame.error_code for frame in self.frames if isinstance(frame, RstStreamFrame)}

    def window_given(self, stream_id: int) -> int:
        return sum(
            frame.window_increment
            for frame in self.frames
            if isinstance(frame, WindowUpdateFrame) and frame.stream_id == stream_id
        )

    @staticmethod
    def settings_of(data: bytes) -> dict[int, int]:
        """Of the first frame of a connection, which must be SETTINGS."""
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        assert isinstance(frame, SettingsFrame)
        frame.parse_body(memoryview(data[9 : 9 + length]))
        return frame.settings

    async def _next(self) -> Frame:
        if self._input.startswith(PREFACE):
            del self._input[: len(PREFACE)]
        while len(self._input) < 9 or len(self._input) < 9 + int.from_bytes(self._input[:3], "big"):
            try:
                data = await self.stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._input += data
            if self._input.startswith(PREFACE):
                del self._input[: len(PREFACE)]
        frame, length = Frame.parse_frame_header(memoryview(bytes(self._input[:9])))
        frame.parse_body(memoryview(bytes(self._input[9 : 9 + length])))
        del self._input[: 9 + length]
        self.frames.append(frame)
        self._note(frame)
        if self.acknowledges and isinstance(frame, SettingsFrame | PingFrame) and "ACK" not in frame.flags:
            try:
                await self.send(_acknowledgement(frame))
            except trio.BrokenResourceError:
                pass
        return frame

    def _note(self, frame: Frame) -> None:
        message = self.messages.setdefault(frame.stream_id, Message())
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            self._block += frame.data
            if "END_HEADERS" in frame.flags:
                message.heads.append([tuple(item) for item in self.decoder.decode(self._block, raw=True)])
                self._block = b""
        elif isinstance(frame, DataFrame):
            message.body += frame.data
        elif isinstance(frame, RstStreamFrame):
            message.reset = frame.error_code
        if "END_STREAM" in frame.flags:
            message.ended = True


def _acknowledgement(frame: SettingsFrame | PingFrame) -> Frame:
    if isinstance(frame, SettingsFrame):
        return SettingsFrame(0, flags=["ACK"])
    return PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"])
