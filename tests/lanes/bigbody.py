"""Bodies far larger than memory through one real sidecar with real OPA over mTLS: how much does it grow?

    PYTHONPATH=.:tests python -m lanes.bigbody

Client and agent are processes of their own. What they send is made as it is sent, every block with its number in it, and
checked as it comes: its length, and a checksum of all of it. Meanwhile the sidecar's resident memory is read every 50 ms, and
beside it the kernel's own record of the highest it ever was, so that nothing hides between two readings. Growth counts from
the end of a warm-up that has gone every way once.

- up and down, each over HTTP/1.1 and HTTP/2, `BIGBODY_MIB` (2048) each;
- slow: for some seconds a client reads 64 KiB/s of what the agent pushes, or an agent reads as slowly what a client pushes.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from sidecar.decision import install
from support.h2_bulk import Broken, Bulk
from support.live import HOST, client_context, free_port, running

MIB = 1024 * 1024
LIMIT = 8 * MIB
"""What the sidecar may grow by."""
BODY = int(os.environ.get("BIGBODY_MIB", "2048")) * MIB
WARM_UP = 16 * MIB
SLOW_RATE = 64 * 1024
"""Bytes per second."""
SLOW_SECONDS = 4.0
PUSHED = 256 * MIB
"""What is pushed at the one who is slow; it gets little of it."""
TIMEOUT = 600.0
"""Of the whole run, in seconds."""
SAMPLE_INTERVAL = 0.05
PROGRESS_INTERVAL = 2.0
BLOCK = 256 * 1024
SPAWN = multiprocessing.get_context("spawn")
_FILLING = bytes(range(256)) * (BLOCK // 256 - 1) + bytes(248)


class Counter(Protocol):
    """A number that processes share."""

    value: int


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(size: int) -> Iterator[bytes]:
    """A body of `size` bytes (a multiple of `BLOCK`), no two blocks alike."""
    for number in range(size // BLOCK):
        yield number.to_bytes(8, "big") + _FILLING


def checksum(size: int) -> int:
    value = 0
    for block in blocks(size):
        value = zlib.crc32(block, value)
    return value


class Check:
    """Takes a body as it comes."""

    def __init__(self, moved: Counter) -> None:
        self.size = 0
        self.value = 0
        self._moved = moved

    def take(self, data: bytes | memoryview) -> None:
        self.value = zlib.crc32(data, self.value)
        self.size += len(data)
        self._moved.value = self.size

    def told(self) -> str:
        return f"{self.size} {self.value:08x}"


# ── the agent ─────────────────────────────────────────────────────────────────────────────────────────────────────


def agent(port: int, moved: Counter) -> None:
    """Answers `PUT /SIZE` with what came, and `GET /SIZE` with as much; both at 64 KiB/s under `/slow/`."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve, args=(sock, moved), daemon=True).start()


def _serve(sock: socket.socket, moved: Counter) -> None:
    with sock, suppress(OSError):  # whoever was slow leaves in the middle
        ahead = b""
        while True:
            while b"\r\n\r\n" not in ahead:
                if not (data := sock.recv(65536)):
                    return
                ahead += data
            head, _, ahead = ahead.partition(b"\r\n\r\n")
            method, path = head.split(b" ")[:2]
            size = int(path.rpartition(b"/")[2])
            if method == b"GET":
                sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
                for block in blocks(size):
                    sock.sendall(block)
                continue
            check = Check(moved)
            check.take(ahead)
            ahead = b""
            if path.startswith(b"/slow/"):
                _slowly(lambda most, check=check: check.take(sock.recv(most)))  # type: ignore[misc]
                return
            view = memoryview(bytearray(BLOCK))
            while check.size < size:
                if not (got := sock.recv_into(view)):
                    return
                check.take(view[:got])
            told = check.told().encode()
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(told), told))


