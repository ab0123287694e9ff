"""A worker: one of several processes that carry the requests of one sidecar (`supervisor` says why, and who owns what).

It has listening sockets from its supervisor, and one channel to it, over which it is told everything: configuration, identity,
the OPA to ask, when to begin and when to end. It opens no file but the memory of proofs, starts nothing, and listens to no
signal. Where the supervisor is silent it goes on with what it has, whose own ends (of the identity, of policy) it
knows; where the supervisor has ended, so has it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from dataclasses import asdict

import trio

from sidecar import __version__, orders, parts
from sidecar.bundles.freshness import FreshOnly
from sidecar.decision.envoy import words
from sidecar.decision.inquiry import OURS
from sidecar.decision.lent import Lent
from sidecar.decision.opa import Opa
from sidecar.decision.remembered import Remembered
from sidecar.decision.sharing import Sharing
from sidecar.errors import OperatorFault
from sidecar.identity.current import Current
from sidecar.identity.presented import Presented
from sidecar.log import Level, LineSink, Log
from sidecar.model import Allow, Decided, Identity
from sidecar.orders import Begin
from sidecar.records import Records
from sidecar.records.added import as_json
from sidecar.records.decision_log import DecisionLog
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import Metrics
from sidecar.serving import Serving
from sidecar.surroundings import die_with, hear_libraries, settle
from sidecar.traffic import Traffic
from sidecar.wire import listening
from sidecar.wire.channel import Channel
from sidecar.wire.client import Client
from sidecar.wire.listening import TcpListener
from sidecar.wire.network import TcpNetwork
from sidecar.wire.queues import Queues

_FLUSH_INTERVAL = 0.2
_BATCH_BYTES = 65_536
_LAST_WORDS = 1.0


def main() -> None:
    """Run as a worker: `… descriptor-of-the-channel process-id-of-the-supervisor version-of-the-supervisor`."""
    descriptor, parent = map(int, sys.argv[1:3])
    die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What a terminal or a service manager sends to all of us is the supervisor's to obey.
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    sys.exit(trio.run(_live, Channel(sock), sys.argv[3]))


async def _live(channel: Channel, version: str) -> int:
    try:
        if version != __version__:
            raise OperatorFault(
                f"{__version__} is installed by now, and {version} runs: start the new one beside it",
                code="worker_version",
            )
        begin = await _next(channel)
        if not isinstance(begin, Begin):
            return 1
        await Worker(begin, channel).run()
    except OperatorFault as fault:
        channel.send(orders.WORD, orders.word({"failed": fault.code, "detail": str(fault)}))
        return 1
    finally:
        channel.finish(_LAST_WORDS)
        channel.close()
    return 0


async def _next(channel: Channel) -> orders.Order | None:
    """None where the supervisor has ended."""
    try:
        kind, payload = await channel.receive()
        return orders.order(payload) if kind == orders.ORDER else None
    except (EOFError, ValueError):
        return None


class Worker:
    """Raises `OperatorFault` where it cannot begin."""

    def __init__(self, begin: Begin, channel: Channel) -> None:
        config, self._channel, self._number = begin.config, channel, begin.worker
        self._begin = begin
        errors = LineSink(sys.stderr.fileno())
        self._log = Log(errors, level=config.log.level)
        hear_libraries(self._log)
        self._access = _Lines(channel, orders.ACCESS)
        self._decisions_kept = _Lines(channel, orders.DECISION)
        self._live_table = LiveTable()
        self._serving = Serving(log=self._event, counted=self._happened)
        self._metrics = Metrics(
            live=self._live_table, directions=("inbound", "outbound"), connections=self._serving.open_connections,
            dropped=lambda: self._log.failed + errors.dropped + self._access.dropped,
            sharing=lambda: self._lent.sharing_use if config.policy is not None else None,
        )  # fmt: skip
        self._records = Records(self._metrics, self._access.write if config.log.access != "none" else None)
        self._sample = begin.sample
        self._counts = [0, 0, 0]
        """Allowed, denied, undecided since it was last told."""
        self._counted_revision: str | None = None
        self._kept: DecisionLog | None = None
        self._not_compared = 0
        """Decisions of the sample, since it was last told."""
        self._not_kept = (0, 0)
        """Decisions that failed to be kept, and events that were dropped, as last told."""
        if config.policy is not None and config.policy.report:
            self._records.tell(self._count)
        if config.policy is not None and config.policy.shadow is not None:
            self._records.tell(self._compare)
        spoken = words(config.policy.decision if config.policy and config.policy.input == "envoy" else None)
        if config.decision_log is not None:
            from sidecar.keeping import log_of  # noqa: PLC0415  most sidecars keep none

            self._kept = log_of(config, [self._decisions_kept], begin.labels)
            self._records.tell(self._kept.decided)
        self._current = Current()
        self._presented = Presented(self._current, log=self._event)
        network = TcpNetwork()
        self._client = Client(network, self._presented.in_use, parts.client_settings(config), log=self._event)
        self._lent = Lent(
            network, decision_timeout=config.timeouts.decision, words=spoken,
            max_together=config.policy.max_together if config.policy is not None else 1,
        )  # fmt: skip
        self._remembered = Remembered(
            self._lent, path=OURS.path if config.policy is not None and config.policy.input == "sidecar" else None,
            bounds=parts.cache_bounds(config.policy) if config.policy is not None else None,
        )  # fmt: skip
        self._traffic = Traffic(
            config, client=self._client, decisions=FreshOnly(self._remembered, self._lent.stale),
            presented=self._presented, records=self._records, live=self._live_table, serving=self._serving,
            event=self._event, pseudonym=begin.pseudonym, max_descriptor=listening.max_descriptor(),
        )  # fmt: skip
        self._queues: dict[str, Queues] = {}
        self._retired = trio.Event()
        """Set when whoever was asked before the last order to `Lend` is asked nothing any more."""
        self._retired.set()

    async def run(self) -> None:
        """Be told what to do, until `Stop` or the supervisor's end."""
        refused: OperatorFault | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._channel.run)
                try:
                    await self._start(nursery)
                    while (order := await _next(self._channel)) is not None and not isinstance(order, orders.Stop):
                        await self._obey(order, nursery)
                except OperatorFault as fault:
                    refused = fault  # raised below: a nursery would wrap it into a group
                nursery.cancel_scope.cancel()
        finally:
            self._flush()
            self._tell(None)
        if refused is not None:
            raise refused

    async def _start(self, nursery: trio.Nursery) -> None:
        begin = self._begin
        self._queues = {
            key: Queues([TcpListener(_ours(one), listens=False) for one in descriptors], ())
            for key, descriptors in begin.sockets.items()
        }
        if begin.identity is not None:
            self._presented.publish(begin.identity)
        await nursery.start(self._lent.run)
        if begin.lending is not None:
            self._lent.lend(begin.lending)
        self._lent.offered = begin.offered
        nursery.start_soon(self._flush_forever)
        await nursery.start(self._client.run)
        await nursery.start(self._remembered.run)
        await self._traffic.open(nursery, self._queues)
        await self._traffic.accept(nursery)  # from no queue yet
        settle()
        self._say({"is": "ready"})

    # ── orders ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _obey(self, order: orders.Order, nursery: trio.Nursery) -> None:
        match order:
            case orders.Tell():
                self._tell(order.number)
            case orders.Serve():
                for key, positions in order.queues.items():
                    self._queues[key].look_at(positions)
            case orders.Present():
                self._present(order.identity)
            case orders.Offered():
                self._lent.offered = order.on_its_way
            case orders.Lend():
                earlier, self._retired = self._retired, trio.Event()
                before = self._lent.lend(order.lending)
                nursery.start_soon(self._retire, before, earlier, self._retired, order.number)
            case orders.Prepare():
                await self._prepare(order)
            case orders.Apply():
                await self._apply(order)
            case orders.Abandon():
                await self._traffic.abandon()
            case orders.LetGo():
                self._let_go(order)
            case orders.Finish():
                nursery.start_soon(self._finish, order)
            case orders.Compare():
                self._sample = order.sample

    def _present(self, identity: Identity) -> None:
        """Raises `OperatorFault` where TLS cannot be spoken with it: then we are of no use."""
        self._presented.publish(identity)

    def _let_go(self, order: orders.LetGo) -> None:
        for key, queues in self._queues.items():
            if order.side == "both" or key.startswith(order.side):
                queues.let_go()
        self._obeyed(order.number)

    async def _retire(
        self, before: Opa | Sharing | None, earlier: trio.Event, retired: trio.Event, number: int
    ) -> None:
        """Nothing is under way any more at any that was asked before: one that stays may have been lent twice."""
        if before is not None:
            await before.aclose()
        await earlier.wait()
        self._obeyed(number)
        retired.set()

    async def _prepare(self, order: orders.Prepare) -> None:
        try:
            await self._traffic.prepare(order.config)
        except OperatorFault as fault:
            self._obeyed(order.number, (fault.code, str(fault)))
        else:
            self._obeyed(order.number)

    async def _apply(self, order: orders.Apply) -> None:
        if not self._traffic.prepared:
            await self._traffic.prepare(order.config)
        await self._traffic.apply()
        config = self._traffic.config
        self._log.level = config.log.level
        self._lent.decision_timeout = config.timeouts.decision
        if config.policy is not None:
            self._remembered.resize(parts.cache_bounds(config.policy))
        if order.identity is not None:
            self._present(order.identity)
        self._obeyed(order.number)

    async def _finish(self, order: orders.Finish) -> None:
        await self._traffic.finish(order.side)
        self._flush()
        self._tell(None)
        self._obeyed(order.number)

    # ── what is said ──────────────────────────────────────────────────────────────────────────────────────────────

    def _say(self, said: dict[str, object]) -> None:
        self._channel.send(orders.WORD, orders.word(said))

    def _obeyed(self, number: int, refused: tuple[str, str] | None = None) -> None:
        self._say({"obeyed": number, "refused": refused})

    def _tell(self, number: int | None) -> None:
        counts, self._counts = self._counts, [0, 0, 0]
        not_compared, self._not_compared = self._not_compared, 0
        failed, dropped = self._not_kept
        self._not_kept = (self._kept.failed if self._kept is not None else 0, self._decisions_kept.dropped)
        self._say(
            {
                "told": number,
                "open": self._traffic.open_connections,
                "measured": as_json(self._metrics.measured()),
                "cache": asdict(self._remembered.use),
                "decided": [self._counted_revision, *counts],
                "not_compared": not_compared,
                "kept": [self._not_kept[0] - failed, self._not_kept[1] - dropped],
            }
        )

    async def _flush_forever(self) -> None:
        while True:
            await trio.sleep(_FLUSH_INTERVAL)
            self._flush()

    def _flush(self) -> None:
        self._access.flush()
        self._decisions_kept.flush()

    def _happened(self, name: str, /) -> None:
        self._metrics.happened(name)

    def _event(self, name: str, level: Level = "info", /, **fields: object) -> None:
        self._happened(name)
        self._log.event(name, _LEVELS.get(name, level), worker=self._number, **fields)

    # ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self, record: Decided) -> None:
        if self._counted_revision != self._lent.revision:
            self._counted_revision, self._counts = self._lent.revision, [0, 0, 0]
        self._counts[2 if record.decision is None else 0 if isinstance(record.decision, Allow) else 1] += 1

    def _compare(self, record: Decided) -> None:
        if self._sample and record.decision is not None and random.random() < self._sample:  # noqa: S311
            told = orders.compared(record)
            if told is None or not self._channel.offer(orders.COMPARED, told):
                self._not_compared += 1


_LEVELS: dict[str, Level] = {"upstream.ejected": "warning"}
"""Of events whose teller knows no levels."""


class _Lines:
    """Lines on their way to the supervisor. What it does not take is dropped, and counted."""

    def __init__(self, channel: Channel, kind: bytes) -> None:
        self.dropped = 0
        self._channel = channel
        self._kind = kind
        self._lines: list[bytes] = []
        self._bytes = 0

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._bytes += len(line) + 1
        if self._bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            lines, self._lines, self._bytes = self._lines, [], 0
            if not self._channel.offer(self._kind, b"\n".join(lines)):
                self.dropped += len(lines)


def _ours(descriptor: int) -> socket.socket:
    """A socket that was passed to us, and is passed on to nobody."""
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
