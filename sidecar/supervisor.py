"""Workers: several processes that carry the requests of one sidecar, and the one that sees to it that they do.

This process owns everything that there is once: the listening sockets, the identity files, the relay and OPA, the health port,
the logs, the line of succession. It carries no request. A worker has what it needs for that and owns nothing, so that it can
end at any moment and be replaced:

    sockets    one for each worker and address (`wire.queues`), bound here and open here for as long as we live. What waits in
               the queue of a worker that has ended is taken by another one at once, until there is a new one
    identity   read and checked here, handed over in memory, whole
    policy     one OPA, which workers ask over its unix socket. When another one takes over they are told which it is and what it
               runs, and the one before ends when the last of them has done with it (`Borrowers`)
    reload     prepared by all; then applied by all, or by none
    records    counted by each and added up here; lines of logs are written here, whole

Who does not answer is killed, who has ended is started again (`workers`), and none of them outlives us. They run in a fresh
interpreter each: a fork would take along an event loop, threads and descriptors that it could not use.
"""

from __future__ import annotations

import errno
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Literal, TypeAlias

import trio

from sidecar import orders, parts
from sidecar.config import Config
from sidecar.decision.external import External
from sidecar.errors import OperatorFault
from sidecar.identity import presented
from sidecar.identity.current import Current
from sidecar.intake import Intake
from sidecar.keeping import Keeping
from sidecar.log import LineSink
from sidecar.model import CacheUse, Identity
from sidecar.records.added import added, ended
from sidecar.records.exposition import Family, counter, gauge
from sidecar.supply import Supply
from sidecar.wire.listening import Listener
from sidecar.wire.queues import Queues
from sidecar.worker_process import Process, Worker
from sidecar.workers import DEFAULT_TIMING, STATES, Action, Happening, Timing, assigned

Side: TypeAlias = Literal["inbound", "outbound", "both"]
_FRESH_TIMEOUT = 0.5
_END_TIMEOUT = 2.0
_MAX_FALSE_STARTS = 3
"""Before a start of the sidecar counts as failed."""
_NOT_TRAFFIC = frozenset({"health.listen"})