def _slowly(take: Callable[[int], object]) -> None:
    """Take little, for some seconds."""
    until = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < until:
        take(SLOW_RATE // 16)
        time.sleep(1 / 16)


# ── the client ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Task:
    """What a client process is to do, and where."""

    port: int
    directory: Path
    protocol: str
    """`h1` or `h2`."""
    way: str
    """`up` or `down`; `slow agent`, which is pushed at, or `slow client`, which is."""
    size: int

    @property
    def down(self) -> bool:
        return self.way in {"down", "slow client"}

    @property
    def slow(self) -> bool:
        return self.way.startswith("slow")

    @property
    def target(self) -> str:
        return f"/slow/{self.size}" if self.way == "slow agent" else f"/{self.size}"


def client(task: Task, moved: Counter, result: Connection) -> None:
    """Do it, and say what came of it: size and checksum as the receiver has them (nothing, where somebody was slow), or what
    went wrong.
    """
    try:
        context = client_context(task.directory / "caller", ("h2" if task.protocol == "h2" else "http/1.1",))
        with socket.create_connection(("127.0.0.1", task.port), timeout=60) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if task.slow:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_RATE)
            with context.wrap_socket(plain, server_hostname=HOST) as sock:
                result.send((_over_h1 if task.protocol == "h1" else _over_h2)(sock, task, Check(moved)))
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")


def _over_h1(sock: ssl.SSLSocket, task: Task, check: Check) -> str:
    length = "" if task.down else f"content-length: {task.size}\r\n"
    sock.sendall(f"{'GET' if task.down else 'PUT'} {task.target} HTTP/1.1\r\nhost: {HOST}\r\n{length}\r\n".encode())
    if not task.down:
        _send(sock.sendall, task)
        return "" if task.slow else _answer(sock, whole=True)[1].decode()
    head, ahead = _answer(sock, whole=False)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise Broken(head.decode())
    check.take(ahead)
    if task.slow:
        _slowly(lambda size: check.take(sock.recv(size)))
        return ""
    view = memoryview(bytearray(BLOCK))
    while check.size < task.size and (got := sock.recv_into(view)):
        check.take(view[:got])
    return check.told()


