"""An OPA that somebody else runs: asked over a unix socket of a known user, and watched, but neither started nor trusted
with more than its answers. Whose signatures its bundles carry, we cannot know.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import trio

from sidecar.decision.engine import DEFAULT_TIMING, Log, Timing
from sidecar.decision.opa import OnlyFrom, Opa
from sidecar.errors import NoDecision
from sidecar.model import Decision, Inquiry, Lending
from sidecar.wire.network import Network


class External:
    """`model.DecisionPoint` over the OPA at `socket`, with the surface of `Engine` as far as it applies.

    `peer_uid` is the user that must listen there; None: our own, or root. Its bundle's revision is taken as stated.
    """

    restarts = 0
    bundle_error: str | None = None
    cache_use: None = None
    """Nothing is repeated: which bundles it runs, and whether they are proven pure, is not ours to know."""
    sharing_use: None = None
    """Nothing is shared: whether they carry the rule for it is not ours to know either."""
    bundle_state = "ok"
    """Not ours to know."""

    def __init__(
        self,
        socket: Path,
        network: Network,
        *,
        log: Log,
        peer_uid: int | None = None,
        decision_timeout: float = 1.0,
        max_connections: int = 64,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.state: Literal["starting", "ok", "unreachable"] = "starting"
        self.bundle_revision: str | None = None
        """Of the decision made last; None before there was one."""
        uids = {os.getuid(), 0} if peer_uid is None else {peer_uid}
        self._socket, self._uids = socket, frozenset(uids)
        self._opa = Opa(
            OnlyFrom(network, frozenset(uids)), socket, bundle=None, decision_timeout=decision_timeout,
            max_connections=max_connections,
        )  # fmt: skip
        self.decision_timeout = decision_timeout
        """May be set anew while running."""
        self._log = log
        self._timing = timing
        self._scope = trio.CancelScope()

    @property
    def lending(self) -> Lending:
        """For others to ask."""
        return Lending(socket=self._socket, uids=self._uids, bundle=None)

    async def decide(self, inquiry: Inquiry) -> Decision:
        decision = await self._opa.decide(inquiry, self.decision_timeout)
        self.bundle_revision = decision.revision
        return decision

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch it until `stop` or cancellation. Reports at once: an OPA that comes later is no fault of ours."""
        task_status.started()
        try:
            with self._scope:
                while True:
                    await self._look()
                    await trio.sleep(self._timing.liveness_interval)
        finally:
            self._opa.close()

    async def stop(self) -> None:
        self._scope.cancel()
        await trio.lowlevel.checkpoint()

    async def _look(self) -> None:
        try:
            await self._opa.ask_health(timeout=self._timing.liveness_timeout, bundles=True)
        except NoDecision as error:
            if self.state != "unreachable":
                self._log("opa.lost", "error", socket=str(self._socket), code=error.code, reason=error.detail)
            self.state = "unreachable"
        else:
            if self.state != "ok":
                self._log("opa.reached", "info", socket=str(self._socket))
            self.state = "ok"
