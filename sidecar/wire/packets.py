"""What two sidecars of one user say to each other over a unix socket, one packet at a time (SOCK_SEQPACKET, unix(7)).

A packet is a JSON object with `handover: 1`, the version, and may bring descriptors:

    successor:  {"pid", "listen": [address, …]}
    in charge:  {"pid", "listen": [address, …]} with a descriptor for each, in this order, and the line's at the end;
                an address that has several queues is there several times
                {"pid", "refused": code}
    successor:  {"ready": true}
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from sidecar.errors import OperatorFault

VERSION = 1
MAX_MESSAGE_BYTES = 65_536
MESSAGE_TIMEOUT = 5.0
_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""


class Packets:
    """A connected socket, non-blocking, and ours to close."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
        """Raises OSError."""
        data = json.dumps({"handover": VERSION, **message}).encode()
        while True:
            try:
                socket.send_fds(self.sock, [data], list(descriptors))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            else:
                return

    async def receive(self, *, max_sockets: int = 0) -> tuple[dict[str, Any], list[socket.socket]]:
        """Return a packet, and the sockets that came with it, which the caller closes.

        Raises EOFError where the other side has ended, OSError, and `OperatorFault` (`handover_malformed`,
        `handover_version`).
        """
        while True:
            try:
                data, descriptors, flags, _ = socket.recv_fds(
                    self.sock, MAX_MESSAGE_BYTES, max_sockets, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
            else:
                break
        sockets = _sockets(descriptors)
        try:
            if not data:
                raise EOFError("the other side has ended")
            return _message(data, cut=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))), sockets
        except BaseException:
            close(sockets)
            raise


def _sockets(descriptors: Sequence[int]) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    for position, descriptor in enumerate(descriptors):
        try:
            sockets.append(socket.socket(fileno=descriptor))
        except OSError as error:
            close(sockets)
            for left in descriptors[position:]:
                os.close(left)
            raise OperatorFault(f"what came with a packet is no socket: {error}", code="handover_malformed") from error
    return sockets


def _message(data: bytes, *, cut: bool) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    if cut or not isinstance(message, dict):
        raise OperatorFault("a packet that no sidecar sends", code="handover_malformed")
    if message.get("handover") != VERSION:
        raise OperatorFault(f"version {message.get('handover')!r} of the handover", code="handover_version")
    return message


def check_user(sock: socket.socket, wanted: int) -> None:
    """Raises `OperatorFault` where another user is at the other end."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    if uid != wanted:
        raise OperatorFault(f"process {pid} of user {uid} is at the other end", code="handover_foreign")


def check(sockets: Sequence[socket.socket], families: Collection[int], kind: int) -> None:
    """Raises `OperatorFault` where one is not listening, or of another kind."""
    for sock in sockets:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or sock.family not in families or sock.type != kind:
            raise OperatorFault("a socket of another kind came", code="handover_malformed")


@contextmanager
def closing(sockets: list[socket.socket]) -> Iterator[None]:
    """Close what is still in the list at the end."""
    try:
        yield
    finally:
        close(sockets)


def close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
