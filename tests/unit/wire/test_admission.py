"""Who makes way for whom, and that nothing stays counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model import Anonymous, SpiffeId, Workload
from sidecar.wire.admission import Admission, Guest
from sidecar.wire.settling import Refused

NOBODY = Anonymous(reason="plaintext")


class Scope:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def workload(name: str) -> Workload:
    return Workload(id=SpiffeId(trust_domain="a.test", path=f"/{name}"), not_after=2e9)


def silent() -> Guest:
    guest = Guest()
    guest.settling = Scope()
    return guest


def settled(guest: Guest, *, idle: bool) -> Guest:
    guest.settling = None
    guest.served = SimpleNamespace(idle=Scope() if idle else None, evicted=False)
    return guest


def made_way(guest: Guest) -> bool:
    return guest.evicted or (guest.served is not None and guest.served.evicted)


def enter(admission: Admission, guest: Guest, host: str = "h", *, total: int = 100, each: int | None = 100) -> Guest:
    admission.enter(guest, host, max_connections=total, max_connections_per_peer=each)
    return guest


def test_the_eldest_that_is_silent_goes_before_the_eldest_that_is_idle():
    admission = Admission()
    idle = settled(enter(admission, silent()), idle=True)
    quiet = [enter(admission, silent()) for _ in range(2)]
    enter(admission, silent(), total=3)
    assert [made_way(one) for one in (idle, *quiet)] == [False, True, False]
    assert quiet[0].settling.cancelled
    enter(admission, silent(), total=3)
    assert [made_way(one) for one in (idle, *quiet)] == [False, True, True]


def test_nobody_makes_way_twice():
    admission = Admission()
    idle = settled(enter(admission, silent()), idle=True)
    enter(admission, settled(silent(), idle=False), total=1)
    assert idle.served.idle.cancelled
    with pytest.raises(Refused, match="connections_exhausted"):
        enter(admission, settled(silent(), idle=False), total=1)


def test_where_all_are_busy_the_newcomer_is_refused_and_counted_until_it_leaves():
    admission = Admission()
    settled(enter(admission, silent()), idle=False)
    late = silent()
    with pytest.raises(Refused) as refused:
        enter(admission, late, total=1)
    assert (refused.value.outcome, refused.value.reason) == ("overloaded", "connections_exhausted")
    assert len(admission) == 2
    admission.leave(late)
    assert len(admission) == 1


def test_only_ones_own_make_way_at_ones_own_limit():
    admission = Admission()
    other = settled(enter(admission, silent()), idle=True)
    admission.settled(other, workload("other"), "h", max_connections_per_peer=1)
    mine = settled(enter(admission, silent()), idle=True)
    admission.settled(mine, workload("mine"), "h", max_connections_per_peer=1)
    again = settled(enter(admission, silent()), idle=False)
    admission.settled(again, workload("mine"), "h", max_connections_per_peer=1)
    assert (made_way(other), made_way(mine)) == (False, True)
    admission.leave(mine)
    third = settled(enter(admission, silent()), idle=False)
    with pytest.raises(Refused, match="peer_connections_exceeded"):
        admission.settled(third, workload("mine"), "h", max_connections_per_peer=1)


def test_where_peers_are_not_told_apart_only_the_whole_is_counted():
    admission = Admission()
    for _ in range(5):
        guest = settled(enter(admission, silent(), each=None), idle=False)
        admission.settled(guest, NOBODY, "h", max_connections_per_peer=None)
    assert len(admission) == 5


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "settle", "leave"]), st.integers(0, 9), st.integers(0, 2)), max_size=80
    )
)
def test_what_has_left_is_counted_nowhere(steps):
    admission = Admission()
    guests: dict[int, Guest] = {}
    for step, number, which in steps:
        guest = guests.get(number)
        if step == "enter" and guest is None:
            guests[number] = guest = silent()
            try:
                enter(admission, guest, f"h{which}", total=6, each=3)
            except Refused:
                admission.leave(guests.pop(number))
        elif step == "settle" and guest is not None and guest.settling is not None:
            try:
                admission.settled(guest, workload(str(which)) if which else NOBODY, "h", max_connections_per_peer=3)
            except Refused:
                admission.leave(guests.pop(number))
            settled(guest, idle=which == 1)
        elif step == "leave" and guest is not None:
            admission.leave(guests.pop(number))
        assert len(admission) == len(guests)
    for guest in guests.values():
        admission.leave(guest)
    assert len(admission) == 0
    assert admission._of_peer == {}
