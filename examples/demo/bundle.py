"""Signed policy bundles: OPA's own `build` over the policy library, with a key made on the spot.

The demo and the tests use it; the wheel does not ship it. The rules are copied without their tests and schemas, the
data is one document, and the manifest carries the serial, which OPA knows nothing of and the signature covers. Data
that the library's lint complains about is not signed: at run time it would only refuse.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


class NotBuilt(Exception):
    """The bundle was not built; the text says why, a line for each problem."""


def make_keys(directory: Path, key_id: str = "release-1") -> tuple[Path, Path]:
    """Write an ES256 key pair, `<key id>.key` (PKCS#8 PEM, for its owner only) and `<key id>.pub` (PEM).

    Returns both paths. Raises `FileExistsError` where there is such a key: one that signed is not overwritten.
    """
    directory.mkdir(parents=True, exist_ok=True)
    private, public = directory / f"{key_id}.key", directory / f"{key_id}.pub"
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def build(
    directory: Path,
    *,
    opa: Path,
    policy_dir: Path,
    data: Mapping[str, object],
    serial: int,
    revision: str,
    private_key_path: Path,
    scope: str = "sidecar",
    key_id: str = "release-1",
) -> Path:
    """Write `bundle.tar.gz` into `directory`, by renaming, so that no reader sees half of it, and return its path.

    `data` is the whole document, `{"sidecar": {...}}`. `policy_dir` holds the rules, and in its `.manifest` the roots.
    Raises `NotBuilt`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".bundle-") as work:
        stage, claims, fresh = Path(work, "stage"), Path(work, "claims.json"), Path(work, "fresh")
        _stage(stage, policy_dir, data, serial)
        _lint(opa, stage)
        claims.write_text(json.dumps({"keyid": key_id, "scope": scope}))
        _run(
            opa, "build", "--bundle", ".", "--revision", revision, "--output", str(fresh.resolve()),
            "--signing-key", str(private_key_path.resolve()), "--signing-alg", "ES256",
            "--claims-file", str(claims.resolve()), cwd=stage,
        )  # fmt: skip
        return fresh.replace(directory / "bundle.tar.gz")


def _stage(stage: Path, policy_dir: Path, data: Mapping[str, object], serial: int) -> None:
    for source in sorted(policy_dir.rglob("*.rego")):
        if not source.name.endswith("_test.rego"):
            copy = stage / source.relative_to(policy_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    manifest = json.loads((policy_dir / ".manifest").read_text())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["metadata"] = {**manifest.get("metadata", {}), "serial": serial, "created": created}
    (stage / ".manifest").write_text(json.dumps(manifest))
    (stage / "data.json").write_text(json.dumps(data))


def _lint(opa: Path, stage: Path) -> None:
    """Ask the library what is wrong with the data; other libraries have no such rule and are taken as they are."""
    said = json.loads(_run(opa, "eval", "--format", "json", "--bundle", ".", "data.sidecar.lint.problems", cwd=stage))
    problems = said["result"][0]["expressions"][0]["value"] if "result" in said else []
    if problems:
        raise NotBuilt("\n".join(problems))


def _run(opa: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run([opa.resolve(), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise NotBuilt(f"opa {arguments[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
