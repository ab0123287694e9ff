"""Turns: one step at a time where many come together, hosts in rotation, nobody waiting for himself."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from sidecar.wire.turns import ALONE, Turns


class Loop:
    """Counts passes of the event loop, as a task that is always ready sees them."""

    def __init__(self) -> None:
        self.passes = 0

    async def run(self) -> None:
        while True:
            self.passes += 1
            await trio.lowlevel.checkpoint()


class Clock:
    """Stands still, but for what a step takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(clock: Clock) -> AsyncIterator[tuple[Turns, Loop, trio.Nursery]]:
    turns, loop = Turns(clock=clock), Loop()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        nursery.start_soon(loop.run)
        await trio.lowlevel.checkpoint()
        yield turns, loop, nursery
        nursery.cancel_scope.cancel()


class Steps:
    """Who had a step, and in which pass of the loop."""

    def __init__(self, turns: Turns, loop: Loop, clock: Clock) -> None:
        self.done: list[tuple[str, int]] = []
        self._turns, self._loop, self._clock = turns, loop, clock

    async def take(self, host: str, times: int = 1) -> None:
        for _ in range(times):
            turn = self._turns.of(host)
            await turn.wait()
            self._clock.now += ALONE / 2
            self.done.append((host, self._loop.passes))
            turn.over()

    async def until(self, count: int) -> None:
        with trio.fail_after(5):
            while len(self.done) < count:
                await trio.lowlevel.checkpoint()

    @property
    def hosts(self) -> str:
        return "".join(host for host, _ in self.done)


async def test_a_storm_has_one_step_in_a_pass_of_the_loop() -> None:
    clock = Clock()
    async with running(clock) as (turns, loop, nursery):
        steps = Steps(turns, loop, clock)
        for _ in range(200):
            nursery.start_soon(steps.take, "a")
        await steps.until(200)
        passes = [at for _, at in steps.done]
        assert passes[-1] - passes[0] >= 198
        assert max(Counter(passes).values()) <= 2  # trio may let us count before a step or behind it


async def test_whoever_comes_alone_does_not_wait() -> None:
    clock = Clock()
    async with running(clock) as (turns, loop, _):
        steps = Steps(turns, loop, clock)
        for _ in range(10):
            before = loop.passes
            await steps.take("a")
            assert loop.passes == before
            clock.now += 2 * ALONE


async def test_a_step_that_takes_long_is_still_followed_by_a_pass() -> None:
    clock = Clock()
    async with running(clock) as (turns, loop, _):
        turn, before = turns.of("a"), loop.passes
        for _ in range(11):
            await turn.wait()
            clock.now += 100 * ALONE
            turn.over()
        assert loop.passes >= before + 9  # who else is ready may come before or after us in a pass


async def test_hosts_take_turns_however_many_one_of_them_opens() -> None:
    clock = Clock()
    async with running(clock) as (turns, loop, nursery):
        steps = Steps(turns, loop, clock)
        for _ in range(100):
            nursery.start_soon(steps.take, "m")
        await steps.until(5)
        nursery.start_soon(steps.take, "x")
        nursery.start_soon(steps.take, "y")
        await steps.until(15)
        late = steps.hosts.index("x"), steps.hosts.index("y")
        await steps.until(102)
        assert max(late) <= 10
        assert steps.hosts.count("m") == 100


async def test_within_a_host_the_first_comes_first() -> None:
    clock = Clock()
    async with running(clock) as (turns, _loop, nursery):
        order: list[int] = []

        async def take(number: int) -> None:
            await turns.of("a").wait()
            order.append(number)
            turns.over()

        turns.over()
        for number in range(20):
            nursery.start_soon(take, number)
            await trio.lowlevel.checkpoint()
        with trio.fail_after(5):
            while len(order) < 20:
                await trio.lowlevel.checkpoint()
        assert order == list(range(20))


@pytest.mark.parametrize("leaving", [1, 3, 7])
async def test_whoever_leaves_the_line_takes_nobodys_turn(leaving: int) -> None:
    clock = Clock()
    turns = Turns(clock=clock)
    done: list[int] = []

    async def take(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await turns.of(f"host-{number % 3}").wait()
            done.append(number)
            turns.over()

    async with trio.open_nursery() as nursery:
        turns.over()
        scopes = [trio.CancelScope() for _ in range(12)]
        for number, scope in enumerate(scopes):
            nursery.start_soon(take, number, scope)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        for scope in scopes[::leaving]:
            scope.cancel()
        nursery.start_soon(turns.run)
        stayed = [number for number in range(12) if number % leaving]
        with trio.fail_after(5):
            while len(done) < len(stayed):
                await trio.lowlevel.checkpoint()
        assert sorted(done) == stayed
        assert not turns._line
        nursery.cancel_scope.cancel()


async def test_one_who_is_cancelled_has_no_turn() -> None:
    turns = Turns(clock=Clock())
    with trio.CancelScope() as scope:
        scope.cancel()
        await turns.of("a").wait()
    assert scope.cancelled_caught


async def test_after_a_storm_the_next_is_alone_again() -> None:
    clock = Clock()
    async with running(clock) as (turns, loop, nursery):
        steps = Steps(turns, loop, clock)
        for storm in (1, 2):
            for _ in range(10):
                nursery.start_soon(steps.take, "a")
            await steps.until(10 * storm + storm - 1)
            clock.now += 2 * ALONE
            before = loop.passes
            await steps.take("b")
            assert loop.passes == before
            clock.now += 2 * ALONE
