"""How a rollout is moved: by somebody's order, or by its gates. What is written is what was seen, moved by one step.

An order is weighed against the database, not against what this server remembers, and takes effect only if nobody else has moved
the rollout since: of two orders at once one wins, and the other is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sidecar.errors import ClientFault
from sidecar.fleet import notation, reports
from sidecar.fleet import rollout as rollouts
from sidecar.fleet.notation import MAX_WHY, Order
from sidecar.fleet.rollout import NotPossible, Rollout
from sidecar.fleet.shelf import Shelf
from sidecar.fleet.state import Kept, Outrun, State

GATES = "gates"
"""Who halts a rollout that nobody halted."""
Log = Callable[..., None]
"""`log(event, level, **fields)`; level is "info", "warning" or "error"."""


class NotSeen(ClientFault):
    status = 412
    code = "rollout_not_seen"
    public = "the rollout is not the one that If-Match names"


class Helm:
    def __init__(self, state: State, log: Log, clock: Callable[[], float]) -> None:
        self._state = state
        self._log = log
        self._clock = clock

    async def act(self, shelf: Shelf, order: Order, who: str, wanted: int | None) -> Kept:
        """Follow an order. `wanted`: the version of the rollout that it was given for; None for any.

        Raises `NotPossible`, `Malformed`, `NotSeen`, `Outrun` or `StateUnavailable`, and then nothing has changed.
        """
        seen = await self._state.load(shelf.name)
        if wanted is not None and wanted != seen.version:
            raise NotSeen(public=f"the rollout is at {seen.version}, and If-Match names {wanted}")
        now = self._clock()
        after = await self._ordered(shelf, seen, order, now)
        return await self._step(shelf, seen, after, order.action, who, order.why, now)

    async def look(self, shelf: Shelf) -> None:
        """Halt a rollout whose gates are broken."""
        kept, now = shelf.kept, self._clock()
        broken = rollouts.broken_gates(kept.rollout, [reports.report(row) for row in shelf.rows.values()], now)
        if broken:
            why = _briefly(broken)
            after = rollouts.moved(kept.rollout, "halt", why, shelf.versions, now)
            try:
                await self._step(shelf, kept, after, "halt", GATES, why, now)
            except Outrun:  # somebody was faster: what they made of it is looked at next
                shelf.renew(await self._state.load(shelf.name))

    async def _ordered(self, shelf: Shelf, seen: Kept, order: Order, now: float) -> Rollout:
        """What the order makes of the rollout. Raises `NotPossible` or `Malformed`."""
        rollout, versions = seen.rollout, {serial: one.version for serial, one in seen.published.items()}
        if order.serial is not None:
            if order.serial not in versions:
                raise NotPossible(public=f"serial {order.serial} was not published")
            gates = notation.changed(rollouts.Gates(), order.gates)
            rings = rollout.rings if order.rings is None else order.rings
            return rollouts.started(
                rollout, versions[order.serial], rings, gates, order.why, shadow_first=order.shadow_first
            )
        rollout = replace(rollout, gates=notation.changed(rollout.gates, order.gates))
        after = rollouts.moved(rollout, order.action, order.why, versions, now)
        if order.action == "promote":
            await shelf.settle()
            heard = [reports.report(row) for row in (await self._state.rows(shelf.name)).values()]
            if unmet := rollouts.unmet(rollout, heard, now):
                raise NotPossible(public=f"it cannot go further: {_briefly(unmet)}")
        return after

    async def _step(
        self, shelf: Shelf, seen: Kept, after: Rollout, action: str, who: str, why: str, now: float
    ) -> Kept:
        await self._state.step(seen, after, action=action, who=who, why=why, at=now)
        kept = await self._state.load(shelf.name)
        shelf.renew(kept)
        self._log(
            "rollout.changed", "warning" if who == GATES else "info", bundle=shelf.name, action=action,
            state=after.state, current=after.current, candidate=after.candidate, who=who, reason=why,
        )  # fmt: skip
        return kept


def _briefly(reasons: Sequence[str]) -> str:
    """The first few of them in one sentence."""
    shown = "; ".join(reasons[:5])
    return (shown if len(reasons) <= 5 else f"{shown}; and {len(reasons) - 5} more")[:MAX_WHY]
