"""What requests see of the connections that carry them: nothing, where these end at any moment or lead to a bad address."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import trio

from sidecar.model import Address
from sidecar.wire import tls
from sidecar.wire.network import Stream
from support.flow import (
    AGENT,
    OK,
    TARGET,
    Agent,
    H2Agent,
    World,
    ask,
    get,
    h2_ok,
    read_message,
    serve_h2_agent,
    serve_target,
    status,
    world,
)
from support.h2_frames import GoAwayFrame, Peer

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


def fickle(agent: Agent, chance: random.Random) -> Callable[[Stream], object]:
    """A server that ends its kept connections right after an answer, when the next request comes, or after some time."""

    async def speak(stream: Stream) -> None:
        buffer = bytearray()
        try:
            while (message := await read_message(stream, buffer)) is not None:
                agent.messages.append(message)
                await stream.send_all(OK)
                match chance.randrange(5):
                    case 0:
                        return
                    case 1:  # over what it has not read, which resets the connection where that is TCP
                        await trio.lowlevel.wait_readable(stream._sock)
                        return
                    case 2:
                        await trio.sleep(chance.random())
                        return
                    case 3:
                        await stream.send_eof()
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()

    return speak


async def many(it: World, chance: random.Random, *, inbound: bool) -> list[int]:
    """The statuses of requests on several connections, with random pauses."""
    statuses: list[int] = []

    async def one() -> None:
        stream = await it.client(it.credentials()) if inbound else await it.agent_client()
        for number in range(20):
            await trio.sleep(chance.random() / 2)
            method = chance.choice(["GET", "DELETE", "OPTIONS", "PUT"])
            if method == "PUT":
                request = get(f"/{number}", "Content-Length: 5", method="PUT") + b"hello"
            else:
                request = get(f"/{number}", method=method)
            statuses.append(status(await ask(stream, request)))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    return statuses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inbound", [True, False], ids=["inbound", "outbound"])
async def test_an_upstream_that_closes_kept_connections_at_random_costs_no_idempotent_request(
    autojump_clock, tmp_path, seed, inbound
):
    chance = random.Random(seed)
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        agent = it.agent if inbound else it.target
        agent._connection = fickle(agent, chance)  # type: ignore[method-assign,assignment]
        assert await many(it, chance, inbound=inbound) == [200] * 100
        assert len(agent.messages) == 100, "none was acted on twice"
        assert 20 < it.network.dialled.count(AGENT if inbound else TARGET) < 100
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(3))
async def test_an_h2_upstream_that_leaves_at_random_costs_no_idempotent_request(autojump_clock, tmp_path, seed):
    """With a goodbye or without one."""
    chance = random.Random(seed)

    async def answer(peer: Peer, stream_id: int) -> None:
        await h2_ok(peer, stream_id)
        match chance.randrange(10):
            case 0:
                await trio.sleep(chance.random() / 10)
                peer.stream.close()
            case 1:
                await peer.send(GoAwayFrame(0, last_stream_id=stream_id))

    agent = H2Agent(answer)
    grpc = "Content-Type: application/grpc"
    async with world(tmp_path) as it:
        async with trio.open_nursery() as nursery:
            await serve_h2_agent(it, nursery, agent)
            statuses: list[int] = []

            async def one() -> None:
                stream = await it.client(it.credentials())
                for number in range(20):
                    await trio.sleep(chance.random() / 2)
                    statuses.append(status(await ask(stream, get(f"/{number}", grpc))))

            async with trio.open_nursery() as clients:
                for _ in range(5):
                    clients.start_soon(one)
            assert statuses == [200] * 100
            assert len(agent.peers) > 3
            nursery.cancel_scope.cancel()


async def test_above_the_bound_requests_wait_and_those_who_wait_too_long_are_told_so(autojump_clock, tmp_path):
    async with world(tmp_path, extra="limits: {max_upstream_connections: 2}\n") as it:
        release = trio.Event()
        it.agent.before = release.wait
        answers: list[bytes] = []

        async def one() -> None:
            answers.append(await ask(await it.client(it.credentials()), get()))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
            await trio.sleep(4)
            assert (len(it.agent.messages), answers) == (2, []), "two are served, two wait"
            nursery.start_soon(one)
            await trio.sleep(0.5)
            assert [json.loads(one.partition(b"\r\n\r\n")[2])["code"] for one in answers] == ["upstream_overloaded"]
            await trio.sleep(2)
            assert [status(one) for one in answers] == [503] * 3
            release.set()
        assert sorted(map(status, answers)) == [200] * 2 + [503] * 3
        assert len(it.agent.messages) == 2


async def test_an_address_that_answers_like_a_gateway_that_failed_gets_no_more_requests(autojump_clock, tmp_path):
    good, bad = Address(host="10.0.1.1", port=8443), Address(host="10.0.1.2", port=8443)
    timeouts = ("timeouts: {", "limits: {max_upstream_failures: 3}\ntimeouts: {ejection: 60, ")
    async with world(tmp_path, change=timeouts) as it, trio.open_nursery() as nursery:
        it.network.names[TARGET] = [good, bad]
        credentials = it.credentials("/ns/demo/sa/target")
        credentials.server_context.set_alpn_protocols(["http/1.1"])
        agents = {good: Agent(), bad: Agent(lambda _message: UNAVAILABLE)}

        async def accept(address: Address) -> None:
            listener = await it.network.listen(address)
            while True:
                sock, _ = await listener.accept()
                stream = await tls.accept(sock, credentials.server_context, credentials.judge)
                nursery.start_soon(agents[address]._connection, stream)

        for address in agents:
            nursery.start_soon(accept, address)
        await trio.testing.wait_all_tasks_blocked()
        statuses: list[int] = []

        async def one() -> None:
            stream = await it.agent_client()
            for _ in range(10):
                statuses.append(status(await ask(stream, get())))
                await trio.sleep(0.1)

        async with trio.open_nursery() as clients:
            for _ in range(4):
                clients.start_soon(one)
        assert 3 <= len(agents[bad].messages) <= 3 + 3, "three failures in a row, and what was under way"
        assert statuses.count(503) == len(agents[bad].messages)
        assert len(agents[good].messages) + len(agents[bad].messages) == 40
        (ejected,) = it.log.events("upstream.ejected")
        assert (ejected["target"], ejected["address"], ejected["seconds"]) == (str(TARGET), str(bad), 60.0)
        assert it.log.events("upstream.returned") == []
        await trio.sleep(61)
        (returned,) = it.log.events("upstream.returned")
        assert returned["address"] == str(bad)
        nursery.cancel_scope.cancel()
