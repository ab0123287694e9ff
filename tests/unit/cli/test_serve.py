"""`sidecar bundle serve --check` over real files, and a server that cannot be, for want of what it needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.demo.kit import CA
from sidecar import process
from support.bundles import Key, made, signed
from support.commands import Commands

CONFIG = """\
identity: {certificate: svid.pem, key: key.pem, bundles: {example.org: bundle.pem}}
bundles: {agents: {keys: {release-1: {algorithm: ES256, file: release-1.pub}}}}
policy: {source: admin.tar.gz, keys: {admin-1: {algorithm: ES256, file: admin-1.pub}}}
database: {url: postgresql://fleet@db/fleet, password: password}
store: s3://bundles/prod
"""
RELEASE, ADMIN = Key("release-1"), Key("admin-1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a sound configuration and every file that it names, seen by an ordinary user."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ca = CA("example.org")
    svid = ca.svid("/fleet/server")
    for name, content in {
        "server.yaml": CONFIG.encode(), "svid.pem": svid.chain_pem, "key.pem": svid.key_pem, "bundle.pem": ca.bundle_pem,
        "release-1.pub": RELEASE.public_pem, "admin-1.pub": ADMIN.public_pem, "admin.tar.gz": signed(made(3), ADMIN),
        "password": b"hunter2\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands("bundle", capsys)


def test_what_would_be_served_is_told_and_nothing_is_opened(home: Path, shell: Commands) -> None:
    assert shell("serve", "--config", home / "server.yaml", "--check") == 0
    assert shell.err == ""
    assert shell.out.startswith(f"{home}/server.yaml is sound\n")
    for line in (
        "identity  spiffe://example.org/fleet/server until", "policy    revision r3, serial 3, signed with admin-1",
        "bundle    agents, scope sidecar, signed by release-1", "store     s3://bundles/prod",
        "database  postgresql://fleet@db/fleet", "fleet     0.0.0.0:9443: strict", "health    0.0.0.0:9091",
    ):  # fmt: skip
        assert f"  {line}" in shell.out
    assert "hunter2" not in shell.out
    assert not (home / "state").exists()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda home: (home / "release-1.pub").unlink(), "bundles.agents.keys.release-1.file: {home}/release-1.pub: cannot be read"),
        (lambda home: (home / "release-1.pub").write_text("x"), "bundles.agents.keys.release-1.file: {home}/release-1.pub: is not a public key"),
        (lambda home: (home / "admin-1.pub").unlink(), "policy.keys.admin-1.file: {home}/admin-1.pub: cannot be read"),
        (lambda home: (home / "admin.tar.gz").write_bytes(signed(made(3), RELEASE)), "policy.source: {home}/admin.tar.gz: "),
        (lambda home: (home / "key.pem").write_text("x"), "identity.key: {home}/key.pem"),
        (lambda home: (home / "password").unlink(), "database.password: {home}/password: cannot be read"),
        (lambda home: (home / "password").write_bytes(b"\xff"), "database.password: {home}/password: is not UTF-8"),
        (lambda home: os.mkfifo(home / "pipe") or (home / "pipe").replace(home / "password"), "database.password: {home}/password: is not a regular file"),
        (lambda home: (home / "state").write_text(""), "state_dir: {home}/state: is not a directory"),
    ],
)  # fmt: skip
def test_each_file_that_cannot_be_used_is_told(
    home: Path, shell: Commands, harm: Callable[[Path], object], says: str
) -> None:
    harm(home)
    assert shell("serve", "--config", home / "server.yaml", "--check") == 1
    assert f"{home}/server.yaml: {says.format(home=home)}" in shell.err
    assert "is sound" not in shell.out


@pytest.mark.parametrize("check", [("--check",), ()])
def test_mistakes_are_told_with_their_lines_whether_it_is_to_serve_or_not(
    home: Path, shell: Commands, monkeypatch: pytest.MonkeyPatch, check: tuple[str, ...]
) -> None:
    monkeypatch.setattr(process, "run_fleet", lambda _config: pytest.fail("it serves"))
    (home / "server.yaml").write_text(CONFIG + "mtls_mode: strict\n")
    assert shell("serve", "--config", home / "server.yaml", *check) == 1
    assert f"{home}/server.yaml:6: mtls_mode: is not a known key" in shell.err
    assert shell("serve", "--config", home / "none.yaml", *check) == 1
    assert f"{home}/none.yaml: cannot be read" in shell.err


def test_keys_that_anybody_may_write_are_warned_of(home: Path, shell: Commands) -> None:
    (home / "release-1.pub").chmod(0o666)
    assert shell("serve", "--config", home / "server.yaml", "--check") == 0
    assert f"warning: bundles.agents.keys.release-1.file: {home}/release-1.pub: anybody may write to it" in shell.err


def test_without_its_extra_a_server_says_what_to_install(
    home: Path, shell: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "run_fleet", lambda _config: 0)
    assert shell("serve", "--config", home / "server.yaml") == 0
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sqlalchemy" else real(name))
    assert shell("serve", "--config", home / "server.yaml") == 1
    assert "sqlalchemy: not installed" in shell.err
    assert "policy-sidecar[fleet]" in shell.err
    assert shell("serve", "--config", home / "server.yaml", "--check") == 0
