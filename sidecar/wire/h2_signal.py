"""What the tasks of an HTTP/2 connection wake each other with, and what bounds a peer that makes us work for nothing."""

from __future__ import annotations

import trio
from h2.exceptions import DenialOfServiceError


class Signal:
    """Wakes the one task that waits for it. What a ring means must be seen elsewhere: it is not kept."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    @property
    def awaited(self) -> bool:
        return self._task is not None

    async def wait(self) -> None:
        assert self._task is None  # noqa: S101  (a second waiter would be a defect of ours)
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def ring(self) -> None:
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)


class Allowance:
    """How much a peer may ask for that serves no request: `limit` units above what it earns, within `seconds`. It may earn
    `ahead` units before it spends them.

    The clock is only looked at where the limit is reached, so that counting costs next to nothing; a peer that has been
    quiet may so spend twice the limit once.
    """

    __slots__ = ("_floor", "_limit", "_seconds", "_since", "_spent")

    def __init__(self, limit: int, seconds: float, ahead: int | None = None) -> None:
        self._limit = limit
        self._floor = -(limit if ahead is None else ahead)
        self._seconds = seconds
        self._since = trio.current_time()
        self._spent = 0

    def spend(self) -> None:
        """Raises `DenialOfServiceError` (ENHANCE_YOUR_CALM) where the limit is passed."""
        self._spent += 1
        if self._spent > self._limit:
            now = trio.current_time()
            if now - self._since <= self._seconds:
                raise DenialOfServiceError("too much that serves no request")
            self._since = now
            self._spent = 1

    def earn(self, units: int = 1) -> None:
        if self._spent > self._floor:
            self._spent -= units
