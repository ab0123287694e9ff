"""Sockets that the service manager holds: taken where they were meant for us, and understood or refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from sidecar.errors import OperatorFault
from sidecar.wire.activation import activated

PROGRAM = """
import os, sys
from sidecar.errors import OperatorFault
from sidecar.wire.activation import activated
kept = [os.dup(int(one)) for one in sys.argv[2:]]
for position, descriptor in enumerate(kept):
    os.dup2(descriptor, 3 + position)
environment = {"LISTEN_FDS": sys.argv[1], "LISTEN_PID": str(os.getpid())}
try:
    found = activated(environment)
    print(*(f"{at} {one.fileno()} {os.get_inheritable(one.fileno())}" for at, one in found.items()), sep=",")
except OperatorFault as fault:
    print(fault.code, fault)
"""


def _asked(number: str, *sockets: socket.socket) -> str:
    """What a process finds that has these sockets as its descriptors 3, 4, …"""

    descriptors = [one.fileno() for one in sockets]
    command = [sys.executable, "-c", PROGRAM, number, *map(str, descriptors)]
    done = subprocess.run(command, pass_fds=descriptors, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_socket_is_known_by_its_address() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as second,
    ):
        told = _asked("2", first, second)
        assert told == f"127.0.0.1:{first.getsockname()[1]} 3 False,[::1]:{second.getsockname()[1]} 4 False"


@pytest.mark.parametrize("number", ["1", "x", ""])
def test_what_is_no_listening_tcp_socket_is_refused(number: str) -> None:
    near, far = socket.socketpair()
    with near, far:
        assert _asked(number, near).startswith("activation_unusable LISTEN_FDS")


def test_what_was_meant_for_somebody_else_is_left_alone() -> None:
    assert activated({}) == {}
    assert activated({"LISTEN_FDS": "2"}) == {}
    assert activated({"LISTEN_FDS": "2", "LISTEN_PID": "1"}) == {}


def test_descriptors_that_are_not_there_are_refused() -> None:
    with pytest.raises(OperatorFault, match="LISTEN_FDS"):
        activated({"LISTEN_FDS": "-x", "LISTEN_PID": str(os.getpid())})
