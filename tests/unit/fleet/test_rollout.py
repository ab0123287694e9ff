"""What follows from what: every state and action, who gets what, and that nobody is handed what it would have to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sidecar.bundles import release as releases
from sidecar.bundles.release import Held, Release
from sidecar.fleet.rollout import (
    GONE_SECONDS,
    MAX_RINGS,
    TRANSITIONS,
    Action,
    Gates,
    Holding,
    Malformed,
    NotPossible,
    Report,
    Ring,
    Rollout,
    State,
    Version,
    assigned,
    broken_gates,
    in_rings,
    intended,
    moved,
    shadowed,
    share_of,
    speaks_against,
    started,
    unmet,
)

ALL = Ring(name="all", percent=100)
CANARY = Ring(name="canary", labels={"ring": "canary"})
RINGS = (CANARY, Ring(name="tenth", percent=10), ALL)
STATES: tuple[State, ...] = get_args(State)
ACTIONS: tuple[Action, ...] = get_args(Action)
NOW = 1000.0
IDS = [f"spiffe://example.org/ns/demo/sa/{number}" for number in range(4000)]


def version(serial: int, *returns: int, until: float = 2000.0) -> Version:
    return Version(serial=serial, may_return_to=frozenset(returns), return_until=until)


VERSIONS = {1: version(1), 2: version(2, 1), 3: version(3, 2, 1), 4: version(4)}
ROLLING = Rollout(
    bundle="sidecar", state="rolling", current=2, previous=1, candidate=3, highest=3, reached=1, rings=RINGS
)


def report(id_: str = IDS[0], *, at: float = NOW, serial: int | None = 3, **more: Any) -> Report:
    return Report(id=id_, at=at, serial=serial, **({"labels": {"ring": "canary"}} | more))


# ── what may follow ───────────────────────────────────────────────────────────────────────────────────────────────


def in_state(state: State) -> Rollout:
    return replace(ROLLING, state=state, **({} if state in {"rolling", "paused", "halted"} else {"candidate": None}))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_each_action_follows_the_table_or_is_not_possible(state: State, action: Action) -> None:
    rollout = in_state(state)
    step = lambda: (  # noqa: E731
        started(rollout, version(4), RINGS, Gates(), "why")
        if action == "start"
        else moved(rollout, action, "why", VERSIONS, NOW)
    )
    if (state, action) not in TRANSITIONS:
        with pytest.raises(NotPossible):
            step()
    else:
        after = step()
        assert after.state == TRANSITIONS[state, action]
        assert after.reason == "why"


def test_a_promotion_reaches_ring_after_ring_and_settles_behind_the_last() -> None:
    rollout = ROLLING
    for reached in (2, 3):
        rollout = moved(rollout, "promote", "", VERSIONS, NOW)
        assert (rollout.state, rollout.reached, rollout.current) == ("rolling", reached, 2)
    rollout = moved(rollout, "promote", "", VERSIONS, NOW)
    assert (rollout.state, rollout.current, rollout.previous, rollout.candidate) == ("settled", 3, 2, None)
    assert [assigned(rollout, one, {}) for one in IDS[:50]] == [3] * 50


def test_a_rollback_under_way_gives_the_candidate_up_and_asks_for_no_permission() -> None:
    after = moved(replace(ROLLING, candidate=4), "rollback", "", VERSIONS, NOW)
    assert (after.state, after.candidate, after.current, after.previous) == ("returned", None, 2, 1)


def test_a_rollback_of_what_is_settled_needs_the_signed_permission() -> None:
    settled = replace(ROLLING, state="settled", candidate=None, current=3, previous=2)
    after = moved(settled, "rollback", "", VERSIONS, NOW)
    assert (after.state, after.current, after.previous) == ("returned", 2, None)
    with pytest.raises(NotPossible, match="does not allow the return to 2"):
        moved(settled, "rollback", "", VERSIONS, now=2000.0)
    with pytest.raises(NotPossible, match="does not allow the return to 2"):
        moved(replace(settled, current=4), "rollback", "", VERSIONS, NOW)


@pytest.mark.parametrize("rollout", [Rollout(bundle="b"), Rollout(bundle="b", current=2)])
def test_there_is_no_way_back_from_the_first(rollout: Rollout) -> None:
    with pytest.raises(NotPossible, match="no serial before"):
        moved(rollout, "rollback", "", VERSIONS, NOW)


@pytest.mark.parametrize(("serial", "possible"), [(2, False), (3, False), (4, True), (5, True)])
def test_nothing_below_what_was_begun_before_may_begin(serial: int, *, possible: bool) -> None:
    """Serial 4 was given up: who has accepted it would refuse 3."""
    given_up = moved(replace(ROLLING, candidate=4, highest=4), "rollback", "", VERSIONS, NOW)
    if possible:
        assert started(given_up, version(serial), RINGS, Gates(), "").candidate == serial
    else:
        with pytest.raises(NotPossible):
            started(given_up, version(serial), RINGS, Gates(), "")


def test_what_a_fleet_was_sent_back_from_may_begin_again() -> None:
    settled = replace(ROLLING, state="settled", candidate=None, current=3, previous=2)
    back = moved(settled, "rollback", "", VERSIONS, NOW)
    assert started(back, VERSIONS[3], RINGS, Gates(), "").candidate == 3


@pytest.mark.parametrize(
    "rings",
    [
        (),
        (CANARY,),
        (Ring(name="half", percent=50),),
        (Ring(name="none"), ALL),
        (Ring(name="both", labels={"a": "b"}, percent=5), ALL),
        (Ring(name="zero", percent=0), ALL),
        (Ring(name="much", percent=101), ALL),
        (ALL, ALL),
        (*(Ring(name=str(number), percent=1) for number in range(MAX_RINGS)), ALL),
    ],
)
def test_rings_that_make_no_sense_are_refused(rings: tuple[Ring, ...]) -> None:
    with pytest.raises(Malformed):
        started(Rollout(bundle="b"), version(1), rings, Gates(), "")


def test_with_shadow_first_nobody_has_it_and_everybody_asks_it() -> None:
    rollout = started(in_state("settled"), version(4), RINGS, Gates(), "", shadow_first=True)
    assert {intended(rollout, one, {"ring": "canary"}) for one in IDS[:50]} == {2}
    assert {shadowed(rollout, one, {"ring": "canary"}) for one in IDS[:50]} == {4}


# ── who runs what ─────────────────────────────────────────────────────────────────────────────────────────────────

rings_strategy = st.lists(
    st.one_of(
        st.builds(Ring, name=st.uuids().map(str), percent=st.floats(0.001, 100)),
        st.builds(Ring, name=st.uuids().map(str), labels=st.just({"ring": "canary"})),
    ),
    max_size=6,
).map(lambda rings: (*rings, ALL))


@given(rings_strategy, st.text(), st.sampled_from([{}, {"ring": "canary"}, {"ring": "other"}]))
def test_rings_only_grow_and_the_last_holds_everybody(
    rings: tuple[Ring, ...], spiffe_id: str, labels: Mapping[str, str]
) -> None:
    rollout = replace(ROLLING, rings=rings)
    inside = [in_rings(rollout, spiffe_id, labels, reached) for reached in range(len(rings) + 1)]
    assert inside == sorted(inside)
    assert not inside[0]
    assert inside[-1]


@given(st.text(), st.text())
def test_a_share_is_stable_and_below_a_hundred(bundle: str, spiffe_id: str) -> None:
    assert 0 <= share_of(bundle, spiffe_id) == share_of(bundle, spiffe_id) < 100


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_a_percentage_holds_about_so_many(percent: int) -> None:
    rollout = replace(ROLLING, rings=(Ring(name="some", percent=percent), ALL))
    share = sum(in_rings(rollout, one, {}) for one in IDS) * 100 / len(IDS)
    assert share == pytest.approx(percent, abs=5 * (percent * (100 - percent) / len(IDS)) ** 0.5)  # five sigma


def test_another_bundle_begins_with_others() -> None:
    first, second = ({one for one in IDS if share_of(bundle, one) < 10} for bundle in ("one", "other"))
    assert len(first & second) < len(first) / 3


@pytest.mark.parametrize(
    ("state", "holding", "handed"),
    [
        ("rolling", Holding(), 3),
        ("paused", Holding(runs=2, highest=2), 3),
        ("halted", Holding(), 2),
        ("halted", Holding(runs=3, highest=3), 2),
        ("halted", Holding(runs=2, highest=3), 2),
    ],
)
def test_the_candidate_is_for_its_rings_while_it_rolls(state: State, holding: Holding, handed: int) -> None:
    assert assigned(in_state(state), IDS[0], {"ring": "canary"}, holding, VERSIONS, NOW) == handed


@pytest.mark.parametrize(
    ("holding", "now", "handed"),
    [
        (Holding(runs=3, highest=3), 2000.0, 3),  # the permission has ended
        (Holding(runs=4, highest=4), NOW, 4),  # there never was one
        (Holding(runs=9, highest=9), NOW, 9),  # nothing is known of it
        (Holding(runs=2, highest=3), 2000.0, 2),  # it went back in time, and stays
        (Holding(runs=1, highest=4), NOW, 1),
        (Holding(runs=None, highest=4), NOW, 4),
    ],
)
def test_who_could_not_go_back_keeps_what_it_has(holding: Holding, now: float, handed: int) -> None:
    assert assigned(in_state("halted"), IDS[0], {"ring": "canary"}, holding, VERSIONS, now) == handed


def test_without_anything_in_force_one_keeps_what_it_has() -> None:
    first = Rollout(bundle="sidecar", state="halted", candidate=1, highest=1, reached=1)
    assert assigned(first, IDS[0], {}, Holding(runs=1), VERSIONS, NOW) == 1
    assert assigned(first, IDS[0], {}, Holding(), VERSIONS, NOW) is None


@dataclass
class Sidecar:
    """What a sidecar remembers, by the rule of `bundles.release`."""

    id: str
    labels: Mapping[str, str]
    held: Held | None = None
    runs: int | None = None
    seen: list[int] = field(default_factory=list)

    @property
    def holding(self) -> Holding:
        return Holding(runs=self.runs, highest=None if self.held is None else self.held.serial)


class FleetMachine(RuleBasedStateMachine):
    """Any publications, orders, waits and questions: no sidecar is ever handed what it has to refuse."""

    @initialize()
    def begin(self) -> None:
        self.now = 1000.0
        self.rollout = Rollout(bundle="sidecar")
        self.versions: dict[int, Version] = {}
        self.sidecars = [Sidecar(one, {"ring": "canary"} if index < 2 else {}) for index, one in enumerate(IDS[:6])]

    @rule(gap=st.integers(1, 3), lasting=st.integers(0, 50), data=st.data())
    def publish(self, gap: int, lasting: int, data: st.DataObject) -> None:
        serial = max(self.versions, default=0) + gap
        returns = data.draw(st.frozensets(st.sampled_from(sorted(self.versions) or [0]), max_size=3))
        self.versions[serial] = Version(serial=serial, may_return_to=returns, return_until=self.now + lasting)

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), rings=rings_strategy, shadow_first=st.booleans())
    def start(self, data: st.DataObject, rings: tuple[Ring, ...], *, shadow_first: bool) -> None:
        chosen = self.versions[data.draw(st.sampled_from(sorted(self.versions)[-3:]))]
        self.act(lambda: started(self.rollout, chosen, rings, Gates(), "", shadow_first=shadow_first))

    @rule(action=st.sampled_from([action for action in ACTIONS if action != "start"]))
    def move(self, action: Action) -> None:
        self.act(lambda: moved(self.rollout, action, "", self.versions, self.now))

    @precondition(lambda self: self.rollout.state == "rolling")
    @rule(asking=st.booleans())
    def settle(self, *, asking: bool) -> None:
        while self.rollout.state == "rolling":
            self.move("promote")
            if asking:
                self.all_ask()

    def act(self, step: Any) -> None:
        try:
            self.rollout = step()
        except NotPossible:
            pass

    @rule(seconds=st.integers(0, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 5))
    def ask(self, who: int) -> None:
        self.handed(self.sidecars[who])

    @rule()
    def all_ask(self) -> None:
        for sidecar in self.sidecars:
            self.handed(sidecar)

    def handed(self, sidecar: Sidecar) -> None:
        serial = assigned(self.rollout, sidecar.id, sidecar.labels, sidecar.holding, self.versions, self.now)
        if serial is None or serial == sidecar.runs:
            return
        version = self.versions[serial]
        offered = Release(
            revision=str(serial), serial=serial, created=0.0, roots=("sidecar",), may_return_to=version.may_return_to,
            return_until=version.return_until,
        )  # fmt: skip
        sidecar.held = releases.accept(offered, str(serial), sidecar.held, now=self.now)  # raises where it must not
        sidecar.runs = serial


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────

COUNTED = {"before_allowed": 900, "before_denied": 100}


@pytest.mark.parametrize(
    ("gates", "reports", "complaint"),
    [
        (Gates(), [report()], None),
        (Gates(), [report(serial=2, error_serial=3, error="does not compile")], "could not activate serial 3"),
        (Gates(), [report(serial=2, error_serial=2, error="old news")], None),
        (Gates(max_errors=1), [report(error_serial=3)], None),
        (Gates(max_errors=1), [report(error_serial=3), report(IDS[1], error_serial=3)], "2 could not"),
        (Gates(max_errors=None), [report(error_serial=3)] * 9, None),
        (Gates(), [report(allowed=800, denied=200, **COUNTED)], None),
        (Gates(), [report(allowed=799, denied=201, **COUNTED)], "denies 10% more"),
        (Gates(), [report(allowed=0, denied=49, **COUNTED)], None),
        (Gates(), [report(allowed=0, denied=50, **COUNTED)], "denies 90% more"),
        (Gates(), [report(allowed=0, denied=50, before_allowed=49)], None),
        (Gates(), [report(serial=2, allowed=0, denied=50, **COUNTED)], None),
        (Gates(max_denial_rise=None), [report(allowed=0, denied=50, **COUNTED)], None),
        (Gates(), [report(serial=2, labels={}, shadow_serial=3, shadow_flips=1)], "1 decisions would have gone"),
        (Gates(), [report(serial=2, labels={}, shadow_serial=2, shadow_flips=1)], None),
        (Gates(max_shadow_flips=2), [report(shadow_serial=3, shadow_flips=1)] * 2, None),
        (Gates(max_shadow_flips=2), [report(shadow_serial=3, shadow_flips=1)] * 3, "3 decisions"),
        (Gates(), [report(at=NOW - 300)], None),
        (Gates(), [report(at=NOW - 301)], "has not been heard of for 301 s"),
        (Gates(), [report(at=NOW - 301, serial=2, given=3)], "has not been heard of"),
        (Gates(), [report(at=NOW - 301, serial=2, given=2)], None),
        (Gates(), [report(at=NOW - 301, labels={}, serial=3)], None),
        (Gates(max_silent_seconds=None), [report(at=0)], None),
    ],
)  # fmt: skip
def test_a_gate_breaks_at_its_bound_and_says_why(gates: Gates, reports: list[Report], complaint: str | None) -> None:
    rollout = replace(ROLLING, gates=gates)
    found = broken_gates(rollout, reports, NOW)
    assert [complaint in one for one in found] == [True] if complaint else found == []
    assert broken_gates(replace(rollout, state="paused"), reports, NOW) == found
    assert broken_gates(in_state("settled"), reports, NOW) == []
    silent_only = bool(found) and "heard of" in found[0]
    if found and not silent_only:
        assert any(speaks_against(rollout, one) for one in reports)


@given(st.lists(st.builds(
    report, serial=st.sampled_from([2, 3]), error_serial=st.sampled_from([None, 2, 3]), allowed=st.integers(0, 99),
    denied=st.integers(0, 99), before_allowed=st.integers(0, 99), before_denied=st.integers(0, 99),
    shadow_serial=st.sampled_from([None, 3]), shadow_flips=st.integers(0, 2),
), max_size=5))  # fmt: skip
def test_where_nobody_speaks_against_it_no_gate_breaks(reports: list[Report]) -> None:
    if not any(speaks_against(ROLLING, one) for one in reports):
        assert broken_gates(ROLLING, reports, NOW) == []


@pytest.mark.parametrize(
    ("gates", "reports", "behind"),
    [
        (Gates(), [report()], False),
        (Gates(), [report(serial=2)], True),
        (Gates(), [report(serial=2, labels={})], False),
        (Gates(max_behind=1), [report(serial=2)], False),
        (Gates(max_behind=None), [report(serial=2)] * 3, False),
        (Gates(max_silent_seconds=None), [report(serial=2, at=NOW - GONE_SECONDS - 1)], False),
        (Gates(max_silent_seconds=None), [report(serial=2, at=NOW - GONE_SECONDS - 1, given=3)], True),
    ],
)
def test_a_promotion_waits_for_the_rings_that_were_reached(
    gates: Gates, reports: list[Report], *, behind: bool
) -> None:
    found = unmet(replace(ROLLING, gates=gates), reports, NOW)
    assert [("do not run serial 3" in one) for one in found] == ([True] if behind else [])
