"""Clients that go away while their answer is made, and those that have only ended their side."""

from __future__ import annotations

import pytest
import trio

from sidecar.wire.network import Stream
from support.flow import AGENT, ask, get, h2_client, h2_head, read_message, status, world
from support.h2_frames import RstStreamFrame


class Slow:
    """An agent that takes its time, and tells when its side has been broken off."""

    def __init__(self, first: bytes = b"") -> None:
        self.first = first
        self.messages: list[bytes] = []
        self.broken: list[float] = []

    async def serve(self, listener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(self._one, Stream(sock))

    async def _one(self, stream: Stream) -> None:
        try:
            buffer = bytearray()
            while message := await read_message(stream, buffer):
                self.messages.append(message)
                await stream.send_all(self.first)
                if not await stream.receive_some():
                    self.broken.append(trio.current_time())
        except trio.BrokenResourceError:
            self.broken.append(trio.current_time())
        finally:
            stream.close()


BEGUN = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"


@pytest.mark.parametrize("first", [b"", BEGUN], ids=["before the answer", "in the middle of it"])
@pytest.mark.parametrize("alpn", ["http/1.1", "h2", None])
@pytest.mark.parametrize("body", [False, True])
async def test_an_abort_by_the_client_reaches_the_agent_at_once(autojump_clock, tmp_path, first, alpn, body):
    agent = Slow(first)
    async with world(tmp_path, mode="permissive") as it, trio.open_nursery() as nursery:
        it.network.listeners.pop(AGENT)
        nursery.start_soon(agent.serve, await it.network.listen(AGENT))
        if alpn == "h2":
            peer = await h2_client(it, it.credentials())
            await peer.request(1, h2_head("/x", method="POST" if body else "GET"), end=not body)
            if body:
                await peer.data(1, b"hello", end=True)
        else:
            client = await it.client(it.credentials() if alpn else None)
            await client.send_all(get() if not body else b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        await trio.sleep(10)
        assert len(agent.messages) == 1
        assert agent.broken == []
        if alpn == "h2":
            await peer.send(RstStreamFrame(1, error_code=8))
        else:
            client.abort()
        began = trio.current_time()
        with trio.fail_after(0.1):
            while not agent.broken:
                await trio.sleep(0.001)
        assert agent.broken[0] - began < 0.01
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "client_gone")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secured", [True, False], ids=["mtls", "plaintext"])
async def test_a_client_that_has_only_ended_its_side_gets_its_answer(autojump_clock, tmp_path, secured):
    async with world(tmp_path, mode="permissive") as it:

        async def slow() -> None:
            await trio.sleep(10)

        it.agent.before = slow
        client = await it.client(it.credentials() if secured else None)
        await client.send_all(get())
        await client.send_eof()
        assert status(await read_message(client, bytearray())) == 200
        await trio.sleep(3)
        assert it.app._serving.open_connections()["inbound"] == 0
        assert it.access.events("connection.ended") == []  # an ordinary end is worth no line


async def test_what_a_client_sends_meanwhile_stays_its_next_request(autojump_clock, tmp_path):
    async with world(tmp_path) as it:

        async def slow() -> None:
            await trio.sleep(2)

        it.agent.before = slow
        client = await it.client(it.credentials())
        await client.send_all(get("/one"))
        await trio.sleep(1)
        await client.send_all(get("/two") + get("/three"))
        buffer = bytearray()
        assert [status(await read_message(client, buffer)) for _ in range(3)] == [200] * 3
        assert [message.split()[1] for message in it.agent.messages] == [b"/one", b"/two", b"/three"]


async def test_a_client_that_goes_while_nothing_is_done_for_it_has_done_nothing_wrong(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive") as it:
        client = await it.client()
        assert status(await ask(client, get())) == 200
        client.close()
        await trio.sleep(1)
        assert it.app._serving.open_connections()["inbound"] == 0
        assert it.access.events("connection.ended") == []  # an ordinary end is worth no line
