"""Upgrades: one exchange under one permit, then bytes both ways, over whichever protocols lie between the two ends."""

from __future__ import annotations

import base64
import hashlib
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from sidecar.wire.network import Stream
from support.flow import (
    AGENT,
    INBOUND,
    TARGET,
    H2Agent,
    ask,
    get,
    h2_agent_client,
    h2_head,
    read_message,
    serve_h2_agent,
    status,
    world,
)
from support.h2_frames import DataFrame, Peer

UPGRADE = get("/ws", "Connection: Upgrade", "Upgrade: echo")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: %b\r\n%b\r\n"
ENABLE_CONNECT_PROTOCOL = 8
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class Switching:
    """An agent that answers each upgrade with 101 and then does what the test says."""

    def __init__(self, then: Callable[[Stream], Awaitable[None]]) -> None:
        self.heads: list[bytes] = []
        self._then = then

    async def serve(self, listener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(self._one, sock)

    async def _one(self, sock: socket.socket) -> None:
        stream = Stream(sock)
        try:
            self.heads.append(await read_message(stream, bytearray()) or b"")
            await stream.send_all(SWITCH % (b"echo", b""))
            await self._then(stream)
        except trio.BrokenResourceError:
            pass
        finally:
            stream.close()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


@asynccontextmanager
async def switching(tmp_path, agent: Switching, **options):
    """A world whose agent switches."""
    async with world(tmp_path, **options) as it, trio.open_nursery() as nursery:
        it.network.listeners.pop(AGENT)
        nursery.start_soon(agent.serve, await it.network.listen(AGENT))
        yield it
        nursery.cancel_scope.cancel()


async def all_of(stream: Stream) -> bytes:
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


@pytest.mark.parametrize("secured", [True, False], ids=["mtls", "plaintext"])
async def test_each_side_may_end_its_direction_and_the_other_goes_on(autojump_clock, tmp_path, secured):
    async def talk(stream: Stream) -> None:
        assert await all_of(stream) == b"question"
        await trio.sleep(5)
        await stream.send_all(b"answer")

    async with switching(tmp_path, Switching(talk), mode="strict" if secured else "permissive") as it:
        client = await it.client(it.credentials() if secured else None)
        assert status(await ask(client, UPGRADE)) == 101
        await client.send_all(b"question")
        await client.send_eof()
        assert await all_of(client) == b"answer"
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"], line["status"]) == ("allowed", None, 101)
        assert len(it.opa.questions) == 1


@pytest.mark.parametrize("secured", [True, False], ids=["mtls", "plaintext"])
async def test_what_was_on_its_way_when_the_other_side_ended_still_arrives(autojump_clock, tmp_path, secured):
    heard = b""

    async def talk(stream: Stream) -> None:
        nonlocal heard
        await stream.send_all(b"that was all")
        await stream.send_eof()
        heard = await all_of(stream)

    async with switching(tmp_path, Switching(talk), mode="strict" if secured else "permissive") as it:
        client = await it.client(it.credentials() if secured else None)
        await client.send_all(UPGRADE + b"x" * 100_000)
        assert status(await read_message(client, buffer := bytearray())) == 101
        for _ in range(50):
            await client.send_all(b"y" * 10_000)
        assert bytes(buffer) + await all_of(client) == b"that was all"
        await client.send_all(b"and more")
        await client.send_eof()
        await trio.sleep(1)
        assert heard == b"x" * 100_000 + b"y" * 500_000 + b"and more"
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("allowed", None)


async def test_an_agent_that_breaks_off_a_tunnel_breaks_it_off_for_the_client(autojump_clock, tmp_path):
    async def talk(stream: Stream) -> None:
        await trio.sleep(1)
        await stream.send_all(b"half")
        await stream.receive_some(1)  # a reset is what comes of closing over unread input
        stream.close()

    async with switching(tmp_path, Switching(talk)) as it:
        client = await it.client(it.credentials())
        assert status(await ask(client, UPGRADE)) == 101
        await client.send_all(b"xyz")
        assert await client.receive_some() == b"half"
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["status"]) == ("aborted", 101)


