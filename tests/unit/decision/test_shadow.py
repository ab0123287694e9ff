"""A candidate is compared, and never decides, delays or grows."""

from __future__ import annotations

from typing import Any

import trio

from sidecar.decision.shadow import MAX_EXAMPLES, Differences, Flip, Shadow
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decided, Decision, Deny, Inquiry
from support.questions import asking

ALLOW = Allow(decision_id="1", revision="old", rule="may")
DENY = Deny(decision_id="2", revision="old")


class Candidate:
    """Denies what begins with /no, has no answer to /hm, none in time to /slow, and can be made to wait."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: trio.Event | None = None

    async def decide(self, inquiry: Inquiry) -> Decision:
        self.asked.append(inquiry.path)
        if self.held is not None:
            await self.held.wait()
        if inquiry.path.startswith("/hm"):
            raise NoDecision("none", code="decision_undefined")
        if inquiry.path.startswith("/slow"):
            raise NoDecision("late", code="decision_timeout")
        if inquiry.path.startswith("/no"):
            return Deny(decision_id="3", revision="new", rule="closed")
        return Allow(decision_id="4", revision="new")


def record(path: str, decision: Decision | None = ALLOW) -> Decided:
    return Decided(at=0.0, exchange_id="x", inquiry=asking(path), decision=decision, error=None, seconds=0.0)


async def compared(shadow: Shadow, count: int) -> Differences:
    while shadow.differences is None or shadow.differences.compared < count:
        await trio.sleep(1)
    return shadow.differences


async def test_what_would_go_the_other_way_is_counted_and_shown(autojump_clock: Any) -> None:
    shadow, candidate = Shadow(sample=1.0, max_queue=10), Candidate()
    shadow.compare_with(candidate, revision="r2", serial=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shadow.run)
        for one in (
            record("/slow"),
            record("/yes"),
            record("/no/1"),
            record("/yes/2", DENY),
            record("/hm"),
            record("/no/3", DENY),
        ):
            shadow.decided(one)
        shadow.decided(record("/never", None))  # no decision was had: there is nothing to compare with
        found = await compared(shadow, 5)
        nursery.cancel_scope.cancel()
    assert (found.allow_to_deny, found.deny_to_allow, found.undecided, found.dropped) == (1, 1, 1, 1)
    assert set(found.examples) == {
        Flip(caller=asking("/x").caller, method="GET", path="/no/1", was="may", would="closed"),
        Flip(caller=asking("/x").caller, method="GET", path="/yes/2", was="deny", would="allow"),
        Flip(caller=asking("/x").caller, method="GET", path="/hm", was="may", would="no decision"),
    }
    assert "/never" not in candidate.asked


async def test_a_slow_candidate_costs_comparisons_and_nothing_else(autojump_clock: Any) -> None:
    shadow, candidate = Shadow(sample=1.0, max_queue=4), Candidate()
    candidate.held = trio.Event()
    shadow.compare_with(candidate, revision="r2", serial=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shadow.run)
        for number in range(4):
            shadow.decided(record(f"/{number}"))
        await trio.sleep(1)  # two are being asked, two wait
        for number in range(10):
            shadow.decided(record(f"/more/{number}"))
        assert shadow.differences is not None
        assert shadow.differences.dropped == 8
        candidate.held.set()
        assert (await compared(shadow, 6)).dropped == 8
        nursery.cancel_scope.cancel()


async def test_an_answer_of_the_candidate_before_is_not_counted_for_the_next(autojump_clock: Any) -> None:
    shadow, first, second = Shadow(sample=1.0, max_queue=4), Candidate(), Candidate()
    first.held = trio.Event()
    shadow.compare_with(first, revision="r2", serial=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shadow.run)
        shadow.decided(record("/no"))
        await trio.sleep(1)
        shadow.compare_with(second, revision="r3", serial=3)
        first.held.set()
        await trio.sleep(1)
        assert shadow.differences == Differences(revision="r3", serial=3)
        shadow.stop()
        shadow.decided(record("/no"))
        await trio.sleep(1)
        assert second.asked == []
        nursery.cancel_scope.cancel()


async def test_what_could_not_be_told_of_is_counted_while_there_is_a_candidate() -> None:
    shadow = Shadow(sample=1.0, max_queue=10)
    shadow.lost(3)
    assert shadow.differences is None
    shadow.compare_with(Candidate(), revision="r2", serial=2)
    shadow.lost(3)
    shadow.lost(1)
    assert shadow.differences == Differences(revision="r2", serial=2, dropped=4)


async def test_a_sample_is_a_share(autojump_clock: Any) -> None:
    chances = iter([0.05, 0.5, 0.09, 0.1])
    shadow, candidate = Shadow(sample=0.1, max_queue=10, chance=lambda: next(chances)), Candidate()
    shadow.compare_with(candidate, revision="r2", serial=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shadow.run)
        for number in range(4):
            shadow.decided(record(f"/{number}"))
        assert (await compared(shadow, 2)).compared == 2
        nursery.cancel_scope.cancel()
    assert sorted(candidate.asked) == ["/0", "/2"]


async def test_examples_are_few_and_differ(autojump_clock: Any) -> None:
    shadow = Shadow(sample=1.0, max_queue=1000)
    shadow.compare_with(Candidate(), revision="r2", serial=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shadow.run)
        for number in range(200):
            shadow.decided(record(f"/no/{number // 4}"))
        found = await compared(shadow, 200)
        nursery.cancel_scope.cancel()
    assert found.allow_to_deny == 200
    assert len(found.examples) == len(set(found.examples)) == MAX_EXAMPLES
