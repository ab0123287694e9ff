"""Sequences of HTTP/2 frames as bytes that a fuzzer can change, and a second reading of the frames that we send.

A record is four bytes and a payload: what kind, which flags, which stream, how much payload. Its frame gets a right length and,
for the made-up kinds, a payload in order, so that a change leads to another conversation and not just to a broken one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import hpack
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from fuzz import inputs

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_REPEATED_BYTES = 4096

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
KNOWN_FIELDS, GIVEN_FIELDS, ONE_SETTING, SMALL_UPDATE, RAW, REPEAT = range(10, 16)
"""Made-up kinds: a header block by its number, one of given fields, SETTINGS of a pair, a window update of one byte, bytes
without a frame, and the last frame once more for each unit of its size."""
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8

_HEAD = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.test"), (b":path", b"/a")]
BLOCKS = tuple(
    inputs.literal_block(fields)
    for fields in (
        _HEAD,
        [(b":method", b"POST"), *_HEAD[1:3], (b":path", b"/echo")],
        [(b":method", b"POST"), *_HEAD[1:3], (b":path", b"/echo"), (b"content-length", b"5"), (b"te", b"trailers")],
        [*_HEAD[:3], (b":path", b"/big")],
        [(b":method", b"HEAD"), *_HEAD[1:]],
        [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *_HEAD[1:3], (b":path", b"/tunnel")],
        [(b":method", b"GET"), *_HEAD[1:3], (b":path", b"/%2e%2e/a")],
        [(b"x-trailer", b"1")],
        [(b":status", b"200")],
        [(b":status", b"200"), (b"content-length", b"5")],
        [(b":status", b"103"), (b"link", b"</a>")],
        [(b":status", b"204")],
        [(b":status", b"304"), (b"content-length", b"9")],
        [*_HEAD, (b"x", b"y" * 3000)],
        [*_HEAD, (b"Bad", b"a\r\nb")],
    )
)
"""Heads of requests, of answers, and trailers; some malformed."""


def record(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"", *, size: int | None = None) -> bytes:
    return bytes([kind, flags, stream_id, len(payload) if size is None else size]) + payload


def frames_of(data: bytes) -> list[bytes]:
    """What the records say, frame by frame."""
    frames: list[bytes] = []
    at = 0
    while at + 4 <= len(data):
        kind, flags, stream_id, size = data[at : at + 4]
        if kind % 16 == REPEAT:
            frames += [
                frame for frame in frames[-1:] for _ in range(min(size, MAX_REPEATED_BYTES // max(len(frame), 1)))
            ]
            at += 4
            continue
        payload = data[at + 4 : at + 4 + size]
        at += 4 + len(payload)
        frames.append(_frame(kind % 16, flags, stream_id, payload))
    return frames


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    match kind:
        case 10:
            number = payload[0] if payload else 0
            return _serialised(HEADERS, flags & ~PADDED & ~0x20 | END_HEADERS, stream_id, BLOCKS[number % len(BLOCKS)])
        case 11:
            block = inputs.literal_block(inputs.fields_of(payload))
            return _serialised(HEADERS, flags & ~PADDED & ~0x20 | END_HEADERS, stream_id, block)
        case 12:
            code, value = (payload[0], int.from_bytes(payload[1:5], "big")) if payload else (0, 0)
            return _serialised(SETTINGS, 0, 0, code.to_bytes(2, "big") + value.to_bytes(4, "big"))
        case 13:
            return _serialised(
                WINDOW_UPDATE, 0, stream_id, (payload[0] << (flags & 15) if payload else 0).to_bytes(4, "big")
            )
        case 14:
            return payload
    return _serialised(kind if kind < 10 else flags, flags, stream_id, payload)


def _serialised(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


# ── what we send ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Stream:
    heads: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    data: int = 0
    ended: bool = False
    reset: bool = False


def parsed(sent: bytes) -> Iterator[Frame]:
    """Every whole frame of it."""
    at = len(PREFACE) if sent.startswith(PREFACE) else 0
    while at + 9 <= len(sent):
        frame, length = Frame.parse_frame_header(memoryview(sent[at : at + 9]))
        if at + 9 + length > len(sent):
            return
        frame.parse_body(memoryview(sent[at + 9 : at + 9 + length]))
        yield frame
        at += 9 + length


def understood(sent: bytes) -> dict[int, Stream]:
    """What our frames mean to a peer that takes nothing amiss but errors. Raises where one of them is an error."""
    decoder = hpack.Decoder()
    streams: dict[int, Stream] = {}
    block: list[bytes] = []
    failed = False
    for frame in parsed(sent):
        assert not failed or isinstance(frame, GoAwayFrame), "something follows the GOAWAY of an error"
        assert not block or isinstance(frame, ContinuationFrame), "a header block is interrupted"
        stream = streams.setdefault(frame.stream_id, Stream())
        if isinstance(frame, HeadersFrame | ContinuationFrame | DataFrame):
            assert frame.stream_id, "a message on the connection"
            assert not stream.reset, "a frame behind a reset"
            assert not stream.ended or isinstance(frame, ContinuationFrame), "a frame behind the end"
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            block.append(frame.data)
            if "END_HEADERS" in frame.flags:
                stream.heads.append(inputs.decoded_block(b"".join(block), decoder))
                block = []
        elif isinstance(frame, DataFrame):
            assert stream.heads, "data without a head"
            stream.data += len(frame.data)
        elif isinstance(frame, RstStreamFrame):
            stream.reset = True
        elif isinstance(frame, GoAwayFrame):
            failed = bool(frame.error_code)
        if "END_STREAM" in frame.flags:
            stream.ended = True
    return streams
