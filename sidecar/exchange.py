"""One request, start to end. READ THIS FIRST.

    plan → inquire → decide → permit → forward → respond → record

`Pipeline.handle` is called by the wire with each parsed request and the way back. The program whose pipeline it is (inbound,
outbound) has planned what would be sent, to whom, and what is asked about it (`Attempt`); this file asks, and only here does
an allowing decision become a `Permit`, without which nothing is forwarded. What was decided on is what is sent: the attempt that
was asked about is the one that is forwarded, and another transport or target is another attempt and another question.

A denial is answered with the status that policy named. A decision that cannot be had is an error: 503. Every other failure
becomes the answer of its class (`errors`), as long as none has begun; after that the message is cut short in a way that nobody can
take for its end. Whatever happens, exactly one `Exchange` record is written, and one `Decided` for each question.

This file does no I/O of its own, and knows neither TLS nor OPA nor the programs.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from itertools import count
from time import perf_counter
from typing import Protocol

import trio

from sidecar.attempt import Attempt, Ids
from sidecar.errors import ClientFault, NoAnswer, NoDecision, NotSent, PlaintextOnly, SidecarError, UpstreamFault
from sidecar.model import (
    Aborted,
    Allow,
    Body,
    ByteStream,
    Connection,
    Data,
    Decided,
    DecisionPoint,
    Deny,
    Direction,
    Exchange,
    ExchangeOutcome,
    Fields,
    Mode,
    Permit,
    Reply,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    Trailers,
    Workload,
)
from sidecar.wire import answers, headers
from sidecar.wire.client import Client, UpstreamStream


class Program(Protocol):
    """What inbound and outbound differ in."""

    @property
    def direction(self) -> Direction: ...

    @property
    def mode(self) -> Mode: ...

    @property
    def via(self) -> bytes:
        """Our entry in `Via`: protocol version and pseudonym."""
        ...

    def attempt(self, connection: Connection, request: Request, ids: Ids) -> Attempt:
        """Return what would be sent and asked. Raises `ClientFault`."""
        ...


class Recorder(Protocol):
    def exchange(self, record: Exchange, /) -> None: ...
    def decided(self, record: Decided, /) -> None: ...


class LiveTable(Protocol):
    def enter(self, exchange_id: str, direction: Direction, /) -> None: ...
    def leave(self, exchange_id: str, /) -> None: ...


class _Notes:
    """What the record of an exchange will say, gathered on its way."""

    __slots__ = (
        "attempt", "decision", "decision_seconds", "detail", "error", "outcome", "peer_id", "status", "upstream_seconds",
    )  # fmt: skip

    def __init__(self) -> None:
        self.outcome: ExchangeOutcome = "aborted"
        self.error: str | None = "cancelled"
        self.detail: str | None = None
        self.status: int | None = None
        self.attempt: Attempt | None = None
        self.decision: Allow | Deny | None = None
        self.decision_seconds = 0.0
        self.upstream_seconds = 0.0
        self.peer_id: str | None = None

    def ended(self, outcome: ExchangeOutcome, error: SidecarError | None = None) -> None:
        self.outcome = outcome
        self.error = error.code if error is not None else None
        self.detail = error.detail or None if error is not None else None


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
        idle_timeout: Callable[[], float],
        stopwatch: Callable[[], float] = perf_counter,
    ) -> None:
        self.program = program
        self._decisions = decisions
        self._client = client
        self._recorder = recorder
        self._live = live
        self._idle_timeout = idle_timeout
        """Seconds without a byte of any message after which an exchange is given up."""
        self._stopwatch = stopwatch
        """Seconds of what is written down. Deadlines are on trio's clock, which costs ten times as much to read."""
        prefix = os.urandom(4).hex()
        self._ids = (f"{prefix}-{number}" for number in count(1))

    async def handle(self, connection: Connection, request: Request, reply: Reply) -> None:
        """Carry one request from its head to its record. Nothing but cancellation comes out of it."""
        started_at, started = time.time(), self._stopwatch()
        ids = _ids(next(self._ids), request.head.fields)
        notes = _Notes()
        self._live.enter(ids.exchange, self.program.direction)
        try:
            fault = await self._served(connection, request, reply, ids, notes)
            if fault is not None and not reply.started:
                with trio.move_on_after(self._idle_timeout()):
                    await self._answer_fault(fault, request, reply, ids, notes)
        finally:
            self._live.leave(ids.exchange)
            seconds = self._stopwatch() - started
            self._recorder.exchange(
                _record(self.program, connection, request.head, reply, ids, notes, started_at, seconds)
            )

    async def _served(
        self, connection: Connection, request: Request, reply: Reply, ids: Ids, notes: _Notes
    ) -> SidecarError | None:
        """Serve, and return what went wrong that the client may be told, as long as it has been told nothing."""
        try:
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
        return None

    async def _serve(self, connection: Connection, request: Request, reply: Reply, ids: Ids, notes: _Notes) -> None:
        attempt = self.program.attempt(connection, request, ids)
        while True:
            notes.attempt = attempt
            with trio.CancelScope(deadline=trio.current_time() + self._idle_timeout()) as scope:
                decision = await self._decide(attempt, ids, notes)
                if isinstance(decision, Deny):
                    notes.ended("denied")
                    await self._answer(_denied(decision, request.head, ids), reply, notes)
                    return
                permit = _permit(request, decision, connection, scope)
                try:
                    await self._forward(permit, attempt, reply, notes, scope)
                except PlaintextOnly as fault:
                    if attempt.step_down is None:
                        raise
                    attempt = attempt.step_down(fault)
                    continue
                notes.ended("allowed")
            if scope.cancelled_caught:
                if reply.started:
                    raise Aborted("no byte moved for too long")
                raise UpstreamFault("no byte moved for too long", code="exchange_idle", status=504)
            return

    async def _decide(self, attempt: Attempt, ids: Ids, notes: _Notes) -> Allow | Deny:
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
                Decided(
                    at=time.time(),
                    exchange_id=ids.exchange,
                    inquiry=attempt.inquiry,
                    decision=decision,
                    error=code,
                    seconds=seconds,
                )
            )
        return decision

    async def _forward(
        self, permit: Permit, attempt: Attempt, reply: Reply, notes: _Notes, scope: trio.CancelScope
    ) -> None:
        idle_timeout = self._idle_timeout()
        last = trio.current_time()

        def moved() -> None:
            nonlocal last
            now = trio.current_time()
            if now - last > idle_timeout / 16:  # each setting sorts the scope anew among all others
                scope.deadline, last = now + idle_timeout, now

        await _Forward(
            permit=permit, attempt=attempt, reply=reply, notes=notes, via=self.program.via, moved=moved,
            stopwatch=self._stopwatch,
        ).run(self._client)  # fmt: skip

    async def _answer(self, response: Response, reply: Reply, notes: _Notes) -> None:
        notes.status = response.head.status
        try:
            await reply.send(response)
        except Aborted:
            notes.status = None

    async def _answer_fault(self, fault: SidecarError, request: Request, reply: Reply, ids: Ids, notes: _Notes) -> None:
        told = {"request_id": ids.request}
        if notes.decision is not None:
            told["decision_id"] = notes.decision.decision_id
        await self._answer(answers.fault(fault, request_fields=request.head.fields, ids=told), reply, notes)


