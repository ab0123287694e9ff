"""Sources in, an unsigned bundle out: the policy library, overlays of teams, data, and the metadata that will be signed.

The same sources, revision, serial and time give the same bundle, byte for byte. Overlays keep to a root of their own
(`team/<name>`): what they say is asked by the library for traffic and by nobody else, so that an overlay which allows
everything opens nothing but traffic. OPA itself says which package a file belongs to: a file can be spelt so that any
shorter look finds another. Tests and schemas stay out. Real OPA compiles the whole before it may be signed, the library's
lint is asked about the data, and what can be proven of each entrypoint is written into the metadata.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from sidecar.bundles import archive as archives
from sidecar.bundles import documents, literal, opa_command, purity, release
from sidecar.bundles.archive import DATA, MANIFEST, Bundle
from sidecar.bundles.documents import NotBuilt
from sidecar.bundles.release import Purity
from sidecar.errors import OperatorFault

__all__ = ["NotBuilt", "Sources", "Stamp", "build", "files", "key_pair", "library", "time_text", "written"]

TEAM = "team"
BATCH = "sidecar/batch/batch.rego"
_TEAM_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    policies: Path
    """Directory with the rules, and in its `.manifest`, where there is one, the roots."""
    overlays: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    """Name of a team → directory with its rules, all of them in packages below `team.<name>`."""
    data: Sequence[Path] = ()
    """Documents in JSON or YAML, each the whole of `data` from the top, merged; no two may say the same thing."""
    compile_rbac: bool = False
    """Whether the roles become literal rules (`literal`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What the metadata says that the sources do not. Times are Unix seconds."""

    revision: str
    serial: int
    created: float
    may_return_to: Sequence[int] = ()
    return_until: float | None = None


def build(opa: Path, sources: Sources, stamp: Stamp) -> Bundle:
    """Make a bundle. Blocks. Raises `NotBuilt`, or `BundleRefused` where a sidecar would not take what came of it."""
    if stamp.may_return_to and stamp.return_until is None:
        raise NotBuilt("may_return_to needs return_until: a permission to go back has an end")
    parts, roots = _rules(sources)
    batch = _with_batch(parts, roots)
    parts[DATA] = _data(sources)
    manifest: dict[str, object] = {"revision": stamp.revision, "roots": roots, "rego_version": 1}
    with tempfile.TemporaryDirectory(prefix="bundle-") as work:
        stage = Path(work, "written")
        _write(stage, {**parts, MANIFEST: documents.encoded(manifest)})
        _run(opa, stage, "check", "--strict", "--bundle", ".")
        for team in sources.overlays:
            _keeps_to_its_root(opa, stage, team, [name for name in parts if name.startswith(f"{TEAM}/{team}/")])
        _lint(opa, stage)
        metadata = _metadata(stamp, purity.proofs(opa, stage), batch=batch)
        if sources.compile_rbac:
            # What has been proven holds for the compiled form too, which reads no more; `opa deps` would take minutes.
            parts, stage = literal.compiled(parts), Path(work, "compiled")
            _write(stage, {**parts, MANIFEST: documents.encoded(manifest)})
            _run(opa, stage, "check", "--strict", "--bundle", ".")
    manifest["metadata"] = metadata
    bundle = Bundle(files=MappingProxyType({**parts, MANIFEST: documents.encoded(manifest)}), signatures=None)
    release.release(archives.read(archives.pack(bundle)))  # what we would not take we do not make
    return bundle


def files(sources: Sources) -> Mapping[str, bytes]:
    """Rules and data as a bundle would hold them, not compiled and not looked at. Raises `NotBuilt`."""
    found, _ = _rules(sources)
    return {**found, DATA: _data(sources)}


def library() -> Path:
    """The policy library that came with this program. Raises `NotBuilt` where it did not."""
    here = Path(__file__).resolve().parents[1]
    for place in (here / "library", here.parent / "policies" / "rego"):
        if (place / MANIFEST).is_file():
            return place
    raise NotBuilt("the policy library is not installed here: name a directory of rules")


def key_pair(private: Path, public: Path) -> None:
    """Write an ES256 key pair in PEM; the private one for its owner only.

    Raises `NotBuilt`, where there is one of the two already, too; nothing is ever written over.
    """
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  only this function needs it
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    if private == public:
        raise NotBuilt(f"{private}: the two keys need two names")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(public, shown, 0o644)
    try:
        _write_new(private, pem, 0o600)
    except NotBuilt:
        public.unlink()  # of a pair that there is not
        raise


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(content)
    except OSError as error:
        raise NotBuilt(f"{path}: {error.strerror}") from error


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rules(sources: Sources) -> tuple[dict[str, bytes], list[str]]:
    files = dict(_rego(sources.policies))
    roots = _roots(sources.policies)
    for team, directory in sorted(sources.overlays.items()):
        if not _TEAM_NAME.fullmatch(team):
            raise NotBuilt(
                f"overlay {team}: a team's name is of lower-case letters, digits and _, and begins with a letter"
            )
        if taken := [name for name in files if name.startswith(f"{TEAM}/{team}/")]:
            raise NotBuilt(f"{sources.policies / taken[0]}: its place belongs to the overlay {team}")
        if TEAM not in roots:
            roots.append(f"{TEAM}/{team}")
        theirs = dict(_rego(directory))
        if not theirs and not any(directory.glob("data.*")):
            raise NotBuilt(f"{directory}: the overlay {team} is empty: what it was to refuse would be let through")
        files.update((f"{TEAM}/{team}/{name}", content) for name, content in theirs.items())
    if not files:
        raise NotBuilt(f"{sources.policies}: there are no rules (*.rego)")
    return files, roots


def _with_batch(parts: dict[str, bytes], roots: Sequence[str]) -> bool:
    """Add the library's rule for shared questions where there is none; return whether the bundle has it as it stands there.

    It names the entrypoints alone, so that it goes with any rules. A rule that somebody changed answers what it likes.
    """
    if not {"", "sidecar", "sidecar/batch"}.intersection(roots):
        return False
    try:
        ours = documents.read(library() / BATCH)
    except NotBuilt:
        return False
    return parts.setdefault(BATCH, ours) == ours


def _rego(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Name relative to `directory` and text of each rule file; no tests, nothing hidden."""
    if not directory.is_dir():
        raise NotBuilt(f"{directory}: is not a directory")
    for path in sorted(directory.rglob("*.rego")):
        name = path.relative_to(directory).as_posix()
        if not path.name.endswith("_test.rego") and not any(part.startswith(".") for part in name.split("/")):
            yield name, _read(path, within=directory)


def _read(path: Path, within: Path) -> bytes:
    """What a team hands in must not bring in what lies elsewhere on the machine that builds."""
    if not path.resolve().is_relative_to(within.resolve()):
        raise NotBuilt(f"{path}: leads out of {within}")
    return documents.read(path)


def _roots(directory: Path) -> list[str]:
    path = directory / MANIFEST
    if not path.is_file():
        return ["sidecar"]
    roots = documents.document(path).get("roots")
    if not isinstance(roots, list) or not roots or not all(isinstance(root, str) and root.strip("/") for root in roots):
        raise NotBuilt(f"{path}: roots must name what the rules own")
    if any(str(root).strip("/").startswith(f"{TEAM}/") for root in roots):
        raise NotBuilt(f"{path}: the root {TEAM} belongs to overlays: it is owned as a whole or not at all")
    return [str(root).strip("/") for root in roots]


def _keeps_to_its_root(opa: Path, stage: Path, team: str, names: Sequence[str]) -> None:
    """OPA refuses a package outside all roots; one inside another's root it would take."""
    for name in names:
        terms = json.loads(_run(opa, stage, "parse", "--format", "json", name))["package"]["path"]
        if [term["value"] for term in terms[:3]] != ["data", TEAM, team]:
            package = ".".join(str(term["value"]) for term in terms[1:])
            raise NotBuilt(f"{name}: its package is {package}, and must be {TEAM}.{team} or below")


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _data(sources: Sources) -> bytes:
    """One document out of all: overlays' own `data.json|yaml` come under their roots."""
    parts = [(path, documents.document(path)) for path in sources.data]
    for path, one in parts:
        if TEAM in one:
            raise NotBuilt(f"{path}: {TEAM} belongs to overlays, and their data comes with them")
    for team, directory in sorted(sources.overlays.items()):
        for path in sorted(directory.rglob("data.*")):
            if path.suffix in {".json", ".yaml", ".yml"}:
                if path.parent != directory:
                    raise NotBuilt(f"{path}: data of an overlay stands at its top")
                _read(path, within=directory)
                parts.append((path, {TEAM: {team: documents.document(path)}}))
    return documents.merged(parts)


# ── what the whole says ───────────────────────────────────────────────────────────────────────────────────────────


def _metadata(stamp: Stamp, proofs: Mapping[str, Purity], *, batch: bool) -> dict[str, object]:
    metadata: dict[str, object] = {"serial": stamp.serial, "created": time_text(stamp.created)}
    if stamp.may_return_to:
        metadata["may_return_to"] = sorted(set(stamp.may_return_to))
        metadata["return_until"] = time_text(stamp.return_until or 0.0)
    metadata["cache"] = {
        name: {"pure": proof.pure, "fields": [list(path) for path in proof.fields], "batch": batch and proof.batch}
        for name, proof in proofs.items()
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


def _run(opa: Path, stage: Path, *arguments: str) -> str:
    try:
        return opa_command.said(opa, stage, *arguments)
    except OperatorFault as fault:
        raise NotBuilt(str(fault)) from fault


def written(archive: Path, bundle: Bundle) -> None:
    """Write the archive by renaming, so that no reader sees half of it. Raises `NotBuilt`."""
    fresh = archive.with_name(f".{archive.name}.{os.getpid()}.new")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        with fresh.open("xb") as file:
            file.write(archives.pack(bundle))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(archive)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise NotBuilt(f"{archive}: {error.strerror}") from error
