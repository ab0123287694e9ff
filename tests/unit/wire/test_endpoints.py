"""Which address of a target is tried first, and which has failed too often."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sidecar.model import Address
from sidecar.wire.endpoints import Endpoint, Endpoints

TARGET = Address(host="target.test", port=443)


def v4(*numbers: int) -> list[Address]:
    return [Address(host=f"10.0.0.{number}", port=443) for number in numbers]


def v6(*numbers: int) -> list[Address]:
    return [Address(host=f"2001:db8::{number}", port=443) for number in numbers]


def known(addresses: list[Address], *, turn: int = 0) -> Endpoints:
    made = Endpoints(TARGET, turn=turn)
    made.update(addresses)
    return made


def order(endpoints: Endpoints) -> list[Address]:
    return [one.address for one in endpoints.in_order()]


def fail(endpoints: Endpoints, address: Address, now: float = 0.0, *, times: int = 1) -> list[float]:
    (one,) = (one for one in endpoints.in_order() if one.address == address)
    return [endpoints.failed(one, now, max_failures=3, ejection=30.0) for _ in range(times)]


# ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_families_take_turns_and_the_one_that_the_resolver_prefers_goes_first():
    assert order(known([*v6(1, 2, 3), *v4(1, 2)])) == [*v6(1), *v4(1), *v6(2), *v4(2), *v6(3)]
    assert order(known([*v4(1), *v6(1, 2)])) == [*v4(1), *v6(1), *v6(2)]


def test_each_connection_begins_with_the_next_address_of_the_preferred_family():
    endpoints = known([*v6(1, 2, 3), *v4(1)])
    first = Counter(order(endpoints)[0] for _ in range(30))
    assert first == dict.fromkeys(v6(1, 2, 3), 10)


def test_sidecars_that_start_together_need_not_begin_alike():
    assert [order(known(v4(1, 2, 3), turn=turn))[0] for turn in (0, 1, 2, 3)] == v4(1, 2, 3, 1)


def test_a_new_answer_keeps_what_is_known_of_an_address_and_forgets_those_that_are_gone():
    endpoints = known(v4(1, 2))
    fail(endpoints, v4(1)[0], times=2)
    endpoints.update(v4(1, 3))
    assert set(order(endpoints)) == set(v4(1, 3))
    assert fail(endpoints, v4(1)[0]) == [30.0]
    endpoints.update(v4(3))
    endpoints.update(v4(1, 3))
    assert fail(endpoints, v4(1)[0]) == [0.0], "it comes back without a past"
    assert endpoints.holds(v4(3)[0])
    assert not endpoints.holds(v4(2)[0])


# ── ejection ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_failures_in_a_row_eject_and_an_ejected_address_is_tried_last():
    endpoints = known(v4(1, 2, 3))
    assert fail(endpoints, v4(2)[0], times=3) == [0.0, 0.0, 30.0]
    for _ in range(6):
        assert order(endpoints)[-1] == v4(2)[0]
    assert Counter(order(endpoints)[0] for _ in range(10)) == dict.fromkeys(v4(1, 3), 5), "the others share its part"


def test_an_answer_ends_a_row_of_failures():
    endpoints = known(v4(1, 2))
    fail(endpoints, v4(1)[0], times=2)
    (one,) = (one for one in endpoints.in_order() if one.address == v4(1)[0])
    one.failures = 0
    assert fail(endpoints, v4(1)[0], times=3) == [0.0, 0.0, 30.0]


def test_who_comes_back_and_fails_at_once_goes_again_and_for_longer():
    endpoints = known(v4(1, 2))
    bad, now, seconds = v4(1)[0], 0.0, []
    fail(endpoints, bad, now, times=2)
    for _ in range(12):
        seconds += fail(endpoints, bad, now)
        assert endpoints.returned(now + seconds[-1] - 0.1) == []
        now += seconds[-1]
        assert [one.address for one in endpoints.returned(now)] == [bad]
        assert endpoints.returned(now) == []
    assert seconds == [30.0 * min(number, 10) for number in range(1, 13)]


def test_good_standing_makes_up_for_earlier_ejections():
    endpoints = known(v4(1, 2))
    bad, now = v4(1)[0], 0.0
    fail(endpoints, bad, now, times=2)
    for number in (1, 2, 3):
        assert fail(endpoints, bad, now) == [30.0 * number]
        now += 30.0 * number
        endpoints.returned(now)
    assert fail(endpoints, bad, now + 65.0) == [60.0], "65 s forgive two of three"
    now += 125.0
    endpoints.returned(now)
    assert fail(endpoints, bad, now + 10_000.0) == [30.0]


def test_failures_while_ejected_make_no_difference():
    endpoints = known(v4(1, 2))
    fail(endpoints, v4(1)[0], times=3)
    assert fail(endpoints, v4(1)[0], 10.0, times=10) == [0.0] * 10
    assert len(endpoints.returned(30.0)) == 1


def test_the_only_address_is_never_ejected_and_of_two_only_one():
    endpoints = known(v4(1))
    assert fail(endpoints, v4(1)[0], times=20) == [0.0] * 20
    endpoints = known(v4(1, 2))
    fail(endpoints, v4(1)[0], times=3)
    assert fail(endpoints, v4(2)[0], times=20) == [0.0] * 20
    endpoints.returned(30.0)
    assert fail(endpoints, v4(2)[0], 31.0) == [30.0], "as soon as the other is back"


def test_an_address_that_is_gone_is_not_ejected():
    endpoints = known(v4(1, 2))
    gone = Endpoint(v4(9)[0])
    assert [endpoints.failed(gone, 0.0, max_failures=1, ejection=30.0) for _ in range(3)] == [0.0] * 3


steps = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from(["fail", "answer", "pass"]), st.floats(0, 50)), max_size=80
)


@given(st.lists(st.booleans(), min_size=1, max_size=8), steps)
def test_whatever_happens_all_are_tried_and_no_more_than_half_are_ejected(families, happenings):
    addresses = [(v6 if six else v4)(number)[0] for number, six in enumerate(families)]
    endpoints, now = known(addresses), 0.0
    for number, what, seconds in happenings:
        now += seconds
        one = next(one for one in endpoints.in_order() if one.address == addresses[number % len(addresses)])
        if what == "fail":
            ejected = endpoints.failed(one, now, max_failures=2, ejection=30.0)
            assert 0 <= ejected <= 300
        elif what == "answer":
            one.failures = 0
        endpoints.returned(now)
        tried = endpoints.in_order()
        out = [one.ejected_until is not None for one in tried]
        assert sorted(map(str, addresses)) == sorted(str(one.address) for one in tried)
        assert out == sorted(out), "the ejected ones last"
        assert 2 * sum(out) <= len(out)
        assert all(one.ejected_until is None or now < one.ejected_until <= now + 300 for one in tried)
