"""OPA kept running: one process with one bundle answers, and this file sees to it that there is one.

A process is started for a bundle and never given another. Whatever changes (the bundle's bytes, keys, a crash) means a
new process, in a directory of its own: it is started, it verifies the signature, it is warmed up, and only then do
questions go to it; the one before ends when its last question has been answered. What cannot do that is refused, and
the one before stays. So an accepted policy is replaced by an accepted policy or by nothing, and never by an unsigned one.

A crash is answered with the bundle that was accepted, not with what lies at its source by now.

    starting ──▶ ok ──exit, or no answer──▶ restarting ──▶ ok          starting ──▶ refused: `run` raises
                  └──new bundle──▶ a second process ──▶ ok, or refused and told in `bundle_error`
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from sidecar.decision import policy as disk
from sidecar.decision import private
from sidecar.decision.child import Child
from sidecar.decision.opa import OnlyFrom, Opa
from sidecar.decision.policy import Policy
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Decision, Inquiry
from sidecar.wire.network import Network

State = Literal["starting", "ok", "restarting", "refused", "stopped"]
Log = Callable[..., None]
"""`log(event, level, **fields)`; level is "info", "warning" or "error"."""

_READY_INTERVAL = 0.02
_ABOUT_THE_BUNDLE = frozenset({"bundle_refused", "bundle_unreadable"})


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
    poll_interval: float = 1.0
    """How often the source is looked at. A change is taken up once two looks in a row agree on it."""


DEFAULT_TIMING = Timing()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Running:
    """One OPA that has accepted one bundle."""

    child: Child
    opa: Opa
    policy: Policy
    source: Path
    """The file that the bundle was read from."""
    bundle: Path
    """Our copy of it."""
    revision: str
    since: float


class Engine:
    """`model.DecisionPoint` over an OPA of our own. `run` has to be running, in the thread that started trio.

    `runtime_dir` is where the private directory is made (see `private.place`), `binary` an OPA. `workers` bounds the
    processors that OPA uses.
    """

    def __init__(
        self,
        policy: Policy,
        network: Network,
        *,
        runtime_dir: Path,
        binary: Path,
        log: Log,
        decision_timeout: float = 1.0,
        max_connections: int = 64,
        workers: int = 1,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.state: State = "starting"
        self.restarts = 0
        self.bundle_revision: str | None = None
        self.bundle_error: str | None = None
        """Why what lies at the source now is not what runs."""
        self._policy = policy
        self._network = OnlyFrom(network, frozenset({os.getuid()}))
        self._runtime_dir = runtime_dir
        self._binary = binary
        self._log = log
        self.decision_timeout = decision_timeout
        """May be set anew while running."""
        self._max_connections = max_connections
        self._workers = workers
        self._timing = timing
        self._backoff = timing.first_backoff
        self._numbers = itertools.count(1)
        self._running: _Running | None = None
        self._opa: Opa | None = None
        self._seen: disk.Fingerprint = ()
        self._changing = trio.Lock()
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._nursery: trio.Nursery
        self._directory: Path

    async def decide(self, inquiry: Inquiry) -> Decision:
        opa = self._opa
        if opa is None:
            if self._running is None:
                raise NoDecision("no policy has been accepted yet", code="policy_not_ready")
            raise NoDecision("OPA has ended and is not back yet", code="decision_unreachable")
        return await opa.decide(inquiry, self.decision_timeout)

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start OPA, report when it has accepted the policy, and keep it running until `stop` or cancellation.

        Raises `OperatorFault` where there is nothing to begin with: `bundle_refused`, `bundle_unreadable`,
        `opa_failed`, `opa_not_started`, `runtime_dir_unusable`, `runtime_dir_too_long`.
        """
        fault: OperatorFault | None = None
        self._ended = trio.Event()
        try:
            with self._scope, private.directory(self._runtime_dir) as self._directory:
                async with trio.open_nursery() as self._nursery:
                    try:
                        await self._begin()
                    except OperatorFault as error:
                        fault = error  # raised below: a nursery would wrap it into a group
                    else:
                        task_status.started()
                        await self._watch_source()
                    self._nursery.cancel_scope.cancel()
        finally:
            self._opa = None
            if self._running is not None:
                self._running.opa.close()
                self.state = "stopped"
            self._ended.set()
        if fault is not None:
            raise fault

    async def stop(self) -> None:
        """End OPA, and `run` with it: SIGTERM, 2 s, SIGKILL. Whoever wants the last decisions answered waits first."""
        self._scope.cancel()
        if self._ended is not None:
            await self._ended.wait()

    async def reload(self, policy: Policy | None = None) -> None:
        """Take up `policy`, or look again at the present one's source; return once decisions come from it.

        Where nothing has changed, nothing happens. Raises `OperatorFault` where it is refused: the old one stays.
        """
        async with self._changing:
            if self._running is None or self._scope.cancel_called:
                raise OperatorFault("OPA is not running", code="opa_stopped")
            wanted = policy or self._policy
            seen = disk.fingerprint(wanted.source)
            if wanted.source == self._policy.source:
                self._seen = seen  # the watch need not find out again
            try:
                fresh = None if await self._is_running(wanted) else await self._load(wanted)
            except OperatorFault as fault:
                self.bundle_error = str(fault)
                self._log("bundle.refused", "error", source=str(wanted.source), code=fault.code, reason=str(fault))
                raise
            self._policy, self._seen, self.bundle_error = wanted, seen, None
            if fresh is not None:
                self._take_over(fresh)

    async def _begin(self) -> None:
        async with self._changing:
            self._seen = disk.fingerprint(self._policy.source)
            try:
                self._take_over(await self._load(self._policy))
            except OperatorFault as fault:
                self.state, self.bundle_error = "refused", str(fault)
                raise

    async def _watch_source(self) -> None:
        before = self._seen
        while True:
            await trio.sleep(self._timing.poll_interval)
            now = disk.fingerprint(self._policy.source)
            if now == before and now != self._seen:
                self._seen = now
                try:
                    await self.reload()
                except OperatorFault:
                    pass  # told, and kept in `bundle_error`
            before = now

    # ── one process ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _is_running(self, wanted: Policy) -> bool:
        running = self._running
        if running is None or running.policy != wanted:
            return False

        def same() -> bool:
            first = disk.candidates(wanted)[0]
            return disk.read(first, wanted.max_bundle_bytes) == disk.read(running.bundle, wanted.max_bundle_bytes)

        return await trio.to_thread.run_sync(same)

    async def _load(self, policy: Policy) -> _Running:
        """Start an OPA with the first bundle of the policy that it accepts."""
        paths = await trio.to_thread.run_sync(disk.candidates, policy)
        refused = []
        for path in paths:
            try:
                return await self._launch(policy, path, path)
            except OperatorFault as fault:
                if fault.code not in _ABOUT_THE_BUNDLE or len(paths) == 1:
                    raise
                refused.append(f"{path.name}: {fault}")
                self._log("bundle.skipped", "warning", source=str(path), reason=str(fault))
        raise OperatorFault("; ".join(refused), code="bundle_refused")

    async def _launch(self, policy: Policy, source: Path, bundle: Path) -> _Running:
        directory = self._directory / str(next(self._numbers))
        copy = directory / "bundle.tar.gz"
        child: Child | None = None
        opa: Opa | None = None
        try:
            directory.mkdir(mode=0o700)
            data = await trio.to_thread.run_sync(disk.read, bundle, policy.max_bundle_bytes)
            await trio.to_thread.run_sync(copy.write_bytes, data)
            del data
            child = Child(self._binary, directory, disk.configuration(policy, copy), workers=self._workers)
            opa = Opa(
                self._network, child.socket, bundle=disk.NAME, decision_timeout=self.decision_timeout,
                max_connections=self._max_connections,
            )  # fmt: skip
            await self._nursery.start(child.run)
            revision = await self._accepted(child, opa)
        except BaseException as error:
            if child is not None:
                child.cancel()
            if opa is not None:
                opa.close()
            shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError):  # no room, no descriptors: it may be better later
                raise OperatorFault(f"{directory}: {error.strerror}", code="runtime_dir_unusable") from error
            raise
        self._log("opa.started", "info", pid=child.pid, revision=revision, source=str(source))
        return _Running(
            child=child, opa=opa, policy=policy, source=source, bundle=copy, revision=revision,
            since=trio.current_time(),
        )  # fmt: skip

    async def _accepted(self, child: Child, opa: Opa) -> str:
        """Wait until OPA has verified and compiled its bundle; return the revision, or raise with OPA's reason."""
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
                    await opa.warm_up()
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
        self._opa = fresh.opa
        self.state = "ok"
        if before is None or before.revision != fresh.revision or before.source != fresh.source:
            self._log("bundle.activated", "info", revision=fresh.revision, source=str(fresh.source))
        self.bundle_revision = fresh.revision
        self._nursery.start_soon(self._guard, fresh)
        if before is not None:
            self._nursery.start_soon(self._retire, before)

    async def _retire(self, before: _Running) -> None:
        await before.opa.aclose()
        await before.child.stop()
        shutil.rmtree(before.bundle.parent, ignore_errors=True)

    # ── supervision ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _guard(self, running: _Running) -> None:
        await self._until_ended(running)
        if self._running is not running:
            return  # it was retired
        self._opa = None
        self.state = "restarting"
        self.restarts += 1
        self._log("opa.ended", "error", pid=running.child.pid, reason=running.child.fate, restarts=self.restarts)
        if trio.current_time() - running.since >= self._timing.healthy_after:
            self._backoff = self._timing.first_backoff
        while self._running is running:
            delay, self._backoff = self._backoff, min(2 * self._backoff, self._timing.max_backoff)
            await trio.sleep(delay)
            async with self._changing:
                if self._running is running:  # else a reload was faster
                    await self._restart(running)

    async def _restart(self, running: _Running) -> None:
        try:
            self._take_over(await self._launch(running.policy, running.source, running.bundle))
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
