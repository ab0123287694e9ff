"""The listening half of the seam: a bound socket, who has come to it, and accepting for as long as it stays open.

A listener may be one of several processes' at the same queue (see `handover`). So closing ours leaves the queue alone, and
between the system call that takes a connection out of it and whoever serves that connection nothing waits: what was taken
is never lost to a close or a cancellation in between.

A lack of descriptors neither ends accepting nor spins. Descriptors are given out lowest first (POSIX, open(2)), so the
number of the last one tells how many are left: from `max_descriptor` on, nobody is accepted who would take what the
connections that are open already need of us, and health too.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from sidecar.model import Address

BACKLOG = 1024
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What accept(2) says where the system has nothing left to give: it needs time to pass."""
_BACKOFF = 0.1
_ROOM = 0.01
_MAX_FAILURES = 16
"""In a row, without a pause."""
"""Seconds for a connection that makes way to be closed."""
_RESERVE = 64


class Listener(Protocol):
    @property
    def address(self) -> Address: ...

    async def accept(self) -> tuple[socket.socket, Address]:
        """Return a connected non-blocking socket and who is at its other end. Raises OSError as `accept(2)` does."""
        ...

    def finish(self) -> None:
        """Hand out what waits already, then close."""
        ...

    def close(self) -> None: ...

    def fileno(self) -> int: ...

    @property
    def queues(self) -> Sequence[Listener]:
        """The sockets that it consists of (`queues`); itself, where it is one."""
        ...


class TcpListener:
    """A listening socket that is ours to close, in this process. `listens`: else `begin` comes before the first `accept`."""

    def __init__(self, sock: socket.socket, *, listens: bool = True) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted has it from here (tcp(7))
        self._sock = sock
        self._listens = listens
        self._left: int | None = None
        """How many more are handed out; None: no end is set."""
        self.name: tuple[object, ...] = sock.getsockname()
        host, port = sock.getsockname()[:2]
        self.address = Address(host=host, port=port)

    def __repr__(self) -> str:
        return f"<listener at {self.address}{' (closed)' if self.fileno() < 0 else ''}>"

    @property
    def queues(self) -> Sequence[Listener]:
        return (self,)

    @property
    def family(self) -> int:
        return self._sock.family

    @property
    def only_v6(self) -> int:
        return self._sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    def share(self) -> None:
        """Let others of the same user bind the address too (SO_REUSEPORT). Raises OSError."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def begin(self) -> None:
        """Listen, if it does not. Raises OSError."""
        if not self._listens:
            self._sock.listen(BACKLOG)
            self._listens = True

    async def accept(self) -> tuple[socket.socket, Address]:
        # Before, since behind a checkpoint the connection would be neither in the queue nor anybody's.
        await trio.lowlevel.checkpoint()
        while (taken := self.take()) is None:
            await self.wait()
        return taken

    def take(self) -> tuple[socket.socket, Address] | None:
        """As `accept`, of what waits already; None where nothing does. Raises trio.ClosedResourceError at the end."""
        while self._sock.fileno() >= 0 and self._left != 0:
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                if self._left is not None:
                    break
                return None
            if self._left is not None:
                self._left -= 1
            sock.setblocking(False)
            return sock, Address(host=peer[0], port=peer[1])
        self.close()
        raise trio.ClosedResourceError("this listener was closed")

    async def wait(self) -> None:
        """Wait until there may be somebody, or an end."""
        try:
            await trio.lowlevel.wait_readable(self._sock)
        except trio.ClosedResourceError:
            pass  # woken by ourselves; `take` looks why

    def finish(self) -> None:
        if self._left is None and self._sock.fileno() >= 0:
            self._left = BACKLOG
            trio.lowlevel.notify_closing(self._sock)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()


async def bound(at: Address) -> TcpListener:
    """Bind and listen. Raises OSError."""
    found = await trio.socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, name = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(at.host != "::"))
        sock.bind(name)
        sock.listen(BACKLOG)
        return TcpListener(sock)
    except BaseException:
        sock.close()
        raise


async def accept_forever(
    listener: Listener,
    connected: Callable[[socket.socket, Address], None],
    failed: Callable[[OSError], bool],
    *,
    max_descriptor: int | None = None,
) -> None:
    """Accept until the listener is closed. What one connection does wrong, or a lack of descriptors, does not end it.

    `failed` is told of both, may make room, and says whether it has. With `max_descriptor`, at most one socket above it is
    accepted.
    """
    highest = -1
    failures = 0
    while True:
        try:
            if max_descriptor is not None and highest >= max_descriptor:
                highest = _lowest_free()
                if highest >= max_descriptor:
                    raise OSError(errno.EMFILE, "the descriptors that are left are kept for what is open")
            sock, remote = await listener.accept()
        except trio.ClosedResourceError:
            return
        except OSError as error:
            room = failed(error)
            failures += 1
            # ECONNABORTED and its kin concern a connection that is gone; a lack of resources needs time to pass, and so does
            # what happens again and again.
            passing = error.errno not in EXHAUSTED and failures < _MAX_FAILURES
            await trio.sleep(0 if passing else _ROOM if room else _BACKOFF)
        else:
            failures = 0
            highest = sock.fileno()
            connected(sock, remote)


def _lowest_free() -> int:
    """The descriptor that would be given out next. Raises OSError where there is none."""
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(descriptor)
    return descriptor


def raise_descriptor_limit() -> None:
    """Take as many descriptors as we may have (getrlimit(2)): the soft limit is low for the sake of select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # what we have will do


def max_descriptor() -> int:
    """From which descriptor on nobody is accepted who can wait: a quarter is kept free, 64 at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - min(_RESERVE, soft // 4) if soft != resource.RLIM_INFINITY else 1 << 30
