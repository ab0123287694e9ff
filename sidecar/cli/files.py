"""What the files behind a configuration show, for `sidecar check`.

Each file is read as it will be by whoever uses it: a bundle is verified as the sidecar will verify it. Nothing is dialled.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sidecar import config
from sidecar.bundles import archive, release, signature, sources
from sidecar.bundles.archive import Bounds, Bundle
from sidecar.bundles.release import Release
from sidecar.bundles.signature import VerifyingKey
from sidecar.config.fleet import FleetConfig
from sidecar.errors import OperatorFault
from sidecar.identity import pem_files

_MAX_KEY_BYTES = 1 << 16
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
        keys = self._keys("policy", policy.keys)
        where = f"scope {policy.scope}, signed by {' or '.join(policy.keys)}"
        if isinstance(policy.source, config.Remote):
            self.facts.append(f"policy    {policy.source.url}, {where}; the server is not asked here")
        elif found := self._bundles(policy, policy.source, keys):
            said, key_id = found
            self.facts.append(f"policy    {policy.source}, {where}")
            self.facts.append(f"policy    revision {said.revision}, serial {said.serial}, signed with {key_id}")

    def served(self, checked: FleetConfig) -> None:
        """What a bundle server hands out, and what it keeps its state in."""
        for name, bundle in checked.bundles.items():
            self._keys(f"bundles.{name}", bundle.keys)
            self.facts.append(f"bundle    {name}, scope {bundle.scope}, signed by {' or '.join(bundle.keys)}")
        if (password := checked.database.password) is not None:
            try:
                _check_regular(password)
                password.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else "is not UTF-8"
                self.problems.append(f"database.password: {password}: {why}")
            except OperatorFault as error:
                self.problems.append(f"database.password: {password}: {error}")

    def _keys(self, section: str, named: Mapping[str, config.PolicyKey]) -> dict[str, VerifyingKey]:
        """Those that can be used; the others are problems."""
        keys: dict[str, VerifyingKey] = {}
        for name, key in named.items():
            try:
                keys[name] = check_key(key)
            except OperatorFault as error:
                self.problems.append(f"{section}.keys.{name}.file: {key.file}: {error}")
        return keys

    def _bundles(
        self, policy: config.Policy, source: Path, keys: Mapping[str, VerifyingKey]
    ) -> tuple[Release, str] | None:
        """What the one that a sidecar would take says, and whose it is: of a directory the highest that can be used."""
        found = (path for path in source.glob("*.tar.gz") if not path.name.startswith("."))
        paths = sorted(found) if source.is_dir() else [source]
        usable: list[tuple[Release, str]] = []
        unusable = []
        for path in paths:
            try:
                usable.append(check_bundle(path, policy, keys))
            except OperatorFault as error:
                unusable.append(f"policy.source: {path}: {error}")
        if not paths:
            self.problems.append(f"policy.source: {source}: holds no bundle (*.tar.gz)")
        (self.warnings if usable else self.problems).extend(unusable)
        return max(usable, key=lambda one: one[0].serial, default=None)

    def surroundings(self, checked: config.Config | FleetConfig, file: Path) -> None:
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


def check_bundle(path: Path, policy: config.Policy, keys: Mapping[str, VerifyingKey]) -> tuple[Release, str]:
    """What the bundle says, and the key that vouches for it. Raises `OperatorFault` unless a fresh sidecar would take it.

    What a sidecar remembers of serials is its own: it is not looked at. Without any key the signature is not verified.
    """
    bundle = read_bundle(path)
    verifiable = keys or bundle.signatures is None
    key_id = signature.verify(bundle, keys, policy.scope) if verifiable else "none of the keys"
    said = release.release(bundle)
    digest = signature.content_digest(bundle)
    release.accept(said, digest, None, now=time.time(), minimum_serial=policy.minimum_serial)
    return said, key_id


def read_bundle(path: Path) -> Bundle:
    """Raises `OperatorFault`, whose text goes on after the path, unless this is a bundle, whoever signed it."""
    _check_regular(path)
    bounds = Bounds()
    try:
        content = sources.contents(path, bounds)
    except OperatorFault as fault:
        raise OperatorFault(f"cannot be read: {_reason(fault)}", code=fault.code) from fault
    return archive.read(content, bounds)


def check_key(key: config.PolicyKey) -> VerifyingKey:
    """Read a public key. Raises `OperatorFault` unless the file holds one, as PEM, that serves for its algorithm."""
    _check_regular(key.file)
    try:
        with key.file.open("rb") as file:
            pem = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise OperatorFault(f"cannot be read: {error.strerror}") from error
    return signature.public_key(key.algorithm, pem)


def _check_regular(path: Path) -> None:
    """A pipe in the file's place must not hang us."""
    if path.exists() and not path.is_file():
        raise OperatorFault("is not a regular file")


def _reason(fault: OperatorFault) -> str:
    """Without the path, which stands before it already."""
    return fault.__cause__.strerror or str(fault) if isinstance(fault.__cause__, OSError) else str(fault)


def _writable(checked: config.Config | FleetConfig, file: Path) -> Iterator[str]:
    """Files that decide whom we trust, and that anybody may write."""
    files = {"the configuration": file}
    if checked.identity:
        files |= {f"identity.bundles.{domain}": path for domain, path in checked.identity.bundles.items()}
    if checked.policy:
        files |= {f"policy.keys.{name}.file": key.file for name, key in checked.policy.keys.items()}
    if isinstance(checked, FleetConfig):
        files |= {
            f"bundles.{bundle}.keys.{name}.file": key.file
            for bundle, one in checked.bundles.items()
            for name, key in one.keys.items()
        }
    for name, path in files.items():
        with suppress(OSError):
            if stat.S_ISREG(mode := path.stat().st_mode) and mode & stat.S_IWOTH:
                yield f"{name}: {path}: anybody may write to it"
