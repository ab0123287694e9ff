"""When questions are not shared, and how long one waits for those it shares with. Pure: times are handed in, in seconds.

Sharing is worth something only as long as nobody suffers from it. Three judgements see to that. *Patience*: how long a question
waits before it is asked alone, measured by what a shared query usually takes, so that a machine under load is not taken for a
slow rule, and bounded by the question's own time. *A pause*: sharing ends for all when it goes wrong, for longer each time that
it does so again soon; it ends too where policy is so slow that there is nothing to gain. *Keeping out*: whoever has spoilt a
query, or kept others waiting, is asked alone for a while, remembered by whose question it is and not by what it asks: a
caller has as many paths as it likes.
"""

from __future__ import annotations

import math

from sidecar.model import Direction, Inquiry

PATIENCE = 16.0
"""Times what a shared query usually takes: much more than a hiccup of the machine, which slows down all."""
MIN_PATIENCE = 0.1
"""Seconds. A machine with too much to do, or a container at its limit, stands still for nearly as long, now and then."""
MAX_PATIENCE = 0.3
"""Of the time that there is for a decision: a question may wait so long twice, for its query to be sent and for the answer, and
enough must be left for being asked alone."""
OVERDUE = 4.0
"""Times what a shared query usually takes: then leaving it looks like running away from it."""
FIRST_GUESS = 0.005
"""Seconds that a shared query takes."""
FIRST_PAUSE = 1.0
MAX_PAUSE = 60.0
KEPT_OUT = 60.0
MAX_KEPT_OUT = 1024
SLOW = 0.002
"""A policy that takes longer than this for each decision, at its best, gains less than a twentieth from sharing."""
WINDOW = 32
"""Queries of which the best counts for that: what is slow now and then is the machine."""
_OURS: tuple[Direction, ...] = ("outbound", "egress")
"""Directions in which the caller is our own agent, and the host that it calls tells one question from another."""

Key = tuple[Direction, str | None]


class Restraint:
    """What is remembered of how sharing went."""

    __slots__ = ("_best", "_kept_out", "_looked_at", "_pause", "_usual", "any", "resume_at")

    def __init__(self) -> None:
        self.any = False
        """Whether there is anything for `forbids` to say: nearly always there is not."""
        self.resume_at = -math.inf
        """Until when nothing is shared."""
        self._pause = 0.0
        self._usual = FIRST_GUESS
        self._kept_out: dict[Key, float] = {}
        """Whose questions are not shared → until when, the first to end first."""
        self._best = math.inf
        self._looked_at = 0

    # ── patience ──────────────────────────────────────────────────────────────────────────────────────────────────

    def longest(self, timeout: float) -> float:
        """How long a question waits for its query to be sent, even if others are answered all the time."""
        return MAX_PATIENCE * timeout

    def patience(self, timeout: float) -> float:
        """How long it waits while nothing is answered."""
        return min(max(PATIENCE * self._usual, MIN_PATIENCE), MAX_PATIENCE * timeout)

    def overdue(self, seconds: float) -> bool:
        """Whether a shared query that has taken so long takes longer than it should."""
        return seconds >= OVERDUE * self._usual

    def took(self, seconds: float) -> None:
        """A shared query took so long, or was given up then."""
        self._usual += (seconds - self._usual) / 16

    # ── pauses ────────────────────────────────────────────────────────────────────────────────────────────────────

    def pays(self, seconds: float) -> bool:
        """Whether sharing is worth it with this policy, of which each decision in a shared query took so long just now."""
        if seconds < self._best:
            self._best = seconds
        self._looked_at += 1
        if self._looked_at < WINDOW:
            return True
        best, self._best, self._looked_at = self._best, math.inf, 0
        return best <= SLOW

    def pause(self, now: float) -> bool:
        """Share nothing for a while; False where that is so already."""
        if now < self.resume_at:
            return False
        soon = now < self.resume_at + self._pause
        self._pause = min(2 * self._pause, MAX_PAUSE) if soon else FIRST_PAUSE
        self.resume_at = now + self._pause
        self.any = True
        return True

    # ── who is kept out ───────────────────────────────────────────────────────────────────────────────────────────

    def keep_out(self, inquiry: Inquiry, now: float) -> None:
        key = _key(inquiry)
        self._kept_out.pop(key, None)
        if len(self._kept_out) >= MAX_KEPT_OUT:
            del self._kept_out[next(iter(self._kept_out))]
        self._kept_out[key] = now + KEPT_OUT
        self.any = True

    def forbids(self, inquiry: Inquiry, now: float) -> bool:
        """Whether this question is to be asked alone now."""
        if now < self.resume_at:
            return True
        while self._kept_out:
            first = next(iter(self._kept_out))
            if now < self._kept_out[first]:
                return _key(inquiry) in self._kept_out
            del self._kept_out[first]
        self.any = False
        return False


def _key(inquiry: Inquiry) -> Key:
    return inquiry.direction, inquiry.host if inquiry.direction in _OURS else inquiry.caller
