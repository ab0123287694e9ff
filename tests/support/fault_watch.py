"""What is seen of a run, and what must hold of it whatever went wrong.

Nothing here believes what the app says of itself where it can look: sockets are those that the process holds open, tasks those
that trio runs, and what reached an upstream is what that upstream saw.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import trio

from sidecar import exchange
from sidecar.decision import inquiry
from sidecar.model import Allow
from sidecar.records.metrics import Metrics
from sidecar.wire import h2_client
from support.fault_clients import WORDS, Told
from support.fault_upstreams import Arrival, TunnelEnd
from support.faults import UPSTREAMS, Faults
from support.flow import World

_OUR_ANSWERS = frozenset({408, 429, 502, 503, 504})
"""Statuses that may take the place of an answer. Not 500: a defect of ours is no answer to a fault of others."""
_MAX_SENDINGS = 3
"""Of what may be sent again, under one permit."""
_SPARE_OPA_CONNECTIONS = 2
"""As many as a scene asks questions at once; idle ones are kept as long as OPA keeps them."""


@dataclass
class Watch:
    """What was seen of a run. Its methods wrap what it looks at."""

    permitted: Counter[str] = field(default_factory=Counter)
    """Permits, by path."""
    allowed: int = 0
    """Decisions to allow that were read from an answer of OPA's."""
    handled: Counter[str] = field(default_factory=Counter)
    """Requests that were handed on, by path."""
    connections: list[Any] = field(default_factory=list)
    """Records."""
    asked: int = 0
    decided: int = 0
    """Questions, and records of them."""
    shared: list[Any] = field(default_factory=list)
    """h2 connections to upstreams."""
    early: set[str] = field(default_factory=set)
    """Roles of upstreams that were written to before there was any permit."""

    def sent(self, role: str) -> None:
        if role in UPSTREAMS and not self.permitted:
            self.early.add(role)

    def permit(self, original: Any) -> Any:
        def call(request: Any, *rest: Any, **named: Any) -> Any:
            self.permitted[request.head.target.path] += 1
            return original(request, *rest, **named)

        return call

    def answer(self, original: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            decision = original(*args, **named)
            self.allowed += isinstance(decision, Allow)
            return decision

        return call

    def handle(self, original: Any) -> Any:
        async def call(pipeline: Any, connection: Any, request: Any, reply: Any) -> None:
            self.handled[request.head.target.path] += 1
            await original(pipeline, connection, request, reply)

        return call

    def decide(self, original: Any) -> Any:
        async def call(*args: Any) -> Any:
            self.asked += 1
            return await original(*args)

        return call

    def record_decided(self, original: Any) -> Any:
        def call(kept: Any, record: Any) -> None:
            self.decided += 1
            original(kept, record)

        return call

    def record_connection(self, original: Any) -> Any:
        def call(kept: Any, record: Any) -> None:
            self.connections.append(record)
            original(kept, record)

        return call

    def share(self, original: Any) -> Any:
        def call(shared: Any, *args: Any, **named: Any) -> None:
            self.shared.append(shared)
            original(shared, *args, **named)

        return call


@contextmanager
def watching(faults: Faults) -> Iterator[Watch]:
    watch = Watch()
    faults.on_send = watch.sent
    with ExitStack() as stack:
        for owner, name, wrap in (
            (exchange, "_permit", watch.permit),
            (inquiry, "answer", watch.answer),
            (exchange.Pipeline, "handle", watch.handle),
            (exchange.Pipeline, "_decide", watch.decide),
            (Metrics, "decided", watch.record_decided),
            (Metrics, "connection", watch.record_connection),
            (h2_client.H2Connection, "__init__", watch.share),
        ):
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        yield watch


def tasks_below(root: trio.lowlevel.Task) -> Counter[str]:
    found: Counter[str] = Counter()
    nurseries = list(root.child_nurseries)
    while nurseries:
        for task in nurseries.pop().child_tasks:
            found[task.name] += 1
            nurseries.extend(task.child_nurseries)
    return found


# ── what must hold ────────────────────────────────────────────────────────────────────────────────────────────────


def wrong_answers(told: Sequence[Told], faults: Faults) -> Iterator[str]:
    """Whoever got an answer that looks whole has the right one, or one that says that there is none."""
    for one in told:
        if one.recanted or (faults.ended_in_order and _ended_early(one, by_client=faults.hit_role == "client")):
            continue
        if one.garbled:
            yield f"garbled: {one}: {one.garbled}"
        elif not one.over:
            yield f"endless: {one}"
        elif one.whole and not one.well and not says_no(one):
            yield f"not the answer: {one}: {one.got[:200]!r}"
        elif not one.whole and not one.want.startswith(one.got) and one.status not in _OUR_ANSWERS:
            yield f"not the beginning of the answer: {one}"


def _ended_early(one: Told, *, by_client: bool) -> bool:
    """Whether it is a tunnel that may have come to its end before all was said, since somebody has ended his side."""
    return one.tunnel and one.over and one.status == one.right and (by_client or one.want.startswith(one.got))


def says_no(one: Told) -> bool:
    """Whether it is an answer of ours that says why there is no other."""
    if one.status == 200:
        return one.grpc_status == b"14" and not one.got
    try:
        return one.status in _OUR_ANSWERS and bool(json.loads(one.got)["status"] == one.status)
    except (ValueError, KeyError, TypeError):
        return False


def wrong_arrivals(arrivals: Sequence[Arrival], watch: Watch, told: Sequence[Told]) -> Iterator[str]:
    """What reached an upstream was permitted, and came no more often than it may be sent."""
    for role in watch.early:
        yield f"bytes to the {role} before any permit"
    if watch.permitted.total() > watch.allowed:
        yield f"{watch.permitted.total()} permits, of {watch.allowed} decisions to allow"
    for (method, path), number in Counter((one.method, one.path) for one in arrivals).items():
        permits = watch.permitted[path]
        if not permits:
            yield f"{method} {path} reached an upstream without a permit"
        elif number > permits * (1 if method == "POST" else _MAX_SENDINGS):
            yield f"{method} {path} reached an upstream {number} times, under {permits} permits"
    asked = Counter(one.path for one in told)
    for path, number in watch.handled.items():
        if number > asked[path]:
            yield f"{path} was asked {asked[path]} times and handled {number} times"
    wanted = {one.path: one.want for one in told}
    for arrival in arrivals:
        if (
            arrival.whole
            and arrival.method == "POST"
            and (not arrival.body or arrival.body not in wanted[arrival.path])
        ):
            yield f"{arrival.path} reached the upstream as whole, with another body: {arrival.body!r}"


def wrong_tunnels(ends: Sequence[TunnelEnd], told: Sequence[Told], faults: Faults) -> Iterator[str]:
    """An upstream that saw a tunnel end in order has got all that was ever said in it."""
    clients = {one.path: one for one in told if one.tunnel}
    ended_early = faults.ended_in_order and faults.hit_role == "client"
    for end in ends:
        if end.clean is None:
            yield f"endless: the tunnel {end.path}, at its upstream's end"
        elif end.clean and not ended_early and end.received != b"".join(WORDS):
            yield f"a tunnel that was cut off ended in order at its upstream's end, after {end.received!r}"
        elif not b"".join(WORDS).startswith(end.received):
            yield f"the tunnel {end.path} brought {end.received!r} of {clients[end.path].sent!r}"


def wrong_records(it: World, watch: Watch, told: Sequence[Told], faults: Faults) -> Iterator[str]:
    """One record for each exchange, connection and question, and a true one."""
    lines = it.access.events("exchange.ended")
    if len(lines) != watch.handled.total():
        yield f"{watch.handled.total()} requests, {len(lines)} records of exchanges"
    if len({line["exchange_id"] for line in lines}) != len(lines):
        yield "two records of one exchange"
    accepted = faults.wires.accepted["inbound"] + faults.wires.accepted["outbound"]
    if len(watch.connections) != accepted:
        yield f"{accepted} connections, {len(watch.connections)} records of connections"
    if watch.decided != watch.asked:
        yield f"{watch.asked} questions, {watch.decided} records of decisions"
    recorded = {(line["path"], line["status"]) for line in lines}
    yield from (
        f"{one}, and no record says so"
        for one in told
        if one.whole and not one.tunnel and (one.path, one.status) not in recorded
    )
    defects = [line["detail"] for line in lines if line["error"] == "internal_error"]
    defects += [record.detail for record in watch.connections if record.reason == "internal_error"]
    defects += [line for line in it.log.lines if line["event"].startswith("defect")]
    yield from (f"a defect: {detail}" for detail in defects)


def left_open(it: World, watch: Watch, faults: Faults) -> Iterator[str]:
    """What is there still, although every client has gone."""
    assert it.app is not None
    for role, number in Counter(faults.wires.open()).items():
        if role != "health" and not (role == "opa" and number <= _SPARE_OPA_CONNECTIONS):
            yield f"{number} sockets of role {role} are open"
    for server, _ in it.app._inbound + it.app._outbound:
        if server.open_connections:
            yield f"{server.open_connections} connections of {server.direction} are open"
        if server._admission._of_peer:
            yield f"connections are counted of {list(server._admission._of_peer)}"
    if it.app._live.view():
        yield f"in the live table: {it.app._live.view()}"
    yield from (f"{one.claimed} streams of a shared connection are claimed" for one in watch.shared if one.claimed)
    yield from (f"something is claimed of {pool}" for pool in it.app._client._pools.values() if not pool.unused)
    opa = it.app._decisions._opa
    if opa._turns.value != opa._max_connections:
        yield f"{opa._max_connections - opa._turns.value} questions are with OPA"