@pytest.mark.parametrize("secured", [True, False], ids=["mtls", "plaintext"])
async def test_a_client_that_breaks_off_a_tunnel_is_noticed_though_the_agent_reads_nothing(
    autojump_clock, tmp_path, secured
):
    async def talk(_stream: Stream) -> None:
        await trio.sleep_forever()

    async with switching(tmp_path, Switching(talk), mode="strict" if secured else "permissive") as it:
        client = await it.client(it.credentials() if secured else None)
        assert status(await ask(client, UPGRADE)) == 101
        with trio.move_on_after(5):
            while True:
                await client.send_all(b"x" * 65536)
        assert it.access.events("exchange.ended") == []
        client.abort()
        await trio.sleep(2)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "client_gone")


async def test_a_client_that_breaks_off_a_tunnel_breaks_it_off_for_the_agent(autojump_clock, tmp_path):
    broken = trio.Event()

    async def talk(stream: Stream) -> None:
        try:
            while await stream.receive_some():
                await stream.send_all(b"z" * 100)
            for _ in range(3):
                await stream.send_all(b"more")
                await trio.sleep(0.1)
        except trio.BrokenResourceError:
            broken.set()

    async with switching(tmp_path, Switching(talk)) as it:
        client = await it.client(it.credentials())
        assert status(await ask(client, UPGRADE)) == 101
        await client.send_all(b"x")
        client.abort()
        with trio.fail_after(1):
            await broken.wait()
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["status"]) == ("aborted", 101)


async def test_what_policy_denies_becomes_no_tunnel(autojump_clock, tmp_path):
    async with switching(tmp_path, Switching(echo), extra="policy_input: {headers: [upgrade]}\n") as it:
        it.opa.policy = lambda question: {"allow": question["headers"].get("upgrade", ["none"]) == ["websocket"]}
        client = await it.client(it.credentials())
        assert status(await ask(client, UPGRADE)) == 403
        assert status(await ask(client, get("/", "Connection: upgrade", "Upgrade: WebSocket"))) == 502
        assert [question["headers"] for question in it.opa.questions] == [
            {"upgrade": ["echo"]}, {"upgrade": ["websocket"]},
        ]  # fmt: skip
        (line, _) = it.access.events("exchange.ended")
        assert line["outcome"] == "denied"


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\nContent-Length: 2\r\n\r\nhi",
        b"POST /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        get("/", "Connection: upgrade", "Upgrade: echo, other"),
        get("/", "Connection: upgrade", "Upgrade: echo", "Upgrade: other"),
        get("/", "Upgrade: echo"),
        b"GET /ws HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
        *(get("/", "Connection: upgrade", f"Upgrade: {token}") for token in ("h2c", "h2", "HTTP/2.0", "tls", "TLS/1.3")),
    ],
)  # fmt: skip
async def test_an_offer_that_is_not_taken_is_an_ordinary_request(autojump_clock, tmp_path, request_):
    async with world(tmp_path) as it:
        client = await it.client(it.credentials())
        assert status(await ask(client, request_)) == 200
        (message,) = it.agent.messages
        assert b"pgrade" not in message


async def test_a_refused_upgrade_is_an_ordinary_answer(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 426 Upgrade Required\r\nupgrade: other\r\ncontent-length: 2\r\n\r\nno"
        client = await it.client(it.credentials())
        answer = await ask(client, UPGRADE)
        assert status(answer) == 426
        assert answer.endswith(b"no")
        assert status(await ask(client, get())) == 426


async def test_a_tunnel_has_the_time_of_its_route(autojump_clock, tmp_path):
    change = ('upstream: "http://127.0.0.1:8000"', 'upstream: "http://127.0.0.1:8000", timeout: 30')
    async with switching(tmp_path, Switching(echo), change=change) as it:
        client = await it.client(it.credentials())
        began = trio.current_time()
        assert status(await ask(client, UPGRADE)) == 101
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await client.send_all(b"still here")
                assert await client.receive_some()
                await trio.sleep(1)
        assert trio.current_time() - began == pytest.approx(30, abs=1)
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "route_timeout")


