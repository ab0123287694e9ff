"""The composition root: a configuration becomes objects, and these run in one nursery.

Start: what can be refused comes first (identity, sockets, policy), so that a sidecar which cannot serve does not look
alive; health answers from the beginning, the other listeners accept last. Stop: readiness goes false, inbound stops
accepting and finishes, outbound goes on until no inbound exchange can need it any more, OPA goes last; one deadline
covers all of it. A reload makes everything that can fail before it changes anything.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable

import trio

from sidecar import config as configuration
from sidecar.attempt import Seen
from sidecar.config import Config, FilesIdentity, InboundListener, OpaExternal
from sidecar.decision import install, private
from sidecar.decision.engine import Engine
from sidecar.decision.external import External
from sidecar.decision.policy import Policy
from sidecar.errors import OperatorFault
from sidecar.exchange import Pipeline, Program
from sidecar.identity import pem_files, verify
from sidecar.identity.current import Current
from sidecar.identity.proven import Proven
from sidecar.inbound import Inbound
from sidecar.log import Level, LineSink, Log
from sidecar.management.health import Health
from sidecar.model import Address, Anonymous, LocalProcess, Mode, Peer, Status
from sidecar.outbound import Outbound, Routes
from sidecar.records import Records
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import Metrics
from sidecar.wire import tls
from sidecar.wire.client import Client, ClientSettings
from sidecar.wire.h1_server import Handle, Limits
from sidecar.wire.headers import fold
from sidecar.wire.network import Listener, Network, TcpNetwork
from sidecar.wire.server import Server, Settings

_FLUSH_INTERVAL = 0.2
_HEALTH_LIMITS = Limits(max_header_bytes=8192, max_header_fields=50, header_timeout=5.0, idle_timeout=60.0)
_HEALTH_CONNECTIONS = 64

Load = Callable[[], Config]


def run(load: Load) -> int:
    """Serve as the configuration says until SIGTERM or SIGINT. Raises `OperatorFault` for a start that is refused."""
    config = load()
    errors = LineSink(sys.stderr.fileno())
    access = _access_sink(config)
    log = Log(errors, level=config.log.level)
    # ssl decodes a server name before it asks us, and tells of what it cannot decode on standard error, in no JSON.
    sys.unraisablehook = lambda told: log.warning("defect.ignored", detail=type(told.exc_value).__name__)
    app = App(
        config, load=load, network=TcpNetwork(), log=log, access=access,
        lost=lambda: log.failed + errors.dropped + (access.dropped if access is not None else 0),
    )  # fmt: skip
    try:
        trio.run(_serve, app)
    finally:
        errors.flush()
        if access is not None:
            access.close()
    return 0


async def _serve(app: App) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        await app.serve(signals, started=_settle)


def _settle() -> None:
    """Take what lives as long as we do out of the collector's sight, and have it look less often: a request makes some
    hundred containers and no cycles, so that most looks find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _access_sink(config: Config) -> LineSink | None:
    match config.log.access:
        case "none":
            return None
        case "stdout":
            return LineSink(sys.stdout.fileno())
        case path:
            return LineSink.open(path)


