"""The first bytes of a connection: who is there, and which protocol is spoken. After this neither changes any more.

Nothing of the application is read or answered here. To plaintext on a port that takes mutual TLS only there is one fixed answer,
in the client's own protocol; choosing it takes the preface of HTTP/2 at most, and nothing is parsed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from sidecar.model import Address, Connection, Mode, Outcome, Peer
from sidecar.wire import tls
from sidecar.wire.network import Stream, peek
from sidecar.wire.turns import Turn

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_REFUSAL = b'{"type":"about:blank","title":"this port takes mutual TLS only","status":426,"code":"plaintext_refused"}'
_UPGRADE_REQUIRED = (
    b"HTTP/1.1 426 Upgrade Required\r\nupgrade: TLS/1.3, HTTP/1.1\r\nconnection: Upgrade, close\r\n"
    b"content-type: application/problem+json\r\ncontent-length: %d\r\n\r\n%b" % (len(_REFUSAL), _REFUSAL)
)
_GO_AWAY = b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x08\x07\0\0\0\0\0" + b"\0\0\0\0" + b"\0\0\0\x0d"
"""SETTINGS, empty, then GOAWAY with HTTP_1_1_REQUIRED (RFC 9113 §6.5, §6.8, §7)."""


class Refused(Exception):
    """A connection that is not served, and what its record says."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason


async def settle(
    sock: socket.socket, *, connection_id: str, remote: Address, local: Address, mode: Mode | None, plaintext_peer: Peer,
    credentials: Callable[[], tls.Credentials | None], linger_timeout: float, turn: Turn,
) -> tuple[Stream, bytearray, Connection]:  # fmt: skip
    """Find out who is there and what is spoken. Returns the stream, what was read of it already, and the settled peer.

    `mode` None: no TLS is spoken here at all. Raises `Refused`, `PeerRejected`, OSError, and what a broken stream raises;
    the caller bounds the time, and closes `sock`.
    """
    buffer = bytearray()
    in_use = None
    if mode in ("strict", "permissive"):
        first = await peek(sock)
        if not first:
            sock.close()
            raise Refused("aborted", "no_bytes")
        if first == tls.HANDSHAKE_RECORD:
            in_use = credentials()
            if in_use is None:
                raise Refused("handshake_failed", "identity_missing")
        elif mode == "strict":
            await _refuse_plaintext(Stream(sock), linger_timeout)
            raise Refused("plaintext_refused", "plaintext_refused")
    stream: Stream
    peer: Peer
    if in_use is not None:
        secured = await tls.accept(sock, in_use.server_context, in_use.judge, turn)
        stream, peer, server_name = secured, secured.peer, secured.server_name
        protocol = "h2" if secured.alpn == "h2" else "h1"
    else:
        stream, peer, server_name = Stream(sock), plaintext_peer, None
        protocol = "h2" if await _prior_knowledge(stream, buffer) else "h1"
    connection = Connection(
        id=connection_id, peer=peer, remote=remote, local=local, tls=in_use is not None, server_name=server_name,
        protocol="h2" if protocol == "h2" else "h1", generation=in_use.generation if in_use is not None else 0,
    )  # fmt: skip
    return stream, buffer, connection


async def _prior_knowledge(stream: Stream, buffer: bytearray) -> bool:
    """Read until it is clear whether the client begins with the preface of HTTP/2 (RFC 9113 §3.4). Keeps what was read."""
    while len(buffer) < len(_PREFACE) and _PREFACE.startswith(buffer):
        data = await stream.receive_some()
        if not data:
            break
        buffer += data
    return buffer.startswith(_PREFACE)


async def _refuse_plaintext(stream: Stream, linger_timeout: float) -> None:
    """Say in the client's own protocol that this port takes mTLS."""
    seen = b""
    while len(seen) < len(_PREFACE) and _PREFACE.startswith(seen):
        data = await stream.receive_some(len(_PREFACE) - len(seen))
        if not data:
            break
        seen += data
    try:
        await stream.send_all(_GO_AWAY if seen == _PREFACE else _UPGRADE_REQUIRED)
    finally:
        await stream.close_gently(linger_timeout)
