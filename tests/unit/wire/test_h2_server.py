"""The server's side of HTTP/2, in conversation with a peer that speaks it frame by frame."""

from __future__ import annotations

import socket
from itertools import pairwise

import hpack
import pytest
import trio
from h2.errors import ErrorCodes
from hyperframe.frame import ExtensionFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model import (
    Aborted,
    ClientGone,
    ResponseHead,
    Trailers,
)
from sidecar.wire import h2_heads, h2_link, h2_server
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.network import Stream
from support.h2_frames import (
    GET,
    POST,
    PREFACE,
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    Message,
    Peer,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from support.h2_sides import Parts, ok, plaintext_connection, serving, whole

# ── requests and answers ──────────────────────────────────────────────────────────────────────────────────────────


async def test_request_is_handed_over_and_answered(autojump_clock):
    seen = []

    async def handle(connection, request, reply):
        seen.append(request)
        assert request.body.length == 0
        assert await request.body.receive() is None
        await reply.send(ok(fields=((b"content-type", b"text/plain"), (b"connection", b"close"))))
        assert reply.complete
        assert reply.bytes_sent == 5

    async with serving(handle) as talk:
        crumbs = [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"te", b"trailers"), (b"host", b"backend.internal")]
        await talk.peer.request(1, [*GET[:3], (b":path", b"/a/../items?q=1"), *crumbs])
        message = await talk.peer.message(1)
    head = seen[0].head
    assert (head.method, str(head.target), head.authority) == ("GET", "/items?q=1", "backend.internal")
    assert head.protocol == "HTTP/2"
    assert sorted(head.fields) == [(b"cookie", b"a=1; b=2"), (b"te", b"trailers")]
    assert message.heads == [[(b":status", b"200"), (b"content-type", b"text/plain"), (b"content-length", b"5")]]
    assert message.body == b"hello"
    assert talk.served.exchanges == 1
    assert talk.served.reason is None


async def test_bytes_read_before_are_served_first(autojump_clock):
    first = PREFACE + SettingsFrame(0).serialize() + Peer().head(1, GET, end=True).serialize()
    async with serving(start=False, buffer=first) as talk:
        assert (await talk.peer.message(1)).status == 200


async def test_fifty_streams_are_open_at_once_and_end_in_any_order(autojump_clock):
    gates = {f"/{n}": trio.Event() for n in range(50)}
    inside = []

    async def handle(_, request, reply):
        inside.append(request.head.target.path)
        await gates[request.head.target.path].wait()
        await reply.send(ok(Whole(request.head.target.path.encode())))

    async with serving(handle) as talk:
        for n in range(50):
            await talk.peer.request(2 * n + 1, [*GET[:3], (b":path", b"/%d" % n)])
        await talk.peer.settle()
        assert len(inside) == 50
        for n in reversed(range(50)):
            gates[f"/{n}"].set()
            assert (await talk.peer.message(2 * n + 1)).body == b"/%d" % n
    assert talk.served.exchanges == 50


async def test_bodies_and_trailers_pass_in_both_directions(autojump_clock):
    async def handle(_, request, reply):
        assert request.body.length is None
        data, trailers = await whole(request.body)
        assert trailers == {b"checksum": b"abc"}
        await reply.send(ok(Parts(data[::-1], Trailers([(b"grpc-status", b"0"), (b"connection", b"x")]))))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.data(1, b"abc")
        await talk.peer.data(1, b"def")
        await talk.peer.send(talk.peer.head(1, [(b"checksum", b"abc")], end=True))
        message = await talk.peer.message(1)
        assert message.body == b"fedcba"
        assert message.heads[1] == [(b"grpc-status", b"0")]
        assert message.ended
        assert message.reset is None


async def test_interim_answers_come_before_the_final_one(autojump_clock):
    async def handle(_, request, reply):
        assert request.head.expects_continue
        await reply.interim(ResponseHead(status=100))
        await reply.interim(ResponseHead(status=103, fields=[(b"link", b"</a>")]))
        await whole(request.body)
        await reply.send(ok())
        await reply.interim(ResponseHead(status=103))

    async with serving(handle) as talk:
        await talk.peer.request(1, [*POST, (b"expect", b"100-continue")], end=False)
        assert (await talk.peer.next(HeadersFrame)).stream_id == 1
        await talk.peer.data(1, b"x", end=True)
        message = await talk.peer.message(1)
        assert [dict(head)[b":status"] for head in message.heads] == [b"100", b"103", b"200"]


@pytest.mark.parametrize(
    ("method", "status", "stated", "sent"),
    [(b"HEAD", 200, b"500", b"500"), (b"GET", 304, b"500", b"500"), (b"GET", 204, b"0", None)],
)
async def test_answer_without_body_ends_with_its_head(autojump_clock, method, status, stated, sent):
    async def handle(_, request, reply):
        await reply.send(ok(Parts(RuntimeError("not to be read")), status, ((b"content-length", stated),)))

    async with serving(handle) as talk:
        await talk.peer.request(1, [(b":method", method), *GET[1:]])
        message = await talk.peer.message(1)
        assert message.fields.get(b"content-length") == sent
        assert message.ended
        assert not [frame for frame in talk.peer.frames if isinstance(frame, DataFrame)]


async def test_empty_answer_ends_with_its_head_and_a_short_one_with_its_data(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(b"") if request.head.target.path == "/empty" else Parts(b"ab", b"cd")))

    async with serving(handle) as talk:
        await talk.peer.request(1, [*GET[:3], (b":path", b"/empty")])
        await talk.peer.message(1)
        await talk.peer.request(3)
        await talk.peer.message(3)
        frames = [frame for frame in talk.peer.frames if frame.stream_id in (1, 3)]
        assert [(type(frame).__name__, "END_STREAM" in frame.flags) for frame in frames] == [
            ("HeadersFrame", True), ("HeadersFrame", False), ("DataFrame", False), ("DataFrame", True),
        ]  # fmt: skip


async def test_head_leaves_before_a_body_that_is_not_there_yet(autojump_clock):
    more = trio.Event()

    async def handle(_, request, reply):
        await reply.send(ok(Parts(more, b"late")))

    async with serving(handle) as talk:
        await talk.peer.request(1)
        assert isinstance(await talk.peer.next(HeadersFrame), HeadersFrame)
        more.set()
        assert (await talk.peer.message(1)).body == b"late"


