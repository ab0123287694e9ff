"""Policy on its way into one sidecar: from where bundles come to the OPA that decides, and what is told back.

    source ──▶ relay (verify, accept, remember) ──▶ engine (an OPA for each bundle) ──▶ remembered ──▶ decisions
                                                        shadow ◀── candidate (`candidate`)
    bundle server ◀── what runs, what failed, what was decided, what a candidate would change (`reporting`)

A source that is a file is part of the start: one that gives nothing, with nothing remembered either, refuses it. A server
may be away: then the last good bundle runs, or the sidecar is not ready until there is one. Whoever has a bundle in hand
(the local operator, for one) gives it to `relay.offer`, the function that every other bundle passes too.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from sidecar import apart, parts, servers
from sidecar.apart import Apart
from sidecar.bundles.freshness import FreshOnly
from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Relay
from sidecar.bundles.sources import Answer, Files, Server, Source
from sidecar.candidate import Candidate
from sidecar.config import Config, OpaChild, Policy, Remote
from sidecar.decision import install, private
from sidecar.decision.engine import DEFAULT_TIMING, Borrowers, Engine
from sidecar.decision.envoy import words
from sidecar.decision.inquiry import OURS
from sidecar.decision.remembered import Remembered
from sidecar.decision.shadow import Shadow
from sidecar.errors import OperatorFault
from sidecar.model import CacheUse, Decided, Decision, Inquiry, Lending, SharingUse
from sidecar.reporting import Reporting
from sidecar.wire.client import Client
from sidecar.wire.network import Network


class Supply:
    """`model.DecisionPoint`. `run` has to be running; it raises `OperatorFault` where there is nothing to begin with."""

    def __init__(
        self, config: Config, *, network: Network, client: Client, log: Callable[..., None], do: Apart = apart.here
    ) -> None:
        assert config.policy is not None  # noqa: S101  (the configuration has one wherever OPA is a child of ours)
        binary = install.find()
        if binary is None:
            raise OperatorFault("opa: OPA is not installed; run `sidecar opa install`", code="opa_missing")
        self._config = config
        self._policy: Policy = config.policy
        self._network = network
        self._asking = partial(servers.asking, client=client)
        self._log = log
        self._binary = binary
        self._engine = self._made_engine(log)
        self._do = do
        self.relay = Relay(parts.terms(config), Memory(config.state_dir / "policy"), self._engine.activate, log, do=do)
        self._remembered = Remembered(
            self._engine, path=OURS.path if config.policy.input == "sidecar" else None,
            bounds=parts.cache_bounds(config.policy),
        )  # fmt: skip
        self._point = FreshOnly(self._remembered, lambda: self.relay.stale)
        shadow = config.policy.shadow
        self.shadow = Shadow(sample=shadow.sample, max_queue=shadow.max_queue) if shadow is not None else None
        self._candidate = (
            Candidate(
                self.shadow, policy=lambda: self._policy, terms=lambda: self.relay.terms, labels=config.labels,
                asking=self._asking, engine=lambda: self._made_engine(lambda *_, **__: None), log=log, do=do,
            )
            if self.shadow is not None
            else None
        )  # fmt: skip
        self._reporting = Reporting(
            self.relay, server=self._server, labels=config.labels, shadow=self.shadow, asking=self._asking, log=log,
            unfit=lambda: self._candidate.unfit if self._candidate is not None else None,
        )  # fmt: skip
        self._scope = trio.CancelScope()
        self._following = trio.CancelScope()
        self._nursery: trio.Nursery

    async def decide(self, inquiry: Inquiry) -> Decision:
        return await self._point.decide(inquiry)

    def counted(self, revision: str | None, *, allowed: int, denied: int, errors: int) -> None:
        """Told of decisions that others took, together."""
        if revision == self._engine.bundle_revision:
            self._reporting.counted(revision, allowed=allowed, denied=denied, errors=errors)

    def decided(self, record: Decided) -> None:
        """Told of each decision that was asked for."""
        self._reporting.decided(record, self._engine.bundle_revision)
        if self.shadow is not None:
            self.shadow.decided(record)

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be ready once decisions can be had, or at once where they come from a server. Ends by `stop` or cancellation."""
        fault: OperatorFault | None = None
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._engine.run)
                await nursery.start(self._remembered.run)
                try:
                    await self._begin(nursery)
                except OperatorFault as error:
                    fault = error  # raised below: a nursery would wrap it into a group
                else:
                    if self.shadow is not None and self._candidate is not None:
                        nursery.start_soon(self.shadow.run)
                        nursery.start_soon(self._candidate.run)
                    if self._policy.report:
                        nursery.start_soon(self._reporting.run)
                    task_status.started()
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault

    async def stop(self) -> None:
        await self._engine.stop()
        self._scope.cancel()

    async def _begin(self, nursery: trio.Nursery) -> None:
        await self.relay.load()
        source = self._source(self._policy)
        if isinstance(self._policy.source, Remote):
            nursery.start_soon(self._follow, self.relay.run, source)
            return
        try:
            await self.relay.offer_best(await source.changed())
        except OperatorFault as fault:
            try:
                await self.relay.restore()
            except OperatorFault:
                raise fault from None
        nursery.start_soon(self._follow, self.relay.follow, source)

    async def _follow(self, follow: Callable[[Source], Awaitable[None]], source: Source) -> None:
        with trio.CancelScope() as self._following:
            await follow(source)

    # ── a reload ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def reload(self, new: Config) -> None:
        """Take up what a configuration says now, and what its source holds. Raises `OperatorFault`, and nothing has changed."""
        assert new.policy is not None  # noqa: S101
        before, error = self.relay.terms, self.relay.error
        await self.relay.change(parts.terms(new))
        source = self._source(new.policy)
        try:
            if not isinstance(new.policy.source, Remote):
                await self.relay.offer_best(await source.changed())
        except OperatorFault:
            await self.relay.change(before)
            self.relay.error = error  # what was refused is not what our source has
            raise
        self._config, self._policy = new, new.policy
        self._remembered.resize(parts.cache_bounds(new.policy))
        self._following.cancel()
        follow = self.relay.follow if self.relay.running is not None else self.relay.run
        self._nursery.start_soon(self._follow, follow, source)

    # ── where from ────────────────────────────────────────────────────────────────────────────────────────────────

    def _source(self, policy: Policy) -> Source:
        bounds = self.relay.terms.bounds
        if isinstance(policy.source, Path):
            return Files(policy.source, bounds)
        asking = self._asking(servers.with_labels(policy.source, self._config.labels))

        async def ask(fields: Sequence[tuple[bytes, bytes]], timeout: float) -> Answer:
            status, etag, body = await asking("GET", fields, b"", bounds.max_archive_bytes + 1, timeout)
            return Answer(status=status, etag=etag, archive=body)

        return Server(policy.source.url, ask)

    def _server(self) -> Remote | None:
        """The bundle server, where policy comes from one."""
        return self._policy.source if isinstance(self._policy.source, Remote) else None

    # ── what is known of it ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def lending(self) -> Lending | None:
        """What decides now, for others to ask."""
        lending = self._engine.lending
        return None if lending is None else replace(lending, stale_at=self.relay.stale_at)

    def lend_to(self, borrowers: Borrowers) -> None:
        self._engine.borrowers = borrowers

    @property
    def state(self) -> str:
        """Of OPA. One that waits for its first bundle is well: what is missing is the bundle."""
        return "ok" if self._engine.state == "starting" else self._engine.state

    @property
    def restarts(self) -> int:
        return self._engine.restarts

    @property
    def cache_use(self) -> CacheUse:
        return self._remembered.use

    @property
    def sharing_use(self) -> SharingUse:
        return self._engine.sharing_use

    @property
    def bundle_revision(self) -> str | None:
        return self._engine.bundle_revision

    @property
    def bundle_error(self) -> str | None:
        refusal = self.relay.error or self.relay.unreachable
        return str(refusal) if refusal is not None else None

    @property
    def bundle_state(self) -> str:
        """`ok`, or what is wrong with the bundle."""
        return "missing" if self._engine.bundle is None else "expired" if self.relay.stale else "ok"

    @property
    def decision_timeout(self) -> float:
        return self._engine.decision_timeout

    @decision_timeout.setter
    def decision_timeout(self, seconds: float) -> None:
        self._engine.decision_timeout = seconds

    def _made_engine(self, log: Callable[..., None]) -> Engine:
        opa = self._config.opa
        assert isinstance(opa, OpaChild)  # noqa: S101  (as above)
        return Engine(
            self._network, binary=self._binary, log=log, words=words(self._policy.decision if self._policy.input == "envoy" else None),
            runtime_dir=private.place(self._config.state_dir, os.environ.get("XDG_RUNTIME_DIR")),
            decision_timeout=self._config.timeouts.decision, workers=self._config.workers,
            max_together=self._policy.max_together, max_memory_bytes=opa.max_memory_bytes,
            timing=replace(DEFAULT_TIMING, start_timeout=opa.start_timeout),
        )  # fmt: skip
