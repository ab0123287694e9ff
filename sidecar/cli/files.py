"""What the files behind a configuration show, for `sidecar check`.

Each file is read as it will be by whoever uses it. That the bundle's signature verifies is not tried here: OPA does
that, and a second verifier would be a second opinion.
"""

from __future__ import annotations

import os
import stat
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sidecar import config
from sidecar.errors import OperatorFault
from sidecar.identity import pem_files

_MIN_RSA_BITS = 2048
_SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


class Report:
    """What the files behind a configuration show: `problems` refuse it, `warnings` do not, `facts` are for reading."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.facts: list[str] = []

    def identity(self, files: config.FilesIdentity | None) -> None:
        if files is None:
            self.facts.append("identity  none: every mode is disabled")
            return
        try:
            reading = pem_files.read(files, time.time())
        except OperatorFault as error:
            self.problems.append(str(error))
            return
        until = datetime.fromtimestamp(reading.identity.not_after, UTC).isoformat(timespec="seconds")
        trusted = ", ".join(sorted(reading.identity.trust))
        self.warnings.extend(reading.warnings)
        self.facts.append(f"identity  {reading.identity.id} until {until}, trusting {trusted}")

    def policy(self, policy: config.Policy | None) -> None:
        if policy is None:
            self.facts.append("policy    loaded by whoever runs OPA; its signature is not verified by us")
            return
        self._bundles(policy.source)
        for name, key in policy.keys.items():
            try:
                check_key(key)
            except OperatorFault as error:
                self.problems.append(f"policy.keys.{name}.file: {key.file}: {error}")
        self.facts.append(f"policy    {policy.source}, scope {policy.scope}, signed by {' or '.join(policy.keys)}")

    def _bundles(self, source: Path) -> None:
        """One bundle, or a directory of them, of which one that can be used is enough."""
        directory = source.is_dir()
        paths = sorted(source.glob("*.tar.gz")) if directory else [source]
        unusable = []
        for path in paths:
            try:
                check_bundle(path)
            except OperatorFault as error:
                unusable.append(f"policy.source: {path}: {error}")
        if not paths:
            self.problems.append(f"policy.source: {source}: holds no bundle (*.tar.gz)")
        (self.problems if len(unusable) == len(paths) else self.warnings).extend(unusable)

    def surroundings(self, checked: config.Config, file: Path) -> None:
        self.warnings.extend(_writable(checked, file))
        if checked.state_dir.exists() and not checked.state_dir.is_dir():
            self.problems.append(f"state_dir: {checked.state_dir}: is not a directory")
        if seen := sorted(_SECRET_HEADERS & set(checked.policy_input.headers)):
            self.warnings.append(f"policy_input.headers: {', '.join(seen)} carries secrets to OPA and to its logs")
        if os.geteuid() == 0:
            self.warnings.append(
                "this is root; run the sidecar as a user of its own, other than the agent's: with one user for both "
                "the agent can speak to OPA and read the sidecar's memory"
            )
        if isinstance(checked.opa, config.OpaExternal) and not checked.opa.socket.is_socket():
            self.warnings.append(f"opa.address: there is no socket at {checked.opa.socket} now")


def check_bundle(path: Path) -> None:
    """Raise `OperatorFault` unless this is an OPA bundle that carries a signature, whoever's it is."""
    _check_regular(path)
    try:
        with tarfile.open(path, "r:gz") as archive:
            names = {member.name for member in archive}
    except OSError as error:
        raise OperatorFault(f"cannot be read: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise OperatorFault(f"is not a bundle (a gzipped tar file): {error}") from error
    if not {f"{start}.signatures.json" for start in ("", "/", "./")} & names:
        raise OperatorFault("is not signed: it has no .signatures.json")


def check_key(key: config.PolicyKey) -> None:
    """Raise `OperatorFault` unless the file holds a public key, as PEM, that serves for its algorithm."""
    _check_regular(key.file)
    try:
        pem = key.file.read_bytes()
    except OSError as error:
        raise OperatorFault(f"cannot be read: {error.strerror}") from error
    if b"PRIVATE KEY" in pem:
        raise OperatorFault("holds a private key; only the public one belongs here")
    try:
        public = x509.load_pem_x509_certificate(pem).public_key() if b"CERTIFICATE" in pem else load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise OperatorFault("is not a public key in PEM") from error
    match key.algorithm[:2], public:
        case "ES", ec.EllipticCurvePublicKey():
            serves = key.algorithm[2:] == {256: "256", 384: "384", 521: "512"}.get(public.curve.key_size)
        case "RS" | "PS", rsa.RSAPublicKey():
            serves = public.key_size >= _MIN_RSA_BITS
        case "Ed", ed25519.Ed25519PublicKey():
            serves = True
        case _:
            serves = False
    if not serves:
        raise OperatorFault(f"is a key that cannot be used with {key.algorithm}")


def _check_regular(path: Path) -> None:
    """A pipe in the file's place must not hang us."""
    if path.exists() and not path.is_file():
        raise OperatorFault("is not a regular file")


def _writable(checked: config.Config, file: Path) -> Iterator[str]:
    """Files that decide whom we trust, and that anybody may write."""
    files = {"the configuration": file}
    if checked.identity:
        files |= {f"identity.bundles.{domain}": path for domain, path in checked.identity.bundles.items()}
    if checked.policy:
        files |= {f"policy.keys.{name}.file": key.file for name, key in checked.policy.keys.items()}
    for name, path in files.items():
        with suppress(OSError):
            if stat.S_ISREG(mode := path.stat().st_mode) and mode & stat.S_IWOTH:
                yield f"{name}: {path}: anybody may write to it"
