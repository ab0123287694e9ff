"""All servers of one sidecar and the listeners at which they accept: begun together, finished together, and short of descriptors
together, since these are the process's and not one listener's.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from sidecar.wire.listening import EXHAUSTED, Listener
from sidecar.wire.server import Server

_ACCEPT_FAILED_INTERVAL = 10.0
"""Seconds from one line about it to the next: it may go on for long, a hundred times a second."""

Accepting = tuple[Server, Listener]


class Serving:
    """`log(event, level, **fields)` is told `connection.accept_failed` now and then, `counted` each time that it is not."""

    def __init__(self, *, log: Callable[..., None], counted: Callable[[str], None]) -> None:
        self.inbound: list[Accepting] = []
        self.outbound: list[Accepting] = []
        self.health: list[Accepting] = []
        self._log = log
        self._counted = counted
        self._failures = 0
        self._told_again_at = 0.0

    def open_connections(self) -> dict[str, int]:
        """How many are open, by direction."""
        counts: dict[str, int] = {}
        for server, _ in self.inbound + self.outbound + self.health:
            counts[server.direction] = counts.get(server.direction, 0) + server.open_connections
        return counts

    def accept(self, nursery: trio.Nursery, which: list[Accepting]) -> None:
        for server, listener in which:
            nursery.start_soon(server.serve, listener, self._accept_failed)

    async def finish(self, which: list[Accepting]) -> None:
        """Take nobody new but those who wait in the queue already, and return when the last connection has ended."""
        for server, listener in which:
            listener.finish()
            server.drain()
        for server, _ in which:
            await server.wait_empty()

    def _accept_failed(self, error: OSError) -> bool:
        """Tell it, and make room where that is what is missing: in the server that has the most connections first."""
        self._failures += 1
        if trio.current_time() < self._told_again_at:
            self._counted("connection.accept_failed")
        else:
            self._log("connection.accept_failed", "warning", detail=str(error), count=self._failures)
            self._failures, self._told_again_at = 0, trio.current_time() + _ACCEPT_FAILED_INTERVAL
        servers = sorted((one for one, _ in self.inbound + self.outbound), key=lambda one: -one.open_connections)
        return error.errno in EXHAUSTED and any(server.make_room() for server in servers)
