"""Whether a quiet peer is still there (RFC 9113 §6.7).

A peer from which nothing has come for a while is sent a PING; one that leaves it unanswered is taken for dead. No task waits
for that: whoever looks at the clock now and then anyway (the server's look-out, the pool's reaper) calls `look`.
"""

from __future__ import annotations

from enum import Enum

_LEAST_PATIENCE = 5.0


class Finding(Enum):
    ALIVE = "alive"
    """Or not quiet for long enough to be asked."""
    ASK = "ask"
    """Send a PING."""
    DEAD = "dead"
    """It was asked and has not answered. Found once."""


class Liveness:
    """`timeout`: seconds of silence after which the peer is asked; it has a third of that to answer, or 5 s.

    A peer that answers and is quiet again is asked `slower` times as late: gRPC servers take more than one PING in 5 minutes
    from a client, on a stream on which they themselves have nothing to say, for an attack (their "too_many_pings").
    """

    __slots__ = ("_asked_at", "_interval", "_patience", "_quiet_since", "_slower", "_timeout", "asked", "dead", "heard")

    def __init__(self, timeout: float, now: float, *, slower: int = 1) -> None:
        self._timeout = timeout
        self._patience = max(timeout / 3, _LEAST_PATIENCE)
        self._slower = slower
        self._interval = timeout
        self._quiet_since = now
        self._asked_at: float | None = None
        self.heard = False
        """Set with whatever comes."""
        self.asked = False
        """Whether a PING, sent for whatever reason, is unanswered."""
        self.dead = False

    def look(self, now: float) -> Finding:
        if self.heard:
            self._interval = self._timeout if self._asked_at is None else self._timeout * self._slower
            self._quiet_since, self._asked_at = now, None
            self.heard = False
        elif self._asked_at is not None:
            if now - self._asked_at >= self._patience and not self.dead:
                self.dead = True
                return Finding.DEAD
        elif now - self._quiet_since >= self._interval:
            self._asked_at = now
            return Finding.ASK
        return Finding.ALIVE