class _Forward:
    """What a permit allows: this request to that upstream, and its answer back."""

    __slots__ = ("_attempt", "_began", "_moved", "_notes", "_permit", "_reply", "_stopwatch", "_via")

    def __init__(
        self,
        *,
        permit: Permit,
        attempt: Attempt,
        reply: Reply,
        notes: _Notes,
        via: bytes,
        moved: Callable[[], None],
        stopwatch: Callable[[], float],
    ) -> None:
        self._stopwatch = stopwatch
        self._permit = permit
        self._attempt = attempt
        self._reply = reply
        self._notes = notes
        self._via = via
        self._moved = moved
        self._began = 0.0

    async def run(self, client: Client) -> None:
        """Try again only what provably was not sent, or what nobody can tell from its first sending."""
        repetitions = 0
        while True:
            stream = await client.open(self._attempt.upstream)
            try:
                if stream.peer is not None:
                    self._notes.peer_id = str(stream.peer.id)
                    if self._attempt.proven is not None:
                        await self._attempt.proven(stream.peer)
                return await self._converse(stream)
            except (NotSent, NoAnswer) as fault:
                # A kept connection may have ended just before it was used; a new one that fails is a failure.
                if not stream.reused or self._reply.started or not _repeatable(self._permit.request, fault):
                    raise
                repetitions += 1
                if repetitions > _MAX_REPETITIONS:
                    raise
            finally:
                stream.release()

    async def _converse(self, stream: UpstreamStream) -> None:
        """Both directions of one exchange at once: the answer may begin, and end, before the request has ended."""
        head, fields, body = self._attempt.head, self._attempt.fields, self._permit.request.body
        if self._permit.allow.request_headers:
            fields = headers.with_added(fields, self._permit.allow.request_headers)
        self._began = self._stopwatch()
        if body.length == 0:
            await stream.send(head, fields, body)
            return await self._respond(stream)
        failure: Aborted | SidecarError | None = None
        unsent: UpstreamFault | None = None

        async def pump() -> None:
            nonlocal failure, unsent
            try:
                await stream.send(head, fields, _Sifted(body, "client_gone", self._moved, self._reserved()))
            except Aborted as gone:
                failure = gone
                nursery.cancel_scope.cancel()
            except UpstreamFault as fault:
                unsent = fault  # it may have answered all the same, and then that is what counts

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            try:
                await self._respond(stream)
            except (Aborted, SidecarError) as error:
                failure = failure or (unsent if isinstance(error, NoAnswer) and unsent is not None else error)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return None

    def _reserved(self) -> frozenset[bytes]:
        """Names that were decided on, or set by policy: trailers may not say otherwise."""
        return self._attempt.reserved | {headers.fold(name.encode()) for name in self._permit.allow.request_headers}

    async def _respond(self, stream: UpstreamStream) -> None:
        while True:
            head = await stream.receive()
            self._moved()
            if head.status >= 200 or head.status == 101:
                break
            fields = headers.response(head.fields, via=self._via)
            await self._reply.interim(ResponseHead(status=head.status, fields=fields))
        self._notes.upstream_seconds = self._stopwatch() - self._began
        self._notes.status = head.status
        fields = headers.response(head.fields, self._permit.allow.response_headers, via=self._via)
        answer = ResponseHead(status=head.status, fields=fields)
        if head.status == 101:
            await _tunnel(await self._reply.tunnel(answer), stream.tunnel(), self._moved)
        else:
            body = _Sifted(stream.body, "upstream_broke_off", self._moved)
            await self._reply.send(Response(head=answer, body=body))


