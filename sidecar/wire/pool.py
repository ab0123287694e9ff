"""The connections of one upstream: which of them serves the next request, how many there may be, and when each has had its time.

Nothing here waits but `place`, so a plan cannot change half-way: each method leaves the pool whole. The number of connections is
the length of what holds them and is counted nowhere else.

At the bound, of connections or of those that are being made, requests stand in a line. Whatever becomes free (a kept connection, a stream of a shared one, the right to
make one more) is handed to the first of them and is its own from that moment: nobody overtakes, and no waking is lost on somebody
who has just left, since a task that is handed something cannot be cancelled out of having it.

A connection that is retired (too old, to an address that is ejected or gone from the name) finishes what it carries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from sidecar.errors import NotSent, SidecarError
from sidecar.wire.connector import Made, Proof
from sidecar.wire.endpoints import Endpoints
from sidecar.wire.h1_client import Known
from sidecar.wire.pooled import KeptConnection, SharedConnection, Terms
from sidecar.wire.recent import Recent
from sidecar.wire.upstream import Upstream, UpstreamStream

_MAX_RECENT = 64
"""Heads of answers; most of them are out of use after a second, since they hold the time."""


class Pool:
    """The connections of one upstream."""

    def __init__(self, upstream: Upstream, endpoints: Endpoints, terms: Terms) -> None:
        self.upstream = upstream
        self.endpoints = endpoints
        self.terms = terms
        self.h1_only = upstream.protocol == "h1"
        """Whether the upstream spoke h1 when it was last asked: nothing is shared there, so that nobody need wait for another."""
        self.pending: Pending | None = None
        self.connecting = 0
        """Places that are taken for connections that are not there yet."""
        self.shared: list[SharedConnection] = []
        self.used_at = terms.now
        self.recent: Recent[Known] = Recent(_MAX_RECENT)
        self._open: set[KeptConnection] = set()
        self._idle: list[KeptConnection] = []
        """Of the open ones; the longest idle first."""
        self._line: deque[_Waiter] = deque()

    def __len__(self) -> int:
        """Connections, those that are being made included."""
        return len(self._open) + len(self.shared) + self.connecting

    def __repr__(self) -> str:
        return (
            f"<Pool {self.upstream.address} h1={len(self._open)} idle={len(self._idle)} h2={len(self.shared)}"
            f" connecting={self.connecting} waiting={len(self._line)}>"
        )

    @property
    def unused(self) -> bool:
        return not (len(self) or self._line or self.pending)

    @property
    def full(self) -> bool:
        return bool(self._line) or not self._roomy

    @property
    def _roomy(self) -> bool:
        """Whether one more may be made now."""
        settings = self.terms.settings
        return len(self) < settings.max_connections and self.connecting < settings.max_connecting

    # ── what serves the next request ────────────────────────────────────────────────────────────────────────────

    def take(self, *, fresh: bool) -> UpstreamStream | None:
        """A stream on a connection that is there. `fresh`: not on one that was kept idle."""
        for connection in self.shared:
            if connection.accepting:
                if self._holds(connection.proof):
                    return connection.open()
                connection.close_when_idle()
            elif not connection.claimed:
                connection.close_when_idle()  # it carries nothing, and takes nothing either
        if not fresh:
            idle = self._idle
            while idle:
                candidate = idle.pop()
                if not candidate.stale() and self._holds(candidate.proof):
                    candidate.renew()
                    return candidate
                candidate.close()
        return None

    def _holds(self, proof: Proof | None) -> bool:
        return proof is None or proof.holds(self.terms.credentials(), self.upstream.allowed)

    def give_back(self, kept: KeptConnection) -> None:
        if self._line:
            if self._line[0].fresh or kept.stale() or not self._holds(kept.proof):
                kept.close()  # and with that its place is free
            else:
                kept.renew()
                self._hand(kept)
        elif not self.terms.keeping or len(self._idle) >= self.terms.settings.max_idle:
            kept.close()
        else:
            kept.idle_since = self.terms.now
            self._idle.append(kept)

    # ── the bound ───────────────────────────────────────────────────────────────────────────────────────────────

    async def place(self, *, fresh: bool) -> UpstreamStream | None:
        """Wait in line for a stream, or for the right to make a connection (None), which `leave` gives back.

        Raises `NotSent` where that takes longer than `connect_timeout`, with `upstream_overloaded` at the bound of connections and
        `upstream_connect_timeout` while others are being made; and with `upstream_overloaded` where too many wait already.
        """
        settings = self.terms.settings
        self.used_at = self.terms.now
        if not self._line:
            while self._idle and len(self) >= settings.max_connections:
                self._idle.pop(0).close()  # whoever comes here has no use for what is idle
            if self._roomy:
                self.connecting += 1
                return None
        if len(self) + len(self._line) >= 2 * settings.max_connections:
            raise NotSent("too many wait for a connection already", code="upstream_overloaded")
        waiter = _Waiter(fresh=fresh)
        self._line.append(waiter)

        def leave(_: object) -> trio.lowlevel.Abort:
            self._line.remove(waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            with trio.fail_after(settings.connect_timeout):
                await trio.lowlevel.wait_task_rescheduled(leave)
        except trio.TooSlowError as error:
            if len(self) < settings.max_connections:
                raise NotSent("no connection in time", code="upstream_connect_timeout", status=504) from error
            raise NotSent("no connection has become free in time", code="upstream_overloaded") from error
        return waiter.given

    def leave(self) -> None:
        """Give back a place: the connection was made, or was not."""
        self.connecting -= 1
        self.serve()

    def serve(self) -> None:
        """Hand what is free to those who wait, in turn."""
        if not self._line:
            return
        for connection in self.shared:
            while self._line and connection.accepting and self._holds(connection.proof):
                self._hand(connection.open())
        while self._line and self._roomy:
            self.connecting += 1
            self._hand(None)

    def _hand(self, given: UpstreamStream | None) -> None:
        waiter = self._line.popleft()
        waiter.given = given
        trio.lowlevel.reschedule(waiter.task)

    # ── what comes and goes ─────────────────────────────────────────────────────────────────────────────────────

    def keep(self, made: Made) -> KeptConnection:
        """Take in a new h1 connection, in use."""
        connection = KeptConnection(made, self)
        self._open.add(connection)
        return connection

    def share(self, made: Made) -> SharedConnection:
        """Take in a new h2 connection. `ended` is to be called when it has."""
        connection = SharedConnection(made, self)
        self.shared.append(connection)
        return connection

    def ended(self, connection: KeptConnection | SharedConnection) -> None:
        self.used_at = self.terms.now
        if isinstance(connection, SharedConnection):
            if connection in self.shared:
                self.shared.remove(connection)
        else:
            self._open.discard(connection)
        self.serve()

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self, *, thoroughly: bool) -> None:
        """Close what has had its time, and what has lost its peer; with a system call for each idle connection, what the
        other side has closed too.
        """
        now = self.terms.now
        oldest = now - self.terms.settings.idle_timeout
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.pop(0).close()
        if thoroughly:
            stale = [one for one in self._idle if one.stale()]
            self._idle = [one for one in self._idle if one not in stale]
            for kept in stale:
                kept.close()
            if not self._idle and self.upstream.protocol != "h1":
                self.h1_only = False
            self.recent.forget()
        self.retire(lambda connection: connection.expires_at <= now)
        for shared in list(self.shared):
            shared.look(now)
            if shared.idle_since < oldest:
                shared.close_when_idle()
        self.serve()

    def retire(self, which: Callable[[KeptConnection | SharedConnection], bool]) -> None:
        """Give these no new request; they end with what they carry."""
        for kept in [one for one in self._open if which(one)]:
            kept.retired = True
            if kept in self._idle:
                self._idle.remove(kept)
                kept.close()
        for shared in [one for one in self.shared if which(one)]:
            shared.close_when_idle()

    def close(self) -> None:
        """Close what is idle, and all else when it has become so."""
        while self._idle:
            self._idle.pop().close()
        for shared in self.shared:
            shared.close_when_idle()


class Pending:
    """A connection that is being made, and that others wait for."""

    __slots__ = ("fault", "over")

    def __init__(self) -> None:
        self.over = trio.Event()
        self.fault: SidecarError | None = None


class _Waiter:
    __slots__ = ("fresh", "given", "task")

    def __init__(self, *, fresh: bool) -> None:
        self.task = trio.lowlevel.current_task()
        self.fresh = fresh
        self.given: UpstreamStream | None = None
