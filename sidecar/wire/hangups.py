"""Clients that have gone while their answer is made, noticed without reading from them.

What a client sends meanwhile may be its next request, so it stays unread, and with it the news that there is no client any more.
But epoll tells of a connection that was reset, or of which both directions have ended, whether it was asked to or not
(epoll_ctl(2): EPOLLERR, EPOLLHUP). A set that asks for nothing else is silent until then. One such set, watched by one task,
costs a system call for each connection and none for a request.

A client that has only ended its own side (a FIN) is not among them: it may still want its answer (RFC 9112 §9.6). If it has
closed altogether, its system says so by a reset to whatever is sent next; where nothing is, the server's look-out gives it up
after a while of silence.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class Hangups:
    """The connections of one listener. `run` must be running."""

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None

    @contextmanager
    def watching(self, descriptor: int, gone: Callable[[], None]) -> Iterator[None]:
        """Call `gone`, once, when the client of this connection has gone."""
        if self._epoll is not None:
            try:
                self._epoll.register(descriptor, select.EPOLLONESHOT)
                self._watched[descriptor] = gone
            except OSError:
                pass  # the system watches no more; writing will tell
        try:
            yield
        finally:
            # epoll forgets what is closed by itself, and the number may be another connection's by now.
            if self._watched.get(descriptor) == gone:
                del self._watched[descriptor]

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        with select.epoll() as epoll:
            self._epoll = epoll
            task_status.started()
            try:
                while True:
                    await trio.lowlevel.wait_readable(epoll)
                    for descriptor, _ in epoll.poll(0):
                        gone = self._watched.pop(descriptor, None)
                        if gone is not None:
                            gone()
            finally:
                self._epoll = None
