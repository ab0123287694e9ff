"""The database: its tables, and how it is opened. SQLite in a file, or PostgreSQL by URL.

One row of `meta` is the schema's version, another the change counter, which every transaction that changes a rollout or
publishes a version raises first: so such transactions follow one another, the audit log's ids are in the order in which they
were committed, and another server needs to look at one number to learn that there is something new. The audit log refuses
to be changed, in the database itself.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sidecar.errors import OperatorFault

SCHEMA = 1
CHANNEL = "sidecar_fleet"
"""Of PostgreSQL's NOTIFY."""
_BUSY_SECONDS = 10.0
"""How long a statement waits for another server's transaction."""
_LOCK = 0x51DECA2F
"""PostgreSQL's advisory lock under which the schema is made: CREATE TABLE IF NOT EXISTS is no protection there."""

metadata = MetaData()
Serial = BigInteger
AuditId = BigInteger().with_variant(Integer, "sqlite")

meta = Table(
    "meta", metadata, Column("name", String(32), primary_key=True), Column("value", BigInteger, nullable=False)
)
versions = Table(
    "versions",
    metadata,
    Column("bundle", String(128), primary_key=True),
    Column("serial", Serial, primary_key=True, autoincrement=False),
    Column("revision", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("archive", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("may_return_to", Text, nullable=False),
    Column("return_until", Float),
    Column("published_by", Text, nullable=False),
    Column("published_at", Float, nullable=False),
)
rollouts = Table(
    "rollouts",
    metadata,
    Column("bundle", String(128), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("moved_at", Float, nullable=False),
    Column("document", Text, nullable=False),
)
audit = Table(
    "audit",
    metadata,
    Column("id", AuditId, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("bundle", String(128), nullable=False),
    Column("action", String(32), nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("before", Text),
    Column("after", Text),
    Index("audit_of_bundle", "bundle", "id"),
)
reports = Table(
    "reports",
    metadata,
    Column("bundle", String(128), primary_key=True),
    Column("spiffe_id", String(2048), primary_key=True),
    Column("at", Float, nullable=False),
    Column("document", Text, nullable=False),
)

_NO_VERB = """CREATE TRIGGER IF NOT EXISTS audit_no_{verb} BEFORE {verb} ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"""
_NO_REPLACEMENT = """CREATE TRIGGER IF NOT EXISTS audit_no_replace BEFORE INSERT ON audit
WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"""
"""SQLite's REPLACE deletes what is in its way, and does not call that a deletion."""
_REFUSE = """CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"""
_NO_CHANGE = """CREATE OR REPLACE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"""
_APPEND_ONLY = {
    "sqlite": [_NO_VERB.format(verb="update"), _NO_VERB.format(verb="delete"), _NO_REPLACEMENT],
    "postgresql": [_REFUSE, _NO_CHANGE],
}


def opened(where: Path | str, password: str | None = None) -> Engine:
    """The database in a file, or at `postgresql://user@host/name`, with its schema. Blocks.

    Raises `OperatorFault`: `fleet_database_unusable`, or `fleet_database_newer` where its schema is of a later version.
    """
    engine = _sqlite(where) if isinstance(where, Path) else _postgresql(where, password)
    try:
        with engine.begin() as connection:
            _prepare(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        raise OperatorFault(f"database {_shown(where)}: {brief(error)}", code="fleet_database_unusable") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def reading(engine: Engine) -> Engine:
    """The same database, for transactions that only read: on SQLite they keep nobody from writing."""
    return engine.execution_options(reads_only=True)


def brief(error: Exception) -> str:
    """What the database said, without statement, values or a connection string."""
    cause = getattr(error, "orig", None) or error
    return " ".join(str(cause).split())[:300] or type(error).__name__


def _prepare(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    if inspect(connection).has_table(meta.name):
        found = connection.execute(select(meta.c.value).where(meta.c.name == "schema")).scalar()
        if found is not None and found > SCHEMA:
            raise OperatorFault(
                f"the database is of schema {found}, and this program knows {SCHEMA}: run the newer program",
                code="fleet_database_newer",
            )
        if found is not None:
            return
    metadata.create_all(connection)
    for statement in _APPEND_ONLY[connection.dialect.name]:
        connection.exec_driver_sql(statement)
    connection.execute(insert(meta), [{"name": "schema", "value": SCHEMA}, {"name": "changes", "value": 0}])


def _sqlite(path: Path) -> Engine:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Never opened where it is there: closing it would drop the locks that others in this process hold (POSIX).
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise OperatorFault(f"database {path}: {error.strerror}", code="fleet_database_unusable") from error
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin by itself, later than we do
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    _write_ahead(connection)


def _write_ahead(connection: Any) -> None:
    """Have readers and the writer not wait for each other. SQLite does not wait by itself to change that."""
    give_up_at = time.monotonic() + _BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that writes takes its lock at once: taken later, it could be refused after having read."""
    reads = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _postgresql(where: str, password: str | None) -> Engine:
    try:
        url = make_url(where)
    except ArgumentError as error:
        raise OperatorFault("database: is neither a path nor a URL", code="fleet_database_unusable") from error
    if url.drivername not in {"postgresql", "postgres"}:
        raise OperatorFault(
            f"database {_shown(where)}: is neither a path nor postgresql://", code="fleet_database_unusable"
        )
    url = url.set(drivername="postgresql+psycopg")
    if password is not None:
        url = url.set(password=password)
    milliseconds = int(_BUSY_SECONDS * 1000)
    try:
        return create_engine(
            url, pool_size=4, max_overflow=1, pool_pre_ping=True, pool_timeout=_BUSY_SECONDS,
            connect_args={
                "connect_timeout": 5,
                "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            },
        )  # fmt: skip
    except (ImportError, ArgumentError) as error:
        raise OperatorFault(f"database {_shown(where)}: {error}", code="fleet_database_unusable") from error


def _shown(where: Path | str) -> str:
    """Without a password."""
    return str(where) if isinstance(where, Path) else make_url(where).render_as_string(hide_password=True)
