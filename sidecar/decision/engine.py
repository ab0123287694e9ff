"""OPA kept running: one process with one bundle answers, and this file sees to it that there is one.

A process is started for a bundle and never given another. Whatever changes (the bundle, the keys, a crash) means a new
process, in a directory of its own: it is started, it verifies the signature, it is warmed up, and only then do questions
go to it; the one before ends when its last question has been answered. What cannot do that is refused, and the one before
stays. So an accepted policy is replaced by an accepted policy or by nothing, and never by an unsigned one, and at no moment
does a question meet half of one bundle and half of the next.

Where bundles come from, and which of two is the one to run, is not known here: whoever knows calls `activate`. A crash is
answered with the bundle that was accepted.

    starting ──activate──▶ ok ──exit, or no answer──▶ restarting ──▶ ok
                            └──activate──▶ a second process ──▶ ok, or refused: `activate` raises, nothing changes
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import trio

from sidecar.decision import policy as told
from sidecar.decision import private
from sidecar.decision.child import MAX_MEMORY_BYTES, Child
from sidecar.decision.inquiry import OURS, Contract
from sidecar.decision.opa import OnlyFrom, Opa
from sidecar.decision.sharing import MAX_TOGETHER, Sharing
from sidecar.decision.waiting import Tally
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Decision, Inquiry, Lending, PolicyBundle, SharingUse
from sidecar.wire.network import Network

State = Literal["starting", "ok", "restarting", "stopped"]
Log = Callable[..., None]
"""`log(event, level, **fields)`; level is "info", "warning" or "error"."""

_READY_INTERVAL = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds, unless said otherwise."""

    start_timeout: float = 30.0
    """From the start of a process to the end of its warm-up."""
    liveness_interval: float = 1.0
    liveness_timeout: float = 2.0
    max_missed: int = 3
    """Liveness questions in a row without an answer, after which OPA counts as hung and is killed."""
    first_backoff: float = 0.2
    max_backoff: float = 5.0
    healthy_after: float = 30.0
    """Life after which the next crash is the first again."""


DEFAULT_TIMING = Timing()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Running:
    """One OPA that has accepted one bundle."""

    child: Child
    opa: Opa
    asked: Opa | Sharing
    """Where questions go: `opa`, or what puts together those that wait for it."""
    bundle: PolicyBundle
    directory: Path
    since: float
    settled: trio.Event
    """Set once nobody asks the one before any more."""


class Borrowers(Protocol):
    """Others who ask the OPA that is lent to them (`Engine.lending`)."""

    def offered(self, on_its_way: bool, /) -> None:
        """Another bundle is on its way in, or is not any more. Until then nothing may be repeated that was decided before."""
        ...

    async def changed_over(self) -> None:
        """Another OPA decides now. Returns when none of them asks the one before any more."""
        ...


