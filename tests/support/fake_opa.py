"""An OPA in this process: HTTP/1.1 on a unix socket, saying what a test tells it to, in every good and bad manner.

It is told by `fake.says`: a function from the question's `input` to a manner. A manner is a coroutine that gets the
connection and returns whether it may be kept. The contract tests run over this and over the real OPA, so that it cannot
drift.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

Manner = Callable[[trio.SocketStream], Awaitable[bool]]
Says = Callable[[dict[str, Any]], Manner]

REVISION = "r1"
PROVENANCE = {
    "version": "1.22.0", "build_commit": "", "build_timestamp": "", "build_hostname": "",
    "bundles": {"sidecar": {"revision": REVISION}},
}  # fmt: skip


def body(**document: Any) -> bytes:
    return json.dumps({"provenance": PROVENANCE, **document}).encode() + b"\n"


def framed(content: bytes, status: str = "200 OK") -> bytes:
    """As Go's net/http frames it: a length up to 2048 bytes, chunks beyond."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nVary: Accept-Encoding\r\n"
        "Date: Sat, 21 Nov 2026 11:34:58 GMT\r\n"
    ).encode()
    if len(content) <= 2048:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    half = len(content) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:half], content[half:]))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def result(value: Any) -> Manner:
    return raw(framed(body(result=value)))


def undefined() -> Manner:
    return raw(framed(body()))


def fails(status: str = "500 Internal Server Error", message: str = "eval_conflict_error") -> Manner:
    return raw(framed(json.dumps({"code": "internal_error", "message": message}, indent=1).encode(), status))


def raw(data: bytes) -> Manner:
    """Say these bytes, whole."""

    async def manner(stream: trio.SocketStream) -> bool:
        await stream.send_all(data)
        return True

    return manner


def cut(data: bytes) -> Manner:
    """Say these bytes, and hang up."""

    async def manner(stream: trio.SocketStream) -> bool:
        await stream.send_all(data)
        return False

    return manner


def bytewise(data: bytes) -> Manner:
    async def manner(stream: trio.SocketStream) -> bool:
        for index in range(len(data)):
            await stream.send_all(data[index : index + 1])
            await trio.lowlevel.checkpoint()
        return True

    return manner


def late(seconds: float, then: Manner) -> Manner:
    async def manner(stream: trio.SocketStream) -> bool:
        await trio.sleep(seconds)
        return await then(stream)

    return manner


def hangs() -> Manner:
    async def manner(stream: trio.SocketStream) -> bool:
        await trio.sleep_forever()
        return False

    return manner


class FakeOpa:
    """`inputs` and `paths` are what it was asked; `opened` and `open` count connections."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.says: Says = lambda _: result({"allow": True})
        self.health: Manner = raw(framed(b"{}\n"))
        self.inputs: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.opened = self.open = 0
        self._connections: set[trio.SocketStream] = set()

    async def hang_up(self) -> None:
        """Close every connection, as an OPA that ended would, but go on listening."""
        for stream in tuple(self._connections):
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.bind(str(self.path))
        sock.listen(128)
        await trio.serve_listeners(self._connection, [trio.SocketListener(sock)], task_status=task_status)  # type: ignore[arg-type]

    async def _connection(self, stream: trio.SocketStream) -> None:
        self.opened += 1
        self.open += 1
        self._connections.add(stream)
        try:
            while await self._one(stream):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open -= 1
            self._connections.discard(stream)
            await trio.aclose_forcefully(stream)

    async def _one(self, stream: trio.SocketStream) -> bool:
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            more = await stream.receive_some()
            if not more:
                return False
            buffer += more
        head, _, content = buffer.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        lengths = [int(field.split(":")[1]) for field in fields if field.startswith("content-length:")]
        while lengths and len(content) < lengths[0]:
            content += await stream.receive_some()
        self.paths.append(line.split()[1])
        if line.startswith("GET /health"):
            return await self.health(stream)
        asked = json.loads(content)["input"]
        self.inputs.append(asked)
        return await self.says(asked)(stream)


@asynccontextmanager
async def fake_opa(path: Path) -> AsyncIterator[FakeOpa]:
    fake = FakeOpa(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.serve)
        yield fake
        nursery.cancel_scope.cancel()
