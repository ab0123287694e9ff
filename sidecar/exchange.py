"""One request, start to end. READ THIS FIRST.

    plan → inquire → decide → permit → forward → respond → record
                                     └ answer ┘

`Pipeline.handle` is called by the wire with each parsed request and the way back. The program whose pipeline it is (inbound,
outbound) has planned what would be sent, to whom, and what is asked about it (`Attempt`); this file asks, and only here does
an allowing decision become a `Permit`, without which nothing is forwarded. What was decided on is what is sent: the attempt that
was asked about is the one that is forwarded (`forward`), and another transport or target is another attempt and another question.
A program that serves by itself plans an answer of its own (`answer`): it too is given nothing but a permit.

What is too much is refused before anybody is asked: more exchanges at once than the sidecar may have (503), more requests than a
route's bucket has tokens for (429). A route may bound the whole of an exchange (504); without that it lasts as long as
something moves.

A denial is answered with the status that policy named. A decision that cannot be had is an error: 503. Every other failure
becomes the answer of its class (`errors`), as long as none has begun; after that the message is cut short in a way that nobody can
take for its end. Whatever happens, exactly one `Exchange` record is written, and one `Decided` for each question.

This file does no I/O of its own, and knows neither TLS nor OPA nor the programs.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from time import perf_counter
from typing import Protocol

import trio

from sidecar.answer import Answer
from sidecar.attempt import Attempt, Ids, OwnAnswer
from sidecar.errors import ClientFault, NoDecision, Overloaded, PlaintextOnly, SidecarError, UpstreamFault
from sidecar.forward import Forward, Notes
from sidecar.model import (
    Aborted,
    Allow,
    Connection,
    Decided,
    DecisionPoint,
    Deny,
    Direction,
    Exchange,
    LocalProcess,
    Mode,
    Permit,
    Reply,
    Request,
    RequestHead,
    Response,
    Workload,
    maker,
)
from sidecar.wire import answers, headers
from sidecar.wire.client import Client
from sidecar.wire.passing import cut

_decided, _exchange = maker(Decided), maker(Exchange)
_ids = maker(Ids)


class Program(Protocol):
    """What inbound, outbound and whatever answers by itself differ in."""

    @property
    def direction(self) -> Direction: ...

    @property
    def mode(self) -> Mode: ...

    @property
    def via(self) -> bytes:
        """Our entry in `Via`: protocol version and pseudonym."""
        ...

    def attempt(self, connection: Connection, request: Request, ids: Ids) -> Attempt | OwnAnswer:
        """Return what would be sent or answered, and asked. Raises `ClientFault`."""
        ...


class Recorder(Protocol):
    def exchange(self, record: Exchange, /) -> None: ...
    def decided(self, record: Decided, /) -> None: ...


class LiveTable(Protocol):
    """What is open in the whole sidecar: its pipelines share one."""

    def __len__(self) -> int: ...
    def enter(self, exchange_id: str, direction: Direction, /) -> None: ...
    def leave(self, exchange_id: str, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What exchanges may take of us. `idle_timeout`: seconds without a byte of any message after which one is given up;
    `body_timeout`: see `wire.passing`; `max_exchanges`: open at once in the whole sidecar; `max_exchanges_per_peer`: of these, by
    one caller of one listener (the agent beside us is nobody's rival, and has no such bound).
    """

    idle_timeout: float = 3600.0
    body_timeout: float = 60.0
    max_exchanges: int = 4096
    max_exchanges_per_peer: int = 256


