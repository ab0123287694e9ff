"""HTTP/1.1 connections as a whole: the server's driver and the client's, each against a judge of the same bytes.

The server hands on the requests that a strict reader sees in what was sent, in that order, and not one more; and a client
that asked for them can read all that comes back. The client takes from an upstream's bytes the answers that h11 takes.
"""

from __future__ import annotations

import h11
import trio
import trio.testing

from fuzz import conversations, heads, inputs, reference
from fuzz.registry import Target
from sidecar.errors import UpstreamFault
from sidecar.model import Aborted, Connection, Reply, Request, RequestHead, ResponseHead, Trailers
from sidecar.wire import h1_server, target
from sidecar.wire.answers import Whole
from sidecar.wire.h1_client import H1Connection

MAX_PIECES = 100
PAUSE = b"\xfe\xff"
"""In what an upstream sends: it goes on when nobody has anything left to do."""
ASKED = ("GET", "HEAD", "POST")


# ── the server ────────────────────────────────────────────────────────────────────────────────────────────────────


def server(data: bytes) -> bool:
    """A byte for how the client ends and one that chooses the pieces, then what it sends. Accepted is one answer at least."""
    ending, choice = (data[0] % 3, data[1]) if len(data) > 1 else (0, 0)
    raw = data[2:]
    handled: list[tuple[bytes, bytes | None]] = []
    heard = b""

    async def handle(_: Connection, request: Request, reply: Reply) -> None:
        head = request.head
        handled.append((head.method.encode(), None))
        with trio.move_on_after(conversations.IDLE):  # as an exchange gives up what does not get on
            if head.upgrade is not None:
                await conversations.echo(await reply.tunnel(ResponseHead(status=101)))
                return
            try:
                read = await conversations.read_whole(request) if head.target.path == "/echo" else b""
                handled[-1] = (head.method.encode(), read if head.target.path == "/echo" else None)
                await reply.send(conversations.answer_to(head.target.path, read))
            except Aborted:
                pass

    async def conversation() -> None:
        nonlocal heard
        served = conversations.received("h1", handle)
        with conversations.pair() as (ours, theirs):
            async with trio.open_nursery() as around:
                around.start_soon(conversations.looked_after, served)
                async with trio.open_nursery() as both:
                    both.start_soon(h1_server.serve, ours, bytearray(), served)
                    heard = await conversations.play(theirs, inputs.cut(raw, choice)[:MAX_PIECES], ending, lambda: None)
                assert ours.closed
                around.cancel_scope.cancel()

    conversations.held(conversation)
    sent = b"".join(inputs.cut(raw, choice)[:MAX_PIECES])
    _as_the_reference_reads(handled, sent)
    _read_back([method for method, _ in handled], heard)
    return bool(handled)


def _as_the_reference_reads(handled: list[tuple[bytes, bytes | None]], sent: bytes) -> None:
    rest = sent
    for method, read in handled:
        rest = heads.without_empty_lines(rest)
        end = rest.index(b"\r\n\r\n") + 4
        expected = reference.request_head(rest[:end])
        assert expected is not None, "a request that is none was handed on"
        assert expected.start[0] == method
        rest = rest[end:]
        if expected.framing == "chunked":
            limits = conversations.LIMITS
            body = reference.chunked(
                rest, max_trailer_bytes=limits.max_header_bytes, max_trailers=limits.max_header_fields
            )
            assert read is None or (body.state == "whole" and read == body.data)
            rest = body.rest
        else:
            length = int(expected.framing)
            assert read is None or read == rest[:length]
            rest = rest[length:]


def _read_back(methods: list[bytes], heard: bytes) -> None:
    """With the answers to all that was asked; there may be one more, a refusal, and the last may be cut short."""
    rest = heard
    for number, method in enumerate([*methods, b"GET"]):
        if not rest:
            return
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=heads.OFFER))
        connection.send(h11.EndOfMessage())
        connection.receive_data(rest)
        event = connection.next_event()
        if event is h11.NEED_DATA:
            return
        if isinstance(event, h11.InformationalResponse):
            assert event.status_code == 101
            return
        assert isinstance(event, h11.Response)
        assert number < len(methods) or event.status_code >= 400
        while isinstance(event := connection.next_event(), h11.Data):
            pass
        if not isinstance(event, h11.EndOfMessage):
            return
        rest = connection.trailing_data[0]
    assert not rest, "more is answered than was asked"


# ── the client ────────────────────────────────────────────────────────────────────────────────────────────────────


