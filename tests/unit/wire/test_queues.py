"""Several sockets of one address: who looks at which, and that nobody who waits is lost. Over real loopback sockets."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from sidecar.model import Address
from sidecar.wire.listening import TcpListener, bound
from sidecar.wire.queues import Queues, joined, shared_out

HERE = Address(host="127.0.0.1", port=0)


async def queues(number: int) -> Queues:
    found = shared_out(await bound(HERE), number)
    assert isinstance(found, Queues)
    found.begin()
    return found


def call(at: Address, times: int) -> list[socket.socket]:
    return [socket.create_connection((at.host, at.port), timeout=5) for _ in range(times)]


def waiting(listener: TcpListener) -> int:
    """How many it has to give."""
    found = 0
    while (taken := listener.take()) is not None:
        taken[0].close()
        found += 1
    return found


async def test_one_address_is_shared_out_and_each_queue_gets_its_part():
    whole = await queues(3)
    callers = call(whole.address, 90)
    parts = [waiting(one) for one in whole.queues]
    assert sum(parts) == 90
    assert min(parts) > 5
    for one in callers:
        one.close()
    whole.close()


async def test_until_it_begins_only_the_first_one_listens():
    whole = shared_out(await bound(HERE), 3)
    callers = call(whole.address, 20)
    assert waiting(whole.queues[0]) == 20
    for one in callers:
        one.close()
    whole.close()


async def test_fewer_than_there_are_and_what_somebody_else_holds_stay_as_they_are():
    first = await bound(HERE)
    assert shared_out(first, 1) is first
    whole = shared_out(first, 3)
    assert shared_out(whole, 2) is whole
    assert joined([first]) is first
    whole.close()


async def test_an_address_that_cannot_be_shared_has_one_queue(monkeypatch):
    first = await bound(HERE)

    def refuse(_self: TcpListener) -> None:
        raise PermissionError(1, "no")

    monkeypatch.setattr(TcpListener, "share", refuse)
    assert shared_out(first, 3) is first
    first.close()


async def test_whoever_looks_takes_from_all_that_he_looks_at_and_from_no_other():
    whole = await queues(2)
    callers = call(whole.address, 40)
    mine = Queues(whole.queues, [0])
    taken = 0
    with trio.move_on_after(0.2):
        while True:
            sock, _ = await mine.accept()
            sock.close()
            taken += 1
    left = waiting(whole.queues[1])
    assert taken + left == 40
    assert left > 0
    for one in callers:
        one.close()
    whole.close()


async def test_what_is_looked_at_anew_is_taken_at_once():
    """Also by one that waits already."""
    whole = await queues(2)
    mine = Queues(whole.queues, [])
    got: list[socket.socket] = []

    async def take() -> None:
        while True:
            got.append((await mine.accept())[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        callers = call(whole.address, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        mine.look_at([0, 1])
        with trio.fail_after(5):
            while len(got) < 10:
                await trio.sleep(0.01)
        mine.look_at([])
        late = call(whole.address, 3)
        await trio.sleep(0.05)
        assert len(got) == 10
        nursery.cancel_scope.cancel()
    for one in (*got, *callers, *late):
        one.close()
    whole.close()


async def test_finishing_hands_out_what_waits_and_lets_go_of_the_rest():
    whole = await queues(2)
    copies = [TcpListener(socket.socket(fileno=socket.dup(one.fileno()))) for one in whole.queues]
    callers = call(whole.address, 30)
    mine = Queues(whole.queues, [0])
    mine.finish()
    taken = 0
    with pytest.raises(trio.ClosedResourceError):
        while True:
            (await mine.accept())[0].close()
            taken += 1
    assert whole.queues[0].fileno() == whole.queues[1].fileno() == -1
    assert waiting(copies[1]) == 30 - taken, "the other queue is whole, in the hands of somebody else"
    for one in (*callers, *copies):
        one.close()


async def test_a_full_queue_keeps_no_other_waiting(monkeypatch):
    whole = await queues(2)
    callers = call(whole.address, 60)
    given: list[TcpListener] = []
    for one in whole.queues:

        def take(one: TcpListener = one) -> object:
            given.append(one)
            return TcpListener.take(one)

        monkeypatch.setattr(one, "take", take)
    first = [(await whole.accept())[0] for _ in range(6)]
    assert given == [*whole.queues] * 3, "in turn"
    for one in (*callers, *first):
        one.close()
    whole.close()


async def test_who_is_told_to_look_elsewhere_while_he_finishes_empties_what_he_has():
    whole = await queues(2)
    callers = call(whole.address, 30)
    mine = Queues(whole.queues, [0])
    mine.finish()
    mine.look_at([1])
    taken = 0
    with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
        while True:
            (await mine.accept())[0].close()
            taken += 1
    assert taken > 5
    for one in callers:
        one.close()


@pytest.mark.parametrize("host", ["::", "::1"])
async def test_each_queue_of_an_address_takes_callers_of_the_same_kind(host):
    """One that is of both families beside one that is not would be another address, and is refused or answers others."""
    first = await bound(Address(host=host, port=0))
    whole = shared_out(first, 3)
    assert [one.only_v6 for one in whole.queues] == [first.only_v6] * 3 == [int(host != "::")] * 3
    whole.close()


async def test_a_close_wakes_whoever_waits():
    whole = await queues(2)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await whole.accept()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        whole.close()
