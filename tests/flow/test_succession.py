"""A successor beside the one that runs: when each accepts, says that it is ready, and ends.

The handover itself is tested over real sockets (`wire.handover`); here both are apps of one process, and its line a plain object.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from sidecar.app import App
from sidecar.errors import OperatorFault
from sidecar.log import Log
from sidecar.model import Address
from sidecar.wire.network import Stream
from support.flow import HEALTH, INBOUND, OUTBOUND, Lines, World, ask, get, serve_target, status, world


class Line:
    """Between one predecessor and one successor."""

    def __init__(self) -> None:
        self.listeners: dict[Address, Any] = {}
        self.ready = trio.Event()

    def predecessor(self, _tell: object) -> Predecessor:
        return Predecessor(self)

    def successor(self, _tell: object) -> Successor:
        return Successor(self)


class Predecessor:
    def __init__(self, line: Line) -> None:
        self._line = line

    async def inherit(self, _wanted: Collection[Address]) -> dict[Address, Any]:
        return {}

    async def take_over(self) -> None: ...

    async def wait_succeeded(self, listeners: dict[Address, Any]) -> None:
        self._line.listeners = listeners
        await self._line.ready.wait()

    def close(self) -> None: ...


class Successor(Predecessor):
    async def inherit(self, wanted: Collection[Address]) -> dict[Address, Any]:
        return {at: self._line.listeners[at].share() for at in wanted if at in self._line.listeners}

    async def take_over(self) -> None:
        self._line.ready.set()

    async def wait_succeeded(self, _listeners: dict[Address, Any]) -> None:
        await trio.sleep_forever()


class Second:
    """The successor's app, in the world of the first."""

    def __init__(self, it: World, line: Line) -> None:
        self.log = Lines()
        self.access = Lines()
        self.app = App(
            it.load(), load=it.load, network=it.network, log=Log(self.log), access=self.access,  # type: ignore[arg-type]
            succession=line.successor,
        )  # fmt: skip
        self.signal, self._signals = trio.open_memory_channel[int](8)
        self.stopped = trio.Event()
        self.refused: OperatorFault | None = None

    async def life(self) -> None:
        try:
            await self.app.serve(self._signals)
        except OperatorFault as fault:
            self.refused = fault
        self.stopped.set()


@asynccontextmanager
async def second(it: World, line: Line) -> AsyncIterator[Second]:
    one = Second(it, line)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.life)
        yield one
        for stream in it.streams:
            stream.close()
        await one.signal.send(signal.SIGTERM)


async def until(true: Callable[[], object]) -> None:
    while not true():
        await trio.sleep(0.01)


async def test_a_successor_takes_over_and_nothing_is_cut_off(autojump_clock, tmp_path):
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        release = trio.Event()
        busy, idle = await it.client(it.credentials()), await it.client(it.credentials())
        agent = await it.agent_client()
        assert status(await ask(agent, get())) == 200
        it.agent.before = release.wait
        await busy.send_all(get("/slow"))
        await trio.sleep(0.5)
        async with second(it, line) as new:
            await until(lambda: it.log.events("sidecar.drain_started"))
            assert it.log.events("sidecar.drain_started")[0]["reason"] == "succeeded"
            release.set()
            answer = await busy.receive_some()
            assert status(answer) == 200
            assert b"connection: close" in answer.lower()
            answer = await ask(idle, get("/on-its-way"))
            assert status(answer) == 200, "what looked idle may have had a request on its way"
            answer = await ask(agent, get())
            assert status(answer) == 200
            assert b"connection: close" in answer.lower()
            it.agent.before = None
            assert status(await ask(await it.client(it.credentials()), get("/new"))) == 200
            assert status(await ask(await it.agent_client(), get())) == 200
            assert status(await it.get("/readyz")) == 200
            await it.stopped.wait()
            assert [line["path"] for line in new.access.events("exchange.ended")] == ["/new", "/x"]
            assert len(it.access.events("exchange.ended")) == 4
            assert status(await ask(await it.client(it.credentials()), get("/later"))) == 200
        assert new.stopped.is_set()
        assert INBOUND not in it.network.listeners
        nursery.cancel_scope.cancel()


async def test_a_successor_accepts_nothing_before_all_of_it_is_there(autojump_clock, tmp_path, monkeypatch):
    """Health neither: probes would meet now one that is ready and now one that is not."""
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        proceed = trio.Event()
        one = Second(it, line)
        real = one.app._decisions.run

        async def late(task_status: Any) -> None:
            await proceed.wait()
            await real(task_status=task_status)

        monkeypatch.setattr(one.app._decisions, "run", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.life)
            await trio.sleep(5)
            for _ in range(10):
                assert status(await it.get("/readyz")) == 200
                assert status(await ask(await it.client(it.credentials()), get())) == 200
            assert len(it.access.events("exchange.ended")) == 10
            assert not line.ready.is_set()
            proceed.set()
            await it.stopped.wait()
            for stream in it.streams:
                stream.close()
            await one.signal.send(signal.SIGTERM)


