"""Frames between two processes: whole, in order, and never a wait for whoever sends."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.channel import Channel


def pair(**settings: int) -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one, **settings), Channel(other)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.binary(max_size=300)), max_size=20), st.integers(1, 50))
def test_frames_arrive_whole_and_in_order_however_they_are_cut(frames, size):
    async def main() -> None:
        near, far = socket.socketpair()
        sender, receiver = Channel(near), Channel(far)
        raw = socket.socketpair()
        cut = Channel(raw[1])
        for kind, payload in frames:
            sender.send(kind, payload)
        written = b"".join(struct.pack("!cI", kind, len(payload)) + payload for kind, payload in frames)
        assert [await receiver.receive() for _ in frames] == frames
        async with trio.open_nursery() as nursery:

            async def in_pieces() -> None:
                for start in range(0, len(written), size):
                    raw[0].send(written[start : start + size])
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(in_pieces)
            assert [await cut.receive() for _ in frames] == frames
        for one in (sender, receiver, cut):
            one.close()
        raw[0].close()

    trio.run(main)


async def test_sending_never_waits_and_an_order_is_never_lost():
    sender, receiver = pair()
    payload = b"x" * 100_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        for _ in range(50):
            sender.send(b"o", payload)
        for _ in range(50):
            assert await receiver.receive() == (b"o", payload)
        nursery.cancel_scope.cancel()
    sender.close()
    receiver.close()


async def test_what_may_be_lost_is_not_taken_where_too_much_waits():
    sender, receiver = pair(max_pending_bytes=1000)
    taken = [sender.offer(b"a", b"y" * 900) for _ in range(1000)]
    assert taken[0]
    assert not taken[-1]
    sender.send(b"o", b"an order")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        got = [await receiver.receive() for _ in range(sum(taken) + 1)]
        nursery.cancel_scope.cancel()
    assert got[-1] == (b"o", b"an order")
    assert sender.offer(b"a", b"y" * 900), "there is room again"
    sender.close()
    receiver.close()


async def test_the_end_is_an_end_and_sending_into_it_is_no_error():
    sender, receiver = pair()
    sender.send(b"o", b"last")
    sender.close()
    assert await receiver.receive() == (b"o", b"last")
    with pytest.raises(EOFError):
        await receiver.receive()
    receiver.send(b"w", b"too late")
    assert not receiver.offer(b"a", b"too late")
    receiver.close()


async def test_a_length_that_nobody_means_is_refused():
    near, far = socket.socketpair()
    receiver = Channel(far)
    near.send(struct.pack("!cI", b"o", 1 << 31))
    with pytest.raises(ValueError, match="frame"):
        await receiver.receive()
    near.close()
    receiver.close()


async def test_last_words_are_said_before_the_end():
    sender, receiver = pair()
    for _ in range(20):
        sender.send(b"w", b"z" * 50_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, sender.finish, 5.0)
        for _ in range(20):
            assert await receiver.receive() == (b"w", b"z" * 50_000)
    sender.close()
    with pytest.raises(EOFError):
        await receiver.receive()
    receiver.close()
