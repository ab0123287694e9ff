"""The life of a worker as a table, and which queue is whose."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.workers import STATES, TRANSITIONS, Life, Timing, assigned

TIMING = Timing(max_missed=3, start_timeout=30.0, first_backoff=0.1, max_backoff=0.5, healthy_after=10.0)


def life(*happenings: str) -> Life:
    found = Life(TIMING)
    found.started(0.0)
    for one in happenings:
        found.happened(one)  # type: ignore[arg-type]
    return found


def test_the_table_leads_from_state_to_state_and_back_to_the_start():
    assert {state for state, _ in TRANSITIONS} == set(STATES) == {state for state, _ in TRANSITIONS.values()}
    reached, waiting = set(), ["starting"]
    while waiting:
        here = waiting.pop()
        if here not in reached:
            reached.add(here)
            waiting += [to for (state, _), (to, _) in TRANSITIONS.items() if state == here]
    assert reached == set(STATES)


def test_whoever_is_dismissed_leaves_and_is_never_started_again():
    for state in STATES:
        assert TRANSITIONS[state, "dismissed"][0] in {"leaving", "gone"}
    assert not [key for key, (to, action) in TRANSITIONS.items() if key[0] in {"leaving", "gone"} and action == "start"]
    assert TRANSITIONS["leaving", "exited"] == ("gone", "nothing")


def test_one_that_was_found_stuck_does_not_serve_although_it_says_that_it_is_ready():
    one = life("silent")
    assert one.happened("ready") == "nothing"
    assert one.state == "stuck"


def test_who_does_not_answer_so_many_questions_in_a_row_is_killed():
    one = life("ready")
    assert [one.ask(now) for now in (1.0, 2.0, 3.0, 4.0)] == ["nothing", "nothing", "nothing", "kill"]
    assert one.state == "stuck"


def test_an_answer_is_enough():
    one = life("ready")
    for now in range(20):
        assert one.ask(float(now)) == "nothing"
        if now % 3 == 2:
            one.heard()
    assert one.state == "ready"


def test_a_time_in_which_nobody_was_asked_does_not_count():
    """The supervisor itself was stopped, or the machine was."""
    one = life("ready")
    one.ask(1.0)
    assert one.ask(10_000.0) == "nothing"


def test_a_start_that_takes_too_long_is_ended():
    one = life()
    assert one.ask(29.9) == "nothing"
    assert one.ask(30.0) == "kill"


def test_who_ends_again_and_again_waits_longer_until_he_has_lived():
    one, waits = life(), []
    for now in (0.0, 1.0, 2.0, 3.0, 4.0):
        one.started(now)
        waits.append(one.backoff(now + 0.5))
    assert waits == [0.1, 0.2, 0.4, 0.5, 0.5]
    one.started(10.0)
    assert one.backoff(20.0) == 0.1
    assert one.restarts == 6


@given(st.lists(st.sampled_from(["ready", "silent", "exited", "waited", "dismissed", "ask"]), max_size=40))
def test_whatever_can_happen_next_leads_somewhere(happenings):
    """What cannot happen is passed over; `ask` is always possible."""
    one, now = life(), 0.0
    for happening in happenings:
        now += 1.0
        if happening == "ask":
            one.ask(now)
        elif (one.state, happening) in TRANSITIONS:
            one.happened(happening)
        assert one.state in STATES


# ── queues ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("queues", "workers", "ready", "whose"),
    [
        (2, 2, [0, 1], {0: {0}, 1: {1}}),
        (2, 2, [1], {1: {0, 1}}),  # the other one has ended
        (2, 2, [], {}),
        (5, 2, [0, 1], {0: {0, 2, 4}, 1: {1, 3}}),  # a predecessor had five
        (1, 3, [0, 1, 2], {0: {0}, 1: {0}, 2: {0}}),  # a service manager holds one
        (4, 4, [0, 3], {0: {0, 2}, 3: {1, 3}}),
    ],
)
def test_each_has_his_own_and_what_nobody_has_is_somebody_elses(queues, workers, ready, whose):
    assert assigned(queues, workers, ready) == whose


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_while_anybody_is_ready_each_queue_is_accepted_from_and_nobody_is_idle(queues, workers, data):
    ready = data.draw(st.sets(st.integers(0, workers - 1), min_size=1))
    found = assigned(queues, workers, ready)
    assert found.keys() == ready
    assert set().union(*found.values()) == set(range(queues))
    assert all(found.values())
    if queues >= workers == len(ready):
        assert sum(map(len, found.values())) == queues, "then no two share one"


# ── what is in memory ─────────────────────────────────────────────────────────────────────────────────────────────


def loaded(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys, {program}; print(json.dumps(list(sys.modules)))"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(json.loads(done.stdout))


def test_one_process_alone_loads_nothing_of_workers():
    assert not loaded("sidecar.process, sidecar.traffic") & {
        "sidecar.supervisor", "sidecar.worker", "sidecar.worker_process", "sidecar.orders", "sidecar.intake",
        "sidecar.wire.channel",
    }  # fmt: skip


def test_a_supervisor_carries_no_requests_and_a_worker_owns_nothing():
    assert not loaded("sidecar.process, sidecar.supervisor") & {
        "sidecar.traffic",
        "sidecar.inbound",
        "sidecar.outbound",
    }
    assert not loaded("sidecar.worker") & {
        "sidecar.app", "sidecar.supply", "sidecar.decision.engine", "sidecar.bundles.relay",
        "sidecar.identity.pem_files", "sidecar.management.health", "yaml", "cryptography", "httpx",
    }  # fmt: skip
