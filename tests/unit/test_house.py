"""What the repository must not hold: paths of one machine, private keys, and what a machine has made."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_MACHINE_PATH = re.compile(rb"(?<![\w.*%~}-])/(?:root|work|home|Users)/[\w.]")
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+(?:[\w-]+:.*\s+)*[A-Za-z0-9+/=]{32}")
_MADE = {
    b"\x7fELF": "ELF", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd",
    b"\xca\xfe\xba\xbe": "Mach-O", b"\xcf\xfa\xed\xfe": "Mach-O", b"MZ\x90": "PE", b"!<arch>": "archive", b"\0asm": "wasm",
}  # fmt: skip
_TAR = slice(257, 262)


def faults(data: bytes) -> Iterator[str]:
    """What is wrong with the content of one file."""
    for magic, kind in _MADE.items():
        if data.startswith(magic):
            yield kind
    if data[_TAR] == b"ustar":
        yield "tar"
    if b"\0" in data[:4096]:
        yield "binary"
    if _PRIVATE_KEY.search(data):
        yield "private key"
    if found := _MACHINE_PATH.search(data):
        yield f"path of a machine: {found[0]!r}"


def files() -> list[Path]:
    """What is tracked, and what would be if everything were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
    paths = {ROOT / one.decode() for one in listed.split(b"\0") if one}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def test_the_repository_holds_nothing_that_it_must_not() -> None:
    listed = files()
    assert ROOT / "pyproject.toml" in listed
    found = {str(path.relative_to(ROOT)): list(faults(path.read_bytes())) for path in listed}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_no_file_is_larger_than_a_lock() -> None:
    """Generated or fetched data is what is large here, and it can be made again."""
    assert [str(path) for path in files() if path.stat().st_size > 1 << 20] == []


PEM = b"-----BEGIN PRIVATE KEY-----\n%b\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "data",
    [
        b"#!" + b"/" + b"home/someone/bin/python",
        b"see " + b"/" + b"root/.cache",
        b'"' + b"/" + b'work/x.py"',
        PEM % (b"MIIBVQIBADANBgkqhkiG9w0BAQEFAASC" * 2),
        b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n" + b"A" * 64,
        b"\x7fELF\x02\x01",
        b"\x1f\x8b\x08\x00",
        b"a" * 257 + b"ustar\x00",
        b"text, then\0",
    ],
)
def test_what_must_not_be_there_is_found(data: bytes) -> None:
    assert list(faults(data))


@pytest.mark.parametrize(
    "data",
    [
        b"https://example.org" + b"/" + b"home/x",
        b"~/" + b"work, $HOME" + b"/" + b"work/x",
        b'if b"PRIVATE KEY" in pem:',
        PEM % b"AAAA",
        b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 64,
    ],
)
def test_what_only_looks_like_it_passes(data: bytes) -> None:
    assert list(faults(data)) == []
