"""An OPA that somebody else of the same sidecar keeps running, and lends: asked like our own, and never started or ended here.

Which OPA it is, what it runs and until when that may decide is told from outside (`lend`). Nothing is known here of how; where
nothing more is told, the last one is asked, and what cannot be had of it is no decision. Each OPA has one bundle for its
whole life, so an OPA that was lent says for good which bundle decides.
"""

from __future__ import annotations

import time

import trio

from sidecar.decision import policy
from sidecar.decision.inquiry import OURS, Contract
from sidecar.decision.opa import OnlyFrom, Opa
from sidecar.decision.sharing import MAX_TOGETHER, Sharing
from sidecar.decision.waiting import Tally
from sidecar.errors import NoDecision
from sidecar.model import Decision, Inquiry, Lending, PolicyBundle, SharingUse
from sidecar.wire.network import Network


class Lent:
    """`model.DecisionPoint`, and what `remembered.Remembered` asks. `decision_timeout` in seconds, set anew while running.

    `run` has to be running before anything is lent. `words` and `max_together` as of `engine.Engine`.
    """

    def __init__(
        self,
        network: Network,
        *,
        decision_timeout: float,
        max_connections: int = 64,
        words: Contract = OURS,
        max_together: int = MAX_TOGETHER,
    ) -> None:
        self.decision_timeout = decision_timeout
        self.offered = False
        """Whether another bundle is on its way in."""
        self._network = network
        self._max_connections = max_connections
        self._words = words
        self._max_together = max_together
        self._tally = Tally()
        self._lending: Lending | None = None
        self._asked: Opa | Sharing | None = None
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ends by cancellation."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            if self._asked is not None:
                self._asked.close()
            self._asked = None

    @property
    def in_force(self) -> PolicyBundle | None:
        """As of `engine.Engine`."""
        return None if self.offered or self._lending is None else self._lending.bundle

    @property
    def revision(self) -> str | None:
        bundle = self._lending.bundle if self._lending is not None else None
        return bundle.revision if bundle is not None else None

    @property
    def sharing_use(self) -> SharingUse:
        """As of `engine.Engine`."""
        return self._tally.use

    def stale(self) -> bool:
        until = self._lending.stale_at if self._lending is not None else None
        return until is not None and time.time() > until

    async def decide(self, inquiry: Inquiry) -> Decision:
        asked = self._asked
        if asked is None:
            raise NoDecision("no policy has been accepted yet", code="policy_not_ready")
        return await asked.decide(inquiry, self.decision_timeout)

    def lend(self, lending: Lending) -> Opa | Sharing | None:
        """Ask this one from now on. Returns the one before, which is the caller's to close (`aclose`); None where it stays."""
        before = self._lending
        if before is not None and before.socket == lending.socket:
            # The same bundle, and the very same value: what is kept of its decisions stays.
            self._lending = Lending(
                socket=before.socket, uids=before.uids, bundle=before.bundle, stale_at=lending.stale_at
            )
            return None
        retired, self._lending = self._asked, lending
        opa = Opa(
            OnlyFrom(self._network, lending.uids), lending.socket,
            bundle=policy.NAME if lending.bundle is not None else None, decision_timeout=self.decision_timeout,
            max_connections=self._max_connections, words=self._words,
        )  # fmt: skip
        self._asked = self._shared(opa, lending.bundle)
        self._nursery.start_soon(self._asked.warm_up)
        return retired

    def _shared(self, opa: Opa, bundle: PolicyBundle | None) -> Opa | Sharing:
        if bundle is None or self._words is not OURS or self._max_together < 2 or not bundle.batch:
            return opa
        return Sharing(opa, self._nursery, bundle.batch, max_together=self._max_together, tally=self._tally)
