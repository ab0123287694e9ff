"""Many sidecars in one process, as far as a bundle server can tell: each has an SVID and a connection of its own.

Each follows its bundle the way `sidecar.supply` does, over `wire.client`: it holds a question for 30 seconds, takes what it is
given, asks anew with its tag, and reports if it is told to, at once after a change and every 10 seconds or so. It keeps no OPA,
and of an archive only its hash. A crowd is a process; `Crowd` is its handle in the process that measures.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

import trio

from sidecar.bundles.sources import LONG_POLL_TIMEOUT, MEDIA_TYPE
from sidecar.errors import SidecarError
from sidecar.identity.current import Current
from sidecar.identity.presented import Presented
from sidecar.identity.spiffe import parse
from sidecar.model import Address, Identity
from sidecar.reporting import INTERVAL
from sidecar.wire.client import Client, ClientSettings, Upstream
from sidecar.wire.fetch import Answer, fetch
from sidecar.wire.network import TcpNetwork

SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 120.0
CONNECTING = 16
"""Handshakes at a time of one crowd."""
_ANSWER_TIMEOUT = 60.0
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Target:
    port: int
    server_id: str
    bundle: str = "sidecar"


@dataclass
class _Member:
    """One sidecar."""

    id: str
    client: Client
    etag: str = ""
    backoff: float = 0.0
    """Seconds after a failure, each time twice as long, as `bundles.sources` has it."""
    serial: int | None = None
    news: trio.Event = field(default_factory=trio.Event)


@dataclass
class Seen:
    """What there is to tell of one serial."""

    had: list[float]
    """When each had its archive whole, on the machine's monotonic clock, which all processes share."""
    reported: int
    """Whose report of it was taken."""
    failures: Counter[str]
    """Whatever went wrong so far, about any serial."""


# ── in the crowd's process ────────────────────────────────────────────────────────────────────────────────────────


def _live(target: Target, orders: Connection) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    trio.run(_Crowd(target, orders).run)


