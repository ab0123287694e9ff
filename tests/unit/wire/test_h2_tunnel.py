"""Tunnels over one stream of HTTP/2 (RFC 8441): asked for and accepted, ended, and broken, on both sides."""

from __future__ import annotations

import pytest
import trio
from h2.errors import ErrorCodes

from sidecar.errors import MaybeSent, NotSent, OurFault, UpgradeUnsupported
from sidecar.model import ResponseHead
from sidecar.wire import h2_client, h2_server
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.h2_client import H2Connection
from support.h2_frames import DataFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame, stream_pair
from support.h2_sides import ok, plaintext_connection, request, serving, talking, whole

CONNECT = [
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":authority", b"backend.internal"),
    (b":path", b"/chat"), (b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"a"),
]  # fmt: skip
SWITCH = ResponseHead(status=101, fields=[(b"sec-websocket-protocol", b"chat"), (b"sec-websocket-accept", b"b")])
TAKES_TUNNELS = {SettingsFrame.ENABLE_CONNECT_PROTOCOL: 1}


async def echo(_, request, reply):
    """Sends back what comes, and ends when that ends."""
    assert (request.head.method, request.head.upgrade, request.body.length) == ("GET", "websocket", 0)
    assert await request.body.receive() is None
    stream = await reply.tunnel(SWITCH)
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


# ── the server's side ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_tunnel_is_opened_carries_bytes_and_ends_in_order(autojump_clock):
    async with serving(echo) as talk:
        await talk.peer.request(1, CONNECT, end=False)
        await talk.peer.data(1, b"early ")  # before it is known whether there will be a tunnel
        await talk.peer.data(1, b"bytes")
        await talk.peer.settle()
        message = talk.peer.messages[1]
        assert message.heads == [[(b":status", b"200"), (b"sec-websocket-protocol", b"chat")]]
        assert message.body == b"early bytes"
        assert not message.ended
        await talk.peer.data(1, b" and more", end=True)
        await talk.peer.message(1)
        assert (message.body, message.ended, message.reset) == (b"early bytes and more", True, None)
    assert talk.served.exchanges == 1
    assert talk.served.reason is None


async def test_tunnel_may_be_half_closed_in_either_direction(autojump_clock):
    async def one_after_the_other(_, request, reply):
        stream = await reply.tunnel(SWITCH)
        if request.head.target.path == "/we-first":
            await stream.send_all(b"all of ours")
            await stream.send_eof()
            await stream.send_eof()
        said = b""
        while data := await stream.receive_some():
            said += data
        assert said == b"all of theirs"
        assert await stream.receive_some() == b""
        if request.head.target.path == "/they-first":
            await trio.sleep(20)
            await stream.send_all(b"all of ours")
            await stream.send_eof()

    async with serving(one_after_the_other) as talk:
        for stream_id, path in ((1, b"/we-first"), (3, b"/they-first")):
            fields = [(name, path if name == b":path" else value) for name, value in CONNECT]
            await talk.peer.request(stream_id, fields, end=False)
        await talk.peer.data(3, b"all of theirs", end=True)
        assert (await talk.peer.message(1)).ended
        await trio.sleep(20)
        await talk.peer.data(1, b"all of theirs", end=True)
        for stream_id in (1, 3):
            message = await talk.peer.message(stream_id)
            assert (message.body, message.reset) == (b"all of ours", None)


async def test_tunnel_whose_asking_ends_the_stream_carries_one_direction(autojump_clock):
    async with serving(echo) as talk:
        await talk.peer.request(1, CONNECT)
        message = await talk.peer.message(1)
        assert (message.status, message.body, message.ended) == (200, b"", True)


