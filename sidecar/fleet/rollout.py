"""One rollout: which serial a sidecar is to run, what may follow from what, and when it stops by itself. Pure.

A *current* serial is for everybody; a *candidate* is for the rings that it has reached. Rings are cumulative, in their
order: by label, or by a stable share of SPIFFE IDs. `TRANSITIONS` is all that can happen:

    state      start    promote          pause    resume   halt     rollback
    ─────────────────────────────────────────────────────────────────────────
    settled    rolling                                              returned
    rolling             rolling|settled  paused            halted   returned
    paused                                        rolling  halted   returned
    halted     rolling                            rolling           returned
    returned   rolling

Settled: the current serial is for everybody. Halted: the candidate goes no further, and its rings go back to the current one
as far as the candidate's own signed permission reaches (`may_return_to`, `return_until`). Returned: the serial before is
for everybody again, under the same permission. Where the permission does not reach, a sidecar would refuse the way back: it
keeps what it has (`assigned`), and the status says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from sidecar.errors import ClientFault

State: TypeAlias = Literal["settled", "rolling", "paused", "halted", "returned"]
Action: TypeAlias = Literal["start", "promote", "pause", "resume", "halt", "rollback"]

TRANSITIONS: Mapping[tuple[State, Action], State] = MappingProxyType(
    {
        ("settled", "start"): "rolling",
        ("settled", "rollback"): "returned",
        ("rolling", "promote"): "rolling",
        ("rolling", "pause"): "paused",
        ("rolling", "halt"): "halted",
        ("rolling", "rollback"): "returned",
        ("paused", "resume"): "rolling",
        ("paused", "halt"): "halted",
        ("paused", "rollback"): "returned",
        ("halted", "start"): "rolling",
        ("halted", "resume"): "rolling",
        ("halted", "rollback"): "returned",
        ("returned", "start"): "rolling",
    }
)
"""`promote` out of the last ring settles: see `moved`."""
MAX_RINGS = 32
GONE_SECONDS = 300.0
"""Who was not heard of for so long is taken to be gone, where no gate says another time."""


class NotPossible(ClientFault):
    """An action that does not follow from the state, or whose conditions do not hold."""

    status = 409
    code = "rollout_conflict"
    public = "the rollout does not allow this now"


class Malformed(ClientFault):
    """An order that cannot be read."""

    status = 400
    code = "rollout_malformed"
    public = "the order is malformed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Who gets a candidate at this step: whoever has all of `labels`, or the share of `percent`. One of both."""

    name: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What must hold in the rings that a candidate has reached. Broken: it is halted. None: not looked at."""

    max_errors: int | None = 0
    """Sidecars that report that they could not activate it."""
    max_denial_rise: float | None = 0.1
    """By how much the share of denials may rise against that of the serial before; 0.1 is ten points of a hundred."""
    min_decisions: int = 50
    """Below so many decisions of a sidecar its share says nothing."""
    max_shadow_flips: int | None = 0
    """Decisions that the candidate, asked beside the policy in force, would have taken the other way."""
    max_silent_seconds: float | None = 300.0
    """For how long a sidecar that was handed the candidate may not be heard of."""
    max_behind: int | None = 0
    """Sidecars of the rings reached that need not run it yet when it is promoted. Looked at then only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What the server must know of a published bundle to roll it out."""

    serial: int
    may_return_to: frozenset[int] = frozenset()
    return_until: float | None = None

    def allows_return(self, serial: int, now: float) -> bool:
        return serial in self.may_return_to and self.return_until is not None and now < self.return_until


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """`current` None: nothing was ever rolled out. `reached`: number of rings that have the candidate."""

    bundle: str
    state: State = "settled"
    current: int | None = None
    previous: int | None = None
    """The serial before `current`, to which a rollback leads."""
    candidate: int | None = None
    highest: int | None = None
    """Of all that began here: nothing below it may begin, since whoever has accepted it would refuse that."""
    reached: int = 0
    rings: tuple[Ring, ...] = (Ring(name="all", percent=100.0),)
    gates: Gates = Gates()
    reason: str = ""
    """Why it is in this state, in the words of whoever, or whatever, brought it there."""

    def check(self, action: Action) -> State:
        """The state that the action leads to. Raises `NotPossible`."""
        try:
            return TRANSITIONS[self.state, action]
        except KeyError:
            raise NotPossible(public=f"a rollout that is {self.state} cannot {action}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What is known of what a sidecar has accepted; nothing, where it never said."""

    runs: int | None = None
    highest: int | None = None
    """It goes below this one only where this one allows it."""


