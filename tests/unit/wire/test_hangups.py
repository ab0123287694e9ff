"""Clients that have gone: which are noticed, how soon, and that nobody else is taken for one of them. Over real TCP."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
import trio.lowlevel

from sidecar.wire.hangups import Hangups


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.fixture
async def hangups(nursery) -> Hangups:
    made = Hangups()
    await nursery.start(made.run)
    return made


async def test_a_reset_is_noticed_at_once_and_once_though_its_input_was_not_read(hangups):
    gone: list[float] = []
    with tcp_pair() as (ours, theirs), hangups.watching(ours.fileno(), lambda: gone.append(trio.current_time())):
        theirs.sendall(b"next request")
        await trio.sleep(0.05)
        assert gone == []
        reset(theirs)
        with trio.fail_after(5):
            while not gone:
                await trio.sleep(0.001)
        await trio.sleep(0.05)
        assert len(gone) == 1


async def test_a_client_that_has_ended_its_side_has_not_gone(hangups):
    gone: list[bool] = []
    with tcp_pair() as (ours, theirs), hangups.watching(ours.fileno(), lambda: gone.append(True)):
        theirs.sendall(b"last request")
        theirs.shutdown(socket.SHUT_WR)
        await trio.sleep(0.05)
        assert gone == []
        ours.sendall(b"answer")
        assert theirs.recv(100) == b"answer"
        theirs.close()
        await trio.sleep(0.05)
        assert gone == []
        ours.sendall(b"more")  # to somebody who has closed altogether: a reset comes back
        with trio.fail_after(5):
            while not gone:
                await trio.sleep(0.001)


async def test_a_reset_that_came_first_is_noticed(hangups):
    gone: list[bool] = []
    with tcp_pair() as (ours, theirs):
        reset(theirs)
        await trio.sleep(0.01)
        with hangups.watching(ours.fileno(), lambda: gone.append(True)):
            with trio.fail_after(5):
                while not gone:
                    await trio.sleep(0.001)


async def test_whoever_is_no_longer_watched_takes_nothing_from_who_has_its_number_now(hangups):
    gone: list[str] = []
    with tcp_pair() as (ours, _), tcp_pair() as (others, theirs), ExitStack() as first:
        number = ours.fileno()
        first.enter_context(hangups.watching(number, lambda: gone.append("first")))
        os.dup2(others.fileno(), number, inheritable=False)  # closes what was there
        others.close()
        with hangups.watching(number, lambda: gone.append("second")):
            first.close()
            reset(theirs)
            with trio.fail_after(5):
                while not gone:
                    await trio.sleep(0.001)
    assert gone == ["second"]


async def test_a_descriptor_that_cannot_be_watched_is_left_to_itself(hangups):
    with hangups.watching(10_000_000, lambda: pytest.fail("nobody is there")):
        await trio.lowlevel.checkpoint()


async def test_nobody_is_watched_while_nobody_looks():
    hangups = Hangups()
    with tcp_pair() as (ours, theirs), hangups.watching(ours.fileno(), lambda: pytest.fail("nobody looks")):
        reset(theirs)
        await trio.sleep(0.01)
