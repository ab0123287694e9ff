"""Sockets: the seam between the sidecar and the kernel, and the plain byte stream over one (`listening` has the other half).

`Network` hands out connected, non-blocking stdlib sockets; tests replace it with one that deals in socket pairs. Streams
drive such a socket directly with `trio.lowlevel`, without trio's own socket and stream layers, since each layer costs as
much as the system call below it.

Fairness: a call that succeeds at once does not yield to the scheduler, which is where the speed comes from. So that a peer that
is always ready cannot keep everybody else waiting, a stream yields after `_STREAK` such calls in a row.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import trio

from sidecar.model import Address
from sidecar.wire import listening
from sidecar.wire.listening import Listener

_STREAK = 8
_TCP_CLOSE, _TCP_CLOSE_WAIT = 7, 8
"""`tcpi_state` of TCP_INFO (linux/tcp.h)."""
_MAX_RESOLVING = 8
"""Threads that ask for names. Their own, so that a resolver that hangs takes none from whoever needs one for a file."""
_PROBES = 3
_LINGER_ZERO = struct.pack("ii", 1, 0)


class Network(Protocol):
    async def resolve(self, name: Address) -> Sequence[Address]:
        """Return the addresses behind a name, by IP, in the order of RFC 6724. Raises OSError (`socket.gaierror`)."""
        ...

    async def connect(self, to: Address | Path) -> socket.socket:
        """Connect to an address by IP or to a unix socket. Raises OSError."""
        ...

    async def listen(self, at: Address) -> Listener:
        """Bind and listen. Raises OSError."""
        ...


class Stream:
    """`model.ByteStream` over a connected, non-blocking socket. One task may read while another writes."""

    __slots__ = (
        "_closed", "_drained", "_look", "_read_shared", "_reading", "_recv", "_send", "_sock", "_streak", "_write_shared",
        "_writing",
    )  # fmt: skip
    _wants_to_read: tuple[type[OSError], ...] = (BlockingIOError,)
    _wants_to_write: tuple[type[OSError], ...] = (BlockingIOError,)
    _clean_end: tuple[type[OSError], ...] = ()
    """What a read may raise in place of returning b""."""
    _most_at_once = 65536
    """Bytes that one read can bring. Room for as many is made each time, and what stays of it cuts the heap into pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[bytes | memoryview], int] = sock.send
        self._closed = False
        self._drained = False
        """Whether the last read took all that there was: then the next one waits before it tries."""
        self._streak = 0
        self._look: select.poll | None = None
        self._reading = self._writing = False
        self._read_shared: trio.Event | None = None
        self._write_shared: trio.Event | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError("this stream was already closed")
        if max_bytes > self._most_at_once:
            max_bytes = self._most_at_once
        if self._drained and not self._reading:
            # What `_readable` does, here: nearly every read of a head comes this way, and each await has its price.
            self._streak = 0
            self._reading = True
            try:
                await trio.lowlevel.wait_readable(self._sock)
            finally:
                self._reading = False
                if self._read_shared is not None:
                    self._wake_readers()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                data = self._recv(max_bytes)
            except self._wants_to_read:
                await self._readable()
            except self._wants_to_write:
                await self._writable()
            except self._clean_end:
                return b""
            except (OSError, ValueError) as error:  # ValueError where it was closed after it became readable
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
        left: bytes | memoryview = data
        while left:
            try:
                sent = self._send(left)
                if sent == len(left):
                    break
                # TLS takes one record at a time, 16 KiB, and of a view a part is cut off without copying the rest.
                left = (memoryview(left) if left is data else left)[sent:]
            except self._wants_to_write:
                await self._writable()
            except self._wants_to_read:
                # For a plain socket the same error as above, and never reached; TLS may have to read to send.
                await self._readable()
            except (OSError, ValueError) as error:
                raise self._broken(error) from error
        if self._streak >= _STREAK:
            await self._rest()
        self._streak += 1

    def readable_now(self) -> bool:
        """Whether the peer has sent something, or ended: on an idle kept connection either means that it is stale."""
        if self._closed:
            return True
        if self._look is None:  # asked before each use of a kept connection: a peek would cost an exception each time
            self._look = select.poll()
            self._look.register(self._sock, select.POLLIN)
        return bool(self._look.poll(0))

    def fileno(self) -> int:
        return self._sock.fileno()

    def left(self) -> Literal["reset", "ended"] | None:
        """How the peer has left, as the kernel knows without anybody's reading: by a reset (or it was given up), or by ending
        its own side, which leaves open whether it still reads. None where it has not, or where this is no TCP.
        """
        try:
            state = 0 if self._closed else self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return None
        return "reset" if state == _TCP_CLOSE else "ended" if state == _TCP_CLOSE_WAIT else None

    def unsent(self) -> bool:
        """Whether the peer has yet to take, or to acknowledge, something of what was sent (tcp(7), SIOCOUTQ)."""
        try:
            return fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0\0\0\0") != b"\0\0\0\0"
        except OSError:
            return False

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
            self._recv = self._send = _closed
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

    def _broken(self, error: Exception) -> Exception:
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
                self._wake_readers()

    def _wake_readers(self) -> None:
        assert self._read_shared is not None  # noqa: S101  (for the type checker)
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