# ── windows ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sender_is_given_no_window_until_the_handler_reads(autojump_clock):
    read = trio.Event()

    async def handle(_, request, reply):
        await read.wait()
        data, _ = await whole(request.body)
        await reply.send(ok(Whole(b"%d" % len(data))))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        for size in (16384, 16384, 16384, 16383):
            await talk.peer.data(1, bytes(size))
        await talk.peer.settle()
        assert talk.peer.window_given(1) == 0
        read.set()
        await talk.peer.settle()
        assert talk.peer.window_given(1) == 65535
        await talk.peer.data(1, b"end", end=True)
        assert (await talk.peer.message(1)).body == b"65538"


async def test_sending_past_the_window_is_an_error(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep_forever()

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        for _ in range(5):
            await talk.peer.data(1, bytes(16384))
        assert (await talk.peer.goaway()).error_code == ErrorCodes.FLOW_CONTROL_ERROR


async def test_upload_that_nobody_reads_does_not_hold_up_another(autojump_clock):
    async def handle(_, request, reply):
        if request.head.target.path == "/stuck":
            await trio.sleep_forever()
        data, _ = await whole(request.body)
        await reply.send(ok(Whole(b"%d" % len(data))))

    async with serving(handle) as talk:
        await talk.peer.request(1, [*POST[:3], (b":path", b"/stuck")], end=False)
        for size in (16384, 16384, 16384, 16383):
            await talk.peer.data(1, bytes(size))
        await talk.peer.request(3, POST, end=False)
        for _ in range(128):  # 2 MiB, twice the connection's window
            while 65535 + talk.peer.window_given(3) < talk.peer.sent(3) + 16384:
                await talk.peer.next(WindowUpdateFrame)
            await talk.peer.data(3, bytes(16384))
        await talk.peer.data(3, end=True)
        assert (await talk.peer.message(3)).body == b"2097152"


async def test_window_comes_back_for_bodies_that_nobody_wanted(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(status=403))

    async with serving(handle) as talk:
        for n in range(100):
            await talk.peer.request(2 * n + 1, POST, end=False)
            await talk.peer.message(2 * n + 1)
            await talk.peer.data(2 * n + 1, bytes(16384))  # it crosses the reset
        await talk.peer.settle()
        # No more than half of a window is ever kept back to be given in one step.
        assert 100 * 16384 - talk.peer.window_given(0) + (1024 * 1024 - 65535) <= 512 * 1024
        assert not [frame for frame in talk.peer.frames if isinstance(frame, GoAwayFrame)]


async def test_padding_is_given_back_at_once(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(b"%d" % len((await whole(request.body))[0]))))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        for _ in range(300):
            await talk.peer.send(DataFrame(1, data=b"x", pad_length=255, flags=["PADDED"]))
        await talk.peer.data(1, end=True)
        assert (await talk.peer.message(1)).body == b"300"
        assert talk.peer.window_given(1) >= 300 * 256 - 65535


async def test_small_frames_are_kept_together(autojump_clock):
    read = trio.Event()
    items = []

    async def handle(_, request, reply):
        await read.wait()
        while (item := await request.body.receive()) is not None:
            items.append(item)
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.send(*[DataFrame(1, data=b"x") for _ in range(5000)])
        await talk.peer.data(1, end=True)
        await talk.peer.settle()
        read.set()
        await talk.peer.message(1)
    assert items == [b"x" * 5000]


async def test_answer_waits_for_the_windows_and_keeps_to_the_frame_size(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(100_000))))

    async with serving(handle, window=10) as talk:
        await talk.peer.request(1)
        await talk.peer.settle()
        assert len(talk.peer.messages[1].body) == 10
        await talk.peer.send(WindowUpdateFrame(1, window_increment=200_000))
        await talk.peer.settle()
        assert len(talk.peer.messages[1].body) == 65535, "the connection's window is the smaller now"
        await talk.peer.send(WindowUpdateFrame(0, window_increment=200_000))
        assert len((await talk.peer.message(1)).body) == 100_000
        assert max(len(f.data) for f in talk.peer.frames if isinstance(f, DataFrame)) <= 16384


async def test_larger_settings_open_the_windows_of_open_streams(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(1000))))

    async with serving(handle, window=10) as talk:
        await talk.peer.request(1)
        await talk.peer.settle()
        await talk.peer.send(SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 5000}))
        assert len((await talk.peer.message(1)).body) == 1000


async def test_client_that_takes_one_answer_slowly_gets_the_others(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(20_000) if request.head.target.path == "/large" else b"small")))

    async with serving(handle, window=100) as talk:
        await talk.peer.request(1, [*GET[:3], (b":path", b"/large")])
        for stream_id in range(3, 103, 2):
            await talk.peer.request(stream_id)
            assert (await talk.peer.message(stream_id)).body == b"small"
        assert len(talk.peer.messages[1].body) == 100


async def test_streams_share_the_connections_window(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(60_000))))

    async with serving(handle) as talk:
        for stream_id in (1, 3, 5):
            await talk.peer.request(stream_id)
        await talk.peer.settle()
        for _ in range(6):
            await talk.peer.send(WindowUpdateFrame(0, window_increment=16384))
        await talk.peer.settle()
        for stream_id in (1, 3, 5):
            assert len(talk.peer.messages[stream_id].body) >= 30_000


# ── ends before time ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["reading", "waiting", "sending"])
async def test_reset_by_the_client_ends_the_handler_at_once(autojump_clock, where):
    ended = trio.Event()
    raised = []

    async def handle(_, request, reply):
        try:
            if where == "reading":
                await whole(request.body)
            elif where == "waiting":
                await trio.sleep_forever()
            else:
                await reply.send(ok(Whole(bytes(1000))))
        except (Aborted, trio.Cancelled) as error:
            raised.append(type(error))
            raise
        finally:
            ended.set()

    async with serving(handle, window=10) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.settle()
        await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
        with trio.fail_after(0.001):
            await ended.wait()
        await talk.peer.send(PingFrame(0, opaque_data=b"12345678"))
        await talk.peer.next(PingFrame)  # the connection lives on
    assert raised[0] is {"reading": Aborted, "waiting": trio.Cancelled, "sending": ClientGone}[where]


async def test_connection_that_is_lost_aborts_every_stream(autojump_clock):
    raised = []

    async def handle(_, request, reply):
        try:
            await whole(request.body)
        except Aborted as error:
            raised.append(error)

    async with serving(handle) as talk:
        for stream_id in (1, 3, 5):
            await talk.peer.request(stream_id, POST, end=False)
            await talk.peer.data(stream_id, b"begun")
        await talk.peer.settle()
        talk.peer.stream.abort()
        await talk.over.wait()
    assert len(raised) == 3
    assert talk.served.reason == "exchange_aborted"
    assert talk.error is None


