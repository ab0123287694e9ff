"""A directory of our own for as long as we live: mode 0700, locked, removed at the end, or by the next one of us.

The lock is the kernel's (flock(2)) and goes with the process, however that ends. So a directory that can be locked by
somebody else has nobody left in it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidecar.errors import OperatorFault

_PREFIX = "opa-"


def place(state_dir: Path, runtime_dir: str | None) -> Path:
    """Return where private directories go: `runtime_dir` (XDG_RUNTIME_DIR) if that is ours alone, else `state_dir`."""
    if runtime_dir:
        path = Path(runtime_dir)
        try:
            found = path.stat()
        except OSError:
            return state_dir
        if path.is_absolute() and path.is_dir() and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return path
    return state_dir


@contextmanager
def directory(parent: Path) -> Iterator[Path]:
    """Make a directory under `parent`, and remove it at the end. Raises `OperatorFault` (`runtime_dir_unusable`)."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        parent = parent.resolve()
        _sweep(parent)
        path, lock = _made(parent)
    except OSError as error:
        raise OperatorFault(f"{parent}: {error.strerror}", code="runtime_dir_unusable") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _made(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another one of us swept it away before it was locked
        if _locked(lock) and path.exists():
            return path, lock
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove what those of us left behind who were killed."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _locked(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
