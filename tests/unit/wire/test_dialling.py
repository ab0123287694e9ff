"""From a name to a socket: how often the resolver is asked, what does when it fails, and who wins a race."""

from __future__ import annotations

import errno
import random
import socket
from functools import partial

import pytest
import trio

from sidecar.model import Address
from sidecar.wire.dialling import Resolver, is_literal, race

NAME = Address(host="target.test", port=443)
ONE, TWO = Address(host="10.0.0.1", port=443), Address(host="10.0.0.2", port=443)
NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
TRY_AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
UNREACHABLE = OSError(errno.EHOSTUNREACH, "unreachable")


class Names:
    """A network whose resolver says `answer`, after `seconds`."""

    def __init__(self, *answer: Address) -> None:
        self.answer: list[Address] | OSError = list(answer)
        self.seconds = 0.0
        self.asked = 0

    async def resolve(self, name: Address) -> list[Address]:
        self.asked += 1
        await trio.sleep(self.seconds)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_burst_asks_once_and_everybody_gets_the_answer(autojump_clock):
    names = Names(ONE, TWO)
    names.seconds = 1
    resolver = Resolver(names)
    got = []

    async def ask() -> None:
        got.append(await resolver.resolve(NAME))

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
    assert got == [(ONE, TWO)] * 100
    assert names.asked == 1
    assert await resolver.resolve(NAME) == (ONE, TWO)
    assert names.asked == 1


