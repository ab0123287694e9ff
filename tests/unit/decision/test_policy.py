from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sidecar.decision import policy as disk
from sidecar.decision.policy import Policy
from sidecar.errors import OperatorFault


def bundle(path: Path, manifest: Any = None, name: str = "/.manifest", padding: int = 0) -> Path:
    files = {"/policy.rego": b"#" * padding}
    if manifest is not None:
        files[name] = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(raw.getvalue())
    return path


def serial(number: Any) -> dict[str, Any]:
    return {"revision": "r", "metadata": {"serial": number}}


def policy(source: Path, **more: Any) -> Policy:
    return Policy(source=source, keys={"k": ("ES256", b"PEM")}, **more)


def test_a_file_is_the_only_candidate(tmp_path: Path) -> None:
    assert disk.candidates(policy(tmp_path / "none.tar.gz")) == [tmp_path / "none.tar.gz"]


def test_of_a_directory_the_highest_serial_is_tried_first(tmp_path: Path) -> None:
    bundle(tmp_path / "a.tar.gz", serial(2))
    bundle(tmp_path / "b.tar.gz", serial(10), name=".manifest")
    bundle(tmp_path / "c.tar.gz", serial(9), name="./.manifest")
    bundle(tmp_path / "ignored.txt", serial(99))
    names = [path.name for path in disk.candidates(policy(tmp_path))]
    assert names == ["b.tar.gz", "c.tar.gz", "a.tar.gz"]


@pytest.mark.parametrize(
    "manifest", [None, {}, serial("9"), serial(True), serial(9.5), [], b"{", b"\xff", b"[" * 100_000, {"metadata": 9}]
)  # fmt: skip
def test_a_serial_that_is_none_comes_last(tmp_path: Path, manifest: Any) -> None:
    bundle(tmp_path / "z.tar.gz", manifest)
    bundle(tmp_path / "a.tar.gz", serial(0))
    assert [path.name for path in disk.candidates(policy(tmp_path))] == ["a.tar.gz", "z.tar.gz"]


def test_what_is_no_archive_or_unpacks_without_end_comes_last(tmp_path: Path) -> None:
    bundle(tmp_path / "a.tar.gz", serial(0))
    bundle(tmp_path / "bomb.tar.gz", serial(99), padding=2 << 20)
    (tmp_path / "garbage.tar.gz").write_bytes(b"garbage")
    (tmp_path / "short.tar.gz").write_bytes(bundle(tmp_path / "x", serial(99)).read_bytes()[:-30])
    (tmp_path / "zip.tar.gz").write_bytes(gzip.compress(b"x" * 10_000))
    (tmp_path / "empty.tar.gz").touch()
    (tmp_path / "directory.tar.gz").mkdir()
    assert disk.candidates(policy(tmp_path, max_bundle_bytes=1 << 20))[0].name == "a.tar.gz"


def test_only_so_many_are_tried(tmp_path: Path) -> None:
    for number in range(20):
        bundle(tmp_path / f"{number}.tar.gz", serial(number))
    assert [path.name for path in disk.candidates(policy(tmp_path))] == [f"{n}.tar.gz" for n in range(19, 11, -1)]


def test_an_empty_directory_is_the_operators_fault(tmp_path: Path) -> None:
    with pytest.raises(OperatorFault) as caught:
        disk.candidates(policy(tmp_path))
    assert caught.value.code == "bundle_unreadable"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name in ("none", "pipe", "large", "."):
        with pytest.raises(OperatorFault) as caught:
            disk.read(tmp_path / name, 10)
        assert caught.value.code == "bundle_unreadable"
        assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "large").write_bytes(b"x" * 10)
    assert disk.read(tmp_path / "large", 10) == b"x" * 10


def test_a_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    assert disk.fingerprint(file) == ()
    file.write_bytes(b"1")
    seen = {disk.fingerprint(file)}
    (tmp_path / "fresh").write_bytes(b"2")
    (tmp_path / "fresh").replace(file)
    seen.add(disk.fingerprint(file))
    file.write_bytes(b"33")
    seen.add(disk.fingerprint(file))
    assert len(seen) == 3
    one = disk.fingerprint(tmp_path)
    (tmp_path / "b.tar.gz").touch()
    assert disk.fingerprint(tmp_path) != one


def test_opa_is_told_to_verify_and_to_keep_nothing(tmp_path: Path) -> None:
    told = disk.configuration(policy(tmp_path / "x", scope="prod", max_bundle_bytes=7), tmp_path / "copy.tar.gz")
    assert told["bundles"] == {
        "sidecar": {
            "resource": f"file://{tmp_path}/copy.tar.gz", "persist": False, "size_limit_bytes": 7,
            "signing": {"scope": "prod"},
        }
    }  # fmt: skip
    assert told["keys"] == {"k": {"algorithm": "ES256", "key": "PEM"}}
