"""What must survive, in a database: versions, rollouts, the audit log, and what was heard of whom.

A rollout changes by compare-and-swap: whoever acts names the version of it that was seen, and of two who saw the same one, one
wins. Its audit entry is part of the same transaction, so that nothing happens without an entry, nor an entry without it.
An archive is put into the store before its version is written here: what a kill leaves behind is an archive that nobody knows.

Everything blocks, and so runs in worker threads, a few at once. Another server learns of a change within `LOOK_INTERVAL`,
by the change counter; with PostgreSQL it is told at once, and the counter is what it believes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import trio
from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from sidecar.errors import ClientFault, OurFault
from sidecar.fleet import notation, reports, tables
from sidecar.fleet.reports import Contact, Row
from sidecar.fleet.rollout import Malformed, Rollout, Version

if TYPE_CHECKING:
    import psycopg

LOOK_INTERVAL = 0.5
"""Seconds between looks at the change counter."""
MAX_AUDIT = 1000
"""Entries of one answer."""
_CHUNK = 500
"""Rows of one statement."""

T = TypeVar("T")


class StateUnavailable(OurFault):
    code = "fleet_state_unavailable"
    public = "the state of the fleet cannot be read or written now"


class Outrun(ClientFault):
    """Somebody else has changed the rollout since it was looked at."""

    status = 409
    code = "rollout_outrun"
    public = "the rollout has changed since it was looked at"


class SerialTaken(ClientFault):
    """Another bundle was published under this serial."""

    status = 409
    code = "fleet_serial_taken"
    public = "another bundle was published under this serial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version as it was published. `digest`: of its content; `archive`: SHA-256 of its bytes; both hex."""

    serial: int
    revision: str
    digest: str
    archive: str
    size: int
    created: float
    may_return_to: frozenset[int]
    return_until: float | None
    published_by: str
    published_at: float

    @property
    def version(self) -> Version:
        return Version(serial=self.serial, may_return_to=self.may_return_to, return_until=self.return_until)

    def to_json(self) -> dict[str, object]:
        return {
            "serial": self.serial, "revision": self.revision, "digest": self.digest, "archive": self.archive,
            "size": self.size, "created": self.created, "may_return_to": sorted(self.may_return_to),
            "return_until": self.return_until, "published_by": self.published_by, "published_at": self.published_at,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """All about one bundle but its reports. `version`: what a change is compared with; 0 before the first."""

    rollout: Rollout
    version: int
    moved_at: float
    """When it last changed who is to run what."""
    published: Mapping[int, Published]
    changes: int
    """The change counter, before it was read: of two, the one with the higher is as new or newer."""


Outcome = Literal["created", "same", "signed_anew"]


class State:
    """`open` makes one. All methods raise `StateUnavailable` where the database cannot be used."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = tables.reading(engine)
        self._is_sqlite = engine.dialect.name == "sqlite"
        # SQLite lets one write at a time, and who waits for it there waits in naps: here the turn is taken at once.
        self._limiter = trio.CapacityLimiter(1 if self._is_sqlite else 4)
        self._listening: psycopg.Connection[Any] | None = None
        self._listener_limiter = trio.CapacityLimiter(1)

    @classmethod
    async def open(cls, where: Path | str, password: str | None = None) -> State:
        """Raises `OperatorFault` (`fleet_database_unusable`, `fleet_database_newer`)."""
        return cls(await trio.to_thread.run_sync(tables.opened, where, password))

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close)

    # ── versions and rollouts ─────────────────────────────────────────────────────────────────────────────────────

    async def load(self, bundle: str) -> Kept:
        return await self._read(lambda connection: _load(connection, bundle))

    async def publish(self, bundle: str, offered: Published) -> Outcome:
        """Raises `SerialTaken` where the serial was another bundle. The same content signed anew takes the place of the old."""

        def write(connection: Connection) -> Outcome:
            here = (tables.versions.c.bundle == bundle) & (tables.versions.c.serial == offered.serial)
            self._count(connection)
            found = connection.execute(select(tables.versions).where(here)).mappings().first()
            if found is not None and found["digest"] != offered.digest:
                raise SerialTaken
            if found is not None and found["archive"] == offered.archive:
                return "same"
            values = offered.to_json() | {"may_return_to": json.dumps(sorted(offered.may_return_to))}
            if found is None:
                connection.execute(insert(tables.versions).values(bundle=bundle, **values))
            else:
                connection.execute(update(tables.versions).where(here).values(**values))
            _note(
                connection, at=offered.published_at, bundle=bundle, action="publish" if found is None else "sign",
                who=offered.published_by, why="", before=None if found is None else _published(found).to_json(),
                after=offered.to_json(),
            )  # fmt: skip
            return "created" if found is None else "signed_anew"

        return await self._write(write)

    async def step(self, seen: Kept, after: Rollout, *, action: str, who: str, why: str, at: float) -> int:
        """Replace the rollout that was seen; its new version. Raises `Outrun` where it is no longer that one."""
        bundle, document = after.bundle, json.dumps(notation.to_json(after))
        moved_at = at if _reach(after) != _reach(seen.rollout) else seen.moved_at

        def write(connection: Connection) -> int:
            self._count(connection)
            values = {"version": seen.version + 1, "moved_at": moved_at, "document": document}
            if seen.version == 0:
                fresh = self._insert(tables.rollouts).values(bundle=bundle, **values).on_conflict_do_nothing()
                done = connection.execute(fresh.returning(tables.rollouts.c.version)).first()
            else:
                here = (tables.rollouts.c.bundle == bundle) & (tables.rollouts.c.version == seen.version)
                swapped = update(tables.rollouts).where(here).values(**values).returning(tables.rollouts.c.version)
                done = connection.execute(swapped).first()
            if done is None:
                raise Outrun
            _note(
                connection, at=at, bundle=bundle, action=action, who=who, why=why,
                before=notation.to_json(seen.rollout), after=notation.to_json(after),
            )  # fmt: skip
            return seen.version + 1

        return await self._write(write)

    async def audit(self, bundle: str, *, after: int = 0, limit: int = 100) -> list[dict[str, object]]:
        """Entries in their order, from the one behind `after`."""

        def read(connection: Connection) -> list[dict[str, object]]:
            table = tables.audit.c
            query = select(tables.audit).where((table.bundle == bundle) & (table.id > after)).order_by(table.id)
            return [_entry(row) for row in connection.execute(query.limit(min(limit, MAX_AUDIT))).mappings()]

        return await self._read(read)

    # ── what was heard ────────────────────────────────────────────────────────────────────────────────────────────

    async def hear(self, bundle: str, contacts: Iterable[Contact]) -> list[Row]:
        """Keep what was heard, in one transaction; what is known now of those who spoke."""
        spoken = list(contacts)

        def write(connection: Connection) -> list[Row]:
            known = _rows(connection, bundle, sorted({one.id for one in spoken}), lock=not self._is_sqlite)
            for contact in spoken:
                known[contact.id] = reports.heard(known.get(contact.id), contact)
            changed = [known[one] for one in sorted({contact.id for contact in spoken})]
            for start in range(0, len(changed), _CHUNK):
                values = [
                    {"bundle": bundle, "spiffe_id": row.id, "at": row.at, "document": json.dumps(reports.to_json(row))}
                    for row in changed[start : start + _CHUNK]
                ]
                rows = self._insert(tables.reports)
                connection.execute(
                    rows.on_conflict_do_update(
                        index_elements=["bundle", "spiffe_id"],
                        set_={"at": rows.excluded.at, "document": rows.excluded.document},
                    ),
                    values,
                )
            return changed

        return await self._write(write)

    async def rows(self, bundle: str) -> dict[str, Row]:
        """What is known of everybody, by ID."""
        return await self._read(lambda connection: _rows(connection, bundle, None, lock=False))

    async def forget(self, bundle: str, before: float) -> int:
        """Drop those who were not heard of since; how many they were."""
        table = tables.reports

        def write(connection: Connection) -> int:
            return connection.execute(table.delete().where((table.c.bundle == bundle) & (table.c.at < before))).rowcount

        return await self._write(write)

    # ── changes made by others ────────────────────────────────────────────────────────────────────────────────────

    async def changes(self) -> int:
        """The change counter."""
        return await self._read(_changes)

    async def next_changes(self) -> int:
        """The change counter in `LOOK_INTERVAL` seconds, or at once where the database tells of a change."""
        if self._is_sqlite:
            await trio.sleep(LOOK_INTERVAL)
        else:
            try:
                with trio.fail_after(LOOK_INTERVAL * 10):
                    await trio.to_thread.run_sync(self._listen, abandon_on_cancel=True, limiter=self._listener_limiter)
            except (SQLAlchemyError, OSError, trio.TooSlowError):
                await trio.sleep(LOOK_INTERVAL)
        return await self.changes()

    def _listen(self) -> None:
        """Wait for a notification, no longer than `LOOK_INTERVAL`, on a connection of our own."""
        import psycopg  # noqa: PLC0415  (here only with PostgreSQL)

        try:
            if self._listening is None:
                pooled = self._engine.raw_connection()
                connection = cast("psycopg.Connection[Any]", pooled.driver_connection)
                pooled.detach()
                connection.autocommit = True
                connection.execute(f"LISTEN {tables.CHANNEL}")
                self._listening = connection
            for _ in self._listening.notifies(timeout=LOOK_INTERVAL, stop_after=1):
                pass
        except psycopg.Error as error:
            broken, self._listening = self._listening, None
            if broken is not None:
                broken.close()
            raise OSError(tables.brief(error)) from error

    # ── transactions ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, body: Callable[[Connection], T]) -> T:
        return await self._run(self._reading, body)

    async def _write(self, body: Callable[[Connection], T]) -> T:
        return await self._run(self._engine, body)

    async def _run(self, engine: Engine, body: Callable[[Connection], T]) -> T:
        """One transaction in a thread. It is not left alone by a cancellation: what it did is known afterwards."""

        def transaction() -> T:
            try:
                with engine.begin() as connection:
                    return body(connection)
            except SQLAlchemyError as error:
                raise StateUnavailable(tables.brief(error)) from error

        return await trio.to_thread.run_sync(transaction, limiter=self._limiter)

    def _count(self, connection: Connection) -> None:
        """Raise the change counter, first in its transaction: it is what makes them take turns."""
        here = tables.meta.c.name == "changes"
        connection.execute(update(tables.meta).where(here).values(value=tables.meta.c.value + 1))
        if not self._is_sqlite:
            connection.exec_driver_sql(f"NOTIFY {tables.CHANNEL}")

    def _insert(self, table: Any) -> Any:
        return (sqlite if self._is_sqlite else postgresql).insert(table)

    def _close(self) -> None:
        if self._listening is not None:
            self._listening.close()
        self._engine.dispose()


def _load(connection: Connection, bundle: str) -> Kept:
    changes = _changes(connection)
    found = connection.execute(select(tables.rollouts).where(tables.rollouts.c.bundle == bundle)).mappings().first()
    rows = connection.execute(select(tables.versions).where(tables.versions.c.bundle == bundle)).mappings()
    return Kept(
        rollout=Rollout(bundle=bundle) if found is None else _rollout(found["document"]),
        version=0 if found is None else found["version"],
        moved_at=0.0 if found is None else found["moved_at"],
        published={row["serial"]: _published(row) for row in rows},
        changes=changes,
    )


def _rollout(document: str) -> Rollout:
    try:
        return notation.from_json(json.loads(document))
    except (ValueError, Malformed) as error:  # of a program that knows more, or of somebody's hand
        raise StateUnavailable(f"what is kept of a rollout cannot be read: {error}") from error


def _changes(connection: Connection) -> int:
    return int(connection.execute(select(tables.meta.c.value).where(tables.meta.c.name == "changes")).scalar_one())


def _rows(connection: Connection, bundle: str, ids: list[str] | None, *, lock: bool) -> dict[str, Row]:
    table = tables.reports.c
    found: dict[str, Row] = {}
    wanted = [None] if ids is None else [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    for some in wanted:
        query = select(table.document).where(table.bundle == bundle)
        if some is not None:
            query = query.where(table.spiffe_id.in_(some)).order_by(table.spiffe_id)
        if lock:
            query = query.with_for_update()
        for document in connection.execute(query).scalars():
            row = reports.from_json(json.loads(document))
            found[row.id] = row
    return found


def _published(row: Any) -> Published:
    names = (
        "serial",
        "revision",
        "digest",
        "archive",
        "size",
        "created",
        "return_until",
        "published_by",
        "published_at",
    )
    return Published(**{name: row[name] for name in names}, may_return_to=frozenset(json.loads(row["may_return_to"])))


def _note(
    connection: Connection,
    *,
    at: float,
    bundle: str,
    action: str,
    who: str,
    why: str,
    before: Mapping[str, object] | None,
    after: Mapping[str, object] | None,
) -> None:
    connection.execute(
        insert(tables.audit).values(
            at=at, bundle=bundle, action=action, who=who, why=why,
            before=None if before is None else json.dumps(before), after=None if after is None else json.dumps(after),
        )
    )  # fmt: skip


def _entry(row: Any) -> dict[str, object]:
    plain = {name: row[name] for name in ("id", "at", "bundle", "action", "who", "why")}
    return plain | {
        "from": None if row["before"] is None else json.loads(row["before"]),
        "to": None if row["after"] is None else json.loads(row["after"]),
    }


def _reach(rollout: Rollout) -> tuple[object, ...]:
    """All that says who is to run what."""
    moving = rollout.state in {"rolling", "paused"}
    return (rollout.current, *((rollout.candidate, rollout.reached, rollout.rings) if moving else ()))
