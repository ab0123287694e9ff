"""What a permit allows: its request goes to its upstream, and the answer comes back.

Both directions run at once: an answer may begin, and end, before the request has. What breaks off on one side is broken off
on the other, so that nobody takes a part for the whole.

A request is sent again, under the same permit, only where that is safe, and only while nothing of an answer has been passed on:

- what was provably not sent (`NotSent`), up to `retries` times, after a short random wait that doubles;
- besides, once, what met the end of a kept connection: what was not sent, and what got not one byte of an answer
  (`NoAnswer`) where the method is idempotent (RFC 9110 §9.2.2). That one goes to a fresh connection: a second stale one would
  prove nothing.

For that the beginning of a body is kept until an answer begins (`wire.passing`). Of what is longer the rest is gone, and it is
not sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import uniform

import trio

from sidecar.attempt import Attempt, OwnAnswer
from sidecar.errors import ClientFault, MaybeSent, NoAnswer, NotSent, PlaintextOnly, SidecarError, UpstreamFault
from sidecar.model import (
    Aborted,
    Allow,
    Deny,
    ExchangeOutcome,
    Fields,
    Permit,
    Reply,
    Response,
    ResponseHead,
    maker,
)
from sidecar.wire import headers
from sidecar.wire.client import Client
from sidecar.wire.passing import Sifted, Upload, cut, tunnel
from sidecar.wire.upstream import UpstreamStream

_response, _response_head = maker(Response), maker(ResponseHead)

_MAX_INTERIM = 100
"""Interim answers to one request. Each is a sign of life, and a final one must come."""
_FIRST_WAIT = 0.025
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
_NOT_OF_AGE = frozenset({"upstream_refused_stream", "upstream_streams_exhausted", "upstream_overloaded"})
"""Of what was not sent: an upstream at its limit, or ours with it, which a fresh connection would not help."""
_HOPELESS = frozenset({"upstream_overloaded", "upstream_protocol"})
"""Of what was not sent: it would not be sent a moment later either."""
_OF_GATEWAYS = frozenset({502, 503, 504})


class Notes:
    """What the record of an exchange will say, gathered on its way."""

    __slots__ = (
        "attempt", "decision", "decision_seconds", "detail", "error", "outcome", "peer_id", "status", "upstream_seconds",
    )  # fmt: skip

    def __init__(self) -> None:
        self.outcome: ExchangeOutcome = "aborted"
        self.error: str | None = "cancelled"
        self.detail: str | None = None
        self.status: int | None = None
        self.attempt: Attempt | OwnAnswer | None = None
        self.decision: Allow | Deny | None = None
        self.decision_seconds = 0.0
        self.upstream_seconds = 0.0
        self.peer_id: str | None = None

    def ended(self, outcome: ExchangeOutcome, error: SidecarError | None = None) -> None:
        self.outcome = outcome
        self.error = error.code if error is not None else None
        self.detail = error.detail or None if error is not None else None


class Forward:
    """One request to one upstream, as often as it takes.

    `scope` is what it runs in, since `began`: whatever passes moves its deadline to `idle_timeout` seconds from then, but
    never beyond `end`. Both are times of the run's clock.
    """

    __slots__ = (
        "_attempt", "_began", "_body_timeout", "_end", "_idle_timeout", "_last", "_notes", "_permit", "_reply", "_scope",
        "_stopwatch", "_upload", "_via",
    )  # fmt: skip

    def __init__(
        self,
        *,
        permit: Permit,
        attempt: Attempt,
        reply: Reply,
        notes: Notes,
        via: bytes,
        scope: trio.CancelScope,
        began: float,
        idle_timeout: float,
        end: float,
        body_timeout: float,
        stopwatch: Callable[[], float],
    ) -> None:
        self._stopwatch = stopwatch
        self._permit = permit
        self._attempt = attempt
        self._reply = reply
        self._notes = notes
        self._via = via
        self._scope = scope
        self._idle_timeout = idle_timeout
        self._end = end
        self._last = began
        self._body_timeout = body_timeout
        self._began = 0.0
        self._upload: Upload | None = None

    async def run(self, client: Client) -> None:
        """Forward until an answer has been passed on. Raises `SidecarError` or `Aborted` for what became of it instead."""
        retries, wait, fresh = self._attempt.retries, _FIRST_WAIT, False
        while True:
            stream: UpstreamStream | None = None
            try:
                stream = await client.open(self._attempt.upstream, fresh)
                try:
                    await self._carry(stream)
                    self._upload = None  # it refers to us, and no cycle is left behind for the collector
                    return
                finally:
                    stream.release()
            except UpstreamFault as fault:
                again = self._may_be_repeated(fault)
                if again and stream is not None and stream.reused and not fresh and fault.code not in _NOT_OF_AGE:
                    fresh = True
                    continue
                if stream is not None and isinstance(fault, (NotSent, MaybeSent)) and fault.code not in _NOT_OF_AGE:
                    stream.failed()
                if not again or not retries or not isinstance(fault, NotSent) or fault.code in _HOPELESS:
                    raise
            except trio.Cancelled:
                if stream is not None and self._notes.status is None and trio.current_time() >= self._scope.deadline:
                    stream.failed()  # silent for longer than anybody would wait
                raise
            retries -= 1
            await trio.sleep(wait * uniform(0.5, 1.5))  # noqa: S311  (so that not all who were refused come back at once)
            wait *= 2

    def _moved(self) -> None:
        now = trio.current_time()
        if now - self._last > self._idle_timeout / 16:  # each setting sorts the scope anew among all others
            self._scope.deadline, self._last = min(now + self._idle_timeout, self._end), now

    def _may_be_repeated(self, fault: UpstreamFault) -> bool:
        """Whether nobody could tell a second sending from the first."""
        if self._reply.started or (self._upload is not None and not self._upload.whole):
            return False
        if isinstance(fault, PlaintextOnly):
            return self._attempt.step_down is None
        if isinstance(fault, NoAnswer):
            return self._permit.request.head.method in _IDEMPOTENT
        return isinstance(fault, NotSent)

    async def _carry(self, stream: UpstreamStream) -> None:
        if stream.peer is not None:
            self._notes.peer_id = str(stream.peer.id)
            if self._attempt.proven is not None:
                await self._attempt.proven(stream.peer)
        head, fields, body = self._attempt.head, self._attempt.fields, self._permit.request.body
        allow = self._permit.allow
        if allow.request_headers or allow.request_headers_removed:
            fields = headers.with_added(fields, allow.request_headers, self._set_or_removed())
        self._began = self._stopwatch()
        if body.length != 0:
            return await self._converse(stream, fields)
        try:
            await stream.send(head, fields, body)
        except NotSent:
            raise
        except UpstreamFault as unsent:
            return await self._answered_unsent(stream, unsent)
        return await self._respond(stream)

    async def _answered_unsent(self, stream: UpstreamStream, unsent: UpstreamFault) -> None:
        """An upstream that did not take all of a request may have answered it all the same: then that is what counts."""
        try:
            await self._respond(stream)
        except NoAnswer as fault:
            raise NoAnswer(unsent.detail, code=unsent.code) from fault

    async def _converse(self, stream: UpstreamStream, fields: Fields) -> None:
        """Both directions of one exchange at once: the answer may begin, and end, before the request has ended."""
        upload = self._upload
        if upload is None:
            request = self._permit.request
            upload = self._upload = Upload(
                request.body, moved=self._moved, reserved=self._reserved(), body_timeout=self._body_timeout,
                held=request.head.expects_continue,
            )  # fmt: skip
        failure: Aborted | SidecarError | None = None
        unsent: UpstreamFault | None = None
        answered = False

        async def pump() -> None:
            nonlocal failure, unsent
            try:
                await stream.send(self._attempt.head, fields, upload)
            except Aborted as gone:
                failure = gone
                nursery.cancel_scope.cancel()
            except UpstreamFault as fault:
                unsent = fault  # it may have answered all the same, and then that is what counts

        async with trio.open_nursery() as nursery:
            upload.begin(nursery.cancel_scope)
            nursery.start_soon(pump)
            try:
                await self._respond(stream)
                answered = True
            except NoAnswer as fault:
                failure = failure or (NoAnswer(unsent.detail, code=unsent.code) if unsent is not None else fault)
            except (Aborted, SidecarError) as error:
                failure = failure or error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not answered:
            if self._reply.started:
                raise cut("the body of the request took too long", "body_timeout")
            raise ClientFault(code="body_timeout", public="the body of the request took too long", status=408)

    def _reserved(self) -> frozenset[bytes]:
        """Names that were decided on, or set by policy: trailers may not say otherwise."""
        return self._attempt.reserved | self._set_or_removed()

    def _set_or_removed(self) -> frozenset[bytes]:
        """Folded names of which policy says what the upstream sees."""
        allow = self._permit.allow
        return frozenset(
            headers.fold(name.encode()) for name in (*allow.request_headers, *allow.request_headers_removed)
        )

    async def _respond(self, stream: UpstreamStream) -> None:
        request, upload = self._permit.request.head, self._upload
        interim = 0
        while True:
            head = await stream.receive()
            self._moved()
            if head.status >= 200 or head.status == 101:
                break
            interim += 1
            if interim > _MAX_INTERIM:
                raise UpstreamFault("interim answers without end", code="upstream_malformed")
            if upload is not None:
                upload.wanted()
            fields = headers.response(head.fields, via=self._via)
            await self._reply.interim(ResponseHead(status=head.status, fields=fields))
        self._notes.upstream_seconds = self._stopwatch() - self._began
        self._notes.status = head.status
        if upload is not None:
            upload.forget()
        answer = self._passed(head)
        if head.status == 101:
            await tunnel(await self._reply.tunnel(answer), stream.tunnel(), self._moved)
            return
        if request.upgrade is not None and request.protocol == "HTTP/2" and head.status < 300:
            # To extended CONNECT every 2xx means that there is a tunnel (RFC 8441 §5), and here is none.
            raise UpstreamFault("an answer without a tunnel", code="upgrade_refused")
        if head.status in _OF_GATEWAYS:
            stream.failed()
        body = Sifted(stream.body, "upstream_broke_off", self._moved)
        await self._reply.send(_response(head=answer, body=body))

    def _passed(self, head: ResponseHead) -> ResponseHead:
        """The head of the final answer as it goes back. Where nothing of policy's is in it, it is the same for the same head."""
        add, decides = self._permit.allow.response_headers, self._attempt.upstream_decides
        kept = head.kept if not add else None
        if kept is not None:
            known: tuple[bool, ResponseHead] | None = kept.get(self._via)
            if known is not None and known[0] is decides:
                return known[1]
        fields = headers.response(head.fields, add, via=self._via, upstream_decides=decides)
        answer = _response_head(status=head.status, fields=fields, kept={} if kept is not None else None)
        if kept is not None:
            kept[self._via] = decides, answer
        return answer
