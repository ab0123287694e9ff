"""A real PostgreSQL in a directory of its own, reached over a unix socket: Debian's package, or whatever is on PATH."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

MISSING = "there is no PostgreSQL: apt-get install postgresql (its binaries are enough, no cluster is needed)"
_USER = "postgres"
"""Who runs it where the tests run as root: PostgreSQL refuses to."""


def binaries() -> Path | None:
    """The directory of the newest `initdb` and `postgres`."""
    on_path = shutil.which("postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parent.parent.name))
    candidates = [Path(on_path)] if on_path else []
    for postgres in [*reversed(found), *candidates]:
        if (postgres.parent / "initdb").exists():
            return postgres.parent
    return None


class Postgres:
    """A running server. `database` makes an empty database and says its URL."""

    def __init__(self, bin_dir: Path, directory: Path, prefix: list[str]) -> None:
        self._bin = bin_dir
        self._prefix = prefix
        self._directory = directory
        self._count = 0

    def database(self) -> str:
        self._count += 1
        name = f"fleet{self._count}"
        self.sql(f"CREATE DATABASE {name}")
        return f"postgresql://{_user()}@/{name}?host={quote(str(self._directory), safe='')}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        command = [
            *self._prefix, str(self._bin / "psql"), "-X", "-qAt", "-v", "ON_ERROR_STOP=1", "-h", str(self._directory),
            "-U", _user(), "-d", database, "-c", statement,
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


@contextmanager
def running() -> Iterator[Postgres]:
    """A server with an empty cluster. Raises `FileNotFoundError` where PostgreSQL is not installed."""
    bin_dir = binaries()
    if bin_dir is None:
        raise FileNotFoundError(MISSING)
    prefix = ["runuser", "-u", _USER, "--"] if os.getuid() == 0 else []
    # Not below pytest's directory: another user must get there, and the path of a socket is short.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    server: subprocess.Popen[bytes] | None = None
    try:
        if prefix:
            os.chown(directory, pwd.getpwnam(_USER).pw_uid, -1)
        data = directory / "data"
        subprocess.run(
            [*prefix, str(bin_dir / "initdb"), "-D", str(data), "-U", _user(), "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True, capture_output=True, timeout=120, cwd=directory,
        )  # fmt: skip
        log = (directory / "log").open("wb")
        with log:
            server = subprocess.Popen(
                [
                    *prefix, str(bin_dir / "postgres"), "-D", str(data), "-k", str(directory), "-c",
                    "listen_addresses=", "-c", "max_connections=60", "-c", "fsync=off",
                ],
                stdout=log, stderr=log, cwd=directory,
            )  # fmt: skip
        postgres = Postgres(bin_dir, directory, prefix)
        _wait_ready(server, bin_dir, directory)
        yield postgres
    finally:
        if server is not None:
            server.terminate()  # runuser hands it on
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            if server.poll() is None:
                server.kill()
                server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_ready(server: subprocess.Popen[bytes], bin_dir: Path, directory: Path) -> None:
    for _ in range(300):
        if server.poll() is not None:
            break
        done = subprocess.run(
            [str(bin_dir / "pg_isready"), "-q", "-h", str(directory), "-t", "1"], check=False, timeout=10
        )
        if done.returncode == 0:
            return
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.1)
    raise RuntimeError(f"PostgreSQL did not start: {(directory / 'log').read_text()[-2000:]}")


def _user() -> str:
    return _USER if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