def _answer(sock: ssl.SSLSocket, *, whole: bool) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data or (whole and data.endswith(b"\r\n\r\n")):
        if not (more := sock.recv(65536)):
            raise Broken(f"the answer ended early: {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


def _over_h2(sock: ssl.SSLSocket, task: Task, check: Check) -> str:
    bulk = Bulk(sock, check.take, window=SLOW_RATE if task.slow else 4 * MIB)
    head = [
        (":method", "GET" if task.down else "PUT"),
        (":scheme", "https"),
        (":authority", HOST),
        (":path", task.target),
    ]
    bulk.begin([*head, *([] if task.down else [("content-length", str(task.size))])], end=task.down)
    if task.down:
        if task.slow:
            _slowly(bulk.read)
            return ""
        bulk.finish()
        return check.told()
    _send(bulk.send, task)
    if task.slow:
        return ""
    bulk.end()
    told: list[bytes] = []
    bulk.take = lambda data: told.append(bytes(data))
    bulk.finish()
    return b"".join(told).decode()


def _send(send: Callable[[bytes], object], task: Task) -> None:
    """Send the whole body; at an agent that is slow, push for some seconds and leave."""
    if not task.slow:
        for block in blocks(task.size):
            send(block)
        return

    def push() -> None:
        with suppress(OSError, ValueError):  # the connection is closed under it, as is meant
            for block in blocks(task.size):
                send(block)

    threading.Thread(target=push, daemon=True).start()
    time.sleep(SLOW_SECONDS)


# ── the measure ───────────────────────────────────────────────────────────────────────────────────────────────────


class Memory:
    """The resident bytes of a process, watched from a thread."""

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        self.before = self.now = self.peak = self._read("VmRSS")

    def start(self) -> None:
        """Growth counts from here."""
        (self._process / "clear_refs").write_text("5")  # makes the highest ever the present (proc_pid_clear_refs(5))
        self.before = self.now = self.peak = self._read("VmRSS")
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def grown(self) -> int:
        self.peak = max(self.peak, self._read("VmHWM"))
        return self.peak - self.before

    def _watch(self) -> None:
        with suppress(OSError, IndexError):  # it has ended
            while True:
                self.now = self._read("VmRSS")
                self.peak = max(self.peak, self.now)
                time.sleep(SAMPLE_INTERVAL)

    def _read(self, name: str) -> int:
        status = (self._process / "status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024


class Lane:
    """Runs one task after the other, and shows how far it is."""

    def __init__(self, port: int, directory: Path, moved: Any, memory: Memory) -> None:
        self._port = port
        self._directory = directory
        self._moved = moved
        self._memory = memory
        self._give_up_at = time.monotonic() + TIMEOUT

    def run(self, protocol: str, way: str, size: int, *, quiet: bool = False) -> None:
        """Raises `Broken`, also where time is up."""
        task = Task(self._port, self._directory, protocol, way, size)
        self._moved.value = 0
        ours, theirs = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=client, args=(task, self._moved, theirs), daemon=True)
        began = time.monotonic()
        process.start()
        theirs.close()
        try:
            while not ours.poll(PROGRESS_INTERVAL):
                if time.monotonic() > self._give_up_at or not process.is_alive():
                    raise Broken(f"{protocol} {way}: {'no end in sight' if process.is_alive() else 'the client died'}")
                if not quiet:
                    self._show(task, began)
            told = ours.recv()
        finally:
            process.terminate()
            process.join()
        if task.slow and (told or self._moved.value < SLOW_RATE * SLOW_SECONDS / 2):
            raise Broken(f"{protocol} {way}: {told or 'hardly anything moved'}")
        if not task.slow and told != f"{size} {checksum(size):08x}":
            raise Broken(f"{protocol} {way}: {told} came of {size} {checksum(size):08x}")
        if not quiet:
            self._show(task, began)

    def _show(self, task: Task, began: float) -> None:
        seconds = time.monotonic() - began
        moved, grown = self._moved.value / MIB, self._memory.grown / MIB
        print(
            f"{task.protocol} {task.way:<11} {moved:6.0f} of {task.size / MIB:.0f} MiB, {moved / seconds:6.1f} MiB/s, "
            f"resident {self._memory.now / MIB:.1f} MiB, peak +{grown:.1f}",
            flush=True,
        )


def main() -> int:
    opa, port, agent_port = install.install(report=print), free_port(), free_port()
    moved = SPAWN.Value("Q", 0, lock=False)
    served = SPAWN.Process(target=agent, args=(agent_port, moved), daemon=True)
    served.start()
    inbound = [{"listen": f"127.0.0.1:{port}", "upstream": f"http://127.0.0.1:{agent_port}"}]
    with tempfile.TemporaryDirectory() as place, running(Path(place), opa, inbound=inbound) as live:
        memory = Memory(live.process.pid)
        fresh = memory.now
        lane = Lane(port, Path(place), moved, memory)
        try:
            for protocol in ("h1", "h2"):
                for way in ("up", "down"):
                    lane.run(protocol, way, WARM_UP, quiet=True)
            memory.start()
            told = f"resident {fresh / MIB:.1f} MiB at first, {memory.before / MIB:.1f} after {WARM_UP // MIB} MiB each way"
            print(told, flush=True)
            for protocol in ("h1", "h2"):
                for way in ("up", "down"):
                    lane.run(protocol, way, BODY)
                for way in ("slow client", "slow agent"):
                    lane.run(protocol, way, PUSHED)
        except Broken as error:
            print(f"bigbody: FAILED: {error}")
            return 1
        finally:
            served.terminate()
        grown = memory.grown
    told = f"{BODY / (1024 * MIB):g} GiB" if BODY >= 1024 * MIB else f"{BODY // MIB} MiB"
    print(f"bigbody: {told} up and {told} down over h1 and h2, RSS growth {grown / MIB:.1f} MiB (limit {LIMIT // MIB})")
    return int(grown > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
