"""HTTP/2 connections as a whole: the state machine alone, the server's driver, and the client's.

Whatever a peer sends: nothing but an error of the protocol, which is told by GOAWAY; no more kept than the limits allow; no
answer that is longer than what asked for it, but for bodies; and frames from us that a reader takes without a complaint.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import trio
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived, StreamReset
from h2.exceptions import ProtocolError
from trio.testing import wait_all_tasks_blocked

from fuzz import conversations, frames, h2_messages, inputs
from fuzz.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GIVEN_FIELDS,
    GOAWAY,
    HEADERS,
    KNOWN_FIELDS,
    ONE_SETTING,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RAW,
    REPEAT,
    RST_STREAM,
    SETTINGS,
    SMALL_UPDATE,
    WINDOW_UPDATE,
    record,
)  # fmt: skip
from fuzz.registry import Target
from sidecar.errors import ClientFault, MaybeSent, NotSent, UpstreamFault
from sidecar.model import Aborted, Connection, Reply, Request, RequestHead, ResponseHead, Trailers
from sidecar.wire import h2_client, h2_heads, h2_server, target
from sidecar.wire.answers import Whole
from sidecar.wire.h2_protocol import Protocol

MAX_STREAMS = 4
MAX_HEADER_BYTES = 2048
_FRAME = 16384 + 9
_GOAWAY_BYTES = 9 + 8


# ── the state machine ─────────────────────────────────────────────────────────────────────────────────────────────


def protocol(data: bytes) -> bool:
    """A byte of flags (1: we are the client, 2: without the peer's preface), one that chooses the pieces, then records."""
    flags, choice = (data[0], data[1]) if len(data) > 1 else (0, 0)
    client = bool(flags & 1)
    sent = b"".join(frames.frames_of(data[2:]))
    if not flags & 2:
        sent = (b"" if client else PREFACE) + h2_messages.HELLO + sent
    whole = _fed(client, [sent])
    parts = _fed(client, inputs.cut(sent, choice if len(sent) < 512 else choice | 128))
    if ErrorCodes.FRAME_SIZE_ERROR in (parts[1], whole[1]):  # it is seen as soon as three bytes have come
        assert parts[1]
        assert whole[1]
        assert parts[2][:-_GOAWAY_BYTES] == whole[2][:-_GOAWAY_BYTES]
    else:
        assert parts[1:] == whole[1:], "how the bytes arrive decides what is answered"
    assert whole[1] is not None or parts[0] == whole[0]
    return whole[1] is None and len(whole[0]) > 1


def _fed(client: bool, pieces: list[bytes]) -> tuple[list[object], object, bytes]:
    """(what happened, the error that ended it, what we send back)."""
    made = Protocol(client=client, max_header_bytes=MAX_HEADER_BYTES, max_streams=MAX_STREAMS, window=1 << 20)
    if client:
        for _ in range(3):
            made.send_headers(made.get_next_available_stream_id(), h2_messages.ASKED, end_stream=True)
    greeting = made.data_to_send()
    happened: list[object] = []
    error: object = None
    fed = 0
    answered = b""
    for piece in pieces:
        try:
            events = made.receive_data(piece)
        except ProtocolError as failure:
            error = failure.error_code
            events = []
        for event in events:
            happened.append(_told(event))
            _judged(event, made)
        fed += len(piece)
        answered += made.data_to_send()
        _bounded(made)
        assert len(answered) <= 4 * fed + 64, "much is answered to little"
        if error is not None:
            assert made.over
            break
    frames.understood(greeting + answered)
    return happened, error, answered


def _told(event: Event) -> object:
    names = ("stream_id", "headers", "data", "error_code", "remote_reset", "flow_controlled_length", "last_stream_id")
    return type(event).__name__, *(getattr(event, name, None) for name in names)


def _judged(event: Event, made: Protocol) -> None:
    if isinstance(event, StreamReset):
        made.forget(event.stream_id)
    elif isinstance(event, RequestReceived):
        try:
            h2_heads.request_head(event.headers or [], tls=False, ended=False, **h2_messages.LIMITS)
        except ClientFault:
            pass
        else:
            h2_messages.obeys(event.headers or [])


def _bounded(made: Protocol) -> None:
    """RFC 9113 gives a peer many ways to have things kept."""
    incoming = made.incoming_buffer
    assert made.over or len(incoming._data) < _FRAME + len(PREFACE), "what came last before an error is not looked at"
    assert sum(len(frame.data) for frame in incoming._headers_buffer) <= 4 * MAX_HEADER_BYTES + _FRAME
    assert made.open_inbound_streams <= MAX_STREAMS
    assert len(made.streams) <= 2 * MAX_STREAMS + 1, "streams that are over are kept"
    assert len(made._closed_streams) <= made.MAX_CLOSED_STREAMS
    assert made.decoder.header_table._current_size <= 4096 >= made.encoder.header_table_size
    assert len(made.remote_settings._settings) < 16


# ── the server ────────────────────────────────────────────────────────────────────────────────────────────────────


def server(data: bytes) -> bool:
    """A byte for how the client ends and one that chooses the pieces, then records."""
    ending, choice = (data[0] % 3, data[1]) if len(data) > 1 else (0, 0)
    sent = frames.frames_of(data[2:])
    pieces = [PREFACE + h2_messages.HELLO, *(sent if choice == 0 else inputs.cut(b"".join(sent), choice | 16))]
    return _served(pieces[:200], ending)


def _served(pieces: list[bytes], ending: int) -> bool:
    made: list[Protocol] = []
    handled: list[str] = []
    heard = b""

    def capture(**options: Any) -> Protocol:
        made.append(Protocol(**options))
        return made[-1]

    async def handle(connection: Connection, request: Request, reply: Reply) -> None:
        # As an exchange gives up what does not get on: an answer may wait for a window that nobody will open.
        with trio.move_on_after(conversations.IDLE):
            await _handle(request, reply)

    async def _handle(request: Request, reply: Reply) -> None:
        head = request.head
        assert head.target is target.ASTERISK or target.origin_form(str(head.target).encode()) == head.target
        handled.append(head.target.path)
        if head.upgrade is not None:
            await conversations.echo(await reply.tunnel(ResponseHead(status=101)))
            return
        read = await conversations.read_whole(request)
        await reply.send(conversations.answer_to(head.target.path, read))

    def observe() -> None:
        for one in made:
            _bounded(one)
            assert one.pending < 2 << 20

    async def conversation() -> None:
        nonlocal heard
        served = conversations.received("h2", handle)
        with conversations.pair() as (ours, theirs):
            async with trio.open_nursery() as around:
                around.start_soon(conversations.looked_after, served)
                async with trio.open_nursery() as both:
                    both.start_soon(h2_server.serve, ours, bytearray(), served)
                    heard = await conversations.play(theirs, pieces, ending, observe)
                assert ours.closed
                around.cancel_scope.cancel()

    with mock.patch.object(h2_server, "Protocol", capture):
        conversations.held(conversation)
    answered = frames.understood(heard)
    return bool(handled) and any(stream.heads for stream in answered.values())


# ── the client ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Watched(h2_client.H2Connection):
    """Its own catch-all must not hide a defect from us."""

    defect: BaseException | None = None

    def feed(self, data: bytes) -> bool:
        try:
            return super().feed(data)
        except Exception as error:
            self.defect = error
            raise

    async def write(self) -> None:
        try:
            await super().write()
        except Exception as error:
            self.defect = error
            raise


def client(data: bytes) -> bool:
    """A byte for how the upstream ends, one that chooses the pieces, then records: what it sends after three requests."""
    ending, choice = (data[0] % 3, data[1]) if len(data) > 1 else (0, 0)
    sent = frames.frames_of(data[2:])
    pieces = [h2_messages.HELLO, *(sent if choice == 0 else inputs.cut(b"".join(sent), choice | 16))]
    return _asked(pieces[:200], ending)


def _asked(pieces: list[bytes], ending: int) -> bool:
    outcomes: dict[str, str] = {}
    heard = b""

    async def ask(connection: h2_client.H2Connection, method: str, body: bytes) -> None:
        exchange = connection.open()
        answered = False
        try:
            where = target.origin_form(b"/" + method.encode())
            head = RequestHead(method=method, target=where, host="a.test", port=None, fields=[], protocol="HTTP/2")
            with trio.move_on_after(20):
                await exchange.send(head, [], Whole(body))
                while (found := await exchange.receive()).status < 200:
                    assert 100 <= found.status != 101
                answered = True
                read, length = 0, exchange.body.length
                while (item := await exchange.body.receive()) is not None:
                    read += 0 if isinstance(item, Trailers) else len(item)
                assert length in (None, read), "the body is not as long as it said"
                assert read == 0 or (method != "HEAD" and found.status not in (204, 304))
                outcomes[method] = "answered"
        except NotSent:
            assert not answered, "what was answered was sent"
            outcomes[method] = "not sent"
        except (MaybeSent, UpstreamFault, Aborted):
            outcomes[method] = "failed"
        finally:
            exchange.release()

    async def conversation() -> None:
        nonlocal heard
        with conversations.pair() as (ours, theirs):
            connection = _Watched(ours, max_header_bytes=MAX_HEADER_BYTES, max_header_fields=24)

            def observe() -> None:
                assert connection.defect is None
                assert connection.protocol.pending < 2 << 20
                assert len(connection.protocol.streams) <= 3
                assert len(connection.protocol._closed_streams) <= Protocol.MAX_CLOSED_STREAMS

            async def close_at_last() -> None:
                await trio.sleep(conversations.IDLE)
                connection.close_when_idle()

            async with trio.open_nursery() as both:
                both.start_soon(connection.run)
                both.start_soon(close_at_last)
                for method, body in (("GET", b""), ("HEAD", b""), ("POST", b"x" * 1000)):
                    both.start_soon(ask, connection, method, body)
                    await wait_all_tasks_blocked()  # so that they have the streams 1, 3 and 5
                heard = await conversations.play(theirs, pieces, ending, observe)
            assert connection.defect is None
            assert connection.claimed == 0
            assert not connection.channels

    conversations.held(conversation)
    frames.understood(heard)
    return "answered" in outcomes.values()


# ── seeds ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head(stream_id: int, block: int, *, end: bool = True) -> bytes:
    return record(KNOWN_FIELDS, END_STREAM if end else 0, stream_id, bytes([block]))


_TALK = (
    _head(1, 0) + _head(3, 1, end=False) + record(DATA, 0, 3, b"hello") + record(DATA, END_STREAM, 3, b"!"),
    _head(1, 2, end=False) + record(DATA, PADDED, 1, b"\x02hello\0\0") + _head(1, 7) + record(PING, 0, 0, b"12345678"),
    _head(1, 3) + record(SMALL_UPDATE, 12, 0, b"\x80") + record(SMALL_UPDATE, 12, 1, b"\x80") + record(ONE_SETTING, 0, 0, b"\4\0\0\xff\xff"),
    _head(1, 5, end=False) + record(DATA, 0, 1, b"tunnelled") + record(DATA, END_STREAM, 1, b""),
    record(GIVEN_FIELDS, END_STREAM, 1, inputs.field_bytes([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")])),
    record(HEADERS, END_STREAM, 1, frames.BLOCKS[0][:9]) + record(CONTINUATION, END_HEADERS, 0x01, frames.BLOCKS[0][9:]),
    _head(1, 4) + record(PRIORITY, 0, 1, b"\0\0\0\0\x10") + record(RST_STREAM, 0, 1, b"\0\0\0\x08") + _head(3, 0) + record(SETTINGS, 1, 0),
)  # fmt: skip
_ANSWERS = (
    _head(1, 10, end=False) + _head(1, 9, end=False) + record(DATA, END_STREAM, 1, b"hello") + _head(3, 12) + _head(5, 8),
    _head(5, 8, end=False) + record(DATA, 0, 5, b"data") + _head(5, 7) + _head(1, 11) + _head(3, 8),
    _head(1, 8) + record(GOAWAY, 0, 0, b"\0\0\0\3\0\0\0\0") + _head(3, 9),
    _head(1, 8, end=False) + record(DATA, END_STREAM, 1, b"x" * 200) + record(SMALL_UPDATE, 4, 0, b"\x40"),
)  # fmt: skip
_TROUBLE = (
    record(PING, 0, 0, b"12345678") + record(REPEAT, size=40), record(SETTINGS, 0, 0) + record(REPEAT, size=40), record(DATA, 0, 0, b"x"),
    _head(1, 0) + _head(1, 0), _head(2, 0), record(CONTINUATION, 4, 1, b"x"), record(HEADERS, 0, 1, b"\x82") + record(PING, 0, 0, b"12345678"),
    record(WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), record(SMALL_UPDATE, 15, 0, b"\xff") + record(REPEAT, size=40), record(RST_STREAM, 0, 9, b"\0\0\0\0"),
    record(PUSH_PROMISE, 4, 1, b"\0\0\0\2"), record(RAW, 0, 0, b"\xff\xff\xff\0\0\0\0\0\1"), record(ONE_SETTING, 0, 0, b"\4\xff\xff\xff\xff"),
    record(ONE_SETTING, 0, 0, b"\5\0\0\0\1"), record(GOAWAY, 0, 0, b"\0\0"), record(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff"), record(CONTINUATION, 0, 1, b"x" * 250) + record(REPEAT, size=40),
)  # fmt: skip
WORDS = tuple(
    [record(kind, flags, 1, b"\0\0\0\1") for kind in range(16) for flags in (0, 1)] + [_head(number, number) for number in (1, 3, 5, 7)]
    + [b"\0\0\0\x08", b"\x7f\xff\xff\xff", b"\x01", b"\x03", b"\x05", b"\xff", b"PRI * HTTP/2.0\r\n"]
)  # fmt: skip


# Of a stream that was reset, and of one that was reset and forgotten, the same must be said.
_RESET = record(GIVEN_FIELDS, END_STREAM, 1)
_STRAY = b"\0\x14" + _RESET + record(CONTINUATION, END_HEADERS, 1, frames.BLOCKS[0])
_TWICE = b"\1\x14" + _RESET + _head(1, 10)


def _protocol_good() -> list[bytes]:
    return [*(b"\0\7" + one for one in _TALK), *(b"\1\7" + one for one in _ANSWERS), b"\0\0" + _TROUBLE[0], _TWICE]


def _protocol_bad() -> list[bytes]:
    errors = (_TROUBLE[2], *_TROUBLE[4:7])
    return [b"", *(b"\0\0" + one for one in errors), b"\2\0" + _TALK[0], *(b"\1\0" + one for one in errors), _STRAY]


TARGETS = (
    Target(name="h2.protocol", share=2.0, run=protocol, good=_protocol_good, bad=_protocol_bad, words=WORDS, max_bytes=1024, examples=150),
    Target(name="h2.server", share=3.0, run=server, good=lambda: [bytes([number % 3, number % 2]) + one for number, one in enumerate(_TALK)], bad=lambda: [b"", *(b"\0\0" + one for one in _TROUBLE if one[0] != KNOWN_FIELDS)], words=WORDS, max_bytes=768, examples=80),
    Target(name="h2.client", share=3.0, run=client, good=lambda: [bytes([number % 3, number % 2]) + one for number, one in enumerate(_ANSWERS)], bad=lambda: [b"", *(b"\0\0" + one for one in _TROUBLE)], words=WORDS, max_bytes=768, examples=80),
)  # fmt: skip
