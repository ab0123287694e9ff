"""Which route a request takes: its host first, then the longest path prefix of whole segments.

The table is sorted once, when the configuration is read; finding a route is a walk down one short list. Nothing that a
client sends makes the walk longer than the list of routes.
"""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.config.settings import Route


class RouteTable:
    """Routes by host; under each host its own routes, longest prefix first, and then those for any host."""

    __slots__ = ("_any", "_hosts")

    def __init__(self, routes: Iterable[Route]):
        ordered = sorted(((_stem(route), route) for route in routes), key=lambda entry: -len(entry[0]))
        self._any = [entry for entry in ordered if entry[1].host is None]
        self._hosts = {
            host: [entry for entry in ordered if entry[1].host == host] + self._any
            for host in {entry[1].host for entry in ordered if entry[1].host is not None}
        }

    def match(self, host: str, path: str) -> Route | None:
        """The route for a request's host (no port, any case) and canonical path; None where there is none.

        `/budget/` and `/budget` are the same prefix: both match `/budget`, `/budget/` and `/budget/x`, never
        `/budgets`. An encoded slash is part of its segment.
        """
        for stem, route in self._hosts.get(host.lower(), self._any):
            if path.startswith(stem) and (len(path) == len(stem) or path[len(stem)] == "/"):
                return route
        return None


def route_for(routes: Iterable[Route], host: str, path: str) -> Route | None:
    """`RouteTable.match` for one question; whoever asks often keeps a table."""
    return RouteTable(routes).match(host, path)


def _stem(route: Route) -> str:
    return route.path.rstrip("/")