class Pipeline:
    """The way of every request of one program."""

    def __init__(
        self,
        *,
        program: Program,
        decisions: DecisionPoint,
        client: Client,
        recorder: Recorder,
        live: LiveTable,
        bounds: Callable[[], Bounds],
        stopwatch: Callable[[], float] = perf_counter,
    ) -> None:
        self.program = program
        self._decisions = decisions
        self._client = client
        self._recorder = recorder
        self._live = live
        self._bounds = bounds
        self._stopwatch = stopwatch
        """Seconds of what is written down. Deadlines are on trio's clock, which costs ten times as much to read."""
        self._by_peer: dict[tuple[str, ...], int] = {}
        """Open exchanges of each caller that has any."""
        prefix = os.urandom(4).hex()
        self._exchange_ids = (f"{prefix}-{number}" for number in count(1))
        self._entropy = _random(24)

    async def handle(self, connection: Connection, request: Request, reply: Reply) -> None:
        """Carry one request from its head to its record. Nothing but cancellation comes out of it."""
        started_at, started = time.time(), self._stopwatch()
        ids = self._ids(request)
        notes = Notes()
        self._live.enter(ids.exchange, self.program.direction)
        try:
            fault = await self._served(connection, request, reply, ids, notes)
            if fault is not None and not reply.started:
                with trio.move_on_after(_unread(self._bounds())):
                    await self._answer_fault(fault, request, reply, ids, notes)
        finally:
            self._live.leave(ids.exchange)
            if notes.error == "cancelled" and reply.gone:
                notes.error = "client_gone"
            seconds = self._stopwatch() - started
            self._recorder.exchange(
                _record(self.program, connection, request.head, reply, ids, notes, started_at, seconds)
            )

    async def _served(
        self, connection: Connection, request: Request, reply: Reply, ids: Ids, notes: Notes
    ) -> SidecarError | None:
        """Serve, and return what went wrong that the client may be told, as long as it has been told nothing."""
        share = None
        try:
            share = self._taken_share(connection)
            await self._serve(connection, request, reply, ids, notes)
        except SidecarError as fault:
            notes.ended("error", fault)
            return fault
        except Aborted as gone:
            notes.ended("aborted", SidecarError(str(gone), code=gone.code))
            return gone.__cause__ if isinstance(gone.__cause__, ClientFault) else None
        except Exception as error:  # noqa: BLE001  (a defect of ours fails this exchange and no other)
            defect = SidecarError(_where(error))
            notes.ended("error", defect)
            return defect
        finally:
            if share is not None:
                self._give_back(share)
        return None

    def _taken_share(self, connection: Connection) -> tuple[str, ...] | None:
        """Take one of the caller's own share: what one of them holds, and does not read, must not be what others wait for.

        Returns whose it is, for `_give_back`; None for the agent, who has no share. Raises `Overloaded`.
        """
        peer = connection.peer
        if isinstance(peer, LocalProcess):
            return None
        # Of texts, since a tuple of them is hashed and compared without a call.
        who = (peer.id.trust_domain, peer.id.path) if isinstance(peer, Workload) else (connection.remote.host,)
        held = self._by_peer.get(who, 0)
        if held >= self._bounds().max_exchanges_per_peer:
            name = peer.id if isinstance(peer, Workload) else connection.remote.host
            raise Overloaded(f"{held} by {name}", code="peer_exchanges_exceeded", public="too many requests at once")
        self._by_peer[who] = held + 1
        return who

    def _give_back(self, who: tuple[str, ...]) -> None:
        if (left := self._by_peer[who] - 1) > 0:
            self._by_peer[who] = left
        else:
            del self._by_peer[who]

    async def _serve(self, connection: Connection, request: Request, reply: Reply, ids: Ids, notes: Notes) -> None:
        bounds = self._bounds()
        if len(self._live) > bounds.max_exchanges:
            raise Overloaded
        notes.attempt = attempt = self.program.attempt(connection, request, ids)
        now = trio.current_time()
        if attempt.bucket is not None:
            attempt.bucket.take(now)
        end = math.inf if attempt.timeout is None else now + attempt.timeout
        while True:
            notes.attempt = attempt
            with trio.CancelScope(deadline=min(now + bounds.idle_timeout, end)) as scope:
                decision = await self._decide(attempt, ids, notes)
                if isinstance(decision, Deny):
                    notes.ended("denied")
                    scope.deadline = min(scope.deadline, trio.current_time() + _unread(bounds))
                    await self._answer(_denied(decision, request.head, ids), reply, ids, notes)
                    return
                if isinstance(attempt, OwnAnswer):
                    given = Answer(
                        request, reply, moved=partial(_postpone, scope, bounds.idle_timeout, end),
                        body_timeout=bounds.body_timeout,
                    )  # fmt: skip
                    permit = _permit(given.request, decision, connection, scope)
                    response = await given.run(permit, attempt.answer)
                    notes.status = response.head.status
                    await reply.send(response)
                else:
                    forward = Forward(
                        permit=_permit(request, decision, connection, scope), attempt=attempt, reply=reply, notes=notes,
                        via=self.program.via, scope=scope, began=now, idle_timeout=bounds.idle_timeout, end=end,
                        body_timeout=bounds.body_timeout, stopwatch=self._stopwatch,
                    )  # fmt: skip
                    try:
                        await forward.run(self._client)
                    except PlaintextOnly as fault:
                        if attempt.step_down is None:
                            raise
                        attempt, now = attempt.step_down(fault), trio.current_time()
                        continue
                notes.ended("allowed")
            if scope.cancelled_caught:
                raise _late(reply, overdue=trio.current_time() >= end)
            return

    async def _decide(self, attempt: Attempt | OwnAnswer, ids: Ids, notes: Notes) -> Allow | Deny:
        began = self._stopwatch()
        decision: Allow | Deny | None = None
        code: str | None = "cancelled"
        try:
            decision = await self._decisions.decide(attempt.inquiry)
            code = None
        except NoDecision as error:
            code = error.code
            raise
        finally:
            seconds = self._stopwatch() - began
            notes.decision = decision
            notes.decision_seconds += seconds
            self._recorder.decided(
                _decided(
                    at=time.time(),
                    exchange_id=ids.exchange,
                    inquiry=attempt.inquiry,
                    decision=decision,
                    error=code,
                    seconds=seconds,
                )
            )
        return decision

    def _ids(self, request: Request) -> Ids:
        """The ids of an exchange: those that its head brings, where they will do."""
        exchange, kept = next(self._exchange_ids), request.kept
        given: tuple[str | None, tuple[str, str] | None] | None = kept.get("ids") if kept is not None else None
        if given is None:
            given = headers.request_id(request.head.fields), headers.traceparent(request.head.fields)
            if kept is not None:
                kept["ids"] = given
        request_id, parent = given
        trace, traceparent = parent or headers.made_traceparent(next(self._entropy))
        return _ids(exchange=exchange, request=request_id or exchange, trace=trace, traceparent=traceparent)

    async def _answer(self, response: Response, reply: Reply, ids: Ids, notes: Notes) -> None:
        """Give an answer of ours. It takes no place among the exchanges: who was refused and does not read would keep out others."""
        self._live.leave(ids.exchange)
        notes.status = response.head.status
        try:
            await reply.send(response)
        except Aborted:
            notes.status = None

    async def _answer_fault(self, fault: SidecarError, request: Request, reply: Reply, ids: Ids, notes: Notes) -> None:
        told = {"request_id": ids.request}
        if notes.decision is not None:
            told["decision_id"] = notes.decision.decision_id
        await self._answer(answers.fault(fault, request_fields=request.head.fields, ids=told), reply, ids, notes)