class _Crowd:
    def __init__(self, target: Target, orders: Connection) -> None:
        self._orders = orders
        self._had: dict[int, list[float]] = {}
        self._reported: dict[int, set[str]] = {}
        self._failures: Counter[str] = Counter()
        self._reporting = False
        self._connecting = trio.CapacityLimiter(CONNECTING)
        self._bundle = target.bundle
        self._authority = f"127.0.0.1:{target.port}"
        self._upstream = Upstream(
            address=Address(host="127.0.0.1", port=target.port), tls=True, allowed=frozenset({parse(target.server_id)}),
            server_name="127.0.0.1", protocol="auto",
        )  # fmt: skip

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                order, *arguments = await trio.to_thread.run_sync(self._orders.recv, abandon_on_cancel=True)
                if order == "end":
                    nursery.cancel_scope.cancel()
                    return
                if order == "join":
                    for identity in arguments[0]:
                        nursery.start_soon(self._belong, identity)
                elif order == "report":
                    self._reporting = arguments[0]
                elif order == "seen":
                    had, told = self._had.get(arguments[0], []), self._reported.get(arguments[0], set())
                    self._orders.send(Seen(had=had, reported=len(told), failures=self._failures))

    async def _belong(self, identity: Identity) -> None:
        presented = Presented(Current(), log=lambda *_, **__: None)
        presented.publish(identity)
        client = Client(TcpNetwork(), presented.in_use, ClientSettings())
        member = _Member(id=str(identity.id), client=client)
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            async with self._connecting:
                await self._ask(member)
            nursery.start_soon(self._report, member)
            while True:
                await self._ask(member)

    async def _ask(self, member: _Member) -> None:
        fields = [(b"accept", MEDIA_TYPE), (b"prefer", b"modes=snapshot;wait=%d" % LONG_POLL_TIMEOUT)]
        fields += [(b"if-none-match", member.etag.encode())] if member.etag else []
        try:
            answer = await fetch(
                member.client, self._upstream, method="GET", authority=self._authority,
                path=f"/v1/bundles/{self._bundle}", fields=fields, max_bytes=_MAX_BYTES,
                timeout=LONG_POLL_TIMEOUT + _ANSWER_TIMEOUT,
            )  # fmt: skip
        except SidecarError as fault:
            return await self._failed(member, fault.code)
        if answer.status == 200:
            serial, _, digest = answer.value(b"etag").strip('"').partition("-")
            if hashlib.sha256(answer.body).hexdigest() != digest[:64]:
                self._failures["not what its tag says"] += 1
            member.etag, member.serial = answer.value(b"etag"), int(serial)
            self._had.setdefault(member.serial, []).append(time.monotonic())
            member.news.set()
        elif answer.status != 304:
            return await self._failed(member, _refusal(answer))
        member.backoff = 0.0
        return None

    async def _failed(self, member: _Member, code: str) -> None:
        self._failures[code] += 1
        member.backoff = min(max(0.5, 2 * member.backoff), 30.0)
        await trio.sleep(member.backoff * random.uniform(0.5, 1.0))

    async def _report(self, member: _Member) -> None:
        while True:
            with trio.move_on_after(INTERVAL * random.uniform(0.8, 1.2)):
                await member.news.wait()
                await trio.sleep(random.uniform(0, INTERVAL / 10))  # it looks for news so often
            member.news = trio.Event()
            if self._reporting and member.serial is not None:
                await self._tell(member, member.serial)

    async def _tell(self, member: _Member, serial: int) -> None:
        body = json.dumps(
            {
                "bundle": self._bundle, "revision": f"r{serial}", "serial": serial, "digest": "0" * 64,
                "error": None, "counters": {"allowed": 1000, "denied": 10, "errors": 0}, "shadow": None, "labels": {},
                "version": "0",
            }
        ).encode()  # fmt: skip
        try:
            answer = await fetch(
                member.client, self._upstream, method="POST", authority=self._authority, path="/v1/status",
                fields=[(b"content-type", b"application/json")], body=body, max_bytes=1 << 16, timeout=10.0,
            )  # fmt: skip
        except SidecarError as fault:
            self._failures[f"report: {fault.code}"] += 1
            return
        if answer.status == 204:
            self._reported.setdefault(serial, set()).add(member.id)
        else:
            self._failures[f"report: {_refusal(answer)}"] += 1


def _refusal(answer: Answer) -> str:
    try:
        return f"{answer.status} {json.loads(answer.body)['code']}"
    except (ValueError, KeyError, TypeError):
        return str(answer.status)


# ── in the process that measures ──────────────────────────────────────────────────────────────────────────────────


class Crowd:
    """Several such processes. A context manager: they end with it."""

    def __init__(self, target: Target, processes: int) -> None:
        self._ways: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(processes):
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=_live, args=(target, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ways.append(ours)
            self._processes.append(process)
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for way, process in zip(self._ways, self._processes, strict=True):
            try:
                way.send(("end",))
            except OSError:
                pass
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def join(self, identities: Sequence[Identity]) -> None:
        """These come too, spread over the processes."""
        for number, way in enumerate(self._ways):
            way.send(("join", identities[number :: len(self._ways)]))

    def report(self, reporting: bool) -> None:
        for way in self._ways:
            way.send(("report", reporting))

    def seen(self, serial: int) -> Seen:
        """What all of them have to tell by now."""
        whole = Seen(had=[], reported=0, failures=Counter())
        for way in self._ways:
            way.send(("seen", serial))
        for way in self._ways:
            assert way.poll(PATIENCE), "a crowd is too busy to answer"
            one: Seen = way.recv()
            whole.had += one.had
            whole.reported += one.reported
            whole.failures += one.failures
        return whole

    def cpu(self) -> float:
        """Seconds of processor that they have used."""
        return sum(cpu_seconds(process.pid) for process in self._processes)


def cpu_seconds(pid: int) -> float:
    """That a process has used so far (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        parts = file.read().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / 100