@pytest.mark.parametrize(
    "body",
    [
        Parts(b"abc", Aborted("broke off")),
        Parts(b"abc", Aborted("broke off"), ready=False),
        Parts(b"abc", length=5),
        Parts(b"abc", length=5, ready=False),
        Parts(b"abc", Trailers([(b"a", b"b")]), length=5),
        Parts(b"abcdef", length=5),
        Parts(length=5),
        Parts(length=5, ready=False),
    ],
)
async def test_answer_that_breaks_off_never_looks_whole(autojump_clock, body):
    raised = []

    async def handle(_, request, reply):
        try:
            await reply.send(ok(body))
        except Aborted as error:
            raised.append(error)
            assert reply.started
            assert not reply.complete

    async with serving(handle) as talk:
        await talk.peer.request(1)
        message = await talk.peer.message(1)
        assert message.reset == ErrorCodes.INTERNAL_ERROR
        assert not message.ended
    assert len(raised) == 1


async def test_handler_that_does_not_answer_resets_its_stream_only(autojump_clock):
    async def handle(_, request, reply):
        if request.head.method == "GET":
            await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1, POST)
        assert (await talk.peer.message(1)).reset == ErrorCodes.INTERNAL_ERROR
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).status == 200


async def test_answer_before_the_request_has_ended_stops_the_sender(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(status=413))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        message = await talk.peer.message(1)
        assert message.status == 413
        await talk.peer.next(RstStreamFrame)
        assert message.ended
        assert message.reset == ErrorCodes.NO_ERROR
        await talk.peer.data(1, b"on its way")
        await talk.peer.send(PingFrame(0, opaque_data=b"12345678"))
        await talk.peer.next(PingFrame)
        assert len(talk.peer.resets()) == 1


async def test_defect_resets_its_stream_lets_others_finish_and_is_told(autojump_clock):
    finish = trio.Event()

    async def handle(_, request, reply):
        if request.head.method == "POST":
            raise RuntimeError("a defect")
        await finish.wait()
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        await talk.peer.request(3, POST)
        assert (await talk.peer.message(3)).reset == ErrorCodes.INTERNAL_ERROR
        await talk.peer.goaway()
        finish.set()
        assert (await talk.peer.message(1)).status == 200
        await talk.peer.rest()
    assert isinstance(talk.error, RuntimeError)


async def test_second_final_answer_is_refused(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok())
        with pytest.raises(Exception, match="second final answer"):
            await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).body == b"hello"


# ── what is not a request ─────────────────────────────────────────────────────────────────────────────────────────

MALFORMED = {
    "no method": GET[1:],
    "no scheme": [GET[0], *GET[2:]],
    "no path": GET[:3],
    "no authority": [*GET[:2], GET[3]],
    "empty path": [*GET[:3], (b":path", b"")],
    "method twice": [GET[0], *GET],
    "unknown pseudo-field": [*GET, (b":colour", b"red")],
    "status in a request": [*GET, (b":status", b"200")],
    "interim status in a request": [(b":status", b"100"), *GET],
    "pseudo-field behind a field": [*GET[:3], (b"a", b"b"), GET[3]],
    "authority and host differ": [*GET, (b"host", b"other.internal")],
    "two hosts": [*GET, (b"host", b"backend.internal"), (b"host", b"backend.internal")],
    "upper case": [*GET, (b"X-Name", b"a")],
    "empty name": [*GET, (b"", b"a")],
    "line break in a value": [*GET, (b"a", b"b\r\nc: d")],
    "NUL in a value": [*GET, (b"a", b"b\0c")],
    "space before a value": [*GET, (b"a", b" b")],
    "space in a name": [*GET, (b"a b", b"c")],
    "connection": [*GET, (b"connection", b"close")],
    "transfer-encoding": [*GET, (b"transfer-encoding", b"chunked")],
    "upgrade": [*GET, (b"upgrade", b"websocket")],
    "te": [*GET, (b"te", b"gzip")],
    "protocol without CONNECT": [*GET, (b":protocol", b"websocket")],
    "length is no number": [*GET, (b"content-length", b"five")],
    "space behind a value": [*GET, (b"a", b"b ")],
    "tab behind a value": [*GET, (b"a", b"b\t")],
    "line break in a name": [*GET, (b"a\nb", b"c")],
    "colon in a name": [*GET, (b"a:b", b"c")],
    "keep-alive": [*GET, (b"keep-alive", b"timeout=5")],
    "proxy-connection": [*GET, (b"proxy-connection", b"keep-alive")],
    "CONNECT with a path": [(b":method", b"CONNECT"), *GET[2:]],
    "CONNECT with a scheme": [(b":method", b"CONNECT"), *GET[1:3]],
    "CONNECT without authority": [(b":method", b"CONNECT")],
    "tunnel without scheme": [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *GET[2:]],
    "tunnel without path": [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *GET[1:3]],
    "nothing": [],
    "two lengths": [*GET, (b"content-length", b"5"), (b"content-length", b"6")],
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_request_is_reset_and_harms_no_other(autojump_clock, fields):
    async def handle(_, request, reply):
        await trio.sleep(1)
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        await talk.peer.request(3, fields)
        await talk.peer.request(5)
        assert (await talk.peer.message(3)).reset == ErrorCodes.PROTOCOL_ERROR
        assert (await talk.peer.message(1)).status == 200
        assert (await talk.peer.message(5)).status == 200
    assert talk.served.exchanges == 2


REFUSED = {
    "scheme": (400, [GET[0], (b":scheme", b"https"), *GET[2:]]),
    "authority": (400, [*GET[:2], (b":authority", b"user@backend.internal"), GET[3]]),
    "absolute path": (400, [*GET[:3], (b":path", b"http://backend.internal/")]),
    "path": (400, [*GET[:3], (b":path", b"/a%2fb")]),
    "asterisk": (400, [*GET[:3], (b":path", b"*")]),
    "method": (400, [(b":method", b"GET /admin"), *GET[1:]]),
    "lower-case method": (400, [(b":method", b"get"), *GET[1:]]),
    "control in a value": (400, [*GET, (b"a", b"b\x01c")]),
    "control in a pseudo-field": (400, [*GET[:3], (b":path", b"/\x7f")]),
    "name is no token": (400, [*GET, (b"a(b)", b"c")]),
    "length of a request without body": (400, [*GET, (b"content-length", b"5")]),
    "equal lengths": (400, [*POST, (b"content-length", b"0"), (b"content-length", b"0")]),
    "expectation": (417, [*GET, (b"expect", b"a cake")]),
    "too many fields": (431, [*GET, *((b"n%d" % n, b"") for n in range(100))]),
    "too large": (431, [*GET, (b"a", b"b" * 62_000)]),
    "connect": (501, [(b":method", b"CONNECT"), (b":authority", b"example.org:443")]),
    "tunnel with a length": (
        400,
        [(b":method", b"CONNECT"), (b":protocol", b"a"), *GET[1:], (b"content-length", b"0")],
    ),
    "tunnel without authority": (
        400,
        [(b":method", b"CONNECT"), (b":protocol", b"a"), *GET[1:2], GET[3], (b"host", b"a")],
    ),
    "tunnel to an asterisk": (400, [(b":method", b"CONNECT"), (b":protocol", b"a"), *GET[1:3], (b":path", b"*")]),
    "protocol is no token": (400, [(b":method", b"CONNECT"), (b":protocol", b"a, b"), *GET[1:]]),
}


@pytest.mark.parametrize(("status", "fields"), REFUSED.values(), ids=REFUSED)
async def test_request_without_a_single_meaning_is_answered_on_its_stream(autojump_clock, status, fields):
    async with serving() as talk:
        block = talk.peer.encoder.encode(fields)
        blocks = [block[at : at + 16384] for at in range(0, len(block), 16384)]
        frames = [HeadersFrame(1, data=blocks[0], flags=["END_STREAM"])]
        frames += [ContinuationFrame(1, data=more) for more in blocks[1:]]
        frames[-1].flags.add("END_HEADERS")
        await talk.peer.send(*frames)
        message = await talk.peer.message(1)
        assert message.status == status
        assert message.fields[b"content-type"] == b"application/problem+json"
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).status == 200
    assert talk.served.exchanges == 1


