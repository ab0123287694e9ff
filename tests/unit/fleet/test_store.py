"""Stores keep what they were given: one contract, over directories, obstore's own stores, and a server that speaks S3."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore.store
import pytest

from sidecar.errors import OperatorFault
from sidecar.fleet.store import Directory, Key, Objects, Store, StoreUnavailable, Taken, opened
from support import s3

ROOT = Path(__file__).parents[3]
BYTES = b"some archive" * 1000


def key(archive: bytes = BYTES, *, serial: int = 7, bundle: str = "sidecar") -> Key:
    return Key(bundle=bundle, serial=serial, sha256=hashlib.sha256(archive).hexdigest())


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3.running(tmp_path_factory.mktemp("s3"), "policies") as found:
        yield found


@pytest.fixture(params=["directory", "memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    match request.param:
        case "directory":
            return opened(tmp_path / "versions")
        case "memory":
            return Objects(obstore.store.MemoryStore(), "some/prefix/")
        case "local":
            return Objects(obstore.store.LocalStore(tmp_path))
    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    return opened(f"s3://policies/{prefix}/deeper", endpoint=request.getfixturevalue("endpoint"), allow_http=True)


def test_what_was_put_is_there(store: Store) -> None:
    store.put(key(), BYTES)
    store.put(key(b""), b"")
    store.put(key(serial=8), BYTES)
    store.put(key(bundle="other"), BYTES)
    assert store.get(key()) == store.get(key(serial=8)) == store.get(key(bundle="other")) == BYTES
    assert store.get(key(b"")) == b""


def test_the_same_again_is_nothing(store: Store) -> None:
    store.put(key(), BYTES)
    store.put(key(), BYTES)
    assert store.get(key()) == BYTES


def test_other_bytes_are_a_conflict_and_change_nothing(store: Store) -> None:
    store.put(key(), BYTES)
    with pytest.raises(Taken):
        store.put(key(), b"others")
    assert store.get(key()) == BYTES


def test_what_is_not_there_is_said_to_be_missing(store: Store) -> None:
    with pytest.raises(StoreUnavailable):
        store.get(key())


def test_bytes_that_are_not_what_their_name_says_are_not_handed_out(store: Store) -> None:
    store.put(key(b"others"), BYTES)
    with pytest.raises(StoreUnavailable, match="not what was put there"):
        store.get(key(b"others"))


def test_a_large_archive_goes_in_one_piece(store: Store) -> None:
    archive = os.urandom(12 << 20)
    store.put(key(archive), archive)
    assert store.get(key(archive)) == archive
    with pytest.raises(Taken):
        store.put(key(archive), archive[:-1])


def test_of_many_who_put_at_once_one_wins(store: Store) -> None:
    won: list[bytes] = []

    def put(archive: bytes) -> None:
        try:
            store.put(key(), archive)
            won.append(archive)
        except Taken:
            pass

    threads = [threading.Thread(target=put, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


# ── a directory ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    Directory(tmp_path / "versions").put(key(), BYTES)
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert set(modes.values()) == {0o700, 0o600}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key().sha256}.tar.gz"]


def test_a_kill_while_putting_leaves_all_or_nothing(tmp_path: Path) -> None:
    """At each call of the system that makes, links or syncs."""
    program = """
import os, pathlib, sys
from sidecar.fleet.store import Directory, Key
left = int(sys.argv[1])
def dying(call):
    def wrapped(*arguments, **more):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*arguments, **more)
    return wrapped
for name in ("open", "fsync", "mkdir", "link", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
Directory(pathlib.Path(sys.argv[2])).put(Key(bundle="b", serial=1, sha256="%s"), b"all of it")
""" % hashlib.sha256(b"all of it").hexdigest()  # noqa: UP031
    wanted = Key(bundle="b", serial=1, sha256=hashlib.sha256(b"all of it").hexdigest())
    codes, seen = [], set()
    for left in range(40):
        root = tmp_path / str(left)
        code = subprocess.run(
            [sys.executable, "-c", program, str(left), str(root)], cwd=ROOT, check=False, timeout=60
        ).returncode
        codes.append(code)
        store = Directory(root)
        try:
            seen.add(store.get(wanted))
        except StoreUnavailable:
            seen.add(b"")
        store.put(wanted, b"all of it")
        assert store.get(wanted) == b"all of it"
        if code == 0:
            break
    assert codes[-1] == 0
    assert len(codes) > 8
    assert seen == {b"", b"all of it"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Key(bundle="../x", serial=1, sha256="0" * 64),
        lambda: Key(bundle="a/b", serial=1, sha256="0" * 64),
        lambda: Key(bundle="", serial=1, sha256="0" * 64),
        lambda: Key(bundle=".", serial=1, sha256="0" * 64),
        lambda: Key(bundle="a", serial=-1, sha256="0" * 64),
        lambda: Key(bundle="a", serial=1, sha256="/etc/passwd"),
    ],
)
def test_a_name_that_leads_elsewhere_is_none(make: Callable[[], Key]) -> None:
    with pytest.raises(ValueError, match="not the name"):
        make()


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "where", ["ftp://bucket/x", "s3:///x", "s3://bucket/?x=1", "https://example.org/b", "file:///tmp", "memory://"]
)
def test_a_url_of_another_kind_is_refused(where: str) -> None:
    with pytest.raises(OperatorFault, match="is not a directory, nor"):
        opened(where)


@pytest.mark.parametrize(
    ("endpoint", "allow_http"),
    [
        ("http://127.0.0.1:9000", False),
        ("http://10.0.0.1:9000", True),
        ("http://localhost.example.org:9000", True),
        ("ftp://127.0.0.1", True),
        ("127.0.0.1:9000", True),
    ],
)
def test_plain_http_is_spoken_to_loopback_only_and_if_asked_for(endpoint: str, *, allow_http: bool) -> None:
    with pytest.raises(OperatorFault, match="must be https"):
        opened("s3://bucket", endpoint=endpoint, allow_http=allow_http)


def test_the_environment_does_not_bring_plain_http_in(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**s3.ENVIRONMENT, "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailable):
        opened("s3://policies").put(key(), BYTES)


@pytest.mark.parametrize("where", ["gs://bucket/prefix", "az://container/prefix"])
def test_other_clouds_are_opened(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(opened(where), Objects)


def test_a_store_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailable) as caught:
        opened("s3://policies", endpoint="http://127.0.0.1:1", allow_http=True).get(key())
    assert "\n" not in caught.value.detail
    assert caught.value.status == 503


def test_only_who_opens_such_a_store_loads_obstore(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from sidecar.fleet.store import opened; opened(pathlib.Path(sys.argv[1])); "
        "print('obstore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x")], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    assert done.stdout == b"False\n"
