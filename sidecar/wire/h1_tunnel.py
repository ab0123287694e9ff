"""What an HTTP/1.1 connection becomes after a 101 (RFC 9110 §7.8): a stream of bytes that belongs to another protocol.

The handshake of WebSocket has a part that HTTP/2 leaves out: `Sec-WebSocket-Key` and `-Accept`, which only prove that a server has
read the request as what it is (RFC 6455 §1.3, RFC 8441 §5.1). Where a WebSocket comes from HTTP/2 or goes there, we are the
end of it that has to make the key, and see that the answer fits, or to give the answer.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable

from sidecar.model import ByteStream, Fields

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Of RFC 6455 §1.3."""
KEY, ACCEPT = b"sec-websocket-key", b"sec-websocket-accept"


class Tunnel:
    """A stream some bytes of which have been read already. `ended` is called once our side has been ended in order."""

    __slots__ = ("_buffer", "_ended", "_stream")

    def __init__(self, stream: ByteStream, buffer: bytearray, ended: Callable[[], None]) -> None:
        self._stream = stream
        self._buffer = buffer
        self._ended = ended

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._buffer:
            data = bytes(self._buffer[:max_bytes])
            del self._buffer[: len(data)]
            return data
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()
        self._ended()

    async def aclose(self) -> None:
        await self._stream.aclose()


def is_websocket(upgrade: str) -> bool:
    return upgrade.lower() == "websocket"


def made_key() -> bytes:
    """A `Sec-WebSocket-Key` (RFC 6455 §4.1)."""
    return base64.b64encode(os.urandom(16))


def accept_of(key: bytes) -> bytes:
    """The `Sec-WebSocket-Accept` that answers a key (RFC 6455 §4.2.2). SHA-1 is what it is; no secret depends on it."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def accepted(fields: Fields, upgrade: str, request_fields: Fields) -> Fields:
    """The fields of a 101 with the accept that a WebSocket's client waits for, where the upstream's protocol had none."""
    if not is_websocket(upgrade) or any(name == ACCEPT for name, _ in fields):
        return fields
    keys = [value for name, value in request_fields if name == KEY]
    return [*fields, (ACCEPT, accept_of(keys[0]))] if len(keys) == 1 else fields
