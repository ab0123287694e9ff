"""When sharing stops, for how long, and for whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.decision import restraint
from sidecar.decision.restraint import Restraint
from support.questions import asking


def test_patience_is_some_times_what_a_query_usually_takes() -> None:
    kept = Restraint()
    for _ in range(200):
        kept.took(0.01)
    assert kept.patience(1.0) == pytest.approx(restraint.PATIENCE * 0.01, rel=0.01)
    for _ in range(200):
        kept.took(0.0001)
    assert kept.patience(1.0) == restraint.MIN_PATIENCE


@given(st.lists(st.floats(0, 1000), max_size=100), st.floats(0.001, 3600))
def test_patience_leaves_time_to_be_asked_alone(took: list[float], timeout: float) -> None:
    """It may have to wait twice: for its turn, and for the answer."""
    kept = Restraint()
    for seconds in took:
        kept.took(seconds)
    assert 0 < 2 * kept.patience(timeout) <= 0.6 * timeout


def test_a_query_is_overdue_by_what_one_usually_takes() -> None:
    kept = Restraint()
    for _ in range(200):
        kept.took(0.01)
    assert [kept.overdue(seconds) for seconds in (0.01, 0.035, 0.045)] == [False, False, True]


def test_a_machine_that_becomes_slow_is_given_more_time_soon() -> None:
    kept = Restraint()
    for _ in range(100):
        kept.took(0.001)
    given_up = 0
    while (patience := kept.patience(10.0)) < 1.0:
        kept.took(patience)
        given_up += 1
    assert given_up <= 6


def test_pauses_grow_where_it_goes_wrong_again_soon() -> None:
    kept = Restraint()
    now, lengths = 100.0, []
    for _ in range(9):
        assert kept.pause(now)
        assert not kept.pause(now + 0.01)
        lengths.append(kept.resume_at - now)
        now = kept.resume_at + 0.5
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now = kept.resume_at + 61
    assert kept.pause(now)
    assert kept.resume_at - now == 1


def test_a_policy_is_slow_if_it_never_is_fast() -> None:
    kept = Restraint()
    assert [kept.pays(0.01) for _ in range(restraint.WINDOW)] == [True] * (restraint.WINDOW - 1) + [False]
    assert all(kept.pays(0.0005 if number == 3 else 0.5) for number in range(restraint.WINDOW))
    assert [kept.pays(0.01) for _ in range(restraint.WINDOW)][-1] is False


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ({"direction": "inbound", "caller": "a"}, {"direction": "inbound", "caller": "a", "path": "/x", "host": "x"}, True),
        ({"direction": "inbound", "caller": "a"}, {"direction": "inbound", "caller": "b"}, False),
        ({"direction": "inbound", "caller": None}, {"direction": "inbound", "caller": None, "path": "/x"}, True),
        ({"direction": "inbound", "caller": "a"}, {"direction": "fleet", "caller": "a"}, False),
        ({"direction": "egress", "host": "a"}, {"direction": "egress", "host": "a", "path": "/x"}, True),
        ({"direction": "outbound", "host": "a"}, {"direction": "outbound", "host": "b"}, False),
    ],
)  # fmt: skip
def test_it_is_not_the_path_by_which_one_is_known(one: dict[str, Any], other: dict[str, Any], together: bool) -> None:
    kept = Restraint()
    kept.keep_out(replace(asking(), **one), 5.0)
    assert kept.forbids(replace(asking(), **other), 6.0) is together


def test_keeping_out_has_an_end() -> None:
    kept = Restraint()
    kept.keep_out(asking(), 5.0)
    assert kept.forbids(asking(), 5.0 + restraint.KEPT_OUT - 0.1)
    assert not kept.forbids(asking(), 5.0 + restraint.KEPT_OUT)
    assert not kept.forbids(asking(), 5.0)
    kept.keep_out(asking(), 5.0)
    kept.keep_out(asking(), 50.0)
    assert kept.forbids(asking(), 50.0 + restraint.KEPT_OUT - 0.1)


def test_who_never_comes_back_is_forgotten_too() -> None:
    kept = Restraint()
    kept.keep_out(asking(caller="a"), 5.0)
    kept.keep_out(asking(caller="b"), 10.0)
    kept.keep_out(asking(caller="a"), 20.0)
    end = restraint.KEPT_OUT
    assert [kept.forbids(asking(caller=one), end + 15.0) for one in "abc"] == [True, False, False]
    assert kept.any
    assert not kept.forbids(asking(caller="c"), end + 20.0)
    assert not kept.any


def test_only_so_many_are_remembered_and_the_oldest_is_forgotten() -> None:
    kept = Restraint()
    for number in range(restraint.MAX_KEPT_OUT + 10):
        kept.keep_out(asking(caller=str(number)), 0.0)
    assert [kept.forbids(asking(caller=str(number)), 1.0) for number in (0, 9, 10)] == [False, False, True]
    assert len(kept._kept_out) == restraint.MAX_KEPT_OUT
