"""A pool of upstream connections over socket pairs, and what stands at their other end."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from examples.demo.kit import CA
from sidecar.errors import PeerRejected, SidecarError
from sidecar.identity import verify
from sidecar.model import Address, Body, Identity, RequestHead, SpiffeId, Target
from sidecar.wire import tls
from sidecar.wire.answers import Whole
from sidecar.wire.client import Client, ClientSettings, Upstream, UpstreamStream
from sidecar.wire.network import Network, Stream
from support.flow import PairListener, PairNetwork

AT = Address(host="target.test", port=8443)
TARGET_ID = SpiffeId(trust_domain="a.test", path="/target")
PLAIN = Upstream(address=AT, tls=False)
H2C = replace(PLAIN, protocol="h2")
SECURED = Upstream(address=AT, tls=True, allowed=frozenset({TARGET_ID}), server_name="target.test", protocol="auto")
HEAD = RequestHead(
    method="GET", target=Target(path="/x", query=None, segments=("x",)), host="target.test", port=None, fields=(),
    protocol="HTTP/1.1",
)  # fmt: skip
OUR_CA = CA("a.test")
OUR_SVID = OUR_CA.svid("/me")
TARGET_SVID = OUR_CA.svid("/target")


def credentials(svid=OUR_SVID, *, trusted: CA = OUR_CA, generation: int = 1) -> tls.Credentials:
    identity = Identity(
        id=SpiffeId(trust_domain="a.test", path="/x"), chain=svid.chain_pem, key=svid.key_pem,
        trust={"a.test": frozenset({trusted.der})}, not_after=math.inf, generation=generation,
    )  # fmt: skip
    return tls.Credentials(identity, verify.judge)


def h1_only(svid=TARGET_SVID) -> tls.Credentials:
    made = credentials(svid)
    made.server_context.set_alpn_protocols(["http/1.1"])
    return made


class Ours:
    """The identity in force; tests replace it."""

    def __init__(self) -> None:
        self.now: tls.Credentials | None = credentials()


@asynccontextmanager
async def pool(
    network: Network, ours: Ours | None = None, log: Callable[..., None] | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """A client that runs. Where addresses begin and when connections age is the same in each test."""
    client = Client(
        network, lambda: ours.now if ours is not None else None, ClientSettings(**settings),
        chance=random.Random(0), log=log if log is not None else lambda *_, **__: None,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def served(
    network: PairNetwork, speak: Callable[[Stream], Awaitable[None]], secured: tls.Credentials | None = None,
    *, delay: float = 0, at: Address = AT,
) -> AsyncIterator[None]:  # fmt: skip
    """Let each connection be spoken to by `speak`, after mTLS with `secured` that begins after `delay`."""
    listener = await network.listen(at)

    async def one(sock: socket.socket) -> None:
        await trio.sleep(delay)
        try:
            stream = Stream(sock) if secured is None else await tls.accept(sock, secured.server_context, secured.judge)
        except (PeerRejected, OSError):
            return
        try:
            await speak(stream)
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            while True:
                nursery.start_soon(one, (await listener.accept())[0])

        nursery.start_soon(accept)
        yield
        nursery.cancel_scope.cancel()
    listener.close()
    for sock in network.sockets:
        sock.close()


@asynccontextmanager
async def unanswered(network: PairNetwork) -> AsyncIterator[PairListener]:
    """A port behind which nobody says anything."""
    yield await network.listen(AT)
    for sock in network.sockets:
        sock.close()


async def exchange(
    client: Client, upstream: Upstream, body: Body | None = None, method: str = "GET", *, fresh: bool = False
) -> bytes:
    """The body of the answer to one request."""
    stream = await client.open(upstream, fresh)
    try:
        return await converse(stream, body, method)
    finally:
        stream.release()


async def converse(stream: UpstreamStream, body: Body | None = None, method: str = "GET") -> bytes:
    await stream.send(replace(HEAD, method=method), [], body or Whole())
    head = await stream.receive()
    assert head.status == 200
    data = b""
    while isinstance(item := await stream.body.receive(), bytes):
        data += item
    return data


async def end_of(sock: socket.socket) -> None:
    """Read until the other side has closed. Hangs where it has not."""
    while True:
        try:
            if not sock.recv(65536):
                return
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except OSError:
            return


async def failed(client: Client, upstream: Upstream) -> SidecarError:
    with pytest.raises(SidecarError) as raised:
        stream = await client.open(upstream)
        stream.release()
    return raised.value
