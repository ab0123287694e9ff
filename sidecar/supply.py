"""Policy on its way into one sidecar: from where bundles come to the OPA that decides, and what is told back.

    source ──▶ relay (verify, accept, remember) ──▶ engine (an OPA for each bundle) ──▶ remembered ──▶ decisions
                                                        shadow ◀── candidate
    reports ◀── what runs, what failed, what was decided, what a candidate would change

A source that is a file is part of the start: one that gives nothing, with nothing remembered either, refuses it. A server
may be away: then the last good bundle runs, or the sidecar is not ready until there is one. Whoever has a bundle in hand
(the local operator, for one) gives it to `relay.offer`, the function that every other bundle passes too.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from sidecar import VERSION, apart, parts, servers
from sidecar.apart import Apart
from sidecar.bundles.freshness import FreshOnly
from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Refusal, Relay
from sidecar.bundles.sources import MEDIA_TYPE, Answer, Files, Server, Source
from sidecar.bundles.terms import Verified, seed_of_this_process, taken
from sidecar.config import Config, Policy, Remote
from sidecar.decision import install, private
from sidecar.decision.engine import Borrowers, Engine
from sidecar.decision.envoy import words
from sidecar.decision.inquiry import OURS
from sidecar.decision.remembered import Remembered
from sidecar.decision.shadow import Shadow
from sidecar.errors import OperatorFault, SidecarError
from sidecar.log import timestamp
from sidecar.model import Allow, CacheUse, Decided, Decision, Inquiry, Lending
from sidecar.wire.client import Client
from sidecar.wire.network import Network

REPORT_INTERVAL = 10.0
"""Seconds between reports where nothing has changed; a tenth of it where something has."""
_REPORT_TIMEOUT = 10.0
_MAX_ANSWER_BYTES = 1 << 16
_CANDIDATE_WAIT = 30.0
_CANDIDATE_RETRY = 10.0
_HELD_AFTER = 1.0
"""Seconds; a question that was answered sooner was not held."""


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
        self._client = client
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
        self._unfit: Refusal | None = None
        """Why the candidate that the server names cannot be compared; None where it can, or there is none."""
        self._counts = _Counts()
        self._scope = trio.CancelScope()
        self._following = trio.CancelScope()
        self._nursery: trio.Nursery

    async def decide(self, inquiry: Inquiry) -> Decision:
        return await self._point.decide(inquiry)

    def counted(self, revision: str | None, *, allowed: int, denied: int, errors: int) -> None:
        """Told of decisions that others took, together."""
        if revision == self._engine.bundle_revision:
            self._counts.add(revision, allowed, denied, errors)

    def decided(self, record: Decided) -> None:
        """Told of each decision that was asked for."""
        self._counts.count(record, self._engine.bundle_revision)
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
                    if self.shadow is not None:
                        nursery.start_soon(self.shadow.run)
                        nursery.start_soon(self._follow_candidate, self.shadow)
                    if self._policy.report:
                        nursery.start_soon(self._report_forever)
                    task_status.started()
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault

    async def stop(self) -> None:
        await self._engine.stop()
        self._scope.cancel()

    async def _begin(self, nursery: trio.Nursery) -> None:
        source = self._source(self._policy)
        if isinstance(self._policy.source, Remote):
            nursery.start_soon(self._follow, self.relay.run, source)
            return
        await self.relay.load()
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
        before = self.relay.terms
        await self.relay.change(parts.terms(new))
        source = self._source(new.policy)
        try:
            if not isinstance(new.policy.source, Remote):
                await self.relay.offer_best(await source.changed())
        except OperatorFault:
            await self.relay.change(before)
            raise
        self._config, self._policy = new, new.policy
        self._remembered.resize(parts.cache_bounds(new.policy))
        self._following.cancel()
        self._nursery.start_soon(self._follow, self.relay.follow, source)

    # ── where from ────────────────────────────────────────────────────────────────────────────────────────────────

    def _source(self, policy: Policy) -> Source:
        bounds = self.relay.terms.bounds
        if isinstance(policy.source, Path):
            return Files(policy.source, bounds)
        asking = servers.asking(servers.with_labels(policy.source, self._config.labels), self._client)

        async def ask(fields: Sequence[tuple[bytes, bytes]], timeout: float) -> Answer:
            status, etag, body = await asking("GET", fields, b"", bounds.max_archive_bytes + 1, timeout)
            return Answer(status=status, etag=etag, archive=body)

        return Server(policy.source.url, ask)

    # ── a candidate ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _follow_candidate(self, shadow: Shadow) -> None:
        """Compare with whatever is named as the candidate. It is verified like any bundle, and accepted by nobody."""
        named, ours = self._policy.shadow, seed_of_this_process()
        engine = self._made_engine(lambda *_, **__: None)
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            source = Files(named.source, self.relay.terms.bounds) if named is not None and named.source else None
            etag, told = "", ""
            while True:
                verified: Verified | None = None
                try:
                    if source is not None:
                        archive: bytes | None = await trio.to_thread.run_sync((await source.changed())[0].read)
                    else:
                        archive, etag = await self._next_candidate(etag)
                    if archive is None:
                        shadow.stop()
                        self._unfit = None
                        continue
                    verified = await taken(self._do, self.relay.terms, ours, archive)
                    await engine.activate(verified.handed)
                except SidecarError as fault:
                    if verified is not None:
                        shadow.stop()  # it is about another one from now on
                        self._unfit = Refusal(
                            code=fault.code, reason=str(fault), origin="candidate", serial=verified.release.serial
                        )
                    if (problem := f"{fault.code}: {fault}") != told:
                        told = problem
                        self._log("candidate.refused", "warning", code=fault.code, reason=str(fault))
                    if verified is None:
                        await trio.sleep(_CANDIDATE_RETRY)  # else there is nothing to ask for but another one
                else:
                    release, self._unfit, told = verified.release, None, ""
                    shadow.compare_with(engine, revision=release.revision, serial=release.serial)
                    self._log("candidate.compared", "info", revision=release.revision, serial=release.serial)

    async def _next_candidate(self, etag: str) -> tuple[bytes | None, str]:
        """Wait for another candidate than the one with this tag; None where there is none now."""
        if not isinstance(self._policy.source, Remote):
            raise OperatorFault("the source is no server any more, which could name a candidate", code="bundle_missing")
        remote = servers.with_labels(servers.candidate_of(self._policy.source), self._config.labels)
        ask = servers.asking(remote, self._client)
        fields = [(b"accept", MEDIA_TYPE), (b"prefer", b"wait=%d" % _CANDIDATE_WAIT)]
        fields += [(b"if-none-match", etag.encode("ascii"))] if etag else []
        while True:
            asked_at = trio.current_time()
            status, tag, body = await ask(
                "GET", fields, b"", self.relay.terms.bounds.max_archive_bytes, 2 * _CANDIDATE_WAIT
            )
            if status == 200:
                return body, tag
            if status in {204, 404}:
                if not etag and trio.current_time() - asked_at < _HELD_AFTER:
                    await trio.sleep(_CANDIDATE_RETRY)  # it does not hold questions
                return None, ""
            if status != 304:
                raise OperatorFault(f"{remote.url} answered {status}", code="bundle_server_refused")

    # ── what is told back ─────────────────────────────────────────────────────────────────────────────────────────

    async def _report_forever(self) -> None:
        failing = False
        while True:
            news, until = self._news, trio.current_time() + REPORT_INTERVAL * random.uniform(0.8, 1.2)  # noqa: S311
            server = self._policy.source
            if isinstance(server, Remote):
                problem = await self._told(server)
                if (problem is not None) != failing:
                    failing = problem is not None
                    self._log(
                        "report.failed" if failing else "report.taken", "warning" if failing else "info", reason=problem
                    )
            while True:
                await trio.sleep(REPORT_INTERVAL / 10)
                if trio.current_time() >= until or (self._news != news and not failing):
                    break

    async def _told(self, server: Remote) -> str | None:
        """Report; return why that failed."""
        ask = servers.asking(servers.at(server, "/v1/status"), self._client)
        fields, body = [(b"content-type", b"application/json")], json.dumps(self.report(server)).encode()
        try:
            status, _, _ = await ask("POST", fields, body, _MAX_ANSWER_BYTES, _REPORT_TIMEOUT)
        except SidecarError as fault:
            return f"{fault.code}: {fault}"
        return None if 200 <= status < 300 else f"{server.authority} answered {status}"

    @property
    def _news(self) -> tuple[object, ...]:
        """What somebody may be waiting to hear. Counters are not among it, but for the first that speaks against a candidate."""
        running, found = self.relay.running, self.shadow.differences if self.shadow is not None else None
        return (
            running.digest if running else None, self.relay.error, self._unfit,
            (found.serial, found.compared > 0, found.allow_to_deny + found.deny_to_allow + found.undecided > 0) if found else None,
        )  # fmt: skip

    def report(self, server: Remote) -> dict[str, object]:
        """What this sidecar says of itself. Who it is, the server knows from its certificate."""
        running, error, shadow = self.relay.running, self.relay.error or self._unfit, self.shadow
        differences = shadow.differences if shadow is not None else None
        return {
            "bundle": servers.name_of(server),
            "revision": running.release.revision if running else None,
            "serial": running.release.serial if running else None,
            "digest": running.digest if running else None,
            "created": timestamp(running.release.created) if running else None,
            "activated_at": timestamp(running.activated_at) if running else None,
            "error": {"code": error.code, "message": error.reason, "serial": error.serial} if error else None,
            "counters": {"allowed": self._counts.allowed, "denied": self._counts.denied, "errors": self._counts.errors},
            "shadow": None
            if differences is None
            else {
                "serial": differences.serial, "compared": differences.compared,
                "dropped": differences.dropped, "undecided": differences.undecided,
                "allow_to_deny": differences.allow_to_deny, "deny_to_allow": differences.deny_to_allow,
                "examples": [
                    {"caller": one.caller, "method": one.method, "path": one.path, "was": one.was, "would": one.would}
                    for one in differences.examples
                ],
            },
            "labels": dict(self._config.labels),
            "version": VERSION,
        }  # fmt: skip

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
        return Engine(
            self._network, binary=self._binary, log=log, words=words(self._policy.decision if self._policy.input == "envoy" else None),
            runtime_dir=private.place(self._config.state_dir, os.environ.get("XDG_RUNTIME_DIR")),
            decision_timeout=self._config.timeouts.decision, workers=self._config.workers,
            max_together=self._policy.max_together,
        )  # fmt: skip


class _Counts:
    """Decisions since the revision in force took over."""

    def __init__(self) -> None:
        self.allowed = self.denied = self.errors = 0
        self._revision: str | None = None

    def count(self, record: Decided, revision: str | None) -> None:
        if revision != self._revision:
            self._begin(revision)
        if record.decision is None:
            self.errors += 1
        elif isinstance(record.decision, Allow):
            self.allowed += 1
        else:
            self.denied += 1

    def add(self, revision: str | None, allowed: int, denied: int, errors: int) -> None:
        if revision != self._revision:
            self._begin(revision)
        self.allowed += allowed
        self.denied += denied
        self.errors += errors

    def _begin(self, revision: str | None) -> None:
        self._revision = revision
        self.allowed = self.denied = self.errors = 0
