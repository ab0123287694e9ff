"""What can go wrong at the k-th I/O of the app, and the wires that it goes wrong on.

What the app does itself is told from what agents, targets and clients of a test do by a context variable that is set in
the app's first task and inherited by all its others. Its connects, first bytes, steps of handshakes, reads, writes, ends and
lingering reads count, each as one I/O, in the order in which they happen (`fault_points` puts them there). With trio's order of
tasks fixed (`scheduling`) the k-th I/O is the same one in every run.

A fault is done to a connection as the kernel would do it: what broke stays broken for every task that uses it and is a reset
to the peer, what hangs does so until it is closed or interrupted. A plain socket pair knows no resets, so an abort by the app
is told to the other end (`Wires.resets`) and raised there in place of a clean end.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal
from unittest import mock

import trio
import trio.lowlevel

from sidecar.wire.network import Stream

Kind = Literal[
    "break", "torn", "after", "hang", "eof", "short", "drip", "cut", "end", "cancel", "drain",
    "leave", "recant", "desert", "goaway", "reset", "refuse", "restart",
]  # fmt: skip
KINDS: Mapping[Kind, str] = {
    "break": "nothing of it moves, and the connection is gone",
    "torn": "half of it moves, then the connection is gone",
    "after": "all of it moves, then the connection is gone",
    "hang": "it never returns",
    "eof": "the peer has ended in order",
    "short": "one byte moves",
    "drip": "one byte moves, in each I/O",
    "cut": "the k-th byte read is the last, and the connection is gone",
    "end": "the k-th byte read is the last, and the peer has ended in order",
    "cancel": "the app is cut off",
    "drain": "the app is told to stop",
    "leave": "its clients go away",
    "recant": "its client resets a stream",
    "desert": "its upstream closes all connections",
    "goaway": "its upstream says GOAWAY",
    "reset": "its upstream resets a stream",
    "refuse": "its upstream refuses a stream",
    "restart": "OPA closes all connections",
}
BYTEWISE: frozenset[Kind] = frozenset({"cut", "end"})
TO_THE_APP: frozenset[Kind] = frozenset({"cancel", "drain"})
BY_OTHERS: frozenset[Kind] = frozenset({"leave", "recant", "desert", "goaway", "reset", "refuse", "restart"})
"""What somebody does while the I/O is about to happen, which then happens all the same."""
_MEANWHILE = TO_THE_APP | BY_OTHERS
_SMALL: frozenset[Kind] = frozenset({"short", "drip"})

Point = Literal["connect", "peek", "handshake", "receive", "send", "send_eof", "linger"]
_APPLIES: Mapping[Point, frozenset[Kind]] = {
    "connect": frozenset({"break", "after", "hang"}) | _MEANWHILE,
    "peek": frozenset({"break", "hang", "eof"}) | _MEANWHILE,
    "handshake": frozenset({"break", "after", "hang", "eof"}) | _MEANWHILE,
    "receive": frozenset({"break", "torn", "after", "hang", "eof"}) | _SMALL | _MEANWHILE,
    "send": frozenset({"break", "torn", "after", "hang", "eof"}) | _SMALL | _MEANWHILE,
    "send_eof": frozenset({"break", "after"}) | _MEANWHILE,
    "linger": frozenset({"hang"}) | _MEANWHILE,
}

UPSTREAMS = frozenset({"agent", "target", "plaintext"})

inside: ContextVar[bool] = ContextVar("inside", default=False)


def inode(sock: socket.socket) -> int:
    """What a socket is, whoever holds its descriptor."""
    return os.fstat(sock.fileno()).st_ino


def applicable(kind: Kind, points: Mapping[Point, int]) -> int:
    """How many of these I/Os a fault of this kind can come at."""
    return sum(number for point, number in points.items() if kind in _APPLIES[point])


class Wires:
    """The socket pairs of a run: which ends are the app's, what for, and what was done to them."""

    def __init__(self) -> None:
        self.roles: dict[int, str] = {}
        """By inode, of the app's ends: client, health, opa, agent, target or plaintext."""
        self.resets: set[int] = set()
        """Ends that their peer has reset."""
        self.accepted = {"inbound": 0, "outbound": 0, "health": 0}
        self._peers: dict[int, int] = {}

    def join(self, near: socket.socket, far: socket.socket) -> None:
        self._peers[inode(near)], self._peers[inode(far)] = inode(far), inode(near)

    def reset(self, sock: socket.socket) -> None:
        """Note that the end which is `sock` is being reset."""
        if sock.fileno() != -1 and (peer := self._peers.get(inode(sock))) is not None:
            self.resets.add(peer)

    def sever(self, sock: socket.socket) -> None:
        """Break the connection for both ends, and leave the descriptor to whoever has to close it."""
        self.reset(sock)
        _shut(sock, socket.SHUT_RDWR)

    def was_reset(self, sock: socket.socket) -> bool:
        return sock.fileno() != -1 and inode(sock) in self.resets

    def role(self, sock: socket.socket) -> str:
        return self.roles.get(inode(sock), "?") if sock.fileno() != -1 else "?"

    def open(self) -> list[str]:
        """Roles of the app's ends that are open in this process, whatever object holds them."""
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:[") and (role := self.roles.get(int(target[8:-1]))) is not None:
                found.append(role)
        return found


class Faults:
    """Lets the `at`-th I/O go wrong. `where` says what it was, and is None where there was none; `count` counts them."""

    def __init__(self, kind: Kind, at: int, *, role: str | None = None) -> None:
        """`role`: only on connections with this role."""
        self.kind = kind
        self.at = at
        self.count = 0
        self.points: Counter[Point] = Counter()
        """Every I/O, whether a fault of this kind could come there or not."""
        self.armed = False
        self.where: str | None = None
        self.hit_role: str | None = None
        self.stale = False
        """Whether a kept upstream connection was hit, of whose next answer nothing has come or will come."""
        self.acts: dict[Kind, Callable[[], None]] = {}
        """What others do, by kind."""
        self.wires = Wires()
        self.on_send: Callable[[str], None] = lambda _role: None
        """Told of each write of the app's, with the role of its connection."""
        self.streams: list[Stream] = []
        """All of the app's; kept, so that an id stays that of one stream."""
        self._role = role
        self._broken: set[int] = set()
        self._ended: set[int] = set()
        self._hung: dict[int, trio.Event] = {}
        self._said: dict[int, tuple[bool, int, int]] = {}
        """Of a stream: whether it was written to, bytes read before the last write, and since."""

    @property
    def ended_in_order(self) -> bool:
        """Whether the app was told that somebody has ended: a tunnel may end so too."""
        return self.where is not None and self.kind in ("eof", "end", "desert")

    # ── when ────────────────────────────────────────────────────────────────────────────────────────────────────

    def strikes(self, point: Point, role: str) -> bool:
        """Count one I/O, and return whether it goes wrong now. What others do at it is done here."""
        if not self.armed or not inside.get() or self._role not in (None, role):
            return False
        self.points[point] += 1
        if self.kind not in _APPLIES[point]:
            return False
        self.count += 1
        if self.kind == "drip":
            self.where = "everywhere" if self.at == 1 else None
            return self.at == 1
        if self.count != self.at:
            return False
        self.where, self.hit_role = f"{role}: {point}", role
        if self.kind in _MEANWHILE:
            token = inside.set(False)
            try:
                self.acts[self.kind]()
            finally:
                inside.reset(token)
            if self.kind == "desert":
                self.hit_role = "upstream"
            return False
        return True

    def readable_bytes(self, role: str, wanted: int) -> int:
        """How many bytes may be read at once, so that the last one is read as the last one."""
        return min(wanted, self.at - self.count) if self._counts_bytes(role) else wanted

    def was_last(self, role: str, size: int) -> bool:
        """Count bytes that were read, and return whether nothing comes behind them."""
        if not self._counts_bytes(role):
            return False
        self.count += size
        if self.count < self.at:
            return False
        self.where, self.hit_role = f"{role}: byte {self.at}", role
        return True

    def _counts_bytes(self, role: str) -> bool:
        return self.kind in BYTEWISE and self.armed and self.where is None and self._role in (None, role)

    # ── what is known of a stream ───────────────────────────────────────────────────────────────────────────────

    def wrote(self, stream: Stream) -> None:
        _, before, since = self._said.get(id(stream), (False, 0, 0))
        self._said[id(stream)] = (True, before + since, 0)

    def was_told(self, stream: Stream, size: int) -> None:
        wrote, before, since = self._said.get(id(stream), (False, 0, 0))
        self._said[id(stream)] = (wrote, before, since + size)

    def note_stale(self, stream: Stream) -> None:
        """Called when `stream` is hit by something after which nothing more comes on it."""
        wrote, before, since = self._said.get(id(stream), (False, 0, 0))
        self.stale = self.hit_role in UPSTREAMS and wrote and before > 0 and since == 0

    def at_rest(self, *roles: str) -> bool:
        """Whether every connection of these roles has carried something, and awaits nothing that we can see."""
        streams = [one for one in self.streams if not one.closed and self.wires.role(one._sock) in roles]
        if len(streams) != sum(role in roles for role in self.wires.open()) or self.hit_role in roles:
            return False
        return all(said[0] and said[2] > 0 for said in (self._said.get(id(one), (False, 0, 0)) for one in streams))

    # ── what is done to one ─────────────────────────────────────────────────────────────────────────────────────

    def breaks(self, stream: Stream) -> None:
        self._broken.add(id(stream))
        self.wires.sever(stream._sock)

    def is_broken(self, stream: Stream) -> bool:
        return id(stream) in self._broken and not stream.closed

    def ends(self, stream: Stream) -> None:
        """The peer has ended in order. What it is sent from now on is lost on it."""
        self._ended.add(id(stream))
        _shut(stream._sock, socket.SHUT_RD)

    def has_ended(self, stream: Stream) -> bool:
        return id(stream) in self._ended and not stream.closed

    async def hang(self, stream: Stream) -> None:
        await self._hung.setdefault(id(stream), trio.Event()).wait()
        raise trio.ClosedResourceError("interrupted")

    def wake(self, stream: Stream) -> None:
        """Called where a stream is closed or interrupted."""
        if (event := self._hung.pop(id(stream), None)) is not None:
            event.set()


def _shut(sock: socket.socket, how: int) -> None:
    """Below any TLS."""
    try:
        socket.socket.shutdown(sock, how)
    except OSError:
        pass


@contextmanager
def scheduling(seed: int) -> Iterator[None]:
    """The order of tasks that are ready at once is trio's dice, as waits before retries are: with a fixed seed, what is found
    can be found again.
    """
    run = sys.modules["trio._core._run"]
    states = run._r.getstate(), random.getstate()
    with mock.patch.object(run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True):
        run._r.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            run._r.setstate(states[0])
            random.setstate(states[1])
