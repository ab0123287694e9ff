"""HTTP/2 as a state machine: python-hyper's, bent where a proxy needs more. Does no I/O and knows no clock.

`h2` parses, validates and keeps the states of streams. What this file changes:

- a GOAWAY, sent or received, ends no stream below it (RFC 9113 §6.8): h2 closes the whole connection there;
- a malformed message is an error of its stream (§8.1.1), so that one bad request harms no other on its connection;
- so is a stream beyond the limit: it is refused, and may be tried again (§5.1.2, §8.7);
- what a peer can make us keep is bounded: settings that nobody knows, the encoder's table, the memory of closed streams,
  a frame that is announced larger than allowed;
- the connection's window is given back by one account (`credit`), also for data that nobody waits for any more;
- data for streams that we have reset is dropped for as much as was on its way, and no more;
- a frame that changes nothing is an event too (`Ignored`), so that it can be counted;
- an answer that makes a tunnel of its stream has no length, whatever it says (RFC 9110 §9.3.6);
- header sections are validated by `h2_validity`, which costs a tenth;
- what is remembered of a connection takes a fraction of the room (`h2_state`), and nothing in it refers back to the whole, so
  that it goes with the last reference, without the collector;
- a frame is not turned into text on its way in.

The names with an underscore are h2's own: the lock file pins them, and the tests of this room fail where they change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from h2.config import H2Configuration
from h2.connection import (
    AllowedStreamIDs,
    ConnectionInputs,
    ConnectionState,
    H2Connection,
    H2ConnectionStateMachine,
)
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import (
    DenialOfServiceError,
    FlowControlError,
    FrameTooLargeError,
    InvalidBodyLengthError,
    ProtocolError,
    StreamClosedError,
    StreamIDTooLowError,
)
from h2.settings import SettingCodes
from h2.stream import H2Stream, StreamClosedBy, StreamState
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from sidecar.wire import h2_validity
from sidecar.wire.h2_encoder import Encoder
from sidecar.wire.h2_state import ClosedStreams, HeaderTable, Settings
from sidecar.wire.h2_validity import Malformed

STREAM_WINDOW: Final = 65535
"""Bytes that may be on their way on one stream: RFC 9113's initial value, so that there is nothing to agree on first."""
_OVERSIZE: Final = 4
"""Header lists up to this many times the limit are decoded, so that they can be answered; above, the connection ends."""
_KNOWN_SETTINGS = frozenset(int(code) for code in SettingCodes)
_HIGHEST_STREAM_ID: Final = 2**31 - 1


class _Machine(H2ConnectionStateMachine):
    _transitions = {  # noqa: RUF012  (h2's own way)
        **H2ConnectionStateMachine._transitions,
        **{
            (state, ConnectionInputs.RECV_GOAWAY): (None, state)
            for state in (ConnectionState.IDLE, ConnectionState.CLIENT_OPEN, ConnectionState.SERVER_OPEN)
        },
    }


@dataclass(kw_only=True)
class Ignored(Event):
    """A frame that changed nothing: for a stream that is over, most often."""


@dataclass(kw_only=True)
class Dropped(Event):
    """Data that was on its way when we reset its stream."""


_IGNORED: Final = Ignored()
_DROPPED: Final = Dropped()


def _configuration(*, client: bool) -> H2Configuration:
    return H2Configuration(
        client_side=client,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )


_CLIENT: Final = _configuration(client=True)
_SERVER: Final = _configuration(client=False)


class CompressionError(ProtocolError):
    """A header block that cannot be decoded: from here on nothing could (RFC 9113 §4.3)."""

    error_code = ErrorCodes.COMPRESSION_ERROR


