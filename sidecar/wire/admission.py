"""Who may be connected at once: a limit for all of a listener's connections, and one for each peer.

At a limit the newcomer is let in and an older connection ends with which nothing is lost: the eldest whose peer is not
settled yet, else the eldest that is idle. So the silent cannot keep out who has something to say. For a peer that is at its
own limit only its own connections make room, and where all of these are busy the newcomer is refused: however many it
opens, it crowds out nobody else.

A peer is the SPIFFE ID that it has proven; in plaintext, where none is proven, the address from which it comes. Those who have
said nothing yet are counted for their address apart, or they would keep out whoever comes from there to prove something. This
is looked at once for each connection, and never for a request.
"""

from __future__ import annotations

from typing import Literal

import trio

from sidecar.model import Peer, Workload
from sidecar.wire.h1_server import Served
from sidecar.wire.settling import Refused

_Whose = tuple[Literal["settling", "address", "id"], str]


class Guest:
    """A connection, as far as making room is concerned."""

    settling: trio.CancelScope | None = None
    """What bounds the wait for its peer to be settled, while that lasts."""
    served: Served | None = None
    """What serves it, once it is settled."""
    evicted = False
    """Ended while its peer was not settled, to make room for somebody else. Later `served.evicted` says so."""
    _whose: _Whose | None = None

    def make_way(self) -> bool:
        """End this connection if nothing is lost by that, and say whether that is so."""
        if self.settling is not None:
            if self.evicted:
                return False
            self.evicted = True
            self.settling.cancel()
            return True
        served = self.served
        if served is None or served.idle is None or served.evicted:
            return False
        served.evicted = True
        served.idle.cancel()
        return True


class Admission:
    """The connections of one listener, in the order in which they came."""

    def __init__(self) -> None:
        self._guests: dict[Guest, None] = {}
        self._of_peer: dict[_Whose, dict[Guest, None]] = {}

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, guest: Guest, host: str, *, max_connections: int, max_connections_per_peer: int | None) -> None:
        """Let a connection in that has come from `host`. `max_connections_per_peer` None: peers are not told apart.

        It is counted either way, until `leave`. Raises `Refused`.
        """
        over = len(self._guests) >= max_connections
        room = not over or self.make_room()
        self._guests[guest] = None
        if not room:
            raise Refused("overloaded", "connections_exhausted")
        if max_connections_per_peer is not None:
            self._count(guest, ("settling", host), max_connections_per_peer)

    def settled(self, guest: Guest, peer: Peer, host: str, *, max_connections_per_peer: int | None) -> None:
        """Count a connection for the peer that it has turned out to be. Raises `Refused`."""
        if max_connections_per_peer is not None:
            self._uncount(guest)
            whose: _Whose = ("id", str(peer.id)) if isinstance(peer, Workload) else ("address", host)
            self._count(guest, whose, max_connections_per_peer)

    def leave(self, guest: Guest) -> None:
        self._guests.pop(guest, None)
        self._uncount(guest)

    def make_room(self) -> bool:
        """End one connection of anybody's, where there is one with which nothing is lost, and say whether there was."""
        return _make_way(self._guests)

    def _count(self, guest: Guest, whose: _Whose, limit: int) -> None:
        guests = self._of_peer.setdefault(whose, {})
        room = len(guests) < limit or _make_way(guests)
        guests[guest] = None
        guest._whose = whose
        if not room:
            raise Refused("overloaded", "peer_connections_exceeded")

    def _uncount(self, guest: Guest) -> None:
        whose, guest._whose = guest._whose, None
        if whose is not None:
            guests = self._of_peer[whose]
            del guests[guest]
            if not guests:
                del self._of_peer[whose]


def _make_way(guests: dict[Guest, None]) -> bool:
    return any(guest.make_way() for guest in guests if guest.settling is not None) or any(
        guest.make_way() for guest in guests
    )
