"""Whether a stretch of load was fair: what the generator, the agent, OPA, the proxy and its log say must agree. Pure.

Each says it independently of the others. A peer that answers by itself is seen by the agent's count, one that skips a
decision by OPA's, one that repeats decisions where none may be repeated by its own and OPA's, one that writes no log by the
lines that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Asking = Literal["repeats", "each", "nothing"]
"""What a case has a peer of ours decide: questions that come again, so that an answer may be repeated; questions each of which
OPA must be asked; or nothing, since there are no requests. Other peers ask OPA each time."""
OPA_SLACK = 0.005
"""A peer may ask its OPA a few questions more than there are answers: whether it is alive, for one."""
MOST_SHARED = 64
"""Questions that one query of a peer of ours may carry, at the very most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What a proxy says itself of its decisions so far."""

    decided: int
    """Decisions that were had, from wherever."""
    repeated: int
    """Of these, answers that had been given to another question before."""

    def __add__(self, other: Own) -> Own:
        return Own(decided=self.decided + other.decided, repeated=self.repeated + other.repeated)

    def __sub__(self, other: Own) -> Own:
        return Own(decided=self.decided - other.decided, repeated=self.repeated - other.repeated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What happened between two readings of all counters."""

    answers: int
    """As the load generator counted them; handshakes where `asking` is `nothing`."""
    connections: int
    """Of the load generator: what a count may be off by."""
    asking: Asking
    reached: int
    """Requests that the agent has seen."""
    proven: int
    """Of these, such as named the caller."""
    asked: Sequence[int]
    """Queries that each OPA on the way has answered; none without OPA."""
    own: Own | None
    """None where the peer has no way but to ask."""
    names_caller: bool
    """Whether the peer tells the agent who the caller is."""


def faults(account: Account) -> Iterator[str]:
    """What does not agree, in words; nothing where all does."""
    requests = 0 if account.asking == "nothing" else account.answers
    if account.reached != requests:
        yield f"the agent was asked {account.reached:,} times for {requests:,} answers"
    if account.names_caller and account.proven != account.reached:
        yield f"the agent was told the caller {account.proven:,} times in {account.reached:,} requests"
    slack = int(requests * OPA_SLACK) + account.connections + 2
    for asked in account.asked:
        if asked > requests + slack:
            yield f"OPA decided {asked:,} times for {requests:,} answers"
        if account.own is None and asked < requests:
            yield f"OPA decided {asked:,} times for {requests:,} answers"
    if account.own is not None:
        yield from _own_faults(account, account.own, requests, slack)


def _own_faults(account: Account, own: Own, requests: int, slack: int) -> Iterator[str]:
    hops = len(account.asked)
    if not hops * requests <= own.decided <= hops * (requests + slack):
        yield f"it made {own.decided:,} decisions for {requests:,} answers"
    if account.asking == "each":
        if own.repeated > slack:
            yield f"it repeated {own.repeated:,} decisions where each is to be asked"
        for asked in account.asked:
            if asked * MOST_SHARED < requests:
                yield f"OPA was queried {asked:,} times for {requests:,} answers: no query carries so many"


def missing(lines: Sequence[int], answers: int, refused: int) -> int:
    """How many lines are missing in the access log that lacks most. What was refused has a line in the first one only."""
    wanted = [answers + refused, *(answers for _ in lines[1:])]
    return max(0, *(due - found for due, found in zip(wanted, lines or [0], strict=True)))
