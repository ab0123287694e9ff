"""One bundle, as a server has it in memory: who is to run what, who waits to hear of it, and the archives that are asked for.

What is here can be lost: it is a copy of the database, and archives of the store. While the database cannot be reached a server goes
on handing out what it knew; nothing can change then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from sidecar.bundles.signature import VerifyingKey
from sidecar.errors import SidecarError
from sidecar.fleet import rollout as rollouts
from sidecar.fleet.reports import Contact, Row
from sidecar.fleet.rollout import Holding, Version
from sidecar.fleet.state import Kept, Published, State
from sidecar.fleet.store import Key, Store

MAX_CACHED_BYTES = 128 << 20
"""Of archives kept in memory for one bundle; one that is larger is kept alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which versions of a bundle are taken."""

    keys: Mapping[str, VerifyingKey]
    scope: str = "sidecar"


class _Spoken:
    """A contact on its way into the database."""

    __slots__ = ("contact", "error", "row")

    def __init__(self, contact: Contact) -> None:
        self.contact = contact
        self.row: Row | None = None
        self.error: SidecarError | None = None


class Shelf:
    def __init__(self, name: str, terms: Terms, state: State, store: Store, kept: Kept, rows: dict[str, Row]) -> None:
        self.name = name
        self.terms = terms
        self.kept = kept
        self.rows = rows
        """What is known of each sidecar, by ID; as others have kept it, as of the last look."""
        self.changed = trio.Event()
        """Set, and replaced, when somebody may be to run something else."""
        self._state = state
        self._store = store
        self._versions: Mapping[int, Version] = _versions(kept)
        self._archives: OrderedDict[str, bytes] = OrderedDict()
        self._loading = trio.Lock()
        self._met: dict[str, Contact] = {}
        self._spoken: list[_Spoken] = []
        self._hearing = trio.Lock()

    @property
    def versions(self) -> Mapping[int, Version]:
        return self._versions

    @property
    def moving(self) -> bool:
        """Whether a candidate is on its way."""
        return self.kept.rollout.candidate is not None and self.kept.rollout.state in {"rolling", "paused"}

    def renew(self, kept: Kept) -> None:
        """Take up what the database says, and wake whoever waits. What is older than ours was read before we changed it."""
        if kept.changes < self.kept.changes:
            return
        same = (kept.rollout, kept.published) == (self.kept.rollout, self.kept.published)
        self.kept = kept
        if not same:
            self._versions = _versions(kept)
            self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def serial_of(self, revision: str) -> int | None:
        """The highest serial with this revision."""
        return max((one.serial for one in self.kept.published.values() if one.revision == revision), default=None)

    def assigned(self, spiffe_id: str, labels: Mapping[str, str], has: int | None, now: float) -> Published | None:
        """What to hand to whoever says that it has `has`; None where there is nothing for it.

        What it ever reported counts only where it has something: behind one ID there may be several, and one that comes
        with empty hands is taken for a new one.
        """
        row = self.rows.get(spiffe_id)
        has = has if has in self.kept.published else None
        holding = Holding(runs=has, highest=None if row is None or has is None else row.highest)
        serial = rollouts.assigned(self.kept.rollout, spiffe_id, labels, holding, self._versions, now)
        return None if serial is None else self.kept.published.get(serial)

    def candidate(self, spiffe_id: str, labels: Mapping[str, str]) -> Published | None:
        """What to ask beside what is in force."""
        serial = rollouts.shadowed(self.kept.rollout, spiffe_id, labels)
        return None if serial is None else self.kept.published.get(serial)

    async def archive(self, published: Published) -> bytes:
        """The bytes of a version, loaded once for all who ask at the same time. Raises `StoreUnavailable`."""
        name = published.archive
        if name not in self._archives:
            async with self._loading:
                if name not in self._archives:
                    key = Key(bundle=self.name, serial=published.serial, sha256=name)
                    found = await trio.to_thread.run_sync(self._store.get, key)
                    while self._archives and sum(map(len, self._archives.values())) + len(found) > MAX_CACHED_BYTES:
                        self._archives.popitem(last=False)
                    self._archives[name] = found
                    return found
        self._archives.move_to_end(name)
        return self._archives[name]

    # ── what is heard ─────────────────────────────────────────────────────────────────────────────────────────────

    def met(self, contact: Contact) -> None:
        """Somebody asked. Written down now and then, all together: see `settle`."""
        before = self._met.get(contact.id)
        if before is not None and contact.given is None:
            contact = Contact(
                id=contact.id, at=contact.at, given=before.given, named=contact.named, labels=contact.labels
            )
        self._met[contact.id] = contact

    async def settle(self) -> None:
        """Write down who asked since the last time."""
        if self._met:
            contacts, self._met = self._met, {}
            try:
                self._learn(await self._state.hear(self.name, contacts.values()))
            except BaseException:
                self._met = contacts | self._met
                raise

    async def heard(self, contact: Contact) -> Row:
        """Somebody reported: return once that is kept. Those who report at the same time share a transaction."""
        spoken = _Spoken(contact)
        self._spoken.append(spoken)
        async with self._hearing:
            if spoken.row is None and spoken.error is None:
                await self._hear()
        if spoken.error is not None:
            raise spoken.error
        assert spoken.row is not None  # noqa: S101  (one of both is set by then)
        return spoken.row

    async def _hear(self) -> None:
        batch, self._spoken = self._spoken, []
        met, self._met = self._met, {}  # what was given to whom is known before what became of it
        try:
            rows = await self._state.hear(self.name, [*met.values(), *(one.contact for one in batch)])
        except SidecarError as error:
            self._met = met | self._met
            for one in batch:
                one.error = error
        except BaseException:  # only this one of them gives up
            self._spoken = batch + self._spoken
            self._met = met | self._met
            raise
        else:
            self._learn(rows)
            for one in batch:
                one.row = self.rows[one.contact.id]

    def _learn(self, rows: list[Row]) -> None:
        self.rows.update((row.id, row) for row in rows)


def _versions(kept: Kept) -> Mapping[int, Version]:
    return {serial: one.version for serial, one in kept.published.items()}
