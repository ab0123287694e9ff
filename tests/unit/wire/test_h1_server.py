"""The server's side of one HTTP/1.1 connection: when it is kept, when it ends, and what is said at its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel

from sidecar.errors import OurFault
from sidecar.model import (
    Aborted,
    Address,
    Anonymous,
    ClientGone,
    Connection,
    Reply,
    Request,
    Response,
    ResponseHead,
    Trailers,
)
from sidecar.wire import h1_server
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.network import Stream
from support.h2_frames import stream_pair

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
NOWHERE = Address(host="10.0.0.1", port=1)
CONNECTION = Connection(
    id="c", peer=Anonymous(reason="plaintext"), remote=NOWHERE, local=NOWHERE, tls=False, server_name=None, protocol="h1",
    generation=0,
)  # fmt: skip

Handle = Callable[[Request, Reply], Awaitable[None]]


class Pieces:
    """A body of these items; `length` is what it says of itself."""

    ready = False

    def __init__(self, *items: bytes | Trailers | Exception, length: int | None = None) -> None:
        self.length = length
        self._items = list(items)

    async def receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        item = self._items.pop(0) if self._items else None
        if isinstance(item, Exception):
            raise item
        return item


async def ok(request: Request, reply: Reply) -> None:
    await reply.send(Response(head=ResponseHead(status=200), body=Whole(request.head.target.path.encode())))


def answering(status: int, body: Any, *fields: tuple[bytes, bytes]) -> Handle:
    async def handle(_request: Request, reply: Reply) -> None:
        await reply.send(Response(head=ResponseHead(status=status, fields=fields), body=body))

    return handle


@asynccontextmanager
async def serving(
    handle: Handle = ok, first: bytes = b"", *, fresh: Callable[[], bool] = lambda: True, draining: bool = False,
    **limits: Any,
):  # fmt: skip
    """A client's end of a served connection, and what the server knows of it. Ends when the connection has ended."""
    ours, theirs = stream_pair()

    async def handler(_connection: Connection, request: Request, reply: Reply) -> None:
        await handle(request, reply)

    served = Served(CONNECTION, handler, Limits(**limits), fresh, draining=draining)

    async def look_out() -> None:
        while True:
            await trio.sleep(0.1)
            served.check(trio.current_time())

    async with trio.open_nursery() as background:
        background.start_soon(look_out)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(h1_server.serve, ours, bytearray(first), served)
            yield theirs, served
            theirs.close()
        background.cancel_scope.cancel()
    assert ours.closed
    ours.close()


async def all_of(stream: Stream) -> bytes:
    """Everything until the end, or until nothing more comes."""
    data = b""
    with trio.move_on_after(0.5):
        while more := await stream.receive_some():
            data += more
    return data


async def test_what_was_read_before_is_served_first(autojump_clock):
    async with serving(first=GET + GET[:10]) as (client, served):
        await client.send_all(GET[10:])
        assert (await all_of(client)).count(b"HTTP/1.1 200 OK\r\n") == 2
        assert served.exchanges == 2


async def test_an_idle_connection_ends_after_its_time(autojump_clock):
    async with serving(idle_timeout=60.0) as (client, served):
        began = trio.current_time()
        await client.send_all(GET)
        await all_of(client)
        assert await client.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(60)
        client.close()
        await trio.lowlevel.checkpoint()
    assert served.reason == "idle_timeout"


async def test_empty_lines_do_not_keep_a_connection(autojump_clock):
    async with serving(header_timeout=10.0) as (client, served):
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await client.send_all(b"\r\n")
                await trio.sleep(2)
        assert trio.current_time() - began < 20
    assert served.reason == "idle_timeout"


@pytest.mark.parametrize("raw", [b"G", b"GET /x HTTP/1.1\r\nHost: a\r\n", GET[:-1]])
async def test_a_head_that_does_not_end_is_answered_408(autojump_clock, raw):
    async with serving(header_timeout=10.0) as (client, served):
        began = trio.current_time()
        await client.send_all(raw)
        await trio.sleep(9)
        await client.send_all(b"")
        assert (await client.receive_some()).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - began == pytest.approx(10, abs=0.2)
    assert served.reason == "head_timeout"


async def test_a_drain_leaves_an_idle_connection_for_a_moment_and_then_ends_it(autojump_clock):
    async with serving(drain_idle_timeout=5.0) as (client, served):
        await client.send_all(GET)
        await client.receive_some()
        began = trio.current_time()
        served.drain()
        assert await client.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(5, abs=0.2)
    assert served.reason == "draining"


