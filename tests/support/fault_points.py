"""Puts a fault before each I/O of the app: streams, what comes before there is a stream, and the network of the test."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import trio
import trio.lowlevel

from sidecar.wire import network, tls
from sidecar.wire.network import Stream
from support.faults import Faults, inode, inside
from support.flow import PairListener, PairNetwork

_Patch = AbstractContextManager[Any]


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in (*_Streams(faults).patches(), *_Handshakes(faults).patches(), *_Network(faults).patches()):
            stack.enter_context(patch)
        yield


def _broken() -> trio.BrokenResourceError:
    return trio.BrokenResourceError("injected")


def _reset() -> OSError:
    return ConnectionResetError(104, "injected")


class _Streams:
    """What `network.Stream` and `tls.TlsStream` do, with a fault before it where it is the app that does it."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._wires = faults.wires
        self._init, self._receive, self._send = Stream.__init__, Stream.receive_some, Stream.send_all

    def patches(self) -> Iterator[_Patch]:
        def method(call: Any) -> Any:
            """A function, since a bound method as an attribute of a class gets no `self`."""

            def function(stream: Stream, *args: Any) -> Any:
                return call(stream, *args)

            return function

        for name, call in (
            ("__init__", self._made), ("receive_some", self._receives), ("send_all", self._sends),
            ("left", self._left), ("interrupt", self._waking(Stream.interrupt)),
        ):  # fmt: skip
            yield mock.patch.object(Stream, name, method(call))
        for owner in (Stream, tls.TlsStream):
            yield mock.patch.object(owner, "send_eof", method(self._ending(owner.send_eof)))
            yield mock.patch.object(owner, "close", method(self._waking(owner.close)))
            yield mock.patch.object(owner, "abort", method(self._aborting(owner.abort)))

    def _made(self, stream: Stream, sock: socket.socket) -> None:
        self._init(stream, sock)
        if inside.get():
            self._faults.streams.append(stream)

    async def _receives(self, stream: Stream, max_bytes: int = 65536) -> bytes:
        if not inside.get():
            return self._unless_reset(stream, await self._receive(stream, max_bytes))
        faults = self._faults
        role = self._wires.role(stream._sock)
        if not stream.closed and not faults.is_broken(stream) and faults.strikes("receive", role):
            if faults.kind in ("torn", "after"):
                return await self._last(stream, max_bytes)
            max_bytes = 1 if faults.kind in ("short", "drip") else max_bytes
            await self._strike(stream)
        if faults.is_broken(stream):
            raise _broken()
        if faults.has_ended(stream):
            await trio.lowlevel.checkpoint()
            return b""
        try:
            data = await self._receive(stream, faults.readable_bytes(role, max_bytes))
        except trio.BrokenResourceError:
            if faults.has_ended(stream):
                return b""  # TLS has seen the end of the socket below it
            raise
        if faults.is_broken(stream):
            raise _broken()
        if self._unless_reset(stream, data):
            faults.was_told(stream, len(data))
            if faults.was_last(role, len(data)):
                (faults.breaks if faults.kind == "cut" else faults.ends)(stream)
        return data

    async def _last(self, stream: Stream, max_bytes: int) -> bytes:
        """What is read is the last of it, or the last half."""
        faults = self._faults
        data = await self._receive(stream, max_bytes)
        if not faults.armed:
            return data  # the scene was over when it came
        faults.breaks(stream)
        return data if faults.kind == "after" else data[: (len(data) + 1) // 2]

    async def _sends(self, stream: Stream, data: bytes) -> None:
        if not inside.get():
            return await self._send(stream, data)
        faults = self._faults
        role = self._wires.role(stream._sock)
        faults.on_send(role)
        strikes = not stream.closed and not faults.is_broken(stream) and faults.strikes("send", role)
        faults.wrote(stream)
        if strikes:
            if faults.kind in ("short", "drip"):
                return await self._send_slowly(stream, data)
            if faults.kind in ("torn", "after"):
                await self._send(stream, data if faults.kind == "after" else data[: len(data) // 2])
            await self._strike(stream)
        if faults.is_broken(stream):
            raise _broken()
        return await self._send(stream, data)

    async def _strike(self, stream: Stream) -> None:
        faults = self._faults
        match faults.kind:
            case "break" | "torn" | "after":
                faults.note_stale(stream)
                faults.breaks(stream)
            case "eof":
                faults.note_stale(stream)
                faults.ends(stream)
            case "hang":
                await faults.hang(stream)

    async def _send_slowly(self, stream: Stream, data: bytes) -> None:
        """The kernel takes one byte, and then the rest, or (drip) one byte each time."""
        kernel = stream._send
        left = 1 if self._faults.kind == "short" else len(data)

        def slow(piece: bytes | memoryview) -> int:
            nonlocal left
            left -= 1
            return kernel(piece[:1] if left >= 0 else piece)

        stream._send = slow
        try:
            await self._send(stream, data)
        finally:
            stream._send = kernel

    def _ending(self, original: Any) -> Any:
        async def send_eof(stream: Stream) -> None:
            faults = self._faults
            role = self._wires.role(stream._sock)
            if inside.get() and not stream.closed and faults.strikes("send_eof", role):
                if faults.kind == "after":
                    await original(stream)
                faults.breaks(stream)
            if inside.get() and faults.is_broken(stream):
                raise _broken()
            await original(stream)

        return send_eof

    def _waking(self, original: Any) -> Any:
        def call(stream: Stream) -> None:
            self._faults.wake(stream)
            original(stream)

        return call

    def _aborting(self, original: Any) -> Any:
        def abort(stream: Stream) -> None:
            self._faults.wake(stream)
            if not stream.closed:
                self._wires.reset(stream._sock)
            original(stream)

        return abort

    def _left(self, stream: Stream) -> str | None:
        return "reset" if not stream.closed and self._wires.was_reset(stream._sock) else None

    def _unless_reset(self, stream: Stream, data: bytes) -> bytes:
        if not data and self._wires.was_reset(stream._sock):
            raise trio.BrokenResourceError("reset by peer")
        return data


class _Handshakes:
    """First bytes, steps of handshakes, and what is read only to be dropped."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._wires = faults.wires
        self._hung: set[int] = set()
        """Inodes of sockets on which nothing comes any more."""
        self._wait_readable = trio.lowlevel.wait_readable

    def patches(self) -> Iterator[_Patch]:
        yield mock.patch.object(tls._Socket, "do_handshake", self._stepping(tls._Socket.do_handshake))
        yield mock.patch.object(trio.lowlevel, "wait_readable", self._readable)
        yield from _everywhere("peek", self._peeking)
        yield from _everywhere("drop_input", self._lingering)

    def _stepping(self, original: Any) -> Any:
        faults = self._faults

        def do_handshake(sock: Any, block: bool = False) -> None:
            if self._hangs(sock):
                raise ssl.SSLWantReadError
            if inside.get() and faults.strikes("handshake", self._wires.role(sock)):
                match faults.kind:
                    case "hang":
                        self._hung.add(inode(sock))
                        raise ssl.SSLWantReadError
                    case "eof":
                        socket.socket.shutdown(sock, socket.SHUT_RD)
                    case "break" | "after":
                        if faults.kind == "after":
                            try:
                                original(sock, block)
                            except ssl.SSLError:
                                pass
                        self._wires.sever(sock)
                        raise _reset()
            original(sock, block)

        return do_handshake

    async def _readable(self, sock: Any) -> None:
        if self._hangs(sock):
            await trio.sleep_forever()
        await self._wait_readable(sock)

    def _hangs(self, sock: Any) -> bool:
        return bool(self._hung) and inside.get() and not isinstance(sock, int) and inode(sock) in self._hung

    def _peeking(self, original: Any) -> Any:
        faults = self._faults

        async def peek(sock: socket.socket) -> bytes:
            if self._hangs(sock):
                await trio.sleep_forever()
            if inside.get() and faults.strikes("peek", self._wires.role(sock)):
                match faults.kind:
                    case "hang":
                        await trio.sleep_forever()
                    case "eof":
                        socket.socket.shutdown(sock, socket.SHUT_RD)
                        return b""
                    case "break":
                        self._wires.sever(sock)
                        raise _reset()
            return await original(sock)

        return peek

    def _lingering(self, original: Any) -> Any:
        async def drop_input(sock: socket.socket) -> None:
            if inside.get() and sock.fileno() != -1 and self._faults.strikes("linger", self._wires.role(sock)):
                await trio.sleep_forever()
            await original(sock)

        return drop_input


def _everywhere(name: str, wrap: Callable[[Any], Any]) -> Iterator[_Patch]:
    """Patch a function of `wire.network` in every room that has imported it."""
    original = getattr(network, name)
    wrapped = wrap(original)
    for title, module in list(sys.modules.items()):
        if title.startswith("sidecar.") and getattr(module, name, None) is original:
            yield mock.patch.object(module, name, wrapped)


class _Network:
    """Connecting; and who is who on the wires."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._wires = faults.wires

    def patches(self) -> Iterator[_Patch]:
        yield mock.patch.object(PairNetwork, "connect", self._connecting(PairNetwork.connect))
        yield mock.patch.object(PairListener, "accept", self._accepting(PairListener.accept))
        # A mock clock does not wait for threads.
        yield mock.patch.object(trio.to_thread, "run_sync", _at_once)

    def _connecting(self, original: Any) -> Any:
        faults, wires = self._faults, self._wires

        async def connect(pairs: PairNetwork, to: Any) -> socket.socket:
            role = _role(to)
            strikes = faults.strikes("connect", role)
            if strikes and faults.kind == "hang":
                await trio.sleep_forever()
            if strikes and faults.kind == "break":
                raise _reset()
            sock: socket.socket = await original(pairs, to)
            wires.join(*pairs.sockets[-2:])
            if inside.get():
                wires.roles[inode(sock)] = role
                if strikes:
                    wires.sever(sock)
            return sock

        return connect

    def _accepting(self, original: Any) -> Any:
        wires = self._wires

        async def accept(listener: PairListener) -> Any:
            sock, remote = await original(listener)
            if inside.get():
                side = {8443: "inbound", 8080: "outbound"}.get(listener.address.port, "health")
                wires.accepted[side] += 1
                wires.roles[inode(sock)] = "health" if side == "health" else "client"
            return sock, remote

        return accept


def _role(to: Any) -> str:
    """Of a connection to this address."""
    if not hasattr(to, "port"):
        return "opa"
    return "agent" if to.host == "127.0.0.1" else "plaintext" if to.port == 8000 else "target"


async def _at_once(function: Callable[..., Any], *args: Any, **_named: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args)
