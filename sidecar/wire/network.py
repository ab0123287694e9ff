"""Sockets: the seam between the sidecar and the kernel, and the plain byte stream over one.

`Network` hands out connected, non-blocking stdlib sockets; tests replace it with one that deals in socket pairs. Streams
drive such a socket directly with `trio.lowlevel`, without trio's own socket and stream layers, since each layer costs as
much as the system call below it.

Fairness: a call that succeeds at once does not yield to the scheduler, which is where the speed comes from. So that a peer that
is always ready cannot keep everybody else waiting, a stream yields after `_STREAK` such calls in a row.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import trio

from sidecar.model import Address

_STREAK = 8
_BACKLOG = 1024
_TCP_CLOSE = 7
"""`tcpi_state` of TCP_INFO (linux/tcp.h)."""
_LINGER_ZERO = struct.pack("ii", 1, 0)


class Listener(Protocol):
    @property
    def address(self) -> Address: ...

    async def accept(self) -> tuple[socket.socket, Address]:
        """Return a connected non-blocking socket and who is at its other end. Raises OSError as `accept(2)` does."""
        ...

    def close(self) -> None: ...


class Network(Protocol):
    async def connect(self, to: Address | Path) -> socket.socket:
        """Connect to a TCP address or a unix socket. Raises OSError."""
        ...

    async def listen(self, at: Address) -> Listener: ...


class Stream:
    """`model.ByteStream` over a connected, non-blocking socket. One task may read while another writes."""

    __slots__ = (
        "_closed", "_drained", "_read_shared", "_reading", "_recv", "_send", "_sock", "_streak", "_write_shared", "_writing",
    )  # fmt: skip
    _wants_to_read: tuple[type[OSError], ...] = (BlockingIOError,)
    _wants_to_write: tuple[type[OSError], ...] = (BlockingIOError,)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[bytes | memoryview], int] = sock.send
        self._closed = False
        self._drained = False
        """Whether the last read took all that there was: then the next one waits before it tries."""
        self._streak = 0
        self._reading = self._writing = False
        self._read_shared: trio.Event | None = None
        self._write_shared: trio.Event | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError("this stream was already closed")
        if self._drained:
            await self._readable()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                data = self._recv(max_bytes)
            except self._wants_to_read:
                await self._readable()
            except self._wants_to_write:
                await self._writable()
            except OSError as error:
                raise self._broken(error) from error
            else:
                if self._streak >= _STREAK:
                    await self._rest()
                self._streak += 1
                self._drained = len(data) < max_bytes
                return data

    async def send_all(self, data: bytes) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was already closed")
        await trio.lowlevel.checkpoint_if_cancelled()
        sent = 0
        size = len(data)
        while sent < size:
            try:
                sent += self._send(data if sent == 0 else memoryview(data)[sent:])
            except self._wants_to_write:
                await self._writable()
            except self._wants_to_read:
                # For a plain socket the same error as above, and never reached; TLS may have to read to send.
                await self._readable()
            except OSError as error:
                raise self._broken(error) from error
        if self._streak >= _STREAK:
            await self._rest()
        self._streak += 1

    def readable_now(self) -> bool:
        """Whether the peer has sent something, or ended: on an idle kept connection either means that it is stale."""
        try:
            socket.socket.recv(self._sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def was_reset(self) -> bool:
        """Whether the kernel has seen the connection go, by a reset or by giving up on the peer. Not by a half-close."""
        try:
            return not self._closed and self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
        except OSError:
            return False  # no TCP

    def interrupt(self) -> None:
        """Wake whoever waits on this stream with `trio.ClosedResourceError`, and leave the stream as it is.

        A task that has been woken by its input already is not touched, and reads it.
        """
        if not self._closed:
            trio.lowlevel.notify_closing(self._sock)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._closed:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise self._broken(error) from error

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def abort(self) -> None:
        """Close so that the peer sees a reset: the only unmistakable sign that a message was cut short."""
        if not self._closed:
            self._reset_on_close()
            self.close()

    def _reset_on_close(self) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        except OSError:
            pass  # gone already

    async def close_gently(self, linger_timeout: float) -> None:
        """End our side, then read and drop until the peer ends or time is up: a close with unread input would send a
        reset that overtakes our last words. Always closes.
        """
        try:
            with trio.move_on_after(linger_timeout):
                await self.send_eof()
                await drop_input(self._sock)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.close()

    def _broken(self, error: OSError) -> Exception:
        if self._closed:
            return trio.ClosedResourceError("this stream was already closed")
        return trio.BrokenResourceError(str(error))

    async def _rest(self) -> None:
        self._streak = 0
        await trio.lowlevel.cancel_shielded_checkpoint()

    # trio lets one task wait for each direction of a descriptor. TLS can make a reader wait to write and the other way
    # round, so a second waiter shares the first one's wait instead of failing.

    async def _readable(self) -> None:
        self._streak = 0
        if self._reading:
            if self._read_shared is None:
                self._read_shared = trio.Event()
            await self._read_shared.wait()
            return
        self._reading = True
        try:
            await trio.lowlevel.wait_readable(self._sock)
        finally:
            self._reading = False
            if self._read_shared is not None:
                self._read_shared.set()
                self._read_shared = None

    async def _writable(self) -> None:
        self._streak = 0
        if self._writing:
            if self._write_shared is None:
                self._write_shared = trio.Event()
            await self._write_shared.wait()
            return
        self._writing = True
        try:
            await trio.lowlevel.wait_writable(self._sock)
        finally:
            self._writing = False
            if self._write_shared is not None:
                self._write_shared.set()
                self._write_shared = None


async def peek(sock: socket.socket) -> bytes:
    """Wait for the first byte and return it without consuming it; b"" where the peer has ended. Raises OSError."""
    while True:
        try:
            return socket.socket.recv(sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


def peek_now(sock: socket.socket) -> bytes:
    """The first byte, if it is there already; it is not consumed."""
    try:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)
    except OSError:
        return b""


async def drop_input(sock: socket.socket) -> None:
    """Read below any TLS, and drop, until the peer ends or breaks off. The caller bounds the time."""
    while True:
        try:
            if not socket.socket.recv(sock, 65536):
                return
            await trio.lowlevel.checkpoint()  # whoever sends faster than we read must not keep everybody else waiting
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except OSError:
            return


class _TcpListener:
    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self.address = Address(host=host, port=port)

    async def accept(self) -> tuple[socket.socket, Address]:
        accepted, peer = await self._sock.accept()
        sock = _detached(accepted)
        _without_delay(sock)
        return sock, Address(host=peer[0], port=peer[1])

    def close(self) -> None:
        self._sock.close()


class TcpNetwork:
    """The real one."""

    async def connect(self, to: Address | Path) -> socket.socket:
        if isinstance(to, Path):
            return await _connected(socket.AF_UNIX, str(to))
        found = await trio.socket.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
        refused: OSError | None = None
        for family, _, _, _, name in found:
            try:
                sock = await _connected(family, name)
            except OSError as error:
                # A name with several addresses counts as refused only if all of them refuse.
                if refused is None or isinstance(refused, ConnectionRefusedError):
                    refused = error
            else:
                _without_delay(sock)
                return sock
        raise refused or OSError(errno.EADDRNOTAVAIL, f"{to.host} has no address")

    async def listen(self, at: Address) -> Listener:
        found = await trio.socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, name = found[0]
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(at.host != "::"))
            await sock.bind(name)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return _TcpListener(sock)


_ACCEPT_BACKOFF = 0.1
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


async def accept_forever(
    listener: Listener,
    connected: Callable[[socket.socket, Address], None],
    failed: Callable[[OSError], Awaitable[None]],
) -> None:
    """Accept until the listener is closed. What one connection does wrong, or a lack of descriptors, does not end it."""
    while True:
        try:
            sock, remote = await listener.accept()
        except trio.ClosedResourceError:
            return
        except OSError as error:
            await failed(error)
            # ECONNABORTED and its kin concern a connection that is gone; a lack of resources needs time to pass.
            await trio.sleep(_ACCEPT_BACKOFF if error.errno in _EXHAUSTED else 0)
        else:
            connected(sock, remote)


async def _connected(family: int, name: object) -> socket.socket:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return _detached(sock)


def _detached(sock: trio.socket.SocketType) -> socket.socket:
    """The stdlib socket inside one of trio's, still non-blocking."""
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


def _without_delay(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass  # the peer is gone already: the next read will say so