# ── through both sidecars ─────────────────────────────────────────────────────────────────────────────────────────


async def echo_h2(peer: Peer, stream_id: int) -> None:
    """An h2c agent that accepts extended CONNECT and gives back what comes, and its end."""
    await peer.send(peer.head(stream_id, [(b":status", b"200")]))
    given = 0
    while True:
        message = peer.messages[stream_id]
        if len(message.body) > given:
            await peer.data(stream_id, message.body[given : given + 16384])
            given = min(len(message.body), given + 16384)
        elif message.ended:
            await peer.send(DataFrame(stream_id, flags=["END_STREAM"]))
            return
        await trio.sleep(0.01)


@asynccontextmanager
async def loop(tmp_path, protocol: str, agent_protocol: str):
    """A sidecar whose route leads to its own inbound port: both of its directions, one after the other."""
    agent = f'{{url: "http://127.0.0.1:8000", protocol: {agent_protocol}}}'
    async with world(tmp_path, change=('upstream: "http://127.0.0.1:8000"', f"upstream: {agent}")) as it:
        it.network.names[TARGET] = [INBOUND]
        it.text = it.text.replace("sa/target]", f"sa/me], protocol: {protocol}")
        await it.reload()
        assert it.log.events("config.reload_refused") == []
        async with trio.open_nursery() as nursery:
            if agent_protocol == "h2c":
                there = H2Agent()
                there.settings = {ENABLE_CONNECT_PROTOCOL: 1}
                there.at_head = echo_h2
                await serve_h2_agent(it, nursery, there)
                heads = lambda: [dict(message.heads[0]) for message in there.messages if message.heads]  # noqa: E731
            else:
                switches = Switching(echo)
                it.network.listeners.pop(AGENT)
                nursery.start_soon(switches.serve, await it.network.listen(AGENT))
                heads = lambda: switches.heads  # noqa: E731
            yield it, heads
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("agent_protocol", ["h1", "h2c"])
@pytest.mark.parametrize("protocol", ["auto", "h1", "h2"])
async def test_a_tunnel_over_h1_passes_whatever_lies_between(autojump_clock, tmp_path, protocol, agent_protocol):
    async with loop(tmp_path, protocol, agent_protocol) as (it, _):
        client = await it.agent_client()
        answer = await ask(client, UPGRADE)
        assert status(answer) == 101
        assert b"upgrade: echo\r\n" in answer
        for word in (b"one", b"x" * 50_000):  # the h2c agent gives no window back
            await client.send_all(word)
            back = b""
            while len(back) < len(word):
                back += await client.receive_some() or pytest.fail("an end")
            assert back == word
        await client.send_all(b"last words")
        await client.send_eof()
        assert await all_of(client) == b"last words"
        await trio.sleep(1)
        lines = it.access.events("exchange.ended")
        assert [(line["outcome"], line["error"], line["status"]) for line in lines] == [("allowed", None, 101)] * 2
        assert [question["method"] for question in it.opa.questions] == ["GET", "GET"]


@pytest.mark.parametrize("agent_protocol", ["h1", "h2c"])
@pytest.mark.parametrize("protocol", ["auto", "h1", "h2"])
async def test_a_tunnel_over_h2_passes_whatever_lies_between(autojump_clock, tmp_path, protocol, agent_protocol):
    async with loop(tmp_path, protocol, agent_protocol) as (it, _):
        peer = await h2_agent_client(it)
        await peer.request(1, _connect("echo"), end=False)
        await peer.data(1, b"one")
        await trio.sleep(0.1)
        await peer.data(1, b"two", end=True)
        message = await peer.message(1)
        assert (message.status, message.body, message.ended) == (200, b"onetwo", True)
        await trio.sleep(1)
        lines = it.access.events("exchange.ended")
        assert [(line["outcome"], line["status"]) for line in lines] == [("allowed", 101)] * 2


