"""The real application over socket pairs: every byte goes through real TLS and the real parsers, and no port is opened.

`PairNetwork` is the seam. What listens there are the app's own listeners, the agents (`Agent`: raw, recording every byte)
and an OPA that answers from a function; what connects are the app's pools and the tests' own clients. Under trio's mock
clock with autojump a timeout costs nothing.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from examples.demo.kit import CA, write
from sidecar import config
from sidecar.app import App
from sidecar.identity import pem_files, verify
from sidecar.log import Log
from sidecar.model import Address
from sidecar.wire import tls
from sidecar.wire.handover import Alone
from sidecar.wire.network import Listener, Stream
from support.h2_frames import DataFrame, Message, Peer

OPA_SOCKET = Path("/nowhere/opa.sock")
INBOUND = Address(host="10.0.0.1", port=8443)
AGENT = Address(host="127.0.0.1", port=8000)
OUTBOUND = Address(host="127.0.0.1", port=8080)
HEALTH = Address(host="10.0.0.1", port=9091)
TARGET = Address(host="target.test", port=8443)
PLAINTEXT_TARGET = Address(host="target.test", port=8000)


class PairListener:
    def __init__(self, network: PairNetwork, address: Address | Path, shares: PairListener | None = None) -> None:
        self._network = network
        self.address: Any = address
        if shares is None:
            self.send, self._receive = trio.open_memory_channel[tuple[socket.socket, Address]](1024)
            self._holders = {self}
        else:
            self.send, self._receive = shares.send, shares._receive.clone()
            self._holders = shares._holders
            self._holders.add(self)

    def share(self) -> PairListener:
        """Another one at the same queue, as a second process holds it."""
        return PairListener(self._network, self.address, self)

    async def accept(self) -> tuple[socket.socket, Address]:
        try:
            sock, remote = await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None
        if self._network.inside is not None and self._network.inside.get(False):
            self._network.apps_own.append((f"accepted at {self.address}", sock))
        return sock, remote

    def close(self) -> None:
        if self not in self._holders:
            return  # closed already: the address may be somebody else's by now
        self._holders.discard(self)
        if self._holders:
            self._receive.close()  # the queue is somebody else's too
            return
        self._network.listeners.pop(self.address, None)
        self.send.close()

    finish = close  # what waits in the channel is handed out all the same


class PairNetwork:
    """`Network` of one process: an address is whatever somebody listens at."""

    def __init__(self) -> None:
        self.listeners: dict[Address | Path, PairListener] = {}
        self.dialled: list[Address | Path] = []
        self.names: dict[Address, list[Address]] = {}
        """What a name leads to; one that is not here leads to itself."""
        self.comes_from = "10.0.0.9"
        """The host of whoever connects."""
        self.tap: Callable[[socket.socket, str], socket.socket] = lambda sock, _role: sock
        self.sockets: list[socket.socket] = []
        self.inside: ContextVar[bool] | None = None
        """Set where the app runs."""
        self.apps_own: list[tuple[str, socket.socket]] = []
        """Sockets that the app dialled or accepted: it has to close them. (TLS detaches the one that it wraps.)"""
        self._ports = itertools.count(40000)

    async def resolve(self, name: Address) -> list[Address]:
        await trio.lowlevel.checkpoint()
        return self.names.get(name, [name])

    async def connect(self, to: Address | Path) -> socket.socket:
        await trio.lowlevel.checkpoint()
        self.dialled.append(to)
        listener = self.listeners.get(to)
        if listener is None:
            raise ConnectionRefusedError(111, f"nobody listens at {to}")
        near, far = socket.socketpair()
        self.sockets += [near, far]
        if self.inside is not None and self.inside.get(False):
            self.apps_own.append((f"dialled {to}", near))
        near.setblocking(False)
        far.setblocking(False)
        remote = Address(host=self.comes_from, port=next(self._ports))
        try:
            listener.send.send_nowait((self.tap(far, f"accepted {to}"), remote))
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.WouldBlock):
            near.close()
            far.close()
            raise ConnectionRefusedError(111, f"nobody accepts at {to}") from None
        return self.tap(near, f"dialled {to}")

    async def listen(self, at: Address | Path) -> Listener:
        await trio.lowlevel.checkpoint()
        if at in self.listeners:
            raise OSError(98, "address in use")
        listener = self.listeners[at] = PairListener(self, at)
        return listener


async def read_message(stream: Stream, buffer: bytearray) -> bytes | None:
    """One h1 message with Content-Length, chunks or neither, as raw bytes; None at the end of the stream."""
    if not await _until_head(stream, buffer):
        return None
    head, _, _ = bytes(buffer).partition(b"\r\n\r\n")
    size = len(head) + 4
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        while b"\r\n0\r\n" not in buffer[len(head) + 2 :] or not buffer.endswith(b"\r\n\r\n"):
            buffer += await stream.receive_some() or _cut(buffer)
        size = len(buffer)
    elif b"content-length: " in lowered:
        size += int(lowered.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(buffer) < size:
            buffer += await stream.receive_some() or _cut(buffer)
    message = bytes(buffer[:size])
    del buffer[:size]
    return message


async def _until_head(stream: Stream, buffer: bytearray) -> bool:
    while b"\r\n\r\n" not in buffer:
        data = await stream.receive_some()
        if not data:
            return False
        buffer += data
    return True


def _cut(buffer: bytearray) -> bytes:
    raise EOFError(f"cut short after {bytes(buffer)!r}")


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Agent:
    """A raw HTTP/1.1 server that keeps every message it was sent. `answer` makes the bytes that go back."""

    def __init__(self, answer: Callable[[bytes], bytes] = lambda _message: OK) -> None:
        self.answer = answer
        self.hangs_up = False
        """Close after each answer, whole or not."""
        self.early: bytes | None = None
        """Said as soon as a head has come, in place of an answer."""
        self.interim = b""
        """Said when a head has come, before its body is read."""
        self.before: Callable[[], Awaitable[None]] | None = None
        """Awaited before each answer."""
        self.echoes = False
        """After the first answer, send back whatever comes."""
        self.messages: list[bytes] = []
        self.received = bytearray()
        """Every byte, of whatever it was part."""
        self.connections = 0

    async def serve(self, listener: PairListener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                self.connections += 1
                nursery.start_soon(self._connection, _Recording(sock, self.received))

    async def _connection(self, stream: Stream) -> None:
        buffer = bytearray()
        try:
            if self.early or self.interim:
                await _until_head(stream, buffer)
                await stream.send_all(self.early or self.interim)
                if self.early:
                    await stream.close_gently(60)
                    return
            while (message := await read_message(stream, buffer)) is not None:
                self.messages.append(message)
                if self.before is not None:
                    await self.before()
                await stream.send_all(self.answer(message))
                if self.hangs_up:
                    return
                while self.echoes:
                    await stream.send_all(await stream.receive_some() or _cut(buffer))
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()


class _Recording(Stream):
    """A stream that keeps what is read from it."""

    __slots__ = ("_record",)

    def __init__(self, sock: socket.socket, record: bytearray) -> None:
        super().__init__(sock)
        self._record = record

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        data = await super().receive_some(max_bytes)
        self._record += data
        return data


Policy = Callable[[Mapping[str, Any]], Any]


def allow_all(_input: Mapping[str, Any]) -> Any:
    return {"allow": True, "rule": "test/all"}


class FakePolicy:
    """Answers OPA's data API with what a function says of the input. A raised exception becomes a 500."""

    def __init__(self, policy: Policy = allow_all) -> None:
        self.policy = policy
        self.questions: list[dict[str, Any]] = []

    async def serve(self, listener: PairListener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(self._connection, Stream(sock))

    async def _connection(self, stream: Stream) -> None:
        buffer = bytearray()
        try:
            while (message := await read_message(stream, buffer)) is not None:
                head, _, body = message.partition(b"\r\n\r\n")
                await stream.send_all(await self._answer(head, body))
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()

    async def _answer(self, head: bytes, body: bytes) -> bytes:
        if not head.startswith(b"POST"):
            return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
        question = json.loads(body)["input"]
        self.questions.append(question)
        try:
            result = self.policy(question)
        except Exception:
            return b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}"
        if result is HANG:
            await trio.sleep_forever()
        answer: dict[str, Any] = {"provenance": {"bundles": {"sidecar": {"revision": "r1"}}}}
        if result is not UNDEFINED:
            answer["result"] = result
        raw = json.dumps(answer).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw)