def client(data: bytes) -> bool:
    """A byte for how the upstream ends, then what it sends, whoever asks. Accepted is one answer at least."""
    ending, raw = (data[0] % 3, data[1:]) if data else (0, b"")
    answers: list[tuple[int, bytes]] = []

    async def ask(connection: H1Connection) -> None:
        for method in ASKED:
            where = target.origin_form(b"/a")
            head = RequestHead(method=method, target=where, host="a.test", port=None, fields=[], protocol="HTTP/1.1")
            await connection.send(head, [], Whole(b"x" if method == "POST" else b""))
            while (found := await connection.receive()).status < 200:
                assert found.status != 101
            read = b""
            while (item := await connection.body.receive()) is not None:
                read += b"" if isinstance(item, Trailers) else item
            answers.append((found.status, read))
            await trio.testing.wait_all_tasks_blocked()
            if not connection.reusable or connection.stale():
                return
            connection.renew()

    async def bounded(connection: H1Connection) -> None:
        try:
            with trio.move_on_after(conversations.IDLE):
                await ask(connection)
        except (UpstreamFault, Aborted):
            pass
        finally:
            connection.close()

    async def conversation() -> None:
        with conversations.pair() as (ours, theirs):
            connection = H1Connection(ours, max_header_bytes=2048, max_header_fields=24, opened_at=0.0)
            async with trio.open_nursery() as both:
                both.start_soon(bounded, connection)
                await conversations.play(theirs, raw.split(PAUSE)[:MAX_PIECES], ending, lambda: None)

    conversations.held(conversation)
    _as_h11_reads(answers, b"".join(raw.split(PAUSE)[:MAX_PIECES]), ended=ending != conversations.SILENCE)
    return bool(answers)


def _as_h11_reads(answers: list[tuple[int, bytes]], sent: bytes, *, ended: bool) -> None:
    rest = sent
    for method, answer in zip(ASKED, answers, strict=False):
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        connection.send(h11.Request(method=method, target="/a", headers=[("host", "a.test")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(rest) if rest else None
        if ended:
            connection.receive_data(b"")
        read = b""
        try:
            while isinstance(event := connection.next_event(), h11.InformationalResponse):
                pass
            assert isinstance(event, h11.Response)
            status = event.status_code
            while isinstance(event := connection.next_event(), h11.Data):
                read += bytes(event.data)
        except h11.RemoteProtocolError:
            return  # it is stricter with what ends with its head, and with trailers: `h1.response` and `h1.chunked` judge that
        assert isinstance(event, h11.EndOfMessage)
        assert (status, read) == answer
        rest = connection.trailing_data[0]


# ── seeds ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_HOST = b"Host: a.test\r\n"
_ECHO = b"POST /echo HTTP/1.1\r\n" + _HOST
SERVER_GOOD = (
    b"\0\0GET /a HTTP/1.1\r\n" + _HOST + b"\r\n" + b"GET /big HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"\1\x07" + _ECHO + b"Content-Length: 5\r\n\r\nhello" + _ECHO + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"\2\0" + _ECHO + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhiHEAD /a HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"\0\x03GET /t HTTP/1.1\r\nUpgrade: echo\r\nConnection: upgrade\r\n" + _HOST + b"\r\ntunnelled",
    b"\0\0\r\n\r\nGET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nPOST /a HTTP/1.1\r\n" + _HOST + b"Content-Length: 3\r\n\r\nabcGET /a HTTP/1.1\r\n" + _HOST + b"\r\n",
)  # fmt: skip
SERVER_BAD = (
    b"", b"\0\0\r\n\r\n", b"\0\0GET / HTTP/1.1\r\n\r\n", b"\1\0\x16\x03\x01", b"\2\0GET / HT", b"\0\0" + b"x" * 3000,
    b"\0\0" + _ECHO + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"\0\0GET /%2e%2e/ HTTP/1.1\r\n" + _HOST + b"\r\n",
)  # fmt: skip
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
CLIENT_GOOD = (
    b"\0" + _OK + b"hi" + PAUSE + _OK + PAUSE + b"HTTP/1.1 204 No Content\r\n\r\n", b"\0HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"\1HTTP/1.1 103 Early\r\nLink: <a>\r\n\r\n" + PAUSE + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc" + PAUSE + b"\r\n0\r\n\r\n",
    b"\2" + _OK + b"hi" + PAUSE + _OK, b"\0" + _OK + b"hi" + _OK + b"hi",
)  # fmt: skip
CLIENT_BAD = (
    b"", b"\1" + _OK + b"h", b"\0" + _OK[:-2], b"\0HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b"\0\r\n" + _OK + b"hi", b"\2",
    b"\0HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", b"\2HTTP/1.0 200 OK\r\n\r\ncut", b"\0HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
)  # fmt: skip
WORDS = (*heads.WORDS, b"/echo", b"/big", b"HEAD ", PAUSE, _OK)

TARGETS = (
    Target(name="h1.server", share=2.0, run=server, good=lambda: SERVER_GOOD, bad=lambda: SERVER_BAD, words=WORDS, max_bytes=3072, examples=100),
    Target(name="h1.client", share=2.0, run=client, good=lambda: CLIENT_GOOD, bad=lambda: CLIENT_BAD, words=WORDS, max_bytes=768, examples=100),
)  # fmt: skip
