"""When a quiet peer is asked, and when it is taken for dead."""

from __future__ import annotations

import pytest

from sidecar.wire.h2_liveness import Finding, Liveness


def found(liveness: Liveness, until: int, heard: tuple[int, ...] = (), since: int = 0) -> dict[int, Finding]:
    """What a look at each second says, where it is not that all is well. Something is heard before the seconds of `heard`."""
    said = {}
    for now in range(since, until):
        liveness.heard = now in heard
        finding = liveness.look(float(now))
        if finding is not Finding.ALIVE:
            said[now] = finding
    return said


def test_silence_is_asked_about_and_then_is_death_once():
    assert found(Liveness(60.0, 0.0), 200) == {60: Finding.ASK, 80: Finding.DEAD}


@pytest.mark.parametrize(("timeout", "patience"), [(60.0, 20), (9.0, 5), (300.0, 100)])
def test_answer_may_take_a_third_of_the_time_and_five_seconds_at_least(timeout, patience):
    asked, dead = found(Liveness(timeout, 0.0), 1000)
    assert dead - asked == patience


def test_whatever_comes_is_a_sign_of_life():
    assert found(Liveness(10.0, 0.0), 25, heard=(9, 18)) == {}
    assert found(Liveness(10.0, 0.0), 25, heard=(12,)) == {10: Finding.ASK, 22: Finding.ASK}


def test_peer_that_only_ever_answers_is_asked_less_often_where_that_is_wanted():
    liveness = Liveness(60.0, 0.0, slower=5)
    heard = (61, 362, 663, 700)
    assert list(found(liveness, 770, heard=heard)) == [60, 361, 662, 760], (
        "300 s apart, and then it had something to say"
    )
