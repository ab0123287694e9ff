"""`sidecar bundle …` over real files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from examples.demo.kit import CA
from sidecar.bundles import archive, release, signature
from sidecar.bundles.archive import Bundle
from support.bundles import Key, made, private, signed
from support.commands import Commands

KEY, OTHER = Key(), Key("release-2")


class Shell(Commands):
    """Runs commands in a directory."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__("bundle", capsys)
        self.home = home

    def put(self, name: str, content: bytes | str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    made_here = Shell(tmp_path, capsys)
    for key in (KEY, OTHER):
        made_here.put(f"{key.id}.pub", key.public_pem)
        made_here.put(f"{key.id}.pem", key.private_pem).chmod(0o600)
    made_here.put("b.tar.gz", signed(made(7), KEY))
    return made_here


# ── build ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.live
def test_from_sources_to_a_bundle_that_verifies(shell: Shell, opa: Path) -> None:
    shell.put("red/a.rego", "package team.red\n\ndecision := input.path\n")
    shell.put("d.yaml", "sidecar: {rbac: {roles: {}}}")
    code = shell(
        "build", "--revision", "r7", "--serial", 7, "--created", "2025-06-15T15:06:40Z", "--may-return-to", 5, "--may-return-to", 6,
        "--return-until", "2025-07-01T00:00:00+02:00", "--overlay", "red=red", "--data", "d.yaml", "--key", "release-1.pem", "-o", "deep/out.tar.gz",
    )  # fmt: skip
    assert (code, shell.err) == (0, "")
    digest, revision, returns, *cache = shell.out.splitlines()
    assert digest.endswith(", signed")
    assert revision == "revision r7, serial 7, roots sidecar, team"
    assert returns == "return   to 5, 6"
    assert any(line.startswith("cache    sidecar/inbound/decision: pure, reads input.") for line in cache)
    said = release.release(archive.read((shell.home / "deep/out.tar.gz").read_bytes()))
    assert (said.created, said.return_until) == (1_750_000_000.0, 1_751_320_800.0)
    assert shell("verify", "deep/out.tar.gz", "--key", "release-1=release-1.pub") == 0
    assert shell.out == "deep/out.tar.gz: signed with release-1 for scope sidecar; revision r7, serial 7\n"


@pytest.mark.live
def test_without_a_key_it_is_not_signed_and_with_one_that_is_bad_nothing_is_written(shell: Shell, opa: Path) -> None:
    assert shell("build", "--revision", "r", "--serial", 1, "-o", "out.tar.gz") == 0
    assert "not signed" in shell.out
    assert shell("verify", "out.tar.gz", "--key", "k=release-1.pub") == 1
    assert shell.err == "sidecar: out.tar.gz: is not signed: it has no .signatures.json\n"
    (shell.home / "release-1.pem").chmod(0o644)
    assert shell("build", "--revision", "r", "--serial", 1, "--key", "release-1.pem", "-o", "other.tar.gz") == 1
    assert "others may read it" in shell.err
    assert not (shell.home / "other.tar.gz").exists()


@pytest.mark.live
def test_an_overlay_without_anything_is_a_mistake(shell: Shell, opa: Path) -> None:
    shell.put("red/a_test.rego", "package team.red_test\n\ntest_a := true\n")
    assert shell("build", "--revision", "r", "--serial", 1, "--overlay", "red=red", "-o", "out.tar.gz") == 1
    assert shell.err == "sidecar: red: the overlay red is empty: what it was to refuse would be let through\n"
    assert not (shell.home / "out.tar.gz").exists()
    shell.put("red/data.yaml", "inbound: {deny: []}\n")
    assert shell("build", "--revision", "r", "--serial", 1, "--overlay", "red=red", "-o", "out.tar.gz") == 0


def test_what_nobody_vouches_for_cannot_play_with_the_terminal(shell: Shell) -> None:
    cache = {"x\x1b[2J": {"pure": True, "fields": [["\x1b]0;gone\x07"]]}}
    shell.put("hostile.tar.gz", archive.pack(made(7, cache=cache)))
    assert shell("inspect", "hostile.tar.gz") == 0
    assert "cache    x\\x1b[2J: pure, reads input.\\x1b]0;gone\\x07\n" in shell.out
    assert "\x1b" not in shell.out


def test_a_number_that_no_program_reads_is_told(shell: Shell) -> None:
    manifest = b'{"revision": "r", "roots": ["x"], "metadata": {"serial": 1, "x": ' + b"9" * 5000 + b"}}"
    shell.put("long.tar.gz", archive.pack(archive.Bundle(files={".manifest": manifest}, signatures=None)))
    assert shell("inspect", "long.tar.gz", "--json") == 1
    assert shell.err.startswith("sidecar: long.tar.gz: ")


@pytest.mark.live
def test_an_overlay_for_others_is_refused_in_a_sentence(shell: Shell, opa: Path) -> None:
    shell.put("red/a.rego", 'package sidecar["inbound"]\n\nx := `\npackage team.red\n`\n')
    assert shell("build", "--revision", "r", "--serial", 1, "--overlay", "red=red", "-o", "out.tar.gz") == 1
    assert shell.err == "sidecar: team/red/a.rego: its package is sidecar.inbound, and must be team.red or below\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--may-return-to", "5"], "--may-return-to needs --return-until"),
        (["--overlay", "red=a", "--overlay", "red=b"], "--overlay is given twice"),
        (["--key", "missing.pem"], "missing.pem: No such file"),
        (["--policy", "missing"], "missing: is not a directory"),
        (["--data", "missing.json", "--overlay", "red=red"], "red: is not a directory"),
    ],
)
def test_builds_that_contradict_themselves(shell: Shell, opa: Path, arguments: list[str], why: str) -> None:
    assert shell("build", "--revision", "r", "--serial", 7, "-o", "out.tar.gz", *arguments) == 1
    assert why in shell.err
    assert shell.err.startswith("sidecar: ")
    assert not (shell.home / "out.tar.gz").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--serial", "-1"], ["--serial", "1.5"], ["--serial", "٧"], ["--serial", str(1 << 53)], ["--serial", ""], ["--created", "now"],
        ["--created", "2025-06-15T15:06:40"], ["--return-until", "2025-06-15"], ["--may-return-to", "x"], ["--overlay", "red"],
        ["--overlay", "=red"], ["--overlay", "red="], ["--algorithm", "HS256"], ["--algorithm", "none"],
    ],
)  # fmt: skip
def test_arguments_are_of_their_kind(shell: Shell, arguments: list[str]) -> None:
    usual = ["--revision", "r", "--serial", "7", "-o", "out.tar.gz"]
    assert f"argument {arguments[0]}" in shell.misused("build", *usual, *arguments)