def _closed(*_: object) -> NoReturn:
    """In the place of what a closed stream read and wrote with: OpenSSL goes on under the number of the descriptor, which may
    be another connection's by then.
    """
    raise ValueError("closed")


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


class _Asking:
    """For `trio.to_thread`: of all threads that ask, one at a time for this name. A resolver that hangs goes on in its thread
    when whoever asked has long given up; one name whose servers are dead would soon have every thread.
    """

    def __init__(self, name: Address, every: trio.CapacityLimiter, asking: dict[Address, _Asking]) -> None:
        self._name = name
        self._every = every
        self._asking = asking
        self._one = trio.CapacityLimiter(1)

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._one.acquire_on_behalf_of(borrower)
        try:
            await self._every.acquire_on_behalf_of(borrower)
        except BaseException:
            self._one.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        self._every.release_on_behalf_of(borrower)
        self._one.release_on_behalf_of(borrower)
        self.forget_unless_used()

    def forget_unless_used(self) -> None:
        if not self._one.borrowed_tokens:  # which whoever waits has been given by now
            self._asking.pop(self._name, None)


class TcpNetwork:
    """The real one."""

    def __init__(self) -> None:
        self._resolving = trio.CapacityLimiter(_MAX_RESOLVING)
        self._asking: dict[Address, _Asking] = {}
        """By name, while a thread asks for it."""

    async def resolve(self, name: Address) -> Sequence[Address]:
        def ask() -> list[Address]:
            try:
                found = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
            except UnicodeError as error:  # a label that is empty or too long
                raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
            return list(dict.fromkeys(_by_ip(*sockaddr) for _, _, _, _, sockaddr in found))

        asking = self._asking.setdefault(name, _Asking(name, self._resolving, self._asking))
        try:
            return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=asking)  # type: ignore[arg-type]
        except RuntimeError as error:  # there is no thread left for it
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from error
        finally:
            asking.forget_unless_used()

    async def connect(self, to: Address | Path) -> socket.socket:
        if isinstance(to, Path):
            return await _connected(socket.AF_UNIX, str(to))
        found = await trio.socket.getaddrinfo(
            to.host, to.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )  # nobody is asked, and no thread is used
        family, _, _, _, name = found[0]
        sock = await _connected(family, name)
        _without_delay(sock)
        return sock

    async def listen(self, at: Address) -> Listener:
        return await listening.bound(at)


def _by_ip(host: object, port: object, _flow: object = 0, scope: object = 0) -> Address:
    """What `getaddrinfo` says of one address. A scope is the interface of a link-local one (RFC 4007 §11)."""
    return Address(host=f"{host}%{scope}" if scope else str(host), port=int(str(port)))


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


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """Have the kernel ask a peer that has been quiet for `seconds` whether it is there, three times within half as long again.

    Whoever leaves the questions, or data, unanswered for that long is taken for dead, and the connection breaks (tcp(7)).
    The user timeout is as long as all of it, since a shorter one would make the first question that is lost the last.
    """
    idle = max(1, round(seconds))
    interval = max(1, round(seconds / 6))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (idle + _PROBES * interval) * 1000)
    except OSError:
        pass  # no TCP, or the peer is gone already: the next read will say so


def _without_delay(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass  # the peer is gone already: the next read will say so
