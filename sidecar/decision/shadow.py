"""A candidate policy asked beside the one in force: what it would change, before it changes anything.

It sees decisions when they have been taken, and decides nothing: a question that policy in force has answered is put into
a bounded queue and asked of the candidate when there is time. What does not fit is not compared, and counted. A sample
may be taken instead of all. What would have gone the other way is counted and, for the first ones, kept with its caller,
method, path and rules, so that whoever rolls out can read what would break.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from sidecar.errors import NoDecision
from sidecar.model import Allow, Decided, Decision, DecisionPoint, Inquiry

MAX_EXAMPLES = 20
_OURS = frozenset({"decision_timeout", "decision_unreachable", "decision_broken_off", "policy_not_ready"})
"""Why there may be no decision without that being the candidate's own doing."""
_UNDECIDED = "no decision"
WORKERS = 2
"""Questions with the candidate at once: it must not take from the one in force what the machine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    caller: str | None
    method: str
    path: str
    was: str
    """The rule that decided, or `allow` or `deny` where it named none."""
    would: str
    """The same of the candidate, or `no decision`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What was found of one candidate. Counters since it was taken up."""

    revision: str
    serial: int
    compared: int = 0
    dropped: int = 0
    """Sampled, and not compared, for want of room or of an answer in time."""
    undecided: int = 0
    """Its rules come to no decision where policy in force does: under it the request would be answered 503."""
    allow_to_deny: int = 0
    deny_to_allow: int = 0
    examples: tuple[Flip, ...] = field(default=())


class Shadow:
    """`decided` takes records as they come and never waits; `run` compares. `sample` is more than 0, at most 1."""

    def __init__(self, *, sample: float, max_queue: int, chance: Callable[[], float] = random.random) -> None:
        self._sample = sample
        self._chance = chance
        self._send, self._receive = trio.open_memory_channel[tuple[Inquiry, Decision]](max_queue)
        self._candidate: DecisionPoint | None = None
        self.differences: Differences | None = None
        """None while there is no candidate."""

    def compare_with(self, candidate: DecisionPoint, *, revision: str, serial: int) -> None:
        """Ask this one from now on, and begin to count anew."""
        self._candidate = candidate
        self.differences = Differences(revision=revision, serial=serial)

    def stop(self) -> None:
        """There is no candidate any more."""
        self._candidate = None
        self.differences = None

    @property
    def wanted(self) -> float:
        """The share of decisions that it is to be told of; 0 while there is nothing to compare with."""
        return 0.0 if self._candidate is None else self._sample

    def decided(self, record: Decided) -> None:
        if self._sample >= 1 or self._chance() < self._sample:
            self.compare(record)

    def compare(self, record: Decided) -> None:
        """As `decided`, of a decision that is in the sample."""
        if self._candidate is None or record.decision is None or self.differences is None:
            return
        try:
            self._send.send_nowait((record.inquiry, record.decision))
        except trio.WouldBlock:
            self.differences = replace(self.differences, dropped=self.differences.dropped + 1)

    def lost(self, number: int) -> None:
        """So many of the sample were decided elsewhere, and could not be told of."""
        if number and self.differences is not None:
            self.differences = replace(self.differences, dropped=self.differences.dropped + number)

    async def run(self) -> None:
        """Ends by cancellation."""
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, self._receive.clone())

    async def _work(self, questions: trio.MemoryReceiveChannel[tuple[Inquiry, Decision]]) -> None:
        async for inquiry, was in questions:
            candidate, about = self._candidate, self.differences
            if candidate is None or about is None:
                continue
            lost = False
            try:
                would: Decision | None = await candidate.decide(inquiry)
            except NoDecision as error:
                would, lost = None, error.code in _OURS
            # Another candidate may have come meanwhile, whose account this answer is not.
            if (
                self.differences is not None
                and self.differences.serial == about.serial
                and self._candidate is candidate
            ):
                self.differences = (
                    replace(self.differences, dropped=self.differences.dropped + 1)
                    if lost
                    else _counted(self.differences, inquiry, was, would)
                )


def _counted(so_far: Differences, inquiry: Inquiry, was: Decision, would: Decision | None) -> Differences:
    allowed, would_allow = isinstance(was, Allow), isinstance(would, Allow)
    if would is not None and allowed == would_allow:
        return replace(so_far, compared=so_far.compared + 1)
    examples = so_far.examples
    if len(examples) < MAX_EXAMPLES:
        answer = _UNDECIDED if would is None else _rule(would)
        flip = Flip(caller=inquiry.caller, method=inquiry.method, path=inquiry.path, was=_rule(was), would=answer)
        if flip not in examples:
            examples = (*examples, flip)
    return replace(
        so_far, compared=so_far.compared + 1, examples=examples,
        undecided=so_far.undecided + (would is None),
        allow_to_deny=so_far.allow_to_deny + (would is not None and allowed and not would_allow),
        deny_to_allow=so_far.deny_to_allow + (would_allow and not allowed),
    )  # fmt: skip


def _rule(decision: Decision) -> str:
    return decision.rule or ("allow" if isinstance(decision, Allow) else "deny")