async def test_readiness_stays_where_a_successor_serves_at_our_address(autojump_clock, tmp_path):
    """On a connection to the health port that was kept, the old one answers once more."""
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        probe = it._kept(Stream(await it.network.connect(HEALTH)))
        ready = b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"
        assert status(await ask(probe, ready)) == 200
        async with second(it, line):
            await until(lambda: it.log.events("sidecar.drain_started"))
            answer = await ask(probe, ready)
            assert status(answer) == 200
            assert b"connection: close" in answer.lower()
            await it.stopped.wait()


async def test_a_successor_that_is_refused_changes_nothing(autojump_clock, tmp_path, monkeypatch):
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        one = Second(it, line)

        async def refuse(task_status: Any) -> None:
            raise OperatorFault("the bundle does not verify", code="bundle_refused")

        monkeypatch.setattr(one.app._decisions, "run", refuse)
        await one.life()
        assert one.refused is not None
        assert not it.log.events("sidecar.drain_started")
        for _ in range(3):
            assert status(await ask(await it.client(it.credentials()), get())) == 200
        assert status(await it.get("/readyz")) == 200


async def test_an_address_that_the_old_one_does_not_have_is_bound(autojump_clock, tmp_path):
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        it.text = it.text.replace("listen: 127.0.0.1:8080", "listen: 127.0.0.1:8081")
        async with second(it, line):
            await it.stopped.wait()
            assert OUTBOUND not in it.network.listeners
            assert Address(host="127.0.0.1", port=8081) in it.network.listeners
            assert status(await ask(await it.client(it.credentials()), get())) == 200


async def test_one_that_is_told_to_stop_may_still_be_succeeded(autojump_clock, tmp_path):
    """Whoever stops the old one before the new one is ready: what is left of its sockets is taken over all the same."""
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        it.agent.before = trio.sleep_forever
        stream = await it.client(it.credentials())
        await stream.send_all(get())
        await trio.sleep(0.5)
        await it.send_signal.send(signal.SIGTERM)
        await trio.sleep(0.5)
        assert status(await it.get("/readyz")) == 503
        line.listeners = {at: one for at, one in line.listeners.items() if at != INBOUND}
        it.agent.before = None
        async with second(it, line):
            await line.ready.wait()
            await trio.sleep(0.5)
            assert status(await it.get("/readyz")) == 200
            assert not it.stopped.is_set()
            assert status(await ask(await it.client(it.credentials()), get())) == 200
            await it.stopped.wait()


async def test_a_start_can_be_broken_off(autojump_clock, tmp_path, monkeypatch):
    line = Line()
    async with world(tmp_path, succession=line.predecessor) as it:
        one = Second(it, line)

        async def never(task_status: Any) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(one.app._decisions, "run", never)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.life)
            await trio.sleep(5)
            await one.signal.send(signal.SIGTERM)
            with trio.fail_after(1):
                await one.stopped.wait()
        assert one.refused is None
        assert status(await ask(await it.client(it.credentials()), get())) == 200


@pytest.mark.parametrize("addresses", [1, 2])
async def test_a_socket_that_is_held_for_us_must_be_of_use(autojump_clock, tmp_path, addresses):
    async with world(tmp_path) as it:
        at = [Address(host="10.0.0.2", port=8443 + number) for number in range(addresses)]
        listeners = {one: await it.network.listen(one) for one in at}
        it.text = it.text.replace("listen: 10.0.0.1:8443", "listen: 10.0.0.2:8443").replace(
            "127.0.0.1:8080", "127.0.0.2:8080"
        )
        it.text = it.text.replace("health: {listen: 10.0.0.1:9091}", "health: null")
        app = App(
            it.load(), load=it.load, network=it.network, log=Log(Lines()), access=Lines(), activated=listeners  # type: ignore[arg-type]
        )  # fmt: skip
        tell, signals = trio.open_memory_channel[int](8)
        async with trio.open_nursery() as nursery:
            if addresses == 2:
                with pytest.raises(OperatorFault, match=r"10\.0\.0\.2:8444"):
                    await app.serve(signals)
            else:
                nursery.start_soon(app.serve, signals)
                await until(lambda: app.status().listeners)
                await tell.send(signal.SIGTERM)
        assert not it.network.listeners.keys() & set(at)
