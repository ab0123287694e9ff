"""The server's side of an HTTP/1.1 connection: one request at a time, each handed over with the way back.

A request that cannot be understood is answered here, since there is no exchange for it: fixed text, then the end of the connection,
because after a doubt nothing behind it can be trusted to be a request.

A drain ends nothing at once: a request may be on its way on a connection that looks idle, and a client whose connection is
closed under it cannot know whether it was acted on (RFC 9112 §9.6). So an idle connection stays for `drain_idle_timeout`; a
request that comes is served, and told `Connection: close`.

While an answer is made nobody reads from the client, since what is there may be the next request. `answering` is there for
whoever can tell that the client has gone all the same (`wire.hangups`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import trio

from sidecar.errors import ClientFault, OurFault
from sidecar.model import (
    Aborted,
    ByteStream,
    ClientGone,
    Connection,
    Reply,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    maker,
)
from sidecar.wire import answers, h1
from sidecar.wire.h1_body import Incoming, Outgoing
from sidecar.wire.h1_tunnel import Tunnel, accepted
from sidecar.wire.network import Stream
from sidecar.wire.recent import Recent

Handle = Callable[[Connection, Request, Reply], Awaitable[None]]

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)
_request = maker(Request)
Known: TypeAlias = tuple[RequestHead, h1.Framing, bool, dict[str, Any] | None]
"""What `h1.request_head` makes of a head, and what others have made of it."""
_DRAIN_BYTES = 65536
"""How much of a body that nobody read is read and dropped, so that the connection can be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may take of us. Sizes in bytes, times in seconds."""

    max_header_bytes: int = 60 * 1024
    max_header_fields: int = 100
    max_request_line_bytes: int = 8192
    max_streams: int = 100
    header_timeout: float = 10.0
    idle_timeout: float = 3600.0
    keepalive_timeout: float = 60.0
    """A connection that has been quiet for so long is asked whether its peer is still there."""
    linger_timeout: float = 1.0
    drain_idle_timeout: float = 5.0
    allow_encoded_slash: bool = False


class NoLongerTrusted(ClientFault):
    """A request on a connection whose peer has since expired or lost our trust. Another connection may do (RFC 9110 §15.5.20)."""

    status = 421
    code = "peer_no_longer_trusted"
    public = "the identity of this connection is no longer accepted"


class Wait(Protocol):
    def cancel(self) -> None: ...


class Answering(Protocol):
    gone: bool
    """Whether the client is known to have gone."""
    started: bool
    complete: bool

    @property
    def bytes_sent(self) -> int: ...


class Served:
    """What a connection's protocol driver needs of the server around it, and tells it.

    `idle` bounds the waits between requests: cancelling it ends the connection where nothing is lost by that.
    """

    __slots__ = (
        "answering", "connection", "draining", "evicted", "exchanges", "fresh", "handle", "idle", "limits", "on_drain", "on_look",
        "reason", "recent", "tunnel", "waiting", "waiting_until",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        handle: Handle,
        limits: Limits,
        fresh: Callable[[], bool],
        *,
        draining: bool,
        recent: Recent[Known] | None = None,
    ) -> None:
        self.connection = connection
        self.handle = handle
        self.limits = limits
        self.fresh = fresh
        """Raises nothing: whether the peer would still be accepted, were it to connect now."""
        self.draining = draining
        self.answering: Answering | None = None
        """The way back of the one exchange of an h1 connection, while there is one."""
        self.tunnel: Answering | None = None
        """It, once it has become a tunnel: then the client is read from, and says itself when it ends."""
        self.idle: Wait | None = None
        self.waiting: Wait | None = None
        """What to end at `waiting_until`, where the driver leaves that to the server's look-out."""
        self.waiting_until = 0.0
        self.on_drain: Callable[[], None] | None = None
        """Told of a drain, where the driver has something to say to its peer then (GOAWAY)."""
        self.on_look: Callable[[float], None] | None = None
        """Told of each look of the server, with the time."""
        self.recent: Recent[Known] = recent if recent is not None else Recent(1)
        """What this client asked last."""
        self.exchanges = 0
        self.reason: str | None = None
        self.evicted = False
        """Ended while idle, to make room for somebody else."""

    def check(self, now: float) -> None:
        """End a wait whose time is up. Called now and then by the server, on the run's clock."""
        if self.waiting is not None and self.waiting_until <= now:
            self.waiting.cancel()
        if self.on_look is not None:
            self.on_look(now)

    def drain(self) -> None:
        """Finish what is open and take nothing new."""
        self.draining = True
        if self.on_drain is not None:
            self.on_drain()
        elif self.idle is not None:
            self.waiting_until = min(self.waiting_until, trio.current_time() + self.limits.drain_idle_timeout)