UNKNOWN = Holding()
NO_VERSIONS: Mapping[int, Version] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one sidecar said last, and when it was heard of last. `id` is proven."""

    id: str
    at: float
    serial: int | None
    """What it runs; of one that never reported, what it was handed and came back with."""
    highest: int | None = None
    """Of all that it ever said it runs."""
    given: int | None = None
    """What it was handed last."""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    error_serial: int | None = None
    """The serial that it could not activate; None where there is no error."""
    error: str = ""
    allowed: int = 0
    denied: int = 0
    """Since it runs this serial."""
    before_allowed: int = 0
    before_denied: int = 0
    """While it ran the serial before."""
    shadow_serial: int | None = None
    shadow_compared: int = 0
    shadow_flips: int = 0
    activated_at: float | None = None
    first_seen_at: float | None = None


# ── who runs what ─────────────────────────────────────────────────────────────────────────────────────────────────


def share_of(bundle: str, spiffe_id: str) -> float:
    """Where an ID stands among all, from 0 to 100: always the same, and not the same for each bundle."""
    digest = hashlib.sha256(f"{bundle}\0{spiffe_id}".encode()).digest()
    return int.from_bytes(digest[:6]) * 100 / 2**48  # with more bits it would be rounded to 100, where no ring reaches


def in_rings(rollout: Rollout, spiffe_id: str, labels: Mapping[str, str], reached: int | None = None) -> bool:
    """Whether one of the rings that were reached holds this sidecar."""
    count = rollout.reached if reached is None else reached
    share = share_of(rollout.bundle, spiffe_id)
    return any(_holds(ring, share, labels) for ring in rollout.rings[:count])


def _holds(ring: Ring, share: float, labels: Mapping[str, str]) -> bool:
    if ring.percent is not None:
        return share < ring.percent
    return all(labels.get(name) == value for name, value in ring.labels.items())


def intended(rollout: Rollout, spiffe_id: str, labels: Mapping[str, str]) -> int | None:
    """The serial that a sidecar with these labels should run; None where there is none for it."""
    return rollout.candidate if _moving(rollout) and in_rings(rollout, spiffe_id, labels) else rollout.current


def assigned(
    rollout: Rollout,
    spiffe_id: str,
    labels: Mapping[str, str],
    holding: Holding = UNKNOWN,
    versions: Mapping[int, Version] = NO_VERSIONS,
    now: float = 0.0,
) -> int | None:
    """The serial to hand to a sidecar: what is intended for it, or what it has where it would have to refuse that."""
    intent = intended(rollout, spiffe_id, labels)
    if intent is None:
        return holding.runs
    for serial in (intent, holding.runs):
        if serial is not None and (serial == holding.runs or _accepted(serial, holding, versions, now)):
            return serial
    return holding.highest


def _accepted(serial: int, holding: Holding, versions: Mapping[int, Version], now: float) -> bool:
    """Whether it would take this one: the rule of `bundles.release.accept`."""
    known = [one for one in (holding.runs, holding.highest) if one is not None]
    if not known or serial >= (highest := max(known)):
        return True
    return highest in versions and versions[highest].allows_return(serial, now)


def shadowed(rollout: Rollout, spiffe_id: str, labels: Mapping[str, str]) -> int | None:
    """The serial to ask beside the one in force: a candidate that this sidecar does not run yet."""
    return rollout.candidate if _moving(rollout) and not in_rings(rollout, spiffe_id, labels) else None


def _moving(rollout: Rollout) -> bool:
    """Whether its rings have the candidate."""
    return rollout.candidate is not None and rollout.state in {"rolling", "paused"}


# ── what may follow ───────────────────────────────────────────────────────────────────────────────────────────────


def started(
    rollout: Rollout, version: Version, rings: Sequence[Ring], gates: Gates, why: str, *, shadow_first: bool = False
) -> Rollout:
    """Begin with a candidate. With `shadow_first` no ring has it at first: it is only asked beside.

    One that was begun with before may be begun with again, after a halt or a return. Raises `NotPossible` or `Malformed`.
    """
    state = rollout.check("start")
    if rollout.current is not None and version.serial <= rollout.current:
        raise NotPossible(public=f"serial {version.serial} is not above {rollout.current}, which is in force")
    if rollout.highest is not None and version.serial < rollout.highest:
        raise NotPossible(
            public=f"serial {version.serial} is below {rollout.highest}: who has accepted that would refuse it"
        )
    _sound(rings)
    return replace(
        rollout, state=state, candidate=version.serial, highest=version.serial, rings=tuple(rings), gates=gates,
        reason=why, reached=0 if shadow_first else 1,
    )  # fmt: skip


def moved(rollout: Rollout, action: Action, why: str, versions: Mapping[int, Version], now: float) -> Rollout:
    """What an action other than `start` makes of it. Raises `NotPossible`."""
    state = rollout.check(action)
    if action == "promote":
        if rollout.reached >= len(rollout.rings):
            return replace(
                rollout, state="settled", previous=rollout.current, current=rollout.candidate, candidate=None,
                reached=0, reason=why,
            )  # fmt: skip
        return replace(rollout, reached=rollout.reached + 1, reason=why)
    if action == "rollback":
        return _returned(rollout, why, versions, now)
    return replace(rollout, state=state, reason=why)


def _returned(rollout: Rollout, why: str, versions: Mapping[int, Version], now: float) -> Rollout:
    if rollout.candidate is not None:  # what only some rings have is given up; nobody else notices
        return replace(rollout, state="returned", candidate=None, reached=0, reason=why)
    if rollout.previous is None or rollout.current is None:
        raise NotPossible(public="there is no serial before this one")
    if not versions[rollout.current].allows_return(rollout.previous, now):
        raise NotPossible(
            public=f"serial {rollout.current} does not allow the return to {rollout.previous} now: publish a higher one"
        )
    return replace(rollout, state="returned", current=rollout.previous, previous=None, reason=why)


def _sound(rings: Sequence[Ring]) -> None:
    if not 0 < len(rings) <= MAX_RINGS:
        raise Malformed(public=f"there must be 1 to {MAX_RINGS} rings")
    if len({ring.name for ring in rings}) < len(rings):
        raise Malformed(public="two rings have the same name")
    for ring in rings:
        if (ring.percent is None) == (not ring.labels):
            raise Malformed(public=f"ring {ring.name} must have either labels or a percentage")
        if ring.percent is not None and not 0 < ring.percent <= 100:
            raise Malformed(public=f"ring {ring.name}: a percentage is more than 0 and at most 100")
    if rings[-1].percent != 100:
        raise Malformed(public="the last ring must be 100 percent: somebody would never get it")


# ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def broken_gates(rollout: Rollout, reports: Sequence[Report], now: float) -> list[str]:
    """Why the candidate must go no further, a sentence each; empty where nothing speaks against it."""
    if not _moving(rollout):
        return []
    gates, found = rollout.gates, []
    mine = [report for report in reports if in_rings(rollout, report.id, report.labels)]
    failed = [report for report in reports if report.error_serial == rollout.candidate]
    if gates.max_errors is not None and len(failed) > gates.max_errors:
        found.append(f"{len(failed)} could not activate serial {rollout.candidate}: {failed[0].id}: {failed[0].error}")
    if gates.max_denial_rise is not None:
        found += [
            f"{report.id} denies {rise:.0%} more of its requests than before"
            for report in mine
            if report.serial == rollout.candidate
            and (rise := _denial_rise(report, gates.min_decisions)) > gates.max_denial_rise
        ]
    if gates.max_shadow_flips is not None:
        flips = sum(report.shadow_flips for report in reports if report.shadow_serial == rollout.candidate)
        if flips > gates.max_shadow_flips:
            found.append(f"{flips} decisions would have gone the other way under serial {rollout.candidate}")
    if gates.max_silent_seconds is not None:
        found += [
            f"{report.id} has not been heard of for {now - report.at:.0f} s"
            for report in mine
            if rollout.candidate in {report.serial, report.given} and now - report.at > gates.max_silent_seconds
        ]
    return found


def speaks_against(rollout: Rollout, report: Report) -> bool:
    """Whether this one report may break a gate, together with others: what need not be looked at is most of them."""
    if not _moving(rollout):
        return False
    flips = report.shadow_flips if report.shadow_serial == rollout.candidate else 0
    return (
        report.error_serial == rollout.candidate
        or flips > 0
        or (report.serial == rollout.candidate and _denial_rise(report, rollout.gates.min_decisions) > 0)
    )


def unmet(rollout: Rollout, reports: Sequence[Report], now: float) -> list[str]:
    """What stands in the way of a promotion: broken gates, and who has the candidate assigned and does not run it.

    Who went silent before being handed the candidate is no longer there, and in nobody's way.
    """
    patience = rollout.gates.max_silent_seconds or GONE_SECONDS
    behind = [
        report.id
        for report in reports
        if in_rings(rollout, report.id, report.labels)
        and report.serial != rollout.candidate
        and (rollout.candidate == report.given or now - report.at <= patience)
    ]
    if rollout.gates.max_behind is None or len(behind) <= rollout.gates.max_behind:
        behind = []
    waiting = [f"{len(behind)} of the ring do not run serial {rollout.candidate} yet: {behind[0]}"] if behind else []
    return broken_gates(rollout, reports, now) + waiting


def _denial_rise(report: Report, min_decisions: int) -> float:
    after, before = report.allowed + report.denied, report.before_allowed + report.before_denied
    if after < min_decisions or before < min_decisions:
        return 0.0
    return report.denied / after - report.before_denied / before