async def test_asterisk_is_the_target_of_options(autojump_clock):
    targets = []

    async def handle(_, request, reply):
        targets.append(str(request.head.target))
        await reply.send(ok())

    async with serving(handle, tls=True) as talk:
        https = (b":scheme", b"https")
        await talk.peer.request(1, [(b":method", b"OPTIONS"), https, GET[2], (b":path", b"*")])
        await talk.peer.message(1)
        await talk.peer.request(3, [GET[0], https, GET[3], (b"host", b"backend.internal")])
        await talk.peer.message(3)
    assert targets == ["*", "/items"]


async def test_refusal_to_a_grpc_client_is_trailers_only(autojump_clock):
    async with serving() as talk:
        await talk.peer.request(1, [*POST[:3], (b":path", b"/%"), (b"content-type", b"application/grpc")], end=False)
        message = await talk.peer.message(1)
        assert message.fields[b"grpc-status"] == b"3"
        assert message.ended


@pytest.mark.parametrize(
    ("stated", "sent", "trailers"), [(b"5", b"abc", False), (b"5", b"abcdef", False), (b"5", b"abc", True)]
)
async def test_body_of_another_length_than_stated_is_reset_and_aborted(autojump_clock, stated, sent, trailers):
    raised = []

    async def handle(_, request, reply):
        try:
            await whole(request.body)
            await reply.send(ok())
        except Aborted as error:
            raised.append((request.body.length, error))

    async with serving(handle) as talk:
        await talk.peer.request(1, [*POST, (b"content-length", stated)], end=False)
        await talk.peer.data(1, sent, end=not trailers)
        if trailers:
            await talk.peer.send(talk.peer.head(1, [(b"a", b"b")], end=True))
        assert (await talk.peer.message(1)).reset == ErrorCodes.PROTOCOL_ERROR
        await talk.peer.settle()
        assert len(raised) == 1
        assert raised[0][0] == 5
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).status == 200


@pytest.mark.parametrize(
    "fields", [[(b":path", b"/")], [(b"a", b"\0")], [(b"a", b"\x01")], [(b"n%d" % n, b"") for n in range(101)]]
)
async def test_malformed_trailers_abort_the_body(autojump_clock, fields):
    raised = []

    async def handle(_, request, reply):
        try:
            await whole(request.body)
        except Aborted as error:
            raised.append(error)

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.send(talk.peer.head(1, fields, end=True))
        assert (await talk.peer.message(1)).reset == ErrorCodes.PROTOCOL_ERROR
    assert len(raised) == 1


# ── the life of a connection ──────────────────────────────────────────────────────────────────────────────────────


async def test_peer_that_lost_our_trust_is_sent_elsewhere(autojump_clock):
    trusted = [True, False]
    async with serving(fresh=lambda: trusted.pop(0)) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).status == 421
        assert (await talk.peer.goaway()).last_stream_id == 3
        await talk.peer.rest()
    assert talk.served.reason == "peer_no_longer_trusted"
    assert talk.served.exchanges == 1


async def test_a_peer_that_is_no_longer_trusted_is_refused_what_it_was_given_before(autojump_clock):
    trusted = [True, True, True, True, False]
    async with serving(fresh=lambda: trusted.pop(0)) as talk:
        answers = []
        for stream_id in (1, 3, 5, 7, 9):
            await talk.peer.request(stream_id)
            answers.append((await talk.peer.message(stream_id)).status)
    assert answers == [200, 200, 200, 200, 421]


# ── heads that come again ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_head_that_comes_again_is_the_same_request_with_its_own_body(autojump_clock):
    seen = []

    async def handle(_, request, reply):
        length = request.body.length
        seen.append((request, length, (await whole(request.body))[0]))
        await reply.send(ok())

    bodies = (b"1", b"2", b"3", None, None, None, b"4")
    async with serving(handle) as talk:
        for number, body in enumerate(bodies):
            stream_id = 2 * number + 1
            await talk.peer.request(stream_id, POST, end=body is None)
            if body is not None:
                await talk.peer.data(stream_id, body, end=True)
            assert (await talk.peer.message(stream_id)).status == 200
    assert [body for _, _, body in seen] == [body or b"" for body in bodies]
    assert [length for _, length, _ in seen] == [0 if body is None else None for body in bodies]
    heads = [request.head for request, _, _ in seen]
    assert all(head == heads[0] for head in heads)
    assert heads[1] is heads[2], "it was not read again"
    kept = [request.kept for request, _, _ in seen]
    assert (kept[0], kept[1], kept[3]) == (None, {}, None), (
        "there is room for what is made of it from the second time on"
    )
    assert kept[1] is kept[2]
    assert kept[4] is kept[5] is not kept[1], "one whose body is still to come is another"


