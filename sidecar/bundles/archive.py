"""The archive of a bundle: a gzip tar, read strictly and written the same way each time.

Reading takes what a policy bundle consists of and nothing else: rules, `data.json`, `.manifest`, `.signatures.json`. A link, a
device, a name that leads elsewhere or comes twice, bytes behind the end, more than the limits: refused, with the reason.
What is read here is packed anew before OPA sees it, so nothing that only another reader would find in the archive can
matter. It is unpacked piece by piece: what an archive costs is what its files hold, and that is bounded. Pure: bytes in,
bytes out.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, cast

from sidecar.bundles import canonical, tar
from sidecar.bundles.canonical import NotJson, Value
from sidecar.bundles.tar import CutShort, NotTar, TooMany, shown
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
_PIECE = 1 << 16


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
    max_manifest_bytes: int = 1 << 20
    """It is read before anything vouches for it, where several bundles are put into an order."""
    max_signatures_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The parts of an archive. `files`: name without leading slash → bytes; `.signatures.json` is not among them."""

    files: Mapping[str, bytes] = field(repr=False)
    signatures: bytes | None = field(repr=False)
    hashes: dict[tuple[str, str], str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was worked out of the files, by name and algorithm: `signature` keeps it, since it costs more than all else."""

    @property
    def manifest(self) -> Value:
        """`.manifest`, parsed; an empty one where there is none. Raises `BundleRefused`."""
        return json_of(MANIFEST, self.files.get(MANIFEST, b"{}"))


def read(archive: bytes, bounds: Bounds = Bounds()) -> Bundle:
    """Read an archive. Raises `BundleRefused` (`bundle_oversized`, `bundle_truncated` or `bundle_malformed`)."""
    if len(archive) > bounds.max_archive_bytes:
        raise BundleRefused(f"the archive is larger than {bounds.max_archive_bytes} bytes", code="bundle_oversized")
    files: dict[str, bytes] = {}
    unpacked = _Unpacked(archive, bounds.max_unpacked_bytes)
    try:
        for spelt, content in tar.entries(unpacked.take, max_headers=4 * bounds.max_files + 16):
            if content is None:
                continue  # a directory says nothing
            name = _name(spelt, bounds)
            _fits(name, content, bounds)
            if name in files:
                raise BundleRefused(f"{shown(name)} comes twice", code="bundle_malformed")
            if len(files) >= bounds.max_files:
                raise BundleRefused(f"there are more than {bounds.max_files} files", code="bundle_oversized")
            files[name] = content
    except CutShort as error:
        raise BundleRefused(str(error), code="bundle_truncated") from error
    except TooMany as error:
        raise BundleRefused(str(error), code="bundle_oversized") from error
    except NotTar as error:
        raise BundleRefused(str(error), code="bundle_malformed") from error
    signatures = files.pop(SIGNATURES, None)
    return Bundle(files=MappingProxyType(files), signatures=signatures)


def pack(bundle: Bundle) -> bytes:
    """Write an archive: the same parts give the same bytes (with one build of zlib)."""
    parts = dict(bundle.files)
    if bundle.signatures is not None:
        parts[SIGNATURES] = bundle.signatures
    packed = _Packed()
    with tarfile.open(fileobj=cast("IO[bytes]", packed), mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(parts):
            entry = tarfile.TarInfo(f"/{name}")  # with a leading slash, as OPA writes them
            entry.size, entry.mode = len(parts[name]), 0o600
            archive.addfile(entry, io.BytesIO(parts[name]))
    return packed.end()


def json_of(name: str, content: bytes) -> Value:
    """Parse a JSON file of a bundle, and make sure that it has a canonical spelling. Raises `BundleRefused`."""
    return _spelt(name, content)[0]


def canonical_of(name: str, content: bytes) -> bytes:
    """The canonical spelling of a JSON file of a bundle. Raises `BundleRefused`."""
    return _spelt(name, content)[1]


def _spelt(name: str, content: bytes) -> tuple[Value, bytes]:
    try:
        value = canonical.parse(content)
        return value, canonical.encode(value)
    except NotJson as error:
        raise BundleRefused(f"{name} {error}", code="bundle_malformed") from error


class _Unpacked:
    """Undoes gzip, and no more of it than the limit: a few bytes may say a million."""

    def __init__(self, archive: bytes, limit: int) -> None:
        self._archive = memoryview(archive)
        self._at = 0
        self._limit = limit
        self._left = limit
        self._inflate = zlib.decompressobj(31)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end, behind which there must be nothing. Raises `BundleRefused`."""
        pieces: list[bytes] = []
        while size > 0 and (piece := self._piece(min(size, _PIECE))):
            pieces.append(piece)
            size -= len(piece)
            self._left -= len(piece)
            if self._left < 0:
                raise BundleRefused(f"unpacks to more than {self._limit} bytes", code="bundle_oversized")
        return b"".join(pieces)

    def _piece(self, size: int) -> bytes:
        while not self._inflate.eof:
            fed = self._inflate.unconsumed_tail
            if not fed:
                fed = bytes(self._archive[self._at : self._at + _PIECE])
                self._at += len(fed)
            try:
                piece = self._inflate.decompress(fed, size)
            except zlib.error as error:
                raise BundleRefused(f"is not a gzip archive: {error}", code="bundle_malformed") from error
            if piece:
                return piece
            if not fed and not self._inflate.eof:
                raise BundleRefused("the archive is cut short", code="bundle_truncated")
        if self._inflate.unused_data or self._at < len(self._archive):
            raise BundleRefused("there are bytes behind the end of the archive", code="bundle_malformed")
        return b""


class _Packed:
    """Takes what `tarfile` writes, and keeps it pressed."""

    def __init__(self) -> None:
        self._press = zlib.compressobj(9, zlib.DEFLATED, -15)
        self._pieces = [_GZIP_HEADER]
        self._sum = 0
        self._size = 0

    def write(self, data: bytes) -> int:
        self._pieces.append(self._press.compress(data))
        self._sum = zlib.crc32(data, self._sum)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def end(self) -> bytes:
        trailer = struct.pack("<II", self._sum, self._size & 0xFFFFFFFF)
        return b"".join((*self._pieces, self._press.flush(), trailer))


def _name(spelt: str, bounds: Bounds) -> str:
    """The name without what stands for the bundle's root. Raises for what leads elsewhere, or is no part of a bundle."""
    name = spelt.removeprefix("./") if spelt.startswith("./") else spelt.removeprefix("/")
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in {"", ".", ".."} for part in parts):
        raise BundleRefused(f"{shown(spelt)} is not a name within the bundle", code="bundle_malformed")
    if len(name.encode()) > bounds.max_name_bytes:
        raise BundleRefused(f"{shown(spelt)} is too long a name", code="bundle_oversized")
    if parts[-1] in _UNSUPPORTED:
        raise BundleRefused(f"{shown(name)}: {_UNSUPPORTED[parts[-1]]}", code="bundle_malformed")
    if name not in {MANIFEST, SIGNATURES} and parts[-1] != DATA and not name.endswith(".rego"):
        raise BundleRefused(f"{shown(name)} is no part of a policy bundle", code="bundle_malformed")
    return name


def _fits(name: str, content: bytes, bounds: Bounds) -> None:
    most = {MANIFEST: bounds.max_manifest_bytes, SIGNATURES: bounds.max_signatures_bytes}.get(name)
    if most is not None and len(content) > most:
        raise BundleRefused(f"{name} is larger than {most} bytes", code="bundle_oversized")
