"""The composition root of a bundle server: its configuration becomes objects, and these run in one nursery.

It has what a sidecar has (identity, an OPA of its own with a policy of its own, listeners, records, health), one listener for
mutual TLS, and behind it no agent but the fleet.

Start: what can be refused comes first (identity, database, sockets, policy); health answers from then on, and callers are
accepted once policy is in force and the store has handed out what the fleet runs. Stop: readiness goes false, whoever waits for a
bundle is answered, and what is open finishes within `timeouts.drain`. SIGHUP opens the access log anew, and no more: identity
files and the policy's source are watched, and everything else needs a restart, at which nothing is lost.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from sidecar import apart, parts
from sidecar.bundles import keys
from sidecar.bundles.archive import Bounds
from sidecar.config import Config, OpaExternal, PolicyKey
from sidecar.config.fleet import DatabaseAt, FleetConfig
from sidecar.decision.external import External
from sidecar.errors import OperatorFault, SidecarError
from sidecar.exchange import Pipeline
from sidecar.fleet import store as stores
from sidecar.fleet.program import Served
from sidecar.fleet.server import Fleet, Limits
from sidecar.fleet.shelf import Terms
from sidecar.fleet.state import State
from sidecar.identity import pem_files
from sidecar.identity.current import Current
from sidecar.identity.presented import Presented
from sidecar.keeping import Keeping
from sidecar.listeners import Listeners
from sidecar.log import Level, LineSink, Log
from sidecar.management.health import Health
from sidecar.model import Address, Anonymous, Status
from sidecar.records import Records
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import Metrics
from sidecar.serving import Serving
from sidecar.supply import Supply
from sidecar.wire.client import Client
from sidecar.wire.handover import Alone
from sidecar.wire.listening import Listener
from sidecar.wire.network import Network
from sidecar.wire.server import Server

_FLUSH_INTERVAL = 0.2
_STORE_RETRY = 2.0


class FleetApp:
    """One bundle server. `serve` is its whole life."""

    def __init__(
        self,
        config: FleetConfig,
        *,
        network: Network,
        log: Log,
        access: LineSink | None,
        lost: Callable[[], int] = lambda: 0,
        activated: Mapping[Address, Listener] | None = None,
        max_descriptor: int | None = None,
    ) -> None:
        """`lost`, `activated` and `max_descriptor` as of a sidecar. Raises `OperatorFault`."""
        self.config = config
        self._shared = shared = _shared(config)
        self._log = log
        self._access = access
        self._max_descriptor = max_descriptor
        self._listeners = Listeners(network, activated=activated or {}, succession=Alone())
        self._stopping = trio.CancelScope()
        self._draining = False
        self._listening = False
        self._current = Current()
        self._presented = Presented(self._current, log=self._event)
        self._live = LiveTable()
        self._serving = Serving(log=self._event, counted=self._happened)
        self._metrics = Metrics(
            live=self._live, directions=("fleet",), connections=self._serving.open_connections, dropped=lost,
            kept=lambda: self._decision_log.account() if self._decision_log is not None else None,
            sharing=lambda: self._decisions.sharing_use,
        )  # fmt: skip
        self._records = Records(self._metrics, access.write if access is not None else None)
        self._client = Client(network, self._presented.in_use, parts.client_settings(shared), log=self._event)
        self._decisions = self._decision_point(network)
        if isinstance(self._decisions, Supply):
            self._records.tell(self._decisions.decided)
        self._decision_log = (
            Keeping(shared, client=self._client, log=self._event) if config.decision_log is not None else None
        )
        if self._decision_log is not None:
            self._records.tell(self._decision_log.decided)
        self._fleet: Fleet | None = None

    async def serve(self, signals: AsyncIterator[int], started: Callable[[], None] = lambda: None) -> None:
        """Start, serve until SIGTERM or SIGINT, drain. Raises `OperatorFault` where the start is refused."""
        refused: OperatorFault | None = None
        try:
            _made(self.config.state_dir)
            self._presented.publish(pem_files.read(self.config.identity, time.time()).identity)
            terms = {
                name: Terms(keys=_keys(name, one.keys), scope=one.scope) for name, one in self.config.bundles.items()
            }
            store = stores.opened(
                self.config.store.where, endpoint=self.config.store.endpoint, allow_http=self.config.store.allow_http
            )
            state = await State.open(self.config.database.where, _password(self.config.database))
            limits = Limits(
                bounds=Bounds(max_archive_bytes=self.config.max_archive_bytes), forget_after=self.config.forget_after
            )
            fleet = Fleet(
                terms, state=state, store=store, log=self._event, limits=limits,
                in_force=lambda: self._decisions.bundle_revision,
            )  # fmt: skip
        except OperatorFault:
            self._listeners.close()
            raise
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self._obey, signals)
                with self._stopping:
                    await self._start(nursery, fleet)
                    started()
                    self._event("sidecar.started", mtls_mode="strict")
                    await trio.sleep_forever()
                if self._listening:
                    await self._drain(fleet)
            except OperatorFault as fault:
                refused = fault
            finally:
                self._listeners.close()
                if self._decision_log is not None:
                    await self._decision_log.finish()
                nursery.cancel_scope.cancel()
        await self._decisions.stop()
        await state.close()
        if refused is not None:
            raise refused
        self._event("sidecar.stopped")

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                self._stopping.cancel()
            else:
                self._reopen()

    def _reopen(self) -> None:
        try:
            if self._access is not None:
                self._access.reopen()
        except OperatorFault as fault:
            self._event("config.reload_refused", "error", code=fault.code, detail=str(fault))
        else:
            self._event(
                "log.reopened",
                detail="identity files and the source of policy are watched; everything else needs a restart",
            )

    async def _start(self, nursery: trio.Nursery, fleet: Fleet) -> None:
        await fleet.start()
        nursery.start_soon(partial(pem_files.watch, self._current, self.config.identity, log=self._event))
        nursery.start_soon(self._presented.follow)
        await self._listen(fleet)
        nursery.start_soon(self._flush_forever)
        await nursery.start(self._client.run)
        if self._decision_log is not None:
            nursery.start_soon(self._decision_log.run)
        self._serving.accept(nursery, self._serving.health)
        try:
            await nursery.start(self._decisions.run)
        except OperatorFault as fault:
            raise parts.about_policy(fault, self._shared) from fault
        nursery.start_soon(fleet.watch)
        await self._until_store_answers(fleet)
        self._serving.accept(nursery, self._serving.inbound)
        self._listening = True

    async def _until_store_answers(self, fleet: Fleet) -> None:
        told = False
        while True:
            try:
                return await fleet.warm_up()
            except SidecarError as fault:
                if not told:
                    told = True
                    self._event("fleet.request_failed", "error", code=fault.code, reason=fault.detail)
            await trio.sleep(_STORE_RETRY)

    async def _drain(self, fleet: Fleet) -> None:
        self._draining = True
        self._event("sidecar.drain_started", timeout=self.config.timeouts.drain, reason="signal")
        with trio.move_on_after(self.config.timeouts.drain) as patience:
            fleet.drain()
            await self._serving.finish(self._serving.inbound)
        if patience.cancelled_caught:
            left = sum(server.open_connections for server, _ in self._serving.inbound)
            self._event("sidecar.drain_timed_out", "warning", connections=left)

    async def _flush_forever(self) -> None:
        while self._access is not None:
            await trio.sleep(_FLUSH_INTERVAL)
            self._access.flush()

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _listen(self, fleet: Fleet) -> None:
        addresses = {"listen": self.config.listen}
        if self.config.health is not None:
            addresses["health.listen"] = self.config.health.listen
        found = await self._listeners.open(addresses)
        seen, bounds = parts.seen(self._shared), parts.bounds(self._shared)
        program = Served(fleet, seen=lambda: seen, pseudonym=f"fleet-{os.urandom(4).hex()}".encode())
        pipeline = Pipeline(
            program=program, decisions=self._decisions, client=self._client, recorder=self._records,
            live=self._live, bounds=lambda: bounds,
        )  # fmt: skip
        settings = parts.server_settings(
            self._shared, mode="strict", allow_encoded_slash=False, max_descriptor=self._max_descriptor
        )
        server = Server(
            direction=program.direction, plaintext_peer=Anonymous(reason="plaintext"), handle=pipeline.handle,
            settings=settings, ended=self._records.connection, credentials=self._presented.in_use,
        )  # fmt: skip
        self._serving.inbound.append((server, found["listen"]))
        if self.config.health is not None:
            health = Health(status=self.status, metrics=lambda: self._metrics.exposition(self.status()))
            server = Server(
                direction="health", plaintext_peer=Anonymous(reason="plaintext"), handle=health.handle,
                settings=parts.HEALTH, ended=lambda _record: None, credentials=lambda: None,
            )  # fmt: skip
            self._serving.health.append((server, found["health.listen"]))

    def _decision_point(self, network: Network) -> Supply | External:
        if isinstance(self.config.opa, OpaExternal):
            return External(
                self.config.opa.socket, network, peer_uid=self.config.opa.peer_uid, log=self._event,
                decision_timeout=self.config.timeouts.decision,
            )  # fmt: skip
        return Supply(self._shared, network=network, client=self._client, log=self._event, do=apart.in_thread)

    def _event(self, name: str, level: Level = "info", /, **fields: object) -> None:
        """Tell, and count, something that happened to us."""
        self._happened(name)
        self._log.event(name, level, **fields)

    def _happened(self, name: str, /) -> None:
        self._metrics.happened(name)

    def status(self) -> Status:
        identity = self._current.identity
        return Status(
            identity=self._current.state(time.time()),
            identity_id=str(identity.id) if identity is not None else None,
            identity_not_after=identity.not_after if identity is not None else None,
            identity_generation=self._current.generation,
            identity_error=self._current.error,
            bundle=self._decisions.bundle_state,
            bundle_revision=self._decisions.bundle_revision,
            bundle_error=self._decisions.bundle_error,
            opa=self._decisions.state,
            opa_restarts=self._decisions.restarts,
            listeners=self._listening,
            draining=self._draining,
            cache=self._decisions.cache_use,
        )


def _shared(config: FleetConfig) -> Config:
    """What a server has in common with a sidecar, as the parts that they have in common are told of it."""
    return Config(
        mtls_mode="strict", state_dir=config.state_dir, identity=config.identity, opa=config.opa, policy=config.policy,
        policy_input=config.policy_input, decision_log=config.decision_log, health=config.health,
        timeouts=config.timeouts, limits=config.limits, log=config.log,
    )  # fmt: skip


def _made(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OperatorFault(f"state_dir: {directory}: {error.strerror}", code="state_dir_unusable") from error


def _keys(bundle: str, named: Mapping[str, PolicyKey]) -> dict[str, keys.VerifyingKey]:
    """The keys of one bundle. Raises `OperatorFault`."""
    found = {}
    for name, key in named.items():
        where = f"bundles.{bundle}.keys.{name}.file: {key.file}"
        try:
            found[name] = keys.public_key(key.algorithm, key.file.read_bytes())
        except OSError as error:
            raise OperatorFault(f"{where}: {error.strerror}", code="policy_key_unreadable") from error
        except OperatorFault as fault:
            raise OperatorFault(f"{where} {fault}", code=fault.code) from fault
    return found


def _password(database: DatabaseAt) -> str | None:
    if database.password is None:
        return None
    try:
        return database.password.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise OperatorFault(f"database.password: {database.password}: {why}", code="fleet_database_unusable") from error