async def test_a_length_that_comes_again_holds_for_each_body(autojump_clock):
    stated = [*POST, (b"content-length", b"2")]

    async def handle(_, request, reply):
        assert request.body.length == 2
        await whole(request.body)
        await reply.send(ok())

    async with serving(handle) as talk:
        for stream_id, body in ((1, b"ab"), (3, b"cd"), (5, b"ef"), (7, b"g"), (9, b"hij")):
            await talk.peer.request(stream_id, stated, end=False)
            await talk.peer.data(stream_id, body, end=True)
            message = await talk.peer.message(stream_id)
            assert (message.reset is None) is (len(body) == 2)


async def test_a_head_that_comes_again_is_refused_again(autojump_clock):
    async with serving() as talk:
        for stream_id in (1, 3, 5, 7):
            await talk.peer.request(stream_id, [*GET[:3], (b":path", b"/%2e%2e/x")])
            assert (await talk.peer.message(stream_id)).status == 400


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b":a", b"ab"]), st.sampled_from([b"", b"a", b"b", b"a: b" * 9]))),
    st.booleans(),
)
def test_heads_that_differ_are_written_differently(fields, ended):
    """For what was written can be read from it."""
    first, *lines = h2_heads.written(fields, ended=ended).split(b"\n")
    assert first == (b"whole" if ended else b"begun")
    assert list(zip(lines[::2], lines[1::2], strict=True)) == fields
    assert b"\r" not in h2_heads.written(fields, ended=ended), "and so is no head of HTTP/1.1"


SOON = 2**31 - 1


async def goodbyes(peer: Peer, count: int) -> list[tuple[int, int]]:
    """Last stream and code of so many GOAWAYs, as they come."""
    while len(seen := [frame for frame in peer.frames if isinstance(frame, GoAwayFrame)]) < count:
        await peer.next(GoAwayFrame)
    return [(frame.last_stream_id, frame.error_code) for frame in seen]


async def test_drain_of_an_idle_connection_says_goodbye_and_closes(autojump_clock):
    async with serving() as talk:
        await talk.peer.request(1)
        await talk.peer.message(1)
        talk.served.drain()
        assert await goodbyes(talk.peer, 2) == [(SOON, ErrorCodes.NO_ERROR), (1, ErrorCodes.NO_ERROR)]
        await talk.peer.rest()
    assert talk.served.reason == "draining"


async def test_drain_finishes_what_is_open_and_refuses_what_is_new(autojump_clock):
    finish = trio.Event()

    async def handle(_, request, reply):
        await finish.wait()
        await reply.send(ok(Whole((await whole(request.body))[0])))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.settle()
        assert talk.served.idle is None
        talk.served.drain()
        assert (await goodbyes(talk.peer, 2))[1] == (1, ErrorCodes.NO_ERROR)
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).reset == ErrorCodes.REFUSED_STREAM
        await talk.peer.data(1, b"the rest", end=True)
        finish.set()
        assert (await talk.peer.message(1)).body == b"the rest"
        await talk.peer.rest()
    assert talk.served.reason == "draining"
    assert talk.served.exchanges == 1


async def test_request_that_crosses_the_announcement_of_a_drain_is_served(autojump_clock):
    async with serving() as talk:
        talk.served.drain()
        await talk.peer.request(1)  # sent before anything was read
        assert (await talk.peer.message(1)).status == 200
        assert await goodbyes(talk.peer, 2) == [(SOON, ErrorCodes.NO_ERROR), (1, ErrorCodes.NO_ERROR)]
        await talk.peer.rest()
    assert talk.served.exchanges == 1


async def test_drain_waits_a_second_for_a_client_that_answers_no_ping(autojump_clock):
    async with serving() as talk:
        await talk.peer.settle()
        talk.peer.acknowledges = False
        began = trio.current_time()
        talk.served.drain()
        talk.served.drain()
        assert await goodbyes(talk.peer, 2) == [(SOON, ErrorCodes.NO_ERROR), (0, ErrorCodes.NO_ERROR)]
        assert 1 <= trio.current_time() - began < 2
        await talk.peer.rest()
    assert talk.served.reason == "draining"


async def test_drain_that_came_first_serves_what_is_on_its_way(autojump_clock):
    async with serving(draining=True) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200
        assert await goodbyes(talk.peer, 2) == [(SOON, ErrorCodes.NO_ERROR), (1, ErrorCodes.NO_ERROR)]
        await talk.peer.rest()
    assert talk.served.reason == "draining"


async def test_pings_while_draining_do_not_end_it_early_or_late(autojump_clock):
    """Only a PING that answers ours says that all that was sent before has come."""
    async with serving() as talk:
        await talk.peer.settle()
        talk.peer.acknowledges = False
        talk.served.drain()
        await talk.peer.send(PingFrame(0, opaque_data=b"12345678"))
        await talk.peer.settle()
        assert len(await goodbyes(talk.peer, 1)) == 1
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200


# ── half-closed connections, and dead ones ────────────────────────────────────────────────────────────────────────


async def test_client_that_ends_its_side_still_gets_the_answers_to_what_it_asked(autojump_clock):
    finish = trio.Event()

    async def handle(_, request, reply):
        await finish.wait()
        await reply.send(ok(Whole(bytes(10_000))))

    async with serving(handle) as talk:
        await talk.peer.request(1)
        await talk.peer.request(3)
        await talk.peer.stream.send_eof()
        await trio.sleep(300)
        finish.set()
        for stream_id in (1, 3):
            message = await talk.peer.message(stream_id)
            assert (message.status, len(message.body), message.ended) == (200, 10_000, True)
        await talk.peer.rest()
    assert talk.served.reason is None
    assert talk.served.exchanges == 2


async def test_client_that_ends_its_side_in_the_middle_of_a_request_aborts_that_one(autojump_clock):
    raised = []

    async def handle(_, request, reply):
        try:
            await whole(request.body)
        except Aborted:
            raised.append(reply.gone)
            raise
        await trio.sleep(1)
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.data(1, b"half")
        await talk.peer.request(3)
        await talk.peer.stream.send_eof()
        assert (await talk.peer.message(3)).status == 200
        assert not talk.peer.messages[1].heads
        await talk.peer.rest()
    assert raised == [True]
    assert talk.served.reason == "exchange_aborted"


async def test_client_that_ends_its_side_can_widen_no_window_and_is_not_waited_for(autojump_clock):
    gone = []

    async def handle(_, request, reply):
        try:
            await reply.send(ok(Whole(bytes(200_000))))
        except Aborted:
            gone.append(reply.gone)
            raise

    async with serving(handle) as talk:
        await talk.peer.request(1)
        await talk.peer.stream.send_eof()
        with trio.fail_after(30):
            await talk.peer.rest()
    assert gone == [True]
    assert talk.served.reason == "exchange_aborted"


