"""Databases to test on: SQLite always, PostgreSQL where it is installed (in CI it has to be)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import postgres as servers
from support.postgres import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL. Where tests must be whole (CI=true), a missing one is a failure and not a skip."""
    if servers.binaries() is None:
        if os.environ.get("CI") == "true":
            pytest.fail(servers.MISSING)
        pytest.skip(servers.MISSING)
    with servers.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where an empty database is."""
    if request.param == "sqlite":
        return tmp_path / "state" / "fleet.sqlite"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()