def _unread(bounds: Bounds) -> float:
    """Seconds for which an answer of ours waits to be read: it is small, and there is nothing behind it."""
    return min(bounds.idle_timeout, bounds.body_timeout)


def _permit(request: Request, allow: Allow, connection: Connection, scope: trio.CancelScope) -> Permit:
    """The only place where a permit is made."""
    peer = connection.peer
    return Permit(
        request=request, allow=allow, peer_generation=connection.generation,
        not_after=peer.not_after if isinstance(peer, Workload) else None,
        lease_until=None if allow.lease is None else trio.current_time() + allow.lease, cancel=scope.cancel,
    )  # fmt: skip


def _postpone(scope: trio.CancelScope, idle_timeout: float, end: float) -> None:
    """Something has moved."""
    scope.deadline = min(trio.current_time() + idle_timeout, end)


def _late(reply: Reply, *, overdue: bool) -> SidecarError | Aborted:
    """What a cancelled exchange has come to. `overdue`: the whole of it took too long, and it need not have been idle."""
    code, reason = ("route_timeout", "it took too long") if overdue else ("exchange_idle", "no byte moved for too long")
    return cut(reason, code) if reply.started else UpstreamFault(reason, code=code, status=504)


def _denied(deny: Deny, head: RequestHead, ids: Ids) -> Response:
    return answers.refusal(
        deny.status, "policy_denied", deny.reason or "denied by policy", request_fields=head.fields,
        ids={"decision_id": deny.decision_id, "request_id": ids.request}, extra=deny.response_headers,
    )  # fmt: skip


def _where(error: Exception) -> str:
    """What went wrong and where, in one line: the innermost error of a group is the one that tells."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f" ({f.filename}:{f.lineno} {f.name})" for f in frame)


def _random(size: int) -> Iterator[bytes]:
    """So many random bytes each time. The system is asked for many at once, since it is the call that costs."""
    while True:
        block = os.urandom(size * 128)
        for at in range(0, len(block), size):
            yield block[at : at + size]


def _record(
    program: Program, connection: Connection, head: RequestHead, reply: Reply, ids: Ids, notes: Notes,
    started_at: float, seconds: float,
) -> Exchange:  # fmt: skip
    attempt, decision = notes.attempt, notes.decision
    upstream = attempt.upstream if attempt is not None else None
    return _exchange(
        exchange_id=ids.exchange,
        connection_id=connection.id,
        request_id=ids.request,
        trace_id=ids.trace,
        direction=program.direction,
        started_at=started_at,
        seconds=seconds,
        peer=connection.peer,
        remote=connection.remote,
        mtls_mode=program.mode,
        tls=connection.tls,
        protocol=head.protocol,
        method=head.method,
        authority=attempt.head.authority if attempt is not None else head.authority,
        path=head.target.path,
        status=notes.status if reply.started else None,
        bytes_sent=reply.bytes_sent,
        outcome=notes.outcome,
        error=notes.error,
        detail=notes.detail,
        decision_id=decision.decision_id if decision is not None else None,
        rule=decision.rule if decision is not None else None,
        reason=decision.reason if decision is not None else None,
        revision=decision.revision if decision is not None else None,
        repeats=decision.repeats if decision is not None else None,
        upstream=upstream.name if upstream is not None else None,
        upstream_id=notes.peer_id,
        upstream_tls=upstream.tls if upstream is not None else None,
        decision_seconds=notes.decision_seconds,
        upstream_seconds=notes.upstream_seconds,
    )
