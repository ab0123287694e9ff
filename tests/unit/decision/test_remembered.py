"""What is remembered is what would be decided, whoever comes, goes, or is late. OPA is a function here."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.bundles.freshness import FreshOnly
from sidecar.decision.cache import Bounds, FieldPath
from sidecar.decision.inquiry import OURS, question
from sidecar.decision.remembered import Remembered
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry, PolicyBundle
from support.questions import asking

ROOM = Bounds(max_entries=1000, max_bytes=1 << 20)


def bundle(revision: str = "r1", *directions: str, reads: Sequence[FieldPath] = (("path",),)) -> PolicyBundle:
    return PolicyBundle(
        archive=b"", revision=revision, serial=1, created=0.0, digest="", keys={}, scope="sidecar",
        pure={OURS.path(way): tuple(reads) for way in directions or ("inbound", "outbound")},  # type: ignore[arg-type]
    )  # fmt: skip


class Opa:
    """In the place of an engine: `says` makes the answer, `seconds` later. Keeps what it was asked and who gave up."""

    decision_timeout = 1.0

    def __init__(self) -> None:
        self.in_force: PolicyBundle | None = bundle()
        self.says: Callable[[Inquiry], Decision | Exception] = lambda inquiry: self.allow()
        self.seconds = 0.1
        self.asked: list[Inquiry] = []
        self.given_up = 0
        self.comes: trio.Event | None = None
        """In place of `seconds`."""
        self._ids = itertools.count(1)

    def allow(self, **more: Any) -> Allow:
        assert self.in_force is not None
        return Allow(decision_id=f"asked-{next(self._ids)}", revision=self.in_force.revision, **more)

    async def decide(self, inquiry: Inquiry) -> Decision:
        self.asked.append(inquiry)
        answer = self.says(inquiry)
        try:
            if self.comes is not None:
                await self.comes.wait()
            else:
                await trio.sleep(self.seconds)
        except trio.Cancelled:
            self.given_up += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer


@asynccontextmanager
async def remembering(opa: Opa, bounds: Bounds | None = ROOM, **more: Any) -> AsyncIterator[Remembered]:
    ids = itertools.count(1)
    more = {"path": OURS.path, "new_id": lambda: f"own-{next(ids)}", **more}
    remembered = Remembered(opa, bounds=bounds, **more)
    async with trio.open_nursery() as nursery:
        await nursery.start(remembered.run)
        yield remembered
        nursery.cancel_scope.cancel()


@dataclass
class Asked:
    """One caller: what came of its question, and when."""

    answer: Decision | Exception | None = None
    cancelled: bool = False
    at: float | None = None
    scope: trio.CancelScope | None = None

    async def ask(self, point: Remembered, inquiry: Inquiry, timeout: float = 100.0) -> None:
        with trio.move_on_after(timeout) as self.scope:
            try:
                self.answer = await point.decide(inquiry)
            except Exception as error:
                self.answer = error
        self.cancelled = self.scope.cancelled_caught
        self.at = trio.current_time()


def ids(*asked: Asked) -> list[tuple[str, str | None]]:
    told = []
    for one in asked:
        assert isinstance(one.answer, (Allow, Deny))
        told.append((one.answer.decision_id, one.answer.repeats))
    return told


# ── hits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_decided_is_repeated_under_an_id_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    async with remembering(opa) as point:
        first = await point.decide(asking("/a", caller="x"))
        again = await point.decide(asking("/a", caller="y"))  # the caller is not read
        third = await point.decide(asking("/a", caller="z"))
    assert len(opa.asked) == 1
    assert [(one.decision_id, one.repeats) for one in (first, again, third)] == [
        ("asked-1", None), ("own-1", "asked-1"), ("own-2", "asked-1"),
    ]  # fmt: skip
    assert (point.use.hits, point.use.misses, point.use.entries) == (2, 1, 1)


@pytest.mark.parametrize("other", [asking("/b"), asking("/a", direction="outbound")])
async def test_another_question_is_asked(autojump_clock: trio.testing.MockClock, other: Inquiry) -> None:
    opa = Opa()
    opa.says = lambda inquiry: (
        opa.allow() if inquiry.direction == "inbound" else Deny(decision_id="asked-2", revision="r1")
    )
    async with remembering(opa) as point:
        await point.decide(asking("/a"))
        assert (await point.decide(other)).repeats is None
    assert len(opa.asked) == 2


@pytest.mark.parametrize(
    ("in_force", "more"),
    [
        (None, {}),
        (replace(bundle(), pure={}), {}),
        (bundle("r1", "outbound"), {}),
        (bundle(), {"path": None}),
        (bundle(), {"bounds": None}),
    ],
    ids=["no bundle", "no proof", "no proof for this entrypoint", "another contract", "turned off"],
)
async def test_without_a_proof_everything_is_asked(
    autojump_clock: trio.testing.MockClock, in_force: PolicyBundle | None, more: dict[str, Any]
) -> None:
    opa = Opa()
    opa.in_force, opa.says = in_force, lambda _: Allow(decision_id="d", revision="r1")
    async with remembering(opa, **more) as point, trio.open_nursery() as nursery:
        for _ in range(2):
            for _ in range(2):
                nursery.start_soon(point.decide, asking("/a"))
            await trio.sleep(1)
    assert len(opa.asked) == 4
    assert (point.use.bypassed, point.use.hits + point.use.misses + point.use.shared, point.use.entries) == (4, 0, 0)


async def test_what_has_no_key_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    opa.in_force = bundle(reads=[("claims",)])
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    async with remembering(opa) as point:
        for claims in ({"a": object()}, {1: "a"}, deep):
            for _ in range(2):
                await point.decide(replace(asking(), claims=claims))  # type: ignore[arg-type]
        for _ in range(2):
            await point.decide(replace(asking(), caller=["not hashable"]))  # type: ignore[arg-type]
    assert len(opa.asked) == 7  # the caller is not read


@pytest.mark.parametrize("fault", [NoDecision("", code="decision_undefined"), ZeroDivisionError()])
async def test_errors_are_never_kept(autojump_clock: trio.testing.MockClock, fault: Exception) -> None:
    opa = Opa()
    opa.says = lambda _: fault
    async with remembering(opa) as point:
        for _ in range(2):
            with pytest.raises(type(fault)):
                await point.decide(asking("/a"))
        opa.says = lambda _: opa.allow()
        assert (await point.decide(asking("/a"))).repeats is None
    assert len(opa.asked) == 3


# ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hit_never_prolongs_an_answers_life(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    opa.says = lambda _: opa.allow(cache_ttl=20.0, lease=30.0)
    async with remembering(opa) as point:
        first = await point.decide(asking("/a"))
        given = trio.current_time()
        assert isinstance(first, Allow)
        assert (first.cache_ttl, first.lease) == (20.0, 30.0)
        for age in (0.0, 5.0, 19.5):
            await trio.sleep_until(given + age)
            again = await point.decide(asking("/a"))
            assert isinstance(again, Allow)
            assert again.cache_ttl == pytest.approx(20.0 - age)
            assert again.lease == pytest.approx(30.0 - age)
        await trio.sleep_until(given + 20.0)
        assert (await point.decide(asking("/a"))).repeats is None
    assert len(opa.asked) == 2


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (Allow(decision_id="d", revision="r1", cache_ttl=0.0), 2),
        (Allow(decision_id="d", revision="r1", lease=5.0), 2),
        (Deny(decision_id="d", revision="r1", cache_ttl=5.0), 2),
        (Deny(decision_id="d", revision="r1", cache_ttl=0.0), 2),
        (Allow(decision_id="d", revision="r1", lease=50.0, cache_ttl=50.0), 1),
        (Allow(decision_id="d", revision="r1"), 1),
        (Deny(decision_id="d", revision="r1"), 1),
    ],
)
async def test_how_long_is_for_the_answer_to_say(
    autojump_clock: trio.testing.MockClock, answer: Decision, asked: int
) -> None:
    opa = Opa()
    opa.says = lambda _: answer
    async with remembering(opa) as point:
        await point.decide(asking("/a"))
        await trio.sleep(6)
        await point.decide(asking("/a"))
    assert len(opa.asked) == asked


async def test_a_policy_that_is_too_old_closes_for_what_is_kept_too(autojump_clock: trio.testing.MockClock) -> None:
    opa, stale = Opa(), False
    async with remembering(opa) as remembered:
        point = FreshOnly(remembered, lambda: stale)
        await point.decide(asking("/a"))
        stale = True
        with pytest.raises(NoDecision) as caught:
            await point.decide(asking("/a"))
        assert caught.value.code == "policy_stale"
        stale = False
        assert (await point.decide(asking("/a"))).repeats == "asked-1"


# ── at the same time ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_question_at_the_same_time_is_asked_once(autojump_clock: trio.testing.MockClock) -> None:
    opa, callers = Opa(), [Asked() for _ in range(20)]
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        for one in callers:
            nursery.start_soon(one.ask, point, asking("/a"))
    assert len(opa.asked) == 1
    told = ids(*callers)
    assert len({own for own, _ in told}) == 20
    assert sorted(repeats or "" for _, repeats in told) == ["", *["asked-1"] * 19]
    assert (point.use.misses, point.use.shared) == (1, 19)


@pytest.mark.parametrize("by", ["cancellation", "deadline"])
async def test_whoever_leaves_leaves_alone(autojump_clock: trio.testing.MockClock, by: str) -> None:
    opa, leader, one, other, later = Opa(), Asked(), Asked(), Asked(), Asked()
    opa.seconds = 0.5
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(leader.ask, point, asking("/a"), 0.2 if by == "deadline" else 100.0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(one.ask, point, asking("/a"), 0.3)
        nursery.start_soon(other.ask, point, asking("/a"))
        await trio.sleep(0.2)
        if by == "cancellation" and leader.scope is not None:
            leader.scope.cancel()
        await trio.sleep(1)
        await later.ask(point, asking("/a"))
    assert (leader.cancelled, one.cancelled, other.cancelled) == (True, True, False)
    assert [leader.at, one.at, other.at] == pytest.approx([0.2, 0.3, 0.5])
    assert (len(opa.asked), opa.given_up) == (1, 0)
    # The id that the last one names is one that somebody was told.
    assert ids(other, later) == [("asked-1", None), ("own-1", "asked-1")]


async def test_a_question_that_nobody_waits_for_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    opa, gone, also_gone, newcomer = Opa(), Asked(), Asked(), Asked()
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(gone.ask, point, asking("/a"), 0.01)
        nursery.start_soon(also_gone.ask, point, asking("/a"), 0.02)
        await trio.sleep(0.02)
        await newcomer.ask(point, asking("/a"))
    assert (len(opa.asked), opa.given_up) == (2, 1)
    assert gone.cancelled
    assert also_gone.cancelled
    assert ids(newcomer) == [("asked-2", None)]
    assert newcomer.at == pytest.approx(0.12)


async def test_an_answer_that_nobody_was_there_for_is_not_kept(autojump_clock: trio.testing.MockClock) -> None:
    """It comes in the very moment in which the last one leaves: its id would be one that no log knows."""
    opa, gone = Opa(), Asked()
    opa.comes = trio.Event()
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(gone.ask, point, asking("/a"))
        await trio.testing.wait_all_tasks_blocked()
        assert gone.scope is not None
        opa.comes.set()
        gone.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert (gone.cancelled, opa.given_up) == (True, 0)
        assert (await point.decide(asking("/a"))).repeats is None
        assert point._idle  # and whoever carried it has not been handed anything
        assert (await point.decide(asking("/b"))).repeats is None


async def test_nobody_joins_what_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    opa, gone = Opa(), Asked()
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(gone.ask, point, asking("/a"))
        await trio.testing.wait_all_tasks_blocked()
        assert gone.scope is not None
        gone.scope.cancel()
        first = await point.decide(asking("/a"))
        assert (await point.decide(asking("/a"))).repeats == first.decision_id
    assert (point.use.misses, point.use.shared, point.use.hits) == (2, 0, 1)


async def test_what_is_given_up_takes_nothing_of_whoever_asks_next_with_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    opa, gone, one, other = Opa(), Asked(), Asked(), Asked()

    async def ask_later() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await other.ask(point, asking("/a"))

    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(gone.ask, point, asking("/a"))
        await trio.testing.wait_all_tasks_blocked()
        assert gone.scope is not None
        nursery.start_soon(ask_later)
        gone.scope.cancel()
        await one.ask(point, asking("/a"))  # at once, before whoever carried the first one hears of it
    assert sorted(repeats or "" for _, repeats in ids(one, other)) == ["", "asked-2"]
    assert (len(opa.asked), point.use.shared) == (2, 1)


async def test_nobody_is_given_work_who_is_about_to_end(autojump_clock: trio.testing.MockClock) -> None:
    opa, late = Opa(), Asked()
    async with remembering(opa) as point:
        await point.decide(asking("/a"))
        await trio.testing.wait_all_tasks_blocked()
        assert point._idle
        assert point._nursery is not None
        point._nursery.cancel_scope.cancel()
        await late.ask(point, asking("/b"))
    assert isinstance(late.answer, NoDecision)


async def test_a_failure_is_of_the_one_it_was_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    opa, leader, followers = Opa(), Asked(), [Asked() for _ in range(3)]
    answers: list[Any] = [
        NoDecision("", code="decision_timeout"),
        "allow",
        "allow",
        NoDecision("", code="decision_undefined"),
    ]
    opa.says = lambda _: opa.allow() if (what := answers.pop(0)) == "allow" else what
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(leader.ask, point, asking("/a"))
        await trio.testing.wait_all_tasks_blocked()
        for one in followers:
            nursery.start_soon(one.ask, point, asking("/a"))
    assert len(opa.asked) == 4
    assert isinstance(leader.answer, NoDecision)
    assert leader.answer.code == "decision_timeout"
    assert sorted(type(one.answer).__name__ for one in followers) == ["Allow", "Allow", "NoDecision"]


async def test_who_asks_again_has_what_is_left_of_his_own_deadline(autojump_clock: trio.testing.MockClock) -> None:
    opa, leader, follower = Opa(), Asked(), Asked()
    opa.says = lambda _: NoDecision("", code="decision_timeout")
    opa.seconds = 1.0  # as an engine does that gets no answer
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(leader.ask, point, asking("/a"))
        await trio.sleep(0.7)
        nursery.start_soon(follower.ask, point, asking("/a"))
        await trio.sleep(0.4)
        opa.says = lambda _: opa.allow()
    assert follower.at == pytest.approx(1.7)
    assert isinstance(follower.answer, NoDecision)
    assert follower.answer.code == "decision_timeout"


async def test_a_defect_fails_the_question_that_met_it(autojump_clock: trio.testing.MockClock) -> None:
    opa, unlucky, other = Opa(), Asked(), Asked()
    opa.says = lambda inquiry: ZeroDivisionError() if inquiry.path == "/a" else opa.allow()
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(unlucky.ask, point, asking("/a"))
        nursery.start_soon(other.ask, point, asking("/b"))
    assert isinstance(unlucky.answer, ZeroDivisionError)
    assert isinstance(other.answer, Allow)


async def test_whoever_still_waits_at_the_end_has_no_decision(autojump_clock: trio.testing.MockClock) -> None:
    opa, waiting, late = Opa(), Asked(), Asked()
    async with trio.open_nursery() as nursery:
        async with remembering(opa) as point:
            await point.decide(asking("/x"))  # so that there is a task that waits for work
            nursery.start_soon(waiting.ask, point, asking("/a"))
            await trio.testing.wait_all_tasks_blocked()
        await late.ask(point, asking("/b"))
    assert isinstance(waiting.answer, NoDecision)
    assert waiting.answer.code == "decision_unreachable"
    assert isinstance(late.answer, Allow)


async def test_tasks_are_used_again(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    async with remembering(opa) as point:
        for burst in range(3):
            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(point.decide, asking(f"/{burst}/{number}"))
            await trio.testing.wait_all_tasks_blocked()
            assert point._nursery is not None
            assert len(point._nursery.child_tasks) == len(point._idle) == 64
    assert len(opa.asked) == 600


async def test_where_nothing_comes_again_little_is_kept_until_something_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    opa = Opa()
    opa.seconds = 0
    async with remembering(opa, Bounds(max_entries=10_000, max_bytes=1 << 30)) as point:
        for number in range(2048):
            await point.decide(asking(f"/{number}"))
        assert point.use.entries == 1023 + 1025 // 16 + 1
        assert (await point.decide(asking("/7"))).repeats is not None  # what is kept is found all the same
        for number in range(2049):
            await point.decide(asking(f"/again/{number % 100}"))
        hits = point.use.hits
        for number in range(100):
            await point.decide(asking(f"/again/{number}"))
        assert point.use.hits == hits + 100
        assert point.use.hits + point.use.misses == 2048 + 1 + 2049 + 100


# ── bundles ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_another_bundle_takes_everything_with_it_even_under_the_same_revision(
    autojump_clock: trio.testing.MockClock,
) -> None:
    opa = Opa()
    async with remembering(opa) as point:
        await point.decide(asking("/a"))
        opa.in_force = bundle("r1")
        assert (await point.decide(asking("/a"))).repeats is None
        assert point.use.entries == 1
    assert len(opa.asked) == 2


async def test_what_had_to_make_room_is_counted_over_all_bundles(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    async with remembering(opa, Bounds(max_entries=1, max_bytes=1 << 20)) as point:
        for turn in (1, 2):
            await point.decide(asking("/a"))
            await point.decide(asking("/b"))
            assert point.use.evicted == turn
            opa.in_force = bundle("r2")


async def test_while_a_bundle_is_on_its_way_everything_is_asked_and_a_refused_one_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    opa = Opa()
    async with remembering(opa) as point:
        await point.decide(asking("/a"))
        stays, opa.in_force = opa.in_force, None
        opa.says = lambda _: Allow(decision_id="old", revision="r1")
        for _ in range(2):
            assert (await point.decide(asking("/a"))).repeats is None
            assert (await point.decide(asking("/b"))).repeats is None
        opa.in_force = stays
        assert (await point.decide(asking("/a"))).repeats == "asked-1"
        assert (await point.decide(asking("/b"))).repeats is None
    assert len(opa.asked) == 6


@pytest.mark.parametrize("then", [None, bundle("r1"), bundle("r2")], ids=["on its way", "same revision", "another"])
async def test_what_was_asked_of_the_bundle_before_is_not_kept(
    autojump_clock: trio.testing.MockClock, then: PolicyBundle | None
) -> None:
    opa, before, after = Opa(), Asked(), Asked()
    opa.seconds = 0.5
    async with remembering(opa) as point, trio.open_nursery() as nursery:
        nursery.start_soon(before.ask, point, asking("/a"))
        await trio.sleep(0.1)
        opa.in_force = then
        opa.says = lambda _: Deny(decision_id="new", revision="r1")
        nursery.start_soon(after.ask, point, asking("/a"))  # it does not wait for what was asked of another bundle
        await trio.sleep(0.45)
        assert ids(before) == [("asked-1", None)]
        assert point.use.entries == 0
        await trio.sleep(1)
        opa.says = lambda _: Deny(decision_id="newer", revision="r1")
        last = await point.decide(asking("/a"))
    assert isinstance(after.answer, Deny)
    assert after.answer.repeats is None
    assert isinstance(last, Deny)


async def test_an_answer_under_another_revision_is_not_kept(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    opa.says = lambda _: Allow(decision_id="d", revision="r0")
    async with remembering(opa) as point:
        for _ in range(2):
            assert (await point.decide(asking("/a"))).repeats is None
    assert (len(opa.asked), point.use.entries) == (2, 0)


async def test_the_room_can_be_changed_and_taken_away(autojump_clock: trio.testing.MockClock) -> None:
    opa = Opa()
    async with remembering(opa) as point:
        for number in range(5):
            await point.decide(asking(f"/{number}"))
        point.resize(Bounds(max_entries=2, max_bytes=1 << 20))
        assert (point.use.entries, point.use.evicted) == (2, 3)
        assert (await point.decide(asking("/4"))).repeats == "asked-5"
        point.resize(None)
        assert (point.use.entries, point.use.bytes) == (0, 0)
        assert (await point.decide(asking("/4"))).repeats is None
        assert (await point.decide(asking("/4"))).repeats is None
        assert point.use.bypassed == 2
        point.resize(ROOM)
        assert (await point.decide(asking("/4"))).repeats is None
        assert (await point.decide(asking("/4"))).repeats is not None


# ── all of it together ────────────────────────────────────────────────────────────────────────────────────────────

_READS: Sequence[Sequence[FieldPath]] = (
    [], [("path",)], [("caller",), ("method",)], [("segments",), ("tls",)], [("claims", "level")], [("headers", "x-a"), ("port",)], [()],
)  # fmt: skip
_LIVES: Sequence[dict[str, Any]] = (
    {},
    {},
    {"cache_ttl": 0.0},
    {"cache_ttl": 0.4},
    {"lease": 0.3},
    {"cache_ttl": 0.6, "lease": 0.5},
)
QUESTIONS = st.builds(
    lambda path, direction, **more: replace(asking(path, direction), **more),
    path=st.sampled_from(["/a", "/b"]), direction=st.sampled_from(["inbound", "outbound"]),
    caller=st.sampled_from([None, "x"]), tls=st.booleans(), port=st.sampled_from([None, 0, 1]),
    headers=st.sampled_from([{}, {"x-a": ("1",)}, {"x-a": ()}]),
    claims=st.sampled_from([None, {}, {"level": None}, {"level": 1}, {"level": True}, {"level": 1.0}, {"level": "1"}]),
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A pure function of what it reads, of its entrypoint, and of itself."""

    name: str
    handed: PolicyBundle

    def decides(self, inquiry: Inquiry) -> Decision | Exception:
        asked = json.loads(question(inquiry))["input"]
        read = []
        for path in self.handed.pure[OURS.path(inquiry.direction)]:
            value = asked
            for name in path:
                value = value[name] if isinstance(value, dict) and name in value else "undefined"
            read.append(json.dumps(value))
        what = f"{self.name} {inquiry.direction} {read}"
        number = sum(map(ord, what))
        if number % 7 == 0:
            return NoDecision(what, code="decision_undefined")
        if number % 3 == 0:
            return Deny(decision_id="", revision=self.handed.revision, reason=what)
        return Allow(decision_id="", revision=self.handed.revision, reason=what, **_LIVES[number % len(_LIVES)])


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[float, Any]], list[float]]:
    """What happens when: a question with its deadline, a bundle that is offered, or its end; and how long answers take."""
    moments = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.3])
    count = itertools.count(1)
    policies = st.builds(
        lambda revision, reads: (f"policy-{next(count)}", revision, reads),
        st.sampled_from(["r1", "r2"]),
        st.sampled_from(_READS),
    )
    asked = st.tuples(moments, st.tuples(QUESTIONS, st.sampled_from([0.02, 0.15, 5.0, 5.0])))
    changed = st.tuples(moments, st.tuples(policies, st.sampled_from([0.0, 0.1, 0.3]), st.booleans()))
    events = draw(st.lists(asked, min_size=2, max_size=14)) + draw(st.lists(changed, max_size=3))
    return sorted(events, key=lambda event: event[0]), draw(
        st.lists(st.sampled_from([0.0, 0.1, 0.25]), min_size=3, max_size=3)
    )


