"""The bundle server: what is asked, and what follows.

    GET  /v1/bundles/{name}                     the archive that is for the caller, held until there is another
    GET  /v1/bundles/{name}/candidate           what it may ask beside it; 204 where there is none
    GET  /v1/bundles/{name}/versions
    PUT  /v1/bundles/{name}/versions/{serial}   publish
    GET  /v1/rollouts/{name}                    POST: start, promote, pause, resume, halt, rollback
    GET  /v1/rollouts/{name}/audit
    GET  /v1/fleet/{name}                       who runs what
    POST /v1/status                             a sidecar's report, or OPA's own

Whether the caller may ask was decided before a request comes here; who it is was proven. Nothing that a caller says about
itself is believed for another: labels choose its own ring, a report speaks of itself.

The server signs nothing. Gates are looked at when a report speaks against a candidate, and every few seconds; what breaks one
halts the rollout, with an entry in the audit log by "gates".
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

from sidecar.bundles.archive import Bounds
from sidecar.errors import ClientFault, OperatorFault, SidecarError
from sidecar.fleet import messages, notation, publication, reports, status
from sidecar.fleet import rollout as rollouts
from sidecar.fleet.helm import Helm, Log
from sidecar.fleet.messages import NotAllowed
from sidecar.fleet.reports import Contact
from sidecar.fleet.shelf import Shelf, Terms
from sidecar.fleet.state import MAX_AUDIT, Kept, Published, State
from sidecar.fleet.store import Key, Store
from sidecar.model import Request, Response, Workload
from sidecar.wire import answers, target

LOOK_INTERVAL = 2.0
"""Seconds between looks at the gates."""
MAX_SHOWN = 50
"""Reasons of one answer."""


class Unknown(ClientFault):
    status = 404
    code = "fleet_path_unknown"
    public = "there is nothing here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    bounds: Bounds = field(default_factory=Bounds)
    """Of what is published."""
    forget_after: float = 86_400.0
    """Who was not heard of for so long is no longer shown."""


class Fleet:
    """`start`, then `watch` in a nursery; `answer` for each request that was allowed."""

    def __init__(
        self,
        bundles: Mapping[str, Terms],
        *,
        state: State,
        store: Store,
        log: Log,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.time,
        in_force: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`in_force`: the revision of the policy that decides who may ask."""
        self._terms = bundles
        self._state = state
        self._store = store
        self._log = log
        self._limits = limits
        self._clock = clock
        self._in_force = in_force
        self._helm = Helm(state, log, clock)
        self._shelves: dict[str, Shelf] = {}
        self._changes = -1
        self._draining = False
        self._lost: dict[str, str] = {}
        """What of `watch` cannot be done, and the code that was told for it."""
        self._verifying = trio.CapacityLimiter(1)
        self._written = trio.CapacityLimiter(4)

    async def start(self) -> None:
        """Read what is kept. Raises `OperatorFault` (`fleet_database_unusable`)."""
        try:
            self._changes = await self._state.changes()
            for name, terms in self._terms.items():
                kept, rows = await self._state.load(name), await self._state.rows(name)
                self._shelves[name] = Shelf(name, terms, self._state, self._store, kept, rows)
        except SidecarError as error:
            raise OperatorFault(f"database: {error.detail}", code="fleet_database_unusable") from error

    async def watch(self) -> None:
        """Follow what other servers change, look at the gates, write down who asked. Ends by cancellation."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._look_forever)

    @property
    def lost(self) -> str | None:
        """The code of why the database cannot be used; None where it can. Without it nothing changes, and bundles are served."""
        return next(iter(self._lost.values()), None)

    def drain(self) -> None:
        """Answer whoever waits now, and hold no question any more."""
        self._draining = True
        for shelf in self._shelves.values():
            shelf.wake()

    async def warm_up(self) -> None:
        """Read what is in force of each bundle, so that the store is known to answer. Raises `StoreUnavailable`."""
        for shelf in self._shelves.values():
            current = shelf.kept.rollout.current
            if current is not None and current in shelf.kept.published:
                await shelf.archive(shelf.kept.published[current])

    async def answer(self, request: Request, caller: Workload) -> Response:
        """Answer a request that was allowed, failures too. Raises `Aborted` where its body broke off, and nothing else."""
        try:
            return await self.perform(request, caller)
        except SidecarError as fault:
            return answers.fault(fault, request_fields=request.head.fields)

    async def perform(self, request: Request, caller: Workload) -> Response:
        """Answer a request that was allowed. Raises `SidecarError` where it fails, `Aborted` where its body broke off."""
        try:
            return await self._answer(request, str(caller.id))
        except NotAllowed as fault:
            return answers.refusal(
                fault.status, fault.code, fault.public, request_fields=request.head.fields,
                extra={"allow": ", ".join(fault.methods)},
            )  # fmt: skip
        except SidecarError as fault:
            if fault.status >= 500:
                self._log("fleet.request_failed", "error", code=fault.code, reason=fault.detail)
            raise

    async def _answer(self, request: Request, caller: str) -> Response:
        place = _place(request.head.target.segments)
        doing = _DOINGS.get(place)
        if doing is None:
            raise Unknown
        if request.head.method not in doing:
            raise NotAllowed(*sorted(doing))
        return await doing[request.head.method](self, request, caller)

    def _shelf(self, request: Request) -> Shelf:
        try:
            return self._shelves[request.head.target.segments[2]]
        except KeyError:
            raise Unknown(code="fleet_bundle_unknown", public="no bundle of this name is kept here") from None

    # ── bundles ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _bundle(self, request: Request, caller: str) -> Response:
        shelf, asked = self._shelf(request), messages.conditions(request)
        deadline, decided_by = trio.current_time() + asked.wait, self._in_force()
        has = None if asked.has is None else asked.has.serial
        shelf.met(Contact(id=caller, at=self._clock(), named=has, labels=asked.labels))
        while True:
            ours = shelf.assigned(caller, asked.labels, has, self._clock())
            if ours is not None and (asked.has is None or ours.archive != asked.has.archive):
                return await self._handed(shelf, ours, asked, caller)
            if not await self._changed(shelf, deadline, decided_by):
                shelf.met(Contact(id=caller, at=self._clock(), named=has, labels=asked.labels))
                if asked.has is not None:
                    return messages.not_modified(asked.tags[0])
                raise Unknown(code="fleet_bundle_missing", public="there is no version for this caller yet")

    async def _handed(self, shelf: Shelf, ours: Published, asked: messages.Conditions, caller: str) -> Response:
        archive = await shelf.archive(ours)
        named = None if asked.has is None else asked.has.serial
        shelf.met(Contact(id=caller, at=self._clock(), named=named, given=ours.serial, labels=asked.labels))
        return messages.bundle(archive, messages.etag(ours.serial, ours.archive, asked.tags, shelf.kept.version))

    async def _candidate(self, request: Request, caller: str) -> Response:
        shelf, asked = self._shelf(request), messages.conditions(request)
        deadline, decided_by = trio.current_time() + asked.wait, self._in_force()
        while True:
            candidate = shelf.candidate(caller, asked.labels)
            if candidate is not None and (asked.has is None or candidate.archive != asked.has.archive):
                tag = messages.etag(candidate.serial, candidate.archive, asked.tags, shelf.kept.version)
                return messages.bundle(await shelf.archive(candidate), tag)
            if candidate is None and asked.has is not None:
                return messages.nothing()
            if not await self._changed(shelf, deadline, decided_by):
                return messages.nothing() if candidate is None else messages.not_modified(asked.tags[0])

    async def _changed(self, shelf: Shelf, deadline: float, decided_by: str | None) -> bool:
        """Wait until somebody may be to run something else; False where it is time to answer.

        That is so, too, where another policy is in force by then than the one that let the question in: it is asked again,
        and decided again.
        """
        if self._draining or trio.current_time() >= deadline:
            return False
        with trio.move_on_at(deadline):
            await shelf.changed.wait()
            return self._in_force() == decided_by
        return False

    async def _versions(self, request: Request, caller: str) -> Response:
        shelf = self._shelf(request)
        published = [one.to_json() for _, one in sorted(shelf.kept.published.items(), reverse=True)]
        return messages.json_answer({"bundle": shelf.name, "versions": published})

    async def _publish(self, request: Request, caller: str) -> Response:
        shelf, said = self._shelf(request), request.head.target.segments[4]
        if not (said.isascii() and said.isdecimal() and len(said) <= 16 and str(int(said)) == said):
            raise Unknown(public="a serial is a number in plain digits")
        sent = await messages.archive_of(request, self._limits.bounds.max_archive_bytes)
        archive, offered = await trio.to_thread.run_sync(
            lambda: publication.published(
                sent, int(said), shelf.terms, bounds=self._limits.bounds, who=caller, now=self._clock()
            ),
            limiter=self._verifying,
        )
        key = Key(bundle=shelf.name, serial=offered.serial, sha256=offered.archive)
        await trio.to_thread.run_sync(self._store.put, key, archive, limiter=self._written)
        outcome = await self._state.publish(shelf.name, offered)
        shelf.renew(await self._state.load(shelf.name))
        if outcome != "same":
            self._log(
                "version.published", "info", bundle=shelf.name, serial=offered.serial, revision=offered.revision,
                who=caller, outcome=outcome,
            )  # fmt: skip
        document = {"bundle": shelf.name, "outcome": outcome, **shelf.kept.published[offered.serial].to_json()}
        return messages.json_answer(document, 201 if outcome == "created" else 200)

    # ── rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _rollout(self, request: Request, caller: str) -> Response:
        shelf = self._shelf(request)
        await shelf.settle()
        kept, rows = await self._state.load(shelf.name), await self._state.rows(shelf.name)
        shelf.renew(kept)
        return self._shown(kept, [reports.report(row) for row in rows.values()])

    async def _act(self, request: Request, caller: str) -> Response:
        shelf, wanted = self._shelf(request), messages.only_if(request)
        order = notation.order(await messages.json_of(request))
        kept = await self._helm.act(shelf, order, caller, wanted)
        return self._shown(kept, [reports.report(row) for row in shelf.rows.values()])

    def _shown(self, kept: Kept, heard: Sequence[rollouts.Report]) -> Response:
        rollout, now = kept.rollout, self._clock()
        candidate = kept.published.get(rollout.candidate) if rollout.candidate is not None else None
        returns = None
        if candidate is not None and rollout.current is not None:
            returns = candidate.version.allows_return(rollout.current, now)
        document = {
            **notation.to_json(rollout),
            "version": kept.version,
            "moved_at": kept.moved_at,
            "candidate_may_return": returns,
            "broken_gates": rollouts.broken_gates(rollout, heard, now)[:MAX_SHOWN],
            "unmet": rollouts.unmet(rollout, heard, now)[:MAX_SHOWN] if rollout.state == "rolling" else [],
        }
        return messages.json_answer(document, tag=str(kept.version))

    async def _audit(self, request: Request, caller: str) -> Response:
        shelf = self._shelf(request)
        after = messages.number_of(request, "after", 0, notation.MAX_SERIAL)
        limit = messages.number_of(request, "limit", 100, MAX_AUDIT)
        entries = await self._state.audit(shelf.name, after=after, limit=limit)
        following = entries[-1]["id"] if limit and len(entries) == limit else None
        return messages.json_answer({"bundle": shelf.name, "entries": entries, "next": following})

    # ── who runs what ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _fleet(self, request: Request, caller: str) -> Response:
        shelf = self._shelf(request)
        only_behind = target.query_pairs(request.head.target.query).get("only") == ("behind",)
        await shelf.settle()
        kept, rows = await self._state.load(shelf.name), await self._state.rows(shelf.name)
        shelf.renew(kept)
        versions = {serial: one.version for serial, one in kept.published.items()}
        return messages.json_answer(
            status.standing(
                kept.rollout, rows.values(), versions, moved_at=kept.moved_at, now=self._clock(),
                only_behind=only_behind,
            )
        )  # fmt: skip

    async def _report(self, request: Request, caller: str) -> Response:
        said = reports.read(await messages.json_of(request), self._serial_of)
        known = [name for name in said if name in self._shelves]
        if not known and any(one.by == "sidecar" for one in said.values()):
            raise Unknown(code="fleet_bundle_unknown", public="no bundle of this name is kept here")
        for name in known:
            shelf = self._shelves[name]
            row = await shelf.heard(Contact(id=caller, at=self._clock(), said=said[name]))
            if shelf.moving and rollouts.speaks_against(shelf.kept.rollout, reports.report(row)):
                await self._helm.look(shelf)
        return messages.nothing()

    def _serial_of(self, bundle: str, revision: str) -> int | None:
        shelf = self._shelves.get(bundle)
        return None if shelf is None else shelf.serial_of(revision)

    # ── gates, and other servers ──────────────────────────────────────────────────────────────────────────────────

    async def _look_forever(self) -> None:
        forgotten_at = trio.current_time()
        while True:
            await trio.sleep(LOOK_INTERVAL)
            await self._or_tell(self._look_at_all)
            if trio.current_time() - forgotten_at > self._limits.forget_after / 24:
                forgotten_at = trio.current_time()
                await self._or_tell(self._forget)

    async def _look_at_all(self) -> None:
        for shelf in self._shelves.values():
            await shelf.settle()
            if shelf.moving:
                shelf.rows = await self._state.rows(shelf.name)
                await self._helm.look(shelf)

    async def _forget(self) -> None:
        for shelf in self._shelves.values():
            await self._state.forget(shelf.name, self._clock() - self._limits.forget_after)
            shelf.rows = await self._state.rows(shelf.name)

    async def _follow(self) -> None:
        while True:
            if not await self._or_tell(self._catch_up):
                await trio.sleep(LOOK_INTERVAL)

    async def _catch_up(self) -> None:
        changes = await self._state.next_changes()
        if changes != self._changes:
            for shelf in self._shelves.values():
                shelf.renew(await self._state.load(shelf.name))
            self._changes = changes

    async def _or_tell(self, body: Callable[[], Coroutine[object, object, None]]) -> bool:
        """Whether it could be done. Why not is told once, and that all of it can be done again."""
        name = body.__name__
        try:
            await body()
        except SidecarError as error:
            if error.code not in self._lost.values():
                self._log("fleet.state_lost", "error", code=error.code, reason=error.detail)
            self._lost[name] = error.code
            return False
        if self._lost.pop(name, None) is not None and not self._lost:
            self._log("fleet.state_recovered", "info")
        return True


_Doing: TypeAlias = Callable[[Fleet, Request, str], Awaitable[Response]]
_DOINGS: Mapping[tuple[str, ...], Mapping[str, _Doing]] = {
    ("bundles", "*"): {"GET": Fleet._bundle},
    ("bundles", "*", "candidate"): {"GET": Fleet._candidate},
    ("bundles", "*", "versions"): {"GET": Fleet._versions},
    ("bundles", "*", "versions", "*"): {"PUT": Fleet._publish},
    ("rollouts", "*"): {"GET": Fleet._rollout, "POST": Fleet._act},
    ("rollouts", "*", "audit"): {"GET": Fleet._audit},
    ("fleet", "*"): {"GET": Fleet._fleet},
    ("status",): {"POST": Fleet._report},
    ("status", "*"): {"POST": Fleet._report},  # OPA's plugin sends a slash, and its partition where it has one
}


def _place(segments: Sequence[str]) -> tuple[str, ...]:
    """The shape of a path: names and serials are `*`."""
    if not segments or segments[0] != "v1":
        return ()
    return tuple("*" if index in {1, 3} else segment for index, segment in enumerate(segments[1:]))