# ── sign ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512", "EdDSA", "RS256", "PS256"])
def test_a_bundle_is_signed_by_any_key(shell: Shell, algorithm: str) -> None:
    key = Key("mine", algorithm, private(algorithm))
    shell.put("k.pem", key.private_pem).chmod(0o600)
    shell.put("k.pub", key.public_pem)
    more = ["--algorithm", algorithm] if algorithm == "PS256" else []
    assert (
        shell("sign", "b.tar.gz", "--key", "k.pem", "--key-id", "mine", "--scope", "prod", "-o", "out.tar.gz", *more)
        == 0
    )
    assert shell.out == f"signed out.tar.gz with mine ({algorithm}) for scope prod\n"
    suffix = "" if algorithm == "ES256" else f":{algorithm}"
    assert shell("verify", "out.tar.gz", "--key", f"mine=k.pub{suffix}", "--scope", "prod") == 0
    assert shell("verify", "out.tar.gz", "--key", f"mine=k.pub{suffix}") == 1
    assert "was signed for scope 'prod', not 'sidecar'" in shell.err


def test_a_signature_is_replaced_in_place(shell: Shell) -> None:
    assert shell("sign", "b.tar.gz", "--key", "release-2.pem", "--key-id", "release-2") == 0
    assert shell("verify", "b.tar.gz", "--key", "release-1=release-1.pub", "--key", "release-2=release-2.pub") == 0
    assert "signed with release-2" in shell.out
    assert sorted(os.listdir(shell.home)) == [
        "b.tar.gz",
        "release-1.pem",
        "release-1.pub",
        "release-2.pem",
        "release-2.pub",
    ]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["missing", "--key", "release-1.pem"], "missing: cannot be read: No such file"),
        (["release-1.pub", "--key", "release-1.pem"], "not a gzip archive"),
        (["b.tar.gz", "--key", "release-1.pub"], "others may read it"),
        (["b.tar.gz", "--key", "release-1.pem", "--algorithm", "RS256"], "cannot be used with RS256"),
        (["b.tar.gz", "--key", "release-1.pem", "--key-id", ""], "names its key"),
        (["b.tar.gz", "--key", "release-1.pem", "--scope", ""], "its scope"),
        (["b.tar.gz", "--key", "release-1.pem", "-o", "b.tar.gz/x"], "b.tar.gz/x"),
    ],
)
def test_signing_that_fails_changes_nothing(shell: Shell, arguments: list[str], why: str) -> None:
    before = (shell.home / "b.tar.gz").read_bytes()
    assert shell("sign", *arguments) == 1
    assert why in shell.err
    assert (shell.home / "b.tar.gz").read_bytes() == before


