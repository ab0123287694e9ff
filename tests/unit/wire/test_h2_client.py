"""The client's side of HTTP/2, in conversation with a peer that speaks it frame by frame, and with our own server."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import MaybeSent, NoAnswer, NotSent, OurFault
from sidecar.model import (
    Aborted,
    Anonymous,
    Connection,
    Response,
    ResponseHead,
    Trailers,
)
from sidecar.wire import h2_server
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.h2_client import H2Connection
from support.h2_frames import (
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    Peer,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
    stream_pair,
)
from support.h2_sides import BUDGET, HERE, Parts, asked, plaintext_connection, request, talking, whole

OK = [(b":status", b"200")]

# ── exchanges ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_exchange_goes_there_and_back(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        assert not exchange.reused
        assert exchange.peer == BUDGET
        fields = [(b"te", b"trailers"), (b"content-length", b"9"), (b"connection", b"close"), (b"authorization", b"s")]
        await exchange.send(request("POST"), fields, Whole(b"abc"))
        sent = await talk.peer.message(1)
        assert sent.heads[0] == [
            (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"backend.internal:8443"),
            (b":path", b"/items"), (b"te", b"trailers"), (b"authorization", b"s"), (b"content-length", b"3"),
        ]  # fmt: skip
        assert sent.body == b"abc"
        await talk.peer.send(talk.peer.head(1, [*OK, (b"content-length", b"2")]))
        await talk.peer.data(1, b"ok", end=True)
        head = await exchange.receive()
        assert head == ResponseHead(status=200, fields=[(b"content-length", b"2")])
        assert exchange.body.length == 2
        assert await whole(exchange.body) == (b"ok", None)
        exchange.release()
        exchange.release()
        await talk.peer.settle()
        assert not talk.peer.resets()
        assert talk.connection.open().reused


async def test_interim_answers_are_told_one_by_one(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, [(b":status", b"103"), (b"link", b"</a>")]))
        assert (await exchange.receive()).status == 103
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        assert (await exchange.receive()).status == 200
        exchange.release()


async def test_trailers_pass_in_both_directions(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        await exchange.send(request("POST"), [], Parts(b"abc", Trailers([(b"checksum", b"1")])))
        assert (await talk.peer.message(1)).heads[1] == [(b"checksum", b"1")]
        await talk.peer.send(talk.peer.head(1, OK), DataFrame(1, data=b"x"))
        await talk.peer.send(talk.peer.head(1, [(b"grpc-status", b"0")], end=True))
        await exchange.receive()
        assert await whole(exchange.body) == (b"x", {b"grpc-status": b"0"})
        exchange.release()


@pytest.mark.parametrize(
    ("method", "status", "end"), [("HEAD", b"200", True), ("HEAD", b"200", False), ("GET", b"304", True)]
)
async def test_answer_without_body_keeps_the_length_that_it_states(autojump_clock, method, status, end):
    async with talking() as talk:
        exchange = await asked(talk, method=method)
        await talk.peer.send(talk.peer.head(1, [(b":status", status), (b"content-length", b"500")], end=end))
        head = await exchange.receive()
        assert head.fields == [(b"content-length", b"500")]
        if not end:
            await talk.peer.data(1, end=True)
        assert exchange.body.length == 0
        assert await exchange.body.receive() is None
        exchange.release()
        assert not talk.peer.resets()


async def test_fifty_exchanges_share_a_connection_with_our_own_server(autojump_clock):
    arrived = trio.Event()
    inside = 0

    async def handle(_, asked, reply):
        nonlocal inside
        inside += 1
        if inside == 50:
            arrived.set()
        await arrived.wait()
        data, trailers = await whole(asked.body)
        await reply.send(
            Response(head=ResponseHead(status=200), body=Parts(data[::-1], Trailers(list(trailers.items()))))
        )

    ours, theirs = stream_pair()
    about = Connection(
        id="c1", peer=Anonymous(reason="plaintext"), remote=HERE, local=HERE, tls=False, server_name=None,
        protocol="h2", generation=0,
    )  # fmt: skip
    served = Served(about, handle, Limits(), lambda: True, draining=False)
    connection = H2Connection(ours, max_header_bytes=60 * 1024, max_header_fields=100)
    answers = {}

    async def one(number: int) -> None:
        exchange = connection.open()
        sent = (b"%d " % number) * 10_000
        async with trio.open_nursery() as both:
            both.start_soon(exchange.send, request("POST"), [], Parts(sent, Trailers([(b"number", b"%d" % number)])))
            assert (await exchange.receive()).status == 200
            data, trailers = await whole(exchange.body)
        answers[number] = (data == sent[::-1], trailers)
        exchange.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        nursery.start_soon(h2_server.serve, theirs, bytearray(), served)
        async with trio.open_nursery() as askers:
            for number in range(50):
                askers.start_soon(one, number)
        connection.close_when_idle()
    assert answers == {number: (True, {b"number": b"%d" % number}) for number in range(50)}
    assert served.exchanges == 50
    assert served.reason is None


# ── windows ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_request_body_waits_for_the_upstreams_window(autojump_clock):
    async with talking(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1000}) as talk:
        exchange = talk.connection.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.send, request("POST"), [], Whole(bytes(5000)))
            await talk.peer.settle()
            assert len(talk.peer.messages[1].body) == 1000
            await talk.peer.send(WindowUpdateFrame(1, window_increment=4000))
            assert len((await talk.peer.message(1)).body) == 5000
        exchange.release()


async def test_answer_that_is_not_read_stops_its_sender_and_nobody_else(autojump_clock):
    async with talking() as talk:
        slow = [await asked(talk) for _ in range(60)]
        for exchange in slow:
            await talk.peer.send(talk.peer.head(exchange.id, OK))
            for size in (16384, 16384, 16384, 16383):
                await talk.peer.data(exchange.id, bytes(size))
            await exchange.receive()
        await talk.peer.settle()
        assert not any(talk.peer.window_given(exchange.id) for exchange in slow)
        arrived = talk.peer.window_given(0)
        assert arrived >= 60 * 65535, "the connection's window is nobody's to hold"
        last = await asked(talk)
        await talk.peer.send(talk.peer.head(last.id, OK), DataFrame(last.id, data=b"quick", flags=["END_STREAM"]))
        await last.receive()
        assert (await whole(last.body))[0] == b"quick"
        last.release()
        item = await slow[0].body.receive()
        await talk.peer.settle()
        assert talk.peer.window_given(slow[0].id) == len(item) == 65535
        for exchange in slow:
            exchange.release()


async def test_answer_larger_than_its_window_is_an_error_of_the_upstream(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, OK))
        for _ in range(5):
            await talk.peer.data(1, bytes(16384))
        await talk.over.wait()
        await exchange.receive()
        with pytest.raises(Aborted):
            await whole(exchange.body)
        exchange.release()


# ── how many, and until when ──────────────────────────────────────────────────────────────────────────────────────


async def test_upstream_says_how_many_exchanges_there_may_be(autojump_clock):
    async with talking(settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 2}) as talk:
        connection = talk.connection
        first, second = connection.open(), connection.open()
        assert not connection.accepting
        first.release()
        assert connection.accepting
        second.release()


async def test_hundred_exchanges_are_assumed_to_be_welcome_at_first(autojump_clock):
    async with talking(start=False) as talk:
        for _ in range(100):
            assert talk.connection.accepting
            talk.connection.open()
        assert not talk.connection.accepting


async def test_exchange_too_many_was_not_sent(autojump_clock):
    async with talking() as talk:
        first, second = talk.connection.open(), talk.connection.open()
        await first.send(request(), [], Whole())
        await talk.peer.send(SettingsFrame(0, settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 1}))
        await talk.peer.settle()
        with pytest.raises(NotSent):
            await second.send(request(), [], Whole())
        with pytest.raises(NotSent):
            await second.receive()
        first.release()
        second.release()


async def test_idle_connection_knows_since_when(autojump_clock):
    async with talking() as talk:
        await trio.sleep(10)
        exchange = talk.connection.open()
        assert talk.connection.idle_since > trio.current_time() + 1e9
        await trio.sleep(10)
        exchange.release()
        assert talk.connection.idle_since == trio.current_time()


async def test_close_when_idle_waits_for_the_last_exchange(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        talk.connection.close_when_idle()
        assert not talk.connection.accepting
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        assert (await exchange.receive()).status == 200
        assert not talk.over.is_set()
        exchange.release()
        assert (await talk.peer.goaway()).error_code == ErrorCodes.NO_ERROR
        await talk.over.wait()


async def test_connection_may_be_closed_before_it_runs(autojump_clock):
    ours, theirs = stream_pair()
    connection = H2Connection(ours, max_header_bytes=1000, max_header_fields=10)
    connection.close_when_idle()
    await connection.run()
    theirs.close()


async def test_cancelled_connection_says_goodbye_all_the_same(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        talk.cancel()
        assert (await talk.peer.goaway()).error_code == ErrorCodes.NO_ERROR
        await talk.over.wait()
        with pytest.raises(NoAnswer):
            await exchange.receive()
        exchange.release()


async def test_cancelled_connection_says_nothing_in_the_middle_of_a_frame(autojump_clock):
    async with talking(buffer_bytes=4096) as talk, trio.open_nursery() as nursery:
        exchange = talk.connection.open()
        nursery.start_soon(exchange.send, request("POST"), [], Parts(bytes(60_000), trio.Event()))
        await trio.sleep(1)  # the writer waits for the socket
        talk.cancel()
        came = b""
        while data := await talk.peer.stream.receive_some():
            came += data
        assert 4096 < len(came) < 60_000
        assert b"\0\0\x08\x07\0\0\0\0\0" not in came
        await talk.over.wait()
        nursery.cancel_scope.cancel()
        exchange.release()


# ── quiet upstreams ───────────────────────────────────────────────────────────────────────────────────────────────


def pings(talk) -> int:
    return sum(isinstance(frame, PingFrame) for frame in talk.peer.frames)


async def test_upstream_that_answers_no_ping_is_dead(autojump_clock):
    async with talking(keepalive_timeout=30.0) as talk:
        exchange = await asked(talk)
        talk.peer.acknowledges = False
        began = trio.current_time()
        with pytest.raises(NoAnswer) as raised:
            await exchange.receive()
        assert 40 <= trio.current_time() - began < 43
        assert "sign of life" in raised.value.detail
        await talk.over.wait()
        exchange.release()


async def test_quiet_upstream_that_answers_is_asked_rarely(autojump_clock):
    """What gRPC servers take without taking offence is one PING in 5 minutes, after a first one."""
    async with talking() as talk:
        exchange = await asked(talk)
        with trio.move_on_after(1000):
            await talk.peer.rest()
        assert pings(talk) == 4
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        assert (await exchange.receive()).status == 200
        exchange.release()


async def test_upstream_is_not_asked_while_nothing_is_under_way(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        await exchange.receive()
        exchange.release()
        with trio.move_on_after(1000):
            await talk.peer.rest()
        assert pings(talk) == 0
        assert talk.connection.accepting


# ── what may be tried again ───────────────────────────────────────────────────────────────────────────────────────


async def test_goaway_parts_what_was_acted_on_from_what_was_not(autojump_clock):
    async with talking() as talk:
        first, second, unsent = await asked(talk), await asked(talk), talk.connection.open()
        await talk.peer.send(GoAwayFrame(0, last_stream_id=1))
        with pytest.raises(NotSent):
            await second.receive()
        with pytest.raises(NotSent):
            await unsent.send(request(), [], Whole())
        assert not talk.connection.accepting
        await talk.peer.send(talk.peer.head(1, OK), DataFrame(1, data=b"still here", flags=["END_STREAM"]))
        assert (await first.receive()).status == 200
        assert (await whole(first.body))[0] == b"still here"
        for exchange in (first, second, unsent):
            exchange.release()
        await talk.over.wait()


async def test_goaway_that_announces_another_refuses_nothing_yet(autojump_clock):
    """A drain says first that it will come, then the last stream that it serves (RFC 9113 §6.8)."""
    async with talking() as talk:
        first, second = await asked(talk), await asked(talk)
        await talk.peer.send(GoAwayFrame(0, last_stream_id=2**31 - 1))
        await talk.peer.settle()
        assert not talk.connection.accepting
        await talk.peer.send(GoAwayFrame(0, last_stream_id=1))
        with pytest.raises(NotSent):
            await second.receive()
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        assert (await first.receive()).status == 200
        first.release()
        second.release()
        await talk.over.wait()


async def test_our_own_server_drains_without_losing_what_is_on_its_way(autojump_clock):
    """Requests are sent at every moment of a drain; each is answered, or known not to have been acted on."""
    acted: list[str] = []

    async def handle(_, request, reply):
        acted.append(request.head.target.path)
        await trio.sleep(0.001)
        await reply.send(Response(head=ResponseHead(status=200), body=Whole(b"hello")))

    ours, theirs = stream_pair()
    served = Served(plaintext_connection(), handle, Limits(), lambda: True, draining=False)
    connection = H2Connection(ours, max_header_bytes=60 * 1024, max_header_fields=100)
    answered, refused = [], []

    async def ask(number: int) -> None:
        await trio.sleep(number / 10_000)
        if connection.accepting:
            exchange = connection.open()
            try:
                await exchange.send(request(path=b"/%d" % number), [], Whole())
                assert (await exchange.receive()).status == 200
                answered.append(f"/{number}")
            except NotSent:
                refused.append(f"/{number}")
            finally:
                exchange.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(h2_server.serve, theirs, bytearray(), served)
        nursery.start_soon(connection.run)
        for number in range(90):
            nursery.start_soon(ask, number)
        await trio.sleep(0.004)
        served.drain()
    assert len(answered) >= 40
    assert sorted(acted) == sorted(answered)
    assert refused == []


async def test_request_body_goes_on_after_a_goaway(autojump_clock):
    more = trio.Event()
    async with talking() as talk:
        exchange = talk.connection.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.send, request("POST"), [], Parts(b"abc", more, b"def"))
            await talk.peer.settle()
            await talk.peer.send(GoAwayFrame(0, last_stream_id=1))
            await talk.peer.settle()
            more.set()
            assert (await talk.peer.message(1)).body == b"abcdef"
        await talk.peer.send(talk.peer.head(1, OK, end=True))
        assert (await exchange.receive()).status == 200
        exchange.release()


@pytest.mark.parametrize(
    ("code", "fault"),
    [(ErrorCodes.REFUSED_STREAM, NotSent), (ErrorCodes.INTERNAL_ERROR, MaybeSent), (ErrorCodes.CANCEL, MaybeSent),
     (ErrorCodes.NO_ERROR, MaybeSent), (255, MaybeSent)],
)  # fmt: skip
async def test_reset_by_the_upstream_says_whether_it_acted(autojump_clock, code, fault):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(RstStreamFrame(1, error_code=code))
        with pytest.raises(fault):
            await exchange.receive()
        exchange.release()
        again = await asked(talk)
        await talk.peer.send(talk.peer.head(again.id, OK, end=True))
        assert (await again.receive()).status == 200
        again.release()


async def test_refusal_of_what_was_answered_already_is_no_refusal(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        raised = []

        async def send() -> None:
            try:
                await exchange.send(request("POST"), [], Parts(b"abc", trio.Event()))
            except MaybeSent as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await talk.peer.settle()
            await talk.peer.send(talk.peer.head(1, OK), RstStreamFrame(1, error_code=ErrorCodes.REFUSED_STREAM))
            await exchange.receive()
            with pytest.raises(Aborted):
                await exchange.body.receive()
            nursery.cancel_scope.cancel()
        exchange.release()


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize(("begun", "fault"), [(False, NoAnswer), (True, MaybeSent)])
async def test_connection_that_dies_leaves_the_request_in_doubt(autojump_clock, abort, begun, fault):
    async with talking() as talk:
        exchange = await asked(talk)
        if begun:
            await talk.peer.send(talk.peer.head(1, [(b":status", b"103")]))
            await exchange.receive()
        (talk.peer.stream.abort if abort else talk.peer.stream.close)()
        with pytest.raises(fault) as raised:
            await exchange.receive()
        assert type(raised.value) is fault
        exchange.release()
        with pytest.raises(NotSent):
            await talk.connection.open().send(request(), [], Whole())


@pytest.mark.parametrize("end", ["abort", "error"])
async def test_what_was_never_written_was_not_sent_and_never_is(autojump_clock, end):
    # The upstream reads nothing, so that the writer is stuck with the first body while the second request is queued.
    async with talking(buffer_bytes=4096) as talk:
        stuck, late = talk.connection.open(), talk.connection.open()
        told = {}

        async def ask(exchange, body) -> None:
            try:
                await exchange.send(request("POST"), [], body)
                await exchange.receive()
            except (MaybeSent, NotSent) as fault:
                told[exchange] = type(fault)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, stuck, Whole(bytes(40_000)))
            await trio.sleep(1)
            nursery.start_soon(ask, late, Whole())
            await trio.sleep(1)
            assert late.ended
            if end == "abort":
                talk.peer.stream.abort()
            else:
                await talk.peer.raw(b"\xff\xff\xff\0\0\0\0\0\1")
        assert told == {stuck: NoAnswer, late: NotSent}
        if end == "error":
            await talk.peer.rest()
            assert {frame.stream_id for frame in talk.peer.frames if isinstance(frame, HeadersFrame)} == {1}
        stuck.release()
        late.release()


async def test_upstream_that_refuses_at_once_has_answered_nothing(autojump_clock):
    async with talking(start=False) as talk:
        exchange = talk.connection.open()
        await exchange.send(request(), [], Whole())
        await trio.sleep(1)
        talk.peer.stream.abort()  # as a server does that does not like our certificate
        with pytest.raises(NoAnswer):
            await exchange.receive()
        exchange.release()


async def test_cancelled_run_leaves_nobody_waiting(autojump_clock):
    ours, theirs = stream_pair()
    connection = H2Connection(ours, max_header_bytes=60 * 1024, max_header_fields=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        exchange = connection.open()
        await exchange.send(request(), [], Whole())
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    with pytest.raises(MaybeSent):
        await exchange.receive()
    exchange.release()
    assert ours.closed
    theirs.close()


# ── ends before time ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_release_of_an_unfinished_exchange_cancels_it_and_gives_its_window_back(autojump_clock):
    async with talking() as talk:
        for _ in range(30):
            exchange = await asked(talk)
            await talk.peer.send(talk.peer.head(exchange.id, OK), DataFrame(exchange.id, data=bytes(16384)))
            await exchange.receive()
            exchange.release()
            await talk.peer.message(exchange.id)
            await talk.peer.settle()
            assert talk.peer.resets()[exchange.id] == ErrorCodes.CANCEL
            await talk.peer.data(exchange.id, bytes(16384), end=True)  # it crosses the reset
        again = await asked(talk)
        await talk.peer.send(talk.peer.head(again.id, OK, end=True))
        assert (await again.receive()).status == 200
        again.release()
        assert talk.connection.claimed == 0


async def test_answer_of_which_something_is_unread_needs_no_reset(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, OK), DataFrame(1, data=b"unread", flags=["END_STREAM"]))
        await exchange.receive()
        await talk.peer.settle()
        exchange.release()
        await talk.peer.settle()
        assert not talk.peer.resets()


async def test_answer_before_the_request_has_ended_ends_the_sending(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange.send, request("POST"), [], Whole(bytes(1_000_000)))
                await talk.peer.next(HeadersFrame)
                await talk.peer.send(
                    talk.peer.head(1, [(b":status", b"413")]), DataFrame(1, data=b"no", flags=["END_STREAM"])
                )
                await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.NO_ERROR))
                assert (await exchange.receive()).status == 413
                assert await whole(exchange.body) == (b"no", None)
        exchange.release()
        await talk.peer.settle()
        assert not talk.peer.resets()


async def test_reset_in_the_middle_of_the_request_is_told_to_the_sender(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        raised = []

        async def send() -> None:
            try:
                await exchange.send(request("POST"), [], Whole(bytes(1_000_000)))
            except MaybeSent as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await talk.peer.settle()
            await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.INTERNAL_ERROR))
        assert len(raised) == 1
        exchange.release()


@pytest.mark.parametrize("body", [Parts(b"abc", Aborted("gone")), Parts(b"abc", length=5), Parts(b"abcdef", length=5)])
async def test_request_that_breaks_off_never_looks_whole(autojump_clock, body):
    async with talking() as talk:
        exchange = talk.connection.open()
        with pytest.raises(Aborted):
            await exchange.send(request("POST"), [], body)
        exchange.release()
        await talk.peer.settle()
        assert not talk.peer.messages[1].ended
        assert talk.peer.resets() == {1: ErrorCodes.CANCEL}


# ── upstreams that do wrong ───────────────────────────────────────────────────────────────────────────────────────

BAD = {
    "no status": [(b"a", b"b")],
    "no number": [(b":status", b"two")],
    "switching": [(b":status", b"101")],
    "beyond": [(b":status", b"600")],
    "path in an answer": [*OK, (b":path", b"/")],
    "connection": [*OK, (b"connection", b"close")],
    "upper case": [*OK, (b"X-A", b"b")],
    "line break": [*OK, (b"a", b"b\r\nc: d")],
    "control": [*OK, (b"a", b"b\x01c")],
    "lengths": [*OK, (b"content-length", b"1"), (b"content-length", b"1")],
    "length": [*OK, (b"content-length", b"-1")],
    "too many": [*OK, *((b"n%d" % n, b"") for n in range(100))],
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
async def test_malformed_answer_fails_its_exchange_only(autojump_clock, fields):
    async with talking() as talk:
        bad, good = await asked(talk), await asked(talk)
        await talk.peer.send(talk.peer.head(bad.id, fields))
        with pytest.raises(MaybeSent) as raised:
            await bad.receive()
        assert raised.value.code == "upstream_malformed"
        await talk.peer.send(talk.peer.head(good.id, OK, end=True))
        assert (await good.receive()).status == 200
        bad.release()
        good.release()
        await talk.peer.settle()
        assert talk.peer.resets() == {bad.id: ErrorCodes.PROTOCOL_ERROR}


@pytest.mark.parametrize(
    "frames",
    [
        [DataFrame(1, data=b"abc", flags=["END_STREAM"])],
        [DataFrame(1, data=b"abcdef")],
        [DataFrame(1, data=b"abc"), "trailers"],
        [DataFrame(1, data=b"abc"), RstStreamFrame(1, error_code=ErrorCodes.CANCEL)],
        [DataFrame(1, data=b"abc"), RstStreamFrame(1, error_code=ErrorCodes.NO_ERROR)],
        [DataFrame(1, data=b"abc"), "close"],
    ],
)
async def test_answer_that_breaks_off_is_never_a_clean_end(autojump_clock, frames):
    async with talking() as talk:
        exchange = await asked(talk)
        await talk.peer.send(talk.peer.head(1, [*OK, (b"content-length", b"5")]))
        await exchange.receive()
        for frame in frames:
            if frame == "close":
                talk.peer.stream.close()
            elif frame == "trailers":
                await talk.peer.send(talk.peer.head(1, [(b"a", b"b")], end=True))
            else:
                await talk.peer.send(frame)
        with pytest.raises(Aborted):
            await whole(exchange.body)
        exchange.release()


async def test_answer_to_head_with_a_body_is_malformed(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk, method="HEAD")
        await talk.peer.send(talk.peer.head(1, OK), DataFrame(1, data=b"unasked"))
        await exchange.receive()
        with pytest.raises(Aborted):
            await exchange.body.receive()
        exchange.release()


async def test_endless_interim_answers_are_cut_off(autojump_clock):
    async with talking() as talk:
        exchange = await asked(talk)
        for _ in range(40):
            await talk.peer.send(talk.peer.head(1, [(b":status", b"103")]))
        await talk.peer.settle()
        for _ in range(32):
            assert (await exchange.receive()).status == 103
        with pytest.raises(MaybeSent):
            await exchange.receive()
        exchange.release()


@pytest.mark.parametrize(
    "raw",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\4\1\0\0\0\0", PingFrame(0).serialize(), b"\xff\xff\xff\0\0\0\0\0\1"],
    ids=["h1", "ack first", "ping first", "large frame"],
)
async def test_upstream_that_speaks_no_http2_ends_the_connection(autojump_clock, raw):
    async with talking(start=False) as talk:
        exchange = talk.connection.open()
        await exchange.send(request(), [], Whole())
        await trio.testing.wait_all_tasks_blocked()
        await talk.peer.raw(raw)
        with pytest.raises(MaybeSent):
            await exchange.receive()
        assert (await talk.peer.goaway()).error_code in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FRAME_SIZE_ERROR)
        await talk.over.wait()
        exchange.release()


async def test_upstream_may_open_no_streams(autojump_clock):
    async with talking() as talk:
        await talk.peer.send(talk.peer.head(2, OK, end=True))
        await talk.over.wait()
        assert talk.connection.error == "h2_protocol_error"


async def test_ping_flood_by_the_upstream_ends_the_connection(autojump_clock):
    async with talking() as talk:
        try:
            for _ in range(20):
                await talk.peer.send(*[PingFrame(0)] * 100)
                await talk.peer.settle()
        except trio.BrokenResourceError:
            pass
        await talk.over.wait()
        assert talk.connection.error == "h2_enhance_your_calm"


async def test_there_are_no_tunnels(autojump_clock):
    async with talking() as talk:
        exchange = talk.connection.open()
        with pytest.raises(NotSent):
            await exchange.send(request("CONNECT"), [], Whole())
        with pytest.raises(OurFault):
            exchange.tunnel()
        exchange.release()


# ── any bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def conversation() -> bytes:
    peer = Peer()
    frames = [
        SettingsFrame(0, settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 10}),
        peer.head(1, [(b":status", b"103"), (b"link", b"</a>")]),
        peer.head(1, [*OK, (b"content-length", b"6"), (b"x-twice", b"value")]),
        DataFrame(1, data=b"abc"),
        peer.head(3, [*OK, (b"x-twice", b"value")], end=True),
        DataFrame(1, data=b"def"),
        peer.head(1, [(b"trailer-field", b"last")], end=True),
        GoAwayFrame(0, last_stream_id=3),
    ]
    return b"".join(frame.serialize() for frame in frames)


async def told(chunks: list[bytes]) -> list:
    """What two exchanges are told when the upstream sends these bytes."""
    seen = {}

    async def ask(exchange) -> None:
        try:
            await exchange.send(request(), [], Whole())
            while (head := await exchange.receive()).status < 200:
                seen.setdefault(exchange.id, []).append(head)
            seen.setdefault(exchange.id, []).append((head, await whole(exchange.body)))
        except (MaybeSent, NotSent, Aborted) as error:
            seen.setdefault(exchange.id, []).append(type(error))
        finally:
            exchange.release()

    async with talking(start=False) as talk:
        talk.peer.acknowledges = False
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask, talk.connection.open())
                await trio.sleep(0.001)
            try:
                for chunk in chunks:
                    await talk.peer.raw(chunk)
                    await trio.lowlevel.checkpoint()
                await talk.peer.settle()
            except trio.BrokenResourceError:
                pass
            talk.peer.stream.close()
    return [seen[1], seen.get(3)]


def run(chunks: list[bytes]):
    return trio.run(told, chunks, clock=trio.testing.MockClock(autojump_threshold=0))


WHOLE = conversation()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12))
def test_every_chunking_of_the_same_bytes_gives_the_same_answers(cuts):
    edges = [0, *sorted(set(cuts)), len(WHOLE)]
    chunks = [WHOLE[a:b] for a, b in pairwise(edges)]
    expected = run([WHOLE])
    assert expected[0][-1][1] == (b"abcdef", {b"trailer-field": b"last"})
    assert run(chunks) == expected


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(1, 40))
def test_no_bytes_leave_an_exchange_without_an_end(at, value, length):
    """Overwritten, cut out or doubled: each exchange has an answer or a fault, and `run` raises nothing."""
    run([WHOLE[:at] + bytes([value]) * min(length, 3) + WHOLE[at + 3 :]])
    run([WHOLE[:at] + WHOLE[at + length :]])
    run([WHOLE[: at + length] + WHOLE[at:]])
