"""A worker at the other end of its channel: what it is told, and what it says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import __version__, orders
from sidecar import worker as workers
from sidecar.config import (
    Config,
    DecisionCache,
    DecisionLog,
    InboundListener,
    Limits,
    Log,
    OpaExternal,
    Outbound,
    Policy,
    Shadow,
    Timeouts,
)
from sidecar.decision import envoy
from sidecar.decision.cache import Bounds
from sidecar.errors import NoDecision
from sidecar.model import Identity, Lending, PolicyBundle, SpiffeId
from sidecar.wire.channel import Channel
from sidecar.worker import Worker
from support.fake_opa import REVISION, fake_opa, late, result
from support.questions import asking
from support.records import decided

BUNDLE = PolicyBundle(archive=b"", revision=REVISION, serial=1, created=0.0, digest="", keys={}, scope="s")

IDENTITY = Identity(
    id=SpiffeId(trust_domain="a.test", path="/x"), chain=b"chain", key=b"key", not_after=5.0, generation=1,
    trust={"a.test": frozenset({b"der"})},
)  # fmt: skip


class Supervisor:
    """The other end. What the worker says is kept by its kind."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.said: list[tuple[bytes, bytes]] = []

    async def hear(self) -> None:
        try:
            while True:
                self.said.append(await self.channel.receive())
        except EOFError:
            pass

    def order(self, order: orders.Order) -> None:
        self.channel.send(orders.ORDER, orders.written(order))

    def words(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for kind, payload in self.said if kind == orders.WORD]

    @property
    def obeyed(self) -> list[int]:
        return [word["obeyed"] for word in self.words() if "obeyed" in word]

    def lines(self, kind: bytes) -> list[bytes]:
        return [line for of, payload in self.said if of == kind for line in payload.split(b"\n")]

    async def told(self, number: int) -> dict[str, Any]:
        self.order(orders.Tell(number=number))
        with trio.fail_after(5):
            while not (found := [word for word in self.words() if word.get("told") == number]):
                await trio.sleep(0.01)
        return found[0]


@asynccontextmanager
async def worker_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, sample: float = 0.0, offered: bool = False,
    sockets: dict[str, tuple[int, ...]] | None = None, lending: Lending | None = None, **config: Any,
):  # fmt: skip
    monkeypatch.setattr(workers, "settle", lambda: None)
    settings = {"mtls_mode": "disabled", "workers": 2, "opa": OpaExternal(socket=tmp_path / "opa.sock"), **config}
    begin = orders.Begin(
        worker=0, config=Config(**settings), pseudonym="p", labels={"id": "x"}, identity=None, lending=lending,
        offered=offered, sockets=sockets or {}, sample=sample,
    )  # fmt: skip
    ours, theirs = socket.socketpair()
    supervisor, channel = Supervisor(Channel(ours)), Channel(theirs)
    worker = Worker(begin, channel)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.channel.run)
        nursery.start_soon(supervisor.hear)
        nursery.start_soon(worker.run)
        with trio.fail_after(5):
            while {"is": "ready"} not in supervisor.words():
                await trio.sleep(0.01)
        yield supervisor, worker
        nursery.cancel_scope.cancel()
    supervisor.channel.close()
    channel.close()


def lending(at: Path) -> Lending:
    return Lending(socket=at, uids=frozenset({os.getuid()}), bundle=BUNDLE)


async def test_what_it_begins_with_is_in_force(monkeypatch, tmp_path):
    stale = replace(lending(tmp_path / "a.sock"), stale_at=1.0)
    async with worker_of(monkeypatch, tmp_path, offered=True, lending=stale) as (supervisor, worker):
        assert worker._lent.in_force is None, "another bundle is on its way in"
        supervisor.order(orders.Offered(on_its_way=False))
        await supervisor.told(1)
        assert worker._lent.in_force == BUNDLE
        with pytest.raises(NoDecision) as refused:
            await worker._traffic._decisions.decide(asking())
        assert refused.value.code == "policy_stale"


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "it began in between"])
async def test_a_reload_is_in_force_when_it_is_obeyed(monkeypatch, tmp_path, prepared):
    policy = Policy(source=tmp_path, keys={})
    async with worker_of(monkeypatch, tmp_path, policy=policy) as (supervisor, worker):
        presented: list[Identity] = []
        monkeypatch.setattr(worker._presented, "publish", presented.append)
        resized: list[object] = []
        monkeypatch.setattr(worker._remembered, "resize", resized.append)
        new = replace(
            worker._traffic.config, timeouts=Timeouts(decision=0.25), log=Log(level="error"),
            limits=Limits(max_exchanges=7), policy=replace(policy, cache=DecisionCache(max_entries=5, max_bytes=6)),
        )  # fmt: skip
        if prepared:
            supervisor.order(orders.Prepare(number=1, config=new))
        supervisor.order(orders.Apply(number=2, config=new, identity=IDENTITY))
        with trio.fail_after(5):
            while 2 not in supervisor.obeyed:
                await trio.sleep(0.01)
        assert (worker._lent.decision_timeout, worker._log.level) == (0.25, "error")
        assert worker._traffic._bounds.max_exchanges == 7
        assert resized == [Bounds(max_entries=5, max_bytes=6)]
        assert presented == [IDENTITY]


