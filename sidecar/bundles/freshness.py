"""Decisions only while policy is not too old: what `max_policy_age` closes, and opens again.

The age is the relay's to know; here it only stands before every question.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.errors import NoDecision
from sidecar.model import Decision, DecisionPoint, Inquiry


class FreshOnly:
    """`model.DecisionPoint`: asks `point` unless `stale()`. Raises `NoDecision` (`policy_stale`), and what `point` raises."""

    def __init__(self, point: DecisionPoint, stale: Callable[[], bool]) -> None:
        self._point = point
        self._stale = stale

    async def decide(self, inquiry: Inquiry) -> Decision:
        if self._stale():
            raise NoDecision("the newest policy that was seen is older than max_policy_age", code="policy_stale")
        return await self._point.decide(inquiry)