class Protocol(H2Connection):
    """One connection's state. After construction its first bytes wait in `data_to_send`.

    `window` is the connection's receive window in bytes, `max_streams` how many the peer may open at once.
    """

    def __init__(self, *, client: bool, max_header_bytes: int, max_streams: int, window: int) -> None:
        super().__init__(_CLIENT if client else _SERVER)
        values = {
            SettingCodes.MAX_HEADER_LIST_SIZE: max_header_bytes,
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.ENABLE_PUSH: 0,
        }
        if not client:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = max_streams
            values[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
        self.local_settings = Settings(client=client, initial_values=values)
        self.remote_settings = Settings(client=not client)
        self._max_block_bytes = self.decoder.max_header_list_size = _OVERSIZE * max_header_bytes
        self.decoder.header_table = HeaderTable()
        self.encoder = Encoder()
        self._closed_streams = ClosedStreams()
        self._frame_dispatch_table = _NONE  # bound methods: see `_RECEIVERS`
        self.state_machine = _Machine()
        self.greeted = False
        """Whether the peer's SETTINGS, which must come first, have come."""
        self._max_streams = max_streams
        self._owed = 0
        self._strays = 0
        """Bytes of data that may still come for streams that we have reset."""
        self.initiate_connection()
        self.increment_flow_control_window(window - STREAM_WINDOW)

    # ── what the I/O around it asks ─────────────────────────────────────────────────────────────────────────────

    @property
    def pending(self) -> int:
        """Bytes in `data_to_send`."""
        return len(self._data_to_send)

    @property
    def partial(self) -> bool:
        """Whether the peer is in the middle of a frame, or of a header block."""
        return bool(self.incoming_buffer._data or self.incoming_buffer._headers_buffer)

    @property
    def over(self) -> bool:
        """Whether an error has ended the connection: nothing but its GOAWAY is left to be sent."""
        return self.state_machine.state is ConnectionState.CLOSED

    @property
    def tunnels(self) -> bool:
        """Whether the peer takes extended CONNECT (RFC 8441 §3)."""
        return self.remote_settings.enable_connect_protocol == 1

    def go_away(self, code: ErrorCodes = ErrorCodes.NO_ERROR, *, soon: bool = False) -> None:
        """Announce that no stream beyond those seen so far will be served. Those go on.

        `soon` announces that this will be announced: what is on its way is still taken (RFC 9113 §6.8).
        """
        last = _HIGHEST_STREAM_ID if soon else self.highest_inbound_stream_id
        self._prepare_for_sending([GoAwayFrame(0, last_stream_id=last, error_code=code)])

    def fail(self, code: ErrorCodes) -> None:
        """End the connection for an error, unless one has ended it already."""
        if not self.over:
            self._terminate_connection(code)

    def credit(self, size: int) -> None:
        """Give `size` bytes of the connection's window back, now or together with more of them.

        They wait for company only while that cannot hold the peer up: no longer than the rest of the window lasts.
        """
        self._owed += size
        manager = self._inbound_flow_control_window_manager
        if self._owed and (self._owed >= manager.max_window_size // 2 or self._owed >= manager.current_window_size):
            if not self.over:
                self.increment_flow_control_window(self._owed)
            self._owed = 0

    def widen(self, stream_id: int, size: int) -> bool:
        """Give `size` bytes of a stream's window back. False where more of them should be waited for first."""
        stream = self.streams.get(stream_id)
        if stream is None or not stream.open or self.over:
            return True
        if size < STREAM_WINDOW // 2 and size < stream.inbound_flow_control_window:
            return False
        self.increment_flow_control_window(size, stream_id)
        return True

    def drop(self, stream_id: int, code: ErrorCodes) -> None:
        """Reset a stream, unless it has closed."""
        stream = self.streams.get(stream_id)
        if stream is not None and not stream.closed and not self.over:
            self._strays += max(stream.inbound_flow_control_window, 0)
            self.reset_stream(stream_id, code)

    def _open_streams(self, remainder: int) -> int:
        """Those that have closed, and are not forgotten yet, are counted off only where the number matters."""
        known = len(self.streams)
        if self.config.client_side and known < self.remote_settings.max_concurrent_streams:
            return known
        return super()._open_streams(remainder)

    def forget(self, stream_id: int) -> None:
        """Keep of a closed stream nothing but how it closed."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def receive_data(self, data: bytes) -> list[Event]:  # type: ignore[override]
        """As h2's. Raises `h2.exceptions.ProtocolError` after having queued the GOAWAY that says so."""
        try:
            events = super().receive_data(data)
            coming = self.incoming_buffer._data
            if len(coming) >= 3 and int.from_bytes(coming[:3]) > self.max_inbound_frame_size:
                raise FrameTooLargeError("a frame is announced larger than allowed")  # h2 would wait for all of it
            begun = self.incoming_buffer._headers_buffer
            if begun and sum(len(frame.data) for frame in begun) > self._max_block_bytes:
                raise DenialOfServiceError("a header block is larger than any that would be taken")
        except ProtocolError as error:
            self.fail(error.error_code)
            raise
        return events

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if not self.greeted:
            if type(frame) is not SettingsFrame or "ACK" in frame.flags:
                raise ProtocolError("the first frame is not SETTINGS")
            self.greeted = True
        try:
            frames, events = _RECEIVERS[type(frame)](self, frame)
        except StreamClosedError as error:
            frames, events = self._on_closed_stream(error)
        except StreamIDTooLowError as error:
            if self._stream_closed_by(error.stream_id) is None:
                raise  # it was skipped, and so closed without ever having been open (RFC 9113 §5.1.1)
            frames, events = self._on_closed_stream(StreamClosedError(error.stream_id))
        self._prepare_for_sending(frames)
        if not events:
            # Whoever reads late says so of streams that have ended meanwhile: that is an update like the others.
            late = type(frame) is WindowUpdateFrame
            return [WindowUpdated(stream_id=frame.stream_id, delta=0) if late else _IGNORED]
        return list(events)

    def _stream_closed_by(self, stream_id: int) -> StreamClosedBy | None:
        stream = self.streams.get(stream_id)
        return self._closed_streams[stream_id] if stream is None else stream.closed_by

    def _on_closed_stream(self, error: StreamClosedError) -> tuple[list[Frame], list[Event]]:
        """What crossed our own reset is ignored; after the peer's, and after its end, it is an error (RFC 9113 §5.1)."""
        closed_by = self._stream_closed_by(error.stream_id)
        if error._events:  # this very frame has closed the stream
            return [_rst_stream(error.stream_id, error.error_code)], list(error._events)
        if closed_by is StreamClosedBy.SEND_RST_STREAM:
            return [], []
        if closed_by is not StreamClosedBy.RECV_RST_STREAM:
            raise error
        event = StreamReset(stream_id=error.stream_id, error_code=error.error_code, remote_reset=False)
        return [_rst_stream(error.stream_id, error.error_code)], [event]

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        """A header block is decoded whatever becomes of it: the peer's encoder has moved on."""
        headers = self._decoded(frame.data)
        self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
        stream = self.streams.get(frame.stream_id)
        if stream is None:
            if self.config.client_side:
                self._get_stream_by_id(frame.stream_id)  # raises: a server opens no streams here
            stream = self._begin_new_stream(frame.stream_id, AllowedStreamIDs.ODD)
            # Those that have closed are counted off only when the number seems to be exceeded.
            if len(self.streams) > self._max_streams and self.open_inbound_streams >= self._max_streams:
                return self._broken(stream, ErrorCodes.REFUSED_STREAM)
        elif stream.closed:  # before h2 finds fault with what it says, and it is reset once more
            raise StreamClosedError(frame.stream_id)
        try:
            frames, events = stream.receive_headers(headers, "END_STREAM" in frame.flags, None)
            _validate(events[0])
        except StreamClosedError:
            raise
        except ProtocolError as error:
            return self._broken(stream, error.error_code)
        except Malformed:
            return self._broken(stream, ErrorCodes.PROTOCOL_ERROR)
        if stream.request_method == b"CONNECT":
            stream._expected_content_length = None
        if "PRIORITY" in frame.flags:
            self._receive_priority_frame(frame)
        return frames, events

    def _decoded(self, block: bytes) -> list[tuple[bytes, bytes]]:
        try:
            return list(self.decoder.decode(block, raw=True))
        except OversizedHeaderListError as error:
            raise DenialOfServiceError(str(error)) from error
        except (HPACKError, IndexError, ValueError) as error:
            raise CompressionError(str(error)) from error

    def _receive_data_frame(self, frame: DataFrame) -> tuple[list[Frame], list[Event]]:
        try:
            return super()._receive_data_frame(frame)
        except InvalidBodyLengthError as error:
            self.credit(frame.flow_controlled_length)
            return self._broken(self.streams[frame.stream_id], error.error_code)

    def _broken(self, stream: H2Stream, code: ErrorCodes) -> tuple[list[Frame], list[Event]]:
        """Close a stream for what the peer did on it. h2 may have moved it to any state on the way to its error."""
        self._strays += max(stream.inbound_flow_control_window, 0)
        stream.state_machine.state = StreamState.CLOSED
        stream.state_machine.stream_closed_by = StreamClosedBy.SEND_RST_STREAM
        event = StreamReset(stream_id=stream.stream_id, error_code=code, remote_reset=False)
        return [_rst_stream(stream.stream_id, code)], [event]

    def _handle_data_on_closed_stream(
        self, events: list[Event], exc: StreamClosedError, frame: DataFrame
    ) -> tuple[list[Frame], list[Event]]:
        size = frame.flow_controlled_length
        self.credit(size)
        frames, more = self._on_closed_stream(exc)
        if frames or not size:
            return frames, events + more
        self._strays -= size
        if self._strays < 0:
            raise FlowControlError("more data for streams that were reset than their windows allowed")
        return frames, [*events, _DROPPED]

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[Event]]:
        """Unknown settings are ignored (RFC 9113 §6.5.2), and not remembered."""
        frame.settings = {code: value for code, value in frame.settings.items() if code in _KNOWN_SETTINGS}
        return super()._receive_settings_frame(frame)

    def _receive_rst_stream_frame(self, frame: RstStreamFrame) -> tuple[list[Frame], list[Event]]:
        outbound = self._stream_id_is_outbound(frame.stream_id)
        if frame.stream_id > (self.highest_outbound_stream_id if outbound else self.highest_inbound_stream_id):
            raise ProtocolError("RST_STREAM for a stream that is idle")  # RFC 9113 §6.4
        return super()._receive_rst_stream_frame(frame)

    def _receive_naked_continuation(self, frame: ContinuationFrame) -> None:
        """h2 looks at the stream first, and so passes over one that belongs to nothing on a stream that is forgotten."""
        raise ProtocolError("a CONTINUATION without its HEADERS")  # RFC 9113 §6.10

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        self.state_machine.process_input(ConnectionInputs.RECV_GOAWAY)
        event = ConnectionTerminated()
        event.error_code = error_code(frame.error_code)
        event.last_stream_id = frame.last_stream_id
        return [], [event]


_NONE: Final[dict[Any, Any]] = {}
_RECEIVERS: Final[dict[type[Frame], Callable[[Protocol, Any], tuple[list[Frame], list[Event]]]]] = {
    kind: getattr(Protocol, receive.__name__) for kind, receive in H2Connection()._frame_dispatch_table.items()
}
"""What h2 keeps as bound methods, in each connection: a circle of references, for the collector to find."""


def _validate(event: Event) -> None:
    """Raise `Malformed` where the fields of a head, or of trailers, are not well-formed."""
    if isinstance(event, RequestReceived):
        event.headers = h2_validity.request(event.headers or [])
    elif isinstance(event, ResponseReceived | InformationalResponseReceived):
        h2_validity.response(event.headers or [])
    elif isinstance(event, TrailersReceived):
        h2_validity.trailers(event.headers or [])


def error_code(number: int) -> ErrorCodes:
    """An unknown code means nothing special (RFC 9113 §7)."""
    try:
        return ErrorCodes(number)
    except ValueError:
        return ErrorCodes.INTERNAL_ERROR


def _rst_stream(stream_id: int, code: ErrorCodes) -> RstStreamFrame:
    return RstStreamFrame(stream_id, error_code=code)