def bound_twice() -> tuple[int, ...]:
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    return tuple(one.detach() for one in made)


async def test_it_lets_go_of_one_side_at_a_time_and_passes_no_socket_on(monkeypatch, tmp_path):
    sockets = {"inbound[0].listen": bound_twice(), "outbound.listen": bound_twice()}
    for of in sockets.values():
        for one in of:
            os.set_inheritable(one, True)  # as they are when the process begins
    listeners = {"inbound": (InboundListener(),), "outbound": Outbound(routes=())}
    async with worker_of(monkeypatch, tmp_path, sockets=sockets, **listeners) as (supervisor, worker):
        assert not any(os.get_inheritable(one) for of in sockets.values() for one in of)
        supervisor.order(orders.Serve(queues={key: frozenset({0}) for key in sockets}))
        supervisor.order(orders.LetGo(number=1, side="inbound"))
        with trio.fail_after(5):
            while supervisor.obeyed != [1]:
                await trio.sleep(0.01)
        open_now = {key: [one.fileno() >= 0 for one in worker._queues[key].queues] for key in sockets}
        assert open_now == {"inbound[0].listen": [True, False], "outbound.listen": [True, True]}
        worker._access.write(b"last")
        said = len(supervisor.said)
        supervisor.order(orders.Finish(number=2, side="inbound"))
        with trio.fail_after(5):
            while supervisor.obeyed != [1, 2]:
                await trio.sleep(0.01)
        kinds = [
            kind if kind != orders.WORD else "obeyed" if "obeyed" in json.loads(payload) else "told"
            for kind, payload in supervisor.said[said:]
        ]
        assert kinds[-1] == "obeyed"
        assert "told" in kinds, "whoever ends it next has its last figures"
        assert b"last" in supervisor.lines(orders.ACCESS)
        assert worker._queues["outbound.listen"].queues[0].fileno() >= 0


async def test_what_it_has_to_say_is_said_before_the_end(monkeypatch, tmp_path):
    async with worker_of(monkeypatch, tmp_path) as (supervisor, worker):
        monkeypatch.setattr(workers, "_FLUSH_INTERVAL", 60.0)
        await trio.sleep(0.3)  # what was slept already
        worker._access.write(b"last")
        said = len(supervisor.words())
        supervisor.order(orders.Stop())
        with trio.fail_after(5):
            while len(supervisor.words()) == said:
                await trio.sleep(0.01)
        assert supervisor.words()[-1]["told"] is None
        assert supervisor.lines(orders.ACCESS) == [b"last"]


async def test_an_opa_that_is_lent_twice_is_no_reason_to_end_the_one_before(monkeypatch, tmp_path):
    """What is told of anew may be no more than until when it decides; questions to the one before may still be under way."""
    async with (
        fake_opa(tmp_path / "a.sock") as one,
        fake_opa(tmp_path / "b.sock"),
        worker_of(monkeypatch, tmp_path) as (supervisor, worker),
    ):
        one.says = lambda _input: late(0.5, result({"allow": True, "rule": "one"}))
        supervisor.order(orders.Lend(number=1, lending=lending(tmp_path / "a.sock")))
        with trio.fail_after(5):
            while supervisor.obeyed != [1]:
                await trio.sleep(0.01)
        answered = trio.Event()

        async def ask() -> None:
            assert (await worker._lent.decide(asking())).rule == "one"
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.1)
            supervisor.order(orders.Lend(number=2, lending=lending(tmp_path / "b.sock")))
            supervisor.order(orders.Lend(number=3, lending=lending(tmp_path / "b.sock")))
            with trio.fail_after(5):
                while len(supervisor.obeyed) < 3:
                    await trio.sleep(0.005)
                    assert supervisor.obeyed == [1] or answered.is_set()
        assert supervisor.obeyed == [1, 2, 3]


