"""What a sidecar must not forget about policy: the highest release that it accepted, and the last bundle that ran.

Both lie in a directory of the state that is its owner's alone. A file is written beside the old one, brought to the disk and
renamed, so that a kill leaves the old or the new and never half. The bundle goes first, since a bundle newer than the
memory is accepted at the next start; one that it was sent back to goes last, since without the memory of that it is a
downgrade. Two processes may overlap (a restart without a lost
request): a lock makes them take turns, neither forgets what the other has seen, and what is kept to start from is never
older than what is remembered allows.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidecar.bundles import release
from sidecar.bundles.release import Held
from sidecar.errors import OperatorFault

_HELD = "held.json"
_LAST_GOOD = "last-good.tar.gz"
_LOCK_TIMEOUT = 5.0
"""Seconds. Whoever holds the lock writes two files: one that is stopped while it does must not stop us too."""


class Memory:
    """In `directory`, made where it is not there. All methods block; errors are `OperatorFault` (`policy_memory_unusable`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def held(self) -> Held | None:
        """None where nothing was ever accepted. What is there and cannot be read is an error: it may be a high serial."""
        path = self._directory / _HELD
        try:
            return release.from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OperatorFault(
                f"{path}: {reason}; what it said protects against old policy: remove it only if that is no concern",
                code="policy_memory_unusable",
            ) from error

    def last_good(self) -> bytes | None:
        """The archive that ran last; None where none ever did."""
        try:
            return (self._directory / _LAST_GOOD).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error.strerror) from error

    def remember(self, held: Held, archive: bytes) -> Held:
        """Keep both: `archive` is what runs, and what `held` allows. Returns what is held now.

        Where another process has seen a higher release in the meantime that is more than `held`, and its archive stays.
        """
        try:
            with self._locked():
                before = self.held()
                now = release.joined(before, held) or held
                writing = [(_LAST_GOOD, archive)] if (now.serial, now.digest) == (held.serial, held.digest) else []
                if now != before:
                    writing.append((_HELD, json.dumps(release.to_json(now)).encode()))
                for name, content in writing if now.returned_to is None else reversed(writing):
                    self._write(name, content)
        except OSError as error:
            raise self._unusable(error.strerror) from error
        return now

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if (
                stat.S_IMODE(os.fstat(directory).st_mode) != 0o700
            ):  # whoever else could write there could make us forget
                os.fchmod(directory, 0o700)
            self._take_turns(directory)
            yield
        finally:
            os.close(directory)

    def _take_turns(self, directory: int) -> None:
        until = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise self._unusable("another process holds it and does not let go") from None
                time.sleep(0.01)

    def _write(self, name: str, content: bytes) -> None:
        """On the disk before it has its name, and its name on the disk before anything that counts on it."""
        fresh = self._directory / f".{name}.new"
        fresh.unlink(missing_ok=True)  # of one that was killed
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._directory / name)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _unusable(self, reason: str | None) -> OperatorFault:
        return OperatorFault(f"{self._directory}: {reason}", code="policy_memory_unusable")
