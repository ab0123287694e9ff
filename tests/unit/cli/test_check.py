"""`sidecar check` over real files: the sound, the wrong and the unwise."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from examples.demo.kit import CA
from sidecar import cli
from sidecar.bundles import archive
from sidecar.cli import files
from sidecar.config import Policy, PolicyKey
from sidecar.errors import OperatorFault
from support.bundles import CREATED, Key, made, signed

CONFIG = """\
identity: {certificate: svid.pem, key: key.pem, bundles: {example.org: bundle.pem}}
inbound:
  - {}
  - {listen: "127.0.0.1:9443", mtls_mode: strict}
outbound:
  routes: [{target: "b:8443", spiffe_ids: [spiffe://example.org/b]}]
policy: {source: policy.tar.gz, keys: {k1: {algorithm: ES256, file: k1.pub}}}
"""

Public = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def pem(key: Public) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


SIGNER = Key("k1")


def bundle(path: Path, serial: int = 7, key: Key = SIGNER, **more: object) -> None:
    path.write_bytes(signed(made(serial, **more), key))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a sound configuration and every file that it names, seen by an ordinary user."""
    monkeypatch.delenv("MTLS_MODE", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ca = CA("example.org")
    svid = ca.svid("/a")
    contents = {
        "sidecar.yaml": CONFIG.encode(),
        "svid.pem": svid.chain_pem,
        "key.pem": svid.key_pem,
        "bundle.pem": ca.bundle_pem,
        "k1.pub": SIGNER.public_pem,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    bundle(tmp_path / "policy.tar.gz")
    return tmp_path


def check(home: Path) -> int:
    return cli.main(["check", "--config", str(home / "sidecar.yaml")])


def test_a_sound_configuration_is_summed_up(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(home) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, identity, *rest = out.splitlines()
    assert first == f"{home}/sidecar.yaml is sound"
    assert identity.startswith("  identity  spiffe://example.org/a until 20")
    assert identity.endswith("trusting example.org")
    assert rest == [
        f"  policy    {home}/policy.tar.gz, scope sidecar, signed by k1",
        "  policy    revision r7, serial 7, signed with k1",
        "  inbound   0.0.0.0:8443 to the agent at 127.0.0.1:8000: permissive because nothing set it",
        "  inbound   127.0.0.1:9443 to the agent at 127.0.0.1:8000: strict as its own mtls_mode says",
        "  outbound  127.0.0.1:8080, 1 route: permissive because nothing set it",
        "  health    0.0.0.0:9091",
    ]


def test_the_summary_says_where_the_mode_is_from(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLS_MODE", "strict")
    assert check(home) == 0
    assert "1 route: strict as MTLS_MODE in the environment says" in capsys.readouterr().out
    monkeypatch.delenv("MTLS_MODE")
    (home / "sidecar.yaml").write_text(f"mtls_mode: strict\n{CONFIG}")
    assert check(home) == 0
    assert "1 route: strict as mtls_mode says" in capsys.readouterr().out


def test_all_broken_files_are_told_together(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "key.pem").write_bytes(CA("example.org").svid("/a").key_pem)
    (home / "policy.tar.gz").write_bytes(archive.pack(made(7)))
    (home / "k1.pub").unlink()
    (home / "state").write_bytes(b"")
    assert check(home) == 1
    out, err = capsys.readouterr()
    assert out == ""
    start = f"{home}/sidecar.yaml: "
    assert err.splitlines() == [
        f"{start}identity.key: {home}/key.pem: does not belong to the certificate in {home}/svid.pem",
        f"{start}policy.keys.k1.file: {home}/k1.pub: cannot be read: No such file or directory",
        f"{start}policy.source: {home}/policy.tar.gz: is not signed: it has no .signatures.json",
        f"{start}state_dir: {home}/state: is not a directory",
    ]


def test_one_usable_bundle_of_a_directory_is_enough(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = home / "policy.tar.gz"
    source.unlink()
    source.mkdir()
    assert check(home) == 1
    assert f"policy.source: {source}: holds no bundle (*.tar.gz)" in capsys.readouterr().err
    (source / "1.tar.gz").write_bytes(b"")
    assert check(home) == 1
    assert f"{home}/sidecar.yaml: policy.source: {source}/1.tar.gz: the archive is cut short" in capsys.readouterr().err
    for name, serial in (("2", 11), ("3", 9)):
        bundle(source / f"{name}.tar.gz", serial)
    assert check(home) == 0
    out, err = capsys.readouterr()
    assert f"warning: policy.source: {source}/1.tar.gz: the archive is cut short" in err
    assert "  policy    revision r11, serial 11, signed with k1" in out.splitlines()


def test_a_server_is_reported_and_not_dialled(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = "source: 'https://bundles.test/v1/bundles/main', spiffe_ids: [spiffe://example.org/bundles]"
    (home / "sidecar.yaml").write_text(CONFIG.replace("source: policy.tar.gz", remote))

    def dialled(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", dialled)
    monkeypatch.setattr(socket, "getaddrinfo", dialled)
    assert check(home) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        "  policy    https://bundles.test/v1/bundles/main, scope sidecar, signed by k1; the server is not asked here"
        in out.splitlines()
    )


@pytest.mark.parametrize("name", ["sidecar.yaml", "bundle.pem", "k1.pub"])
def test_a_file_that_anybody_may_write_is_unwise(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (home / name).chmod(0o666)
    assert check(home) == 0
    assert f"{home}/{name}: anybody may write to it" in capsys.readouterr().err


def test_a_key_that_others_may_read_is_unwise(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "key.pem").chmod(0o644)
    assert check(home) == 0
    assert capsys.readouterr().err.startswith(f"warning: identity.key: {home}/key.pem")


def test_root_is_unwise(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert check(home) == 0
    assert "warning: this is root" in capsys.readouterr().err


def test_secrets_for_policy_are_unwise(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "sidecar.yaml").write_text(CONFIG + "policy_input: {headers: [Authorization, x-tenant]}\n")
    assert check(home) == 0
    assert "policy_input.headers: authorization carries secrets" in capsys.readouterr().err


def test_an_external_opa_needs_no_policy_and_a_socket(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "sidecar.yaml").write_text(
        f"mtls_mode: disabled\ninbound: [{{}}]\nopa: {{address: 'unix://{home}/opa.sock'}}\nhealth: null\n"
    )
    assert check(home) == 0
    out, err = capsys.readouterr()
    assert f"there is no socket at {home}/opa.sock" in err
    assert "its signature is not verified by us" in out
    assert "identity  none" in out
    assert "health    off" in out
    with socket.socket(socket.AF_UNIX) as opa:
        opa.bind(str(home / "opa.sock"))
        assert check(home) == 0
    assert capsys.readouterr().err == ""


# ── single files ──────────────────────────────────────────────────────────────────────────────────────────────────


POLICY = Policy(source=Path("b"), keys={"k1": PolicyKey(algorithm="ES256", file=Path("k1.pub"))})
KNOWN = {"k1": SIGNER.verifying}


def test_a_bundle_is_verified_as_a_sidecar_does(tmp_path: Path) -> None:
    bundle(tmp_path / "b", 9)
    said, key_id = files.check_bundle(tmp_path / "b", POLICY, KNOWN)
    assert (said.revision, said.serial, key_id) == ("r9", 9, "k1")
    with pytest.raises(OperatorFault) as caught:
        files.check_bundle(tmp_path / "b", replace(POLICY, minimum_serial=10), KNOWN)
    assert caught.value.code == "bundle_below_minimum"


def truncated(path: Path) -> None:
    bundle(path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (Path.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.write_bytes(b""), "the archive is cut short"),
        (lambda path: path.write_bytes(b"package sidecar"), "is not a gzip archive"),
        (truncated, "the archive is cut short"),
        (lambda path: path.write_bytes(archive.pack(made(7))), "is not signed: it has no .signatures.json"),
        (lambda path: bundle(path, key=Key("k2")), "no key 'k2' is configured"),
        (lambda path: bundle(path, key=Key("k1")), "was not made with key k1"),
        (
            lambda path: path.write_bytes(signed(made(7), SIGNER, "other")),
            "was signed for scope 'other', not 'sidecar'",
        ),
        (lambda path: bundle(path, roots=["/"]), "roots must name what the bundle owns"),
        (lambda path: bundle(path, created=CREATED + 3e9), "made later than now"),
    ],
)
def test_what_a_sidecar_would_not_take_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "b")
    with pytest.raises(OperatorFault, match=message):
        files.check_bundle(tmp_path / "b", POLICY, KNOWN)


P256, P384, P521 = (
    ec.generate_private_key(curve()).public_key() for curve in (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
)
RSA, WEAK = (rsa.generate_private_key(65537, bits).public_key() for bits in (2048, 1024))
EDWARDS = ed25519.Ed25519PrivateKey.generate().public_key()
SERVES = {"ES256": P256, "ES384": P384, "ES512": P521, "RS256": RSA, "PS512": RSA, "EdDSA": EDWARDS}


@pytest.mark.parametrize("algorithm", SERVES)
@pytest.mark.parametrize("key", [P256, P384, P521, RSA, WEAK, EDWARDS])
def test_a_key_serves_for_its_algorithm_only(tmp_path: Path, algorithm: str, key: Public) -> None:
    (tmp_path / "k").write_bytes(pem(key))
    given = PolicyKey(algorithm=algorithm, file=tmp_path / "k")
    if SERVES[algorithm] is key:
        files.check_key(given)
    else:
        with pytest.raises(OperatorFault, match=f"cannot be used with {algorithm}"):
            files.check_key(given)


def test_a_certificate_may_hold_the_key(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(CA("example.org").pem)
    files.check_key(PolicyKey(algorithm="ES256", file=tmp_path / "k"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(CA("a").svid("/a").key_pem), "holds a private key"),
        (lambda path: path.write_bytes(b""), "is not a public key in PEM"),
        (lambda path: path.write_bytes(pem(P256)[:-60]), "is not a public key in PEM"),
        (lambda path: path.write_bytes(CA("a").pem[:300]), "is not a public key in PEM"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
    ],
)
def test_what_is_not_a_public_key_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "k")
    with pytest.raises(OperatorFault, match=message):
        files.check_key(PolicyKey(algorithm="ES256", file=tmp_path / "k"))