async def test_a_request_that_was_on_its_way_when_a_drain_began_is_served_as_the_last(autojump_clock):
    async with serving(drain_idle_timeout=5.0) as (client, served):
        await trio.sleep(1)
        served.drain()
        await trio.sleep(4)
        await client.send_all(GET + GET)
        answer = await all_of(client)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 1
        assert b"connection: close\r\n" in answer
    assert served.exchanges == 1


async def test_a_drain_gives_no_longer_than_idleness_would(autojump_clock):
    async with serving(drain_idle_timeout=50.0, idle_timeout=3.0) as (client, served):
        await trio.sleep(1)
        began = trio.current_time()
        served.drain()
        assert await client.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(2, abs=0.2)


async def test_a_connection_that_comes_while_we_drain_has_the_same_moment(autojump_clock):
    async with serving(draining=True, drain_idle_timeout=5.0) as (client, served):
        began = trio.current_time()
        assert await client.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(5, abs=0.2)
    assert served.reason == "draining"


async def test_room_is_made_of_an_idle_connection_at_once_even_in_a_drain(autojump_clock):
    async with serving() as (client, served):
        await trio.sleep(1)
        served.drain()
        served.idle.cancel()
        with trio.fail_after(0.1):
            assert await client.receive_some() == b""


async def test_a_drain_lets_the_request_finish_and_takes_no_other(autojump_clock):
    release = trio.Event()

    async def slow(request: Request, reply: Reply) -> None:
        await release.wait()
        await ok(request, reply)

    async with serving(slow) as (client, served):
        await client.send_all(GET + GET)
        await trio.sleep(1)
        served.drain()
        release.set()
        answer = await all_of(client)
        assert answer.count(b"HTTP/1.1 200") == 1
        assert b"connection: close\r\n" in answer
    assert served.exchanges == 1


async def test_a_drain_that_came_first_serves_what_has_come_already(autojump_clock):
    async with serving(first=GET, draining=True) as (client, served):
        assert b"connection: close\r\n" in await all_of(client)
    assert served.exchanges == 1


async def test_a_peer_that_lost_our_trust_is_sent_elsewhere_before_anybody_is_asked(autojump_clock):
    async with serving(fresh=lambda: False) as (client, served):
        await client.send_all(GET)
        answer = await all_of(client)
        assert answer.startswith(b"HTTP/1.1 421 ")
        assert b"connection: close" in answer
    assert (served.exchanges, served.reason) == (0, "peer_no_longer_trusted")


async def test_trust_that_ends_while_a_request_is_served_ends_the_connection_behind_it(autojump_clock):
    trusted = True

    async def handle(request: Request, reply: Reply) -> None:
        nonlocal trusted
        trusted = False
        await ok(request, reply)

    async with serving(handle, fresh=lambda: trusted) as (client, _served):
        await client.send_all(GET)
        assert b"connection: close\r\n" in await all_of(client)


@pytest.mark.parametrize("sent", [b"GET /" + b"x" * 300, b"GET /" + b"x" * 300 + b" HTTP/1.1\r\nHost: a\r\n\r\n"])
async def test_a_request_line_has_its_own_limit(autojump_clock, sent):
    async with serving(max_request_line_bytes=256) as (client, served):
        await client.send_all(GET)
        assert (await client.receive_some()).startswith(b"HTTP/1.1 200 ")
        await client.send_all(sent)
        assert (await all_of(client)).startswith(b"HTTP/1.1 414 ")
    assert served.reason == "request_line_too_long"


async def test_whoever_was_too_slow_is_not_waited_for_again(autojump_clock):
    async with serving(answering(408, Whole())) as (client, _served):
        await client.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nx")
        began = trio.current_time()
        assert b"connection: close\r\n" in await client.receive_some()
        assert trio.current_time() == began


@pytest.mark.parametrize(
    ("sent", "reason"), [(b"GET /", "head_incomplete"), (GET + b"GE", "head_incomplete"), (GET, None), (b"", None)]
)
async def test_a_client_that_leaves_is_named_for_where_it_left(autojump_clock, sent, reason):
    async with serving() as (client, served):
        await client.send_all(sent)
        await all_of(client)
        client.close()
        await trio.sleep(1)
    assert served.reason == reason


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer_of_unknown_length_is_chunked_with_its_trailers(autojump_clock):
    body = Pieces(b"abc", b"", b"de", Trailers([(b"x-sum", b"1")]))
    async with serving(answering(200, body)) as (client, _served):
        await client.send_all(GET)
        answer = await all_of(client)
        assert answer.endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\n\r\n")