class Crew:
    """`app.Hands` by workers. `event(name, level, **fields)` is told what becomes of them."""

    def __init__(
        self,
        config: Config,
        *,
        current: Current,
        decisions: Supply | External,
        keeping: Keeping | None,
        access: LineSink | None,
        event: Callable[..., None],
        pseudonym: str,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._config = config
        self._prepared: Config | None = None
        self._current = current
        self._identity: Identity | None = None
        """The last that TLS can be spoken with."""
        self._decisions = decisions
        self._keeping = keeping
        self._intake = Intake(decisions=decisions, keeping=keeping, access=access)
        self._event = event
        self._pseudonym = pseudonym
        self._timing = timing
        self._offered = False
        self._sample = 0.0
        self._lending = decisions.lending
        self._accepting = False
        self._leaving = False
        self._found: Mapping[str, Listener] = {}
        self._let_go: set[str] = set()
        """Of these, what each worker empties for itself."""
        self._numbers = itertools.count(1)
        self._departed: list[Family] = []
        self._departed_cache = CacheUse()
        self._changed = trio.Event()
        self._workers = [Worker(number, timing) for number in range(config.workers)]
        if isinstance(decisions, Supply):
            decisions.lend_to(self)

    # ── what the sidecar asks for (`app.Hands`) ───────────────────────────────────────────────────────────────────

    @property
    def accepts(self) -> bool:
        return self._accepting and bool(self._ready)

    @property
    def open_connections(self) -> int:
        return sum(one.open_connections for one in self._workers)

    async def open(self, nursery: trio.Nursery, found: Mapping[str, Listener]) -> None:
        self._identity = self._current.identity
        self._found = {key: one for key, one in found.items() if key not in _NOT_TRAFFIC}
        for one in self._workers:
            nursery.start_soon(self._keep, one)
        nursery.start_soon(self._look_after)
        nursery.start_soon(self._follow_identity)

    async def accept(self, _nursery: trio.Nursery) -> None:
        while len(self._ready) < len(self._workers):
            if fault := next((one.refused for one in self._workers if one.refused is not None), None):
                raise fault
            if failed := next((one for one in self._workers if one.life.restarts > _MAX_FALSE_STARTS), None):
                raise OperatorFault(f"worker {failed.number} {failed.fate}", code="worker_not_started")
            await self._changed.wait()
        try:
            for listener in self._found.values():
                if isinstance(listener, Queues):
                    listener.begin()
        except OSError as error:
            raise OperatorFault(f"a socket cannot listen: {error.strerror}", code="listen_refused") from error
        self._accepting = True
        self._deal_out()

    async def prepare(self, new: Config) -> None:
        prepared = parts.share(new)
        number = next(self._numbers)
        answers = await self._ordered(orders.Prepare(number=number, config=prepared), number)
        for one, answer in answers.items():
            if answer is None:
                raise OperatorFault(f"worker {one.number} did not answer", code="worker_silent")
            if answer:
                raise OperatorFault(f"worker {one.number}: {answer[1]}", code=answer[0])
        self._prepared = new

    async def apply(self) -> None:
        if self._prepared is None:
            return
        self._config, self._prepared = self._prepared, None
        self._identity = self._current.identity
        number = next(self._numbers)
        order = orders.Apply(number=number, config=parts.share(self._config), identity=self._identity)
        await self._ordered(order, number)

    async def abandon(self) -> None:
        self._prepared = None
        self._broadcast(orders.Abandon())

    async def finish(self, side: Side) -> None:
        """First nobody holds a queue but the one worker that empties it, and then it is emptied: what came to a queue that is
        open somewhere, and that nobody accepts from, would wait in vain.
        """
        if not self._leaving:
            # Who does not answer is found stuck and ended while others still hold his queue, and take it.
            number = next(self._numbers)
            await self._ordered(orders.Tell(number=number), number)
            self._leaving = True
            for one in self._workers:
                if one.life.state != "ready":
                    self._happened(one, "dismissed")
        let_go = {key for key in self._found if side == "both" or key.startswith(side)}
        self._let_go |= let_go
        number = next(self._numbers)
        await self._ordered(orders.LetGo(number=number, side=side), number)
        for key in let_go:
            self._found[key].close()
        number = next(self._numbers)
        await self._ordered(orders.Finish(number=number, side=side), number, patient=True)

    async def stop(self) -> None:
        """End all of them: what is open is cut off, what was counted and written is taken in."""
        if not self._found:
            return
        self._leaving = True
        with trio.move_on_after(_END_TIMEOUT, shield=True):
            self._broadcast(orders.Stop())
            for one in self._workers:
                self._happened(one, "dismissed")
            while any(one.life.state != "gone" for one in self._workers):
                await self._changed.wait()

    # ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────

    async def refresh(self) -> None:
        """Have them tell what they have measured by now; who takes too long is taken as he was."""
        number = next(self._numbers)
        with trio.move_on_after(_FRESH_TIMEOUT):
            await self._ordered(orders.Tell(number=number), number)

    @property
    def measured(self) -> Iterable[Iterable[Family]]:
        states = Counter(one.life.state for one in self._workers)
        yield (
            gauge("sidecar_workers", "Workers, by where they stand.", ("state",), {(one,): states[one] for one in STATES}),
            counter(
                "sidecar_worker_restarts", "How often a worker was replaced.", (),
                {(): sum(one.life.restarts for one in self._workers)},
            ),
        )  # fmt: skip
        yield self._departed
        for one in self._workers:
            yield one.measured

    @property
    def cache_use(self) -> CacheUse | None:
        if isinstance(self._decisions, External):
            return None
        return _sum([self._departed_cache, *(one.cache for one in self._workers)])

    # ── what whoever keeps OPA asks for (`decision.engine.Borrowers`) ─────────────────────────────────────────────

    def offered(self, on_its_way: bool) -> None:
        self._offered = on_its_way
        self._broadcast(orders.Offered(on_its_way=on_its_way))

    async def changed_over(self) -> None:
        self._lending = self._decisions.lending
        if self._lending is not None:
            number = next(self._numbers)
            await self._ordered(
                orders.Lend(number=number, lending=self._lending), number,
                timeout=self._timing.answer_timeout + self._config.timeouts.decision,
            )  # fmt: skip

    # ── one worker ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self, one: Worker) -> None:
        """Start it, hear it, and when it has ended start another one in its place."""
        while one.life.state != "gone":
            try:
                with self._started(one):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(one.channel.run)
                        await self._hear(one)
                        # It has closed its end of the channel, which it does last.
                        with trio.move_on_after(_END_TIMEOUT):
                            await trio.lowlevel.wait_readable(one.pidfd)
                        one.kill()
                        await trio.lowlevel.wait_readable(one.pidfd)
                        nursery.cancel_scope.cancel()
            except OSError as error:
                one.fate = f"cannot be started: {error.strerror}"
            self._end(one)
            if self._leaving and one.life.state == "ended":
                self._happened(one, "dismissed")
            if one.life.state == "ended":
                await trio.sleep(one.life.backoff(trio.current_time()))
                if one.life.state == "ended":
                    self._happened(one, "waited")

    def _started(self, one: Worker) -> Process:
        sockets = {key: tuple(queue.fileno() for queue in of.queues) for key, of in self._found.items()}
        descriptors = [descriptor for of in sockets.values() for descriptor in of]
        if min(descriptors, default=0) < 0:
            raise OSError(errno.EBADF, "its sockets are closed")
        process = Process(one, descriptors)
        one.life.started(trio.current_time())
        one.send(
            orders.Begin(
                worker=one.number, config=parts.share(self._config), pseudonym=self._pseudonym,
                labels=self._keeping.labels if self._keeping is not None else {}, identity=self._identity,
                lending=self._lending, offered=self._offered, sockets=sockets, sample=self._sample,
            )
        )  # fmt: skip
        return process

    async def _hear(self, one: Worker) -> None:
        while True:
            try:
                kind, payload = await one.channel.receive()
                one.life.heard()
                if self._intake.take(one, kind, payload):
                    self._event("worker.started", "info", worker=one.number, pid=one.pid)
                    self._happened(one, "ready")
            except EOFError:
                return
            except Exception as error:  # noqa: BLE001  it listens to strangers: whatever it says is its own end, and never ours
                self._event("worker.misunderstood", "error", worker=one.number, pid=one.pid, detail=str(error))
                one.kill()
                return

    def _end(self, one: Worker) -> None:
        self._departed = added((self._departed, ended(one.measured)))
        self._departed_cache = _sum([self._departed_cache, _kept_no_more(one.cache)])
        one.forget()
        if not self._leaving:
            why = one.refused.detail if one.refused is not None else one.fate
            self._event("worker.ended", "error", worker=one.number, pid=one.pid, reason=why, restarts=one.life.restarts)
        self._happened(one, "exited")

    def _happened(self, one: Worker, happening: Happening) -> None:
        self._act(one, one.life.happened(happening))
        self._changed.set()
        self._changed = trio.Event()

    def _act(self, one: Worker, action: Action) -> None:
        match action:
            case "kill":
                if not self._leaving:
                    self._event("worker.stuck", "error", worker=one.number, pid=one.pid)
                one.kill()
            case "serve" | "replace":
                self._deal_out()

    # ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _ready(self) -> list[Worker]:
        return [one for one in self._workers if one.life.state == "ready"]

    def _deal_out(self) -> None:
        """Tell each from which queues it accepts now. While one side is drained, the other one still has its callers."""
        if not self._accepting:
            return
        ready = self._ready
        of = {
            key: assigned(len(listener.queues), len(self._workers), [one.number for one in ready])
            for key, listener in self._found.items()
            if key not in self._let_go
        }
        for one in ready:
            one.send(orders.Serve(queues={key: mine[one.number] for key, mine in of.items()}))

    def _broadcast(self, order: orders.Order) -> None:
        """To all that are there: one that is still starting obeys when it has started, before it is told to serve."""
        for one in self._workers:
            if one.life.state in {"starting", "ready", "leaving"}:
                one.send(order)

    async def _ordered(
        self, order: orders.Order, number: int, *, timeout: float | None = None, patient: bool = False
    ) -> Mapping[Worker, Sequence[str] | None]:
        """Give an order to all; return, for each that was ready and has not ended since, with what it was refused: nothing where
        it was obeyed, None where there was no answer in time. `patient`: however long it takes.
        """
        waiting = {one: one.expect(number) for one in self._ready}
        self._broadcast(order)
        with trio.move_on_after(math.inf if patient else timeout or self._timing.answer_timeout):
            for answer in waiting.values():
                await answer.come.wait()
        return {one: answer.refused for one, answer in waiting.items() if not answer.ended}

    async def _look_after(self) -> None:
        """Ask each how it is, and tell it what has changed in what it was lent."""
        while True:
            await trio.sleep(self._timing.interval)
            lending, sample = self._decisions.lending, self._wanted()
            if lending is not None and lending != self._lending:
                self._lending = lending
                self._broadcast(orders.Lend(number=next(self._numbers), lending=lending))
            if sample != self._sample:
                self._sample = sample
                self._broadcast(orders.Compare(sample=sample))
            number = next(self._numbers)
            for one in self._workers:
                self._act(one, one.life.ask(trio.current_time()))
                if one.life.state in {"ready", "leaving"}:
                    one.send(orders.Tell(number=number))

    def _wanted(self) -> float:
        shadow = self._decisions.shadow if isinstance(self._decisions, Supply) else None
        return shadow.wanted if shadow is not None else 0.0

    async def _follow_identity(self) -> None:
        async for identity in self._current.snapshots():
            try:
                presented.check(identity)
            except OperatorFault:
                continue  # told by whoever follows it here; they stay with what they have
            self._identity = identity
            self._broadcast(orders.Present(identity=identity))


def _sum(uses: Iterable[CacheUse]) -> CacheUse:
    uses = list(uses)
    return CacheUse(**{one.name: sum(getattr(use, one.name) for use in uses) for one in fields(CacheUse)})


def _kept_no_more(use: CacheUse) -> CacheUse:
    return CacheUse(hits=use.hits, shared=use.shared, misses=use.misses, bypassed=use.bypassed, evicted=use.evicted)