async def test_an_answer_does_for_a_few_seconds_and_then_what_is_new_is_seen(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    names.answer = [TWO]
    await trio.sleep(4)
    assert await resolver.resolve(NAME) == (ONE,)
    await trio.sleep(2)
    assert await resolver.resolve(NAME) == (TWO,)


async def test_whoever_must_know_asks_anew(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    names.answer = [TWO]
    names.seconds = 0.5
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(partial(resolver.resolve, NAME, anew=True))
    assert await resolver.resolve(NAME) == (TWO,)
    assert names.asked == 2


async def test_ports_are_part_of_a_name(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    await resolver.resolve(Address(host=NAME.host, port=80))
    assert names.asked == 2


async def test_while_the_resolver_fails_the_last_good_answer_does_for_some_minutes(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    names.answer = TRY_AGAIN
    for _ in range(28):
        await trio.sleep(10)
        assert await resolver.resolve(NAME) == (ONE,)
    asked = names.asked
    assert await resolver.resolve(NAME) == (ONE,)
    assert names.asked == asked, "a resolver that fails is not asked for each connection"
    await trio.sleep(30)
    with pytest.raises(socket.gaierror):
        await resolver.resolve(NAME)
    names.answer = [TWO]
    assert await resolver.resolve(NAME) == (TWO,)


async def test_a_resolver_that_hangs_costs_a_second_where_there_is_a_good_answer(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    names.seconds = 1000
    await trio.sleep(10)
    began = trio.current_time()
    for _ in range(5):
        assert await resolver.resolve(NAME) == (ONE,)
    assert trio.current_time() - began == pytest.approx(1)


@pytest.mark.parametrize("answer", [NO_SUCH_NAME, []], ids=["no such name", "no address"])
async def test_that_there_is_no_such_name_is_an_answer_too(autojump_clock, answer):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    names.answer = answer
    await trio.sleep(10)
    with pytest.raises(socket.gaierror):
        await resolver.resolve(NAME)
    names.answer = TRY_AGAIN
    with pytest.raises(socket.gaierror):
        await resolver.resolve(NAME)


async def test_what_fails_for_one_fails_for_all_who_waited_with_an_exception_for_each(autojump_clock):
    names = Names()
    names.answer, names.seconds = TRY_AGAIN, 1
    resolver = Resolver(names)
    failures: list[OSError] = []

    async def ask() -> None:
        try:
            await resolver.resolve(NAME)
        except OSError as failure:
            failures.append(failure)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert {(type(one), one.errno) for one in failures} == {(socket.gaierror, socket.EAI_AGAIN)}
    assert len({id(one) for one in failures}) == 5
    assert names.asked == 1


async def test_whoever_asks_may_leave_and_another_asks(autojump_clock):
    names = Names(ONE)
    names.seconds = 2
    resolver = Resolver(names)
    got = []

    async def impatient() -> None:
        with trio.move_on_after(1):
            await resolver.resolve(NAME)

    async def ask() -> None:
        got.append(await resolver.resolve(NAME))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        await trio.sleep(0.1)
        for _ in range(5):
            nursery.start_soon(ask)
    assert got == [(ONE,)] * 5
    assert names.asked == 2


async def test_an_address_by_ip_is_its_own_answer(autojump_clock):
    names = Names(TWO)
    resolver = Resolver(names)
    for host in ("10.0.0.1", "::1", "fe80::1%lo"):
        assert await resolver.resolve(Address(host=host, port=1)) == (Address(host=host, port=1),)
    assert names.asked == 0
    assert not is_literal("10.0.0.test")
    assert not is_literal("localhost")


async def test_names_that_nobody_uses_are_forgotten(autojump_clock):
    names = Names(ONE)
    resolver = Resolver(names)
    await resolver.resolve(NAME)
    resolver.forget({NAME})
    await resolver.resolve(NAME)
    assert names.asked == 1
    resolver.forget(set())
    await resolver.resolve(NAME)
    assert names.asked == 2


# ── races ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Course:
    """Places that connect or fail after some seconds. What they handed out can be seen."""

    def __init__(self, **places: tuple[float, OSError | None]) -> None:
        self.places = places
        self.begun: dict[str, float] = {}
        self.socks: dict[str, socket.socket] = {}

    async def connect(self, place: str) -> socket.socket:
        self.begun[place] = trio.current_time()
        seconds, failure = self.places[place]
        await trio.sleep(seconds)
        if failure is not None:
            raise failure
        sock = self.socks[place] = socket.socket()
        return sock

    async def run(self) -> tuple[str, socket.socket]:
        return await race(self.connect, list(self.places))

    @property
    def open(self) -> list[str]:
        return [place for place, sock in self.socks.items() if sock.fileno() >= 0]


async def test_the_next_place_is_begun_after_the_stagger_and_the_first_to_connect_wins(autojump_clock):
    course = Course(a=(10, None), b=(1, None), c=(0.1, None), d=(0, None))
    began = trio.current_time()
    place, sock = await course.run()
    assert place == "c"
    assert [at - began for at in course.begun.values()] == pytest.approx([0, 0.25, 0.5])
    assert trio.current_time() - began == pytest.approx(0.6)
    assert course.open == ["c"]
    sock.close()


async def test_a_place_that_fails_is_not_waited_for(autojump_clock):
    course = Course(a=(0.1, REFUSED), b=(0, UNREACHABLE), c=(0, None))
    began = trio.current_time()
    place, sock = await course.run()
    assert place == "c"
    assert trio.current_time() - began == pytest.approx(0.1)
    sock.close()


async def test_a_failure_after_the_next_was_begun_hurries_nobody(autojump_clock):
    course = Course(a=(0.3, REFUSED), b=(1, None), c=(0, None))
    began = trio.current_time()
    place, sock = await course.run()
    assert place == "c"
    assert trio.current_time() - began == pytest.approx(0.5)
    sock.close()


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([REFUSED, REFUSED, REFUSED], REFUSED),
        ([REFUSED, UNREACHABLE, REFUSED], UNREACHABLE),
        ([UNREACHABLE, REFUSED, REFUSED], UNREACHABLE),
        ([REFUSED, REFUSED, UNREACHABLE], UNREACHABLE),
        ([REFUSED], REFUSED),
    ],
)
async def test_all_have_to_refuse_for_it_to_be_refused(autojump_clock, failures, told):
    """A closed port is what permissive mode may step down from; one address that is merely unreachable is not."""
    course = Course(**{f"p{number}": (0, failure) for number, failure in enumerate(failures)})
    with pytest.raises(OSError, match=told.strerror) as raised:
        await course.run()
    assert raised.value is told


async def test_one_place_is_not_raced(autojump_clock):
    course = Course(a=(5, None))
    began = trio.current_time()
    place, sock = await course.run()
    assert (place, trio.current_time() - began) == ("a", 5)
    sock.close()


class Gate:
    """Places that all connect when they are let."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.socks: list[socket.socket] = []

    async def connect(self, _place: str) -> socket.socket:
        await self.opened.wait()
        self.socks.append(socket.socket())
        return self.socks[-1]


async def test_of_several_that_connect_at_the_same_moment_one_stays_open(autojump_clock):
    gate = Gate()
    async with trio.open_nursery() as nursery:

        async def let() -> None:
            await trio.sleep(1)
            gate.opened.set()

        nursery.start_soon(let)
        _, won = await race(gate.connect, ["a", "b", "c"])
    assert len(gate.socks) == 3
    assert [sock for sock in gate.socks if sock.fileno() >= 0] == [won]
    won.close()


@pytest.mark.parametrize("seed", range(5))
async def test_a_defect_beside_a_winner_leaves_it_not_open(autojump_clock, seed):
    gate = Gate()

    async def connect(place: str) -> socket.socket:
        sock = await gate.connect(place)
        if place == "abc"[seed % 3]:
            sock.close()
            raise ZeroDivisionError
        return sock

    async with trio.open_nursery() as nursery:

        async def let() -> None:
            await trio.sleep(1)
            gate.opened.set()

        nursery.start_soon(let)
        with pytest.raises(ExceptionGroup):
            await race(connect, ["a", "b", "c"])
    assert [sock.fileno() for sock in gate.socks] == [-1] * 3


async def test_whatever_the_times_and_whenever_it_is_given_up_nothing_is_left_open(autojump_clock):
    chance = random.Random(4)
    outcomes: set[str] = set()

    def ticks() -> float:
        return chance.randrange(8) / 8  # so that much happens at one moment

    for _ in range(300):
        course = Course(
            **{
                f"p{number}": (ticks(), chance.choice([None, None, REFUSED, UNREACHABLE]))
                for number in range(chance.randint(1, 5))
            }
        )
        won = None
        with trio.move_on_after(ticks() * 2):
            try:
                won = await course.run()
            except OSError:
                outcomes.add("failed")
        assert course.open == ([] if won is None else [won[0]])
        if won is not None:
            won[1].close()
        outcomes.add("given up" if won is None else "won")
    assert outcomes == {"failed", "given up", "won"}
