"""Where archives are kept: a directory, or an object store. Immutable: what has a name keeps its bytes.

A name is bundle, serial and the SHA-256 of the archive, so that a release that is signed anew lies beside itself and no
reader ever gets other bytes than those whose hash it knows. Whoever puts is done only when the bytes would survive a
power cut; a second putting of the same is nothing, and other bytes under the same name are a conflict and change nothing.

Both stores block: they are called in worker threads. Only bytes are here; what they mean is in the database.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

from sidecar.errors import OperatorFault, OurFault, SidecarError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class StoreUnavailable(OurFault):
    """The store cannot be asked, or what it holds is not what was put there."""

    code = "fleet_store_unavailable"
    public = "the store of bundles cannot be used now"


class Taken(SidecarError):
    """There are other bytes under this name."""

    status = 409
    code = "fleet_archive_conflict"
    public = "other bytes are kept under this name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The name of an archive. `sha256`: hex, of its bytes."""

    bundle: str
    serial: int
    sha256: str

    def __post_init__(self) -> None:
        # It becomes a path: this is the last place to look.
        if not _NAME.fullmatch(self.bundle) or self.serial < 0 or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError("not the name of an archive")

    def __str__(self) -> str:
        return f"{self.bundle}/{self.serial}/{self.sha256}.tar.gz"


class Store(Protocol):
    def put(self, key: Key, archive: bytes) -> None:
        """Keep the archive; return once it would survive. Raises `Taken` or `StoreUnavailable`."""
        ...

    def get(self, key: Key) -> bytes:
        """Raises `StoreUnavailable` where it is not there, is not what its name says, or cannot be had."""
        ...


class Directory:
    """In a directory of our own user, made where it is not there. Raises `OperatorFault` (`fleet_store_unusable`)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OperatorFault(f"store {root}: {error.strerror}", code="fleet_store_unusable") from error

    def put(self, key: Key, archive: bytes) -> None:
        path = self._root / str(key)
        fresh = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            self._make(path.parent)
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(archive)
                file.flush()
                os.fsync(file.fileno())
            try:
                path.hardlink_to(fresh)  # unlike a rename it never replaces
            except FileExistsError:
                if path.read_bytes() != archive:
                    raise Taken from None
            finally:
                fresh.unlink()
            _sync(path.parent)
        except OSError as error:
            raise StoreUnavailable(f"{path}: {error.strerror}") from error

    def get(self, key: Key) -> bytes:
        path = self._root / str(key)
        try:
            return _sound(key, path.read_bytes())
        except OSError as error:
            raise StoreUnavailable(f"{path}: {error.strerror}") from error

    def _make(self, directory: Path) -> None:
        """Make what is missing below the root, and see that it survives."""
        missing = [one for one in (directory.parent, directory) if not one.is_dir()]
        for one in missing:
            one.mkdir(exist_ok=True, mode=0o700)
            _sync(one.parent)


class Objects:
    """In an object store, behind `obstore`. `prefix`: what each name begins with, "" or ending in a slash."""

    def __init__(self, store: ObjectStore, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix

    def put(self, key: Key, archive: bytes) -> None:
        import obstore  # noqa: PLC0415  (30 MB that only servers with such a store pay for)
        from obstore.exceptions import AlreadyExistsError, BaseError  # noqa: PLC0415

        try:
            try:
                # In one piece: only then the store can be asked to refuse what is there already.
                obstore.put(self._store, self._path(key), archive, mode="create", use_multipart=False)
            except AlreadyExistsError:
                if bytes(obstore.get(self._store, self._path(key)).bytes()) != archive:
                    raise Taken from None
        except (BaseError, OSError, ValueError) as error:
            raise _unavailable(key, error) from error

    def get(self, key: Key) -> bytes:
        import obstore  # noqa: PLC0415
        from obstore.exceptions import BaseError  # noqa: PLC0415

        try:
            return _sound(key, bytes(obstore.get(self._store, self._path(key)).bytes()))
        except (BaseError, OSError, ValueError) as error:
            raise _unavailable(key, error) from error

    def _path(self, key: Key) -> str:
        return f"{self._prefix}{key}"


def opened(where: Path | str, *, endpoint: str | None = None, allow_http: bool = False) -> Store:
    """The store at a directory, or at `s3://bucket/prefix`, `gs://…`, `az://…`.

    Credentials, region and endpoint come from the environment, as obstore reads it; `endpoint` names another one. Plain
    HTTP is spoken with `allow_http` only, and only to loopback. Raises `OperatorFault` (`fleet_store_unusable`).
    """
    if isinstance(where, Path):
        return Directory(where)
    found = urlsplit(where)
    if found.scheme not in SCHEMES or not found.netloc or found.query or found.fragment:
        raise OperatorFault(
            f"store {where}: is not a directory, nor s3://bucket/prefix, gs://… or az://…", code="fleet_store_unusable"
        )
    if endpoint is not None:
        _check_endpoint(endpoint, allow_http=allow_http)
    try:
        import obstore.store  # noqa: PLC0415
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        raise OperatorFault(f"store {where}: needs the package obstore", code="fleet_store_unusable") from error
    try:
        make = cast("Callable[..., ObjectStore]", obstore.store.from_url)  # overloaded by what the URL names
        store = make(
            f"{found.scheme}://{found.netloc}",
            client_options={"allow_http": allow_http, "timeout": "60s", "connect_timeout": "5s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
            **({} if endpoint is None else {"endpoint": endpoint}),
        )
    except (BaseError, ValueError) as error:
        raise OperatorFault(f"store {where}: {_brief(error)}", code="fleet_store_unusable") from error
    prefix = found.path.strip("/")
    return Objects(store, f"{prefix}/" if prefix else "")


def _check_endpoint(endpoint: str, *, allow_http: bool) -> None:
    found = urlsplit(endpoint)
    if found.scheme == "https" and found.hostname:
        return
    if found.scheme == "http" and allow_http and _is_loopback(found.hostname or ""):
        return
    raise OperatorFault(
        f"endpoint {endpoint}: must be https; http is for loopback, with allow_http", code="fleet_store_unusable"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _sound(key: Key, archive: bytes) -> bytes:
    if hashlib.sha256(archive).hexdigest() != key.sha256:
        raise StoreUnavailable(f"{key}: what is kept is not what was put there")
    return archive


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unavailable(key: Key, error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"{key}: {_brief(error)}")


def _brief(error: Exception) -> str:
    """The first line: obstore prints all that it knows of a request behind it."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
