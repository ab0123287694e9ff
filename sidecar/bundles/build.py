"""Sources in, an unsigned bundle out: the policy library, overlays of teams, data, and the metadata that will be signed.

The same sources, revision, serial and time give the same bundle, byte for byte. Overlays keep to a root of their own
(`team/<name>`): what they say is asked by the library for traffic and by nobody else, so that an overlay which allows
everything opens nothing but traffic. Tests and schemas stay out. Real OPA compiles the whole before it may be signed, the
library's lint is asked about the data, and what can be proven of each entrypoint is written into the metadata.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import cast

import yaml

from sidecar.bundles import archive as archives
from sidecar.bundles import canonical, purity, release
from sidecar.bundles.archive import DATA, MANIFEST, Bundle
from sidecar.bundles.canonical import NotJson, Value
from sidecar.bundles.release import Purity
from sidecar.errors import OperatorFault

TEAM = "team"
_TEAM_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_PACKAGE = re.compile(r"^\s*package\s+([A-Za-z_][A-Za-z0-9_.]*)\s*(?:#.*)?$", re.MULTILINE)
_OPA_TIMEOUT = 120.0


class NotBuilt(OperatorFault):
    """Sources that make no bundle; the text has a line for each problem."""

    code = "bundle_not_built"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    policies: Path
    """Directory with the rules, and in its `.manifest`, where there is one, the roots."""
    overlays: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    """Name of a team → directory with its rules, all of them in packages below `team.<name>`."""
    data: Sequence[Path] = ()
    """Documents in JSON or YAML, each the whole of `data` from the top, merged; no two may say the same thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What the metadata says that the sources do not. Times are Unix seconds."""

    revision: str
    serial: int
    created: float
    may_return_to: Sequence[int] = ()
    return_until: float | None = None


def build(opa: Path, sources: Sources, stamp: Stamp) -> Bundle:
    """Make a bundle. Blocks. Raises `NotBuilt`."""
    parts, roots = _rules(sources)
    parts[DATA] = _merged(sources)
    manifest: dict[str, object] = {"revision": stamp.revision, "roots": roots, "rego_version": 1}
    with tempfile.TemporaryDirectory(prefix="bundle-") as work:
        stage = Path(work)
        _write(stage, {**parts, MANIFEST: _json(manifest)})
        _run(opa, stage, "check", "--strict", "--bundle", ".")
        _lint(opa, stage)
        manifest["metadata"] = _metadata(stamp, purity.proofs(opa, stage))
    bundle = Bundle(files=MappingProxyType({**parts, MANIFEST: _json(manifest)}), signatures=None)
    release.release(bundle)  # what we would not take we do not make
    return bundle


def files(sources: Sources) -> Mapping[str, bytes]:
    """Rules and data as a bundle would hold them, not compiled and not looked at. Raises `NotBuilt`."""
    found, _ = _rules(sources)
    return {**found, DATA: _merged(sources)}


def library() -> Path:
    """The policy library that came with this program. Raises `NotBuilt` where it did not."""
    here = Path(__file__).resolve().parents[1]
    for place in (here / "library", here.parent / "policies" / "rego"):
        if (place / MANIFEST).is_file():
            return place
    raise NotBuilt("the policy library is not installed here: name a directory of rules")


def key_pair(private: Path, public: Path) -> None:
    """Write an ES256 key pair in PEM; the private one for its owner only. Raises `NotBuilt` where there is one already."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  only this function needs it
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(pem)
        public.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    except OSError as error:
        raise NotBuilt(f"{private}: {error.strerror}") from error


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rules(sources: Sources) -> tuple[dict[str, bytes], list[str]]:
    files = dict(_rego(sources.policies))
    roots = _roots(sources.policies)
    for team, directory in sorted(sources.overlays.items()):
        if not _TEAM_NAME.fullmatch(team):
            raise NotBuilt(
                f"overlay {team}: a team's name is of lower-case letters, digits and _, and begins with a letter"
            )
        roots.append(f"{TEAM}/{team}")
        for name, content in _rego(directory):
            _keeps_to_its_root(team, directory / name, content)
            files[f"{TEAM}/{team}/{name}"] = content
    if not files:
        raise NotBuilt(f"{sources.policies}: there are no rules (*.rego)")
    return files, roots