async def test_request_for_a_tunnel_may_be_answered_like_any_other(autojump_clock):
    async def refuse(_, request, reply):
        await reply.send(ok(status=403))

    async with serving(refuse) as talk:
        await talk.peer.request(1, CONNECT, end=False)
        await talk.peer.data(1, b"too soon")
        message = await talk.peer.message(1)
        assert (message.status, message.body) == (403, b"hello")
        await talk.peer.next(RstStreamFrame)
        assert message.reset == ErrorCodes.NO_ERROR


async def test_tunnel_that_breaks_is_cancelled_and_never_ends(autojump_clock):
    async def broken(_, request, reply):
        stream = await reply.tunnel(SWITCH)
        await stream.send_all(b"some")
        if request.head.target.path == "/half":
            await stream.send_eof()
        elif request.head.target.path == "/close":
            await stream.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"more")
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

    async with serving(broken) as talk:
        for stream_id, path in ((1, b"/"), (3, b"/half"), (5, b"/close")):
            fields = [(name, path if name == b":path" else value) for name, value in CONNECT]
            await talk.peer.request(stream_id, fields, end=False)
            await talk.peer.next(RstStreamFrame)
            message = talk.peer.messages[stream_id]
            assert message.reset == ErrorCodes.CANCEL
            assert message.body == b"some"
            assert message.ended == (path == b"/half")


@pytest.mark.parametrize("where", ["reading", "writing"])
async def test_reset_by_the_client_breaks_the_tunnel(autojump_clock, where):
    ended = trio.Event()
    raised = []

    async def handle(_, request, reply):
        stream = await reply.tunnel(SWITCH)
        try:
            if where == "reading":
                await stream.receive_some()
            else:
                await stream.send_all(bytes(100_000))
        except (trio.BrokenResourceError, trio.Cancelled) as error:
            raised.append((type(error), reply.gone))
            raise
        finally:
            ended.set()

    async with serving(handle) as talk:
        await talk.peer.request(1, CONNECT, end=False)
        await talk.peer.settle()
        await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
        with trio.fail_after(0.01):
            await ended.wait()
        await talk.peer.request(3)  # the connection lives on
        await talk.peer.settle()
        assert not [frame for frame in talk.peer.frames if frame.stream_id == 1 and "END_STREAM" in frame.flags]
    assert raised == [(trio.BrokenResourceError, True)]


async def test_nothing_but_data_may_come_in_a_tunnel(autojump_clock):
    async with serving(echo) as talk:
        await talk.peer.request(1, CONNECT, end=False)
        await talk.peer.settle()
        await talk.peer.send(talk.peer.head(1, [(b"a", b"b")], end=True))
        assert (await talk.peer.message(1)).reset == ErrorCodes.PROTOCOL_ERROR
        assert not talk.peer.messages[1].ended


async def test_tunnel_keeps_to_the_windows_in_both_directions(autojump_clock):
    async def handle(_, request, reply):
        stream = await reply.tunnel(SWITCH)
        await stream.send_all(bytes(1000))
        await trio.sleep(10)
        got = b""
        while data := await stream.receive_some(1000):
            assert len(data) <= 1000
            got += data
        await stream.send_all(b"%d" % len(got))
        await stream.send_eof()

    async with serving(handle, window=10) as talk:
        await talk.peer.request(1, CONNECT, end=False)
        for size in (16384, 16384, 16384, 16383):
            await talk.peer.data(1, bytes(size))
        await talk.peer.settle()
        assert len(talk.peer.messages[1].body) == 10
        assert talk.peer.window_given(1) == 0
        await talk.peer.send(WindowUpdateFrame(1, window_increment=2000))
        await trio.sleep(11)
        await talk.peer.settle()
        assert talk.peer.window_given(1) > 30_000
        await talk.peer.data(1, b"the end", end=True)
        assert (await talk.peer.message(1)).body == bytes(1000) + b"65542"


async def test_nobody_is_given_a_tunnel_who_has_not_asked_for_one(autojump_clock):
    raised = []

    async def handle(_, request, reply):
        try:
            await reply.tunnel(SWITCH)
        except OurFault as error:
            raised.append(error.code)
            await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200
    assert raised == ["tunnel_unsupported"]


