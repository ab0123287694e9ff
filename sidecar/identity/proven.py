"""Which targets have ever proven themselves by mTLS: to those, permissive never speaks plaintext again.

Kept on disk, since forgetting would reopen the door to whoever can close a port. Two processes may overlap (a rolling restart), so the
file is merged under a lock and replaced whole, and looked at again where it has been replaced: what the other one has seen
binds us too. What cannot be read counts as "all of them": no plaintext at all.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from sidecar.errors import OperatorFault


class Proven:
    """A set of target names that only grows. `path` is a file in the state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] | None = None
        self._seen: tuple[int, int, int] | None = None
        """Which file was read: inode, size, and time of its last change."""

    def load(self) -> None:
        """Read what is remembered. Raises `OperatorFault` for a file that is not ours, and remembers everything then."""
        try:
            self._seen = _look(self._path)
            self._names = _read(self._path)
        except (OSError, ValueError) as error:
            raise OperatorFault(f"{self._path}: {error}", code="proof_memory_unreadable") from error

    def __contains__(self, name: str) -> bool:
        """Known names cost nothing; for another the file is looked at, and read if it is not the one that we know."""
        if self._names is None or name in self._names:
            return True
        try:
            seen = _look(self._path)
            if seen is not None and seen != self._seen:
                self._names |= _read(self._path)
                self._seen = seen
        except (OSError, ValueError):
            return True  # for now: it may be readable again when it is asked for next
        return name in self._names

    def add(self, name: str) -> None:
        """Remember, on disk too. Raises OSError where that fails; in memory it is remembered all the same."""
        if self._names is None or name in self._names:
            return
        self._names.add(name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._names |= _read(self._path)
            except ValueError:
                pass  # it was readable at the start; what we know goes into a new one
            new = self._path.with_suffix(".new")
            with open(new, "w") as file:
                json.dump({"proven": sorted(self._names)}, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)


def _read(path: Path) -> set[str]:
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return set()
    if not isinstance(stored, dict) or not isinstance(names := stored.get("proven"), list):
        raise ValueError("is not a memory of proofs")  # noqa: TRY004  (what a file holds is a value)
    return {str(name) for name in names}


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
