"""How many connections there are, who gets what becomes free, and when a connection has had its time."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from sidecar.errors import MaybeSent, NoAnswer, NotSent, PeerRejected
from sidecar.model import Address
from sidecar.wire.answers import Whole
from sidecar.wire.client import Client, ClientSettings, UpstreamStream
from sidecar.wire.network import Stream, TcpNetwork
from support.flow import OK, Agent, H2Agent, PairNetwork, read_message
from support.h2_frames import GoAwayFrame, SettingsFrame
from support.pools import (
    AT,
    H2C,
    HEAD,
    OUR_CA,
    PLAIN,
    SECURED,
    TARGET_SVID,
    Ours,
    converse,
    credentials,
    exchange,
    failed,
    h1_only,
    pool,
    served,
)

ONE, TWO, THREE = (Address(host=f"10.0.0.{number}", port=8443) for number in (1, 2, 3))


@pytest.fixture
def ours() -> Ours:
    return Ours()


def open_ends(network: PairNetwork) -> list[socket.socket]:
    """Our ends of the connections that are open."""
    return [near for near in network.sockets[::2] if near.fileno() >= 0]


async def finish(stream: UpstreamStream) -> None:
    await converse(stream)
    stream.release()


# ── the bound ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_whoever_comes_above_the_bound_gets_what_is_given_back_in_turn(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=2) as client:
        held = [await client.open(PLAIN) for _ in range(2)]
        served_in_turn: list[int] = []

        async def wait(number: int) -> None:
            stream = await client.open(PLAIN)
            served_in_turn.append(number)
            assert stream.reused
            await trio.sleep(0.1)
            await finish(stream)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            assert served_in_turn == []
            await finish(held[0])
            await trio.testing.wait_all_tasks_blocked()
            assert served_in_turn == [0]
            await finish(held[1])
        assert served_in_turn == [0, 1]
        assert len(network.dialled) == 2


async def test_whoever_waits_is_given_the_place_of_a_connection_that_ended_or_was_not_made(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=1) as client:
        held = await client.open(PLAIN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, client, PLAIN)
            await trio.sleep(0.5)
            assert len(network.dialled) == 1
            held.release()  # it was not used, and is closed
            released_at = trio.current_time()
        assert len(network.dialled) == 2
        assert trio.current_time() == released_at, "at once, and not when somebody looks after it"
        network.listeners.pop(AT)
        for near in open_ends(network):
            near.shutdown(socket.SHUT_RDWR)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(failed, client, PLAIN)
        assert len(network.dialled) == 4
        assert open_ends(network) == []
        assert trio.current_time() == released_at


class Dialled(PairNetwork):
    """Connects after a while, and remembers how many did so at once."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.most = self.now = 0

    async def connect(self, to: Address | Path) -> socket.socket:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await trio.sleep(self._seconds)
            return await super().connect(to)
        finally:
            self.now -= 1


async def test_a_crowd_that_meets_an_empty_pool_does_not_storm_the_upstream(autojump_clock):
    network, agent = Dialled(0.1), Agent()

    async def before() -> None:
        await trio.sleep(1)  # so long that nobody is served by a connection that another one has made

    agent.before = before
    async with served(network, agent._connection), pool(network, max_connections=60, max_connecting=8) as client:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(exchange, client, PLAIN)
        assert network.most == 8
        assert len(network.dialled) == 50
        assert trio.current_time() - began < 0.1 * 50 / 8 + 0.2 + 1


async def test_who_waits_for_others_to_connect_is_served_by_what_becomes_free_first(autojump_clock):
    network, agent = Dialled(1.0), Agent()
    async with served(network, agent._connection), pool(network, max_connections=60, max_connecting=2) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(exchange, client, PLAIN)
        assert len(network.dialled) <= 4


async def test_who_waits_in_vain_for_others_to_connect_is_told_so(autojump_clock):
    network = Dialled(math.inf)
    async with pool(network, max_connections=60, max_connecting=2, connect_timeout=2.0) as client:
        async with trio.open_nursery() as nursery:
            faults: list[NotSent] = []

            async def fail() -> None:
                fault = await failed(client, PLAIN)
                assert isinstance(fault, NotSent)
                faults.append(fault)

            for _ in range(10):
                nursery.start_soon(fail)
        assert [(fault.code, fault.status) for fault in faults] == [("upstream_connect_timeout", 504)] * 10
        assert network.most == 2


