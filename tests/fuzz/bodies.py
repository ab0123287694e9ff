"""The decoder of chunked bodies (`sidecar.wire.h1.Chunks`), and what we write ourselves.

However the bytes arrive, they mean the same; and what they mean, a second decoder says too, down to where the next message
begins. Nothing is held back that could be handed on.
"""

from __future__ import annotations

from fuzz import inputs, reference
from fuzz.registry import Target
from sidecar.errors import ClientFault
from sidecar.model import Trailers
from sidecar.wire import h1

MAX_TRAILER_BYTES = 300
MAX_TRAILERS = 5


def chunked(data: bytes) -> bool:
    """A byte that chooses the pieces, then what is sent behind a head with `Transfer-Encoding: chunked`."""
    choice, raw = (data[0], data[1:]) if data else (0, b"")
    expected = reference.chunked(raw, max_trailer_bytes=MAX_TRAILER_BYTES, max_trailers=MAX_TRAILERS)
    for pieces in ([raw], inputs.cut(raw, 1 if len(raw) < 256 else 8), inputs.cut(raw, choice)):
        assert _decoded(pieces) == expected
    if expected.state != "whole":
        return False
    last = h1.encode_trailers(expected.trailers) if expected.trailers else h1.LAST_CHUNK
    written = h1.encode_chunk(expected.data) + last + expected.rest
    again = reference.chunked(written, max_trailer_bytes=2 * MAX_TRAILER_BYTES, max_trailers=MAX_TRAILERS)
    assert again == expected
    return True


def _decoded(pieces: list[bytes]) -> reference.Chunked:
    chunks = h1.Chunks(max_header_bytes=MAX_TRAILER_BYTES, max_header_fields=MAX_TRAILERS)
    found = reference.Chunked(trailers=[])
    buffer = bytearray()
    try:
        for piece in pieces:
            buffer += piece
            while (item := chunks.next(buffer)) is not None:
                if isinstance(item, Trailers):
                    found.trailers = list(item.fields)
                else:
                    assert item, "an empty item would be taken for the end"
                    found.data += item
            # What waits is part of a line, and lines are bounded.
            assert chunks.ended or len(buffer) < max(reference.MAX_CHUNK_LINE, MAX_TRAILER_BYTES)
    except ClientFault as fault:
        assert fault.code == "body_malformed"
        assert fault.status == 400
        found.state = "wrong"
    if chunks.ended:
        found.state, found.rest = "whole", bytes(buffer)
    return found


GOOD = (
    b"\0005\r\nhello\r\n0\r\n\r\n", b'\x07005;a=b;c="d"\r\nhello\r\n1 ; x\r\n!\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\nGET',
    b"\x030\r\n\r\n", b"\x020;x\r\nA:\r\nB: \xff \t\r\n\r\n", b"\x01a\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n0\r\n\r\n",
)  # fmt: skip
BAD = (
    b"", b"\0005\nhello\r\n0\r\n\r\n", b"\0005\r\nhelloo\r\n0\r\n\r\n", b"\0000x5\r\nhello\r\n", b"\000-5\r\n", b"\0005 \r\nhello\r\n", b"\0\r\n",
    b"\0FFFFFFFFFFFFFFFF\r\n", b"\0005;\r\nhello\r\n", b"\0005;a=\r\nhello\r\n", b'\0005;a="b\r\nhello\r\n', b"\0005;a\rb\r\nhello\r\n",
    b"\0000\r\nX : y\r\n\r\n", b"\0000\r\nX\r\n\r\n", b"\0000\r\n X: y\r\n\r\n", b"\0000\r\nX: a\nY: b\r\n\r\n", b"\0005;" + b"a" * 1100,
    b"\0000\r\n" + b"X: y\r\n" * 6 + b"\r\n", b"\0000\r\nX: " + b"y" * 320, b"\0005\r\nhel",
)  # fmt: skip
WORDS = (
    b"\r\n",
    b"0\r\n",
    b"0\r\n\r\n",
    b";a=b",
    b';a="',
    b'"',
    b" ;",
    b"\n",
    b"\r",
    b"FFFFFFFF",
    b"X: y\r\n",
    b"5\r\nhello\r\n",
    b"\\",
    b"0x",
)

TARGETS = (
    Target(name="h1.chunked", run=chunked, good=lambda: GOOD, bad=lambda: BAD, words=WORDS, max_bytes=1600, examples=300),
)  # fmt: skip
