"""Handshakes as the sidecar does them: the accept and reject table on both sides, and what a refused peer gets to see."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding

from examples.demo.kit import CA
from sidecar.errors import NotSent, OperatorFault, PeerRejected, PlaintextOnly
from sidecar.identity import verify
from sidecar.model import Identity, SpiffeId
from sidecar.wire import tls
from sidecar.wire.network import Stream
from support.matrix import ACCEPTED, REFUSED_BY_OPENSSL, REFUSED_BY_US, World


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def credentials(world: World, svid=None) -> tls.Credentials:
    svid = svid or world.ours
    identity = Identity(
        id=SpiffeId(trust_domain="a.test", path="/ours"), chain=svid.chain_pem, key=svid.key_pem, trust=world.trust,
        not_after=2e9, generation=1,
    )  # fmt: skip
    return tls.Credentials(identity, verify.judge)


def pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


async def meet(near: tls.Credentials, far: tls.Credentials, side: str, server_name: str | None = None):
    """Both results of a handshake: streams, or the errors that took their place. `near` is on `side`."""
    results: dict[str, object] = {}
    ours, theirs = pair()
    server, client = (near, far) if side == "server" else (far, near)

    async def one(role: str, sock: socket.socket) -> None:
        try:
            if role == "server":
                results[role] = await tls.accept(sock, server.server_context, server.judge)
            else:
                results[role] = await tls.connect(
                    sock, client.client_context(("h2", "http/1.1")), client.judge, server_name
                )
        except (PeerRejected, NotSent) as error:
            results[role] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "server", ours)
        nursery.start_soon(one, "client", theirs)
    return results["server"], results["client"]


def end(*results: object) -> None:
    for result in results:
        if isinstance(result, Stream):
            result.close()


both_sides = pytest.mark.parametrize("side", ["server", "client"])


@both_sides
@pytest.mark.parametrize("row", ACCEPTED)
async def test_accepted(autojump_clock, world, row, side):
    results = await meet(credentials(world), credentials(world, ACCEPTED[row](world, side)), side)
    ours = results[0 if side == "server" else 1]
    assert isinstance(ours, tls.TlsStream), ours
    assert ours.peer.id.trust_domain in ("a.test", "b.test")
    end(*results)


@both_sides
@pytest.mark.parametrize("row", REFUSED_BY_US)
async def test_refused_by_the_judge_and_closed_without_a_byte(autojump_clock, world, row, side):
    code, make = REFUSED_BY_US[row]
    server, client = await meet(credentials(world), credentials(world, make(world, side)), side)
    ours, theirs = (server, client) if side == "server" else (client, server)
    assert isinstance(ours, PeerRejected)
    assert ours.code == code
    if isinstance(theirs, Stream):
        try:
            assert await theirs.receive_some() == b""
        except trio.BrokenResourceError:
            pass
    end(server, client)


@both_sides
@pytest.mark.parametrize("row", REFUSED_BY_OPENSSL)
async def test_refused_by_openssl(autojump_clock, world, row, side):
    _, make = REFUSED_BY_OPENSSL[row]
    server, client = await meet(credentials(world), credentials(world, make(world, side)), side)
    ours = server if side == "server" else client
    assert isinstance(ours, tls.HandshakeFailed)
    end(server, client)


@pytest.mark.parametrize(
    ("row", "code", "alert"),
    [
        ("expired", "certificate_expired", "EXPIRED"),
        ("unknown authority of our trust domain", "authority_unknown", "UNKNOWN_CA"),
    ],
)
async def test_a_refused_client_reads_the_alert(autojump_clock, world, row, code, alert):
    make = REFUSED_BY_OPENSSL[row][1]
    near, far = pair()
    client = credentials(world, make(world, "server"))
    seen: list[str] = []

    async def dial() -> None:
        stream = await tls.connect(far, client.client_context(("h2",)), client.judge, None)
        await stream.send_all(b"GET / HTTP/1.1\r\n" * 10)
        try:
            await stream.receive_some()
        except trio.BrokenResourceError as error:
            seen.append(str(error))
        stream.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        server = credentials(world)
        with pytest.raises(tls.HandshakeFailed) as refused:
            await tls.accept(near, server.server_context, server.judge)
    assert refused.value.code == code
    assert alert in seen[0]


async def test_a_client_that_goes_on_talking_reads_that_it_was_refused_and_no_reset(world):
    _, make = REFUSED_BY_US["own trust domain, signed by the federated authority"]
    client, server = credentials(world, make(world, "server")), credentials(world)
    async with trio.open_nursery() as nursery:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
        near.setblocking(False)
        far.setblocking(False)

        async def serve() -> None:
            with pytest.raises(PeerRejected):
                await tls.accept(near, server.server_context, server.judge)

        nursery.start_soon(serve)
        stream = await tls.connect(far, client.client_context(("h2",)), client.judge, None)
        with trio.fail_after(5):
            for _ in range(5):
                await stream.send_all(b"GET / HTTP/1.1\r\n" * 10)
                await trio.sleep(0.02)
            assert await stream.receive_some() == b""
        stream.close()


async def test_no_session_can_be_resumed_since_no_ticket_is_sent(autojump_clock, world):
    server, client = await meet(credentials(world), credentials(world), "server")
    await server.send_all(b"x")
    assert await client.receive_some() == b"x"
    assert client._sock.session is None or not client._sock.session.has_ticket
    end(server, client)


async def test_an_anchor_need_not_be_self_signed(autojump_clock, world):
    middle = CA("a.test", parent=world.a)
    trust = {**world.trust, "a.test": frozenset({middle.der})}
    svid = middle.svid("/x")
    identity = Identity(
        id=SpiffeId(trust_domain="a.test", path="/x"), chain=svid.leaf.public_bytes(Encoding.PEM), key=svid.key_pem, trust=trust,
        not_after=2e9, generation=1,
    )  # fmt: skip
    server, client = await meet(*[tls.Credentials(identity, verify.judge)] * 2, "server")
    assert (server.facts.anchor, client.facts.anchor) == (middle.der, middle.der)
    end(server, client)


async def test_the_clients_first_suite_is_taken(autojump_clock, world):
    """Whatever ours would prefer: its context does not insist."""
    assert not credentials(world).server_context.options & ssl.OP_CIPHER_SERVER_PREFERENCE


async def test_without_descriptors_there_are_no_credentials_and_no_crash(world, monkeypatch):
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    good = credentials(world)
    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(OperatorFault) as caught:
        credentials(world)
    assert caught.value.code == "identity_unusable"
    with pytest.raises(OperatorFault):
        good.client_context(("h2",))


async def test_the_protocol_and_the_name_are_those_that_were_agreed(autojump_clock, world):
    server, client = await meet(credentials(world), credentials(world), "server", "Some.Test")
    assert (server.alpn, client.alpn, server.server_name) == ("h2", "h2", "some.test")
    end(server, client)


async def test_an_older_version_of_tls_is_refused(autojump_clock, world):
    near, far = pair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = credentials(world)

    def old() -> str:
        far.setblocking(True)
        try:
            context.wrap_socket(far)
        except ssl.SSLError as error:
            return error.reason
        return "accepted"

    async with trio.open_nursery() as nursery:
        reasons: list[str] = []

        async def run() -> None:
            reasons.append(await trio.to_thread.run_sync(old))

        nursery.start_soon(run)
        with pytest.raises(tls.HandshakeFailed) as refused:
            await tls.accept(near, server.server_context, server.judge)
    far.close()
    assert refused.value.code == "tls_version_refused"
    assert "PROTOCOL_VERSION" in reasons[0]


async def test_no_client_certificate_is_a_failed_handshake(autojump_clock, world):
    near, far = pair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    server = credentials(world)

    def bare() -> bytes:
        far.setblocking(True)
        with context.wrap_socket(far) as sock:
            try:
                return sock.recv(1)
            except ssl.SSLError as error:
                return error.reason.encode()

    async with trio.open_nursery() as nursery:
        seen: list[bytes] = []

        async def run() -> None:
            seen.append(await trio.to_thread.run_sync(bare))

        nursery.start_soon(run)
        with pytest.raises(tls.HandshakeFailed) as refused:
            await tls.accept(near, server.server_context, server.judge)
    assert refused.value.code == "certificate_missing"
    assert b"CERTIFICATE_REQUIRED" in seen[0]


@pytest.mark.parametrize("first", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 smtp ready\r\n", b"\0", b"\xff"])
async def test_an_answer_that_begins_no_record_is_told_apart_from_a_failure(autojump_clock, world, first):
    near, far = pair()
    far.send(first)
    client = credentials(world)
    with pytest.raises(PlaintextOnly):
        await tls.connect(near, client.client_context(("h2",)), client.judge, None)
    far.close()


@pytest.mark.parametrize("first", [b"\x15\x03\x03\0\2\2\x46", b"\x16\x03\x03\0\1\0", b"\x17\x03\x03\0\1\0"])
async def test_a_broken_record_is_a_failed_handshake(autojump_clock, world, first):
    near, far = pair()
    far.send(first)
    far.shutdown(socket.SHUT_WR)
    client = credentials(world)
    with pytest.raises(tls.HandshakeFailed):
        await tls.connect(near, client.client_context(("h2",)), client.judge, None)
    far.close()


async def test_a_handshake_that_is_cancelled_leaves_no_socket_open(autojump_clock, world):
    near, far = pair()
    server = credentials(world)
    with trio.move_on_after(1):
        await tls.accept(near, server.server_context, server.judge)
    far.setblocking(True)
    assert far.recv(1) == b""
    far.close()


async def test_reader_and_writer_go_on_while_large_messages_cross(autojump_clock, world):
    server, client = await meet(credentials(world), credentials(world), "server")
    size = 3_000_000

    async def send(stream: Stream) -> None:
        await stream.send_all(b"x" * size)

    async def receive(stream: Stream) -> None:
        left = size
        while left:
            data = await stream.receive_some()
            assert data
            left -= len(data)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for stream in (server, client):
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)
    end(server, client)


async def test_a_cut_without_close_notify_is_no_end(autojump_clock, world):
    server, client = await meet(credentials(world), credentials(world), "server")
    client.abort()
    with pytest.raises(trio.BrokenResourceError):
        await server.receive_some()
    end(server)
    server, client = await meet(credentials(world), credentials(world), "server")
    client.close()
    assert await server.receive_some() == b""
    end(server)


def test_a_key_that_does_not_match_is_an_operators_fault(world):
    other = world.a.svid("/other")
    identity = Identity(
        id=SpiffeId(trust_domain="a.test", path="/x"), chain=world.ours.chain_pem, key=other.key_pem, trust=world.trust,
        not_after=2e9, generation=1,
    )  # fmt: skip
    with pytest.raises(OperatorFault):
        tls.Credentials(identity, verify.judge)


async def test_a_side_that_has_ended_first_sees_the_end_of_the_other(world):
    near, far = await meet(credentials(world), credentials(world), "server")
    await near.send_eof()
    assert await far.receive_some() == b""
    await far.send_all(b"last words")
    await far.send_eof()
    assert await near.receive_some() == b"last words"
    assert await near.receive_some() == b""
    near.close()
    far.close()


@pytest.mark.parametrize("doing", ["reading", "writing"])
async def test_nothing_is_done_to_the_connection_that_has_the_descriptor_next(world, monkeypatch, doing):
    near, far = await meet(credentials(world), credentials(world), "server")
    await far.send_all(b"x")
    assert await near.receive_some() == b"x"
    descriptor = near.fileno()
    others: list[socket.socket] = []

    async def closed_meanwhile(*_: object) -> None:
        near.close()
        others.extend(socket.socketpair())
        assert descriptor in [other.fileno() for other in others], "the number is in use again"
        for other in others:
            other.setblocking(False)
            other.send(b"of somebody else")

    monkeypatch.setattr(trio.lowlevel, "wait_readable", closed_meanwhile)
    monkeypatch.setattr(trio.lowlevel, "wait_writable", closed_meanwhile)
    with pytest.raises(trio.ClosedResourceError):
        if doing == "reading":
            await near.receive_some()
        else:
            await near.send_all(bytes(1 << 24))
    assert [other.recv(100) for other in others] == [b"of somebody else"] * 2
    monkeypatch.undo()
    for other in others:
        other.close()
    far.close()


async def test_a_stream_that_is_closed_just_as_something_comes_is_a_closed_one(world, monkeypatch):
    near, far = await meet(credentials(world), credentials(world), "server")

    async def closed_meanwhile(stream: tls.TlsStream) -> None:
        stream.close()

    monkeypatch.setattr(tls.TlsStream, "_readable", closed_meanwhile)
    with pytest.raises(trio.ClosedResourceError):
        await near.receive_some()
    far.close()
