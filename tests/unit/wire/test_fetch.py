"""One request and its whole answer: bounded in size and time, and over the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from sidecar.errors import ClientFault, MaybeSent, NoAnswer, NotSent, OurFault, SidecarError
from sidecar.model import Address
from sidecar.wire.client import Client, ClientSettings, Upstream
from sidecar.wire.fetch import Answer, fetch
from sidecar.wire.network import TcpNetwork

Manner = Callable[[trio.SocketStream], Awaitable[None]]


class Server:
    """Keeps what it was asked, and answers each request by `manner`."""

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.asked: list[bytes] = []
        self.connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        data = b""
        async with stream:
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        data += await self._more(stream)
                    head, _, data = data.partition(b"\r\n\r\n")
                    length = next(
                        (
                            int(line.partition(b":")[2])
                            for line in head.split(b"\r\n")
                            if line.lower().startswith(b"content-length:")
                        ),
                        0,
                    )
                    while len(data) < length:
                        data += await self._more(stream)
                    self.asked.append(head + b"\r\n\r\n" + data[:length])
                    data = data[length:]
                    await self.manner(stream)
            except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _more(self, stream: trio.SocketStream) -> bytes:
        more = await stream.receive_some()
        if not more:
            raise EOFError
        return bytes(more)


class Asking:
    def __init__(self, client: Client, server: Server, port: int) -> None:
        self.server = server
        self._client = client
        self._upstream = Upstream(address=Address(host="127.0.0.1", port=port), tls=False)

    async def __call__(self, **more: Any) -> Answer:
        said: dict[str, Any] = {
            "method": "GET",
            "authority": "s.test:8443",
            "path": "/a?b=c",
            "max_bytes": 1000,
            "timeout": 5.0,
            **more,
        }
        with trio.fail_after(20):
            return await fetch(self._client, self._upstream, **said)

    async def fails(self, **more: Any) -> SidecarError:
        with pytest.raises(SidecarError) as caught:
            await self(**more)
        return caught.value


@asynccontextmanager
async def asking(manner: Manner) -> AsyncIterator[Asking]:
    server = Server(manner)
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        client = Client(TcpNetwork(), lambda: None, ClientSettings())
        await nursery.start(client.run)
        yield Asking(client, server, listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def says(*parts: bytes, end: bool = False) -> Manner:
    async def manner(stream: trio.SocketStream) -> None:
        for part in parts:
            await stream.send_all(part)
        if end:
            await stream.aclose()

    return manner


OK = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nX-Twice: a\r\nX-Twice: b\r\nContent-Length: 2\r\n\r\nok'


async def test_a_whole_answer() -> None:
    async with asking(says(OK)) as ask:
        answer = await ask(fields=[(b"accept", b"x/y")])
        assert (answer.status, answer.body) == (200, b"ok")
        assert (answer.value(b"etag"), answer.value(b"x-twice"), answer.value(b"missing")) == ('"1"', "a", "")
        assert ask.server.asked == [b"GET /a?b=c HTTP/1.1\r\nhost: s.test:8443\r\naccept: x/y\r\n\r\n"]
        assert "ok" not in repr(answer)


async def test_a_body_is_sent_whole() -> None:
    async with asking(says(OK)) as ask:
        await ask(method="POST", body=b"x" * 100_000, fields=[(b"content-type", b"application/json")])
        assert ask.server.asked[0].endswith(b"content-length: 100000\r\n\r\n" + b"x" * 100_000)
        await ask(method="POST")
        assert b"content-length: 0\r\n" in ask.server.asked[1]


async def test_a_connection_is_used_again() -> None:
    async with asking(says(OK)) as ask:
        for _ in range(5):
            await ask()
        assert (len(ask.server.asked), ask.server.connections) == (5, 1)


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\nContent-Length: 500\r\n\r\n', b""),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-trailer: 1\r\n\r\n",
            b"abcde",
        ),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 1\r\n\r\nx", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000, b"x" * 1000),
    ],
)
async def test_forms_of_answers(raw: bytes, body: bytes) -> None:
    async with asking(says(raw)) as ask:
        answer = await ask()
        assert (answer.status, answer.body) == (int(raw.split(b"HTTP/1.1 ")[-1][:3]), body)
        assert (await ask()).body == body
        assert ask.server.connections == 1


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async with asking(says(b"HTTP/1.1 200 OK\r\n\r\nabc", end=True)) as ask:
        assert (await ask()).body == b"abc"
        assert (await ask()).body == b"abc"
        assert ask.server.connections == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",  # by its word alone
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
    ],
)
async def test_more_than_the_bound_is_not_read(raw: bytes) -> None:
    async with asking(says(raw)) as ask:
        fault = await ask.fails()
        assert isinstance(fault, MaybeSent)
        assert fault.code == "answer_too_large"
        ask.server.manner = says(OK)
        assert (await ask()).body == b"ok"  # on a connection of its own
        assert ask.server.connections == 2


async def drip(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    while True:
        await stream.send_all(b"x")
        await trio.sleep(0.02)


async def hints(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.02)


@pytest.mark.parametrize(
    "manner", [says(), says(b"HTTP/1.1 200"), drip, hints], ids=["silent", "half a head", "drip", "hints"]
)
async def test_the_timeout_covers_all_of_it(manner: Manner) -> None:
    async with asking(manner) as ask:
        fault = await ask.fails(timeout=0.3)
        assert isinstance(fault, MaybeSent)
        assert (fault.code, fault.status) == ("answer_timeout", 504)
        ask.server.manner = says(OK)
        assert (await ask()).body == b"ok"
        assert ask.server.connections == 2


@pytest.mark.parametrize(
    ("manner", "kind"),
    [
        (says(end=True), NoAnswer),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", end=True), MaybeSent),
        (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", end=True), MaybeSent),
        (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", end=True), MaybeSent),
        (says(b"not HTTP\r\n\r\n", end=True), MaybeSent),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", end=True), MaybeSent),
        (says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), MaybeSent),
        (says(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"), MaybeSent),
    ],
)
async def test_what_breaks_off_is_a_fault_of_the_upstream(manner: Manner, kind: type[SidecarError]) -> None:
    async with asking(manner) as ask:
        assert isinstance(await ask.fails(), kind)
        assert len(ask.server.asked) == 1  # nothing is repeated here


async def test_nobody_there_and_no_identity() -> None:
    async with asking(says(OK)) as ask:
        client = Client(TcpNetwork(), lambda: None, ClientSettings())
        nowhere = Upstream(address=Address(host="127.0.0.1", port=1), tls=False)
        with pytest.raises(NotSent):
            await fetch(client, nowhere, method="GET", authority="s.test", path="/", max_bytes=1, timeout=5)
        secured = Upstream(address=ask._upstream.address, tls=True)
        with pytest.raises(OurFault) as caught:
            await fetch(client, secured, method="GET", authority="s.test", path="/", max_bytes=1, timeout=5)
        assert caught.value.code == "identity_missing"


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "/ä"},
        {"path": "/\u2028"},
        {"path": "x"},
        {"path": "/a b"},
        {"path": ""},
        {"authority": "ä.test"},
        {"authority": "a b"},
        {"authority": ""},
    ],
)
async def test_what_is_no_target_is_not_sent(wrong: dict[str, str]) -> None:
    async with asking(says(OK)) as ask:
        assert isinstance(await ask.fails(**wrong), ClientFault)
        assert ask.server.connections == 0
