"""From a name to a connected socket: who is behind the name, and which of its addresses answers first.

A name is asked for anew for each connection, but a burst of connections asks once, and an answer does for a few seconds. Where the
resolver fails, the last good answer does for some minutes: a name service that is restarted should cost no request.
"No such name" is an answer and not a failure.

Several addresses are raced as RFC 8305 §5 has it (happy eyeballs): the next one is begun when the last one has failed or
`STAGGER` seconds have gone by, the first to connect wins, and all others are closed.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import TypeVar

import trio

from sidecar.model import Address
from sidecar.wire.network import Network

STAGGER = 0.25
"""The Connection Attempt Delay that RFC 8305 §5 recommends."""
_FRESH = 5.0
_LAST_GOOD = 300.0
_PATIENCE = 1.0
"""For a resolver that hangs, where there is a last good answer."""

_T = TypeVar("_T")


class Resolver:
    """What names lead to, asked for no more often than need be."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: dict[Address, _Answer] = {}
        self._asked: dict[Address, _Question] = {}

    async def resolve(self, name: Address, *, anew: bool = False) -> tuple[Address, ...]:
        """Return the addresses behind a name, by IP, in the order of RFC 6724; an address by IP is its own answer.

        `anew`: ask even where an answer is fresh. Raises OSError: `socket.gaierror` where there is no such name, or where it
        cannot be asked for and there is no good answer that is recent enough.
        """
        if is_literal(name.host):
            return (name,)
        while True:
            known = self._known.get(name)
            if known is not None and trio.current_time() < known.fresh_until and not anew:
                return known.addresses
            question = self._asked.get(name)
            if question is None:
                return await self._ask(name, known)
            await question.over.wait()
            if question.failure is not None:
                raise type(question.failure)(*question.failure.args) from question.failure
            anew = False  # whoever asked may have been cancelled, and then it is our turn

    async def _ask(self, name: Address, known: _Answer | None) -> tuple[Address, ...]:
        """Ask while others wait. What fails for one has failed for all of them."""
        question = self._asked[name] = _Question()
        try:
            found = await self._answer(name, known)
        except OSError as failure:
            question.failure = failure
            raise
        finally:
            del self._asked[name]
            question.over.set()
        return found

    async def _answer(self, name: Address, known: _Answer | None) -> tuple[Address, ...]:
        now = trio.current_time()
        usable = known is not None and now < known.good_until
        with trio.CancelScope(deadline=now + _PATIENCE if usable else float("inf")):
            try:
                found = tuple(await self._network.resolve(name))
                if not found:
                    raise socket.gaierror(socket.EAI_NONAME, f"{name.host} has no address")
            except OSError as failure:
                if not usable or _says_no(failure):
                    self._known.pop(name, None)
                    raise
            else:
                now = trio.current_time()
                self._known[name] = _Answer(found, now + _FRESH, now + _LAST_GOOD)
                return found
        assert known is not None  # noqa: S101  (for the type checker: `usable` says so)
        known.fresh_until = trio.current_time() + _FRESH  # or each connection would wait for the failure anew
        return known.addresses

    def forget(self, names: set[Address]) -> None:
        """Drop what is known of all names but these."""
        self._known = {name: answer for name, answer in self._known.items() if name in names}


class _Answer:
    __slots__ = ("addresses", "fresh_until", "good_until")

    def __init__(self, addresses: tuple[Address, ...], fresh_until: float, good_until: float) -> None:
        self.addresses = addresses
        self.fresh_until = fresh_until
        self.good_until = good_until


class _Question:
    """A question that is being asked, and whose answer others wait for."""

    __slots__ = ("failure", "over")

    def __init__(self) -> None:
        self.over = trio.Event()
        self.failure: OSError | None = None


def is_literal(host: str) -> bool:
    """Whether this is an IP address and no name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _says_no(failure: OSError) -> bool:
    return isinstance(failure, socket.gaierror) and failure.errno == socket.EAI_NONAME


async def race(
    attempt: Callable[[_T], Awaitable[socket.socket]], places: Sequence[_T], *, stagger: float = STAGGER
) -> tuple[_T, socket.socket]:
    """Try places in turn, each before the last one has failed if that takes long; return the first that connects.

    Raises the OSError of one of them where none does: `ConnectionRefusedError` only where every one refused, since a closed
    port is what permissive mode may step down from, and one place that is merely unreachable is not.
    """
    if len(places) == 1:
        return places[0], await attempt(places[0])
    won: list[tuple[_T, socket.socket]] = []
    failures: list[OSError] = []

    async def run(place: _T, failed: trio.Event) -> None:
        try:
            sock = await attempt(place)
        except OSError as failure:
            failures.append(failure)
            failed.set()
        else:
            if won:  # by somebody who came in at the same moment
                sock.close()
            else:
                won.append((place, sock))
                nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for place in places:
                failed = trio.Event()
                nursery.start_soon(run, place, failed)
                with trio.move_on_after(stagger):
                    await failed.wait()
    except BaseException:
        for _, sock in won:
            sock.close()
        raise
    if not won:
        raise next((one for one in failures if not isinstance(one, ConnectionRefusedError)), failures[0])
    return won[0]