async def test_http_1_0_gets_no_chunks_no_interim_answer_and_the_end_of_the_connection(autojump_clock):
    async def handle(_request: Request, reply: Reply) -> None:
        await reply.interim(ResponseHead(status=103))
        await reply.send(Response(head=ResponseHead(status=200), body=Pieces(b"abc", Trailers([(b"x", b"y")]))))

    async with serving(handle) as (client, _served):
        await client.send_all(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer = await all_of(client)
        assert answer.endswith(b"connection: close\r\n\r\nabc")
        assert b" 103 " not in answer
        assert b"chunked" not in answer
        assert await client.receive_some() == b""


@pytest.mark.parametrize(
    ("method", "status", "fields", "expected"),
    [
        (b"HEAD", 200, [(b"content-length", b"10")], b"content-length: 10\r\n"),
        (b"GET", 304, [(b"content-length", b"10")], b"content-length: 10\r\n"),
        (b"GET", 204, [], b""),
    ],
)
async def test_an_answer_without_a_body_keeps_its_length_and_the_connection(
    autojump_clock, method, status, fields, expected
):
    async with serving(answering(status, Pieces(b"never sent"), *fields)) as (client, served):
        for _ in range(2):
            await client.send_all(GET.replace(b"GET", method))
            answer = await all_of(client)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert answer.endswith(expected + b"\r\n")
            assert b"never sent" not in answer
        assert served.exchanges == 2


@pytest.mark.parametrize(
    "body",
    [
        Pieces(b"abc", length=5),
        Pieces(b"abcdef", length=5),
        Pieces(b"abc", Aborted("broke off")),
        Pieces(b"abc", Aborted("broke off"), length=5),
    ],
    ids=["short", "long", "chunks that break off", "a length that breaks off"],
)
async def test_an_answer_that_is_not_whole_never_looks_whole_and_ends_the_connection(autojump_clock, body):
    async def handle(_request: Request, reply: Reply) -> None:
        with pytest.raises(Aborted):
            await reply.send(Response(head=ResponseHead(status=200), body=body))
        assert reply.started

    async with serving(handle) as (client, served):
        await client.send_all(GET)
        answer = await all_of(client)
        assert not answer.endswith(b"0\r\n\r\n")
        assert len(answer.partition(b"\r\n\r\n")[2]) < 5 or b"chunked" in answer
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(3):
                await client.send_all(GET)
    assert served.reason == "exchange_aborted"


async def test_a_handler_that_does_not_answer_ends_the_connection(autojump_clock):
    async def silent(_request: Request, _reply: Reply) -> None:
        return

    async with serving(silent) as (client, served):
        await client.send_all(GET)
        assert await all_of(client) == b""
    assert served.reason == "exchange_aborted"


async def test_a_second_final_answer_is_a_defect(autojump_clock):
    async def twice(request: Request, reply: Reply) -> None:
        await ok(request, reply)
        with pytest.raises(OurFault):
            await ok(request, reply)

    async with serving(twice) as (client, _served):
        await client.send_all(GET)
        assert (await all_of(client)).count(b"HTTP/1.1") == 1


async def test_a_client_that_takes_no_answer_is_gone(autojump_clock):
    seen: list[type] = []

    async def handle(_request: Request, reply: Reply) -> None:
        await trio.sleep(1)
        try:
            await reply.send(Response(head=ResponseHead(status=200), body=Pieces(*[b"x" * 65536] * 50)))
        except Aborted as gone:
            seen.append(type(gone))

    async with serving(handle) as (client, _served):
        await client.send_all(GET)
        client.close()
        await trio.sleep(2)
    assert seen == [ClientGone]


# ── bodies that nobody read ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("head", "body", "kept"),
    [
        (b"Content-Length: 1000", b"x" * 1000, True),
        (b"Content-Length: 10000000", b"x" * 1000, False),
        (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n", False),
        (b"Content-Length: 5\r\nExpect: 100-continue", b"", False),
    ],
    ids=["a little", "much", "of unknown length", "not even sent"],
)
async def test_a_body_that_nobody_read_is_dropped_or_ends_the_connection(autojump_clock, head, body, kept):
    async with serving() as (client, served):
        await client.send_all(b"POST /x HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n" + body)
        answer = await client.receive_some()
        assert (b"connection: close\r\n" in answer) is not kept
        if kept:
            await client.send_all(GET)
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200 OK\r\n")
            assert served.exchanges == 2


async def test_a_body_that_comes_slowly_though_nobody_reads_it_is_not_waited_for(autojump_clock):
    async with serving(linger_timeout=1.0) as (client, _served):
        began = trio.current_time()
        await client.send_all(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx")
        await client.receive_some()
        assert await client.receive_some() == b""
        assert trio.current_time() - began < 3


# ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_came_behind_the_head_belongs_to_the_tunnel(autojump_clock):
    async def handle(_request: Request, reply: Reply) -> None:
        stream = await reply.tunnel(ResponseHead(status=101, fields=[(b"x", b"y")]))
        assert await stream.receive_some(3) == b"ear"
        assert await stream.receive_some() == b"ly"
        assert await stream.receive_some() == b"later"
        await stream.send_all(b"answer")
        await stream.send_eof()

    async with serving(handle) as (client, served):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nearly")
        head = await client.receive_some()
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\nx: y\r\n")
        assert b"upgrade: echo\r\n" in head
        await client.send_all(b"later")
        assert await all_of(client) == b"answer"
    assert served.reason is None


UPGRADE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: %b\r\n%b\r\n"


async def test_a_tunnel_that_was_not_ended_breaks_off(autojump_clock):
    async def handle(_request: Request, reply: Reply) -> None:
        await (await reply.tunnel(ResponseHead(status=101))).send_all(b"half")

    async with serving(handle) as (client, served):
        await client.send_all(UPGRADE % (b"echo", b""))
        await all_of(client)
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(3):
                await client.send_all(b"more")
    assert served.reason == "exchange_aborted"


@pytest.mark.parametrize(
    ("protocol", "fields", "given", "told"),
    [
        (b"websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", [], b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        (b"WebSocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", [], b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        (b"websocket", b"Sec-WebSocket-Key: x\r\n", [(b"sec-websocket-accept", b"theirs")], b"theirs"),
        (b"websocket", b"", [], None),
        (b"echo", b"Sec-WebSocket-Key: x\r\n", [], None),
    ],
)
async def test_a_websocket_whose_other_end_has_no_accept_is_given_one(autojump_clock, protocol, fields, given, told):
    async def handle(_request: Request, reply: Reply) -> None:
        await (await reply.tunnel(ResponseHead(status=101, fields=given))).send_eof()

    async with serving(handle) as (client, _served):
        await client.send_all(UPGRADE % (protocol, fields))
        head = await all_of(client)
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert head.count(b"sec-websocket-accept") == (told is not None)
        assert told is None or b"sec-websocket-accept: " + told + b"\r\n" in head


async def test_a_tunnel_that_nobody_asked_for_is_a_defect(autojump_clock):
    async def handle(request: Request, reply: Reply) -> None:
        with pytest.raises(OurFault):
            await reply.tunnel(ResponseHead(status=101))
        await ok(request, reply)

    async with serving(handle) as (client, _served):
        await client.send_all(GET)
        assert (await all_of(client)).startswith(b"HTTP/1.1 200 OK\r\n")


# ── heads that come again ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_head_that_comes_again_is_the_same_request_with_its_own_body(autojump_clock):
    seen: list[tuple[Request, bytes]] = []

    async def handle(request: Request, reply: Reply) -> None:
        body = b""
        while isinstance(item := await request.body.receive(), bytes):
            body += item
        seen.append((request, body))
        await ok(request, reply)

    post = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"
    async with serving(handle) as (client, served):
        for body in (b"1", b"2", b"3", b"4"):
            await client.send_all(post + body)
            assert (await client.receive_some()).endswith(b"/x")
        await client.send_all(GET)
        assert b"/x" in await client.receive_some()
    assert [body for _, body in seen] == [b"1", b"2", b"3", b"4", b""]
    heads = [request.head for request, _ in seen]
    assert heads[0] == heads[1] == heads[2] == heads[3] != heads[4]
    assert heads[2] is heads[3], "it was not read again"
    kept = [request.kept for request, _ in seen]
    assert (kept[0], kept[1]) == (None, {}), "there is room for what is made of it from the second time on"
    assert kept[1] is kept[2] is kept[3]
    assert served.exchanges == 5


async def test_a_head_that_comes_again_is_refused_again(autojump_clock):
    for _ in range(3):
        async with serving() as (client, _served):
            for _ in range(3):
                await client.send_all(GET)
                await client.receive_some()
            await client.send_all(b"GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n")
            assert b" 400 " in await client.receive_some()


async def test_a_peer_that_is_no_longer_trusted_is_refused_what_it_was_given_before(autojump_clock):
    trusted = [True]
    async with serving(fresh=lambda: trusted[0]) as (client, _):
        for _ in range(3):
            await client.send_all(GET)
            assert b" 200 " in await client.receive_some()
        trusted[0] = False
        await client.send_all(GET)
        assert b" 421 " in await client.receive_some()
