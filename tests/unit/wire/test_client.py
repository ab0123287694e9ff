"""The pool: which connections serve which requests, how long they are kept, and what each way of failing is called."""

from __future__ import annotations

import gc
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio

from examples.demo.kit import CA
from sidecar.errors import MaybeSent, NoAnswer, NotSent, OurFault, PeerRejected, PlaintextOnly, SidecarError
from sidecar.model import Aborted, SpiffeId, Workload
from sidecar.wire import tls
from sidecar.wire.answers import Whole
from sidecar.wire.client import Client, ClientSettings, Upstream
from sidecar.wire.network import Stream
from support.flow import Agent, H2Agent, PairNetwork, h2_ok
from support.h2_frames import DataFrame, GoAwayFrame, Peer, RstStreamFrame, SettingsFrame
from support.pools import (
    AT,
    H2C,
    HEAD,
    OUR_CA,
    PLAIN,
    SECURED,
    TARGET_ID,
    TARGET_SVID,
    Ours,
    converse,
    credentials,
    end_of,
    exchange,
    failed,
    h1_only,
    pool,
    served,
    unanswered,
)


@pytest.fixture
def ours() -> Ours:
    return Ours()


# ── kept h1 connections ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_that_ended_its_exchange_in_order_is_kept(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        reused = []
        for _ in range(3):
            stream = await client.open(PLAIN)
            reused.append(stream.reused)
            assert await converse(stream) == b"ok"
            stream.release()
        assert reused == [False, True, True]
        assert network.dialled == [AT]


async def test_exchanges_at_once_have_a_connection_each_and_no_more_than_the_limit_are_kept(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, max_idle=3) as client:
        streams = [await client.open(PLAIN) for _ in range(5)]
        for stream in streams:
            await converse(stream)
            stream.release()
        again = [await client.open(PLAIN) for _ in range(5)]
        assert [stream.reused for stream in again] == [True] * 3 + [False] * 2
        assert len(network.dialled) == 7
        for stream in again:
            stream.release()


async def test_a_connection_that_nobody_uses_is_closed_after_its_time(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network, idle_timeout=60.0) as client:
        await exchange(client, PLAIN)
        await trio.sleep(50)
        await exchange(client, PLAIN)
        await trio.sleep(50)
        await exchange(client, PLAIN)
        assert len(network.dialled) == 1, "each use begins the time anew"
        near, _ = network.sockets
        assert near.fileno() >= 0
        await trio.sleep(80)
        assert near.fileno() == -1
        await exchange(client, PLAIN)
        assert len(network.dialled) == 2


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"])
async def test_a_kept_connection_that_was_ended_or_spoken_on_is_not_used_again(autojump_clock, said):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        await exchange(client, PLAIN)
        far = network.sockets[1]
        if said:
            far.send(said)
        else:
            far.shutdown(socket.SHUT_WR)
        stream = await client.open(PLAIN)
        assert not stream.reused
        assert await converse(stream) == b"ok"
        stream.release()
        assert network.sockets[0].fileno() == -1


async def test_a_kept_connection_that_was_ended_is_closed_without_being_asked_for(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        await exchange(client, PLAIN)
        network.sockets[1].shutdown(socket.SHUT_WR)
        await trio.sleep(20)
        assert network.sockets[0].fileno() == -1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["close", "1.0", "more than was asked for"],
)
async def test_a_connection_that_cannot_be_trusted_with_another_request_is_not_kept(autojump_clock, answer):
    network, agent = PairNetwork(), Agent(lambda _message: answer)
    async with served(network, agent._connection), pool(network) as client:
        for _ in range(2):
            assert await exchange(client, PLAIN) == b"ok"
        assert len(network.dialled) == 2


