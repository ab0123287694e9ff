"""Streams over bare sockets, and listeners: what a peer's end, break or silence looks like, and that nobody is kept waiting."""

from __future__ import annotations

import errno
import socket
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing

from sidecar.model import Address
from sidecar.wire.network import Stream, TcpNetwork, accept_forever, drop_input, peek, peek_now

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


# ── listeners ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """A listener whose `accept` does what a list says, and is closed at its end."""

    address = HERE

    def __init__(self, script: list[OSError | None]) -> None:
        self.script = script
        self.made: list[socket.socket] = []

    async def accept(self) -> tuple[socket.socket, Address]:
        await trio.lowlevel.checkpoint()
        if not self.script:
            raise trio.ClosedResourceError
        step = self.script.pop(0)
        if step is not None:
            raise step
        near, far = socket.socketpair()
        self.made += [near, far]
        return near, HERE

    def close(self) -> None: ...


async def test_one_bad_connection_or_a_lack_of_descriptors_does_not_end_accepting(autojump_clock):
    listener = Scripted(
        [None, OSError(errno.ECONNABORTED, "gone"), None, OSError(errno.EMFILE, "too many"), OSError(errno.ENFILE, "x"), None]
    )  # fmt: skip
    accepted: list[Address] = []
    told: list[int | None] = []

    async def failed(error: OSError) -> None:
        told.append(error.errno)

    began = trio.current_time()
    await accept_forever(listener, lambda _sock, remote: accepted.append(remote), failed)
    assert len(accepted) == 3
    assert told == [errno.ECONNABORTED, errno.EMFILE, errno.ENFILE]
    assert trio.current_time() - began == pytest.approx(0.2), "descriptors need time to come back; the rest does not"
    for sock in listener.made:
        sock.close()


async def test_a_real_listener_hands_out_sockets_that_do_not_block_or_delay():
    network = TcpNetwork()
    listener = await network.listen(HERE)
    assert listener.address.port != 0
    near = await network.connect(listener.address)
    far, remote = await listener.accept()
    assert remote == Address(host="127.0.0.1", port=near.getsockname()[1])
    for sock in (near, far):
        assert sock.getblocking() is False
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.close()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await network.connect(listener.address)


async def test_a_closed_listener_ends_its_accept():
    listener = await TcpNetwork().listen(HERE)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()


async def test_a_port_that_is_taken_is_refused():
    network = TcpNetwork()
    listener = await network.listen(HERE)
    with pytest.raises(OSError, match="in use"):
        await network.listen(listener.address)
    listener.close()


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


def _resolves_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    async def getaddrinfo(_host: object, _port: object, **_kind: object) -> list[tuple]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)


async def test_a_name_with_several_addresses_is_tried_in_turn(monkeypatch):
    network = TcpNetwork()
    listener = await network.listen(HERE)
    closed = await network.listen(HERE)
    closed.close()
    _resolves_to(monkeypatch, closed.address.port, listener.address.port)
    near = await network.connect(Address(host="several.test", port=1))
    far, _ = await listener.accept()
    near.close()
    far.close()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await network.connect(Address(host="several.test", port=1))


async def test_a_name_counts_as_refused_only_where_every_address_refuses(monkeypatch):
    """A closed port is what permissive mode may step down from; one address that is merely unreachable is not."""
    from sidecar.wire import network as module

    _resolves_to(monkeypatch, 1, 2, 3)
    outcomes = {
        1: ConnectionRefusedError(111, "x"),
        2: OSError(errno.EHOSTUNREACH, "unreachable"),
        3: ConnectionRefusedError(111, "x"),
    }

    async def connected(_family: int, name: tuple[str, int]) -> socket.socket:
        raise outcomes[name[1]]

    monkeypatch.setattr(module, "_connected", connected)
    with pytest.raises(OSError, match="unreachable"):
        await TcpNetwork().connect(Address(host="several.test", port=1))
    _resolves_to(monkeypatch)
    with pytest.raises(OSError, match="no address"):
        await TcpNetwork().connect(Address(host="several.test", port=1))
