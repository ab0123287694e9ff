"""The composition root: a configuration becomes objects, and these run in one nursery.

Start: what can be refused comes first (identity, sockets, policy), so that a sidecar which cannot serve does not look
alive; health answers from the beginning, the other listeners accept last. Where a predecessor runs, its sockets are
inherited, and health too is left to it until all of ours accept: then it is told, stops accepting, and drains.

Stop: readiness goes false, inbound stops accepting and finishes, outbound goes on until no inbound exchange can need
it any more, OPA goes last; one deadline covers all of it. Where a successor has taken over nothing has to wait for anything, and
readiness stays true, since whoever asks at our address is served. A reload makes everything that can fail before it
changes anything. Signals and successors are obeyed in turn, one at a time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Literal, Protocol

import trio

from sidecar import apart, parts
from sidecar import config as configuration
from sidecar.apart import Apart
from sidecar.config import Config, FilesIdentity, OpaExternal
from sidecar.decision.external import External
from sidecar.errors import OperatorFault
from sidecar.identity import pem_files, presented
from sidecar.identity.current import Current
from sidecar.identity.presented import Presented
from sidecar.keeping import Keeping
from sidecar.listeners import Listeners
from sidecar.log import Level, LineSink, Log
from sidecar.management.health import Health
from sidecar.model import Address, Anonymous, CacheUse, Status
from sidecar.records import Records
from sidecar.records.exposition import Family
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import Metrics
from sidecar.serving import Serving
from sidecar.supply import Supply
from sidecar.wire.client import Client
from sidecar.wire.handover import Alone, Succession
from sidecar.wire.handover import Log as Tell
from sidecar.wire.listening import Listener
from sidecar.wire.network import Network
from sidecar.wire.server import Server

_FLUSH_INTERVAL = 0.2

Load = Callable[[], Config]
_Told = Literal["reload", "stop", "succeeded"]


class Hands(Protocol):
    """Who carries requests: this process (`traffic`), or workers (`supervisor`)."""

    @property
    def accepts(self) -> bool:
        """Whether whoever comes is served."""
        ...

    @property
    def open_connections(self) -> int: ...

    async def open(self, nursery: trio.Nursery, found: Mapping[str, Listener], /) -> None:
        """Be there, and accept nobody yet; `found`: a listener for each key of the configuration. Raises `OperatorFault`."""
        ...

    async def accept(self, nursery: trio.Nursery, /) -> None:
        """Return when every listener accepts. Raises `OperatorFault`."""
        ...

    async def prepare(self, new: Config, /) -> None:
        """Make all that a changed configuration needs and that can fail. Raises `OperatorFault`, and nothing has changed."""
        ...

    async def apply(self) -> None:
        """Put in force what was prepared. Nothing in it can fail."""
        ...

    async def abandon(self) -> None:
        """Forget what was prepared."""
        ...

    async def finish(self, side: Literal["inbound", "outbound", "both"], /) -> None:
        """Accept nobody new there; return when the last connection has ended."""
        ...

    async def stop(self) -> None:
        """End what would outlive our nursery."""
        ...

    async def refresh(self) -> None:
        """Have `measured` and `cache_use` be of now. Bounded."""
        ...

    @property
    def measured(self) -> Iterable[Iterable[Family]]:
        """What was measured in other processes than this one."""
        ...

    @property
    def cache_use(self) -> CacheUse | None:
        """Of other processes; None where there are none, or none is used."""
        ...


class MakeCrew(Protocol):
    """`supervisor.Crew`."""

    def __call__(
        self, config: Config, /, *, current: Current, decisions: Supply | External, keeping: Keeping | None,
        access: LineSink | None, event: Callable[..., None], pseudonym: str,
    ) -> Hands: ...  # fmt: skip


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
        activated: Mapping[Address, Listener] | None = None,
        max_descriptor: int | None = None,
        succession: Callable[[Tell], Succession] = lambda _tell: Alone(),
        crew: MakeCrew | None = None,
        do: Apart = apart.here,
    ) -> None:
        """`lost` tells how many lines of both logs were lost, `activated` are sockets that somebody holds for us; for
        `max_descriptor` see `wire.listening`. `crew` None: requests are carried in this process.
        `do` is where certificates and bundles are checked.
        """
        self.config = config
        self._load = load
        self._network = network
        self._log = log
        self._access = access
        self._max_descriptor = max_descriptor
        self._listeners = Listeners(network, activated=activated or {}, succession=succession(self._event))
        self._starting = trio.CancelScope()
        self._draining = False
        self._listening = False
        self._do = do
        self._check = pem_files.checking(do)
        self._current = Current()
        self._presented = Presented(self._current, log=self._event)
        self._live = LiveTable()
        serving = self._serving = Serving(log=self._event, counted=self._happened)
        self._metrics = Metrics(
            live=self._live, directions=("inbound", "outbound"), connections=serving.open_connections, dropped=lost,
            kept=lambda: self._decision_log.account() if self._decision_log is not None else None,
            sharing=lambda: self._decisions.sharing_use,
        )  # fmt: skip
        self._records = Records(self._metrics, access.write if access is not None else None)
        self._client = Client(network, self._presented.in_use, parts.client_settings(config), log=self._event)
        self._decisions = self._decision_point(config)
        if isinstance(self._decisions, Supply):
            self._records.tell(self._decisions.decided)
        self._decision_log = (
            Keeping(config, client=self._client, log=self._event) if config.decision_log is not None else None
        )
        if self._decision_log is not None:
            self._records.tell(self._decision_log.decided)
        self._watching = trio.CancelScope()
        self._pseudonym = f"sidecar-{os.urandom(4).hex()}"
        self._inbound, self._outbound, self._health = serving.inbound, serving.outbound, serving.health
        self._hands = self._own_hands() if crew is None else self._crew(crew)

    def _own_hands(self) -> Hands:
        from sidecar.traffic import Traffic  # noqa: PLC0415  a supervisor has no use for it in memory

        return Traffic(
            self.config, client=self._client, decisions=self._decisions, presented=self._presented,
            records=self._records, live=self._live, serving=self._serving, event=self._event,
            pseudonym=self._pseudonym, max_descriptor=self._max_descriptor,
        )  # fmt: skip

    def _crew(self, make: MakeCrew) -> Hands:
        return make(
            self.config, current=self._current, decisions=self._decisions, keeping=self._decision_log,
            access=self._access, event=self._event, pseudonym=self._pseudonym,
        )  # fmt: skip

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self, signals: AsyncIterator[int], started: Callable[[], None] = lambda: None) -> None:
        """Start, serve until SIGTERM, SIGINT or a successor, drain. Raises `OperatorFault` where the start is refused.

        `started` is called once all of it is there.
        """
        refused: OperatorFault | None = None
        tell, told = trio.open_memory_channel[_Told](8)
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self._obey, signals, tell)
                with self._starting:
                    await self._start(nursery)
                    nursery.start_soon(self._await_successor, tell)
                    started()
                    self._event(
                        "sidecar.started", mtls_mode=self.config.mtls_mode, mode_from=self.config.mtls_mode_source
                    )
                if not self._starting.cancelled_caught:
                    await self._run(nursery, told)
            except OperatorFault as fault:
                refused = fault
            finally:
                self._listeners.close()
                await self._hands.stop()
                if self._decision_log is not None:
                    await self._decision_log.finish()
                nursery.cancel_scope.cancel()
        await self._decisions.stop()
        if refused is not None:
            raise refused
        self._event("sidecar.stopped")

    async def _obey(self, signals: AsyncIterator[int], tell: trio.MemorySendChannel[_Told]) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                await tell.send("reload")
            else:
                self._starting.cancel()
                await tell.send("stop")

    async def _await_successor(self, tell: trio.MemorySendChannel[_Told]) -> None:
        await self._listeners.wait_succeeded()
        await tell.send("succeeded")

    async def _run(self, nursery: trio.Nursery, told: trio.MemoryReceiveChannel[_Told]) -> None:
        async for what in told:
            if what == "reload":
                await self._reload(nursery)
            else:
                await self._drain(succeeded=what == "succeeded")
                break

    async def _start(self, nursery: trio.Nursery) -> None:
        state_dir = self.config.state_dir
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OperatorFault(f"state_dir: {state_dir}: {error.strerror}", code="state_dir_unusable") from error
        if self.config.identity is not None:
            known = await pem_files.known(self.config.identity, self._check, time.time())
            self._presented.publish(known.reading.identity)
            nursery.start_soon(self._watch, self.config.identity, known)
            nursery.start_soon(self._presented.follow)
        await self._listen(nursery)
        nursery.start_soon(self._flush_forever)
        await nursery.start(self._client.run)
        if self._decision_log is not None:
            nursery.start_soon(self._decision_log.run)
        if not self._listeners.succeeds:
            self._serving.accept(nursery, self._health)
        try:
            await nursery.start(self._decisions.run)
        except OperatorFault as fault:
            raise parts.about_policy(fault, self.config) from fault
        await self._hands.accept(nursery)
        if self._listeners.succeeds:
            self._serving.accept(nursery, self._health)
        self._listening = True
        await self._listeners.take_over()

    async def _drain(self, *, succeeded: bool = False) -> None:
        """Finish what is open, in the order in which it may still be needed; cut off what is left at the deadline."""
        self._draining = not succeeded
        self._event(
            "sidecar.drain_started", timeout=self.config.timeouts.drain, reason="succeeded" if succeeded else "signal"
        )
        with trio.move_on_after(self.config.timeouts.drain) as patience:
            if succeeded:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hands.finish, "both")
                    nursery.start_soon(self._serving.finish, self._health)
            else:
                await self._hands.finish("inbound")
                await self._hands.finish("outbound")
        if patience.cancelled_caught:
            self._event("sidecar.drain_timed_out", "warning", connections=self._hands.open_connections)

    async def _flush_forever(self) -> None:
        while self._access is not None:
            await trio.sleep(_FLUSH_INTERVAL)
            self._access.flush()

    # ── listeners ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _listen(self, nursery: trio.Nursery) -> None:
        """Open every address, so that one that is taken is found before anything runs."""
        config = self.config
        addresses = {f"inbound[{number}].listen": one.listen for number, one in enumerate(config.inbound)}
        if config.outbound is not None:
            addresses["outbound.listen"] = config.outbound.listen
        number = dict.fromkeys(addresses, config.workers)
        if config.health is not None:
            addresses["health.listen"] = config.health.listen
        found = await self._listeners.open(addresses, number)
        await self._hands.open(nursery, found)
        if config.health is not None:
            health = Health(
                status=self.status, refresh=self._hands.refresh,
                metrics=lambda: self._metrics.exposition(self.status(), self._hands.measured),
            )  # fmt: skip
            server = Server(
                direction="health", plaintext_peer=Anonymous(reason="plaintext"), handle=health.handle,
                settings=parts.HEALTH, ended=lambda _record: None, credentials=lambda: None,
            )  # fmt: skip
            self._health.append((server, found["health.listen"]))

    async def _watch(self, files: FilesIdentity, known: pem_files.Known) -> None:
        with trio.CancelScope() as self._watching:
            await pem_files.watch(self._current, files, log=self._event, check=self._check, known=known)

    # ── policy ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decision_point(self, config: Config) -> Supply | External:
        if isinstance(config.opa, OpaExternal):
            return External(
                config.opa.socket, self._network, peer_uid=config.opa.peer_uid, log=self._event,
                decision_timeout=config.timeouts.decision,
            )  # fmt: skip
        return Supply(config, network=self._network, client=self._client, log=self._event, do=self._do)

    # ── reload ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _reload(self, nursery: trio.Nursery) -> None:
        """Take up a changed configuration, whole or not at all; then whatever its files hold now."""
        try:
            new = await trio.to_thread.run_sync(self._load)
            changed = configuration.changes(self.config, new)
            if changed.refused:
                raise OperatorFault(f"needs a restart: {', '.join(changed.refused)}", code="reload_needs_restart")
            known = await pem_files.known(new.identity, self._check, time.time()) if new.identity is not None else None
            if known is not None:
                presented.check(known.reading.identity)
            await self._hands.prepare(new)
            if self._access is not None:
                self._access.reopen()
            if isinstance(self._decisions, Supply):
                # The last that can fail, since it is in force when it returns.
                await self._reload_policy(self._decisions, new)
        except OperatorFault as fault:  # a `ConfigError` tells all its problems at once
            await self._hands.abandon()
            self._event("config.reload_refused", "error", code=fault.code, detail=str(fault))
            return
        await self._apply(new, known, nursery)
        self._event("config.reloaded", changed=list(changed.live))

    async def _reload_policy(self, supply: Supply, new: Config) -> None:
        try:
            await supply.reload(new)
        except OperatorFault as fault:
            raise parts.about_policy(fault, new) from fault

    async def _apply(self, new: Config, known: pem_files.Known | None, nursery: trio.Nursery) -> None:
        """Nothing in here can fail."""
        old, self.config = self.config, new
        self._log.level = new.log.level
        self._client.settings = parts.client_settings(new)
        self._decisions.decision_timeout = new.timeouts.decision
        if known is not None:
            self._presented.publish(
                known.reading.identity
            )  # what is reported as taken up is in force, and not with the watcher's next look
        await self._hands.apply()
        if new.identity is not None and known is not None and new.identity != old.identity:
            self._watching.cancel()
            nursery.start_soon(self._watch, new.identity, known)

    def _event(self, name: str, level: Level = "info", /, **fields: object) -> None:
        """Tell, and count, something that happened to us."""
        level = _LEVELS.get(name, level)
        self._happened(name)
        self._log.event(name, level, **fields)

    def _happened(self, name: str, /) -> None:
        self._metrics.happened(name)

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
            bundle=self._decisions.bundle_state,
            bundle_revision=self._decisions.bundle_revision,
            bundle_error=self._decisions.bundle_error,
            opa=self._decisions.state,
            opa_restarts=self._decisions.restarts,
            listeners=self._listening and self._hands.accepts,
            draining=self._draining,
            cache=self._hands.cache_use or self._decisions.cache_use,
        )


_LEVELS: dict[str, Level] = {
    "identity.update_failed": "error",
    "identity.warning_raised": "warning",
    "upstream.ejected": "warning",
}
"""Of events whose teller knows no levels."""
