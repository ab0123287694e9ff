"""A thousand hellos at once: those who are there go on being answered in between."""

from __future__ import annotations

import ssl
from unittest import mock

import trio

from sidecar.wire import tls
from sidecar.wire.network import Stream
from support.flow import INBOUND, ask, get, status, world

STORM = 100


def hello(credentials: tls.Credentials) -> bytes:
    """The first flight of a client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = credentials.client_context(("http/1.1",)).wrap_bio(incoming, outgoing)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


async def test_a_request_is_answered_in_the_middle_of_a_storm(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        served, first = await it.client(it.credentials()), hello(it.credentials("/ns/other"))
        assert status(await ask(served, get())) == 200
        crowd = [it._kept(Stream(await it.network.connect(INBOUND))) for _ in range(STORM)]
        await trio.sleep(1)  # all of them are accepted, and have said nothing
        steps = 0
        original = tls._Socket.do_handshake

        def counted(sock: ssl.SSLSocket, block: bool = False) -> None:
            nonlocal steps
            steps += sock.server_side
            original(sock, block)

        with mock.patch.object(tls._Socket, "do_handshake", counted):
            for stream in crowd:
                stream._sock.send(first)
            answer = await ask(served, get())
            taken = steps
            await trio.sleep(1)
        assert status(answer) == 200
        assert taken < STORM / 2, "the request waited for most of the storm"
        assert steps == STORM, "each of them has had its step, and waits for its client"