async def test_a_connection_left_in_the_middle_of_an_answer_is_not_kept(autojump_clock):
    network, agent = PairNetwork(), Agent(lambda _m: b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    async with served(network, agent._connection), pool(network) as client:
        stream = await client.open(PLAIN)
        await stream.send(HEAD, [], Whole())
        await stream.receive()
        stream.release()
        assert network.sockets[0].fileno() == -1


class Stalled:
    """A body whose end does not come."""

    length = None
    ready = False

    def __init__(self) -> None:
        self._data: bytes | None = b"half"

    async def receive(self) -> bytes | None:
        data, self._data = self._data, None
        if data is None:
            await trio.sleep_forever()
        return data


async def test_a_connection_left_in_the_middle_of_a_request_is_not_kept_though_it_was_answered(autojump_clock):
    network, agent = PairNetwork(), Agent()
    agent.early = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    async with served(network, agent._connection), pool(network) as client, trio.open_nursery() as nursery:
        stream = await client.open(PLAIN)
        nursery.start_soon(stream.send, replace(HEAD, method="POST"), [], Stalled())
        assert (await stream.receive()).status == 200
        assert await stream.body.receive() == b"ok"
        nursery.cancel_scope.cancel()
        stream.release()
        assert network.sockets[0].fileno() == -1


async def test_over_tls_an_exchange_that_was_given_up_does_not_look_like_one_that_ended(autojump_clock, ours):
    seen: list[str] = []

    async def listen(stream: Stream) -> None:
        try:
            while await stream.receive_some():
                pass
            seen.append("end")
        except trio.BrokenResourceError:
            seen.append("broken off")

    network = PairNetwork()
    async with served(network, listen, h1_only()), pool(network, ours) as client:
        stream = await client.open(SECURED)
        await stream.send(HEAD, [], Whole())
        await trio.sleep(1)
        stream.release()
        await trio.sleep(1)
        untouched = await client.open(SECURED)
        untouched.release()
        await trio.sleep(1)
        assert seen == ["broken off", "end"]


# ── who shares with whom ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "other",
    [
        {"allowed": frozenset({TARGET_ID, SpiffeId(trust_domain="a.test", path="/other")})},
        {"allowed": None},
        {"server_name": "other.test"},
        {"protocol": "h1"},
    ],
    ids=lambda other: next(iter(other)),
)
@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_upstreams_that_differ_in_anything_share_no_connection(autojump_clock, ours, other, speaks):
    network, agent, h2_agent = PairNetwork(), Agent(), H2Agent()

    async def speak(stream: tls.TlsStream) -> None:
        await (h2_agent.connection if stream.alpn == "h2" else agent._connection)(stream)

    server = credentials(TARGET_SVID) if speaks == "h2" else h1_only()
    async with served(network, speak, server), pool(network, ours) as client:
        another = replace(SECURED, **other)
        for upstream in (SECURED, another, SECURED, another):
            assert await exchange(client, upstream) == b"ok"
        assert len(network.dialled) == 2


async def test_a_stream_tells_whom_its_connection_proved(autojump_clock, ours):
    network = PairNetwork()
    async with served(network, H2Agent().connection, credentials(TARGET_SVID)), pool(network, ours) as client:
        stream = await client.open(SECURED)
        assert isinstance(stream.peer, Workload)
        assert stream.peer.id == TARGET_ID
        stream.release()