class Changing(Opa):
    """Policies that replace each other: a question has the answer of the policy that was there when it arrived."""

    def __init__(self, seconds: Sequence[float]) -> None:
        super().__init__()
        self._seconds = itertools.cycle(seconds)
        self.policy: Policy
        self.since: list[tuple[float, Policy]] = []
        self.ends: dict[str, float] = {}
        self._changing = trio.Lock()

    def put(self, policy: Policy) -> None:
        self.policy, self.in_force = policy, policy.handed
        self.since.append((trio.current_time(), policy))

    async def change(self, policy: Policy, seconds: float, refused: bool) -> None:
        async with self._changing:
            self.in_force = None
            await trio.sleep(seconds)
            if refused:
                self.in_force = self.policy.handed
            else:
                self.put(policy)

    async def decide(self, inquiry: Inquiry) -> Decision:
        answer = self.policy.decides(inquiry)
        await trio.sleep(next(self._seconds))
        if isinstance(answer, Exception):
            raise answer
        answer = replace(answer, decision_id=f"asked-{next(self._ids)}")
        if isinstance(answer, Allow) and answer.lease is not None:
            self.ends[answer.decision_id] = trio.current_time() + answer.lease
        return answer

    def could_have_decided(self, began: float, ended: float) -> list[Policy]:
        """The policies that were there at some time between."""
        return [
            policy
            for (start, policy), following in itertools.zip_longest(self.since, self.since[1:])
            if start <= ended and (following is None or following[0] >= began)
        ]


