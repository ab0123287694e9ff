"""Whose turn it is to do something that takes long: one step of a handshake in one turn of the event loop, hosts in rotation.

A step of a handshake takes OpenSSL half a millisecond, and cannot be interrupted. When a thousand peers say hello at the same
moment, the loop would do all their steps before it looks at anything else, and every request that is open would wait for
half a second. So steps that come close together stand in line, and between two of them the loop serves whoever else is
ready. The line takes hosts in rotation: however many one opens, another waits for one of its steps at a time.

Who comes alone does not wait. On a loop that has nothing else to do the line costs a pass through the scheduler for a step, and no time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import trio

ALONE = 0.0005
"""Seconds since the last step ended after which the next one waits for nobody."""


class Turns:
    """`run` has to be running."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended = float("-inf")
        self._line: dict[str, deque[trio.lowlevel.Task]] = {}
        """Those who wait, by host; the host whose turn is next comes first. None is empty."""
        self._pacer: trio.lowlevel.Task | None = None
        """`run`, while there is nobody in line."""

    def of(self, host: str) -> Turn:
        return Turn(self, host)

    async def wait(self, host: str) -> None:
        if not self._line and self._clock() - self._ended > ALONE:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        task = trio.lowlevel.current_task()
        self._line.setdefault(host, deque()).append(task)
        if self._pacer is not None:
            pacer, self._pacer = self._pacer, None
            trio.lowlevel.reschedule(pacer)

        def leave(_: object) -> trio.lowlevel.Abort:
            waiting = self._line[host]
            waiting.remove(task)
            if not waiting:
                del self._line[host]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def over(self) -> None:
        self._ended = self._clock()

    async def run(self) -> NoReturn:
        """Call one after the other. Ends by cancellation; who is in line then waits for its own."""
        while True:
            if not self._line:
                self._pacer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop)
            else:
                self._call()
                await trio.lowlevel.checkpoint()

    def _call(self) -> None:
        host = next(iter(self._line))
        waiting = self._line.pop(host)
        task = waiting.popleft()
        if waiting:
            self._line[host] = waiting  # behind all others
        trio.lowlevel.reschedule(task)

    def _stop(self, _: object) -> trio.lowlevel.Abort:
        self._pacer = None
        return trio.lowlevel.Abort.SUCCEEDED


class Turn:
    """One peer's way to its turns."""

    __slots__ = ("_host", "_turns")

    def __init__(self, turns: Turns, host: str) -> None:
        self._turns = turns
        self._host = host

    async def wait(self) -> None:
        """Return when it is our turn: what is to be done then is to be done at once. Schedules only where somebody is before us."""
        await self._turns.wait(self._host)

    def over(self) -> None:
        """It is done."""
        self._turns.over()
