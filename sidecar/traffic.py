"""What carries requests in one process: a server at each listener, and a pipeline behind it, over one pool of connections.

Whoever owns the sidecar says when it begins, what it is told anew and when it ends. It knows neither where identity and policy
come from, nor whether others carry traffic beside it. A reload has two parts: `prepare` makes all that can fail, `apply`
puts it in force and cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

import trio

from sidecar import parts
from sidecar.config import Config, InboundListener
from sidecar.errors import OperatorFault
from sidecar.exchange import Pipeline, Program
from sidecar.identity.presented import Presented
from sidecar.identity.proven import Proven
from sidecar.inbound import Inbound
from sidecar.model import Anonymous, CacheUse, DecisionPoint, LocalProcess, Peer
from sidecar.outbound import Outbound, Routes
from sidecar.records import Records
from sidecar.records.exposition import Family
from sidecar.records.live_table import LiveTable
from sidecar.serving import Serving
from sidecar.wire.client import Client
from sidecar.wire.listening import Listener
from sidecar.wire.server import Server, Settings

Side: TypeAlias = Literal["inbound", "outbound", "both"]


class Traffic:
    """`event(name, level, **fields)` is told what happens; `pseudonym` is our name in `Via`, by which a circle is found:
    whoever carries traffic of the same sidecar has the same. For `max_descriptor` see `wire.listening`.
    """

    def __init__(
        self,
        config: Config,
        *,
        client: Client,
        decisions: DecisionPoint,
        presented: Presented,
        records: Records,
        live: LiveTable,
        serving: Serving,
        event: Callable[..., None],
        pseudonym: str,
        max_descriptor: int | None,
    ) -> None:
        self.config = config
        self._client = client
        self._decisions = decisions
        self._presented = presented
        self._records = records
        self._live = live
        self._serving = serving
        self._event = event
        self._pseudonym = pseudonym
        self._max_descriptor = max_descriptor
        self._proven = Proven(config.state_dir / "proven.json")
        self._seen = parts.seen(config)
        self._bounds = parts.bounds(config)
        self._routes = Routes(config.outbound.routes, config.outbound.mtls_mode) if config.outbound else None
        self._prepared: tuple[Config, Routes | None] | None = None
        self.accepts = False
        """Whether every listener accepts."""

    async def open(self, _nursery: trio.Nursery, found: Mapping[str, Listener]) -> None:
        """Make a server for each listener (by the key of the configuration), and remember who has proven himself."""
        try:
            self._proven.load()
        except OperatorFault as fault:
            self._event("proofs.unreadable", "error", code=fault.code, detail=str(fault))
        config = self.config
        for number, one in enumerate(config.inbound):
            program = Inbound(
                mode=one.mtls_mode, agent=one.upstream, xfcc=one.xfcc, seen=lambda: self._seen,
                pseudonym=f"{self._pseudonym}-in".encode(), timeout=one.timeout, retries=one.retries, rate=one.rate,
            )  # fmt: skip
            server = self._server(program, Anonymous(reason="plaintext"), self._settings(config, one))
            self._serving.inbound.append((server, found[f"inbound[{number}].listen"]))
        if config.outbound is not None and self._routes is not None:
            outbound = Outbound(
                mode=config.outbound.mtls_mode, routes=self._routes_in_force, own_id=self._presented.own_id,
                seen=lambda: self._seen, proven=self._proven, remember_failed=self._remember_failed,
                pseudonym=f"{self._pseudonym}-out".encode(),
            )  # fmt: skip
            server = self._server(outbound, LocalProcess(), self._settings(config, self._routes))
            self._serving.outbound.append((server, found["outbound.listen"]))

    async def accept(self, nursery: trio.Nursery) -> None:
        self._serving.accept(nursery, self._serving.inbound + self._serving.outbound)
        self.accepts = True

    async def finish(self, side: Side) -> None:
        """Take nobody new but those who wait in the queue already, and return when the last connection has ended."""
        serving = self._serving
        of = {"inbound": serving.inbound, "outbound": serving.outbound, "both": serving.inbound + serving.outbound}
        await serving.finish(of[side])

    async def stop(self) -> None:
        """Nothing of it outlives the nursery."""

    async def refresh(self) -> None:
        """What is measured here is always of now."""

    @property
    def measured(self) -> Iterable[Iterable[Family]]:
        """By other processes."""
        return ()

    @property
    def cache_use(self) -> CacheUse | None:
        """Of other processes."""
        return None

    @property
    def open_connections(self) -> int:
        return sum(server.open_connections for server, _ in self._serving.inbound + self._serving.outbound)

    # ── a reload ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self, new: Config) -> None:
        """Make what `apply` puts in force, unless `abandon` comes. Raises `OperatorFault`, and nothing has changed."""
        routes = Routes(new.outbound.routes, new.outbound.mtls_mode, self._routes) if new.outbound else None
        self._prepared = (new, routes)

    @property
    def prepared(self) -> bool:
        return self._prepared is not None

    async def abandon(self) -> None:
        self._prepared = None

    async def apply(self) -> None:
        """Nothing in here can fail."""
        if self._prepared is None:
            return
        (new, routes), self._prepared = self._prepared, None
        self.config = new
        self._seen = parts.seen(new)
        self._bounds = parts.bounds(new)
        self._routes = routes
        self._client.settings = parts.client_settings(new)
        for number, (server, _) in enumerate(self._serving.inbound):
            server.settings = self._settings(new, new.inbound[number])
        if routes is not None:
            for server, _ in self._serving.outbound:
                server.settings = self._settings(new, routes)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _server(self, program: Program, plaintext_peer: Peer, settings: Settings) -> Server:
        pipeline = Pipeline(
            program=program, decisions=self._decisions, client=self._client, recorder=self._records,
            live=self._live, bounds=lambda: self._bounds,
        )  # fmt: skip
        return Server(
            direction=program.direction, plaintext_peer=plaintext_peer, handle=pipeline.handle, settings=settings,
            ended=self._records.connection, credentials=self._presented.in_use,
        )  # fmt: skip

    def _settings(self, config: Config, of: InboundListener | Routes) -> Settings:
        return parts.server_settings(
            config, mode=of.mtls_mode if isinstance(of, InboundListener) else None,
            allow_encoded_slash=of.allow_encoded_slash, max_descriptor=self._max_descriptor,
        )  # fmt: skip

    def _remember_failed(self, target: str, error: OSError) -> None:
        self._event("proofs.not_kept", "error", target=target, detail=str(error))

    def _routes_in_force(self) -> Routes:
        assert self._routes is not None  # noqa: S101  (a listener without routes is never made)
        return self._routes