# ── verify ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--key", "release-1=release-2.pub"], "was not made with key release-1"),
        (["--key", "other=release-1.pub"], "no key 'release-1' is configured"),
        (["--key", "release-1=release-1.pub:ES384"], "release-1.pub: is a key that cannot be used with ES384"),
        (["--key", "release-1=release-1.pem"], "release-1.pem: holds a private key"),
        (["--key", "release-1=missing"], "missing: cannot be read"),
        (["--key", "release-1=."], "is not a regular file"),
        (["--key", "release-1=release-1.pub", "--key", "release-1=release-2.pub"], "--key is given twice"),
        (["--key", "release-1=release-1.pub", "--scope", "x"], "for scope 'sidecar', not 'x'"),
    ],
)
def test_what_does_not_verify(shell: Shell, arguments: list[str], why: str) -> None:
    assert shell("verify", "b.tar.gz", *arguments) == 1
    assert why in shell.err
    assert shell.out == ""


def test_a_certificate_and_a_path_with_a_colon_will_do(shell: Shell) -> None:
    shell.put("a:b/k.pub", KEY.public_pem)
    assert shell("verify", "b.tar.gz", "--key", "release-1=a:b/k.pub") == 0
    assert shell("verify", "b.tar.gz", "--key", "release-1=a:b/k.pub:ES256") == 0
    shell.put("ca.pem", CA("example.org").pem)
    assert shell("verify", "b.tar.gz", "--key", "release-1=ca.pem") == 1
    assert "was not made with" in shell.err


def test_a_bundle_that_no_sidecar_takes_does_not_verify(shell: Shell) -> None:
    shell.put("x.tar.gz", signed(made(7, roots=["/"]), KEY))
    assert shell("verify", "x.tar.gz", "--key", "release-1=release-1.pub") == 1
    assert "roots" in shell.err


@pytest.mark.parametrize("text", ["release-1", "=x", "release-1=", ""])
def test_a_key_is_given_with_its_id(shell: Shell, text: str) -> None:
    assert "must be ID=FILE" in shell.misused("verify", "b.tar.gz", "--key", text)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("command", ["verify", "inspect", "sign", "diff"])