async def serve(stream: Stream, buffer: bytearray, served: Served) -> None:
    """Serve requests until the client or we end the connection. `buffer` holds what was read of it already."""
    patience = _Patience(stream)
    while True:
        raw = await _next_head(stream, buffer, served, patience)
        if raw is None:
            return
        try:
            known = served.recent.get(raw)
            if known is None:
                known = _read(raw, served)
            head, framing, keep, kept = known
            if not served.fresh():
                raise NoLongerTrusted
        except ClientFault as fault:
            if not served.exchanges and h1.is_no_request_line(raw):
                served.reason = fault.code
                await stream.close_gently(served.limits.linger_timeout)
            else:
                await _refuse(stream, served, fault, raw)
            return
        body = Incoming(
            stream, buffer, framing,
            max_header_bytes=served.limits.max_header_bytes, max_header_fields=served.limits.max_header_fields,
        )  # fmt: skip
        reply = served.answering = _Reply(stream, buffer, head, body, served, keep=keep)
        served.exchanges += 1
        await served.handle(served.connection, _request(head=head, body=body, kept=kept), reply)
        served.answering = None
        if not reply.complete:
            # The answer was cut short, or there is none: a reset says so, a clean end would not.
            served.reason = served.reason or "exchange_aborted"
            stream.abort()
            return
        if not reply.keep or not await _body_finished(body, served):
            await stream.close_gently(served.limits.linger_timeout)
            return


def _read(raw: bytes, served: Served) -> Known:
    """What `h1.request_head` makes of a head, and where it comes again room for what others make of it. Raises `ClientFault`."""
    limits, recent = served.limits, served.recent
    head, framing, keep = h1.request_head(
        raw,
        scheme="https" if served.connection.tls else "http",
        max_header_fields=limits.max_header_fields,
        max_request_line_bytes=limits.max_request_line_bytes,
        allow_encoded_slash=limits.allow_encoded_slash,
    )
    if not recent.wants(raw):
        return head, framing, keep, None
    known: Known = (head, framing, keep, {})
    recent.keep(raw, known)
    return known


class _Patience:
    """Our own end to the wait for a head, without a cancel scope for each request.

    What has arrived by then is read all the same, so that no request is lost to it.
    """

    __slots__ = ("_stream", "over")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.over = False

    def cancel(self) -> None:
        self.over = True
        self._stream.interrupt()


async def _read_head(stream: Stream, buffer: bytearray, served: Served, patience: _Patience) -> bytes | None:
    """Read until a whole head is there; None at the end of the input, or of our patience. Raises `ClientFault`."""
    limits = served.limits
    searched = 0
    while True:
        if buffer:
            while not searched and buffer[:2] == b"\r\n":
                del buffer[:2]  # an empty line before a request is to be ignored (RFC 9112 §2.2)
            end = h1.head_end(buffer, searched, limits.max_header_bytes)
            if end:
                raw = bytes(buffer[:end])
                del buffer[:end]
                return raw
            if not h1.could_begin_request(buffer):
                raise ClientFault(code="head_malformed")
            h1.request_line_fits(buffer, limits.max_request_line_bytes)
            if served.idle is not None:  # empty lines begin a head too, and do not begin it again and again
                served.waiting_until = trio.current_time() + limits.header_timeout
                served.idle = None
            searched = len(buffer)
        if patience.over:
            return None
        data = await stream.receive_some()
        if not data:
            return None
        buffer += data


async def _next_head(stream: Stream, buffer: bytearray, served: Served, patience: _Patience) -> bytes | None:
    """The bytes of the next head, or None where the connection is over (and closed)."""
    limits = served.limits
    began = trio.current_time()
    served.waiting = patience
    if buffer:
        served.waiting_until = began + limits.header_timeout
    else:
        served.waiting_until = began + limits.idle_timeout
        if served.draining:
            served.waiting_until = min(served.waiting_until, began + limits.drain_idle_timeout)
        served.idle = patience
    try:
        raw = await _read_head(stream, buffer, served, patience)
        if raw is not None:
            return raw
    except ClientFault as fault:
        await _refuse(stream, served, fault)
        return None
    except _GONE:
        if not patience.over:
            # On a kept connection an idle client that resets instead of ending has done nothing wrong.
            served.reason = "head_incomplete" if buffer else None if served.exchanges else "reset_by_peer"
            stream.close()
            return None
    finally:
        served.idle = served.waiting = None
    if not patience.over:
        served.reason = "head_incomplete" if buffer else None
        stream.close()
    elif buffer:
        await _refuse(
            stream, served, ClientFault(code="head_timeout", public="the header section took too long", status=408)
        )
    else:
        served.reason = "draining" if served.draining else "idle_timeout"
        await stream.close_gently(limits.linger_timeout)
    return None


