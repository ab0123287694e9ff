"""Several listening sockets of one address, each with a queue of its own, as one listener.

Where sockets are bound with SO_REUSEPORT the kernel gives each new connection to one of them by a hash of its addresses
(socket(7)), so that each of several processes may have a queue for itself. A queue belongs to its socket and not to a process:
whoever holds the socket too may accept from it, and while anybody holds it nothing in it is lost. But once a socket listens,
its share of the connections comes, whether somebody accepts or not. So more than one socket is bound early, to find what stands
in the way, and listens only when there is somebody who accepts (`begin`).

The option is set on the first socket when it is bound already, and listens: Linux looks at what is set at that moment. So an
address that one process had for itself can be shared out among several, and taken over again by one.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence

import trio

from sidecar.model import Address
from sidecar.wire.listening import Listener, TcpListener


class Queues:
    """`Listener` over several sockets, of which those in `looked_at` (by position) are accepted from. None: all of them."""

    def __init__(self, queues: Sequence[TcpListener], looked_at: Collection[int] | None = None) -> None:
        self.queues = tuple(queues)
        self.address: Address = queues[0].address
        self._looked_at = self._at(range(len(queues)) if looked_at is None else looked_at)
        self._ending = False
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<{len(self.queues)} queues at {self.address}>"

    def look_at(self, positions: Collection[int]) -> None:
        """Accept from these from now on. Others go on waiting in the rest."""
        if not self._ending:
            self._looked_at = self._at(positions)
            self._wake()

    def let_go(self) -> None:
        """Close what is not looked at: those queues are somebody else's."""
        for one in self.queues:
            if one not in self._looked_at:
                one.close()

    def begin(self) -> None:
        """Have all of them listen. Raises OSError."""
        for one in self.queues:
            one.begin()

    async def accept(self) -> tuple[socket.socket, Address]:
        await trio.lowlevel.checkpoint()  # before, and never behind what was taken
        while True:
            changed, still = self._changed, []
            for one in self._looked_at:
                try:
                    taken = one.take()
                except trio.ClosedResourceError:
                    continue
                still.append(one)
                if taken is not None:
                    # It is the last to be asked next time: one full queue must not keep another waiting.
                    self._looked_at = [other for other in self._looked_at if other is not one] + [one]
                    return taken
            self._looked_at = still
            if self._ending and not still:
                raise trio.ClosedResourceError("these queues were closed")
            await _first(still, changed)

    def finish(self) -> None:
        self._ending = True
        self.let_go()
        for one in self._looked_at:
            one.finish()
        self._wake()

    def close(self) -> None:
        self._ending = True
        for one in self.queues:
            one.close()
        self._wake()

    def fileno(self) -> int:
        return max(one.fileno() for one in self.queues)

    def _at(self, positions: Collection[int]) -> list[TcpListener]:
        return [self.queues[position] for position in sorted(positions)]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


async def _first(queues: Sequence[TcpListener], changed: trio.Event) -> None:
    """Wait until one of them may have somebody, or something has changed."""
    async with trio.open_nursery() as nursery:

        async def until(wait: trio.Event | TcpListener) -> None:
            await wait.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(until, changed)
        for one in queues:
            nursery.start_soon(until, one)


def joined(queues: Sequence[TcpListener]) -> Listener:
    """One listener over all of them."""
    return queues[0] if len(queues) == 1 else Queues(queues)


def shared_out(listener: Listener, number: int) -> Listener:
    """The same address with so many queues, of which the further ones do not listen yet. Fewer, where the system refuses:
    then several share one.
    """
    queues = [one for one in listener.queues if isinstance(one, TcpListener)]
    if len(queues) != len(listener.queues) or len(queues) >= number:
        return listener
    try:
        for one in queues:
            one.share()
        while len(queues) < number:
            queues.append(_beside(queues[0]))
    except OSError:
        pass
    return joined(queues)


def _beside(first: TcpListener) -> TcpListener:
    """Another socket of the same address."""
    sock = socket.socket(first.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if first.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, first.only_v6)
        sock.bind(first.name)
        return TcpListener(sock, listens=False)
    except BaseException:
        sock.close()
        raise