async def test_many_share_one_h2_connection_while_it_is_still_being_made(autojump_clock, ours):
    network, agent = PairNetwork(), H2Agent()
    async with (
        served(network, agent.connection, credentials(TARGET_SVID), delay=2),
        pool(network, ours) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(50):
            nursery.start_soon(exchange, client, SECURED)
            await trio.sleep(0.01)
    assert network.dialled == [AT]
    assert len(agent.messages) == 50


async def test_an_upstream_that_allows_few_streams_gets_more_connections(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    agent.settings = {SettingsFrame.MAX_CONCURRENT_STREAMS: 2}
    async with served(network, agent.connection), pool(network) as client:
        streams = []
        for _ in range(5):
            streams.append(await client.open(H2C))
            await converse(streams[-1])
        assert len(network.dialled) == 3
        for stream in streams:
            stream.release()


async def test_an_upstream_that_allows_no_streams_is_not_left_with_one_connection_for_each_request(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    agent.settings = {SettingsFrame.MAX_CONCURRENT_STREAMS: 0}
    async with served(network, agent.connection), pool(network) as client:
        for _ in range(5):
            stream = await client.open(H2C)
            await trio.sleep(1)  # for its settings to arrive
            with pytest.raises(NotSent) as failed:
                await stream.send(HEAD, [], Whole())
            assert failed.value.code == "upstream_streams_exhausted"
            stream.release()
        await trio.sleep(1)
        open_ends = [near for near in network.sockets[::2] if near.fileno() >= 0]
        assert len(open_ends) == 1


async def test_an_h2_connection_that_nobody_uses_says_goodbye_after_its_time_but_not_while_it_is_used(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    async with served(network, agent.connection), pool(network, idle_timeout=60.0) as client:
        stream = await client.open(H2C)
        await converse(stream)
        await trio.sleep(200)
        assert not agent.peers[0].stream.closed
        stream.release()
        await trio.sleep(80)
        assert any(isinstance(frame, GoAwayFrame) for frame in agent.peers[0].frames)
        assert agent.peers[0].stream.closed
        await exchange(client, H2C)
        assert len(network.dialled) == 2


async def test_an_h2_connection_whose_upstream_said_goodbye_is_used_no_more(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    async with served(network, agent.connection), pool(network) as client:
        await exchange(client, H2C)
        under_way = await client.open(H2C)
        await agent.peers[0].send(GoAwayFrame(0, last_stream_id=3))
        await trio.sleep(1)
        await exchange(client, H2C)
        assert len(network.dialled) == 2
        with pytest.raises(NotSent):
            await converse(under_way)
        under_way.release()


# ── auto ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_auto_speaks_h1_to_an_upstream_that_has_no_h2(autojump_clock, ours):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection, h1_only()), pool(network, ours) as client:
        for _ in range(3):
            assert await exchange(client, SECURED) == b"ok"
        assert network.dialled == [AT]
        assert agent.messages[0].startswith(b"GET /x HTTP/1.1\r\nhost: target.test\r\n")


async def test_auto_to_an_upstream_that_has_no_h2_lets_nobody_wait_for_the_handshake_of_another(autojump_clock, ours):
    network, agent = PairNetwork(), Agent()
    release = trio.Event()
    agent.before = release.wait
    async with (
        served(network, agent._connection, h1_only(), delay=1),
        pool(network, ours) as client,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        for _ in range(20):
            nursery.start_soon(exchange, client, SECURED)
        while len(agent.messages) < 20:
            await trio.sleep(0.1)
        assert trio.current_time() - began < 3, "one handshake to find out, and then all at once"
        release.set()
    assert len(network.dialled) == 20


async def test_auto_finds_out_when_an_upstream_has_learnt_h2(autojump_clock, ours):
    network, agent, h2_agent = PairNetwork(), Agent(), H2Agent()
    server = h1_only()

    async def speak(stream: tls.TlsStream) -> None:
        await (h2_agent.connection if stream.alpn == "h2" else agent._connection)(stream)

    async with served(network, speak, server), pool(network, ours, idle_timeout=10.0) as client:
        await exchange(client, SECURED)
        server.server_context.set_alpn_protocols(["h2", "http/1.1"])
        await trio.sleep(60)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(exchange, client, SECURED)
        assert len(network.dialled) == 2
        assert len(h2_agent.messages) == 10


async def test_auto_without_tls_is_h1(autojump_clock):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection), pool(network) as client:
        assert await exchange(client, replace(PLAIN, protocol="auto")) == b"ok"


async def test_an_upstream_that_must_speak_h2_and_does_not_gets_nothing(autojump_clock, ours):
    network, agent = PairNetwork(), Agent()
    server = credentials(TARGET_SVID)
    server.server_context.set_alpn_protocols([])
    async with served(network, agent._connection, server), pool(network, ours) as client:
        fault = await failed(client, replace(SECURED, protocol="h2"))
        assert (type(fault), fault.code) == (NotSent, "upstream_protocol")
        assert agent.received == b""
        await trio.sleep(1)
        assert network.sockets[1].fileno() == -1, "the other side has seen the end"


# ── waiting for a connection that somebody else makes ─────────────────────────────────────────────────────────────


async def test_what_fails_for_one_fails_for_all_who_waited_with_it_and_not_one_after_the_other(autojump_clock, ours):
    network = PairNetwork()
    async with unanswered(network), pool(network, ours, handshake_timeout=5.0) as client:
        faults: list[SidecarError] = []

        async def one() -> None:
            faults.append(await failed(client, SECURED))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert trio.current_time() - began < 6
        assert {fault.code for fault in faults} == {"upstream_handshake_timeout"}
        assert {fault.status for fault in faults} == {504}
        assert len({id(fault) for fault in faults}) == 20
        assert len(network.dialled) == 1
        assert (await failed(client, SECURED)).code == "upstream_handshake_timeout"
        assert len(network.dialled) == 2, "whoever comes later tries again"


async def test_whoever_made_the_connection_may_leave_and_another_makes_it(autojump_clock, ours):
    network, agent = PairNetwork(), H2Agent()
    async with (
        served(network, agent.connection, credentials(TARGET_SVID), delay=2),
        pool(network, ours) as client,
        trio.open_nursery() as nursery,
    ):
        impatient = trio.CancelScope()

        async def leave() -> None:
            with impatient:
                await exchange(client, SECURED)

        nursery.start_soon(leave)
        await trio.sleep(0.1)
        for _ in range(5):
            nursery.start_soon(exchange, client, SECURED)
        await trio.sleep(1)
        impatient.cancel()
    assert len(network.dialled) == 2
    assert len(agent.messages) == 5


async def test_whoever_waits_may_leave(autojump_clock, ours):
    network, agent = PairNetwork(), H2Agent()
    async with (
        served(network, agent.connection, credentials(TARGET_SVID), delay=2),
        pool(network, ours) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(exchange, client, SECURED)
        await trio.sleep(0.1)
        with trio.move_on_after(1) as patience:
            await exchange(client, SECURED)
        assert patience.cancelled_caught
    assert len(agent.messages) == 1


# ── what goes wrong on the way to a connection ────────────────────────────────────────────────────────────────────


async def _silence(_to: object) -> socket.socket:
    await trio.sleep_forever()
    raise AssertionError


def _fails_with(error: OSError) -> Callable[[object], Awaitable[socket.socket]]:
    async def connect(_to: object) -> socket.socket:
        raise error

    return connect


@pytest.mark.parametrize(
    ("connect", "secured", "kind", "code", "status"),
    [
        (_fails_with(ConnectionRefusedError(111, "refused")), True, PlaintextOnly, "upstream_refused", 503),
        (_fails_with(ConnectionRefusedError(111, "refused")), False, NotSent, "upstream_refused", 503),
        (_fails_with(ConnectionResetError(104, "reset")), True, NotSent, "upstream_unreachable", 503),
        (_fails_with(OSError(113, "no route")), True, NotSent, "upstream_unreachable", 503),
        (_fails_with(TimeoutError(110, "the kernel's own")), True, NotSent, "upstream_unreachable", 503),
        (_fails_with(socket.gaierror(-2, "unknown name")), True, NotSent, "upstream_unresolved", 503),
        (_silence, True, NotSent, "upstream_connect_timeout", 504),
        (_silence, False, NotSent, "upstream_connect_timeout", 504),
    ],
)
async def test_a_failed_connect_is_told_as_not_sent(
    autojump_clock, monkeypatch, ours, connect, secured, kind, code, status
):
    network = PairNetwork()
    monkeypatch.setattr(network, "connect", connect)
    async with pool(network, ours, connect_timeout=3.0) as client:
        began = trio.current_time()
        fault = await failed(client, SECURED if secured else PLAIN)
        assert (type(fault), fault.code, fault.status) == (kind, code, status)
        assert trio.current_time() - began < 3.5


def _say(data: bytes, *, reset: bool = False) -> Callable[[Stream], Awaitable[None]]:
    """Say this behind the first bytes that come, then end."""

    async def speak(stream: Stream) -> None:
        if data or not reset:
            await stream.receive_some()
            await stream.send_all(data)
            await stream.close_gently(1)

    return speak


@pytest.mark.parametrize(
    ("speak", "kind", "code"),
    [
        (_say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), PlaintextOnly, "upstream_not_tls"),
        (_say(b"\x15\x03\x03\x00\x02\x02\x28"), tls.HandshakeFailed, "refused_by_peer"),
        (_say(b"\x16\x03\x03\x00\x01\x00"), tls.HandshakeFailed, None),
        (_say(b""), tls.HandshakeFailed, "handshake_aborted"),
        (_say(b"", reset=True), None, None),
    ],
    ids=["not TLS", "alert", "broken record", "end", "reset"],
)
async def test_a_failed_handshake_is_told_for_what_it_was(autojump_clock, ours, speak, kind, code):
    network = PairNetwork()
    async with served(network, speak), pool(network, ours) as client:
        fault = await failed(client, SECURED)
        assert isinstance(fault, PeerRejected | NotSent)
        assert not isinstance(fault, PlaintextOnly) or kind is PlaintextOnly
        if kind is not None:
            assert type(fault) is kind
        if code is not None:
            assert fault.code == code
        await end_of(network.sockets[1]) if network.sockets[1].fileno() >= 0 else None


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # the standard library's own, for the socket that it could not take
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_reset_before_the_handshake_could_begin_is_told_as_not_sent(autojump_clock, monkeypatch, ours, said):
    async def connect(_to: object) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        far.sendall(said)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        near.setblocking(False)
        await trio.lowlevel.wait_readable(near)
        return near

    network = PairNetwork()
    monkeypatch.setattr(network, "connect", connect)
    async with pool(network, ours) as client:
        fault = await failed(client, SECURED)
        assert (type(fault), fault.code) == (NotSent, "upstream_reset")
    gc.collect()


@pytest.mark.parametrize(
    ("svid", "code"),
    [(OUR_CA.svid("/other"), "peer_unexpected"), (CA("a.test").svid("/target"), "authority_unknown")],
    ids=["another ID", "another authority"],
)
async def test_an_upstream_that_is_somebody_else_is_rejected(autojump_clock, ours, svid, code):
    network, agent = PairNetwork(), Agent()
    async with served(network, agent._connection, h1_only(svid)), pool(network, ours) as client:
        fault = await failed(client, SECURED)
        assert isinstance(fault, PeerRejected)
        assert fault.code == code
        assert agent.received == b""


async def test_without_an_identity_of_our_own_nothing_secured_is_opened(autojump_clock, ours):
    network, agent = PairNetwork(), Agent()
    ours.now = None
    async with served(network, agent._connection), pool(network, ours) as client:
        fault = await failed(client, SECURED)
        assert (type(fault), fault.code) == (OurFault, "identity_missing")
        assert network.sockets[0].fileno() == -1
        assert await exchange(client, PLAIN) == b"ok"


@pytest.mark.parametrize("after", [0.5, 1.5])
async def test_giving_up_in_the_middle_leaves_no_socket_open(autojump_clock, ours, after):
    network = PairNetwork()
    real = network.connect

    async def slow(to):
        await trio.sleep(1)
        return await real(to)

    network.connect = slow  # type: ignore[method-assign]
    async with unanswered(network) as listener, pool(network, ours) as client:
        with trio.move_on_after(after):
            await client.open(SECURED)
        if after < 1:
            assert network.sockets == []
        else:
            far, _ = await listener.accept()
            with trio.fail_after(1):
                await end_of(far)
        assert [(pool.connecting, pool.pending) for pool in client._pools.values()] == [(0, None)]


# ── what goes wrong with a request ────────────────────────────────────────────────────────────────────────────────


async def _outcome(client: Client, upstream: Upstream) -> SidecarError | Aborted | bytes:
    try:
        return await exchange(client, upstream)
    except (SidecarError, Aborted) as error:
        return error


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (b"", NoAnswer, "upstream_no_answer"),
        (b"HTTP/1.1 200", MaybeSent, "upstream_broke_off"),
        (b"HTTP/1.1 200 OK\r\nx: y\r\n", MaybeSent, "upstream_broke_off"),
        (b"SSH-2.0-x\r\n\r\n", MaybeSent, "upstream_malformed"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70000 + b"\r\n\r\n", MaybeSent, "upstream_malformed"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", MaybeSent, "upstream_malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", Aborted, "message_aborted"),
    ],
)  # fmt: skip
async def test_an_h1_upstream_that_fails_may_have_acted(autojump_clock, answer, kind, code):
    network, agent = PairNetwork(), Agent(lambda _message: answer)
    agent.hangs_up = True
    async with served(network, agent._connection), pool(network) as client:
        outcome = await _outcome(client, PLAIN)
        assert (type(outcome), outcome.code) == (kind, code)
        assert network.sockets[0].fileno() == -1


def _resets(code: int, *, answered: bool) -> Callable[[Peer, int], Awaitable[None]]:
    async def answer(peer: Peer, stream_id: int) -> None:
        if answered:
            await peer.send(peer.head(stream_id, [(b":status", b"200")]), DataFrame(stream_id, data=b"x"))
            await trio.sleep(1)
        await peer.send(RstStreamFrame(stream_id, error_code=code))

    return answer


async def _leaves(peer: Peer, _stream_id: int) -> None:
    peer.stream.close()


async def _says_goodbye(peer: Peer, _stream_id: int) -> None:
    await peer.send(GoAwayFrame(0, last_stream_id=0))


async def _malformed(peer: Peer, stream_id: int) -> None:
    await peer.send(peer.head(stream_id, [(b":status", b"two hundred")], end=True))


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (_resets(7, answered=False), NotSent, "upstream_refused_stream"),
        (_resets(2, answered=False), MaybeSent, "upstream_reset"),
        (_resets(2, answered=True), Aborted, "message_aborted"),
        (_resets(7, answered=True), Aborted, "message_aborted"),
        (_says_goodbye, NotSent, "upstream_draining"),
        (_leaves, NoAnswer, "upstream_no_answer"),
        (_malformed, MaybeSent, "upstream_malformed"),
    ],
    ids=["refused", "reset", "reset later", "refused too late", "goodbye", "gone", "malformed"],
)
async def test_an_h2_upstream_that_fails_may_have_acted_unless_it_says_otherwise(autojump_clock, answer, kind, code):
    network, agent = PairNetwork(), H2Agent(answer)
    async with served(network, agent.connection), pool(network) as client:
        outcome = await _outcome(client, H2C)
        assert (type(outcome), outcome.code) == (kind, code)
        agent.answer = h2_ok
        assert await exchange(client, H2C) == b"ok"


async def test_an_h2_upstream_that_ends_before_it_was_asked_was_sent_nothing(autojump_clock):
    network = PairNetwork()
    async with unanswered(network) as listener, pool(network) as client:
        stream = await client.open(H2C)
        far, _ = await listener.accept()
        far.close()
        await trio.sleep(1)
        with pytest.raises(NotSent):
            await stream.send(HEAD, [], Whole())
        stream.release()


# ── judged again ──────────────────────────────────────────────────────────────────────────────────────────────────


def _counted(made: tls.Credentials, judged: list[int]) -> tls.Credentials:
    real = made.judge

    def judge(facts, allowed=None):
        judged.append(made.generation)
        return real(facts, allowed)

    made.judge = judge  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_a_connection_is_judged_once_by_each_identity_and_kept_while_it_passes(autojump_clock, ours, speaks):
    network, judged = PairNetwork(), []
    server = credentials(TARGET_SVID) if speaks == "h2" else h1_only()
    speak = H2Agent().connection if speaks == "h2" else Agent()._connection
    async with served(network, speak, server), pool(network, ours) as client:
        for generation in (1, 2, 3):
            ours.now = _counted(credentials(generation=generation), judged)
            for _ in range(3):
                assert await exchange(client, SECURED) == b"ok"
        assert judged == [1, 2, 3]
        assert len(network.dialled) == 1
        ours.now = credentials(trusted=CA("a.test"), generation=4)
        assert isinstance(await _outcome(client, SECURED), PeerRejected)
        assert len(network.dialled) == 2


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_a_connection_made_while_trust_changed_is_judged_by_the_new_trust(autojump_clock, ours, speaks):
    network = PairNetwork()
    server = credentials(TARGET_SVID) if speaks == "h2" else h1_only()
    speak = H2Agent().connection if speaks == "h2" else Agent()._connection
    async with served(network, speak, server, delay=2), pool(network, ours) as client, trio.open_nursery() as nursery:
        nursery.start_soon(exchange, client, SECURED)
        await trio.sleep(1)
        ours.now = credentials(trusted=CA("a.test"), generation=2)
        await trio.sleep(5)
        assert isinstance(await _outcome(client, SECURED), PeerRejected), "it was proven to the old trust only"


@pytest.mark.parametrize("loss", ["expired", "no identity"])
async def test_a_connection_is_not_used_when_its_peer_or_we_have_expired(autojump_clock, ours, monkeypatch, loss):
    network, agent = PairNetwork(), H2Agent()
    async with served(network, agent.connection, credentials(TARGET_SVID)), pool(network, ours) as client:
        await exchange(client, SECURED)
        real = time.time
        if loss == "expired":
            monkeypatch.setattr(time, "time", lambda: real() + 7200)
        else:
            ours.now = None
        await _outcome(client, SECURED)
        assert len(network.dialled) == 2
        await trio.sleep(1)
        assert agent.peers[0].stream.closed


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_end_of_the_pool_closes_what_it_keeps_and_what_comes_back(autojump_clock, ours):
    network, agent, h2_agent, ended = PairNetwork(), Agent(), H2Agent(), []

    async def speak(stream: tls.TlsStream) -> None:
        await (h2_agent.connection if stream.alpn == "h2" else agent._connection)(stream)
        ended.append(stream.alpn)

    async with served(network, speak, credentials(TARGET_SVID)):
        async with pool(network, ours) as client:
            h1 = replace(SECURED, protocol="h1")
            under_way = await client.open(h1)
            await exchange(client, h1)
            await exchange(client, SECURED)
            await converse(under_way)
        await trio.sleep(1)
        assert sorted(ended) == ["h2", "http/1.1"]
        under_way.release()
        await trio.sleep(1)
        assert sorted(ended) == ["h2", "http/1.1", "http/1.1"]


async def test_what_must_be_shared_is_not_opened_before_the_pool_runs(autojump_clock):
    network, agent = PairNetwork(), H2Agent()
    async with served(network, agent.connection):
        fault = await failed(Client(network, lambda: None, ClientSettings()), H2C)
        assert (type(fault), fault.code) == (OurFault, "draining")
        await trio.sleep(1)
        assert agent.peers[0].stream.closed
