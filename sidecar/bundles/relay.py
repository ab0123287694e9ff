"""The way of a bundle from wherever it comes to the OPA that runs it: the one function that every bundle passes is `offer`.

Signature, scope, serial and time are checked here, the archive is packed anew from what was read of it, and only then is it
handed on; OPA verifies the signature again. What is refused changes nothing, and its reason is told once. What was
accepted is remembered before anybody is told: its serial for ever, its archive until the next.

Freshness runs from the newest signed time, not from the last contact: a server that is reached may serve old news.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import trio

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles import signature
from sidecar.bundles.archive import Bounds, Bundle
from sidecar.bundles.memory import Memory
from sidecar.bundles.release import Held, Release
from sidecar.bundles.sources import Offer, Source
from sidecar.errors import OperatorFault
from sidecar.model import PolicyBundle

Log = Callable[..., None]
"""`log(event, level, **fields)`; level is "info", "warning" or "error"."""
Activate = Callable[[PolicyBundle], Awaitable[None]]
"""Returns once decisions come from the bundle; raises `OperatorFault` and leaves the old one."""

_MAX_REFUSED = 64
"""Refused archives that are remembered, so that none is told twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which bundles are taken."""

    keys: Mapping[str, tuple[str, bytes]]
    """Key id → (algorithm of RFC 7518 §3.1, public key or certificate in PEM)."""
    scope: str = "sidecar"
    minimum_serial: int = 0
    max_policy_age: float | None = None
    """Seconds."""
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What was accepted last."""

    release: Release
    digest: str
    origin: str
    activated_at: float


class Relay:
    def __init__(
        self, terms: Terms, memory: Memory, activate: Activate, log: Log, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.terms = terms
        self.running: Running | None = None
        self.error: OperatorFault | None = None
        """Why what was offered last does not run; None where it does."""
        self.unreachable: OperatorFault | None = None
        """Why the source cannot be asked; None where it answers."""
        self._memory = memory
        self._activate = activate
        self._log = log
        self._clock = clock
        self._held: Held | None = None
        self._bundle: Bundle | None = None
        self._offering = trio.Lock()
        self._refused: dict[str, OperatorFault] = {}

    @property
    def stale(self) -> bool:
        """Whether the newest signed time is too long ago. Nothing accepted is not stale: it is nothing."""
        age = self.terms.max_policy_age
        return age is not None and self._held is not None and self._clock() - self._held.newest_created > age

    @property
    def held(self) -> Held | None:
        return self._held

    async def load(self) -> None:
        """Read what is remembered. Raises `OperatorFault` (`policy_memory_unusable`)."""
        self._held = await trio.to_thread.run_sync(self._memory.held)

    async def restore(self) -> None:
        """Run the last good bundle again, as far as today's terms allow. Raises `OperatorFault` where there is none."""
        archive = await trio.to_thread.run_sync(self._memory.last_good)
        if archive is None:
            raise OperatorFault("no bundle was accepted before", code="bundle_missing")
        await self.offer(archive, "state")

    async def offer(self, archive: bytes, origin: str) -> Release:
        """Take a bundle, however it came; return once decisions come from it.

        Raises `OperatorFault` where it is refused: the old one stays, and an archive that was refused before is told of
        no second time. One that runs already is taken as it is.
        """
        name = hashlib.sha256(archive).hexdigest()
        async with self._offering:
            try:
                release = await self._take(archive, origin)
            except OperatorFault as fault:
                self.error = fault
                if name not in self._refused:
                    while len(self._refused) >= _MAX_REFUSED:
                        del self._refused[next(iter(self._refused))]
                    self._refused[name] = fault
                    self._log("bundle.refused", "error", source=origin, code=fault.code, reason=str(fault))
                raise
            self.error = None
            return release

    async def change(self, terms: Terms) -> None:
        """Take up other terms, if what runs holds under them. Raises `OperatorFault`, and then nothing has changed."""
        async with self._offering:
            bundle, running = self._bundle, self.running
            if bundle is not None and running is not None:
                fits = running.release.serial >= terms.minimum_serial
                if not fits:
                    raise OperatorFault(
                        f"serial {running.release.serial} runs, and minimum_serial is {terms.minimum_serial}",
                        code="bundle_below_minimum",
                    )
                if (terms.keys, terms.scope) != (self.terms.keys, self.terms.scope):
                    await trio.to_thread.run_sync(_verified, bundle, terms)
                    await self._activate(_handed(bundle, running.release, running.digest, terms))
            self.terms = terms
            self._refused.clear()

    async def follow(self, source: Source) -> None:
        """Offer what the source has, as it changes. Ends by cancellation."""
        while True:
            try:
                offers = await source.changed()
            except OperatorFault as fault:
                if self.unreachable is None or self.unreachable.code != fault.code:
                    self._log("bundle.fetch_failed", "warning", source=source.name, code=fault.code, reason=str(fault))
                self.unreachable = fault
            else:
                if self.unreachable is not None:
                    self._log("bundle.fetch_recovered", "info", source=source.name)
                self.unreachable = None
                try:
                    await self.offer_best(offers)
                except OperatorFault:
                    pass  # told, and kept in `error`

    async def offer_best(self, offers: list[Offer]) -> Release:
        """Take the first that is accepted. Raises the `OperatorFault` of the first where none is."""
        first: OperatorFault | None = None
        for one in offers:
            try:
                return await self.offer(one.archive, one.origin)
            except OperatorFault as fault:
                first = first or fault
        raise first or OperatorFault("the source holds no bundle", code="bundle_missing")

    async def _take(self, archive: bytes, origin: str) -> Release:
        bundle, release, digest = await trio.to_thread.run_sync(_read, archive, self.terms)
        held = releases.accept(release, digest, self._held, now=self._clock(), minimum_serial=self.terms.minimum_serial)
        if self.running is not None and self.running.digest == digest:
            return self.running.release
        handed = await trio.to_thread.run_sync(_handed, bundle, release, digest, self.terms)
        await self._activate(handed)
        self._bundle = bundle
        self.running = Running(release=release, digest=digest, origin=origin, activated_at=self._clock())
        self._held = held
        try:
            self._held = await trio.to_thread.run_sync(self._memory.remember, held, handed.archive)
        except OperatorFault as fault:  # it runs, and protects as long as we live
            self._log("bundle.not_remembered", "error", code=fault.code, reason=str(fault))
        return release


def _read(archive: bytes, terms: Terms) -> tuple[Bundle, Release, str]:
    bundle = archives.read(archive, terms.bounds)
    _verified(bundle, terms)
    return bundle, releases.release(bundle), signature.content_digest(bundle)


def _verified(bundle: Bundle, terms: Terms) -> None:
    keys = {name: signature.public_key(algorithm, pem) for name, (algorithm, pem) in terms.keys.items()}
    signature.verify(bundle, keys, terms.scope)


def _handed(bundle: Bundle, release: Release, digest: str, terms: Terms) -> PolicyBundle:
    return PolicyBundle(
        archive=archives.pack(bundle), revision=release.revision, serial=release.serial, created=release.created,
        digest=digest, keys=terms.keys, scope=terms.scope,
        pure=MappingProxyType({name: proof.fields for name, proof in release.cache.items() if proof.pure}),
    )  # fmt: skip
