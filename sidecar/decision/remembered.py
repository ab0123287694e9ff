"""Decisions that are remembered, and questions that are on their way already: OPA is asked once what it need not be asked twice.

    question ──▶ no proof for its entrypoint, or a bundle on its way in ──────────────▶ asked by itself
             ├─▶ its key is kept ────────────────────────────────────────────────────▶ hit: the answer again
             ├─▶ its key is on its way ──▶ waits ──▶ the answer again; if that failed ─▶ asked by itself
             └─▶ a flight of its own ────▶ waits ──▶ the answer, which is kept

Who waits is one thing and what is waited for another: a flight runs in the nursery of this file, in no waiter's task. Whoever is
cancelled leaves, and the flight goes on for the others; when nobody is left it is given up, as a question that was asked by
itself would be. A flight that fails has failed for whoever it was begun for: everybody else asks by himself, for as long as
his own deadline has left, since a deadline, like an overload, is of one question and not of all that are like it.

    flying ──answer──▶ landed     the first who is still there has the answer, the others and all hits repeat it
           ├─error───▶ landed     nothing is kept
           └─nobody──▶ given up   nothing is kept: what nobody was told of could not be repeated by its id

What is kept is of one bundle. When the engine has another one in force (which is looked at with each question) all of it goes,
and a flight that began before keeps nothing; while a bundle is being handed over nothing is looked up and nothing is
kept, and if it is refused, what was kept is good again. An answer that carries another revision than the bundle is
not kept either, however that came about.

To carry and to keep costs a miss about 20 µs, which is lost where nothing comes again. So where hardly any did of the last thousand
questions, only one in sixteen is carried and kept, the others are asked by themselves; that is enough to notice that it pays again.

An OPA that has crashed does not change what its bundle decides: what is kept is repeated while it is started again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from sidecar.decision.cache import Bounds, Cache, Key, KeyOf, key_of, repeated
from sidecar.decision.inquiry import DIRECTIONS
from sidecar.errors import NoDecision
from sidecar.model import CacheUse, Decision, Direction, Inquiry, PolicyBundle

_MAX_IDLE = 64
"""Tasks that wait for a flight to carry: as many as an engine has questions with OPA at once."""
_WINDOW = 1024
"""Misses between two looks at whether it pays."""
_PAYS_ABOVE = 16
"""Questions of a window that came again."""
_SAMPLE = 16
"""One in so many is kept where it does not."""
_NO_ROOM = Bounds(max_entries=0, max_bytes=0)


class Source(Protocol):
    """Who really decides (`engine.Engine`)."""

    decision_timeout: float

    @property
    def in_force(self) -> PolicyBundle | None:
        """The bundle that whatever is asked now is decided by; None while that is not certain."""
        ...

    async def decide(self, inquiry: Inquiry) -> Decision: ...


class Remembered:
    """`model.DecisionPoint`: `source`, asked no more often than need be. Until `run` runs each question is asked by itself.

    `path` names the entrypoint of a direction as the proofs in a bundle do; None where they are not about what is asked. Without
    `bounds` nothing is looked up.
    """

    def __init__(
        self,
        source: Source,
        *,
        path: Callable[[Direction], str] | None,
        bounds: Bounds | None,
        new_id: Callable[[], str] = lambda: os.urandom(16).hex(),
    ) -> None:
        self._source = source
        self._path = path
        self._bounds = bounds
        self._new_id = new_id
        self._term = _Term(None, {}, Cache(bounds or _NO_ROOM))
        self._nursery: trio.Nursery | None = None
        self._idle: list[_Carrier] = []
        self._hits = self._shared = self._misses = self._bypassed = 0
        self._evicted = 0
        """Of the terms before."""
        self._pays = True
        self._look_at = _WINDOW
        """Misses, at which the next look is due."""
        self._came_again = 0
        """Hits and shared answers at the last look."""

    @property
    def use(self) -> CacheUse:
        cache = self._term.cache
        return CacheUse(
            hits=self._hits, shared=self._shared, misses=self._misses, bypassed=self._bypassed,
            evicted=self._evicted + cache.evicted, entries=len(cache), bytes=cache.bytes,
        )  # fmt: skip

    def resize(self, bounds: Bounds | None) -> None:
        """Other bounds from now on."""
        self._bounds = bounds
        self._term.cache.resize(bounds or _NO_ROOM)
        self._term.keys = self._keys(self._term.bundle)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry flights. Ends by cancellation; whoever still waits then has no decision."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def decide(self, inquiry: Inquiry) -> Decision:
        term, in_force = self._term, self._source.in_force
        if term.bundle is not in_force:
            term = self._turned(in_force)
        make_key = term.keys.get(inquiry.direction)
        if in_force is None or make_key is None:
            self._bypassed += 1
            return await self._source.decide(inquiry)
        try:
            key = make_key(inquiry)
            kept = term.cache.find(key)
        except (
            TypeError,
            RecursionError,
        ):  # nothing that JSON can say, which is for whoever writes the question to refuse
            self._bypassed += 1
            return await self._source.decide(inquiry)
        if kept is None:
            return await self._fly(inquiry, key, term)
        now = 0.0
        if kept.ends and (now := trio.current_time()) >= kept.until:
            term.cache.drop(key)
            return await self._fly(inquiry, key, term)
        self._hits += 1
        term.cache.used(key)
        return kept.again(self._new_id(), now)

    # ── a bundle ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _turned(self, in_force: PolicyBundle | None) -> _Term:
        """The term of the bundle that is in force now. While none is for certain the last one is kept, and not asked."""
        if in_force is not None:
            self._evicted += self._term.cache.evicted
            self._term = _Term(in_force, self._keys(in_force), Cache(self._bounds or _NO_ROOM))
        return self._term

    def _keys(self, bundle: PolicyBundle | None) -> Mapping[Direction, KeyOf]:
        if bundle is None or self._path is None or self._bounds is None:
            return {}
        proven = ((direction, bundle.pure.get(self._path(direction))) for direction in DIRECTIONS)
        return {direction: key_of(direction, paths) for direction, paths in proven if paths is not None}

    # ── a question ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _fly(self, inquiry: Inquiry, key: Key, term: _Term) -> Decision:
        flight = term.flights.get(key)
        if flight is not None:
            return await self._join(inquiry, flight)
        self._misses += 1
        nursery = self._nursery
        if nursery is None or not self._worth_keeping():
            return await self._source.decide(inquiry)
        flight = term.flights[key] = _Flight(inquiry, key, term)
        if self._idle:
            self._idle.pop().take(flight)
        else:
            nursery.start_soon(self._carry, _Carrier(flight))
        answer = await flight.landed()
        if isinstance(answer, Exception):
            raise answer
        return flight.told(answer, self._new_id)

    def _worth_keeping(self) -> bool:
        """Whether the miss that was just counted is one to be kept."""
        if self._misses >= self._look_at:
            came_again = self._hits + self._shared
            self._pays = came_again - self._came_again > _PAYS_ABOVE
            self._came_again, self._look_at = came_again, self._misses + _WINDOW
        return self._pays or not self._misses % _SAMPLE

    async def _join(self, inquiry: Inquiry, flight: _Flight) -> Decision:
        self._shared += 1
        until = trio.current_time() + self._source.decision_timeout
        answer = await flight.landed()
        if not isinstance(answer, Exception):
            return flight.told(answer, self._new_id)
        with trio.CancelScope(deadline=until):
            return await self._source.decide(inquiry)
        raise NoDecision("the time was up before OPA could answer", code="decision_timeout")

    async def _carry(self, carrier: _Carrier) -> None:
        """Carry flights, one after another, until others are enough or one is given up."""
        with carrier.scope:
            await self._carried(carrier.flight)
            while len(self._idle) < _MAX_IDLE:
                await carrier.wait(self._idle)  # where a flight was given up when its answer had come: the end, at once
                await self._carried(carrier.flight)

    async def _carried(self, flight: _Flight) -> None:
        term = flight.term
        answer: Decision | Exception = NoDecision("the sidecar is ending", code="decision_unreachable")
        try:
            answer = await self._source.decide(flight.inquiry)
        except Exception as error:  # noqa: BLE001  (a defect of ours too fails the question that met it, and no other)
            answer = error
        finally:
            if term.flights.get(flight.key) is flight:
                del term.flights[flight.key]
            if not isinstance(answer, Exception) and flight.waiting and self._may_keep(answer, term):
                term.cache.keep(flight.key, answer, trio.current_time())
            flight.land(answer)

    def _may_keep(self, answer: Decision, term: _Term) -> bool:
        bundle = term.bundle
        current = self._term is term and bundle is not None and self._source.in_force is bundle
        return current and bundle is not None and answer.revision == bundle.revision


@dataclass(slots=True, eq=False)
class _Term:
    """What belongs to one bundle, for as long as it is in force."""

    bundle: PolicyBundle | None
    keys: Mapping[Direction, KeyOf]
    cache: Cache
    flights: dict[Key, _Flight] = field(default_factory=dict)


class _Flight:
    """One question on its way, and the tasks that wait for its answer."""

    __slots__ = ("_answer", "_original_told", "carrier", "inquiry", "key", "term", "waiting")

    def __init__(self, inquiry: Inquiry, key: Key, term: _Term) -> None:
        self.inquiry = inquiry
        self.key = key
        self.term = term
        self.carrier: _Carrier
        self.waiting: dict[trio.lowlevel.Task, None] = {}
        self._answer: Decision | Exception
        self._original_told = False

    async def landed(self) -> Decision | Exception:
        """Wait for the answer. Whoever is cancelled leaves; the last one to leave has the flight given up."""
        task = trio.lowlevel.current_task()

        def leave(_: Any) -> trio.lowlevel.Abort:
            del self.waiting[task]
            if not self.waiting:
                self._give_up()
            return trio.lowlevel.Abort.SUCCEEDED

        self.waiting[task] = None
        await trio.lowlevel.wait_task_rescheduled(leave)
        return self._answer

    def land(self, answer: Decision | Exception) -> None:
        self._answer = answer
        for task in self.waiting:
            trio.lowlevel.reschedule(task)
        self.waiting.clear()

    def told(self, decision: Decision, new_id: Callable[[], str]) -> Decision:
        """The answer for one of those who waited. The first has it with its own id, which is thereby in the log."""
        if self._original_told:
            return repeated(decision, new_id())
        self._original_told = True
        return decision

    def _give_up(self) -> None:
        if self.term.flights.get(self.key) is self:
            del self.term.flights[self.key]
        self.carrier.scope.cancel()


class _Carrier:
    """A task that carries flights. To begin one costs more than to wake one."""

    __slots__ = ("_task", "flight", "scope")

    def __init__(self, flight: _Flight) -> None:
        self.scope = trio.CancelScope()
        self._task: trio.lowlevel.Task | None = None
        self._carry(flight)

    def take(self, flight: _Flight) -> None:
        """Wake it, with this."""
        assert self._task is not None  # noqa: S101  (it is among the idle ones)
        self._carry(flight)
        trio.lowlevel.reschedule(self._task)

    async def wait(self, idle: list[_Carrier]) -> None:
        """Wait among the idle ones until it is given another flight."""

        def leave(_: Any) -> trio.lowlevel.Abort:
            idle.remove(self)  # at once: nobody may be given to a task that is about to end
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        idle.append(self)
        await trio.lowlevel.wait_task_rescheduled(leave)

    def _carry(self, flight: _Flight) -> None:
        self.flight = flight
        flight.carrier = self
