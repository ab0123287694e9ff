"""The archive of a bundle: a gzip tar, read strictly and written the same way each time.

Reading takes what a policy bundle consists of and nothing else: rules, `data.json`, `.manifest`, `.signatures.json`. A link, a
device, a name that leads elsewhere or comes twice, bytes behind the end, more than the limits: refused, with the reason.
What is read here is packed anew before OPA sees it, so nothing that only another reader would find in the archive can
matter. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sidecar.bundles import canonical
from sidecar.bundles.canonical import NotJson, Value
from sidecar.errors import OperatorFault

MANIFEST = ".manifest"
SIGNATURES = ".signatures.json"
DATA = "data.json"
_UNSUPPORTED = {
    "data.yaml": "data is read from data.json only; `sidecar bundle build` turns YAML into it",
    "data.yml": "data is read from data.json only; `sidecar bundle build` turns YAML into it",
    "policy.wasm": "rules compiled to WebAssembly are not taken",
    "patch.json": "deltas cannot be signed, and are not taken",
}
_GZIP_HEADER = b"\x1f\x8b\x08\x00" + struct.pack("<I", 0) + b"\x02\xff"
"""No name, no time, best compression, no operating system (RFC 1952 §2.3): the same input gives the same bytes."""


class BundleRefused(OperatorFault):
    """An archive that is not taken; the text says why. `code` groups the reasons for metrics."""

    code = "bundle_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an archive may cost. Sizes in bytes."""

    max_archive_bytes: int = 64 << 20
    max_unpacked_bytes: int = 256 << 20
    max_files: int = 10_000
    max_name_bytes: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The parts of an archive. `files`: name without leading slash → bytes; `.signatures.json` is not among them."""

    files: Mapping[str, bytes]
    signatures: bytes | None

    @property
    def manifest(self) -> Value:
        """`.manifest`, parsed; an empty one where there is none. Raises `BundleRefused`."""
        return json_of(MANIFEST, self.files.get(MANIFEST, b"{}"))


def read(archive: bytes, bounds: Bounds = Bounds()) -> Bundle:
    """Read an archive. Raises `BundleRefused` (`bundle_oversized`, `bundle_truncated` or `bundle_malformed`)."""
    if len(archive) > bounds.max_archive_bytes:
        raise BundleRefused(f"the archive is larger than {bounds.max_archive_bytes} bytes", code="bundle_oversized")
    files: dict[str, bytes] = {}
    for member, content in _members(_unpacked(archive, bounds)):
        name = _name(member, bounds)
        if name is None:
            continue
        if name in files:
            raise BundleRefused(f"{_shown(name)} comes twice", code="bundle_malformed")
        if len(files) >= bounds.max_files:
            raise BundleRefused(f"there are more than {bounds.max_files} files", code="bundle_oversized")
        files[name] = content
    signatures = files.pop(SIGNATURES, None)
    return Bundle(files=MappingProxyType(files), signatures=signatures)


def pack(bundle: Bundle) -> bytes:
    """Write an archive: the same parts give the same bytes (with one build of zlib)."""
    parts = dict(bundle.files)
    if bundle.signatures is not None:
        parts[SIGNATURES] = bundle.signatures
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(parts):
            entry = tarfile.TarInfo(f"/{name}")  # with a leading slash, as OPA writes them
            entry.size, entry.mode = len(parts[name]), 0o600
            tar.addfile(entry, io.BytesIO(parts[name]))
    raw = plain.getvalue()
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    trailer = struct.pack("<II", zlib.crc32(raw), len(raw) & 0xFFFFFFFF)
    return _GZIP_HEADER + press.compress(raw) + press.flush() + trailer


def json_of(name: str, content: bytes) -> Value:
    """Parse a JSON file of a bundle, and make sure that it has a canonical spelling. Raises `BundleRefused`."""
    try:
        value = canonical.parse(content)
        canonical.encode(value)
        return value
    except NotJson as error:
        raise BundleRefused(f"{name} {error}", code="bundle_malformed") from error


def _unpacked(archive: bytes, bounds: Bounds) -> bytes:
    """Undo gzip, and no more of it than the limit: a few bytes may say a million."""
    inflate = zlib.decompressobj(31)
    try:
        raw = inflate.decompress(archive, bounds.max_unpacked_bytes + 1)
    except zlib.error as error:
        raise BundleRefused(f"is not a gzip archive: {error}", code="bundle_malformed") from error
    if len(raw) > bounds.max_unpacked_bytes:
        raise BundleRefused(f"unpacks to more than {bounds.max_unpacked_bytes} bytes", code="bundle_oversized")
    if not inflate.eof:
        raise BundleRefused("the archive is cut short", code="bundle_truncated")
    if inflate.unused_data:
        raise BundleRefused("there are bytes behind the end of the archive", code="bundle_malformed")
    return raw


def _members(raw: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    file = io.BytesIO(raw)
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="strict") as tar:
            for member in tar:
                yield member, _content(tar, member)
            # tarfile takes a broken header for the end.
            if raw[tar.offset :].strip(b"\0"):
                raise BundleRefused("a header of the archive is broken", code="bundle_malformed")
            if len(raw) < tar.offset:
                raise BundleRefused("the archive is cut short", code="bundle_truncated")
    except (tarfile.TarError, EOFError) as error:
        raise BundleRefused(f"is not a tar archive: {error}", code="bundle_truncated") from error
    except (ValueError, OverflowError, LookupError, OSError, RecursionError, struct.error) as error:
        raise BundleRefused(f"is not a tar archive: {error}", code="bundle_malformed") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.isdir():
        return b""
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "not a plain file"
        raise BundleRefused(f"{_shown(member.name)} is {kind}", code="bundle_malformed")
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
    if len(content) != member.size:
        raise BundleRefused(f"{_shown(member.name)} is cut short", code="bundle_truncated")
    return content


def _name(member: tarfile.TarInfo, bounds: Bounds) -> str | None:
    """The name without its leading slash; None for a directory, which says nothing. Raises for what leads elsewhere."""
    name = member.name.removeprefix("./").removeprefix("/")
    if member.isdir():
        return None
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in {"", ".", ".."} for part in parts):
        raise BundleRefused(f"{_shown(member.name)} is not a name within the bundle", code="bundle_malformed")
    if len(name.encode()) > bounds.max_name_bytes:
        raise BundleRefused(f"{_shown(member.name)} is too long a name", code="bundle_oversized")
    if parts[-1] in _UNSUPPORTED:
        raise BundleRefused(f"{name}: {_UNSUPPORTED[parts[-1]]}", code="bundle_malformed")
    if name not in {MANIFEST, SIGNATURES} and parts[-1] != DATA and not name.endswith(".rego"):
        raise BundleRefused(f"{_shown(name)} is no part of a policy bundle", code="bundle_malformed")
    return name


def _shown(name: str) -> str:
    return ascii(name[:80])
