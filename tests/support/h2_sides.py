"""Both sides of HTTP/2 in conversation with a peer that speaks it frame by frame: a server (`serving`), a client (`talking`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from sidecar.model import (
    Address,
    Anonymous,
    Connection,
    Reply,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    SpiffeId,
    Trailers,
    Workload,
)
from sidecar.wire import h2_server, target
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.h2_client import H2Connection
from sidecar.wire.h2_exchange import UpstreamExchange
from sidecar.wire.network import Stream
from support.h2_frames import Peer, SettingsFrame, stream_pair

SHORT = Limits(idle_timeout=60.0, header_timeout=5.0, linger_timeout=0.5)
HERE = Address(host="127.0.0.1", port=8443)
BUDGET = Workload(id=SpiffeId(trust_domain="example.org", path="/budget"), not_after=0.0)
_PATIENCE = 5000.0
"""Seconds on the mock clock, after which a test waits for something that will not come."""
Handler = Callable[[Connection, Request, Reply], Awaitable[None]]


class Parts:
    """A body given item by item; an event is waited for, an exception raised."""

    def __init__(self, *items: object, length: int | None = None, ready: bool = True) -> None:
        self._items = list(items)
        self.length = length
        self._ready = ready

    @property
    def ready(self) -> bool:
        return self._ready and not (self._items and isinstance(self._items[0], trio.Event))

    async def receive(self):
        while self._items and isinstance(self._items[0], trio.Event):
            await self._items.pop(0).wait()
        item = self._items.pop(0) if self._items else None
        if isinstance(item, Exception):
            raise item
        return item


def ok(body: object = None, status: int = 200, fields: tuple = ()) -> Response:
    return Response(head=ResponseHead(status=status, fields=list(fields)), body=body or Whole(b"hello"))


async def whole(body) -> tuple[bytes, object]:
    data, trailers = b"", None
    while (item := await body.receive()) is not None:
        if isinstance(item, Trailers):
            trailers = dict(item.fields)
        else:
            data += item
    return data, trailers


def plaintext_connection(*, tls: bool = False) -> Connection:
    return Connection(
        id="c1", peer=Anonymous(reason="plaintext"), remote=HERE, local=HERE, tls=tls, server_name=None,
        protocol="h2", generation=0,
    )  # fmt: skip


async def answer(_: Connection, request: Request, reply: Reply) -> None:
    await whole(request.body)
    await reply.send(ok())


@asynccontextmanager
async def _until_over(
    run: Callable[[], Awaitable[None]], look_out: Callable[[], Awaitable[None]], theirs: Stream, over: trio.Event
) -> AsyncIterator[None]:
    """Run our side and its clock while the test is the other; then close that, and wait until ours is over too."""
    with trio.fail_after(_PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(look_out)
            try:
                yield
            finally:
                theirs.close()
            await over.wait()


@dataclass
class Serving:
    peer: Peer
    served: Served
    over: trio.Event
    error: Exception | None = None


@asynccontextmanager
async def serving(
    handle: Handler = answer,
    limits: Limits = SHORT,
    *,
    start: bool = True,
    window: int | None = None,
    tls: bool = False,
    fresh: Callable[[], bool] = lambda: True,
    buffer: bytes = b"",
    draining: bool = False,
) -> AsyncIterator[Serving]:
    """A server in conversation. `window`: the stream window of the peer."""
    ours, theirs = stream_pair()
    served = Served(plaintext_connection(tls=tls), handle, limits, fresh, draining=draining)
    talk = Serving(Peer(theirs), served, trio.Event())

    async def run() -> None:
        try:
            await h2_server.serve(ours, bytearray(buffer), served)
        except Exception as error:
            talk.error = error
        assert ours.closed
        talk.over.set()

    async def look_out() -> None:
        while not talk.over.is_set():
            await trio.sleep(0.5)
            served.check(trio.current_time())

    async with _until_over(run, look_out, theirs, talk.over):
        if start:
            await talk.peer.start(None if window is None else {SettingsFrame.INITIAL_WINDOW_SIZE: window})
        yield talk
    assert served.idle is None
    assert served.on_drain is None
    assert served.on_look is None


def request(method: str = "GET", path: bytes = b"/items", upgrade: str | None = None) -> RequestHead:
    return RequestHead(
        method=method, target=target.origin_form(path), host="backend.internal", port=8443, fields=(), protocol="HTTP/2",
        upgrade=upgrade,
    )  # fmt: skip


@dataclass
class Talk:
    connection: H2Connection
    peer: Peer
    over: trio.Event = field(default_factory=trio.Event)
    cancel: Callable[[], None] = lambda: None
    """Cancel the connection, as the end of the pool would."""


@asynccontextmanager
async def talking(
    *,
    start: bool = True,
    settings: dict[int, int] | None = None,
    buffer_bytes: int | None = None,
    keepalive_timeout: float = 60.0,
) -> AsyncIterator[Talk]:
    """A client whose upstream is the test. It must end by itself once the upstream does."""
    ours, theirs = stream_pair(buffer_bytes)
    connection = H2Connection(
        ours, max_header_bytes=60 * 1024, max_header_fields=100, keepalive_timeout=keepalive_timeout, peer=BUDGET
    )
    talk = Talk(connection, Peer(theirs))

    async def run() -> None:
        with trio.CancelScope() as scope:
            talk.cancel = scope.cancel
            await connection.run()
        assert ours.closed
        talk.over.set()

    async def look_out() -> None:
        while not talk.over.is_set():
            await trio.sleep(1)
            connection.look(trio.current_time())

    async with _until_over(run, look_out, theirs, talk.over):
        if start:
            await talk.peer.start(settings, preface=False)
            await talk.peer.settle()
        yield talk
    assert not connection.accepting
    assert not connection.channels


async def asked(talk: Talk, **of: object) -> UpstreamExchange:
    """An exchange whose request has been sent and read."""
    exchange = talk.connection.open()
    await exchange.send(request(**of), [], Whole())
    await talk.peer.message(exchange.id)
    return exchange
