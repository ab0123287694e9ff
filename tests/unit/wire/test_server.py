"""A server by itself: when it is empty. What it does with connections is tested with the whole app (`tests/flow`)."""

from __future__ import annotations

import socket

import trio

from sidecar.model import Address, Anonymous, ConnectionEnded
from sidecar.wire.h1_server import Limits
from sidecar.wire.server import Server, Settings

HERE = Address(host="10.0.0.1", port=1)


class Late:
    """A listener that hands out one connection, on which the client has ended, after it was told to finish."""

    address = HERE

    def __init__(self) -> None:
        self._finished = trio.Event()
        self._left = 1

    async def accept(self) -> tuple[socket.socket, Address]:
        await self._finished.wait()
        await trio.sleep(0.1)
        if not self._left:
            raise trio.ClosedResourceError
        self._left -= 1
        near, far = socket.socketpair()
        near.setblocking(False)
        far.close()
        return near, HERE

    def finish(self) -> None:
        self._finished.set()

    def close(self) -> None: ...

    def fileno(self) -> int:
        return -1


async def test_a_server_is_empty_once_the_last_that_was_accepted_has_ended_and_not_before(autojump_clock):
    ended: list[ConnectionEnded] = []
    settings = Settings(mode=None, limits=Limits(), handshake_timeout=5.0, max_connections=2)
    server = Server(
        direction="health", plaintext_peer=Anonymous(reason="plaintext"), handle=None, settings=settings,  # type: ignore[arg-type]
        ended=ended.append, credentials=lambda: None,
    )  # fmt: skip
    listener = Late()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener, lambda _error: False)
        await trio.sleep(1)
        assert server.open_connections == 0
        server.drain()
        listener.finish()
        await server.wait_empty()
        assert len(ended) == 1
        assert server.open_connections == 0
    await server.wait_empty()