def _rego(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Name relative to `directory` and text of each rule file; no tests, nothing hidden."""
    if not directory.is_dir():
        raise NotBuilt(f"{directory}: is not a directory")
    for path in sorted(directory.rglob("*.rego")):
        name = path.relative_to(directory).as_posix()
        if not path.name.endswith("_test.rego") and not any(part.startswith(".") for part in name.split("/")):
            yield name, _read(path)


def _roots(directory: Path) -> list[str]:
    path = directory / MANIFEST
    if not path.is_file():
        return ["sidecar"]
    manifest = _parsed(path, _read(path))
    roots = manifest.get("roots") if isinstance(manifest, dict) else None
    if not isinstance(roots, list) or not roots or not all(isinstance(root, str) and root for root in roots):
        raise NotBuilt(f"{path}: roots must name what the rules own")
    if any(str(root).split("/")[0] == TEAM for root in roots):
        raise NotBuilt(f"{path}: the root {TEAM} belongs to overlays")
    return [str(root) for root in roots]


def _keeps_to_its_root(team: str, path: Path, content: bytes) -> None:
    """OPA would refuse a package outside all roots; one inside another's root it would take."""
    found = _PACKAGE.search(content.decode("utf-8", "replace"))
    package = found[1] if found else ""
    if package != f"{TEAM}.{team}" and not package.startswith(f"{TEAM}.{team}."):
        raise NotBuilt(f"{path}: its package is {package or 'not plain to see'}, and must be {TEAM}.{team} or below")


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _merged(sources: Sources) -> bytes:
    """One document out of all: overlays' own `data.json|yaml` come under their roots."""
    whole: dict[str, Value] = {}
    for path in sources.data:
        _merge(whole, _document(path), path, ())
    for team, directory in sorted(sources.overlays.items()):
        for path in sorted(directory.glob("data.*")):
            if path.suffix in {".json", ".yaml", ".yml"}:
                _merge(whole, {TEAM: {team: _document(path)}}, path, ())
    return canonical.encode(whole)


def _merge(into: dict[str, Value], more: dict[str, Value], path: Path, at: tuple[str, ...]) -> None:
    for key, value in more.items():
        mine = into.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value, path, (*at, key))
        elif key in into:
            raise NotBuilt(f"{path}: {'.'.join((*at, key))} is given in another document too")
        else:
            into[key] = value


def _document(path: Path) -> dict[str, Value]:
    content = _read(path)
    value = _parsed(path, content) if path.suffix == ".json" else _from_yaml(path, content)
    if not isinstance(value, dict):
        raise NotBuilt(f"{path}: must be an object")
    return value


def _from_yaml(path: Path, content: bytes) -> Value:
    """YAML as JSON. Dates and other things that JSON does not have are refused: they would silently become text."""
    try:
        return canonical.plain(yaml.safe_load(content))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise NotBuilt(f"{path}: {' '.join(str(error).split())}") from error


def _parsed(path: Path, content: bytes) -> Value:
    try:
        return canonical.parse(content)
    except NotJson as error:
        raise NotBuilt(f"{path} {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotBuilt(f"{path}: {error.strerror}") from error


# ── what the whole says ───────────────────────────────────────────────────────────────────────────────────────────


def _metadata(stamp: Stamp, proofs: Mapping[str, Purity]) -> dict[str, object]:
    metadata: dict[str, object] = {"serial": stamp.serial, "created": time_text(stamp.created)}
    if stamp.may_return_to:
        metadata["may_return_to"] = sorted(set(stamp.may_return_to))
        metadata["return_until"] = time_text(stamp.return_until or 0.0)
    metadata["cache"] = {
        name: {"pure": proof.pure, "fields": [list(path) for path in proof.fields]} for name, proof in proofs.items()
    }
    return metadata


def time_text(at: float) -> str:
    """RFC 3339, to the second."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _lint(opa: Path, stage: Path) -> None:
    """Ask the library what is wrong with the data; other libraries have no such rule, and are taken as they are."""
    said = json.loads(_run(opa, stage, "eval", "--format", "json", "--bundle", ".", "data.sidecar.lint.problems"))
    problems = said["result"][0]["expressions"][0]["value"] if "result" in said else []
    if problems:
        raise NotBuilt("\n".join(map(str, problems)))


def _write(stage: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _json(value: Mapping[str, object]) -> bytes:
    return canonical.encode(canonical.plain(cast("object", value)))


def _run(opa: Path, stage: Path, *arguments: str) -> str:
    done = subprocess.run(
        [opa.resolve(), *arguments], cwd=stage, capture_output=True, text=True, timeout=_OPA_TIMEOUT, check=False
    )
    if done.returncode:
        raise NotBuilt(f"opa {arguments[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def written(archive: Path, bundle: Bundle) -> None:
    """Write the archive by renaming, so that no reader sees half of it. Raises `NotBuilt`."""
    fresh = archive.with_name(f".{archive.name}.new")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(archives.pack(bundle))
        fresh.replace(archive)
    except OSError as error:
        raise NotBuilt(f"{archive}: {error.strerror}") from error