class Engine:
    """`model.DecisionPoint` over an OPA of our own. `run` has to be running, in the thread that started trio.

    `runtime_dir` is where the private directory is made (see `private.place`), `binary` an OPA. `workers` bounds the
    processors that OPA uses, `words` is the contract with policy, `max_together` how many questions may be put into one query
    (1: never more than one), `max_memory_bytes` from where on OPA collects harder. Until a bundle is activated every question is answered by `NoDecision` (`policy_not_ready`).
    """

    def __init__(
        self,
        network: Network,
        *,
        runtime_dir: Path,
        binary: Path,
        log: Log,
        decision_timeout: float = 1.0,
        max_connections: int = 64,
        workers: int = 1,
        timing: Timing = DEFAULT_TIMING,
        words: Contract = OURS,
        max_together: int = MAX_TOGETHER,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self.state: State = "starting"
        self.restarts = 0
        self._network = OnlyFrom(network, frozenset({os.getuid()}))
        self._runtime_dir = runtime_dir
        self._binary = binary
        self._log = log
        self.decision_timeout = decision_timeout
        """May be set anew while running."""
        self._max_connections = max_connections
        self._workers = workers
        self._timing = timing
        self._words = words
        self._max_together = max_together
        self._max_memory_bytes = max_memory_bytes
        self._tally = Tally()
        self._backoff = timing.first_backoff
        self._numbers = itertools.count(1)
        self._running: _Running | None = None
        self._asked: Opa | Sharing | None = None
        self._changing = trio.Lock()
        self.borrowers: Borrowers | None = None
        self._offered = 0
        """Bundles handed to `activate` that it has not done with."""
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._nursery: trio.Nursery
        self._directory: Path

    @property
    def bundle(self) -> PolicyBundle | None:
        """What was accepted last, whether or not its OPA is there at this moment."""
        return self._running.bundle if self._running is not None else None

    @property
    def bundle_revision(self) -> str | None:
        return self._running.bundle.revision if self._running is not None else None

    @property
    def in_force(self) -> PolicyBundle | None:
        """The bundle that decides whatever is asked now; None while another one is offered, where there is none, and at the end."""
        running = self._running
        return None if self._offered or running is None or self.state == "stopped" else running.bundle

    @property
    def lending(self) -> Lending | None:
        """What decides now, for others to ask; None before there was anything. An OPA that has ended is asked in vain."""
        running = self._running
        if running is None:
            return None
        bundle = replace(running.bundle, archive=b"", keys={})
        return Lending(socket=running.child.socket, uids=frozenset({os.getuid()}), bundle=bundle)

    @property
    def sharing(self) -> Sharing | None:
        """Who puts questions together now; None where nobody does."""
        return self._asked if isinstance(self._asked, Sharing) else None

    @property
    def sharing_use(self) -> SharingUse:
        """Of all the OPAs that there were."""
        return self._tally.use

    async def decide(self, inquiry: Inquiry) -> Decision:
        asked = self._asked
        if asked is None:
            if self._running is None:
                raise NoDecision("no policy has been accepted yet", code="policy_not_ready")
            raise NoDecision("OPA has ended and is not back yet", code="decision_unreachable")
        return await asked.decide(inquiry, self.decision_timeout)

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be ready for `activate`, and keep the OPA that it starts running, until `stop` or cancellation.

        Raises `OperatorFault`: `runtime_dir_unusable`, `runtime_dir_too_long`.
        """
        self._ended = trio.Event()
        try:
            with self._scope, private.directory(self._runtime_dir) as self._directory:
                async with trio.open_nursery() as self._nursery:
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._asked = None
            if self._running is not None:
                self._running.asked.close()
            self.state = "stopped"
            self._ended.set()

    async def stop(self) -> None:
        """End OPA, and `run` with it: SIGTERM, 2 s, SIGKILL. Whoever wants the last decisions answered waits first."""
        self._scope.cancel()
        if self._ended is not None:
            await self._ended.wait()

    async def activate(self, bundle: PolicyBundle) -> None:
        """Start an OPA on `bundle`; return once decisions come from it.

        Where content and keys are those that run, nothing happens. Raises `OperatorFault` where it is refused, and then
        nothing has changed: `bundle_refused`, `opa_failed`, `opa_not_started`, `opa_stopped`, `runtime_dir_unusable`.
        """
        self._offer(1)
        try:
            async with self._changing:
                if self._ended is None or self._scope.cancel_called:
                    raise OperatorFault("OPA is not running", code="opa_stopped")
                running = self._running
                if running is None or running.bundle != bundle:
                    fresh = await self._launch(bundle)
                    self._take_over(fresh)
                    await fresh.settled.wait()
        finally:
            self._offer(-1)

    def _offer(self, change: int) -> None:
        was, self._offered = bool(self._offered), self._offered + change
        if self.borrowers is not None and was != bool(self._offered):
            self.borrowers.offered(not was)

    # ── one process ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _launch(self, bundle: PolicyBundle) -> _Running:
        directory = self._directory / str(next(self._numbers))
        archive = directory / "bundle.tar.gz"
        child: Child | None = None
        opa: Opa | None = None
        try:
            directory.mkdir(mode=0o700)
            await trio.to_thread.run_sync(archive.write_bytes, bundle.archive)
            child = Child(
                self._binary, directory, told.configuration(bundle, archive), workers=self._workers,
                max_memory_bytes=self._max_memory_bytes,
            )  # fmt: skip
            opa = Opa(
                self._network, child.socket, bundle=told.NAME, decision_timeout=self.decision_timeout,
                max_connections=self._max_connections, words=self._words,
            )  # fmt: skip
            await self._nursery.start(child.run)
            asked = self._shared(opa, bundle)
            revision = await self._accepted(child, asked)
            if revision != bundle.revision:
                raise OperatorFault(f"OPA runs {revision!r}, and was handed {bundle.revision!r}", code="bundle_refused")
        except BaseException as error:
            if child is not None:
                child.cancel()
            if opa is not None:
                opa.close()
            shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError):  # no room, no descriptors: it may be better later
                raise OperatorFault(f"{directory}: {error.strerror}", code="runtime_dir_unusable") from error
            raise
        self._log("opa.started", "info", pid=child.pid, revision=bundle.revision)
        return _Running(
            child=child,
            opa=opa,
            asked=asked,
            bundle=bundle,
            directory=directory,
            since=trio.current_time(),
            settled=trio.Event(),
        )

    def _shared(self, opa: Opa, bundle: PolicyBundle) -> Opa | Sharing:
        """What is asked in other words than ours has no rule for several questions."""
        if self._words is not OURS or self._max_together < 2 or not bundle.batch:
            return opa
        return Sharing(opa, self._nursery, bundle.batch, max_together=self._max_together, tally=self._tally)

    async def _accepted(self, child: Child, asked: Opa | Sharing) -> str:
        """Wait until OPA has verified and compiled its bundle; return the revision, or raise with OPA's reason."""
        opa = asked.opa if isinstance(asked, Sharing) else asked
        with trio.move_on_after(self._timing.start_timeout):
            while not child.exited.is_set():
                try:
                    await opa.ask_health(timeout=self._timing.liveness_timeout, bundles=True)
                    revision = await opa.revision(timeout=self._timing.liveness_timeout)
                except NoDecision as error:
                    if error.code == "decision_unproven":
                        raise OperatorFault("its manifest states no revision", code="bundle_refused") from error
                    if error.code == "decision_status_500":
                        await self._complain(opa)
                    await trio.sleep(_READY_INTERVAL)  # it does not listen yet, or is still reading
                else:
                    await asked.warm_up()
                    return revision
            raise OperatorFault(f"OPA {child.fate}", code="opa_failed")
        raise OperatorFault(f"OPA was not ready within {self._timing.start_timeout:g} s", code="opa_failed")

    async def _complain(self, opa: Opa) -> None:
        """Raise what OPA has against its bundle, if it has said so by now."""
        try:
            complaint = await opa.complaint(timeout=self._timing.liveness_timeout)
        except NoDecision:
            return
        if complaint is not None:
            raise OperatorFault(complaint, code="bundle_refused")

    def _take_over(self, fresh: _Running) -> None:
        before, self._running = self._running, fresh
        self._asked = fresh.asked
        self.state = "ok"
        if before is None or before.bundle is not fresh.bundle:
            self._log("bundle.activated", "info", revision=fresh.bundle.revision, serial=fresh.bundle.serial)
        self._nursery.start_soon(self._guard, fresh)
        if self.borrowers is not None:
            self._nursery.start_soon(self._settle, fresh, before, self.borrowers)
            return
        fresh.settled.set()
        if before is not None:
            self._nursery.start_soon(self._retire, before)

    async def _settle(self, fresh: _Running, before: _Running | None, borrowers: Borrowers) -> None:
        await borrowers.changed_over()
        fresh.settled.set()
        if before is not None:
            await self._retire(before)

    async def _retire(self, before: _Running) -> None:
        await before.asked.aclose()
        await before.child.stop()
        shutil.rmtree(before.directory, ignore_errors=True)

    # ── supervision ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _guard(self, running: _Running) -> None:
        await self._until_ended(running)
        if self._running is not running:
            return  # it was retired
        self._asked = None
        self.state = "restarting"
        self.restarts += 1
        self._log("opa.ended", "error", pid=running.child.pid, reason=running.child.fate, restarts=self.restarts)
        if trio.current_time() - running.since >= self._timing.healthy_after:
            self._backoff = self._timing.first_backoff
        while self._running is running:
            delay, self._backoff = self._backoff, min(2 * self._backoff, self._timing.max_backoff)
            await trio.sleep(delay)
            async with self._changing:
                if self._running is running:  # else another bundle was faster
                    await self._restart(running)

    async def _restart(self, running: _Running) -> None:
        try:
            self._take_over(await self._launch(running.bundle))
        except OperatorFault as fault:
            self._log("opa.restart_failed", "error", code=fault.code, reason=str(fault))

    async def _until_ended(self, running: _Running) -> None:
        """Return when it has ended, by our hand if it hangs, or has been replaced: then it may take its time."""
        missed = 0
        while self._running is running:
            with trio.move_on_after(self._timing.liveness_interval):
                await running.child.exited.wait()
                return
            try:
                await running.opa.ask_health(timeout=self._timing.liveness_timeout)
            except NoDecision as error:
                missed += 1
                if missed >= self._timing.max_missed:
                    self._log("opa.hung", "error", pid=running.child.pid, missed=missed, reason=error.code)
                    running.child.kill()
                    await running.child.exited.wait()
                    return
            else:
                missed = 0