def _permit(request: Request, allow: Allow, connection: Connection, scope: trio.CancelScope) -> Permit:
    """The only place where a permit is made."""
    peer = connection.peer
    return Permit(
        request=request, allow=allow, peer_generation=connection.generation,
        not_after=peer.not_after if isinstance(peer, Workload) else None,
        lease_until=None if allow.lease is None else trio.current_time() + allow.lease, cancel=scope.cancel,
    )  # fmt: skip


def _denied(deny: Deny, head: RequestHead, ids: Ids) -> Response:
    return answers.refusal(
        deny.status, "policy_denied", deny.reason or "denied by policy", request_fields=head.fields,
        ids={"decision_id": deny.decision_id, "request_id": ids.request}, extra=deny.response_headers,
    )  # fmt: skip


_MAX_REPETITIONS = 2
"""An upstream that refuses stream after stream is at its limit, and asking on and on would keep it, and us, there."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


def _repeatable(request: Request, fault: UpstreamFault) -> bool:
    """Whether nobody could tell a second sending from the first: a body that was begun cannot be had again."""
    return request.body.length == 0 and (isinstance(fault, NotSent) or request.head.method in _IDEMPOTENT)


def _where(error: Exception) -> str:
    """What went wrong and where, in one line: the innermost error of a group is the one that tells."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f" ({f.filename}:{f.lineno} {f.name})" for f in frame)


class _Sifted:
    """A body whose trailers lose what may not pass, and whose breaking off says whose doing it was."""

    __slots__ = ("_body", "_code", "_moved", "_reserved", "length")

    def __init__(
        self, body: Body, code: str, moved: Callable[[], None], reserved: frozenset[bytes] = frozenset()
    ) -> None:
        self._reserved = reserved
        self._body = body
        self._code = code
        self._moved = moved
        self.length = body.length

    @property
    def ready(self) -> bool:
        return self._body.ready

    async def receive(self) -> Data | Trailers | None:
        try:
            item = await self._body.receive()
        except Aborted as gone:
            gone.code = self._code
            raise
        self._moved()
        return Trailers(headers.trailer_fields(item.fields, self._reserved)) if isinstance(item, Trailers) else item


async def _tunnel(client: ByteStream, upstream: ByteStream, moved: Callable[[], None]) -> None:
    """Carry bytes both ways until both sides have ended. A side that breaks off breaks the other one."""
    broken: Exception | None = None

    async def carry(source: ByteStream, sink: ByteStream) -> None:
        nonlocal broken
        try:
            while data := await source.receive_some():
                moved()
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            broken = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, client, upstream)
        nursery.start_soon(carry, upstream, client)
    if broken is not None:
        raise Aborted(str(broken)) from broken


def _ids(exchange_id: str, fields: Fields) -> Ids:
    trace, traceparent = headers.traceparent(fields) or headers.made_traceparent(os.urandom(24))
    return Ids(
        exchange=exchange_id, request=headers.request_id(fields) or exchange_id, trace=trace, traceparent=traceparent
    )


def _record(
    program: Program, connection: Connection, head: RequestHead, reply: Reply, ids: Ids, notes: _Notes,
    started_at: float, seconds: float,
) -> Exchange:  # fmt: skip
    attempt, decision = notes.attempt, notes.decision
    return Exchange(
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
        upstream=str(attempt.upstream.address) if attempt is not None else None,
        upstream_id=notes.peer_id,
        upstream_tls=attempt.upstream.tls if attempt is not None else None,
        decision_seconds=notes.decision_seconds,
        upstream_seconds=notes.upstream_seconds,
    )