async def test_client_that_closes_with_answers_outstanding_aborts_them_at_once(autojump_clock):
    ended = trio.Event()
    replies = []

    async def handle(_, request, reply):
        replies.append(reply)
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with serving(handle) as talk:
        await talk.peer.request(1)
        await talk.peer.settle()
        talk.peer.stream.close()
        with trio.fail_after(0.1):
            await ended.wait()
    assert replies[0].gone
    assert talk.served.reason == "exchange_aborted"


async def test_client_that_closes_over_tcp_is_found_out_by_the_reset_that_answers_us():
    """Its kernel sends a FIN, like one that has only ended its side; what it does with our PING tells them apart."""
    ended = trio.Event()

    async def handle(_, request, reply):
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    ours.setblocking(False)
    served = Served(plaintext_connection(), handle, Limits(), lambda: True, draining=False)
    theirs.sendall(PREFACE + SettingsFrame(0).serialize() + Peer().head(1, GET, end=True).serialize())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(h2_server.serve, Stream(ours), bytearray(), served)
            await trio.sleep(0.05)
            assert theirs.recv(65536), "nothing is left unread, so that closing sends no reset"
            theirs.close()
            await ended.wait()
    assert served.reason == "exchange_aborted"


async def test_quiet_client_is_asked_and_stays_if_it_answers(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep(1000)
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200
        pings = [frame for frame in talk.peer.frames if isinstance(frame, PingFrame)]
        assert 15 <= len(pings) <= 17, "one a minute"


@pytest.mark.parametrize("open_stream", [True, False])
async def test_client_that_answers_no_ping_is_dead(autojump_clock, open_stream):
    ended: list[float] = []

    async def handle(_, request, reply):
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    limits = Limits(idle_timeout=3600.0, keepalive_timeout=30.0)
    async with serving(handle, limits) as talk:
        if open_stream:
            await talk.peer.request(1)
        await talk.peer.settle()
        talk.peer.acknowledges = False
        began = trio.current_time()
        await talk.over.wait()
        assert 40 <= trio.current_time() - began < 42
        assert len(ended) == open_stream
    assert talk.served.reason == "keepalive_timeout"


async def test_client_that_sends_is_not_asked(autojump_clock):
    async def handle(_, request, reply):
        await whole(request.body)
        await reply.send(ok())

    async with serving(handle, Limits(keepalive_timeout=10.0)) as talk:
        talk.peer.acknowledges = False
        await talk.peer.request(1, POST, end=False)
        for _ in range(20):
            await trio.sleep(5)
            await talk.peer.data(1, b"x")
        await talk.peer.data(1, end=True)
        assert (await talk.peer.message(1)).status == 200
        assert not [frame for frame in talk.peer.frames if isinstance(frame, PingFrame)]


async def test_client_that_says_goodbye_gets_its_answers(autojump_clock):
    finish = trio.Event()

    async def handle(_, request, reply):
        await finish.wait()
        await reply.send(ok(Whole(bytes(1000))))

    async with serving(handle, window=10) as talk:
        await talk.peer.request(1)
        await talk.peer.send(GoAwayFrame(0, last_stream_id=0))
        await talk.peer.settle()
        finish.set()
        await talk.peer.send(WindowUpdateFrame(1, window_increment=2000))
        assert len((await talk.peer.message(1)).body) == 1000
        await talk.peer.rest()
    assert talk.served.reason is None


async def test_silence_between_requests_ends_the_connection(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep(1000)
        await reply.send(ok())

    async with serving(handle) as talk:
        await talk.peer.request(1)
        assert (await talk.peer.message(1)).status == 200, "an open stream is not silence"
        began = trio.current_time()
        await talk.peer.goaway()
        assert trio.current_time() - began == pytest.approx(60.0)
        await talk.peer.rest()
    assert talk.served.reason == "idle_timeout"


async def test_pings_do_not_keep_an_idle_connection(autojump_clock):
    async with serving() as talk:

        async def ping() -> None:
            while True:
                try:
                    await talk.peer.send(PingFrame(0, opaque_data=b"12345678"))
                except trio.BrokenResourceError:
                    return
                await trio.sleep(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping)
            await talk.peer.goaway()
            assert trio.current_time() == pytest.approx(60.0, abs=1)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("begun", [b"", PREFACE[:10], PREFACE, PREFACE + SettingsFrame(0).serialize() + b"\0\0\x20\1"])
async def test_slow_beginning_ends_the_connection(autojump_clock, begun):
    async with serving(start=False) as talk:
        talk.peer.acknowledges = False
        await talk.peer.raw(begun)
        began = trio.current_time()
        await talk.peer.goaway()
        assert trio.current_time() - began == pytest.approx(5.0)
    assert talk.served.reason == "head_timeout"


async def test_header_block_that_drips_is_not_waited_for(autojump_clock):
    async with serving() as talk:
        await talk.peer.request(1)
        await talk.peer.message(1)
        block = talk.peer.encoder.encode(GET)
        began = trio.current_time()
        for at in range(len(block)):
            frame = (
                HeadersFrame(3, data=block[at : at + 1]) if not at else ContinuationFrame(3, data=block[at : at + 1])
            )
            await talk.peer.send(frame)
            await trio.sleep(1)
            if trio.current_time() - began > 8:
                break
        await talk.peer.goaway()
        assert trio.current_time() - began < 10
    assert talk.served.reason == "head_timeout"


async def test_no_preface_is_no_connection(autojump_clock):
    async with serving(start=False) as talk:
        await talk.peer.raw(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert (await talk.peer.goaway()).error_code == ErrorCodes.PROTOCOL_ERROR
    assert talk.served.reason == "h2_protocol_error"


async def test_first_frame_must_be_settings(autojump_clock):
    async with serving(start=False) as talk:
        await talk.peer.raw(PREFACE + PingFrame(0).serialize())
        assert (await talk.peer.goaway()).error_code == ErrorCodes.PROTOCOL_ERROR


async def test_client_that_leaves_at_once_is_named(autojump_clock):
    async with serving(start=False) as talk:
        talk.peer.stream.close()
        await talk.over.wait()
    assert talk.served.reason == "head_incomplete"


# ── floods ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_rapid_resets_are_a_flood(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep_forever()

    async with serving(handle) as talk:
        try:
            for n in range(300):
                head = talk.peer.head(2 * n + 1, GET, end=True)
                await talk.peer.send(head, RstStreamFrame(2 * n + 1, error_code=ErrorCodes.CANCEL))
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM
    assert talk.served.reason == "h2_enhance_your_calm"
    assert talk.served.exchanges <= 201


async def test_resets_that_we_are_made_to_send_are_a_flood_too(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep_forever()

    async with serving(handle) as talk:
        try:
            for n in range(300):
                head = talk.peer.head(2 * n + 1, GET, end=True)
                await talk.peer.send(head, WindowUpdateFrame(2 * n + 1, window_increment=2**31 - 1))
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_client_that_changes_its_mind_now_and_then_is_no_flood(autojump_clock):
    async def handle(_, request, reply):
        if request.head.method == "POST":
            await trio.sleep_forever()
        await reply.send(ok())

    async with serving(handle) as talk:
        for n in range(0, 1200, 2):
            await talk.peer.request(2 * n + 1, POST)
            await talk.peer.send(RstStreamFrame(2 * n + 1, error_code=ErrorCodes.CANCEL))
            await talk.peer.request(2 * n + 3)
            assert (await talk.peer.message(2 * n + 3)).status == 200


FLOODS = {
    "ping": PingFrame(0, opaque_data=b"12345678"),
    "answer to no ping": PingFrame(0, opaque_data=b"12345678", flags=["ACK"]),
    "settings": SettingsFrame(0),
    "settings that change": SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 65535}),
    "ack": SettingsFrame(0, flags=["ACK"]),
    "empty data": DataFrame(1, data=b""),
    "padding": DataFrame(1, data=b"", pad_length=1, flags=["PADDED"]),
    "priority": PriorityFrame(1, depends_on=0, stream_weight=16),
    "priority of no stream": PriorityFrame(9, depends_on=0, stream_weight=16),
    "window of a stream": WindowUpdateFrame(1, window_increment=1),
    "window of the connection": WindowUpdateFrame(0, window_increment=1),
    "window of a closed stream": WindowUpdateFrame(3, window_increment=1),
    "reset of a closed stream": RstStreamFrame(3, error_code=8),
    "unknown": ExtensionFrame(0xBB, 0, flag_byte=0, body=b""),
}


@pytest.mark.parametrize("frame", FLOODS.values(), ids=FLOODS)
async def test_frames_that_serve_no_request_are_a_flood(autojump_clock, frame):
    async def handle(_, request, reply):
        if request.body.length == 0:
            await reply.send(ok(Whole()))
        await trio.sleep_forever()

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.request(3)
        await talk.peer.message(3)
        many = frame.serialize() * 100
        try:
            for _ in range(60):
                await talk.peer.raw(many)
                await talk.peer.settle()
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM
    assert talk.served.reason == "h2_enhance_your_calm"


async def test_client_that_widens_its_windows_often_while_it_downloads_is_no_flood(autojump_clock):
    """Go's client says so for each 4 KiB that it has read, for the stream and for the connection."""

    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(4 * 1024 * 1024))))

    async with serving(handle) as talk:
        await talk.peer.request(1)
        given = 0
        with trio.fail_after(5):
            while not talk.peer.messages.setdefault(1, Message()).ended:
                await talk.peer.next(DataFrame)
                while given + 4096 <= len(talk.peer.messages[1].body):
                    given += 4096
                    await talk.peer.send(*[WindowUpdateFrame(n, window_increment=4096) for n in (0, 1)])
        assert len(talk.peer.messages[1].body) == 4 * 1024 * 1024


