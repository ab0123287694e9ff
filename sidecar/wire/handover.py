"""A rolling restart in place: the successor is started beside the one that runs, and takes over its listening sockets.

Whoever is in charge listens on a unix socket, the *line*. A successor connects to it, says which addresses it is to listen at,
and receives those of the sockets that are there already (SCM_RIGHTS, unix(7)); the others it binds itself. Both processes
then hold the same queues. The successor starts everything else, begins to accept, and says so; only then the old
one stops accepting, and drains. Its descriptors are closed and the queues are not, so nothing that waits there is lost. A
successor that ends before it is ready has changed nothing.

The line itself is handed over too. So there is always one, and it is one at a time who succeeds: whoever comes
while another successor is starting waits in the line's own queue, for whichever of the two will be in charge.

Who could connect could take the sockets. The line has mode 0600 in a directory of mode 0700, and each side has the kernel say
that the other is the same user (SO_PEERCRED). Nothing that is wrong here stops a start: then there is no handover, and an
address that somebody else holds is refused where it is bound.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

from sidecar.errors import OperatorFault
from sidecar.model import Address
from sidecar.wire import packets
from sidecar.wire.listening import Listener, TcpListener
from sidecar.wire.packets import Packets
from sidecar.wire.queues import joined

NAME = "line.sock"
MAX_SOCKETS = 250
"""The kernel takes 253 descriptors with one message (SCM_MAX_FD of the kernel's net/scm.h)."""
_QUEUE = 16
_RETRY_INTERVAL = 0.1
_NOBODY = frozenset({errno.ENOENT, errno.ECONNREFUSED})

Log = Callable[..., None]
"""`log(event, level, **fields)`."""


class Succession(Protocol):
    """A sidecar's place between its predecessor and its successor: the seam that tests replace."""

    async def inherit(self, wanted: Collection[Address], /) -> Mapping[Address, Listener]:
        """Return what the predecessor leaves of the addresses that are wanted; nothing where there is none."""
        ...

    async def take_over(self) -> None:
        """Tell the predecessor that we accept now."""
        ...

    async def wait_succeeded(self, listeners: Mapping[Address, Listener], /) -> None:
        """Return when a successor accepts at these listeners."""
        ...

    def close(self) -> None: ...


class Alone:
    """The succession of a sidecar that has neither predecessor nor successor."""

    async def inherit(self, _wanted: Collection[Address], /) -> Mapping[Address, Listener]:
        return {}

    async def take_over(self) -> None: ...

    async def wait_succeeded(self, _listeners: Mapping[Address, Listener], /) -> None:
        await trio.sleep_forever()

    def close(self) -> None: ...


class Handover:
    """`Succession` by way of a socket in `directory`, which is made where it is missing.

    `patience`: seconds that a successor waits for an answer, while another one may be starting. `uid`: who must be at the
    other end; None: our own user.
    """

    def __init__(self, directory: Path, *, log: Log, patience: float = 60.0, uid: int | None = None) -> None:
        self._directory = directory
        self._log = log
        self._patience = patience
        self._uid = os.geteuid() if uid is None else uid
        self._descriptor: int | None = None
        """Of the directory: a path through it is short enough for a socket's name, wherever the directory is."""
        self._line: socket.socket | None = None
        self._in_charge = False
        """Whether the line is ours alone, to take away at the end: not before we accept, nor while a successor holds it."""
        self._predecessor: Packets | None = None

    # ── the successor ─────────────────────────────────────────────────────────────────────────────────────────────

    async def inherit(self, wanted: Collection[Address], /) -> Mapping[Address, Listener]:
        try:
            self._descriptor = _private(self._directory)
            with trio.fail_after(self._patience):
                return await self._succeed(self._descriptor, list(wanted)[:MAX_SOCKETS])
        except trio.TooSlowError:
            self._refused(
                "handover_timeout", f"no answer within {self._patience:g} s; another successor may be starting"
            )
        except OperatorFault as fault:
            self._refused(fault.code, fault.detail)
        except OSError as error:
            self._refused("handover_unusable", f"{self._directory}: {error}")
        return {}

    async def _succeed(self, directory: int, wanted: list[Address]) -> Mapping[Address, Listener]:
        while True:
            with _locked(directory):
                sock = self._connected()
                if sock is None:
                    self._line = self._claimed()
                    self._in_charge = True
                    return {}
            self._predecessor = Packets(sock)
            found = await self._asked(self._predecessor, wanted)
            if found is not None:
                return found
            self._part()  # it has ended while we waited in its line; somebody else may be in charge, or nobody
            await trio.sleep(_RETRY_INTERVAL)

    async def _asked(self, predecessor: Packets, wanted: list[Address]) -> Mapping[Address, Listener] | None:
        """What the predecessor leaves; None where it has ended while we waited."""
        try:
            await predecessor.send({"pid": os.getpid(), "listen": [str(at) for at in wanted]})
            answer, sockets = await predecessor.receive(max_sockets=MAX_SOCKETS + 1)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            return None
        with packets.closing(sockets):
            if refused := answer.get("refused"):
                raise OperatorFault(f"by process {answer.get('pid')}", code=f"handover_{refused}")
            by_name = {str(at): at for at in wanted}
            names = answer.get("listen")
            if (
                not isinstance(names, list)
                or len(names) != len(sockets) - 1
                or not by_name.keys() >= set(map(str, names))
            ):
                raise OperatorFault("the answer is none to what was asked", code="handover_malformed")
            packets.check(sockets[:-1], {socket.AF_INET, socket.AF_INET6}, socket.SOCK_STREAM)
            packets.check(sockets[-1:], {socket.AF_UNIX}, socket.SOCK_SEQPACKET)
            self._line = sockets.pop()
            queues: dict[str, list[TcpListener]] = {}
            for name in names:
                queues.setdefault(name, []).append(TcpListener(sockets.pop(0)))
        self._log("handover.received", "info", pid=answer.get("pid"), listeners=list(queues))
        return {by_name[name]: joined(of) for name, of in queues.items()}

    async def take_over(self) -> None:
        if self._predecessor is not None:
            self._in_charge = True
            try:
                await self._predecessor.send({"ready": True})
            except OSError:
                pass  # it has ended: there is nobody left to tell
            self._part()

    def _connected(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            sock.connect(self._path)
            packets.check_user(sock, self._uid)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError) and error.errno in _NOBODY:
                return None
            raise
        return sock

    def _claimed(self) -> socket.socket:
        """The line, bound by us. What lies there is left of somebody who was killed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            Path(self._path).unlink(missing_ok=True)
            sock.bind(self._path)
            Path(self._path).chmod(0o600)
            sock.listen(_QUEUE)
        except BaseException:
            sock.close()
            raise
        return sock

    # ── who is in charge ──────────────────────────────────────────────────────────────────────────────────────────

    async def wait_succeeded(self, listeners: Mapping[Address, Listener], /) -> None:
        while self._line is not None:
            await trio.lowlevel.wait_readable(self._line)
            try:
                sock, _ = self._line.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                self._refused("handover_unusable", str(error))
                await trio.sleep(_RETRY_INTERVAL)
                continue
            with sock:
                sock.setblocking(False)
                try:
                    if await self._succeeded(Packets(sock), listeners):
                        self.close()
                        return
                except trio.TooSlowError:
                    self._refused("handover_timeout", "connected, and did not ask")
                except OperatorFault as fault:
                    await self._refuse(Packets(sock), fault)
                except (OSError, EOFError) as error:
                    self._refused("handover_broken_off", str(error))
        await trio.sleep_forever()

    async def _succeeded(self, successor: Packets, listeners: Mapping[Address, Listener]) -> bool:
        """Hand over what is asked for. Whether whoever asked is in charge now; else nothing has changed."""
        with trio.fail_after(packets.MESSAGE_TIMEOUT):
            question, unasked = await successor.receive()
            packets.close(unasked)
            packets.check_user(successor.sock, self._uid)  # not before: a close over unread input is a reset (unix(7))
            pid, wanted = question.get("pid"), question.get("listen")
            if not isinstance(wanted, list):
                raise OperatorFault("the question is none", code="handover_malformed")
            shared = {str(at): one for at, one in listeners.items() if str(at) in wanted and one.fileno() >= 0}
            if not shared or self._line is None:
                raise OperatorFault(f"process {pid} listens at none of our addresses", code="handover_unrelated")
            named = [(name, queue.fileno()) for name, one in shared.items() for queue in one.queues]
            descriptors = [descriptor for _, descriptor in named]
            await successor.send(
                {"pid": os.getpid(), "listen": [name for name, _ in named]}, [*descriptors, self._line.fileno()]
            )
        self._in_charge = False
        self._log("handover.asked", "info", pid=pid, listeners=list(shared))
        try:
            report, unasked = await successor.receive()
            packets.close(unasked)
        except (OSError, EOFError):
            report = {}
        if report.get("ready") is not True:
            self._in_charge = True
            self._log("handover.abandoned", "warning", pid=pid)
            return False
        self._log("handover.completed", "info", pid=pid)
        return True

    async def _refuse(self, stranger: Packets, fault: OperatorFault) -> None:
        """Say so, since an end without a word would look like our own."""
        self._refused(fault.code, fault.detail)
        try:
            with trio.move_on_after(packets.MESSAGE_TIMEOUT):
                await stranger.send({"pid": os.getpid(), "refused": fault.code.removeprefix("handover_")})
        except OSError:
            pass  # it has gone already

    def close(self) -> None:
        self._part()
        if self._line is not None:
            if self._in_charge:
                with suppress(OSError):
                    Path(self._path).unlink()
            self._line.close()
            self._line = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _part(self) -> None:
        if self._predecessor is not None:
            self._predecessor.sock.close()
            self._predecessor = None

    @property
    def _path(self) -> str:
        return f"/proc/self/fd/{self._descriptor}/{NAME}"

    def _refused(self, code: str, detail: str) -> None:
        self._part()
        self._log("handover.refused", "warning", code=code, detail=detail)


def _private(directory: Path) -> int:
    """A descriptor of the directory. Raises OSError, and `OperatorFault` where others could reach into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise OperatorFault(f"{directory} is not ours alone (mode 0700)", code="handover_unusable")
    return descriptor


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Looking whether there is a line, and making one, is nobody else's meanwhile. Nothing in it waits for a peer."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