HANG = object()
UNDEFINED = object()


class Lines:
    """A `log.Sink` that keeps its lines, parsed."""

    dropped = 0

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, line: bytes) -> None:
        self.lines.append(json.loads(line))

    def flush(self) -> None: ...

    def reopen(self) -> None: ...

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]


@dataclass
class World:
    """One sidecar, its agent, a target, an OPA, and the authorities of two trust domains."""

    network: PairNetwork
    directory: Path
    ca: CA
    foreign: CA
    agent: Agent = field(default_factory=Agent)
    target: Agent = field(default_factory=Agent)
    opa: FakePolicy = field(default_factory=FakePolicy)
    access: Lines = field(default_factory=Lines)
    log: Lines = field(default_factory=Lines)
    text: str = ""
    app: App | None = None
    send_signal: Any = None
    stopped: trio.Event = field(default_factory=trio.Event)
    streams: list[Stream] = field(default_factory=list)
    cut: Callable[[], None] = lambda: None
    """Cancel the app, as the end of its time would."""

    def load(self) -> config.Config:
        return config.load(self.text, {}, self.directory)

    def credentials(self, path: str = "/ns/demo/sa/caller", *, ca: CA | None = None, **bent: Any) -> tls.Credentials:
        """Client or server credentials of some workload that trusts both domains."""
        where = Path(tempfile.mkdtemp(dir=self.directory))
        write(
            where, (ca or self.ca).svid(path, **bent), {"a.test": self.ca.bundle_pem, "b.test": self.foreign.bundle_pem}
        )
        identity = pem_files.read(
            config.FilesIdentity(
                certificate=where / "svid.pem", key=where / "svid_key.pem",
                bundles={"a.test": where / "bundle-a.test.pem", "b.test": where / "bundle-b.test.pem"},
            ),
            0 if bent else __import__("time").time(),
        ).identity  # fmt: skip
        return tls.Credentials(identity, verify.judge)

    async def client(
        self, credentials: tls.Credentials | None = None, *, server_name: str | None = None, alpn: str = "http/1.1"
    ) -> Stream:
        """A connection to the inbound port: mTLS with `credentials`, or plaintext without."""
        sock = await self.network.connect(INBOUND)
        if credentials is None:
            return self._kept(Stream(sock))
        context = credentials.client_context((alpn,))
        return self._kept(await tls.connect(sock, context, credentials.judge, server_name))

    async def agent_client(self) -> Stream:
        return self._kept(Stream(await self.network.connect(OUTBOUND)))

    def _kept(self, stream: Stream) -> Stream:
        self.streams.append(stream)
        return stream

    async def reload(self) -> None:
        await self.send_signal.send(signal.SIGHUP)
        await trio.sleep(1)
        while not (self.log.events("config.reloaded") or self.log.events("config.reload_refused")):
            await trio.sleep(1)

    async def get(self, path: str) -> bytes:
        """An answer from the health port."""
        stream = self._kept(Stream(await self.network.connect(HEALTH)))
        return await ask(stream, f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())