async def test_client_that_widens_its_windows_for_each_small_message_is_no_flood(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Parts(*[b"x"] * 6000)))

    async with serving(handle) as talk:
        for stream_id in (1, 3, 5, 7):
            await talk.peer.request(stream_id)
            with trio.fail_after(5):
                while not talk.peer.messages.setdefault(stream_id, Message()).ended:
                    await talk.peer.next(DataFrame)
                    await talk.peer.send(*[WindowUpdateFrame(n, window_increment=1) for n in (0, stream_id)])
        await talk.peer.settle()
        assert not [frame for frame in talk.peer.frames if isinstance(frame, GoAwayFrame)]


async def test_empty_header_blocks_are_a_flood(autojump_clock):
    async with serving() as talk:
        try:
            for n in range(2000):
                await talk.peer.send(HeadersFrame(2 * n + 1, data=b"", flags=["END_HEADERS", "END_STREAM"]))
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM
    assert talk.served.exchanges == 0


async def test_data_for_a_stream_that_was_reset_ends_with_its_window(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(status=403))

    async with serving(handle) as talk:
        await talk.peer.request(1, POST, end=False)
        await talk.peer.message(1)
        await talk.peer.next(RstStreamFrame)
        for size in (16384, 16384, 16384, 16383):  # all that may have been on its way
            await talk.peer.data(1, bytes(size))
        await talk.peer.request(3)
        assert (await talk.peer.message(3)).status == 403
        await talk.peer.data(1, b"x")
        assert (await talk.peer.goaway()).error_code == ErrorCodes.FLOW_CONTROL_ERROR