async def _refuse(stream: Stream, served: Served, fault: ClientFault, raw: bytes = b"") -> None:
    """`raw`: the head that is refused, as far as it is there. An answer to HEAD has no body, whatever else is wrong with it."""
    served.reason = fault.code
    response = answers.fault(fault)
    bodiless = raw.startswith(b"HEAD ")
    head = h1.encode_response(response.head, response.body.length or 0, bodiless=bodiless, close=True)
    try:
        with trio.move_on_after(served.limits.linger_timeout):
            if bodiless:
                await stream.send_all(head)
            else:
                await Outgoing(stream).send(head, response.body, response.body.length or 0)
    except _GONE:
        pass
    await stream.close_gently(served.limits.linger_timeout)


async def _body_finished(body: Incoming, served: Served) -> bool:
    """Read and drop the little of a body that nobody wanted. What is more than a little ends the connection instead."""
    if body.ended:
        return True
    try:
        with trio.move_on_after(served.limits.linger_timeout):
            while await body.receive() is not None:
                pass
    except Aborted:
        return False
    return body.ended


class _Reply:
    """`model.Reply` to one request."""

    __slots__ = ("_body", "_buffer", "_head", "_out", "_served", "_stream", "complete", "gone", "keep", "started")

    def __init__(
        self, stream: Stream, buffer: bytearray, head: RequestHead, body: Incoming, served: Served, *, keep: bool
    ) -> None:
        self._stream = stream
        self._buffer = buffer
        self._head = head
        self._body = body
        self._served = served
        self._out = Outgoing(stream)
        self.keep = keep
        self.started = False
        self.complete = False
        """Whether the answer is whole, or all has been said that came through a tunnel."""
        self.gone = False

    @property
    def bytes_sent(self) -> int:
        return self._out.sent

    async def interim(self, head: ResponseHead) -> None:
        if self._head.protocol == "HTTP/1.1" and not self.started:
            try:
                await self._stream.send_all(h1.encode_interim(head))
            except _GONE as error:
                raise ClientGone(str(error)) from error

    async def send(self, response: Response) -> None:
        if self.started:
            raise OurFault("a second final answer to one request")
        self.started = True
        self.keep = self.keep and not self._served.draining and self._served.fresh() and self._can_finish_body()
        status = response.head.status
        if status == 408:  # whoever was too slow is not waited for again (RFC 9110 §15.5.9)
            self.keep = False
        bodiless = self._head.method == "HEAD" or status in (204, 304)
        length = response.body.length
        framing = 0 if bodiless else h1.CHUNKED if length is None else length
        if framing == h1.CHUNKED and self._head.protocol == "HTTP/1.0":
            framing, self.keep = h1.UNTIL_CLOSE, False
        head = h1.encode_response(response.head, framing, bodiless=bodiless, close=not self.keep)
        try:
            if bodiless:
                await self._stream.send_all(head)
            else:
                await self._out.send(head, response.body, framing)
        except _GONE as error:
            raise ClientGone(str(error)) from error
        self.complete = True

    async def tunnel(self, head: ResponseHead) -> ByteStream:
        upgrade = self._head.upgrade
        if self.started or upgrade is None or head.status != 101:
            raise OurFault("a tunnel that was not asked for")
        self.started = True
        self.keep = False
        self._served.answering, self._served.tunnel = None, self
        fields = accepted(head.fields, upgrade, self._head.fields)
        try:
            await self._stream.send_all(h1.encode_switch(ResponseHead(status=101, fields=fields), upgrade))
        except _GONE as error:
            raise ClientGone(str(error)) from error
        return Tunnel(self._stream, self._buffer, self._tunnel_ended)

    def _tunnel_ended(self) -> None:
        self.complete = True

    def _can_finish_body(self) -> bool:
        if self._body.ended:
            return True
        left = self._body.left
        return not self._head.expects_continue and left is not None and left <= _DRAIN_BYTES