async def test_what_cannot_be_connected_to_keeps_nobody_waiting(autojump_clock):
    network = PairNetwork()  # nobody listens
    async with pool(network, max_connections=60, max_connecting=3) as client:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(failed, client, PLAIN)
        assert trio.current_time() == began


async def test_as_many_may_come_at_once_as_before_there_was_such_a_bound(autojump_clock):
    network, agent = Dialled(0.01), Agent()
    async with served(network, agent._connection), pool(network, max_connections=20, max_connecting=2) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(exchange, client, PLAIN)
            await trio.testing.wait_all_tasks_blocked()
            assert (await failed(client, PLAIN)).code == "upstream_overloaded"


async def test_whoever_waits_is_not_given_a_connection_that_has_ended(autojump_clock):
    network, agent = PairNetwork(), Agent()
    agent.hangs_up = True
    async with served(network, agent._connection), pool(network, max_connections=1) as client:
        held = await client.open(PLAIN)
        got: list[UpstreamStream] = []

        async def wait() -> None:
            got.append(await client.open(PLAIN))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await converse(held)
            await trio.sleep(0.5)
            held.release()
        assert not got[0].reused
        await finish(got[0])


async def test_nobody_waits_longer_for_a_connection_than_it_may_take_to_connect(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with (
        served(network, agent._connection),
        pool(network, max_connections=1, connect_timeout=3.0) as client,
    ):
        held = await client.open(PLAIN)
        began = trio.current_time()
        fault = await failed(client, PLAIN)
        assert (type(fault), fault.code, fault.status) == (NotSent, "upstream_overloaded", 503)
        assert trio.current_time() - began == pytest.approx(3.0)
        await finish(held)
        assert await exchange(client, PLAIN) == b"ok"


async def test_no_more_may_wait_than_may_be_served(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=3) as client:
        held = [await client.open(PLAIN) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(exchange, client, PLAIN)
            await trio.sleep(1)
            began = trio.current_time()
            assert (await failed(client, PLAIN)).code == "upstream_overloaded"
            assert trio.current_time() == began, "at once"
            for stream in held:
                await finish(stream)


async def test_connections_of_other_upstreams_do_not_count(autojump_clock):
    network, agent = PairNetwork(), Agent()
    other = Address(host="other.test", port=1)
    async with (
        served(network, agent._connection),
        served(network, agent._connection, at=other),
        pool(network, max_connections=1) as client,
    ):
        held = await client.open(PLAIN)
        elsewhere = await client.open(type(PLAIN)(address=other, tls=False))
        await finish(held)
        await finish(elsewhere)


async def test_a_reload_that_raises_the_bound_serves_those_who_wait(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=1) as client:
        held = await client.open(PLAIN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, client, PLAIN)
            await trio.sleep(1)
            client.settings = ClientSettings(max_connections=2)
            await trio.sleep(2)
            assert len(agent.messages) == 1
        held.release()


async def test_streams_of_shared_connections_are_waited_for_in_turn_too(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    agent.settings = {SettingsFrame.MAX_CONCURRENT_STREAMS: 2}
    async with served(network, agent.connection), pool(network, max_connections=2) as client:
        held = [await client.open(H2C)]
        await converse(held[0])  # and its settings are known
        held += [await client.open(H2C) for _ in range(2)]
        await converse(held[2])
        held.append(await client.open(H2C))
        assert len(network.dialled) == 2
        served_in_turn: list[int] = []

        async def wait(number: int) -> None:
            stream = await client.open(H2C)
            served_in_turn.append(number)
            await finish(stream)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            assert served_in_turn == []
            assert (await failed(client, H2C)).code == "upstream_overloaded"
            held.pop().release()
            released_at = trio.current_time()
        assert served_in_turn == [0, 1]
        assert len(network.dialled) == 2
        assert trio.current_time() == released_at
        for stream in held:
            stream.release()


async def test_a_shared_connection_serves_all_who_wait_for_a_place_as_soon_as_it_is_there(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    agent.settings = {SettingsFrame.MAX_CONCURRENT_STREAMS: 1}
    async with served(network, agent.connection), pool(network, max_connections=3) as client:
        held = []
        for _ in range(3):
            held.append(await client.open(H2C))
            await converse(held[-1])
        agent.settings = {}
        for peer in agent.peers:
            await peer.send(GoAwayFrame(0, last_stream_id=1))
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(exchange, client, H2C)
                await trio.testing.wait_all_tasks_blocked()
            assert len(network.dialled) == 3, "what goes away still counts"
            held.pop().release()
        assert len(network.dialled) == 4
        assert len(agent.messages) == 6
        for stream in held:
            stream.release()


async def test_a_shared_connection_that_is_there_serves_whoever_waited_for_another_that_failed(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    agent.settings = {SettingsFrame.MAX_CONCURRENT_STREAMS: 1}
    async with served(network, agent.connection), pool(network) as client:
        first = await client.open(H2C)
        await converse(first)
        outcomes: list[bytes | Exception] = []
        real = network.connect

        async def slow_failure(to: object) -> socket.socket:
            await trio.sleep(1)
            raise ConnectionRefusedError(111, "refused")

        network.connect = slow_failure  # type: ignore[method-assign]

        async def one() -> None:
            try:
                outcomes.append(await exchange(client, H2C))
            except NotSent as fault:
                outcomes.append(fault)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(one)
                await trio.testing.wait_all_tasks_blocked()
            first.release()
        network.connect = real  # type: ignore[method-assign]
        assert sorted(map(type, outcomes), key=str) == [bytes, NotSent]


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_leaves_when_no_turn_is_lost_and_the_bound_is_kept(autojump_clock, seed):
    """Requests come, hold on to what they get, give it back in any state, or give up at any moment, as chance has it."""
    chance = random.Random(seed)
    network, agent = PairNetwork(), Agent()
    bound, most = 3, 0
    outcomes: dict[str, int] = dict.fromkeys(("served", "overloaded", "gave up"), 0)

    async def one(client: Client) -> None:
        nonlocal most
        await trio.sleep(chance.randrange(200) / 10)
        outcome = "gave up"
        with trio.move_on_after(chance.choice([0.2, 1, 1000])):
            try:
                stream = await client.open(PLAIN, fresh=chance.random() < 0.3)
            except NotSent as fault:
                outcomes["overloaded" if fault.code == "upstream_overloaded" else fault.code] += 1
                return
            try:
                most = max(most, len(open_ends(network)))
                await trio.sleep(chance.randrange(8) / 10)
                if chance.random() < 0.8:
                    await converse(stream)
                outcome = "served"
            finally:
                stream.release()
        outcomes[outcome] += 1

    async with served(network, agent._connection), pool(network, max_connections=bound, connect_timeout=1.5) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(one, client)
        assert sum(outcomes.values()) == 200
        assert all(outcomes.values()), "each of it has happened"
        assert most == bound
        (only,) = client._pools.values()
        assert (only.connecting, len(only._line)) == (0, 0)
        assert len(only) == len(open_ends(network)) == len(only._idle)
        assert await exchange(client, PLAIN) == b"ok"


# ── fresh ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fresh_stream_is_never_on_a_kept_connection_and_leaves_those_that_are_kept(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        await exchange(client, PLAIN)
        stream = await client.open(PLAIN, fresh=True)
        assert not stream.reused
        assert len(open_ends(network)) == 2
        await finish(stream)


async def test_at_the_bound_a_fresh_stream_takes_the_place_of_an_idle_connection(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=2) as client:
        streams = [await client.open(PLAIN) for _ in range(2)]
        for stream in streams:
            await finish(stream)
        fresh = await client.open(PLAIN, fresh=True)
        assert not fresh.reused
        assert network.sockets[0].fileno() == -1, "that which was idle for longest"
        assert len(open_ends(network)) == 2
        await finish(fresh)


async def test_whoever_waits_for_a_fresh_stream_is_not_given_a_kept_connection(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_connections=1) as client:
        held = await client.open(PLAIN)
        got: list[UpstreamStream] = []

        async def wait() -> None:
            got.append(await client.open(PLAIN, fresh=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(1)
            await finish(held)
        assert not got[0].reused
        await finish(got[0])


@pytest.mark.parametrize("seed", range(6))
async def test_an_upstream_that_closes_kept_connections_at_random_fails_no_request_that_may_be_repeated(
    autojump_clock, seed
):
    """Right after an answer, when the next request comes, after some time: what looks alive may be gone when it is used."""
    chance = random.Random(seed)
    network, answered, dropped = PairNetwork(), 0, 0

    async def speak(stream: Stream) -> None:
        nonlocal answered, dropped
        buffer = bytearray()
        while await read_message(stream, buffer) is not None:
            await stream.send_all(OK)
            answered += 1
            match chance.randrange(5):
                case 0:
                    return
                case 1:  # with what it has not read, it resets
                    await trio.lowlevel.wait_readable(stream._sock)
                    dropped += 1
                    return
                case 2:
                    with trio.move_on_after(chance.random()):
                        await trio.lowlevel.wait_readable(stream._sock)
                    return
                case 3:  # a half-close
                    await stream.send_eof()

    async def one(client: Client) -> None:
        """As whoever forwards does it."""
        for _ in range(20):
            await trio.sleep(chance.random() / 2)
            try:
                assert await exchange(client, PLAIN) == b"ok"
            except (NoAnswer, MaybeSent):
                assert await exchange(client, PLAIN, fresh=True) == b"ok"

    async with served(network, speak), pool(network, max_connections=6) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one, client)
        assert answered == 100
        assert dropped > 3
        assert len(network.dialled) < 100, "and some were kept"


# ── ages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_gets_no_request_when_it_is_too_old_though_it_is_used_all_the_time(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_age=600.0) as client:
        for _ in range(50):
            await exchange(client, PLAIN)
            await trio.sleep(10)
            assert len(network.dialled) == 1
        for _ in range(20):
            await exchange(client, PLAIN)
            await trio.sleep(10)
        assert len(network.dialled) == 2
        assert len(open_ends(network)) == 1


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_a_connection_that_is_too_old_finishes_what_it_carries(autojump_clock, speaks):
    network = PairNetwork()
    upstream = PLAIN if speaks == "h1" else H2C
    speak = Agent()._connection if speaks == "h1" else H2Agent().connection
    async with served(network, speak), pool(network, max_age=600.0) as client:
        stream = await client.open(upstream)
        await trio.sleep(700)
        await exchange(client, upstream)
        assert len(network.dialled) == 2
        assert await converse(stream) == b"ok"
        assert len(open_ends(network)) == 2 if speaks == "h2" else 1
        stream.release()
        await trio.sleep(2)
        assert network.sockets[0].fileno() == -1


async def test_connections_that_were_made_together_do_not_all_end_together(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with (
        served(network, agent._connection),
        pool(network, max_age=1000.0, idle_timeout=10_000.0) as client,
    ):
        streams = [await client.open(PLAIN) for _ in range(50)]
        for stream in streams:
            await finish(stream)
        open_at = []
        for _ in range(25):
            await trio.sleep(10)
            open_at.append(len(open_ends(network)))
            if trio.current_time() < 890:
                await trio.sleep(890 - trio.current_time())
        assert open_at[0] == 50
        assert open_at[-1] == 0
        drops = [before - after for before, after in pairwise(open_at)]
        assert max(drops) < 15


async def test_an_h2_upstream_that_gives_no_sign_of_life_ends_what_it_carries(autojump_clock):
    network = PairNetwork()

    async def mute(stream: Stream) -> None:
        while await stream.receive_some():
            pass

    async with served(network, mute), pool(network, keepalive_timeout=30.0) as client:
        stream = await client.open(H2C)
        began = trio.current_time()
        await stream.send(HEAD, [], Whole())
        with pytest.raises(NoAnswer):
            await stream.receive()
        assert 30 <= trio.current_time() - began < 45
        stream.release()
        await trio.sleep(1)
        assert open_ends(network) == []


async def test_a_mass_close_is_followed_by_one_shared_connection_and_not_one_for_each_request(autojump_clock, ours):
    network, agent = PairNetwork(), H2Agent()
    async with (
        served(network, agent.connection, credentials(TARGET_SVID), delay=1),
        pool(network, ours) as client,
        trio.open_nursery() as nursery,
    ):
        await exchange(client, SECURED)
        await trio.sleep(1)
        agent.peers[0].stream.close()
        await trio.sleep(1)
        for _ in range(50):
            nursery.start_soon(exchange, client, SECURED)
    assert len(network.dialled) == 2


async def test_what_was_known_of_an_upstream_that_nobody_asks_for_is_forgotten(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        stream = await client.open(PLAIN)
        await trio.sleep(1000)
        stream.release()
        await trio.sleep(300)
        assert len(client._pools) == len(client._targets) == 1
        await trio.sleep(400)
        assert client._pools == client._targets == {}
        assert await exchange(client, PLAIN) == b"ok"


# ── several addresses ─────────────────────────────────────────────────────────────────────────────────────────────


class Told(list[tuple[str, dict[str, object]]]):
    """Events."""

    def __call__(self, name: str, /, **fields: object) -> None:
        self.append((name, fields))


class Places:
    """A name with addresses, behind each of which an agent stands."""

    def __init__(self, *addresses: Address) -> None:
        self.network = PairNetwork()
        self.network.names[AT] = list(addresses)
        self.agents = {address: Agent() for address in addresses}

    async def stand(self, stack: AsyncExitStack, speak: Callable[[Stream], Awaitable[None]] | None = None) -> None:
        for address, agent in self.agents.items():
            await stack.enter_async_context(served(self.network, speak or agent._connection, at=address))


async def test_connections_are_spread_over_the_addresses(autojump_clock):
    places = Places(ONE, TWO, THREE)
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        client = await stack.enter_async_context(pool(places.network))
        streams = [await client.open(PLAIN) for _ in range(9)]
        for stream in streams:
            await finish(stream)
        assert sorted(map(str, places.network.dialled)) == sorted(map(str, [ONE, TWO, THREE] * 3))


async def test_sidecars_do_not_all_begin_with_the_same_address(autojump_clock):
    places = Places(ONE, TWO, THREE)
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        for _ in range(20):
            client = Client(places.network, lambda: None, ClientSettings())
            (await client.open(PLAIN)).release()
    assert len(set(places.network.dialled)) > 1


async def test_an_address_that_refuses_again_and_again_is_tried_last_for_its_time(autojump_clock):
    places, told = Places(ONE, TWO), Told()
    network = places.network
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        client = await stack.enter_async_context(pool(network, log=told, max_failures=3, ejection=30.0))
        refusing = network.listeners.pop(TWO)
        for _ in range(8):
            assert await exchange(client, PLAIN, fresh=True) == b"ok"
        assert told == [
            ("upstream.ejected", {"target": str(AT), "address": str(TWO), "failures": 3, "seconds": 30.0})
        ]  # fmt: skip
        network.dialled.clear()
        for _ in range(6):
            await exchange(client, PLAIN, fresh=True)
        assert network.dialled == [ONE] * 6
        network.listeners[TWO] = refusing
        await trio.sleep(31)
        assert told[1:] == [("upstream.returned", {"target": str(AT), "address": str(TWO)})]
        network.dialled.clear()
        for _ in range(6):
            await exchange(client, PLAIN, fresh=True)
        assert sorted(map(str, network.dialled)) == [str(ONE)] * 3 + [str(TWO)] * 3


async def test_where_all_addresses_fail_all_are_tried_all_the_same(autojump_clock):
    places, told = Places(ONE, TWO), Told()
    network = places.network
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(pool(network, log=told, max_failures=2))
        for _ in range(10):
            assert (await failed(client, PLAIN)).code == "upstream_refused"
        assert len(network.dialled) == 20
        assert len(told) == 1
        await places.stand(stack)
        assert await exchange(client, PLAIN) == b"ok"


@asynccontextmanager
async def failing_slowly(speaks):
    """A pool over two addresses of one upstream, which ejects one after three failures in a row."""
    places, told = Places(ONE, TWO), Told()
    async with AsyncExitStack() as stack:
        await places.stand(stack, (Agent()._connection if speaks == "h1" else H2Agent().connection))
        client = await stack.enter_async_context(pool(places.network, log=told, max_failures=3))
        yield places, told, client, PLAIN if speaks == "h1" else H2C


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_an_address_whose_requests_fail_again_and_again_gets_no_more_of_them(autojump_clock, speaks):
    """Kept connections too: what is shared would go on carrying all there is."""
    async with failing_slowly(speaks) as (places, told, client, upstream):
        for _ in range(3):
            stream = await client.open(upstream)
            await converse(stream)
            stream.failed()  # it was a 503, say
            stream.release()
        (bad,) = set(places.network.dialled)
        assert [fields["address"] for _, fields in told] == [str(bad)]
        await exchange(client, upstream)
        assert places.network.dialled[-1] != bad
        await trio.sleep(2)
        assert len(open_ends(places.network)) == 1


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_an_answer_in_between_ends_a_row_of_failures(autojump_clock, speaks):
    async with failing_slowly(speaks) as (places, told, client, upstream):
        for number in range(20):
            stream = await client.open(upstream)
            await converse(stream)
            if number % 3:
                stream.failed()
            stream.release()
        assert told == []
        assert len(places.network.dialled) == 1


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_a_request_that_was_given_up_speaks_neither_for_an_address_nor_against_it(autojump_clock, speaks):
    async with failing_slowly(speaks) as (_, told, client, upstream):
        for number in range(3):
            stream = await client.open(upstream)
            await converse(stream)
            stream.failed()
            stream.release()
            given_up = await client.open(upstream)
            if number < 2:
                await given_up.send(HEAD, [], Whole())
            given_up.release()
            if speaks == "h1":  # what was given up is closed; let the next one lead to the same place
                (endpoints,) = client._targets.values()
                endpoints._turn -= 1
        assert len(told) == 1


async def test_a_connect_that_failed_and_then_took_too_long_counts_once_against_each(autojump_clock):
    places = Places(ONE, TWO)

    async def connect(to: Address) -> socket.socket:
        if to == ONE:
            raise ConnectionRefusedError(111, "refused")
        await trio.sleep_forever()
        raise AssertionError

    places.network.connect = connect  # type: ignore[method-assign]
    async with pool(places.network, connect_timeout=3.0) as client:
        assert (await failed(client, PLAIN)).code == "upstream_connect_timeout"
        (endpoints,) = client._targets.values()
        assert [one.failures for one in endpoints.in_order()] == [1, 1]


async def test_silence_counts_against_every_address_that_kept_it(autojump_clock):
    places, told = Places(ONE, TWO, THREE), Told()

    async def connect(to: object) -> socket.socket:
        await trio.sleep_forever()
        raise AssertionError

    places.network.connect = connect  # type: ignore[method-assign]
    async with pool(places.network, log=told, connect_timeout=3.0, max_failures=2) as client:
        for _ in range(2):
            assert (await failed(client, PLAIN)).code == "upstream_connect_timeout"
        (endpoints,) = client._targets.values()
        assert [one.failures for one in endpoints.in_order()] == [2, 2, 2]
        assert len(told) == 1, "one of three: two would be more than half"


async def silence(_stream: Stream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("speak", "counts"),
    [
        (lambda stream: stream.close_gently(1), True),
        (lambda stream: stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"), True),
        (silence, True),
        (lambda stream: stream.send_all(b"\x15\x03\x03\x00\x02\x02\x30"), False),
    ],
    ids=["end", "not TLS", "silence", "refuses us"],
)
async def test_a_broken_handshake_counts_against_the_address_and_a_refusal_does_not(
    autojump_clock, ours, speak, counts
):
    network = PairNetwork()
    async with served(network, speak), pool(network, ours) as client:
        await failed(client, SECURED)
        (endpoints,) = client._targets.values()
        assert [one.failures for one in endpoints.in_order()] == [int(counts)]


async def test_being_somebody_else_ejects_nothing(autojump_clock, ours):
    network, agent = PairNetwork(), Agent()
    async with (
        served(network, agent._connection, h1_only(OUR_CA.svid("/other"))),
        pool(network, ours, max_failures=1) as client,
    ):
        assert isinstance(await failed(client, SECURED), PeerRejected)
        (endpoints,) = client._targets.values()
        assert [one.failures for one in endpoints.in_order()] == [0]


async def test_what_we_lack_ourselves_counts_against_nobody(autojump_clock):
    network = PairNetwork()

    async def connect(to: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    network.connect = connect  # type: ignore[method-assign]
    async with pool(network, max_failures=1) as client:
        await failed(client, PLAIN)
        (endpoints,) = client._targets.values()
        assert [one.failures for one in endpoints.in_order()] == [0]


async def test_an_address_that_says_nothing_costs_a_quarter_of_a_second(autojump_clock):
    places = Places(ONE, TWO)
    network = places.network
    real = network.connect

    async def connect(to: Address) -> socket.socket:
        if to == ONE:
            await trio.sleep_forever()
        return await real(to)

    network.connect = connect  # type: ignore[method-assign]
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        client = await stack.enter_async_context(pool(network))
        took = []
        for _ in range(4):
            began = trio.current_time()
            assert await exchange(client, PLAIN, fresh=True) == b"ok"
            took.append(trio.current_time() - began)
        assert sorted(took) == pytest.approx([0, 0, 0.25, 0.25])


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_what_leads_to_where_a_name_no_longer_leads_is_retired(autojump_clock, speaks):
    places = Places(ONE, TWO)
    network = places.network
    network.names[AT] = [ONE]
    upstream = PLAIN if speaks == "h1" else H2C
    async with AsyncExitStack() as stack:
        await places.stand(stack, (Agent()._connection if speaks == "h1" else H2Agent().connection))
        client = await stack.enter_async_context(pool(network))
        under_way = await client.open(upstream)
        await trio.sleep(28)
        if speaks == "h1":
            await exchange(
                client, upstream
            )  # so that the answer that is known is fresh when the name is asked for again
        network.names[AT] = [TWO]
        await trio.sleep(4)
        await exchange(client, upstream)
        assert network.dialled[-1] == TWO
        assert await converse(under_way) == b"ok"
        under_way.release()
        await trio.sleep(1)
        assert len(open_ends(network)) == 1


@pytest.mark.parametrize("failure", [-3, -2], ids=["try again", "no such name"])
async def test_while_a_name_cannot_be_resolved_what_is_open_serves_on(autojump_clock, failure):
    places = Places(ONE)
    network = places.network
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        client = await stack.enter_async_context(pool(network))

        async def resolve(name: Address) -> list[Address]:
            raise socket.gaierror(failure, "no")

        await exchange(client, PLAIN)
        network.resolve = resolve  # type: ignore[method-assign]
        for _ in range(20):
            await trio.sleep(50)
            assert await exchange(client, PLAIN) == b"ok"
        assert len(network.dialled) == 1


async def test_an_address_by_ip_is_never_asked_for(autojump_clock):
    places = Places(ONE)
    network = places.network

    async def resolve(name: Address) -> list[Address]:
        raise AssertionError

    network.resolve = resolve  # type: ignore[method-assign]
    async with AsyncExitStack() as stack:
        await places.stand(stack)
        client = await stack.enter_async_context(pool(network))
        for _ in range(3):
            await exchange(client, type(PLAIN)(address=ONE, tls=False))
            await trio.sleep(40)


# ── real sockets ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_is_kept_alive_by_the_kernel():
    agent = Agent()
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = Address(host="127.0.0.1", port=server.getsockname()[1])
        async with pool(TcpNetwork(), keepalive_timeout=30.0) as client:
            stream = await client.open(type(PLAIN)(address=at, tls=False))
            sock = stream.stream._sock  # type: ignore[attr-defined]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            stream.release()
    assert agent.messages == []


async def test_localhost_is_reached_by_whichever_of_its_addresses_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = Address(host="localhost", port=server.getsockname()[1])
        async with pool(TcpNetwork()) as client:
            stream = await client.open(type(PLAIN)(address=at, tls=False))
            stream.release()
