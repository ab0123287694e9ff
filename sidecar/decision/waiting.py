"""A question that waits to be asked with others, the query in which several go, and the account of what came of such queries.

A query belongs to none of those in it: it goes on when one leaves. When all have left it is given up, since nobody wants to
know any more and others wait for it to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import trio

from sidecar.errors import NoDecision
from sidecar.model import Decision, Inquiry, SharingUse


class Alone(Enum):
    """Why a question that has waited is to be asked alone."""

    IN_ITS_TURN = "few wait"
    PAUSED = "nothing is shared at present: a query failed, or took too long"
    SUSPECT = "the same, and it was in that query"
    IMPATIENT = "it has waited for long enough"


class Waiting:
    """A question whose task is parked until `wake`. `since` is a time of trio's, `timeout` the seconds that it has from then on."""

    __slots__ = ("body", "era", "inquiry", "query", "said", "since", "task", "timeout")

    def __init__(self, inquiry: Inquiry, body: bytes, since: float, timeout: float) -> None:
        self.inquiry = inquiry
        self.body = body
        self.since = since
        self.timeout = timeout
        self.said: Decision | NoDecision | Alone | None = None
        self.era = 0
        """In which it was told to go by itself."""
        self.query: Query | None = None
        """Where it was put together with others."""
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        """None once it does not wait any more."""

    @property
    def left(self) -> bool:
        """Whether it was cancelled before anything was said to it."""
        return self.task is None and self.said is None

    def wake(self, said: Decision | NoDecision | Alone) -> None:
        task, self.task = self.task, None
        if task is not None:
            self.said = said
            trio.lowlevel.reschedule(task)

    def leave(self, _: object) -> trio.lowlevel.Abort:
        """It is cancelled."""
        self.task = None
        self.body = b""  # its place is kept until its turn would come, and so many may come and leave meanwhile
        if self.query is not None:
            self.query.left()
        return trio.lowlevel.Abort.SUCCEEDED


class Query:
    """Several questions that are with OPA. `scope` is to be around the asking: it is cancelled when the last of them has left."""

    __slots__ = ("_there", "scope")

    def __init__(self, group: Sequence[Waiting]) -> None:
        self.scope = trio.CancelScope()
        self._there = len(group)
        for one in group:
            one.query = self

    def left(self) -> None:
        """One of them has."""
        self._there -= 1
        if not self._there:
            self.scope.cancel()


class Tally:
    """What came of sharing so far, of one OPA after another."""

    __slots__ = ("abandoned", "failed", "kept_out", "pauses", "queries", "together")

    def __init__(self) -> None:
        self.queries = self.together = self.failed = self.abandoned = 0
        """Shared queries, the questions in them, the queries that failed, and those that nobody waited for any more."""
        self.pauses = self.kept_out = 0

    @property
    def use(self) -> SharingUse:
        answered = self.queries - self.failed - self.abandoned
        return SharingUse(
            questions=self.together, answered=answered, failed=self.failed, abandoned=self.abandoned, pauses=self.pauses,
            kept_out=self.kept_out,
        )  # fmt: skip