def _connect(token: str, *extra: tuple[str, str]):
    pseudo = [*h2_head("/ws", method="CONNECT", scheme="http"), (b":protocol", token.encode())]
    return pseudo + [(name.encode(), value.encode()) for name, value in extra]


@pytest.mark.parametrize("protocol", ["auto", "h2"])
async def test_the_handshake_of_a_websocket_holds_on_each_side_that_has_one(autojump_clock, tmp_path, protocol):
    """With h1 between the sidecars the agent's answer passes; with h2 ours answers the client, whose key never got there."""
    async with loop(tmp_path, protocol, "h2c") as (it, heads):
        request_ = get("/ws", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {KEY}", "X-Other: 1")
        answer = await ask(await it.agent_client(), request_)
        assert status(answer) == 101
        assert b"sec-websocket-accept: " + ACCEPT + b"\r\n" in answer
        (head,) = heads()
        assert head[b":protocol"] == b"websocket"
        assert head[b"x-other"] == b"1"
        assert b"sec-websocket-key" not in head


@pytest.mark.parametrize("sound", [True, False])
async def test_an_h1_agent_is_given_a_key_where_there_is_none_and_has_to_answer_it(autojump_clock, tmp_path, sound):
    async with loop(tmp_path, "auto", "h1") as (it, _):
        agent = _WebSocketAgent(sound)
        it.network.listeners.pop(AGENT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.serve, await it.network.listen(AGENT))
            peer = await h2_agent_client(it)
            await peer.request(1, _connect("websocket", ("sec-websocket-version", "13")), end=False)
            await peer.data(1, b"hello", end=True)
            message = await peer.message(1)
            assert b"sec-websocket-version: 13\r\n" in agent.heads[0]
            assert agent.heads[0].count(b"sec-websocket-key: ") == 1
            assert b"sec-websocket-accept" not in message.fields
            assert (message.status, message.body) == (200, b"hello") if sound else message.status == 502
            nursery.cancel_scope.cancel()


class _WebSocketAgent(Switching):
    def __init__(self, sound: bool) -> None:
        super().__init__(echo)
        self._sound = sound

    async def _one(self, sock: socket.socket) -> None:
        stream = Stream(sock)
        try:
            self.heads.append(head := await read_message(stream, bytearray()) or b"")
            key = head.partition(b"sec-websocket-key: ")[2].partition(b"\r\n")[0] if self._sound else b"guessed"
            accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            await stream.send_all(SWITCH % (b"websocket", b"sec-websocket-accept: %b\r\n" % accept))
            await echo(stream)
        except trio.BrokenResourceError:
            pass
        finally:
            stream.close()


@pytest.mark.parametrize(("answer", "wanted"), [(200, 502), (204, 502), (404, 404), (302, 302)])
async def test_to_a_caller_over_h2_an_answer_without_a_tunnel_never_looks_like_one(
    autojump_clock, tmp_path, answer, wanted
):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % answer
        it.network.names[TARGET] = [INBOUND]
        it.text = it.text.replace("sa/target]", "sa/me], protocol: h2")
        await it.reload()
        peer = await h2_agent_client(it)
        await peer.request(1, _connect("echo"), end=False)
        assert (await peer.message(1)).status == wanted
        await trio.sleep(1)
        first, second = it.access.events("exchange.ended")
        assert first["error"] == ("upgrade_refused" if wanted == 502 else None)
        assert second["error"] is None


@pytest.mark.parametrize("token", ["h2c", "tls/1.3", "http/1.1"])
async def test_a_tunnel_for_the_connection_itself_is_refused_to_a_caller_over_h2(autojump_clock, tmp_path, token):
    async with world(tmp_path) as it:
        peer = await h2_agent_client(it)
        await peer.request(1, _connect(token), end=False)
        assert (await peer.message(1)).status == 501
        assert it.opa.questions == []