def test_what_is_no_bundle_is_a_sentence_and_hangs_nobody(
    shell: Shell, command: str, make: Callable[[Path], object]
) -> None:
    make(shell.home / "x")
    more = {
        "verify": ["--key", "k=release-1.pub"],
        "sign": ["--key", "release-1.pem"],
        "diff": ["b.tar.gz"],
        "inspect": [],
    }[command]
    assert shell(command, "x", *more) == 1
    assert shell.err.startswith("sidecar: x: ")


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_bundle_holds(shell: Shell) -> None:
    bundle = made(7, may_return_to=[5], return_until="2025-07-01T00:00:00Z", cache={
        "sidecar/inbound/decision": {"pure": True, "fields": [["caller"], ["headers", "x"]]}, "sidecar/egress/decision": {"pure": True, "fields": []},
        "sidecar/outbound/decision": {"pure": False},
    })  # fmt: skip
    shell.put("x.tar.gz", signed(bundle, KEY))
    assert shell("inspect", "x.tar.gz") == 0
    lines = shell.out.splitlines()
    assert lines[0] == f"digest   {signature.content_digest(bundle)}, signed"
    assert lines[1:6] == [
        "revision r7, serial 7, roots sidecar",
        "return   to 5",
        "cache    sidecar/inbound/decision: pure, reads input.caller, input.headers.x",
        "cache    sidecar/egress/decision: pure, reads nothing of the input",
        "cache    sidecar/outbound/decision: not proven pure",
    ]
    assert [line.split() for line in lines[6:]] == [
        [str(len(content)), name] for name, content in sorted(bundle.files.items())
    ]


def test_what_a_bundle_holds_for_programs(shell: Shell) -> None:
    assert shell("inspect", "b.tar.gz", "--json") == 0
    told = json.loads(shell.out)
    bundle = made(7)
    assert told["digest"] == signature.content_digest(bundle)
    assert told["signed"] is True
    assert told["manifest"]["metadata"]["serial"] == 7
    assert told["files"] == {name: signature.digest(name, content) for name, content in bundle.files.items()}


def test_a_bundle_of_others_is_shown_too(shell: Shell) -> None:
    """One that OPA built has no serial: what is wrong with it is said, and what it holds."""
    shell.put(
        "x.tar.gz",
        archive.pack(
            Bundle(
                files=MappingProxyType({".manifest": b'{"revision":"a","roots":["x"]}', "x.rego": b"1"}),
                signatures=None,
            )
        ),
    )
    assert shell("inspect", "x.tar.gz") == 0
    assert "release  none that a sidecar takes: serial must be" in shell.out
    assert "x.rego" in shell.out
    assert shell("inspect", "x.tar.gz", "--json") == 0