# ── the client's side ─────────────────────────────────────────────────────────────────────────────────────────────


async def asked(talk, **of):
    exchange = talk.connection.open()
    await exchange.send(request(upgrade="websocket", **of), [(b"sec-websocket-key", b"a"), (b"x", b"y")], Whole())
    await talk.peer.settle()
    return exchange


async def opened(talk, fields=()):
    exchange = await asked(talk)
    await talk.peer.send(talk.peer.head(exchange.id, [(b":status", b"200"), *fields]))
    head = await exchange.receive()
    assert head.status == 101
    return exchange, exchange.tunnel()


async def test_upstream_is_asked_for_a_tunnel_and_grants_it(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange = await asked(talk)
        sent = talk.peer.messages[1]
        assert sent.heads == [[
            (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"),
            (b":authority", b"backend.internal:8443"), (b":path", b"/items"), (b"x", b"y"),
        ]]  # fmt: skip
        assert not sent.ended
        granted = [(b":status", b"200"), (b"content-length", b"3"), (b"sec-websocket-protocol", b"chat")]
        # All at once, and longer than the length that has no meaning here (RFC 9110 §9.3.6).
        await talk.peer.send(talk.peer.head(1, granted), DataFrame(1, data=b"welcome"))
        assert await exchange.receive() == ResponseHead(status=101, fields=[(b"sec-websocket-protocol", b"chat")])
        stream = exchange.tunnel()
        assert await stream.receive_some() == b"welcome"
        await stream.send_all(b"thanks")
        await stream.send_eof()
        assert (await talk.peer.message(1)).body == b"thanks"
        assert talk.peer.messages[1].ended
        await talk.peer.data(1, b"bye", end=True)
        assert await stream.receive_some() == b"bye"
        assert await stream.receive_some() == b""
        exchange.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {}
        assert talk.connection.accepting


async def test_upstream_may_answer_a_request_for_a_tunnel_like_any_other(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange = await asked(talk)
        interim, final = talk.peer.head(1, [(b":status", b"103")]), talk.peer.head(1, [(b":status", b"404")])
        await talk.peer.send(interim, final, DataFrame(1, data=b"no", flags=["END_STREAM"]))
        assert (await exchange.receive()).status == 103
        assert (await exchange.receive()).status == 404
        assert await whole(exchange.body) == (b"no", None)
        with pytest.raises(OurFault):
            exchange.tunnel()
        exchange.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {1: ErrorCodes.CANCEL}, "our side of the stream was open"


@pytest.mark.parametrize("settings", [None, {SettingsFrame.ENABLE_CONNECT_PROTOCOL: 0}])
async def test_upstream_that_takes_no_tunnels_is_sent_nothing(autojump_clock, settings):
    async with talking(settings=settings) as talk:
        exchange = talk.connection.open()
        with pytest.raises(UpgradeUnsupported) as raised:
            await exchange.send(request(upgrade="websocket"), [], Whole())
        assert (raised.value.code, raised.value.status) == ("upgrade_unsupported", 501)
        with pytest.raises(UpgradeUnsupported):
            await exchange.receive()
        exchange.release()
        await talk.peer.settle()
        assert 1 not in talk.peer.messages
        assert talk.connection.accepting


async def test_settings_are_waited_for_before_it_is_decided(autojump_clock):
    async with talking(start=False) as talk, trio.open_nursery() as nursery:
        exchange = talk.connection.open()

        async def send() -> None:
            await exchange.send(request(upgrade="websocket"), [], Whole())

        nursery.start_soon(send)
        await trio.sleep(2)
        await talk.peer.start(TAKES_TUNNELS, preface=False)
        await talk.peer.settle()
        assert dict(talk.peer.messages[1].heads[0])[b":protocol"] == b"websocket"
        exchange.release()


async def test_upstream_that_sends_no_settings_is_not_waited_for(autojump_clock):
    async with talking(start=False) as talk:
        exchange = talk.connection.open()
        began = trio.current_time()
        with pytest.raises(NotSent) as raised:
            await exchange.send(request(upgrade="websocket"), [], Whole())
        assert trio.current_time() - began == h2_client._SETTINGS_TIMEOUT
        assert raised.value.code == "upstream_handshake_timeout"
        exchange.release()


async def test_connection_that_ends_before_its_settings_was_sent_nothing(autojump_clock):
    async with talking(start=False) as talk, trio.open_nursery() as nursery:
        exchange = talk.connection.open()

        async def end() -> None:
            await trio.sleep(1)
            talk.peer.stream.close()

        nursery.start_soon(end)
        with pytest.raises(NotSent):
            await exchange.send(request(upgrade="websocket"), [], Whole())
        exchange.release()


@pytest.mark.parametrize("after_the_end", [False, True])
async def test_reset_by_the_upstream_breaks_the_tunnel(autojump_clock, after_the_end):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange, stream = await opened(talk)
        if after_the_end:
            await talk.peer.data(1, b"", end=True)
            assert await stream.receive_some() == b""
        await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
        await talk.peer.settle()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        if not after_the_end:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        exchange.release()


async def test_connection_that_dies_breaks_the_tunnel(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange, stream = await opened(talk)
        talk.peer.stream.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        exchange.release()


@pytest.mark.parametrize("ours_ended", [False, True])
async def test_release_of_a_tunnel_that_has_not_ended_cancels_it(autojump_clock, ours_ended):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange, stream = await opened(talk)
        if ours_ended:
            await stream.send_eof()
        exchange.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {1: ErrorCodes.CANCEL}


async def test_close_of_a_tunnel_cancels_it_at_once_and_leaves_one_that_has_ended_alone(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange, stream = await opened(talk)
        await stream.aclose()
        await stream.aclose()
        await talk.peer.settle()
        assert talk.peer.resets() == {1: ErrorCodes.CANCEL}
        exchange.release()
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(3, [(b":status", b"200")], end=True))
        assert (await exchange.receive()).status == 101
        stream = exchange.tunnel()
        assert await stream.receive_some() == b""
        await stream.send_eof()
        await stream.aclose()
        exchange.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {1: ErrorCodes.CANCEL}


async def test_trailers_in_a_tunnel_are_an_error_of_the_upstream(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange, stream = await opened(talk)
        await talk.peer.send(talk.peer.head(1, [(b"a", b"b")], end=True))
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        exchange.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {1: ErrorCodes.PROTOCOL_ERROR}


async def test_hundred_and_one_is_no_answer_of_http2(autojump_clock):
    async with talking(settings=TAKES_TUNNELS) as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, [(b":status", b"101")]))
        with pytest.raises(MaybeSent) as raised:
            await exchange.receive()
        assert raised.value.code == "upstream_malformed"
        exchange.release()


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_megabytes_go_both_ways_through_a_tunnel_of_our_own_sides(autojump_clock):
    ours, theirs = stream_pair()
    served = Served(plaintext_connection(), echo, Limits(), lambda: True, draining=False)
    connection = H2Connection(ours, max_header_bytes=60 * 1024, max_header_fields=100)
    size = 2 * 1024 * 1024
    got = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(h2_server.serve, theirs, bytearray(), served)
        nursery.start_soon(connection.run)
        exchange = connection.open()
        await exchange.send(request(upgrade="websocket"), [], Whole())
        assert (await exchange.receive()).status == 101
        stream = exchange.tunnel()

        async def send() -> None:
            for _ in range(size // 32768):
                await stream.send_all(bytes(32768))
            await stream.send_eof()

        nursery.start_soon(send)
        while data := await stream.receive_some():
            got += len(data)
        exchange.release()
        connection.close_when_idle()
    assert got == size
