"""What a sidecar must not forget about policy: the highest release that it accepted, and the last bundle that ran.

Both lie in a directory of the state that is its owner's alone. A file is written beside the old one, brought to the disk and
renamed, so that a kill leaves the old or the new and never half; the bundle goes first, since a bundle newer than the
memory is accepted at the next start, and one older is a downgrade. Two processes may overlap (a restart without a lost
request): a lock makes them take turns, and neither forgets what the other has seen.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidecar.bundles import release
from sidecar.bundles.release import Held
from sidecar.errors import OperatorFault

_HELD = "held.json"
_LAST_GOOD = "last-good.tar.gz"


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
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OperatorFault(
                f"{path}: {reason}; what it said protects against old policy: remove it only if that is no concern",
                code="policy_memory_unusable",
            ) from error

    def last_good(self) -> bytes | None:
        try:
            return (self._directory / _LAST_GOOD).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error

    def remember(self, held: Held, archive: bytes) -> Held:
        """Keep both. Returns what is held now: more than `held` where another process has seen a higher release."""
        try:
            with self._locked():
                other = self.held()
                self._write(_LAST_GOOD, archive)
                if other is not None and other.serial > held.serial:
                    return other
                self._write(_HELD, json.dumps(release.to_json(held)).encode())
        except OSError as error:
            raise self._unusable(error) from error
        return held

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
            os.fsync(lock)
        finally:
            os.close(lock)

    def _write(self, name: str, content: bytes) -> None:
        fresh = self._directory / f".{name}.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._directory / name)

    def _unusable(self, error: OSError) -> OperatorFault:
        return OperatorFault(f"{self._directory}: {error.strerror}", code="policy_memory_unusable")
