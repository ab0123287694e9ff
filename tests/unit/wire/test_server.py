"""A server by itself: when it is empty. What it does with connections is tested with the whole app (`tests/flow`)."""

from __future__ import annotations

import socket

import pytest
import trio

from sidecar.errors import PeerRejected
from sidecar.model import Address, Anonymous, Connection, ConnectionEnded, HandshakeFacts, SpiffeId, Workload
from sidecar.wire import tls
from sidecar.wire.h1_server import Limits
from sidecar.wire.server import Server, Settings, _Freshness
from sidecar.wire.settling import Refused, settle
from sidecar.wire.turns import Turn, Turns

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


class Callers:
    """A listener that hands out a connection from each of these hosts, on which the client has ended, and no more."""

    address = HERE

    def __init__(self, *hosts: str) -> None:
        self._hosts = list(hosts)

    async def accept(self) -> tuple[socket.socket, Address]:
        await trio.lowlevel.checkpoint()
        if not self._hosts:
            raise trio.ClosedResourceError
        near, far = socket.socketpair()
        near.setblocking(False)
        far.close()
        return near, Address(host=self._hosts.pop(0), port=1)

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


async def test_steps_of_handshakes_are_taken_in_the_name_of_the_host_that_they_come_from(autojump_clock):
    settings = Settings(mode="strict", limits=Limits(), handshake_timeout=5.0, max_connections=9)
    server = Server(
        direction="inbound", plaintext_peer=Anonymous(reason="plaintext"), handle=None, settings=settings,  # type: ignore[arg-type]
        ended=lambda _: None, credentials=lambda: None,
    )  # fmt: skip
    hosts: list[str] = []
    turn_of = server._turns.of

    def of(host: str) -> Turn:
        hosts.append(host)
        return turn_of(host)

    server._turns.of = of  # type: ignore[method-assign]
    await server.serve(Callers("10.0.0.1", "10.0.0.2", "10.0.0.1"), lambda _error: False)
    assert sorted(hosts) == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]


def test_whoever_has_proven_itself_is_fresh_until_its_certificate_ends_or_ours_does(monkeypatch):
    near, far = socket.socketpair()
    with near, far:
        stream = tls.TlsStream.__new__(tls.TlsStream)
        stream.facts = HandshakeFacts(side="server", leaf=b"leaf", anchor=b"anchor", resumed=False)
        peer = Workload(id=SpiffeId(trust_domain="a.test", path="/x"), not_after=1000.0)
        connection = Connection(
            id="1", peer=peer, remote=HERE, local=HERE, tls=True, server_name=None, protocol="h1", generation=1
        )
        in_use: list[Trusting | None] = [Trusting(1)]
        fresh = _Freshness(stream, connection, lambda: in_use[0])  # type: ignore[arg-type, return-value]
        now = [999.0]
        monkeypatch.setattr("time.time", lambda: now[0])
        assert fresh()
        now[0] = 1000.0
        assert not fresh(), "its certificate has ended"
        now[0] = 999.0
        in_use[0] = None
        assert not fresh(), "we have no identity that is valid"
        in_use[0] = Trusting(2)
        assert fresh()
        assert fresh()
        assert in_use[0].asked == 1, "once for each identity of ours"
        in_use[0] = Trusting(3, refuse=True)
        assert not fresh()
        assert not fresh(), "a refusal is not forgotten"


class Trusting:
    """Credentials, as far as judging again is concerned."""

    def __init__(self, generation: int, *, refuse: bool = False) -> None:
        self.generation = generation
        self.asked = 0
        self._refuse = refuse

    def judge(self, _facts: HandshakeFacts) -> None:
        self.asked += 1
        if self._refuse:
            raise PeerRejected("gone")


@pytest.mark.parametrize("mode", ["strict", "permissive"])
async def test_without_an_identity_of_ours_a_hello_is_refused_and_never_taken_for_plaintext(autojump_clock, mode):
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        far.send(tls.HANDSHAKE_RECORD)
        with pytest.raises(Refused) as refused:
            await settle(
                near, connection_id="1", remote=HERE, local=HERE, mode=mode, plaintext_peer=Anonymous(reason="plaintext"),
                credentials=lambda: None, linger_timeout=1.0, turn=Turns().of("x"),
            )  # fmt: skip
        assert (refused.value.outcome, refused.value.reason) == ("handshake_failed", "identity_missing")
