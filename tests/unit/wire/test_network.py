"""Streams over bare sockets: what a peer's end, break or silence looks like, and that nobody is kept waiting."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from sidecar.model import Address
from sidecar.wire.network import Stream, TcpNetwork, drop_input, keep_alive, peek, peek_now

HERE = Address(host="127.0.0.1", port=0)


def pair(buffer_bytes: int | None = None) -> tuple[Stream, socket.socket]:
    ours, theirs = socket.socketpair()
    if buffer_bytes is not None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    ours.setblocking(False)
    theirs.setblocking(False)
    return Stream(ours), theirs


async def tcp_pair() -> tuple[Stream, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    return Stream(near), far


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_bytes_pass_and_an_end_is_an_empty_read(autojump_clock):
    stream, peer = pair()
    peer.send(b"hello")
    assert await stream.receive_some(3) == b"hel"
    assert await stream.receive_some() == b"lo"
    peer.shutdown(socket.SHUT_WR)
    assert await stream.receive_some() == b""
    await stream.send_all(b"still")
    assert peer.recv(10) == b"still"
    stream.close()
    peer.close()


async def test_more_than_the_kernel_takes_at_once_arrives_whole_and_in_order(autojump_clock):
    stream, peer = pair(4096)
    sent = bytes(range(256)) * 4000
    got = bytearray()

    async def read() -> None:
        while len(got) < len(sent):
            await trio.lowlevel.wait_readable(peer)
            got.extend(peer.recv(5000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await stream.send_all(sent)
    assert got == sent
    stream.close()
    peer.close()


async def test_our_end_leaves_the_other_direction_open(autojump_clock):
    stream, peer = pair()
    await stream.send_eof()
    assert peer.recv(1) == b""
    peer.send(b"answer")
    assert await stream.receive_some() == b"answer"
    await stream.aclose()
    await stream.send_eof()
    peer.close()


async def test_a_peer_that_is_gone_breaks_a_send(autojump_clock):
    stream, peer = pair()
    peer.close()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    stream.close()


async def test_an_abort_is_a_reset_and_a_close_is_an_end():
    for end, seen in ((Stream.close, b""), (Stream.abort, None)):
        stream, peer = await tcp_pair()
        end(stream)
        if seen is None:
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
        else:
            assert peer.recv(1) == seen
        peer.close()


async def test_how_a_peer_has_left_is_known_without_reading():
    stream, peer = await tcp_pair()
    assert stream.left() is None
    peer.send(b"unread")
    peer.shutdown(socket.SHUT_WR)
    with trio.fail_after(5):
        while stream.left() != "ended":
            await trio.sleep(0.01)
        assert not stream.unsent()
        await stream.send_all(b"x" * 1000)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        while stream.left() != "reset":
            await trio.sleep(0.01)
    stream.close()
    assert stream.left() is None


async def test_what_the_peer_has_not_taken_is_known():
    stream, peer = await tcp_pair()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with trio.move_on_after(0.2):
        await stream.send_all(b"x" * (8 << 20))
    assert stream.unsent()
    stream.close()
    peer.close()


async def test_a_reset_by_the_peer_breaks_a_read():
    stream, peer = await tcp_pair()
    Stream(peer).abort()
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    stream.close()


@pytest.mark.parametrize("call", ["receive_some", "send_all"])
async def test_closing_wakes_who_waits(autojump_clock, call):
    stream, peer = pair(4096)

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await (stream.receive_some() if call == "receive_some" else stream.send_all(b"x" * 1_000_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        stream.close()
        stream.close()
    assert stream.closed
    for again in (stream.receive_some(), stream.send_all(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await again
    peer.close()


async def test_two_tasks_may_wait_for_the_same_direction(autojump_clock):
    """TLS makes a writer wait to read: trio alone would refuse the second one."""
    stream, peer = pair()
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive_some(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(read)
        await trio.sleep(1)
        peer.send(b"a")
        await trio.sleep(1)
        assert got == [b"a"]
        peer.send(b"b")
    assert got == [b"a", b"b"]
    stream.close()
    peer.close()


async def test_a_waiter_that_is_cancelled_takes_no_other_with_it(autojump_clock):
    stream, peer = pair()
    got: list[bytes] = []

    async def read(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await stream.receive_some(1))

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, first)
        await trio.sleep(1)
        nursery.start_soon(read, second)
        await trio.sleep(1)
        first.cancel()
        await trio.sleep(1)
        peer.send(b"a")
    assert got == [b"a"]
    stream.close()
    peer.close()


async def test_a_peer_that_is_always_ready_lets_others_have_their_turn(autojump_clock):
    stream, peer = pair()
    turns = 0
    peer.send(b"x" * 100)

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            await stream.receive_some(1)
        assert turns >= 100 // 16
        turns = 0
        for _ in range(100):
            await stream.send_all(b"x")
        assert turns >= 100 // 16
        nursery.cancel_scope.cancel()
    stream.close()
    peer.close()


async def test_a_cancelled_task_reads_and_sends_nothing(autojump_clock):
    stream, peer = pair()
    peer.send(b"x")
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive_some()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.send_all(b"y")
    assert scope.cancelled_caught
    assert await stream.receive_some() == b"x", "what was there is still there"
    with pytest.raises(BlockingIOError):
        peer.recv(1)
    stream.close()
    peer.close()


async def test_what_is_stale_is_seen_without_waiting(autojump_clock):
    stream, peer = pair()
    assert not stream.readable_now()
    peer.send(b"x")
    assert stream.readable_now()
    assert await stream.receive_some() == b"x"
    assert not stream.readable_now()
    peer.close()
    assert stream.readable_now()
    stream.close()
    assert stream.readable_now()


async def test_a_gentle_close_waits_for_the_peer_to_end_but_not_for_ever(autojump_clock):
    for answers in (True, False):
        stream, peer = pair()
        peer.send(b"unread")
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.close_gently, 5.0)
            await trio.sleep(1)
            assert peer.recv(1) == b""
            assert not stream.closed
            if answers:
                peer.close()
        assert stream.closed
        assert trio.current_time() - began == pytest.approx(1 if answers else 5)
        peer.close()


async def test_a_peeked_byte_is_read_again(autojump_clock):
    stream, peer = pair()
    ours = stream._sock
    assert peek_now(ours) == b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 1)
        peer.send(b"ab")
        assert await peek(ours) == b"a"
    assert peek_now(ours) == b"a"
    assert await stream.receive_some() == b"ab"
    peer.close()
    assert await peek(ours) == b""
    await drop_input(ours)
    stream.close()


# ── connecting ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_unix_socket_is_connected_to_by_its_path():
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "s"
        server.bind(str(path))
        server.listen()
        near = await TcpNetwork().connect(path)
        far, _ = server.accept()
        far.send(b"x")
        assert await Stream(near).receive_some() == b"x"
        far.close()
        near.close()
        with pytest.raises(FileNotFoundError):
            await TcpNetwork().connect(path.with_name("absent"))


async def test_a_name_leads_to_its_addresses_in_the_resolvers_order_and_each_of_them_once(monkeypatch):
    def getaddrinfo(host: str, port: int, **_kind: object) -> list[tuple]:
        assert (host, port) == ("several.test", 443)
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", port, 0, 0)),
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", port, 0, 2)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = await TcpNetwork().resolve(Address(host="several.test", port=443))
    assert [address.host for address in found] == ["2001:db8::1", "fe80::1%2", "10.0.0.1"]


@pytest.mark.parametrize("host", ["a" * 64 + ".test", "a..test", "nobody.invalid."])
async def test_a_name_that_leads_nowhere_is_told_as_the_resolver_tells_it(monkeypatch, host):
    def getaddrinfo(*asked: object, **_kind: object) -> list[tuple]:
        host.encode("idna")  # as the real one does
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror) as raised:
        await TcpNetwork().resolve(Address(host=host, port=443))
    assert raised.value.errno == socket.EAI_NONAME


async def test_a_name_whose_servers_are_dead_leaves_threads_to_others(monkeypatch):
    dead, alive = Address(host="dead.test", port=443), Address(host="alive.test", port=443)
    over, asked = threading.Event(), []

    def getaddrinfo(host: str, port: int, **_kind: object) -> list[tuple]:
        asked.append(host)
        if host == dead.host:
            over.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    network = TcpNetwork()
    try:
        for _ in range(20):
            with trio.move_on_after(0.005):
                await network.resolve(dead)
        with trio.fail_after(5):
            assert await network.resolve(alive) == [Address(host="10.0.0.1", port=443)]
        assert asked == [dead.host, alive.host]
        over.set()
        with trio.fail_after(5):
            assert await network.resolve(dead) == [Address(host="10.0.0.1", port=443)]
    finally:
        over.set()
    assert not network._asking


async def test_whoever_waits_for_another_asker_of_the_name_gets_an_answer_of_its_own(monkeypatch):
    asked = []

    def getaddrinfo(host: str, port: int, **_kind: object) -> list[tuple]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    network = TcpNetwork()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(network.resolve, Address(host="a.test", port=1))
        nursery.cancel_scope.deadline = trio.current_time() + 5
    with trio.CancelScope() as scope:
        scope.cancel()
        await network.resolve(Address(host="b.test", port=1))
    assert asked == ["a.test"] * 3
    assert not network._asking


async def test_where_no_thread_is_left_to_ask_the_name_is_not_found_for_now(monkeypatch):
    def none_left(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
    network = TcpNetwork()
    with pytest.raises(socket.gaierror) as raised:
        await network.resolve(Address(host="a.test", port=1))
    assert raised.value.errno == socket.EAI_AGAIN, (
        "and not that there is no such name, which would forget the last answer"
    )
    assert not network._asking


async def test_a_name_is_never_connected_to():
    """Which of its addresses is taken is for others to choose."""
    with pytest.raises(socket.gaierror):
        await TcpNetwork().connect(Address(host="localhost", port=1))


def _kept_alive(sock: socket.socket) -> tuple[int, ...]:
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in options)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(60.0, (60, 10, 3, 90_000)), (1.0, (1, 1, 3, 4_000)), (0.2, (1, 1, 3, 4_000)), (7200.0, (7200, 1200, 3, 10_800_000))],
)  # fmt: skip
def test_a_quiet_peer_is_asked_three_times_before_it_is_given_up(seconds, expected):
    with socket.socket() as sock:
        keep_alive(sock, seconds)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert _kept_alive(sock) == expected


def test_what_is_no_tcp_is_not_asked():
    for sock in socket.socketpair():
        keep_alive(sock, 60.0)
        sock.close()
