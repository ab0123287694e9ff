"""The addresses that a target's name leads to: which is tried first, and which has failed too often.

Order. The family that the resolver prefers goes first and families take turns (RFC 8305 §4), so that a family that leads
nowhere costs one stagger and not one for each of its addresses. Within a family each connection begins with the next
address, for spread.

Ejection is passive: what requests meet is all that is known. So many failures in a row eject an address for `ejection`
seconds times the number of its ejections, ten at most; each `ejection` seconds of good standing take one of them off again. One
answer ends a row of failures and the end of an ejection does not: an address that comes back and fails at once goes
again. An ejected address is tried last and never refused, and no more than half of a target's addresses are ejected, so
that the others do not break down one after the other under what the first ones carried: a name with one address has
none ejected. What fails everywhere is not the fault of an address.

No I/O and no clock: `now` is in seconds of one clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from sidecar.model import Address

_MAX_EJECTIONS = 10


class Endpoint:
    """One address of a target, and how it has done of late."""

    __slots__ = ("address", "ejected_until", "ejections", "failures", "returned_at")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.failures = 0
        """In a row, up to now."""
        self.ejections = 0
        self.ejected_until: float | None = None
        """None while it is not ejected."""
        self.returned_at = 0.0
        """When its last ejection ended."""

    def __repr__(self) -> str:
        return f"<Endpoint {self.address} failures={self.failures} ejected_until={self.ejected_until}>"


class Endpoints:
    """The addresses of one target, in the order in which the resolver named them."""

    __slots__ = ("_known", "_turn", "target")

    def __init__(self, target: Address, *, turn: int = 0) -> None:
        """`turn`: where the first connection begins. By chance, lest all sidecars that start together begin alike."""
        self.target = target
        self._known: dict[Address, Endpoint] = {}
        self._turn = turn

    def __len__(self) -> int:
        return len(self._known)

    def update(self, addresses: Iterable[Address]) -> None:
        """Take the resolver's answer. What it names no more is forgotten, and what was known of it."""
        self._known = {address: self._known.get(address) or Endpoint(address) for address in addresses}

    def holds(self, address: Address) -> bool:
        return address in self._known

    def in_order(self) -> list[Endpoint]:
        """All of them, as the next connection should try them."""
        turn = self._turn
        self._turn += 1
        standing = [one for one in self._known.values() if one.ejected_until is None]
        ejected = [one for one in self._known.values() if one.ejected_until is not None]
        return _interleaved(standing, turn) + _interleaved(ejected, turn)

    def failed(self, endpoint: Endpoint, now: float, *, max_failures: int, ejection: float) -> float:
        """Count a failure. Returns the seconds for which the endpoint is ejected from now on; 0 where it is not."""
        endpoint.failures += 1
        if endpoint.failures < max_failures or endpoint.ejected_until is not None or not self.holds(endpoint.address):
            return 0.0
        ejected = sum(one.ejected_until is not None for one in self._known.values())
        if 2 * (ejected + 1) > len(self._known):
            return 0.0
        forgiven = int((now - endpoint.returned_at) / ejection)
        endpoint.ejections = min(max(endpoint.ejections - forgiven, 0) + 1, _MAX_EJECTIONS)
        seconds = ejection * endpoint.ejections
        endpoint.ejected_until = now + seconds
        return seconds

    def returned(self, now: float) -> list[Endpoint]:
        """End the ejections whose time is over, and say whose."""
        back = [one for one in self._known.values() if one.ejected_until is not None and one.ejected_until <= now]
        for one in back:
            one.ejected_until = None
            one.returned_at = now
        return back


def _interleaved(endpoints: list[Endpoint], turn: int) -> list[Endpoint]:
    """Families in turn, each begun at its `turn`-th address."""
    families: dict[bool, list[Endpoint]] = {}
    for one in endpoints:
        families.setdefault(":" in one.address.host, []).append(one)
    lanes = [_rotated(family, turn) for family in families.values()]
    return [one for row in zip_longest(*lanes) for one in row if one is not None]


def _rotated(lane: list[Endpoint], turn: int) -> list[Endpoint]:
    first = turn % len(lane)
    return lane[first:] + lane[:first]
