"""Policy as it lies on disk: which bundle, which keys may have signed it, and what OPA is told about them.

What is read here is not verified here: OPA does that, on the very bytes that are handed to it. The serial in a manifest
only says in which order the bundles of a directory are tried; whoever forges one gains a refusal.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sidecar.errors import OperatorFault

NAME = "sidecar"
"""What OPA calls our one bundle."""
MAX_CANDIDATES = 8
"""Bundles of a directory that are tried: each costs the start of an OPA."""
_MAX_MANIFEST_BYTES = 1 << 20
_MANIFEST = frozenset({".manifest", "/.manifest", "./.manifest"})

Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where the bundle is (a file, or a directory of `*.tar.gz`), and what OPA is to verify it with.

    `keys`: key id → (algorithm of RFC 7518 §3.1, public key in PEM).
    """

    source: Path
    keys: Mapping[str, tuple[str, bytes]]
    scope: str = "sidecar"
    max_bundle_bytes: int = 64 << 20
    """Of the archive, and of each file in it."""


def fingerprint(source: Path) -> Fingerprint:
    """Return what changes when the source does; empty where there is none. Blocks as `stat` does."""
    try:
        paths = sorted(source.glob("*.tar.gz")) if source.is_dir() else [source]
        seen = [(path, path.stat()) for path in paths]
    except OSError:
        return ()
    return tuple((str(path), found.st_mtime_ns, found.st_size, found.st_ino) for path, found in seen)


def candidates(policy: Policy) -> list[Path]:
    """Return the bundles to try: the file, or those of a directory, the highest serial first. Blocks.

    Raises `OperatorFault` (`bundle_unreadable`).
    """
    source = policy.source
    if not source.is_dir():
        return [source]
    found = sorted(((_serial(path, policy.max_bundle_bytes), path) for path in source.glob("*.tar.gz")), reverse=True)
    if not found:
        raise OperatorFault(f"{source} holds no bundle (*.tar.gz)", code="bundle_unreadable")
    return [path for _, path in found[:MAX_CANDIDATES]]


def read(path: Path, limit: int) -> bytes:
    """Read a bundle of at most `limit` bytes. Blocks. Raises `OperatorFault` (`bundle_unreadable`)."""
    try:
        if not path.is_file():
            raise OperatorFault(f"{path} is not a file that can be read", code="bundle_unreadable")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise OperatorFault(f"{path}: {error.strerror}", code="bundle_unreadable") from error
    if len(data) > limit:
        raise OperatorFault(f"{path} is larger than {limit} bytes", code="bundle_unreadable")
    return data


def configuration(policy: Policy, bundle: Path) -> dict[str, object]:
    """Return OPA's configuration. It is the `signing` block that makes it verify: keys alone would not."""
    return {
        "bundles": {
            NAME: {
                "resource": bundle.as_uri(),
                "persist": False,
                "size_limit_bytes": policy.max_bundle_bytes,
                "signing": {"scope": policy.scope},
            }
        },
        "keys": {
            name: {"algorithm": kind, "key": pem.decode("ascii", "replace")}
            for name, (kind, pem) in policy.keys.items()
        },
        "status": {"prometheus": True},  # without anything to do for it, /v1/status is not there
    }


class _Bounded(io.RawIOBase):
    """What a gzip file unpacks to, but no more than `limit` bytes of it."""

    def __init__(self, unpacked: io.BufferedIOBase, limit: int) -> None:
        self._file = unpacked
        self._left = limit

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _serial(path: Path, limit: int) -> int:
    """Return the serial that a bundle's manifest claims; -1 where it claims none, or cannot be read."""
    import gzip  # noqa: PLC0415  most sources are a file, and what is imported is paid for in memory
    import tarfile  # noqa: PLC0415

    try:
        unpacked = _Bounded(gzip.GzipFile(fileobj=io.BytesIO(read(path, limit))), limit)
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                if member.name in _MANIFEST and member.size <= _MAX_MANIFEST_BYTES:
                    file = archive.extractfile(member)
                    serial = json.loads(file.read())["metadata"]["serial"] if file is not None else -1
                    return serial if type(serial) is int else -1
    except (OperatorFault, OSError, EOFError, ValueError, LookupError, TypeError, RecursionError):
        pass  # OPA will say what is wrong with it
    except (tarfile.TarError, zlib.error):
        pass
    return -1