class App:
    """One sidecar. `serve` is its whole life."""

    def __init__(
        self,
        config: Config,
        *,
        load: Load,
        network: Network,
        log: Log,
        access: LineSink | None,
        lost: Callable[[], int] = lambda: 0,
    ) -> None:
        """`lost` tells how many lines of both logs were lost."""
        self.config = config
        self._load = load
        self._network = network
        self._log = log
        self._access = access
        self._draining = False
        self._listening = False
        self._current = Current()
        self._credentials: tls.Credentials | None = None
        self._proven = Proven(config.state_dir / "proven.json")
        self._live = LiveTable()
        self._metrics = Metrics(
            live=self._live, directions=("inbound", "outbound"), connections=self._open_connections,
            dropped=lost,
        )  # fmt: skip
        self._records = Records(self._metrics, access.write if access is not None else None)
        self._client = Client(network, self.credentials, _client_settings(config))
        self._decisions = self._decision_point(config)
        self._seen = _seen(config)
        self._routes = Routes(config.outbound.routes, config.outbound.mtls_mode) if config.outbound else None
        self._watching = trio.CancelScope()
        self._pseudonym = f"sidecar-{os.urandom(4).hex()}"
        self._inbound: list[tuple[Server, Listener]] = []
        self._outbound: list[tuple[Server, Listener]] = []
        self._health: list[tuple[Server, Listener]] = []

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self, signals: AsyncIterator[int], started: Callable[[], None] = lambda: None) -> None:
        """Start, serve until SIGTERM or SIGINT, drain. Raises `OperatorFault` where the start is refused.

        `started` is called once all of it is there.
        """
        refused: OperatorFault | None = None
        async with trio.open_nursery() as nursery:
            try:
                await self._start(nursery)
                started()
                self._event("sidecar.started", mtls_mode=self.config.mtls_mode, mode_from=self.config.mtls_mode_source)
                async for number in signals:
                    if number != signal.SIGHUP:
                        break
                    await self._reload(nursery)
                await self._drain()
            except OperatorFault as fault:
                refused = fault
            finally:
                for _, listener in self._inbound + self._outbound + self._health:
                    listener.close()
                nursery.cancel_scope.cancel()
        await self._decisions.stop()
        if refused is not None:
            raise refused
        self._event("sidecar.stopped")

    async def _start(self, nursery: trio.Nursery) -> None:
        self.config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._load_proofs()
        if self.config.identity is not None:
            self._publish(pem_files.read(self.config.identity, time.time()))
            nursery.start_soon(self._watch, self.config.identity)
            nursery.start_soon(self._follow_identity)
        await self._bind()
        nursery.start_soon(self._flush_forever)
        await nursery.start(self._client.run)
        self._accept(nursery, self._health)
        try:
            await nursery.start(self._decisions.run)
        except OperatorFault as fault:
            raise _about_policy(fault, self.config) from fault
        self._accept(nursery, self._inbound + self._outbound)
        self._listening = True

    async def _drain(self) -> None:
        """Finish what is open, in the order in which it may still be needed; cut off what is left at the deadline."""
        self._draining = True
        self._event("sidecar.drain_started", timeout=self.config.timeouts.drain)
        with trio.move_on_after(self.config.timeouts.drain) as patience:
            await self._finish(self._inbound)
            await self._finish(self._outbound)
        left = sum(server.open_connections for server, _ in self._inbound + self._outbound)
        if patience.cancelled_caught:
            self._event("sidecar.drain_timed_out", "warning", connections=left)

    async def _finish(self, servers: list[tuple[Server, Listener]]) -> None:
        for server, listener in servers:
            listener.close()
            server.drain()
        for server, _ in servers:
            await server.wait_empty()

    def _accept(self, nursery: trio.Nursery, servers: list[tuple[Server, Listener]]) -> None:
        for server, listener in servers:
            nursery.start_soon(server.serve, listener, self._accept_failed)

    def _accept_failed(self, error: OSError) -> None:
        self._event("connection.accept_failed", "warning", detail=str(error))

    async def _flush_forever(self) -> None:
        while self._access is not None:
            await trio.sleep(_FLUSH_INTERVAL)
            self._access.flush()

    # ── listeners ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _bind(self) -> None:
        config = self.config
        for number, one in enumerate(config.inbound):
            program = Inbound(
                mode=one.mtls_mode, agent=one.upstream, xfcc=one.xfcc, seen=lambda: self._seen,
                pseudonym=f"{self._pseudonym}-in".encode(),
            )  # fmt: skip
            server = self._server(program, one.mtls_mode, Anonymous(reason="plaintext"), self._limits(one))
            self._inbound.append((server, await self._listen(f"inbound[{number}].listen", one.listen)))
        if config.outbound is not None and self._routes is not None:
            outbound = Outbound(
                mode=config.outbound.mtls_mode, routes=self._routes_in_force, own_id=self._own_id,
                seen=lambda: self._seen, proven=self._proven, remember_failed=self._remember_failed,
                pseudonym=f"{self._pseudonym}-out".encode(),
            )  # fmt: skip
            server = self._server(outbound, None, LocalProcess(), self._limits(self._routes))
            self._outbound.append((server, await self._listen("outbound.listen", config.outbound.listen)))
        if config.health is not None:
            health = Health(status=self.status, metrics=lambda: self._metrics.exposition(self.status()))
            server = self._plain_server(health.handle)
            self._health.append((server, await self._listen("health.listen", config.health.listen)))

    async def _listen(self, key: str, at: Address) -> Listener:
        try:
            return await self._network.listen(at)
        except OSError as error:
            raise OperatorFault(f"{key}: {at}: {error.strerror or error}", code="listen_refused") from error

    def _server(self, program: Program, mode: Mode | None, plaintext_peer: Peer, limits: Limits) -> Server:
        pipeline = Pipeline(
            program=program, decisions=self._decisions, client=self._client, recorder=self._records,
            live=self._live,
            idle_timeout=lambda: self.config.timeouts.idle,
        )  # fmt: skip
        return Server(
            direction=program.direction, plaintext_peer=plaintext_peer, handle=pipeline.handle,
            settings=_settings(self.config, mode, limits), ended=self._records.connection, credentials=self.credentials,
        )  # fmt: skip

    def _plain_server(self, handle: Handle) -> Server:
        settings = Settings(
            mode=None, limits=_HEALTH_LIMITS, handshake_timeout=_HEALTH_LIMITS.header_timeout,
            max_connections=_HEALTH_CONNECTIONS,
        )  # fmt: skip
        return Server(
            direction="health", plaintext_peer=Anonymous(reason="plaintext"), handle=handle, settings=settings,
            ended=lambda _record: None, credentials=lambda: None,
        )  # fmt: skip

    def _limits(self, of: InboundListener | Routes) -> Limits:
        config = self.config
        return Limits(
            max_header_bytes=config.limits.max_header_bytes, max_header_fields=config.limits.max_header_fields,
            max_streams=config.limits.max_streams, header_timeout=config.timeouts.header,
            idle_timeout=config.timeouts.idle, linger_timeout=config.timeouts.lingering,
            allow_encoded_slash=of.allow_encoded_slash,
        )  # fmt: skip

    # ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────

    def credentials(self) -> tls.Credentials | None:
        """What handshakes use now; None while there is no identity, or when it has expired."""
        credentials = self._credentials
        return credentials if credentials is not None and time.time() < credentials.identity.not_after else None

    def _own_id(self) -> str | None:
        credentials = self.credentials()
        return str(credentials.identity.id) if credentials is not None else None

    def _publish(self, reading: pem_files.Reading) -> None:
        self._current.publish(reading.identity)
        identity = self._current.identity
        self._credentials = tls.Credentials(identity, verify.judge) if identity is not None else None

    async def _watch(self, files: FilesIdentity) -> None:
        with trio.CancelScope() as self._watching:
            await pem_files.watch(self._current, files, log=self._event)

    async def _follow_identity(self) -> None:
        async for identity in self._current.snapshots():
            if self._credentials is None or self._credentials.generation != identity.generation:
                try:
                    self._credentials = tls.Credentials(identity, verify.judge)
                except OperatorFault as fault:
                    self._current.fail(fault.code)
                    self._event("identity.refused", "error", code=fault.code, detail=str(fault))

    # ── policy ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decision_point(self, config: Config) -> Engine | External:
        if isinstance(config.opa, OpaExternal):
            return External(
                config.opa.socket, self._network, peer_uid=config.opa.peer_uid, log=self._event,
                decision_timeout=config.timeouts.decision,
            )  # fmt: skip
        binary = install.find()
        if binary is None:
            raise OperatorFault("opa: OPA is not installed; run `sidecar opa install`", code="opa_missing")
        return Engine(
            _policy(config), self._network, binary=binary, log=self._event,
            runtime_dir=private.place(config.state_dir, os.environ.get("XDG_RUNTIME_DIR")),
            decision_timeout=config.timeouts.decision,
        )  # fmt: skip

    # ── reload ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _reload(self, nursery: trio.Nursery) -> None:
        """Take up a changed configuration, whole or not at all; then whatever its files hold now."""
        try:
            new = await trio.to_thread.run_sync(self._load)
            changed = configuration.changes(self.config, new)
            if changed.refused:
                raise OperatorFault(f"needs a restart: {', '.join(changed.refused)}", code="reload_needs_restart")
            reading = pem_files.read(new.identity, time.time()) if new.identity is not None else None
            if reading is not None:
                tls.Credentials(reading.identity, verify.judge)
            routes = Routes(new.outbound.routes, new.outbound.mtls_mode) if new.outbound is not None else None
            if isinstance(self._decisions, Engine):
                await self._reload_policy(self._decisions, new)
            if self._access is not None:
                self._access.reopen()
        except OperatorFault as fault:  # a `ConfigError` tells all its problems at once
            self._event("config.reload_refused", "error", code=fault.code, detail=str(fault))
            return
        self._apply(new, routes, reading, nursery)
        self._event("config.reloaded", changed=list(changed.live))

    async def _reload_policy(self, engine: Engine, new: Config) -> None:
        policy = _policy(new)
        try:
            await engine.reload(policy)
        except OperatorFault as fault:
            raise _about_policy(fault, new) from fault

    def _apply(
        self, new: Config, routes: Routes | None, reading: pem_files.Reading | None, nursery: trio.Nursery
    ) -> None:
        """Nothing in here can fail."""
        old, self.config = self.config, new
        self._log.level = new.log.level
        self._seen = _seen(new)
        self._routes = routes
        self._client.settings = _client_settings(new)
        for number, (server, _) in enumerate(self._inbound):
            server.settings = _settings(new, server.settings.mode, self._limits(new.inbound[number]))
        if routes is not None:
            for server, _ in self._outbound:
                server.settings = _settings(new, None, self._limits(routes))
        if reading is not None:
            self._publish(reading)  # what is reported as taken up is in force, and not with the watcher's next look
        if new.identity is not None and new.identity != old.identity:
            self._watching.cancel()
            nursery.start_soon(self._watch, new.identity)

    def _load_proofs(self) -> None:
        try:
            self._proven.load()
        except OperatorFault as fault:
            self._event("proofs.unreadable", "error", code=fault.code, detail=str(fault))

    def _remember_failed(self, target: str, error: OSError) -> None:
        self._event("proofs.not_kept", "error", target=target, detail=str(error))

    def _routes_in_force(self) -> Routes:
        assert self._routes is not None  # noqa: S101  (a listener without routes is never made)
        return self._routes

    def _open_connections(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for server, _ in self._inbound + self._outbound + self._health:
            counts[server.direction] = counts.get(server.direction, 0) + server.open_connections
        return counts

    def _event(self, name: str, level: Level = "info", /, **fields: object) -> None:
        """Tell, and count, something that happened to us."""
        level = _LEVELS.get(name, level)
        self._metrics.happened(name)
        self._log.event(name, level, **fields)

    # ── what is known of us ───────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> Status:
        now = time.time()
        identity = self._current.identity
        needed = self.config.identity is not None
        return Status(
            identity=self._current.state(now) if needed else "ok",
            identity_id=str(identity.id) if identity is not None else None,
            identity_not_after=identity.not_after if identity is not None else None,
            identity_generation=self._current.generation,
            identity_error=self._current.error,
            bundle="ok" if self.config.policy is None or self._decisions.bundle_revision is not None else "missing",
            bundle_revision=self._decisions.bundle_revision,
            bundle_error=self._decisions.bundle_error,
            opa=self._decisions.state,
            opa_restarts=self._decisions.restarts,
            listeners=self._listening,
            draining=self._draining,
        )


_LEVELS: dict[str, Level] = {"identity.update_failed": "error", "identity.warning_raised": "warning"}
"""Of events whose teller knows no levels."""


def _seen(config: Config) -> Seen:
    names = frozenset(name.encode("ascii") for name in config.policy_input.headers)
    return Seen(headers=names, query=frozenset(config.policy_input.query), reserved=frozenset(map(fold, names)))


def _settings(config: Config, mode: Mode | None, limits: Limits) -> Settings:
    return Settings(
        mode=mode, limits=limits, handshake_timeout=config.timeouts.handshake,
        max_connections=config.limits.max_connections,
    )  # fmt: skip


def _client_settings(config: Config) -> ClientSettings:
    return ClientSettings(
        connect_timeout=config.timeouts.connect, handshake_timeout=config.timeouts.handshake,
        idle_timeout=config.timeouts.idle, max_header_bytes=config.limits.max_header_bytes,
        max_header_fields=config.limits.max_header_fields,
    )  # fmt: skip


def _about_policy(fault: OperatorFault, config: Config) -> OperatorFault:
    """The fault, with the key that names the bundle where it is about the bundle."""
    if config.policy is None or not fault.code.startswith("bundle_"):
        return fault
    return OperatorFault(f"policy.source: {config.policy.source}: {fault}", code=fault.code)


def _policy(config: Config) -> Policy:
    """What the engine needs of the configuration. Raises `OperatorFault` for a key file that cannot be read."""
    assert config.policy is not None  # noqa: S101  (the configuration has one wherever OPA is a child of ours)
    keys = {}
    for name, key in config.policy.keys.items():
        try:
            keys[name] = (key.algorithm, key.file.read_bytes())
        except OSError as error:
            raise OperatorFault(
                f"policy.keys.{name}.file: {key.file}: {error.strerror}", code="policy_key_unreadable"
            ) from error
    return Policy(source=config.policy.source, keys=keys, scope=config.policy.scope)