async def ask(stream: Stream, request: bytes) -> bytes:
    """Send bytes, return the whole answer."""
    await stream.send_all(request)
    return await read_message(stream, bytearray()) or b""


def get(path: str = "/x", *extra: str, host: str = "target.test", method: str = "GET") -> bytes:
    fields = "".join(f"{line}\r\n" for line in (f"Host: {host}", *extra))
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


YAML = """
mtls_mode: {mode}
state_dir: {directory}/state
identity:
  certificate: {directory}/svid.pem
  key: {directory}/svid_key.pem
  bundles: {{a.test: {directory}/bundle-a.test.pem, b.test: {directory}/bundle-b.test.pem}}
inbound:
  - {{listen: 10.0.0.1:8443, upstream: "http://127.0.0.1:8000"}}
outbound:
  listen: 127.0.0.1:8080
  routes:
    - {{target: "target.test:8443", spiffe_ids: [spiffe://a.test/ns/demo/sa/target]{plaintext}}}
opa: {{address: unix://{opa}}}
health: {{listen: 10.0.0.1:9091}}
timeouts: {{drain: 10}}
"""


@asynccontextmanager
async def world(
    tmp_path: Path, *, mode: str = "strict", plaintext: bool = False, extra: str = "", opa: bool = True,
    change: tuple[str, str] = ("", ""), inside: ContextVar[bool] | None = None,
    succession: Callable[[Any], Any] = lambda _tell: Alone(),
) -> AsyncIterator[World]:  # fmt: skip
    """Start it, hand it over, drain it."""
    ca, foreign = CA("a.test"), CA("b.test")
    write(tmp_path, ca.svid("/ns/demo/sa/me"), {"a.test": ca.bundle_pem, "b.test": foreign.bundle_pem})
    network = PairNetwork()
    it = World(network=network, directory=tmp_path, ca=ca, foreign=foreign)
    named = ', plaintext: "target.test:8000"' if plaintext else ""
    it.text = YAML.format(mode=mode, directory=tmp_path, plaintext=named, opa=OPA_SOCKET) + extra
    if change[0]:
        it.text = it.text.replace(*change)
    it.send_signal, signals = trio.open_memory_channel[int](8)
    it.app = App(
        it.load(), load=it.load, network=network, log=Log(it.log), access=it.access, succession=succession,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        async with trio.open_nursery() as background:
            background.start_soon(it.agent.serve, await network.listen(AGENT))
            if opa:
                background.start_soon(it.opa.serve, await network.listen(OPA_SOCKET))

            async def life() -> None:
                if inside is not None:
                    network.inside = inside
                    inside.set(True)
                with trio.CancelScope() as scope:
                    it.cut = scope.cancel
                    await it.app.serve(signals)
                it.stopped.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(life)
                while INBOUND not in network.listeners or not it.app.status().listeners:
                    await trio.sleep(0.01)
                yield it
                for stream in it.streams:
                    stream.close()
                if not it.stopped.is_set():
                    await it.send_signal.send(signal.SIGTERM)
            background.cancel_scope.cancel()
    finally:
        for stream in it.streams:
            stream.close()
        for sock in network.sockets:
            sock.close()


async def serve_target(
    it: World, nursery: trio.Nursery, *, path: str = "/ns/demo/sa/target", ca: CA | None = None
) -> None:
    """Put an mTLS target with the given identity behind the route. It speaks h1."""
    credentials = it.credentials(path, ca=ca)
    listener = await it.network.listen(TARGET)

    async def one(sock: socket.socket) -> None:
        try:
            stream = await tls.accept(sock, credentials.server_context, credentials.judge)
        except Exception:
            return
        if stream.alpn == "h2":
            raise AssertionError("this target speaks h1 only")
        await it.target._connection(stream)

    async def accept() -> None:
        async with trio.open_nursery() as connections:
            while True:
                sock, _ = await listener.accept()
                connections.start_soon(one, sock)

    credentials.server_context.set_alpn_protocols(["http/1.1"])
    nursery.start_soon(accept)


# ── HTTP/2 ────────────────────────────────────────────────────────────────────────────────────────────────────────

H2Fields = list[tuple[bytes, bytes]]


def h2_head(
    path: str = "/x", *extra: tuple[str, str], method: str = "GET", host: str = "target.test", scheme: str = "https"
) -> H2Fields:
    pseudo = [(":method", method), (":scheme", scheme), (":authority", host), (":path", path)]
    return [(name.encode(), value.encode()) for name, value in (*pseudo, *extra)]


async def h2_client(it: World, credentials: tls.Credentials | None = None, *, server_name: str | None = None) -> Peer:
    """A raw h2 client of the inbound port: agreed on by ALPN with `credentials`, by prior knowledge without."""
    stream = await it.client(credentials, server_name=server_name, alpn="h2")
    assert credentials is None or getattr(stream, "alpn", None) == "h2"
    return await _started(stream)


async def h2_agent_client(it: World) -> Peer:
    """The agent as a raw h2 client of the outbound port, by prior knowledge."""
    return await _started(await it.agent_client())


async def _started(stream: Stream) -> Peer:
    peer = Peer(stream)
    await peer.start()
    return peer


async def h2_ask(peer: Peer, stream_id: int, fields: H2Fields, body: bytes | None = None) -> Message:
    """Send a request on a stream, return its whole answer, or how it was reset."""
    await peer.request(stream_id, fields, end=body is None)
    if body is not None:
        await peer.data(stream_id, body, end=True)
    return await peer.message(stream_id)


class _Shared(Peer):
    """A peer to which several tasks send."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._turn = trio.Lock()

    async def raw(self, data: bytes) -> None:
        async with self._turn:
            await super().raw(data)


H2Answer = Callable[[Peer, int], Awaitable[None]]


async def h2_ok(peer: Peer, stream_id: int) -> None:
    await peer.send(
        peer.head(stream_id, [(b":status", b"200")]), DataFrame(stream_id, data=b"ok", flags=["END_STREAM"])
    )


class H2Agent:
    """A raw h2 server that keeps every message. `answer` is called, in a task of its own, with each whole request."""

    def __init__(self, answer: H2Answer = h2_ok) -> None:
        self.answer = answer
        self.at_head: H2Answer | None = None
        """Called as soon as a head has come, in place of `answer`."""
        self.settings: dict[int, int] = {}
        self.peers: list[Peer] = []

    @property
    def messages(self) -> list[Message]:
        """All that came on streams, whole or not, in the order of connections and streams."""
        return [message for peer in self.peers for number, message in sorted(peer.messages.items()) if number]

    async def serve(self, listener: PairListener) -> None:
        """In plaintext, by prior knowledge."""
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(self.connection, Stream(sock))

    async def serve_tls(self, listener: PairListener, credentials: tls.Credentials) -> None:
        """Over mTLS, by ALPN."""

        async def one(sock: socket.socket) -> None:
            try:
                stream = await tls.accept(sock, credentials.server_context, credentials.judge)
            except Exception:
                return
            assert stream.alpn == "h2"
            await self.connection(stream)

        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(one, sock)

    async def connection(self, stream: Stream) -> None:
        peer = _Shared(stream)
        self.peers.append(peer)
        called: set[int] = set()
        try:
            async with trio.open_nursery() as answers:
                await peer.start(self.settings, preface=False)
                while True:
                    stream_id = (await peer.next()).stream_id
                    message = peer.messages[stream_id]
                    if message.heads and (self.at_head or message.ended) and stream_id not in called:
                        called.add(stream_id)
                        answers.start_soon(self._answer, peer, stream_id)
        except* (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()

    async def _answer(self, peer: Peer, stream_id: int) -> None:
        await (self.at_head or self.answer)(peer, stream_id)


async def serve_h2_target(
    it: World, nursery: trio.Nursery, agent: H2Agent, *, path: str = "/ns/demo/sa/target", ca: CA | None = None
) -> None:
    """Put an mTLS target with the given identity behind the route. It speaks h2."""
    nursery.start_soon(agent.serve_tls, await it.network.listen(TARGET), it.credentials(path, ca=ca))


async def serve_h2_agent(it: World, nursery: trio.Nursery, agent: H2Agent) -> None:
    """Put an agent that speaks h2c in the place of the one that speaks h1."""
    it.network.listeners.pop(AGENT)
    nursery.start_soon(agent.serve, await it.network.listen(AGENT))
