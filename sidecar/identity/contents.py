"""What the files of an identity held at one look, and what came of checking it: values, on the way between both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.errors import OperatorFault
from sidecar.model import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What one file held at one look. `name` is its dotted path in the configuration."""

    kind: str
    name: str
    path: Path
    data: bytes = field(repr=False)
    inode: tuple[int, int]
    exposed: bool

    def fault(self, code: str, cause: str) -> OperatorFault:
        return OperatorFault(f"{self.name}: {self.path}: {cause}", code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What all files held at one look; `bundles` by trust domain."""

    certificate: File
    key: File
    bundles: Mapping[str, File]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An identity that holds together (its generation is 0: not published), and what is unwise about its files."""

    identity: Identity
    warnings: tuple[str, ...]
