"""Questions that wait for OPA anyway, asked in one query.

As long as few questions are with OPA, each is asked at once and by itself, as if this file were not there. When there are
`ENOUGH` already, what comes waits until one of them has its answer, and goes together with what waits by then, up to
`max_together`; what comes meanwhile goes together in the next query, until few wait again. Where many have waited lately, what
comes in one turn of the event loop goes together at its end. Nobody ever waits for more to come. A query costs OPA as much as
the evaluation of a decision or two, before anything is evaluated; that is what is saved.

    arrives ──few are with OPA──────────────────────────────────────────▶ asked alone ──▶ answered
       └──enough are──▶ waits ──a query has ended, few wait──────────────▶ asked alone
                          ├──a query has ended, many wait──▶ together ──┬─▶ answered
                          │                                             └─the query failed─▶ asked alone, and watched
                          └──out of patience, or nothing is shared───────▶ asked alone, and watched

Nobody may be harmed by whom it shares with. Whoever waits does so in its own task, with its own cancellation, and no longer
than its patience (`restraint`); then it is asked alone, within what is left of its time. A query that fails as a whole (one of
its questions meets rules in conflict, or a builtin that fails, or is answered at too great a length) says nothing about any:
each is asked alone. Who fails alone, or is still waiting for long after others have their answers, is kept out for a while; so
is who leaves before it can be known, or nobody who is cancelled in time could ever be blamed. And whatever goes wrong here
ends the sharing for all, for a second, and for longer if it happens again soon: all are asked alone then, which is what
happens without this file. A query that nobody waits for any more is given up at once: it would hold up who comes next.

An answer is what the question would have got alone: the bundle says, signed, of which entrypoints that holds (`batch`), and
`warm_up` compares before the first is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import trio

from sidecar.decision import inquiry as contract
from sidecar.decision.opa import WARM_UP_TIMEOUT, Opa
from sidecar.decision.restraint import Restraint
from sidecar.decision.waiting import Alone, Query, Tally, Waiting
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Direction, Inquiry

MAX_TOGETHER = 16
"""More cost as much each as 16 do, and make the first wait for the last."""
ENOUGH = 4
"""Questions with OPA one by one, from which on others wait. To wait and then to be asked alone would cost, and save nothing."""
CROWDED = 2
"""The same where many have waited lately; and what comes while fewer are with OPA goes at the end of the event loop's turn,
with all else that has come in it. Not 1: a slow question would hold up all."""
CALM = 16
"""Times in a row that only few wait, after which it is not crowded any more."""
FEW = 2
"""Questions that wait, which are asked one by one all the same."""
_MAX_BYTES_TOGETHER = 1 << 16
_MAX_BYTES_SHARED = 1 << 13
"""A longer question is asked alone: the others would pay for its parsing."""
_LOOK_INTERVAL = 0.01
"""Seconds between two looks for who has lost patience."""


_IN_ITS_TURN: Final = Alone.IN_ITS_TURN
_PAUSED: Final = Alone.PAUSED
_SUSPECT: Final = Alone.SUSPECT
_IMPATIENT: Final = Alone.IMPATIENT


class Sharing:
    """`decide` as that of `opa`, for the same questions with the same answers, at less cost where many wait.

    `batch` are the entrypoints of which the bundle says that they may be shared; nothing is before `warm_up`. `nursery` is where
    shared queries run, so that they are nobody's; it has to outlive the last question, or `close` has to be called. `tally` is
    where it counts.
    """

    def __init__(
        self,
        opa: Opa,
        nursery: trio.Nursery,
        batch: Iterable[str],
        *,
        max_together: int = MAX_TOGETHER,
        enough: int = ENOUGH,
        few: int = FEW,
        tally: Tally | None = None,
    ) -> None:
        self.opa = opa
        self.tally = tally if tally is not None else Tally()
        self._nursery = nursery
        offered = frozenset(batch)
        self._offered = [one for one in contract.DIRECTIONS if contract.OURS.path(one) in offered]
        self._max_together = max_together
        self._enough = enough
        self._crowded = False
        """Whether many have waited lately."""
        self._calm = 0
        self._few = min(few, max_together - 1)
        self._restraint = Restraint()
        self._alone = 0
        """Questions with OPA one by one."""
        self._sharing = False
        """Whether a shared query is with OPA."""
        self._era = 0
        """What is with OPA since an earlier one does not count: it kept others waiting for too long."""
        self._queues: dict[Direction, deque[Waiting]] = {}
        """For each direction that is shared; the one served last comes last."""
        self._queued = 0
        """In all queues, also those who have left meanwhile."""
        self._carried: list[Waiting] = []
        """What went together last; those who are answered do not wait any more."""
        self._query: Query | None = None
        """What they went in, while it is with OPA."""
        self._gathers = False
        """Whether somebody is about to ask for all who come in this turn of the event loop."""
        self._parked: trio.lowlevel.Task | None = None
        """Who asks for several, while there is nothing to ask."""
        self._watching = False
        self._ended = 0.0
        """When the last query did."""
        self._first_answer: float | None = None
        """When the first of those who were sent away last was answered."""
        self._present = 0
        """Tasks that wait, or that have waited and are asked alone."""
        self._gone: trio.Event | None = None
        """Set when they have gone; there is one only where somebody waits for that."""

    def __repr__(self) -> str:
        return f"<Sharing of {sorted(self._queues)}: {len(self._carried)} asked together, {self._queued} wait>"

    async def warm_up(self) -> None:
        """Have all compiled, and see that the rule says what is said to the same question alone; else share nothing.

        In a direction where the question that stands for none has no answer of its own, together it must have none either.
        """
        await self.opa.warm_up()
        for direction in self._offered:
            question = contract.sample(direction)
            body = self.opa.question(question)
            try:
                said = await self.opa.decide_together(direction, [body, body], WARM_UP_TIMEOUT)
            except NoDecision:
                continue
            try:
                alone: Decision | NoDecision = await self.opa.decide(question, WARM_UP_TIMEOUT, body=body)
            except NoDecision as error:
                alone = error
            if all(_same(one, alone) for one in said):
                self._queues[direction] = deque()

    async def decide(self, inquiry: Inquiry, decision_timeout: float) -> Decision:
        """Raises as `Opa.decide` does."""
        if inquiry.direction not in self._queues:
            return await self.opa.decide(inquiry, decision_timeout)
        if self._restraint.any and self._restraint.forbids(inquiry, trio.current_time()):
            return await self._apart(inquiry, decision_timeout, None)
        if self._sharing or self._crowded or self._alone >= self._enough:
            return await self._decide_later(inquiry, decision_timeout)
        self._alone += 1
        return await self._by_itself(inquiry, decision_timeout, None, self._era)

    async def aclose(self) -> None:
        """Wait until nobody waits any more, then as `Opa.aclose`. Nothing may be asked any more."""
        try:
            if self._present:
                self._gone = trio.Event()
                await self._gone.wait()
            await self.opa.aclose()
        finally:
            self.close()

    def close(self) -> None:
        self._stop()
        self.opa.close()

    # ── alone ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_itself(self, inquiry: Inquiry, timeout: float, body: bytes | None, era: int) -> Decision:
        """Ask it, counted in this era, and see to those who wait when it has ended."""
        left = True
        try:
            decision = await self.opa.decide(inquiry, timeout, body=body)
            left = False
        except NoDecision as error:
            left = False
            self._spoils(inquiry, error)
            raise
        finally:
            if era != self._era:
                self._slow(inquiry, timeout, left=left)
            else:
                self._alone -= 1
                if self._queued:
                    self._ended = trio.current_time()
                    if not self._sharing:
                        self._go_on()
        return decision

    async def _apart(self, inquiry: Inquiry, timeout: float, body: bytes | None) -> Decision:
        """Ask it, whatever becomes of others."""
        try:
            return await self.opa.decide(inquiry, timeout, body=body)
        except NoDecision as error:
            self._spoils(inquiry, error)
            raise

    async def _sent_away(self, inquiry: Inquiry, timeout: float, body: bytes, *, suspect: bool) -> Decision:
        """Ask one of those for whom sharing has gone wrong, and see whether it is their fault."""
        left = suspect
        try:
            decision = await self.opa.decide(inquiry, timeout, body=body)
            left = False
        except NoDecision as error:
            left = False
            self._spoils(inquiry, error)
            raise
        finally:
            self._slow(inquiry, timeout, left=left)
        if self._first_answer is None:
            self._first_answer = trio.current_time()
        return decision

    # ── together ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _decide_later(self, inquiry: Inquiry, timeout: float) -> Decision:
        began = trio.current_time()
        body = self.opa.question(inquiry)
        if len(body) > _MAX_BYTES_SHARED:
            return await self.opa.decide(inquiry, timeout, body=body)
        self._present += 1
        try:
            waiting = Waiting(inquiry, body, began, timeout)
            self._queues[inquiry.direction].append(waiting)
            self._queued += 1
            if self._may_gather() and not self._gathers:
                self._gathers = True
                self._begin()
            if not self._watching:
                self._watching = True
                self._nursery.start_soon(self._watch)
            await trio.lowlevel.wait_task_rescheduled(waiting.leave)
            said = waiting.said
            if type(said) is Allow or type(said) is Deny:
                return said
            if isinstance(said, NoDecision):
                raise said
            now = trio.current_time()
            if said is _IN_ITS_TURN:
                return await self._by_itself(inquiry, began + timeout - now, body, waiting.era)
            if said is _IMPATIENT:  # which is nobody's fault, and least of all its own
                return await self._apart(inquiry, began + timeout - now, body)
            return await self._sent_away(inquiry, began + timeout - now, body, suspect=said is _SUSPECT)
        finally:
            self._present -= 1
            if self._gone is not None and not self._present:
                self._gone.set()

    async def _watch(self) -> None:
        """See to it that nobody waits beyond its patience: one look-out costs less than a cancel scope for each.

        Where query after query ends there is merely much to do, and who has waited for too long goes by itself. Where none
        does, what is with OPA holds up all.
        """
        try:
            while self._queued:
                await trio.sleep(_LOOK_INTERVAL)
                now = trio.current_time()
                for queue in self._queues.values():
                    for one in queue:
                        if now - one.since >= self._restraint.longest(one.timeout):
                            one.wake(_IMPATIENT)
                        elif now - max(one.since, self._ended) >= self._restraint.patience(one.timeout):
                            self._stop_for_a_while(now)
                            break
        finally:
            self._watching = False

    async def _carry(self) -> None:
        """Ask `_carried` together, then those who wait by then, as long as there are several; then wait for more."""
        try:
            while True:
                if self._gathers:
                    self._gathers = False
                    if self._may_gather():
                        self._next()
                while self._carried:
                    era = self._era
                    await self._ask_together(self._carried)
                    if era != self._era or not self._next():
                        break
                if self._gathers:
                    continue
                if self._parked is not None or not self._queues:
                    return  # its query was given up: another task has come to ask the next, or there is none
                self._parked = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._leave)
        except trio.Cancelled:
            self._stop()  # nobody else would ask them
            raise

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        self._parked = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _ask_together(self, chosen: list[Waiting]) -> None:
        group = [one for one in chosen if one.task is not None]  # some may have left since
        if not group:
            return
        self.tally.queries += 1
        self.tally.together += len(group)
        era, began = self._era, trio.current_time()
        limit = min(self._restraint.patience(one.timeout) for one in group)
        query = self._query = Query(group)
        said: list[Decision | NoDecision] | None = None
        try:
            with query.scope:
                said = await self.opa.decide_together(group[0].inquiry.direction, [one.body for one in group], limit)
        except Exception as error:  # noqa: BLE001  (a defect of ours too: who meets it alone has it for itself)
            if isinstance(error, NoDecision) and error.code == "decision_timeout":
                self._restraint.took(limit)
            self._has_failed(group)
            return
        finally:
            if self._query is query:
                self._query = None
        now = trio.current_time()
        took = now - began
        if said is not None:
            for one, answer in zip(group, said, strict=True):
                one.wake(answer)
            self._restraint.took(took)
            pays = self._restraint.pays(took / len(group))
        elif era != self._era:
            self._restraint.took(took)
            self._has_failed(group)
            return
        else:
            self.tally.abandoned += 1
            pays = True
            if self._restraint.overdue(took):
                for one in group:
                    self._keep_out(one.inquiry)
        self._ended = now
        if not pays:
            self._stop_for_a_while(now)

    def _has_failed(self, group: list[Waiting]) -> None:
        """A query has, and what it says of those who were in it is nothing. Who has left will not be asked alone, and so not known."""
        self.tally.failed += 1
        self._stop_for_a_while(trio.current_time())
        for one in group:
            if one.left:
                self._keep_out(one.inquiry)
            one.wake(_SUSPECT)  # where it was stopped already, for something else

    def _go_on(self) -> None:
        """A question that was asked by itself has its answer, and others wait."""
        if self._next() and not self._gathers:
            self._begin()

    def _may_gather(self) -> bool:
        """Whether what has come need not wait for what is with OPA, but for the end of the turn only."""
        return self._crowded and not self._sharing and self._alone < min(CROWDED, self._enough)

    def _begin(self) -> None:
        """Have somebody ask: who did so before, or another."""
        if self._parked is None:
            self._nursery.start_soon(self._carry)
        else:
            self._unparked()

    def _unparked(self) -> None:
        carrier, self._parked = self._parked, None
        if carrier is not None:
            trio.lowlevel.reschedule(carrier)

    def _next(self) -> bool:
        """A query has ended. Whether several go together in the next; if few wait, they are told to go by themselves."""
        group = self._group()
        self._sharing = len(group) > self._few
        if self._sharing:
            self._crowded, self._calm = True, 0
            self._carried = group
            return True
        self._calm += 1
        if self._calm >= CALM:
            self._crowded = False
        self._carried = []
        for one in group:
            one.era = self._era
            one.wake(_IN_ITS_TURN)
        self._alone += len(group)
        return False

    def _group(self) -> list[Waiting]:
        """Take those out of a queue who go next, in the order in which they came; no direction twice while others wait."""
        group: list[Waiting] = []
        size = 0
        for direction, queue in self._queues.items():
            while queue and len(group) < self._max_together:
                first = queue[0]
                if first.task is not None:
                    size += len(first.body)
                    if group and size > _MAX_BYTES_TOGETHER:
                        break
                    group.append(first)
                queue.popleft()
                self._queued -= 1
            if group:
                self._queues[direction] = self._queues.pop(direction)  # it comes last, next time
                break
        return group

    # ── what went wrong ───────────────────────────────────────────────────────────────────────────────────────────

    def _stop_for_a_while(self, now: float) -> None:
        if self._restraint.pause(now):
            self.tally.pauses += 1
            self._release()

    def _stop(self) -> None:
        self._release()
        self._queues = {}
        self._unparked()

    def _release(self) -> None:
        """Let all who wait be asked alone, and wait for nothing that is with OPA."""
        self._era += 1
        self._alone = 0
        self._sharing = False
        self._first_answer = None
        for queue in self._queues.values():
            for one in queue:
                one.wake(_PAUSED)
            queue.clear()
        for one in self._carried:
            one.wake(_SUSPECT)
        if self._query is not None:
            self._query.scope.cancel()
        self._carried = []
        self._queued = 0

    def _spoils(self, inquiry: Inquiry, error: NoDecision) -> None:
        """Keep it out if what it meets alone would have ended a query of several."""
        if error.code == "decision_too_large" or error.code.startswith("decision_status_"):
            self._keep_out(inquiry)

    def _slow(self, inquiry: Inquiry, timeout: float, *, left: bool) -> None:
        """Keep it out if it has kept others waiting, or has `left` when they had answers and it had none. Where OPA stood still, or
        has too much to do, they have no answers either.
        """
        first = self._first_answer
        if first is not None and (left or trio.current_time() - first >= self._restraint.patience(timeout)):
            self._keep_out(inquiry)

    def _keep_out(self, inquiry: Inquiry) -> None:
        self.tally.kept_out += 1
        self._restraint.keep_out(inquiry, trio.current_time())


def _same(one: Decision | NoDecision, other: Decision | NoDecision) -> bool:
    """Whether two answers differ in nothing but their ids."""
    if isinstance(one, NoDecision) or isinstance(other, NoDecision):
        return isinstance(one, NoDecision) and isinstance(other, NoDecision) and one.code == other.code
    fields = [name for name in one.__slots__ if name != "decision_id"]
    return type(one) is type(other) and all(getattr(one, name) == getattr(other, name) for name in fields)