@pytest.mark.parametrize("manifest", [b"{", b'{"a":1,"a":2}', b"NaN"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_manifest_that_is_none_is_a_sentence(shell: Shell, manifest: bytes, more: list[str]) -> None:
    shell.put("x.tar.gz", archive.pack(Bundle(files=MappingProxyType({".manifest": manifest}), signatures=None)))
    assert shell("inspect", "x.tar.gz", *more) == 1
    assert "sidecar: .manifest" in shell.err


# ── diff ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def differ(shell: Shell, old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """The lines of a diff; [] where there is no difference, and then the exit code says so too."""
    for name, files in (("old", old), ("new", new)):
        shell.put(name, archive.pack(Bundle(files=MappingProxyType(files), signatures=None)))
    code = shell("diff", "old", "new")
    assert code == (shell.out != "no difference\n")
    same = signature.content_digest(archive.read((shell.home / "old").read_bytes())) == signature.content_digest(
        archive.read((shell.home / "new").read_bytes())
    )
    assert (code == 0) == same
    return [] if code == 0 else shell.out.splitlines()


def test_what_differs_is_shown_line_by_line(shell: Shell) -> None:
    lines = differ(shell, {"x.rego": b"a\nb\nc\n", "y.rego": b"1"}, {"x.rego": b"a\nB\nc\n", "z.rego": b"2"})
    assert lines[0:3] == ["--- old:x.rego", "+++ new:x.rego", "@@ -1,4 +1,4 @@"]
    assert {"-b", "+B", "-1", "+2"} <= set(lines)


def test_json_is_laid_out_and_its_layout_is_no_difference(shell: Shell) -> None:
    assert (
        differ(shell, {"data.json": b'{"a":1,"b":[1,{"c":null}]}'}, {"data.json": b'{ "b" : [1,{"c":null}] ,\n"a":1}'})
        == []
    )
    lines = differ(shell, {"data.json": b'{"a":{"b":[1,2]},"c":[]}'}, {"data.json": b'{"a":{"b":[1,3]},"c":[]}'})
    assert [line for line in lines if line[0] in "+-" and not line.startswith(("---", "+++"))] == [
        "-      2",
        "+      3",
    ]
    assert '     "b": [' in lines


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data.json", b'{"a":1000}', b'{"a":1e3}'),
        ("data.json", b'{"a":1.0}', b'{"a":1}'),
        ("data.json", b"[1]", b'["1"]'),
        ("data.json", b"{}", b"[]"),
        (".manifest", b'{"metadata":{"serial":7}}', b'{"metadata":{"serial":8}}'),
        ("x.rego", b"a\n", b"a"),
        ("x.rego", b"a\r\n", b"a\n"),
        ("x.rego", b"a\x0bb", b"a\nb"),
        ("x.rego", b"\xff", b"\xfe"),
        ("x.rego", b"a ", b"a"),
        ("x.rego", "\u2028".encode(), b"\n"),
        ("x.rego", b"a\x1b[2J", b"a"),
    ],
)
def test_no_difference_that_a_signature_sees_is_passed_over(shell: Shell, name: str, old: bytes, new: bytes) -> None:
    lines = differ(shell, {name: old}, {name: new})
    assert lines
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("old", "new"), [({}, {"x.rego": b""}), ({"x.rego": b""}, {}), ({"x.rego": b""}, {"y.rego": b""})]
)
def test_a_file_that_is_empty_is_a_difference(shell: Shell, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    assert differ(shell, old, new)


def test_who_signed_is_no_difference(shell: Shell) -> None:
    shell.put("c.tar.gz", signed(made(7), OTHER))
    assert shell("diff", "b.tar.gz", "c.tar.gz") == 0


def test_json_that_is_none_is_a_sentence(shell: Shell) -> None:
    shell.put("x.tar.gz", archive.pack(Bundle(files=MappingProxyType({"data.json": b"{"}), signatures=None)))
    assert shell("diff", "b.tar.gz", "x.tar.gz") == 1
    assert "data.json is not JSON" in shell.err


# ── keygen ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "public"), [("k.pem", "k.pub"), ("k", "k.pub"), ("release.1.pem", "release.1.pub")])
def test_a_key_pair_signs_and_verifies(shell: Shell, name: str, public: str) -> None:
    assert shell("keygen", name) == 0
    assert f"{name}: keep it where releases are made; {public}: list it under policy.keys" in shell.out
    assert stat.S_IMODE((shell.home / name).stat().st_mode) == 0o600
    assert shell("sign", "b.tar.gz", "--key", name, "--key-id", "k") == 0
    assert shell("verify", "b.tar.gz", "--key", f"k={public}") == 0
    assert "PRIVATE KEY" not in shell.out + shell.err


@pytest.mark.parametrize("name", ["release-1.pem", "release-1.key", "x.pub", "missing/k.pem"])
def test_no_key_is_written_over(shell: Shell, name: str) -> None:
    before = {path.name: path.read_bytes() for path in shell.home.iterdir()}
    assert shell("keygen", name) == 1
    assert {path.name: path.read_bytes() for path in shell.home.iterdir()} == before


# ── without OPA ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_build_needs_opa(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidecar.decision import install

    monkeypatch.setattr(install, "find", lambda: None)
    shutil.copy(shell.home / "b.tar.gz", shell.home / "c.tar.gz")
    arguments: list[list[Any]] = [
        ["sign", "c.tar.gz", "--key", "release-1.pem"], ["verify", "b.tar.gz", "--key", "release-1=release-1.pub"], ["inspect", "b.tar.gz"],
        ["diff", "b.tar.gz", "c.tar.gz"], ["keygen", "new.pem"],
    ]  # fmt: skip
    assert [shell(*command) for command in arguments] == [0] * 5
    assert shell("build", "--revision", "r", "--serial", 1, "-o", "out.tar.gz") == 1
    assert "OPA is not installed; run `sidecar opa install`" in shell.err
