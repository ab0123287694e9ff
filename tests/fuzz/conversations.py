"""A driver of the product on one end of a socket pair, bytes of a fuzzer on the other, under a clock that jumps.

All that a driver waits for it waits for in virtual time, so that a conversation that would hang for ever is found in
milliseconds: it ends within `PATIENCE`, or it is a failure.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import trio
from trio._core import _run
from trio.testing import MockClock, wait_all_tasks_blocked

from sidecar.model import Address, Anonymous, ByteStream, Connection, Request, Response, ResponseHead, Trailers
from sidecar.wire.answers import Whole
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.network import Stream

PATIENCE = 600.0
IDLE = 60.0
"""For an exchange in which nothing moves."""
HERE = Address(host="127.0.0.1", port=1)
LIMITS = Limits(
    max_header_bytes=2048, max_header_fields=24, max_streams=4, header_timeout=2.0, idle_timeout=5.0, keepalive_timeout=6.0,
    linger_timeout=0.5, drain_idle_timeout=1.0,
)  # fmt: skip
END, BREAK, SILENCE = range(3)
BIG = b"0123456789abcdef" * 8192
_ROOM = 65536


def held(conversation: Callable[[], Awaitable[None]]) -> None:
    """Run one, from its first byte to its last; the same bytes lead to the same turns of the same tasks."""

    async def bounded() -> None:
        with trio.fail_after(PATIENCE):
            await conversation()

    # trio shuffles its tasks on purpose. An input that is saved must fail again.
    _run._r.seed(0)
    with mock.patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True):
        trio.run(bounded, clock=MockClock(autojump_threshold=0))


@contextmanager
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    """Our end, as production has it, and the peer's, which the test drives itself."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield Stream(ours), theirs


async def play(sock: socket.socket, pieces: Sequence[bytes], ending: int, observe: Callable[[], None]) -> bytes:
    """Send the pieces, each when all that the last one started has come to rest; return all that was heard."""
    heard = bytearray()
    over = False
    for piece in pieces:
        await wait_all_tasks_blocked()
        observe()
        over = _drain(sock, heard)
        try:
            sock.send(piece)
        except BlockingIOError:
            pass  # the driver has stopped reading, and the kernel holds no more: what it means, the driver says
        except OSError:
            over = True
        if over:
            break
    await wait_all_tasks_blocked()
    observe()
    if ending == BREAK:
        _drain(sock, heard)
        sock.close()
        return bytes(heard)
    if ending == END:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
    while not _drain(sock, heard):
        await trio.lowlevel.wait_readable(sock)
    observe()
    sock.close()
    return bytes(heard)


def _drain(sock: socket.socket, heard: bytearray) -> bool:
    """Take in what is there; whether that was the last."""
    while True:
        try:
            data = sock.recv(_ROOM)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if not data:
            return True
        heard += data


async def looked_after(served: Served) -> None:
    """What the server's look-out does."""
    while True:
        await trio.sleep(0.5)
        served.check(trio.current_time())


def settled(protocol: str) -> Connection:
    return Connection(
        id="c1", peer=Anonymous(reason="plaintext"), remote=HERE, local=HERE, tls=False, server_name=None,
        protocol="h2" if protocol == "h2" else "h1", generation=0,
    )  # fmt: skip


def received(served_as: str, handle: Callable[..., Awaitable[None]]) -> Served:
    return Served(settled(served_as), handle, LIMITS, lambda: True, draining=False)


async def read_whole(request: Request) -> bytes:
    """The body, as long as it said that it would be. Raises `Aborted`."""
    data = b""
    trailers = False
    while (item := await request.body.receive()) is not None:
        assert not trailers, "something follows the trailers"
        if isinstance(item, Trailers):
            trailers = True
        else:
            assert item, "an empty item"
            data += item
    assert request.body.length in (None, len(data))
    assert await request.body.receive() is None, "the end is the end"
    return data


async def echo(stream: ByteStream) -> None:
    """The other end of a tunnel: it says what it hears, and ends when it has heard the end."""
    try:
        while heard := await stream.receive_some():
            await stream.send_all(heard)
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    await stream.aclose()


def answer_to(path: str, data: bytes) -> Response:
    match path:
        case "/echo":
            return Response(head=ResponseHead(status=200, fields=[(b"x-echo", b"1")]), body=Whole(data))
        case "/big":
            return Response(head=ResponseHead(status=200), body=Whole(BIG))
    return Response(head=ResponseHead(status=404), body=Whole(b"no"))
