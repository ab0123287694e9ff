"""The way of a bundle from wherever it comes to the OPA that runs it: the one function that every bundle passes is `offer`.

Signature, scope, serial and time are checked here, the archive is packed anew from what was read of it, and only then is it
handed on; OPA verifies the signature again. What is refused changes nothing, and its reason is told once. What was
accepted is remembered before anybody is told: its serial for ever, its archive until the next.

Freshness runs from the newest signed time, not from the last contact: a server that is reached may serve old news.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from sidecar import apart
from sidecar.bundles import release as releases
from sidecar.bundles.memory import Memory
from sidecar.bundles.release import Held, Release
from sidecar.bundles.sources import Offer, Source
from sidecar.bundles.terms import Terms, Verified, holds_under, seed_of_this_process, taken
from sidecar.errand import Apart
from sidecar.errors import OperatorFault
from sidecar.model import PolicyBundle

__all__ = ["Activate", "Refusal", "Relay", "Running", "Terms"]

Log = Callable[..., None]
"""`log(event, level, **fields)`; level is "info", "warning" or "error"."""
Activate = Callable[[PolicyBundle], Awaitable[None]]
"""Returns once decisions come from the bundle; raises `OperatorFault` and leaves the old one."""

RETRY_INTERVAL = 30.0
"""Seconds until what was refused for a reason that may pass is tried again."""
FIRST_LOOK = 2.0
"""Seconds that a source has, at the start, before the last good bundle is run instead."""
_MAY_PASS = frozenset(
    {
        "bundle_from_future",
        "bundle_unreadable",
        "checker_failed",
        "opa_failed",
        "opa_not_started",
        "policy_memory_unusable",
        "runtime_dir_unusable",
    }
)
_AGE_INTERVAL = 5.0
_MAX_TOLD = 64
"""Refusals that are remembered, so that none is told twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What was accepted last."""

    release: Release
    digest: str
    origin: str
    activated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something is not as it should be: words and numbers only, where an exception would keep an archive alive."""

    code: str
    reason: str
    origin: str
    serial: int | None = None
    """Of what was refused, where its signature held."""

    def __str__(self) -> str:
        return self.reason