async def test_what_is_kept_of_decisions_is_in_the_words_in_which_they_were_asked_for(monkeypatch, tmp_path):
    policy = Policy(source=tmp_path, keys={}, input="envoy", decision="envoy/authz/allow")
    kept = DecisionLog(file=tmp_path / "decisions.jsonl", mask=("/input/attributes/request/http/path",))
    async with worker_of(monkeypatch, tmp_path, policy=policy, decision_log=kept) as (supervisor, worker):
        record = decided()
        worker._records.decided(record)
        with trio.fail_after(5):
            while not (lines := supervisor.lines(orders.DECISION)):
                await trio.sleep(0.01)
    [event] = map(json.loads, lines)
    asked = json.loads(envoy.question(record.inquiry))["input"]
    del asked["attributes"]["request"]["http"]["path"]
    assert (event["path"], event["input"]) == ("envoy/authz/allow", asked)
    assert event["labels"] == {"id": "x"}


async def test_decisions_that_cannot_be_kept_or_passed_on_are_told_of_once(monkeypatch, tmp_path):
    policy = Policy(source=tmp_path, keys={}, shadow=Shadow(sample=1.0))
    kept = DecisionLog(file=tmp_path / "decisions.jsonl")
    async with worker_of(monkeypatch, tmp_path, sample=1.0, policy=policy, decision_log=kept) as (supervisor, worker):
        worker._records.decided(decided(seconds=float("nan")))
        worker._records.decided(decided(decision=None, error="decision_timeout"))
        monkeypatch.setattr(worker._channel, "offer", lambda _kind, _payload: False)
        worker._records.decided(decided())
        worker._flush()
        told = await supervisor.told(7)
        assert (told["kept"], told["not_compared"]) == ([1, 2], 1)
        told = await supervisor.told(8)
        assert (told["kept"], told["not_compared"]) == ([0, 0], 0)


async def test_decisions_are_counted_by_the_revision_that_took_them(monkeypatch, tmp_path):
    policy = Policy(source=tmp_path, keys={}, report=True)
    async with worker_of(monkeypatch, tmp_path, policy=policy) as (supervisor, worker):
        worker._lent.lend(lending(tmp_path / "a.sock"))
        worker._records.decided(decided())
        worker._records.decided(decided(decision=None, error="decision_timeout"))
        assert (await supervisor.told(1))["decided"] == [REVISION, 1, 0, 1]
        worker._records.decided(decided())
        other = replace(lending(tmp_path / "b.sock"), bundle=replace(BUNDLE, revision="r2"))
        worker._lent.lend(other)
        worker._records.decided(decided())
        assert (await supervisor.told(2))["decided"] == ["r2", 1, 0, 0], "counters of a revision begin with it"


def test_a_worker_of_another_version_does_not_begin():
    """A pickle names values by their place: another version would read one setting as another."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    program = "from sidecar.worker import main; main()"
    command = [sys.executable, "-c", program, str(theirs.fileno()), str(os.getpid()), "0.0.1"]
    done = subprocess.run(command, pass_fds=[theirs.fileno()], check=False, timeout=60, stderr=subprocess.PIPE)
    theirs.close()
    with ours:
        said = ours.recv(65536)
    assert done.returncode == 1
    assert json.loads(said[5:]) == {
        "failed": "worker_version",
        "detail": f"{__version__} is installed by now, and 0.0.1 runs: start the new one beside it",
    }


def test_what_is_sent_to_all_of_us_is_the_supervisors_to_obey():
    """A terminal and a service manager tell the whole group to end: then there is a drain, in its order."""
    ours, theirs = socket.socketpair()
    program = "from sidecar.worker import main; main()"
    command = [sys.executable, "-c", program, str(theirs.fileno()), str(os.getpid()), __version__]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        wanted, end = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}, time.monotonic() + 30
        while ignored(process.pid) & wanted != wanted:
            assert time.monotonic() < end
            time.sleep(0.02)
        for one in wanted:
            process.send_signal(one)
        time.sleep(0.1)
        assert process.poll() is None
        ours.close()
        assert process.wait(30) == 1, "whoever started it has ended before it began"
    finally:
        process.kill()
        process.wait()


def ignored(pid: int) -> set[signal.Signals]:
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigIgn:")]
    mask = int(line.split()[1], 16)
    return {one for one in signal.Signals if mask >> (one - 1) & 1}