def said(decision: Decision) -> tuple[object, ...]:
    """Without what each answer has for itself."""
    return (type(decision), decision.revision, decision.reason, decision.rule, decision.cache_ttl is None)


@settings(max_examples=300, deadline=None)
@given(history=histories())
def test_remembered_or_not_it_is_the_same(history: tuple[list[tuple[float, Any]], list[float]]) -> None:
    events, seconds = history
    told: list[tuple[Inquiry, float, Asked]] = []

    async def main() -> None:
        opa = Changing(seconds)
        opa.put(Policy("policy-0", bundle("r1", reads=[("path",), ("claims",)])))
        async with remembering(opa, Bounds(max_entries=6, max_bytes=1 << 20)) as point, trio.open_nursery() as nursery:
            for at, what in events:
                await trio.sleep_until(at)
                if isinstance(what[0], Inquiry):
                    one = Asked()
                    told.append((what[0], trio.current_time(), one))
                    nursery.start_soon(one.ask, point, *what)
                else:
                    (name, revision, reads), takes, refused = what
                    nursery.start_soon(opa.change, Policy(name, bundle(revision, reads=reads)), takes, refused)
        names = set()
        for inquiry, began, one in told:
            assert one.at is not None
            if one.cancelled:
                continue
            wanted = [policy.decides(inquiry) for policy in opa.could_have_decided(began, one.at)]
            if isinstance(one.answer, Exception):
                assert str(one.answer) in [str(want) for want in wanted if isinstance(want, Exception)]
                continue
            assert one.answer is not None
            names.add(one.answer.decision_id)
            if isinstance(one.answer, Allow) and one.answer.lease is not None:
                end = opa.ends[one.answer.repeats or one.answer.decision_id]
                assert 0 < one.answer.lease <= end - one.at + 1e-9
            assert said(one.answer) in [said(want) for want in wanted if not isinstance(want, Exception)]
        assert len(names) == len([1 for _, _, one in told if isinstance(one.answer, (Allow, Deny))])
        repeats = {one.answer.repeats for _, _, one in told if isinstance(one.answer, (Allow, Deny))} - {None}
        assert repeats <= names  # every id that is named is one that was told

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
