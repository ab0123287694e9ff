"""The life of a worker, and who accepts from which queue. Pure: whoever acts on it is `supervisor`.

Anybody may be dismissed at any time, and leaves when he has ended.

    starting ──ready──▶ ready ──────exited──▶ ended ──waited──▶ starting
        └──silent──▶ stuck ◀──silent──┘         ▲
                       └────────exited──────────┘
    dismissed ──▶ leaving ──exited──▶ gone
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["starting", "ready", "stuck", "ended", "leaving", "gone"]
Happening: TypeAlias = Literal["ready", "silent", "exited", "waited", "dismissed"]
Action: TypeAlias = Literal["nothing", "serve", "kill", "replace", "start"]

STATES: tuple[State, ...] = ("starting", "ready", "stuck", "ended", "leaving", "gone")
TRANSITIONS: Mapping[tuple[State, Happening], tuple[State, Action]] = {
    ("starting", "ready"): ("ready", "serve"),
    ("starting", "silent"): ("stuck", "kill"),
    ("starting", "exited"): ("ended", "replace"),
    ("starting", "dismissed"): ("leaving", "kill"),  # it serves nobody, and holds sockets that are to close
    ("ready", "silent"): ("stuck", "kill"),
    ("ready", "exited"): ("ended", "replace"),
    ("ready", "dismissed"): ("leaving", "nothing"),
    ("stuck", "ready"): ("stuck", "nothing"),  # too late: it is on its way to be killed
    ("stuck", "silent"): ("stuck", "kill"),
    ("stuck", "exited"): ("ended", "replace"),
    ("stuck", "dismissed"): ("leaving", "kill"),
    ("ended", "waited"): ("starting", "start"),
    ("ended", "dismissed"): ("gone", "nothing"),
    ("leaving", "ready"): ("leaving", "kill"),
    ("leaving", "silent"): ("leaving", "kill"),
    ("leaving", "exited"): ("gone", "nothing"),
    ("leaving", "dismissed"): ("leaving", "nothing"),
    ("gone", "waited"): ("gone", "nothing"),
    ("gone", "dismissed"): ("gone", "nothing"),
}
"""What is not here cannot happen: KeyError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds, unless said otherwise."""

    interval: float = 1.0
    """Between questions to a worker."""
    max_missed: int = 5
    """Questions in a row without an answer, after which it counts as stuck."""
    start_timeout: float = 30.0
    answer_timeout: float = 15.0
    """For an order that it obeys at once: longer than it takes to be found stuck, so that it is replaced first."""
    first_backoff: float = 0.1
    max_backoff: float = 5.0
    healthy_after: float = 30.0
    """Life after which the next end is the first again."""


DEFAULT_TIMING = Timing()


class Life:
    """Where one worker stands. Times are given by the caller, on any one clock."""

    def __init__(self, timing: Timing = DEFAULT_TIMING) -> None:
        self.state: State = "starting"
        self.restarts = 0
        self._timing = timing
        self._backoff = timing.first_backoff
        self._since = 0.0
        self._missed = 0

    def happened(self, happening: Happening) -> Action:
        self.state, action = TRANSITIONS[self.state, happening]
        return action

    def started(self, now: float) -> None:
        self._since, self._missed = now, 0

    def heard(self) -> None:
        """It has said something."""
        self._missed = 0

    def ask(self, now: float) -> Action:
        """To be called at each interval, before it is asked. What is counted are our own questions and not the time that has
        passed: if we are stopped for a while ourselves, nobody has missed anything.
        """
        if self.state == "starting":
            return self.happened("silent") if now - self._since >= self._timing.start_timeout else "nothing"
        if self.state not in {"ready", "leaving"}:
            return "nothing"
        if self._missed >= self._timing.max_missed:
            return self.happened("silent")
        self._missed += 1
        return "nothing"

    def backoff(self, now: float) -> float:
        """Seconds until the next start. It has ended at `now`."""
        self.restarts += 1
        if now - self._since >= self._timing.healthy_after:
            self._backoff = self._timing.first_backoff
        delay, self._backoff = self._backoff, min(2 * self._backoff, self._timing.max_backoff)
        return delay


def assigned(queues: int, workers: int, ready: Collection[int]) -> dict[int, frozenset[int]]:
    """Which of so many queues each worker that is ready accepts from.

    Each has one of its own. Where there are more (a predecessor had more workers) they are dealt out, where there are fewer
    (somebody holds the one socket for us) they are shared; and those of workers that are not there are somebody else's until
    they are. So while anybody is ready, each queue is accepted from.
    """
    own: dict[int, set[int]] = {
        one: {queue for queue in range(queues) if queue % workers == one} or {one % queues} for one in ready
    }
    covered: set[int] = set().union(*own.values())
    in_turn = sorted(own)
    for queue in range(queues):
        if queue not in covered and in_turn:
            own[in_turn[queue % len(in_turn)]].add(queue)
    return {one: frozenset(of) for one, of in own.items()}
