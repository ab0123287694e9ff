"""Sockets that the service manager holds for us (socket activation, sd_listen_fds(3)): they outlive any of our processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from sidecar.errors import OperatorFault
from sidecar.model import Address
from sidecar.wire.listening import Listener, TcpListener

_FIRST = 3
"""SD_LISTEN_FDS_START."""


def activated(environment: Mapping[str, str]) -> dict[Address, Listener]:
    """Return the sockets that were passed to this process, by the address to which each is bound.

    Raises `OperatorFault` (`activation_unusable`).
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}  # there are none, or they were meant for whoever started us
    try:
        number = int(environment.get("LISTEN_FDS", ""))
        listeners = [TcpListener(_listening(descriptor)) for descriptor in range(_FIRST, _FIRST + number)]
    except (OSError, ValueError) as error:
        raise OperatorFault(f"LISTEN_FDS: {error}", code="activation_unusable") from error
    return {listener.address: listener for listener in listeners}


def _listening(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or not sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise ValueError(f"descriptor {descriptor} is no TCP socket that listens")
    return sock
