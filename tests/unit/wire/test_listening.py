"""Listeners: what is accepted is never lost to a close, and neither a bad connection nor a lack of descriptors ends accepting."""

from __future__ import annotations

import errno
import os
import resource
import socket

import pytest
import trio
import trio.testing

from sidecar.model import Address
from sidecar.wire import listening
from sidecar.wire.listening import TcpListener, accept_forever, bound
from sidecar.wire.network import TcpNetwork

HERE = Address(host="127.0.0.1", port=0)


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
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await network.connect(listener.address)


@pytest.mark.parametrize("end", ["close", "finish"])
async def test_a_closed_listener_ends_its_accept(end):
    listener = await bound(HERE)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        getattr(listener, end)()
    assert listener.fileno() == -1
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_a_listener_that_finishes_hands_out_what_waits_and_no_more():
    listener = await bound(HERE)
    waiting = [socket.create_connection(("127.0.0.1", listener.address.port)) for _ in range(3)]
    listener.finish()
    got = []
    with pytest.raises(trio.ClosedResourceError):
        while True:
            sock, remote = await listener.accept()
            got.append(remote.port)
            sock.close()
    assert got == [sock.getsockname()[1] for sock in waiting]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.address.port))
    for sock in waiting:
        sock.close()


async def test_a_close_leaves_the_queue_to_whoever_else_holds_the_socket():
    listener = await bound(HERE)
    other = TcpListener(socket.socket(fileno=os.dup(listener.fileno())))
    client = socket.create_connection(("127.0.0.1", listener.address.port))
    listener.close()
    sock, remote = await other.accept()
    assert remote.port == client.getsockname()[1]
    for one in (sock, client, other):
        one.close()


async def test_a_cancelled_accept_takes_nobody_out_of_the_queue():
    listener = await bound(HERE)
    client = socket.create_connection(("127.0.0.1", listener.address.port))
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.accept()
    assert scope.cancelled_caught
    sock, _ = await listener.accept()
    for one in (sock, client, listener):
        one.close()


async def test_a_port_that_is_taken_is_refused():
    listener = await bound(HERE)
    with pytest.raises(OSError, match="in use"):
        await bound(listener.address)
    listener.close()


# ── accepting for as long as it goes ──────────────────────────────────────────────────────────────────────────────


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


async def test_one_bad_connection_or_a_lack_of_descriptors_does_not_end_accepting(autojump_clock):
    listener = Scripted(
        [None, OSError(errno.ECONNABORTED, "gone"), None, OSError(errno.EMFILE, "too many"), OSError(errno.ENFILE, "x"), None]
    )  # fmt: skip
    accepted: list[Address] = []
    told: list[int | None] = []

    def failed(error: OSError) -> bool:
        told.append(error.errno)
        return error.errno == errno.ENFILE

    began = trio.current_time()
    await accept_forever(listener, lambda _sock, remote: accepted.append(remote), failed)
    assert len(accepted) == 3
    assert told == [errno.ECONNABORTED, errno.EMFILE, errno.ENFILE]
    assert trio.current_time() - began == pytest.approx(0.11), "descriptors need time to come back; the rest does not"
    for sock in listener.made:
        sock.close()


async def test_what_fails_again_and_again_does_not_spin(autojump_clock):
    listener = Scripted([OSError(errno.EPERM, "a filter says no")] * 40)
    began = trio.current_time()
    await accept_forever(listener, lambda *_: None, lambda _: False)
    assert trio.current_time() - began == pytest.approx(2.5), "from the 16th on each waits"


async def test_above_the_highest_descriptor_one_more_is_accepted_and_the_rest_waits_for_room(autojump_clock):
    listener = Scripted([None, None, None])
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    told: list[float] = []
    accepted: list[socket.socket] = []

    def failed(error: OSError) -> bool:
        assert error.errno == errno.EMFILE
        told.append(trio.current_time())
        if len(told) == 5:
            for sock in listener.made[:2]:
                sock.close()
        return False

    await accept_forever(listener, lambda sock, _remote: accepted.append(sock), failed, max_descriptor=free + 1)
    assert len(accepted) == 3
    assert len(told) == 5
    assert len(listener.made) == 6
    for sock in listener.made:
        sock.close()


def test_descriptors_are_taken_as_far_as_they_may_be_and_some_are_kept_free(monkeypatch):
    limits = [100, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: tuple(limits))

    def refuse(_which: int, wanted: tuple[int, int]) -> None:
        if wanted != (4096, 4096):
            raise ValueError
        limits[:] = wanted

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert listening.max_descriptor() == 75
    listening.raise_descriptor_limit()
    assert listening.max_descriptor() == 4096 - 64
    limits[:] = [5, 5]
    listening.raise_descriptor_limit()
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert listening.max_descriptor() > 1 << 20