async def test_client_that_takes_no_byte_holds_a_stream_and_nothing_else(autojump_clock):
    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(100_000))))

    async with serving(handle, Limits(max_streams=10), window=0) as talk:
        for n in range(10):
            await talk.peer.request(2 * n + 1)
        await trio.sleep(30)
        assert talk.peer.stream is not None
        await talk.peer.request(21)
        assert (await talk.peer.message(21)).reset == ErrorCodes.REFUSED_STREAM
        assert not [frame for frame in talk.peer.frames if isinstance(frame, DataFrame) and frame.data]
        await talk.peer.send(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
        await talk.peer.request(23)
        await talk.peer.send(
            WindowUpdateFrame(23, window_increment=200_000), WindowUpdateFrame(0, window_increment=200_000)
        )
        assert len((await talk.peer.message(23)).body) == 100_000


async def test_header_block_larger_than_any_that_would_be_taken_is_not_waited_for(autojump_clock):
    async with serving(limits=Limits(max_header_bytes=8192)) as talk:
        await talk.peer.send(HeadersFrame(1, data=bytes(16384)))
        try:
            for _ in range(3):
                await talk.peer.send(ContinuationFrame(1, data=bytes(16384)))
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_answers_wait_for_a_client_that_does_not_read(autojump_clock):
    begun = []

    async def handle(_, request, reply):
        await reply.send(ok(Whole(), fields=((b"x-large", b"x" * 50_000),)))
        begun.append(request)

    async with serving(handle) as talk:
        for n in range(50):
            await talk.peer.request(2 * n + 1)
        await trio.sleep(1)
        assert len(begun) < 50
        for n in range(50):
            assert (await talk.peer.message(2 * n + 1)).ended


async def test_client_that_asks_for_much_and_reads_nothing_is_dropped(autojump_clock, monkeypatch):
    monkeypatch.setattr(h2_link, "_MAX_QUEUED_BYTES", 2000)

    async def handle(_, request, reply):
        await reply.send(ok(Whole(bytes(1_000_000))))

    async with serving(handle, window=2**31 - 1) as talk:
        await talk.peer.send(WindowUpdateFrame(0, window_increment=2**30))
        await talk.peer.request(1)
        with trio.fail_after(60):
            for _ in range(200):
                await talk.peer.send(PingFrame(0, opaque_data=b"12345678"))
            await talk.over.wait()
    assert talk.served.reason == "h2_enhance_your_calm"


async def test_streams_beyond_the_limit_are_refused_and_the_others_served(autojump_clock):
    async def handle(_, request, reply):
        await trio.sleep(1)
        await reply.send(ok())

    async with serving(handle, Limits(max_streams=3)) as talk:
        for stream_id in (1, 3, 5, 7):
            await talk.peer.request(stream_id, [*GET, (b"x-kept-by-hpack", b"a")])
        assert (await talk.peer.message(7)).reset == ErrorCodes.REFUSED_STREAM
        for stream_id in (1, 3, 5):
            assert (await talk.peer.message(stream_id)).status == 200
        await talk.peer.request(9)
        assert (await talk.peer.message(9)).status == 200


async def test_tasks_that_will_not_end_are_counted(autojump_clock):
    async def handle(_, request, reply):
        with trio.CancelScope(shield=True):
            await trio.sleep(1)

    async with serving(handle, Limits(max_streams=3)) as talk:
        for n in range(8):
            await talk.peer.request(2 * n + 1)
            if n < 6:
                await talk.peer.send(RstStreamFrame(2 * n + 1, error_code=ErrorCodes.CANCEL))
        assert (await talk.peer.message(13)).reset == ErrorCodes.REFUSED_STREAM
    assert talk.served.exchanges == 6


async def test_frame_that_is_announced_too_large_is_not_waited_for(autojump_clock):
    async with serving() as talk:
        await talk.peer.raw(b"\xff\xff\xff" + b"\0\0\0\0\0\1")
        assert (await talk.peer.goaway()).error_code == ErrorCodes.FRAME_SIZE_ERROR


async def test_header_block_without_end_is_not_waited_for(autojump_clock):
    async with serving() as talk:
        await talk.peer.send(HeadersFrame(1, data=talk.peer.encoder.encode(GET)))
        try:
            for _ in range(100):
                await talk.peer.send(ContinuationFrame(1, data=b""))
        except trio.BrokenResourceError:
            pass
        assert (await talk.peer.goaway()).error_code in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.ENHANCE_YOUR_CALM)


async def test_small_block_that_unfolds_into_a_large_one_ends_the_connection(autojump_clock):
    async with serving() as talk:
        encoder = hpack.Encoder()
        first = encoder.encode([*GET, (b"bomb", b"b" * 4000)])
        again = b"\xbe" * 100  # the newest entry of the table, a hundred times
        await talk.peer.send(HeadersFrame(1, data=first + again, flags=["END_HEADERS", "END_STREAM"]))
        assert (await talk.peer.goaway()).error_code == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "block",
    [
        b"\xff\xff\xff",
        b"\xff\x07",  # an index beyond both tables (RFC 7541 §2.3.3)
        b"\x7f\x07\x00",  # the same, as a name
        b"\x80",  # index 0
        b"\x00\x85\xf2\xb2\x4a\x84\xff\x87\x49\x51\xff\xff\xff\xfa\x7f",  # EOS in a string (§5.2)
        b"\x00\x01a\x7f\x7f",  # a string that ends early
        b"\x3f\xe2\x1f",  # a table larger than allowed (§4.2)
    ],
)
async def test_block_that_cannot_be_decoded_ends_the_connection(autojump_clock, block):
    async with serving() as talk:
        block = talk.peer.encoder.encode(GET) + block if block[0] != 0x3F else block
        await talk.peer.send(HeadersFrame(1, data=block, flags=["END_HEADERS", "END_STREAM"]))
        assert (await talk.peer.goaway()).error_code == ErrorCodes.COMPRESSION_ERROR
    assert talk.served.exchanges == 0


# ── all of it at once ─────────────────────────────────────────────────────────────────────────────────────────────


def conversation() -> bytes:
    peer = Peer()
    frames = [
        SettingsFrame(0),
        peer.head(1, [*POST, (b"content-length", b"6")]),
        DataFrame(1, data=b"abc"),
        peer.head(3, [*GET, (b"x-twice", b"value")], end=True),
        DataFrame(1, data=b"def"),
        peer.head(1, [(b"trailer-field", b"last")], end=True),
        PingFrame(0, opaque_data=b"12345678"),
        peer.head(5, [*GET, (b"x-twice", b"value")], end=True),
    ]
    return PREFACE + b"".join(frame.serialize() for frame in frames)


async def told(chunks: list[bytes]) -> tuple[list, str | None]:
    """What handlers see of these bytes, and how the connection ended."""
    seen = []

    async def handle(_, request, reply):
        try:
            data, trailers = await whole(request.body)
            seen.append((str(request.head.target), request.head.method, sorted(request.head.fields), data, trailers))
            await reply.send(ok())
        except Aborted:
            seen.append("aborted")

    async with serving(handle, start=False) as talk:
        try:
            for chunk in chunks:
                await talk.peer.raw(chunk)
                await trio.lowlevel.checkpoint()
            await talk.peer.settle()
        except trio.BrokenResourceError:
            pass
    assert talk.error is None
    return sorted(map(repr, seen)), talk.served.reason


def run(chunks: list[bytes]):
    return trio.run(told, chunks, clock=trio.testing.MockClock(autojump_threshold=0))


WHOLE = conversation()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12))
def test_every_chunking_of_the_same_bytes_gives_the_same_requests(cuts):
    edges = [0, *sorted(set(cuts)), len(WHOLE)]
    chunks = [WHOLE[a:b] for a, b in pairwise(edges)]
    assert run(chunks) == run([WHOLE])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(1, 40))
def test_no_bytes_bring_more_than_one_connection_down(at, value, length):
    """Overwritten, cut out or doubled: it ends in an answer or in an orderly end, never in a defect."""
    run([WHOLE[:at] + bytes([value]) * min(length, 3) + WHOLE[at + 3 :]])
    run([WHOLE[:at] + WHOLE[at + length :]])
    run([WHOLE[: at + length] + WHOLE[at:]])