class Relay:
    """`load` comes first. Then bundles are offered: by `run`, which follows a source, and by whoever has one.

    `clock` gives Unix seconds.
    """

    def __init__(
        self,
        terms: Terms,
        memory: Memory,
        activate: Activate,
        log: Log,
        *,
        do: Apart = apart.here,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.terms = terms
        self.running: Running | None = None
        self.error: Refusal | None = None
        """Why the best of what was offered last does not run; None where it does."""
        self.unreachable: Refusal | None = None
        """Why the source cannot be asked; None where it answers."""
        self._memory = memory
        self._activate = activate
        self._log = log
        self._clock = clock
        self._held: Held | None = None
        self._good: Verified | None = None
        """What runs, or the same signed anew."""
        self._offering = trio.Lock()
        self._considering = trio.Lock()
        self._do = do
        self._seed = seed_of_this_process()
        self._told: dict[tuple[str, str], None] = {}
        self._again: Sequence[Offer] = ()
        """What the source gave last, while it is not what runs."""
        self._looked = trio.Event()
        self._new_terms = trio.Event()

    @property
    def stale(self) -> bool:
        """Whether the newest signed time is too long ago. Nothing accepted is not stale: it is nothing."""
        return self._held is not None and self._standing(self._held) == "stale"

    @property
    def stale_at(self) -> float | None:
        """Unix seconds from which on it is stale, as far as is known; None: never."""
        age = self.terms.max_policy_age
        return None if self._held is None or age is None else self._held.newest_created + age

    @property
    def held(self) -> Held | None:
        return self._held

    async def load(self) -> None:
        """Read what is remembered. Raises `OperatorFault` (`policy_memory_unusable`)."""
        self._held = await trio.to_thread.run_sync(self._memory.held)

    async def run(self, source: Source) -> None:
        """Follow `source`; where it gives nothing to begin with, run the last good bundle. Ends by cancellation.

        Raises `OperatorFault` (`policy_memory_unusable`).
        """
        await self.load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._begin)
            await self.follow(source)

    async def restore(self) -> None:
        """Run the last good bundle again, as far as today's terms allow. Raises `OperatorFault` where there is none.

        Where something runs already nothing happens.
        """
        archive = await trio.to_thread.run_sync(self._memory.last_good)
        if archive is None:
            raise OperatorFault("no bundle was accepted before", code="bundle_missing")
        async with self._offering:
            if self.running is None:
                error = self.error
                await self._try(archive, "state")
                self.error = error  # that the source has nothing better is still so

    # ── one bundle ────────────────────────────────────────────────────────────────────────────────────────────────

    async def offer(self, archive: bytes, origin: str) -> Release:
        """Take a bundle, however it came; return once decisions come from it.

        Raises `OperatorFault` where it is refused: the old one stays, and what was refused before for the same reason is
        not told again. One that runs already is taken as it is.
        """
        async with self._offering:
            return await self._try(archive, origin)

    async def offer_best(self, offers: Sequence[Offer]) -> Release:
        """Take the first that is accepted. Raises the `OperatorFault` of the first where none is.

        `error` says why the first was not taken, also where another was.
        """
        first: OperatorFault | None = None
        refusal: Refusal | None = None
        for one in offers:
            try:
                archive = await trio.to_thread.run_sync(one.read)
            except OperatorFault as fault:
                self._refuse(fault, one.origin, one.origin)
                first, refusal = first or fault, refusal or self.error
                continue
            try:
                release = await self.offer(archive, one.origin)
            except OperatorFault as fault:
                first, refusal = first or fault, refusal or self.error
            else:
                self.error = refusal
                return release
        self.error = refusal
        raise first or OperatorFault("the source holds no bundle", code="bundle_missing")

    async def change(self, terms: Terms) -> None:
        """Take up other terms, if what runs holds under them. Raises `OperatorFault`, and then nothing has changed.

        What was refused under the old ones is tried again.
        """
        async with self._offering:
            if self._good is not None and self.running is not None:
                verified = await holds_under(self._do, terms, self._seed, self._good.archive)
                await self._activate(verified.handed)
            self.terms = terms
            self._told.clear()
            self._new_terms.set()

    async def _try(self, archive: bytes, origin: str) -> Release:
        verified: Verified | None = None
        try:
            verified = await taken(self._do, self.terms, self._seed, archive)
            await self._take(verified, origin)
        except OperatorFault as fault:
            if verified is None:
                self._refuse(fault, origin, hashlib.sha256(archive).hexdigest())
            else:
                self._refuse(fault, origin, verified.digest, serial=verified.release.serial)
            raise
        self.error = None
        return verified.release

    async def _take(self, verified: Verified, origin: str) -> None:
        release, digest = verified.release, verified.digest
        # Another process of ours may have seen more since we looked.
        self._held = releases.joined(await trio.to_thread.run_sync(self._memory.held), self._held)
        held = releases.accept(release, digest, self._held, now=self._clock(), minimum_serial=self.terms.minimum_serial)
        if self.running is not None and self._good is not None and self.running.digest == digest:
            if verified.signatures == self._good.signatures:
                return
            self._good = verified  # signed anew: it stays when the key that it was signed with before goes
        else:
            await self._activate(verified.handed)
            self._good = verified
            self.running = Running(release=release, digest=digest, origin=origin, activated_at=self._clock())
            if verified.log_rules:
                self._log("bundle.log_rules_ignored", "warning", revision=release.revision, serial=release.serial)
        self._held = held
        try:
            self._held = await trio.to_thread.run_sync(self._memory.remember, held, verified.archive)
        except OperatorFault as fault:  # it runs, and protects as long as we live
            self._log("bundle.not_remembered", "error", code=fault.code, reason=str(fault))

    def _refuse(self, fault: OperatorFault, origin: str, name: str, *, serial: int | None = None) -> None:
        self.error = Refusal(code=fault.code, reason=str(fault), origin=origin, serial=serial)
        told = (name, fault.code)
        if told not in self._told:
            self._log("bundle.refused", "error", source=origin, code=fault.code, reason=str(fault), serial=serial)
        self._told.pop(told, None)
        self._told[told] = None  # the last to be forgotten
        while len(self._told) > _MAX_TOLD:
            del self._told[next(iter(self._told))]

    # ── a source ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def follow(self, source: Source) -> None:
        """Offer what the source has, as it changes. Ends by cancellation."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_again)
            nursery.start_soon(self._watch_age)
            while True:
                try:
                    offers = await source.changed()
                except OperatorFault as fault:
                    self._lost(source, fault)
                else:
                    if self.unreachable is not None:
                        self._log("bundle.fetch_recovered", "info", source=source.name)
                    self.unreachable = None
                    async with self._considering:
                        await self._consider(offers)
                self._looked.set()

    async def _consider(self, offers: Sequence[Offer]) -> None:
        try:
            await self.offer_best(offers)
        except OperatorFault:
            pass  # told, and kept in `error`
        self._again = offers if self.error is not None else ()

    async def _try_again(self) -> None:
        """What was refused may hold under other terms, and some reasons pass."""
        while True:
            with trio.move_on_after(RETRY_INTERVAL):
                await self._new_terms.wait()
            anew, self._new_terms = self._new_terms.is_set(), trio.Event()
            async with self._considering:
                if self._again and self.error is not None and (anew or self.error.code in _MAY_PASS):
                    await self._consider(self._again)

    async def _begin(self) -> None:
        with trio.move_on_after(FIRST_LOOK):
            await self._looked.wait()
        try:
            await self.restore()
        except OperatorFault as fault:
            if fault.code == "policy_memory_unusable":
                self._refuse(fault, "state", "state")  # everything else is told, or there is nothing to tell

    async def _watch_age(self) -> None:
        was = False
        while True:
            if self.stale != was:
                was = not was
                self._log("bundle.expired" if was else "bundle.renewed", "error" if was else "info", age=self._age())
            await trio.sleep(_AGE_INTERVAL)

    def _lost(self, source: Source, fault: OperatorFault) -> None:
        if self.unreachable is None or self.unreachable.code != fault.code:
            self._log("bundle.fetch_failed", "warning", source=source.name, code=fault.code, reason=str(fault))
        self.unreachable = Refusal(code=fault.code, reason=str(fault), origin=source.name)

    def _standing(self, held: Held) -> releases.Standing:
        return releases.standing(held, now=self._clock(), max_policy_age=self.terms.max_policy_age)

    def _age(self) -> float | None:
        return None if self._held is None else round(self._clock() - self._held.newest_created)
