"""Bundles made and signed in Python, and archives that no honest tool makes."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from sidecar.bundles import archive, build, signature
from sidecar.bundles.archive import Bundle
from sidecar.bundles.keys import PrivateKey, SigningKey, VerifyingKey
from sidecar.bundles.terms import Terms

CREATED = 1_750_000_000.0
"""When the bundles here say they were made, unless told otherwise. Unix seconds."""
ALLOWING = b'package sidecar.inbound\n\ndecision := {"allow": true, "rule": "open"}\n'


def private(algorithm: str) -> PrivateKey:
    match algorithm:
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "ES384":
            return ec.generate_private_key(ec.SECP384R1())
        case "ES512":
            return ec.generate_private_key(ec.SECP521R1())
    return rsa.generate_private_key(65537, 2048)


@dataclass(frozen=True, slots=True)
class Key:
    """A key pair with its id."""

    id: str = "release-1"
    algorithm: str = "ES256"
    private: PrivateKey = field(default_factory=lambda: private("ES256"))

    @property
    def signing(self) -> SigningKey:
        return SigningKey(id=self.id, algorithm=self.algorithm, key=self.private)

    @property
    def verifying(self) -> VerifyingKey:
        return signature.public_key(self.algorithm, self.public_pem)

    @property
    def public_pem(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def private_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def terms(self, *others: Key, **more: Any) -> Terms:
        """On which a sidecar takes what this key signs, and the others."""
        return Terms(keys={key.id: (key.algorithm, key.public_pem) for key in (self, *others)}, **more)


def made(
    serial: int = 1,
    *,
    revision: str | None = None,
    rego: bytes = ALLOWING,
    created: float = CREATED,
    files: Mapping[str, bytes] = MappingProxyType({}),
    roots: Iterable[str] = ("sidecar",),
    **metadata: Any,
) -> Bundle:
    """An unsigned bundle. More of the metadata by name."""
    said = {"serial": serial, "created": build.time_text(created), **metadata}
    manifest = {"revision": revision or f"r{serial}", "roots": list(roots), "rego_version": 1, "metadata": said}
    parts = {".manifest": json.dumps(manifest).encode(), "sidecar/inbound.rego": rego, "data.json": b"{}", **files}
    return Bundle(files=MappingProxyType(parts), signatures=None)


def signed(bundle: Bundle, key: Key, scope: str = "sidecar") -> bytes:
    """The archive of a bundle with the signature of `key`."""
    return archive.pack(signature.sign(bundle, key.signing, scope))


# ── hostile archives ──────────────────────────────────────────────────────────────────────────────────────────────


def entry(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tarred(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar, not compressed."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=form) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return plain.getvalue()


def gzipped(raw: bytes, level: int = 6) -> bytes:
    press = zlib.compressobj(level, zlib.DEFLATED, 31)
    return press.compress(raw) + press.flush()


def packed(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    return gzipped(tarred(*entries, form=form))


def header(name: bytes, size: int, kind: bytes = b"0", *, magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header, byte by byte, with a valid checksum."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[108:116], head[116:124] = b"0000600\0", b"0000000\0", b"0000000\0"
    head[124:136], head[136:148] = b"%011o\0" % size, b"%011o\0" % 0
    head[148:156], head[156:157], head[257 : 257 + len(magic)] = b" " * 8, kind, magic
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    """The content of a pax extension. `_` of a name stands for a dot."""
    whole = b""
    for key, value in records.items():
        text = f" {key.replace('_', '.')}={value}\n".encode()
        size = len(text) + 1
        while len(str(size)) + len(text) != size:
            size = len(str(size)) + len(text)
        whole += str(size).encode() + text
    return whole
