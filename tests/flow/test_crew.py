"""A crew of workers that are tasks here: what they are told, in which order, and what becomes of one that fails.

`Fake` is the process: it reads orders as a worker does, answers them as it is told to, and ends when it is killed. Everything
else is the crew of production, under the mock clock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import orders, supervisor
from sidecar.config import Config, Limits, OpaExternal
from sidecar.decision.external import External
from sidecar.errors import OperatorFault
from sidecar.identity.current import Current
from sidecar.model import Address, CacheUse, Identity, Lending, PolicyBundle, SpiffeId
from sidecar.records.added import as_json
from sidecar.records.exposition import counter, gauge
from sidecar.supervisor import Crew
from sidecar.wire.channel import Channel
from sidecar.wire.listening import bound
from sidecar.wire.queues import shared_out
from support.flow import PairNetwork

KEY = "inbound[0].listen"
OUTBOUND = "outbound.listen"


class Fake:
    """A worker."""

    def __init__(self, sock: socket.socket, dies: Callable[[], None]) -> None:
        self.channel = Channel(sock)
        self.orders: list[Any] = []
        self.silent = False
        self.refuses: tuple[str, str] | None = None
        self.starts = True
        self.counted = 0
        self.dead = False
        self._dies = dies

    def die(self) -> None:
        if not self.dead:
            self.dead = True
            self.channel.close()
            self._dies()

    def say(self, **said: object) -> None:
        self.channel.send(orders.WORD, orders.word(said))

    async def run(self) -> None:
        try:
            while True:
                _, payload = await self.channel.receive()
                order = orders.order(payload)
                self.orders.append(order)
                if not self.silent:
                    self.obey(order)
        except (EOFError, trio.ClosedResourceError):
            pass

    def obey(self, order: Any) -> None:
        match order:
            case orders.Begin() if self.starts:
                self.say(**{"is": "ready"})
            case orders.Begin():
                self.say(failed="identity_unusable", detail="no key")
                self.die()
            case orders.Tell():
                self.tell(order.number)
            case orders.Prepare():
                self.say(obeyed=order.number, refused=self.refuses)
            case orders.Apply() | orders.LetGo() | orders.Finish() | orders.Lend():
                self.say(obeyed=order.number, refused=None)
            case orders.Stop():
                self.tell(None)
                self.die()

    def tell(self, number: int | None) -> None:
        measured = [counter("sidecar_exchanges", "", (), {(): self.counted}), gauge("open", "", (), {(): 1})]
        self.say(
            told=number, open=1, measured=as_json(measured), cache={"hits": self.counted, "entries": self.counted}, decided=["r1", 0, 0, 0],
            not_compared=0, kept=[0, 0],
        )  # fmt: skip

    def told(self, kind: type) -> list[Any]:
        return [order for order in self.orders if isinstance(order, kind)]


class Stage:
    """The crew and all workers that it ever started, by place."""

    def __init__(self, crew: Crew, decisions: External, directory: Path) -> None:
        self.crew = crew
        self.decisions = decisions
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.started: list[tuple[int, Fake]] = []
        self.lives: Callable[[Fake], None] = lambda _fake: None
        self.current = Current()

    def worker(self, number: int) -> Fake:
        return next(fake for at, fake in reversed(self.started) if at == number)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for one, fields in self.events if one == name]

    def measured(self, name: str) -> float:
        return sum(
            sample.value
            for part in self.crew.measured
            for family in part
            if family.name == name
            for sample in family.samples
        )


@asynccontextmanager
async def crew_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int = 2, *, accepts: bool = True, outbound: bool = False
):
    decisions = External(tmp_path / "opa.sock", PairNetwork(), log=lambda *_, **__: None)
    config = Config(workers=workers, mtls_mode="disabled", opa=OpaExternal(socket=tmp_path / "opa.sock"))
    events: list[tuple[str, dict[str, Any]]] = []

    def event(name: str, _level: str = "info", **fields: Any) -> None:
        events.append((name, fields))

    stage = Stage(None, decisions, tmp_path)  # type: ignore[arg-type]
    crew = Crew(
        config, current=stage.current, decisions=decisions, keeping=None, access=None, event=event, pseudonym="p"
    )
    stage.crew, stage.events = crew, events
    listener = shared_out(await bound(Address(host="127.0.0.1", port=0)), workers)
    local = shared_out(await bound(Address(host="127.0.0.1", port=0)), workers)
    async with trio.open_nursery() as nursery:

        class Process:
            """As of `worker_process`, by a task and a pipe that ends with it in place of a pidfd."""

            def __init__(self, one: Any, _descriptors: Sequence[int]) -> None:
                ours, theirs = socket.socketpair()
                one.pidfd, write = os.pipe()
                fake = self._fake = Fake(theirs, lambda: os.close(write))
                self._one = one
                one.pid, one.channel, one.kill = 1000 + len(stage.started), Channel(ours), fake.die
                stage.started.append((one.number, fake))
                stage.lives(fake)
                nursery.start_soon(fake.run)

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None:
                self._fake.die()
                os.close(self._one.pidfd)
                self._one.pidfd, self._one.fate = -1, "was killed by SIGKILL"
                self._one.channel.close()

        monkeypatch.setattr(supervisor, "Process", Process)
        found = {KEY: listener, "health.listen": listener}
        await crew.open(nursery, {**found, OUTBOUND: local} if outbound else found)
        if accepts:
            await crew.accept(nursery)
        yield stage
        await crew.stop()
        nursery.cancel_scope.cancel()
    listener.close()
    local.close()


async def settled() -> None:
    await trio.sleep(0.05)


async def test_each_begins_with_all_that_it_needs_and_accepts_when_all_are_there(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path, 3) as stage:
        await settled()
        for number in range(3):
            [begin] = stage.worker(number).told(orders.Begin)
            assert begin.worker == number
            assert begin.lending == stage.decisions.lending
            assert begin.sockets.keys() == {KEY}, "health is not theirs"
            assert len(begin.sockets[KEY]) == 3
            assert [one.queues for one in stage.worker(number).told(orders.Serve)] == [{KEY: frozenset({number})}]
        assert stage.crew.accepts


async def test_nobody_accepts_before_the_sidecar_does(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path, accepts=False) as stage:
        await settled()
        assert stage.worker(0).told(orders.Serve) == []
        assert not stage.crew.accepts
        assert listening(stage) == [True, False], "a connection that comes to the other one would wait for nobody"
        await stage.crew.accept(None)  # type: ignore[arg-type]
        assert listening(stage) == [True, True]


def listening(stage: Stage) -> list[bool]:
    found = []
    for queue in stage.crew._found[KEY].queues:
        with socket.socket(fileno=os.dup(queue.fileno())) as sock:
            found.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1)
    return found


async def test_a_start_at_which_one_ends_again_and_again_is_refused(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path, accepts=False) as stage:
        stage.lives = lambda fake: fake.die() if stage.started[-1][0] == 0 else None
        with trio.fail_after(60), pytest.raises(OperatorFault, match="worker 0 was killed by SIGKILL") as refused:
            await stage.crew.accept(None)  # type: ignore[arg-type]
        assert refused.value.code == "worker_not_started"


async def test_one_for_which_there_are_no_descriptors_is_started_when_there_are(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        makes, left = supervisor.Process, [3]

        def process(one: Any, descriptors: Sequence[int]) -> Any:
            if left[0]:
                left[0] -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return makes(one, descriptors)

        monkeypatch.setattr(supervisor, "Process", process)
        stage.worker(0).die()
        await trio.sleep(5)
        assert stage.named("worker.ended")[-1]["reason"] == "cannot be started: Too many open files"
        assert stage.worker(0).told(orders.Serve)
        assert stage.worker(1).told(orders.Serve)[-1].queues == {KEY: frozenset({1})}


async def test_one_that_has_closed_its_channel_and_goes_on_is_ended(autojump_clock, monkeypatch, tmp_path):
    """Nobody could tell it anything any more."""
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        first = stage.worker(0)
        first.channel.close()
        await trio.sleep(3)
        assert first.dead
        assert stage.worker(0) is not first


async def test_a_start_that_one_refuses_is_refused_in_its_words(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path, accepts=False) as stage:
        stage.lives = lambda fake: setattr(fake, "starts", False)
        with pytest.raises(OperatorFault, match=r"worker \d: no key") as refused:
            await stage.crew.accept(None)  # type: ignore[arg-type]
        assert refused.value.code == "identity_unusable"


async def test_the_queue_of_one_that_has_ended_is_anothers_until_it_is_back(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        neighbour = stage.worker(1)
        stage.worker(0).die()
        await settled()
        assert neighbour.told(orders.Serve)[-1].queues == {KEY: frozenset({0, 1})}
        assert stage.named("worker.ended")[0]["worker"] == 0
        await trio.sleep(0.2)
        assert neighbour.told(orders.Serve)[-1].queues == {KEY: frozenset({1})}
        assert stage.worker(0).told(orders.Serve)[-1].queues == {KEY: frozenset({0})}
        assert len(stage.started) == 3


async def test_one_that_ends_again_and_again_is_waited_for_longer_and_longer(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.lives = lambda fake: setattr(fake, "starts", False)
        stage.worker(0).die()
        await trio.sleep(60)
        assert 10 < len(stage.started) < 25
        assert stage.crew.accepts, "the other one serves"
        stage.lives = lambda fake: None
        await trio.sleep(6)
        assert stage.worker(0).told(orders.Serve)


async def test_one_that_does_not_answer_is_killed_and_replaced(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        first = stage.worker(1)
        first.silent = True
        await trio.sleep(4.5)
        assert not first.dead, "a pause is no end"
        await trio.sleep(3)
        assert first.dead
        assert [one["worker"] for one in stage.named("worker.stuck")] == [1]
        assert stage.worker(1) is not first
        assert stage.crew.accepts


async def test_what_was_counted_adds_up_and_outlives_whoever_counted(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        for number in (0, 1):
            stage.worker(number).counted = 10 + number
        await stage.crew.refresh()
        assert stage.measured("sidecar_exchanges") == 21
        assert stage.measured("open") == 2
        stage.worker(1).die()
        await trio.sleep(0.3)
        await stage.crew.refresh()
        assert stage.measured("sidecar_exchanges") == 21
        assert stage.measured("open") == 2
        stage.worker(1).counted = 5
        await stage.crew.refresh()
        assert stage.measured("sidecar_exchanges") == 26
        assert stage.measured("sidecar_worker_restarts") == 1


async def test_who_is_slow_to_tell_keeps_nobody_waiting(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.worker(0).counted = 7
        await stage.crew.refresh()
        stage.worker(0).silent = True
        stage.worker(1).counted = 3
        began = trio.current_time()
        await stage.crew.refresh()
        assert trio.current_time() - began <= 0.5
        assert stage.measured("sidecar_exchanges") == 10


async def test_what_was_repeated_adds_up_and_what_is_kept_ends_with_whoever_kept_it(
    autojump_clock, monkeypatch, tmp_path
):
    async with crew_of(monkeypatch, tmp_path) as stage:
        assert stage.crew.cache_use is None, "an OPA of somebody else is never repeated"
        monkeypatch.setattr(supervisor, "External", ())
        stage.worker(0).counted, stage.worker(1).counted = 3, 4
        await stage.crew.refresh()
        assert stage.crew.cache_use == CacheUse(hits=7, entries=7)
        stage.worker(1).die()
        await trio.sleep(0.3)
        await stage.crew.refresh()
        assert stage.crew.cache_use == CacheUse(hits=7, entries=3)


async def test_one_that_takes_its_place_passes_on_the_same_share_of_decisions(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        monkeypatch.setattr(stage.crew, "_wanted", lambda: 0.25)
        await trio.sleep(3)
        assert [one.sample for one in stage.worker(0).told(orders.Compare)] == [0.25], "once"
        stage.worker(0).die()
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].sample == 0.25


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────


def identity(key: bytes) -> Identity:
    return Identity(
        id=SpiffeId(trust_domain="a.test", path="/x"), chain=b"chain", key=key, not_after=5.0, generation=1,
        trust={"a.test": frozenset({b"der"})},
    )  # fmt: skip


async def test_a_rotation_reaches_all_and_whoever_takes_a_place(autojump_clock, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor.presented, "check", lambda _identity: None)
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.current.publish(identity(b"1"))
        await settled()
        for number in (0, 1):
            assert [one.identity.key for one in stage.worker(number).told(orders.Present)] == [b"1"]
        stage.worker(0).die()
        stage.current.publish(identity(b"2"))
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].identity.key == b"2"
        assert stage.worker(1).told(orders.Present)[-1].identity.key == b"2"


async def test_an_identity_that_nobody_can_present_reaches_nobody(autojump_clock, monkeypatch, tmp_path):
    def check(found: Identity) -> None:
        if found.key == b"bad":
            raise OperatorFault("it is none", code="identity_unusable")

    monkeypatch.setattr(supervisor.presented, "check", check)
    async with crew_of(monkeypatch, tmp_path) as stage:
        for key in (b"1", b"bad"):
            stage.current.publish(identity(key))
            await settled()
        assert stage.worker(1).told(orders.Present)[-1].identity.key == b"1"
        stage.worker(0).die()
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].identity.key == b"1"


async def test_what_a_reload_has_read_is_applied_with_it(autojump_clock, monkeypatch, tmp_path):
    """What is reported as taken up is in force, for those that are there and for whoever comes."""
    monkeypatch.setattr(supervisor.presented, "check", lambda _identity: None)
    async with crew_of(monkeypatch, tmp_path) as stage:
        await stage.crew.prepare(changed(stage.crew._config))
        stage.current.publish(identity(b"2"))
        await stage.crew.apply()
        assert stage.worker(0).told(orders.Apply)[0].identity.key == b"2"


# ── a reload ──────────────────────────────────────────────────────────────────────────────────────────────────────


def changed(config: Config) -> Config:
    return Config(workers=config.workers, mtls_mode="disabled", opa=config.opa, limits=Limits(max_connections=100))


async def test_a_reload_is_prepared_by_all_and_then_applied_by_all(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        new = changed(stage.crew._config)
        await stage.crew.prepare(new)
        for number in (0, 1):
            assert stage.worker(number).told(orders.Prepare)[0].config.limits.max_connections == 50
            assert stage.worker(number).told(orders.Apply) == []
        await stage.crew.apply()
        for number in (0, 1):
            assert stage.worker(number).told(orders.Apply)[0].config.limits.max_connections == 50
        stage.worker(0).die()
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].config.limits.max_connections == 50


async def test_what_one_refuses_is_applied_by_none(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.worker(1).refuses = ("route_unusable", "it says no")
        with pytest.raises(OperatorFault, match="worker 1: it says no") as refused:
            await stage.crew.prepare(changed(stage.crew._config))
        assert refused.value.code == "route_unusable"
        await stage.crew.abandon()
        await stage.crew.apply()
        await settled()
        for number in (0, 1):
            assert stage.worker(number).told(orders.Apply) == []
            assert stage.worker(number).told(orders.Abandon)
        stage.worker(0).die()
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].config.limits.max_connections == 512


async def test_one_that_ends_while_it_prepares_stands_in_nobodys_way(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.worker(1).silent = True
        async with trio.open_nursery() as nursery:

            async def reload() -> None:
                await stage.crew.prepare(changed(stage.crew._config))
                await stage.crew.apply()

            nursery.start_soon(reload)
            await settled()
            stage.worker(1).die()
        await trio.sleep(0.3)
        whole = [*stage.worker(1).told(orders.Begin), *stage.worker(1).told(orders.Apply)]
        assert whole[-1].config.limits.max_connections == 50


# ── policy ────────────────────────────────────────────────────────────────────────────────────────────────────────


def lent(path: str) -> Lending:
    bundle = PolicyBundle(archive=b"", revision=path, serial=1, created=0.0, digest="", keys={}, scope="s")
    return Lending(socket=Path(path), uids=frozenset({1}), bundle=bundle)


async def test_the_opa_before_is_done_with_when_the_last_one_has_said_so(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.crew.offered(True)
        await settled()
        assert [one.on_its_way for one in stage.worker(0).told(orders.Offered)] == [True]
        monkeypatch.setattr(External, "lending", lent("/new"))
        stage.worker(1).silent = True
        done = trio.Event()
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                await stage.crew.changed_over()
                done.set()

            nursery.start_soon(change)
            await trio.sleep(1)
            assert not done.is_set()
            [order] = stage.worker(1).told(orders.Lend)
            stage.worker(1).say(obeyed=order.number, refused=None)
            await settled()
            assert done.is_set()
        stage.crew.offered(False)
        await settled()
        assert [type(one) for one in stage.worker(0).orders if not isinstance(one, orders.Tell)][-3:] == [
            orders.Offered, orders.Lend, orders.Offered,
        ]  # fmt: skip


async def test_one_that_starts_while_another_bundle_is_on_its_way_is_told(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.crew.offered(True)
        stage.worker(0).die()
        await trio.sleep(0.3)
        assert stage.worker(0).told(orders.Begin)[0].offered


async def test_until_when_policy_may_decide_is_told_when_it_changes(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        monkeypatch.setattr(External, "lending", lent("/new"))
        await trio.sleep(3)
        assert [one.lending.socket for one in stage.worker(0).told(orders.Lend)] == [Path("/new")], "once"


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_all_let_go_before_the_first_finishes(autojump_clock, monkeypatch, tmp_path):
    """A queue that is open anywhere goes on taking connections, for nobody."""
    async with crew_of(monkeypatch, tmp_path) as stage:
        fake = stage.worker(1)
        monkeypatch.setattr(
            fake, "obey", lambda order: None if isinstance(order, orders.LetGo) else Fake.obey(fake, order)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.crew.finish, "inbound")
            await trio.sleep(1)
            assert stage.worker(0).told(orders.LetGo)
            assert stage.worker(0).told(orders.Finish) == []
            assert stage.crew._found[KEY].fileno() >= 0
            fake.say(obeyed=fake.told(orders.LetGo)[0].number, refused=None)
        assert [type(one) for one in stage.worker(0).orders if not isinstance(one, orders.Tell)][-2:] == [
            orders.LetGo, orders.Finish,
        ]  # fmt: skip
        assert stage.crew._found[KEY].fileno() == -1


async def test_who_is_stuck_when_it_is_to_drain_is_ended_while_another_one_can_take_his_queue(
    autojump_clock, monkeypatch, tmp_path
):
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        stage.worker(1).silent = True
        neighbour = stage.worker(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.crew.finish, "inbound")
            await trio.sleep(1)
            assert neighbour.told(orders.LetGo) == []
        kinds = [type(one) for one in neighbour.orders]
        [*_, takes] = neighbour.told(orders.Serve)
        assert takes.queues == {KEY: frozenset({0, 1})}
        assert neighbour.orders.index(takes) < kinds.index(orders.LetGo) < kinds.index(orders.Finish)
        await trio.sleep(10)
        assert len(stage.started) <= 3, "whoever was on his way in its place is not started again"
        assert stage.named("worker.stuck")


async def test_while_one_side_drains_the_others_queues_are_dealt_out(autojump_clock, monkeypatch, tmp_path):
    """Inbound requests that are to finish may need outbound, and who asks there may come to the queue of one that has ended."""
    async with crew_of(monkeypatch, tmp_path, outbound=True) as stage:
        await settled()
        neighbour = stage.worker(1)
        async with trio.open_nursery() as nursery:
            open_still = [fake for _, fake in stage.started]
            for fake in open_still:
                monkeypatch.setattr(fake, "obey", without_finish(fake))
            nursery.start_soon(stage.crew.finish, "inbound")
            await settled()
            stage.worker(0).die()
            await settled()
            assert neighbour.told(orders.Serve)[-1].queues == {OUTBOUND: frozenset({0, 1})}
            assert stage.crew._found[KEY].fileno() == -1
            assert stage.crew._found[OUTBOUND].fileno() >= 0
            [finish] = neighbour.told(orders.Finish)
            neighbour.say(obeyed=finish.number, refused=None)
        before = len(neighbour.told(orders.Serve))
        await stage.crew.finish("outbound")
        assert len(neighbour.told(orders.Serve)) == before
        assert len(stage.started) == 2


def without_finish(fake: Fake) -> Callable[[Any], None]:
    def obey(order: Any) -> None:
        if not (isinstance(order, orders.Finish) and order.side == "inbound"):
            Fake.obey(fake, order)

    return obey


async def test_one_that_is_starting_when_it_is_to_drain_is_ended(autojump_clock, monkeypatch, tmp_path):
    """It serves nobody, and holds queues open that nobody would empty."""
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        stage.lives = lambda fake: setattr(fake, "silent", True)
        stage.worker(0).die()
        await trio.sleep(0.2)
        late = stage.worker(0)
        assert late.told(orders.Begin)
        await stage.crew.finish("inbound")
        await settled()
        assert late.dead
        assert late.told(orders.Serve) == []


async def test_nobody_is_started_for_sockets_that_are_closed(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        await settled()
        stage.crew._found[KEY].close()
        stage.worker(0).die()
        await trio.sleep(1)
        assert len(stage.started) == 2
        assert stage.named("worker.ended")[-1]["reason"].startswith("cannot be started")


async def test_what_is_open_has_the_time_that_it_needs(autojump_clock, monkeypatch, tmp_path):
    """The deadline is that of the whole drain, and not of an order."""
    async with crew_of(monkeypatch, tmp_path) as stage:
        fake = stage.worker(1)
        monkeypatch.setattr(fake, "obey", without_finish(fake))
        ended = trio.Event()

        async def finish() -> None:
            await stage.crew.finish("inbound")
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            await trio.sleep(600)
            assert not ended.is_set()
            fake.say(obeyed=fake.told(orders.Finish)[0].number, refused=None)
            await settled()
            assert ended.is_set()


async def test_while_it_drains_nobody_is_replaced(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(stage.worker(0), "obey", without_finish(stage.worker(0)))
            nursery.start_soon(stage.crew.finish, "inbound")
            await settled()
            stage.worker(0).die()
        await trio.sleep(10)
        assert len(stage.started) == 2


async def test_what_they_say_last_is_heard(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.worker(0).counted, stage.worker(1).counted = 3, 4
        await stage.crew.stop()
        assert stage.measured("sidecar_exchanges") == 7
        assert stage.measured("open") == 0


async def test_one_that_does_not_end_is_not_waited_for(autojump_clock, monkeypatch, tmp_path):
    async with crew_of(monkeypatch, tmp_path) as stage:
        stage.worker(0).silent = True
        began = trio.current_time()
        await stage.crew.stop()
        assert trio.current_time() - began <= 2.0


@pytest.mark.parametrize(
    "said",
    [
        b"no json", b"{}", b'{"obeyed":1}', b'{"measured":[[1]],"told":1}', json.dumps([1]).encode(),
        b"[" * 200_000, b'{"obeyed":1e999,"refused":null}', b'{"obeyed":1,"refused":5}', b'{"is":"ready"}', b"\xff",
    ],
    ids=len,
)  # fmt: skip
async def test_one_that_says_what_nobody_understands_is_replaced(autojump_clock, monkeypatch, tmp_path, said):
    async with crew_of(monkeypatch, tmp_path) as stage:
        first = stage.worker(0)
        first.channel.send(orders.WORD, said)
        await trio.sleep(1)
        assert first.dead
        assert stage.worker(0) is not first
        assert [one["worker"] for one in stage.named("worker.misunderstood")] == [0]
