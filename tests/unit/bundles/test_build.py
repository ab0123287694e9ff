"""Sources in, a bundle out: the same each time, and no overlay beyond its root. With OPA itself."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sidecar.bundles import archive, build, documents, opa_command, release, signature
from sidecar.bundles.archive import Bundle, BundleRefused
from sidecar.bundles.build import NotBuilt, Sources, Stamp

STAMP = Stamp(revision="r7", serial=7, created=1_750_000_000.5)
ALLOW = b"package team.red\n\ndecision := true\n"


class Place:
    """Sources as files, and OPA to build them."""

    def __init__(self, opa: Path, work: Path) -> None:
        self.opa = opa
        self.work = work
        self.policies = self.put(
            "policies/sidecar/inbound.rego", b"package sidecar.inbound\n\ndecision := input.path == data.sidecar.x\n"
        ).parent.parent

    def put(self, name: str, content: bytes | str) -> Path:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def overlay(self, content: bytes, name: str = "a.rego") -> Path:
        shutil.rmtree(self.work / "red", ignore_errors=True)
        return self.put(f"red/{name}", content).parents[name.count("/")]

    def build(self, stamp: Stamp = STAMP, **sources: Any) -> Bundle:
        return build.build(self.opa, Sources(policies=self.policies, **sources), stamp)

    def refused(self, **sources: Any) -> str:
        with pytest.raises(NotBuilt) as caught:
            self.build(**sources)
        return str(caught.value)


@pytest.fixture
def place(opa: Path, tmp_path: Path) -> Place:
    return Place(opa, tmp_path)


# ── what is built ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.live
def test_a_bundle_of_rules_data_and_metadata(place: Place) -> None:
    place.put("policies/sidecar/inbound_test.rego", b"package sidecar.inbound_test\n")
    place.put("policies/.git/x.rego", b"not rego")
    place.put("policies/.hidden.rego", b"not rego")
    place.put("policies/schemas/input.json", b"{}")
    data = [
        place.put("a.json", '{"sidecar": {"x": 1e3}}'),
        place.put("b.yaml", "sidecar: {roles: {a: [x, 1, true, null]}}"),
    ]
    bundle = place.build(replace(STAMP, may_return_to=(5, 3, 5), return_until=1_750_086_400.0), data=data)
    assert set(bundle.files) == {".manifest", "data.json", "sidecar/inbound.rego", "sidecar/batch/batch.rego"}
    assert bundle.files["data.json"] == b'{"sidecar":{"roles":{"a":["x",1,true,null]},"x":1e3}}'
    said = release.release(bundle)
    assert (said.revision, said.serial, said.created, said.roots) == ("r7", 7, 1_750_000_000.0, ("sidecar",))
    assert (said.may_return_to, said.return_until) == (frozenset({3, 5}), 1_750_086_400.0)
    assert said.cache["sidecar/inbound/decision"].fields == (("path",),)
    assert bundle.manifest["metadata"]["may_return_to"] == ["3", "5"]  # type: ignore[index,call-overload]
    assert bundle.manifest["rego_version"] == "1"  # type: ignore[index,call-overload]


@pytest.mark.live
def test_questions_are_put_together_only_by_the_rule_that_we_know(place: Place) -> None:
    entrypoint = "sidecar/inbound/decision"
    ours = (build.library() / build.BATCH).read_bytes()
    assert place.build().files[build.BATCH] == ours
    assert release.release(place.build()).cache[entrypoint].batch
    place.put(f"policies/{build.BATCH}", ours)
    assert release.release(place.build()).cache[entrypoint].batch
    place.put(f"policies/{build.BATCH}", ours + b"\n# It says something else here.\n")
    assert release.release(place.build()).cache[entrypoint].batch is False


@pytest.mark.live
@pytest.mark.parametrize("calls", ['rand.intn("x", 2) == 1', 'http.send({"method": "GET", "url": "http://a.test"})'])
def test_what_each_question_must_ask_for_itself_is_not_put_together(place: Place, calls: str) -> None:
    place.put("policies/sidecar/inbound.rego", f"package sidecar.inbound\n\ndecision if {calls}\n")
    assert release.release(place.build()).cache["sidecar/inbound/decision"].batch is False


@pytest.mark.live
def test_who_does_not_own_the_root_gets_no_rule(place: Place) -> None:
    place.put("policies/.manifest", '{"roots": ["sidecar/inbound"]}')
    bundle = place.build()
    assert build.BATCH not in bundle.files
    assert release.release(bundle).cache["sidecar/inbound/decision"].batch is False


@pytest.mark.live
def test_no_overlay_can_be_the_rule(place: Place) -> None:
    red = place.put("red/b.rego", b"package sidecar.batch\n\ninbound[0] := true\n").parent
    with pytest.raises(NotBuilt, match="its package is sidecar"):
        place.build(overlays={"red": red})


@pytest.mark.live
def test_an_overlay_has_a_root_of_its_own(place: Place) -> None:
    red = place.overlay(ALLOW, "rules/a.rego")
    place.put("red/data.yaml", "limit: 5")
    bundle = place.build(
        overlays={"red": red, "blue_2": place.put("blue/b.rego", b"package team.blue_2.deep\n\nx := 1\n").parent}
    )
    assert release.release(bundle).roots == ("sidecar", "team/blue_2", "team/red")
    assert set(bundle.files) == {
        ".manifest",
        "data.json",
        "sidecar/batch/batch.rego",
        "sidecar/inbound.rego",
        "team/red/rules/a.rego",
        "team/blue_2/b.rego",
    }
    assert json.loads(bundle.files["data.json"]) == {"team": {"red": {"limit": 5}}}


@pytest.mark.live
@pytest.mark.parametrize("compiled", [False, True])
def test_the_library_builds(opa: Path, place: Place, compiled: bool) -> None:
    data = place.put("rbac.json", '{"sidecar": {"rbac": {}}}')
    bundle = build.build(opa, Sources(policies=build.library(), data=[data], compile_rbac=compiled), STAMP)
    cache = release.release(bundle).cache
    assert set(cache) == {f"sidecar/{one}/decision" for one in ("inbound", "outbound", "egress", "fleet")}
    assert all(one.pure and one.batch for one in cache.values())
    assert not [name for name in bundle.files if "_test" in name or "schema" in name]


@pytest.mark.live
def test_the_same_sources_give_the_same_bytes(place: Place, tmp_path: Path) -> None:
    """In another directory, at another time, with another umask and order of files."""
    names = [f"sidecar/{name}.rego" for name in ("zeta", "alpha", "mü", "a-b", "a_b")]
    for name in names:
        place.put(f"policies/{name}", f"package sidecar.x{names.index(name)}\n\nx := 1\n")
    red = place.overlay(ALLOW)
    data = place.put("d.yaml", "sidecar: {b: 1, a: 2}")
    first = archive.pack(
        place.build(overlays={"red": red, "blue": place.put("blue/b.rego", b"package team.blue\n").parent}, data=[data])
    )

    other = tmp_path / "elsewhere" / "deeper"
    old = os.umask(0o077)
    try:
        for name in reversed(names):
            place.put(f"elsewhere/deeper/policies/{name}", (place.policies / name).read_bytes())
        place.put(
            "elsewhere/deeper/policies/sidecar/inbound.rego", (place.policies / "sidecar/inbound.rego").read_bytes()
        )
        place.put("elsewhere/deeper/blue/b.rego", b"package team.blue\n")
        place.put("elsewhere/deeper/red/a.rego", ALLOW)
        moved = place.put("elsewhere/deeper/d.yaml", "sidecar:\n  a: 2\n  b: 1\n")
        for path in other.rglob("*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))
        again = build.build(
            place.opa,
            Sources(policies=other / "policies", overlays={"blue": other / "blue", "red": other / "red"}, data=[moved]),
            STAMP,
        )
        build.written(other / "out.tar.gz", again)
    finally:
        os.umask(old)
    assert archive.pack(again) == first == (other / "out.tar.gz").read_bytes()


# ── overlays that reach further ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.live
@pytest.mark.parametrize(
    "content",
    [
        b"package sidecar.inbound\n\nextra := 1\n",
        b"package  sidecar . inbound\n",
        b"package\tsidecar.inbound\n",
        b"package\n\nsidecar.inbound\n",
        b"\n\n   package sidecar.inbound\n",
        b"\xef\xbb\xbfpackage sidecar.inbound\n\nx := `\npackage team.red\n`\n",
        b'package sidecar["inbound"]\n\nx := `\npackage team.red\n`\n',
        b"package sidecar[`inbound`]\n\n# package team.red\n",
        b"# package team.red\npackage sidecar.inbound\n",
        b"#package team.red\r\npackage sidecar.inbound\r\n",
        b"# METADATA\n# title: package team.red\npackage sidecar.inbound\n",
        b"package sidecar.inbound # team.red\n",
        b"package sidecar.inbound\r\n\r\nx := `\r\npackage team.red\r\n`\r\n",
        b"package sidecar\n\ninbound.extra := 1\n",
        b"package team.blue\n",
        b"package team\n\nred.x := 1\n",
        b"package team.redder\n",
        b"package team.Red\n",
        b'package team["red.x"]\n',
        b"package sidecar.team.red\n",
        b"package system.log\n",
        b"package other\n",
    ],
)
def test_an_overlay_that_speaks_for_others_is_refused(place: Place, content: bytes) -> None:
    blue = place.put("blue/b.rego", b"package team.blue\n\nx := 1\n").parent
    said = place.refused(overlays={"red": place.overlay(content), "blue": blue})
    assert "must be team.red or below" in said or "do not permit" in said or "opa check" in said


@pytest.mark.live
@pytest.mark.parametrize(
    "content",
    [
        ALLOW,
        b"\xef\xbb\xbfpackage team.red\n\nx := 1\n",
        b"# package sidecar.inbound\r\npackage  team.red\r\n\r\nx := `\r\npackage sidecar.inbound\r\n`\r\n",
        b'package team["red"]\n\nx := 1\n',
        b"package team.red.deep.er\n\nx := 1\n",
        b'package team.red["a b"]\n\nx := 1\n',
        b"package\n\tteam.red\n",
    ],
)
def test_an_overlay_in_its_root_is_taken_however_it_is_spelt(place: Place, content: bytes) -> None:
    assert place.build(overlays={"red": place.overlay(content)}).files["team/red/a.rego"] == content


@pytest.mark.live
def test_one_overlay_of_many_files_is_looked_at_whole(place: Place) -> None:
    red = place.overlay(ALLOW)
    place.put("red/deep/er/z.rego", b"package sidecar.inbound\n\nextra := 1\n")
    assert "team/red/deep/er/z.rego: its package is sidecar.inbound" in place.refused(overlays={"red": red})


@pytest.mark.parametrize("team", ["", "Red", "9red", "red/x", "..", "red.x", "_red", "rêd", "r" * 64, "red-x"])
def test_a_team_has_a_plain_name(place: Place, team: str) -> None:
    assert "a team's name" in place.refused(overlays={team: place.overlay(ALLOW)})


def test_a_file_of_the_base_cannot_lie_where_an_overlay_does(place: Place) -> None:
    place.put("policies/team/red/a.rego", b"package sidecar.secret\n\nx := 1\n")
    assert "belongs to the overlay red" in place.refused(overlays={"red": place.overlay(ALLOW)})


def test_a_link_does_not_bring_in_what_lies_elsewhere(place: Place) -> None:
    secret = place.put("secret", b"package team.red\n# a password\n")
    red = place.overlay(ALLOW)
    (red / "b.rego").symlink_to(secret)
    assert "leads out of" in place.refused(overlays={"red": red})
    (red / "b.rego").unlink()
    (red / "data.json").symlink_to(place.put("x.json", b"{}"))
    assert "leads out of" in place.refused(overlays={"red": red})
    (red / "data.json").unlink()
    (red / "c.rego").symlink_to("a.rego")
    assert set(build.files(Sources(policies=place.policies, overlays={"red": red}))) >= {"team/red/c.rego"}


@pytest.mark.parametrize("name", ["deep/data.json", "deep/data.yaml"])
def test_data_of_an_overlay_stands_at_its_top(place: Place, name: str) -> None:
    red = place.overlay(ALLOW)
    place.put(f"red/{name}", b"{}")
    assert "stands at its top" in place.refused(overlays={"red": red})


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.live
@pytest.mark.parametrize(
    ("rego", "why"),
    [
        (b"package sidecar.inbound\n\nx := unknown(1)\n", "undefined function unknown"),
        (b"package sidecar.inbound\n\nx := \n", "rego_parse_error"),
        (b"package sidecar.inbound\n\nimport data.unused\n", "unused"),
        (b"package elsewhere\n\nx := 1\n", "do not permit"),
        (b"\xff\xfe", "opa check"),
    ],
)
def test_what_opa_does_not_take_is_not_built(place: Place, rego: bytes, why: str) -> None:
    place.put("policies/sidecar/extra.rego", rego)
    assert why in place.refused()


@pytest.mark.live
def test_data_that_the_library_finds_wrong_is_told_by_line(opa: Path, place: Place) -> None:
    data = place.put("d.json", '{"sidecar": {"rbac": {"patterns": {"spiffe://*/a": []}}}}')
    with pytest.raises(NotBuilt, match="not a SPIFFE ID pattern"):
        build.build(opa, Sources(policies=build.library(), data=[data]), STAMP)


@pytest.mark.live
def test_what_a_sidecar_would_not_take_is_not_made(place: Place) -> None:
    for stamp in (
        replace(STAMP, revision=""),
        replace(STAMP, revision="a\nb"),
        replace(STAMP, serial=1 << 60),
        replace(STAMP, may_return_to=(8,), return_until=2e9),
    ):
        with pytest.raises(BundleRefused):
            place.build(stamp)
    place.put("policies/sidecar/a\nb.rego", b"package sidecar.x\n")
    with pytest.raises(BundleRefused, match="not a name within"):
        place.build()


def test_a_permission_to_return_has_an_end(place: Place) -> None:
    with pytest.raises(NotBuilt, match="return_until"):
        place.build(replace(STAMP, may_return_to=(5,)))


@pytest.mark.parametrize(
    "roots", ['[""]', "[]", '["/"]', "null", '"sidecar"', "[5]", '["team"]', '["sidecar", "team/red"]', '["/team/"]']
)
def test_roots_of_the_base_are_its_own(place: Place, roots: str) -> None:
    place.put("policies/.manifest", f'{{"roots": {roots}}}')
    assert "root" in place.refused()


@pytest.mark.live
def test_roots_of_the_base_are_kept(place: Place) -> None:
    place.put("policies/.manifest", '{"roots": ["sidecar", "/shared/"], "revision": "ignored"}')
    assert release.release(place.build()).roots == ("sidecar", "shared")


def test_without_rules_there_is_no_bundle(place: Place, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    place.policies = tmp_path / "empty"
    assert "no rules" in place.refused()
    place.policies = tmp_path / "missing"
    assert "not a directory" in place.refused()
    place.policies = place.put("file", b"")
    assert "not a directory" in place.refused()


def test_an_opa_that_is_not_there_is_a_fault(place: Place, tmp_path: Path) -> None:
    place.opa = tmp_path / "missing"
    assert "No such file" in place.refused()


@pytest.mark.live
def test_an_opa_that_does_not_end_is_a_fault(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opa_command, "TIMEOUT", 0.0001)
    assert "no end in" in place.refused()


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def merged(place: Place, *texts: tuple[str, str]) -> bytes:
    data = [place.put(name, text) for name, text in texts]
    return bytes(build.files(Sources(policies=place.policies, data=data))["data.json"])


def test_documents_are_merged(place: Place) -> None:
    assert merged(
        place, ("a.json", '{"a": {"x": 1}, "b": 2}'), ("b.yml", "a: {y: {z: 3}}"), ("c.json", '{"a": {"y": {"w": 4}}}')
    ) == (b'{"a":{"x":1,"y":{"w":4,"z":3}},"b":2}')


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("d.json", '{"a": 1, "a": 2}', "the key 'a' twice"),
        ("d.json", "[]", "must be an object"),
        ("d.json", "{", "is not JSON"),
        ("d.json", '{"a": NaN}', "NaN"),
        ("d.json", '{"a": "\\ud800"}', "surrogate"),
        ("d.json", '{"a":' * 300 + "1" + "}" * 300, "nested too deep"),
        ("d.yaml", "a: 1\na: 2", "the key 'a' twice (line 2)"),
        ("d.yaml", "a: {b: 1, b: 2}", "the key 'b' twice"),
        ("d.yaml", "on: 1", "'on' (line 1), which YAML does not take for text"),
        ("d.yaml", "a:\n  1: x", "'1' (line 2)"),
        ("d.yaml", "null: x", "'null'"),
        ("d.yaml", "2020-01-01: x", "'2020-01-01'"),
        ("d.yaml", "? [a]\n: 1", "which YAML does not take for text"),
        ("d.yaml", "a: 2020-01-01", "not YAML that JSON can say"),
        ("d.yaml", "a: .inf", "not YAML that JSON can say"),
        ("d.yaml", "a: !!binary aGk=", "not YAML that JSON can say"),
        ("d.yaml", "a: !!set {x}", "not YAML that JSON can say"),
        ("d.yaml", "a: !!python/object/apply:os.getcwd []", "not YAML that JSON can say"),
        ("d.yaml", "a: &x [1]\nb: *x", "refers to something else (line 2)"),
        ("d.yaml", "a: &x {c: 1}\nb: {<<: *x}", "refers to something else"),
        ("d.yaml", "&a [*a]", "refers to something else"),
        ("d.yaml", "a: [" * 300 + "]" * 300, "not YAML|nested"),
        ("d.yaml", "- x", "must be an object"),
        ("d.yaml", "a: 1\n---\nb: 2", "not YAML"),
        ("d.yaml", "", "must be an object"),
        ("d.yaml", "a: {" * 500 + "}" * 500, "not YAML|nested"),
        ("missing/", "", "not a file"),
    ],
)  # fmt: skip
def test_data_that_could_mean_something_else_is_refused(place: Place, name: str, text: str, why: str) -> None:
    import re

    path = place.work / "missing" if name == "missing/" else place.put(name, text)
    with pytest.raises(NotBuilt) as caught:
        build.files(Sources(policies=place.policies, data=[path]))
    assert re.search(why if "|" in why else re.escape(why), str(caught.value))
    assert str(path) in str(caught.value)


def test_a_few_lines_do_not_become_millions(place: Place) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{at}: &a{at} [*a{at - 1}, *a{at - 1}]" for at in range(1, 40)]
    with pytest.raises(NotBuilt, match="refers to something else"):
        merged(place, ("d.yaml", "\n".join(lines)))


@pytest.mark.parametrize("other", ['{"a": {"x": 2}}', '{"a": 5}', '{"a": {"x": {"y": 1}}}', '{"a": {"x": 1}}'])
def test_two_documents_do_not_say_the_same_thing(place: Place, other: str) -> None:
    with pytest.raises(NotBuilt, match=r"b\.json: a(\.x)? is given in another document too"):
        merged(place, ("a.json", '{"a": {"x": 1}}'), ("b.json", other))


def test_yaml_numbers_and_words(place: Place) -> None:
    assert (
        merged(place, ("d.yaml", 'a: [yes, 010, 0x10, 1.5, "1.50", ~, 1e3, text]'))
        == b'{"a":[true,8,16,1.5,"1.50",null,"1e3","text"]}'
    )


def test_a_document_has_a_size(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MAX_BYTES", 10)
    with pytest.raises(NotBuilt, match="larger than 10 bytes"):
        merged(place, ("d.json", '{"a": 123456789}'))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_pair_is_made_for_its_owner_and_never_written_over(tmp_path: Path) -> None:
    private, public = tmp_path / "k.pem", tmp_path / "k.pub"
    old = os.umask(0)
    try:
        build.key_pair(private, public)
    finally:
        os.umask(old)
    assert (stat.S_IMODE(private.stat().st_mode), stat.S_IMODE(public.stat().st_mode)) == (0o600, 0o644)
    key = signature.private_key(private, key_id="k")
    assert (
        load_pem_private_key(private.read_bytes(), None).public_key()
        == signature.public_key("ES256", public.read_bytes()).key
    )
    assert key.algorithm == "ES256"
    before = (private.read_bytes(), public.read_bytes())
    for gone in (None, private, public):
        kept = gone.read_bytes() if gone else b""
        if gone:
            gone.unlink()
        with pytest.raises(NotBuilt, match="File exists"):
            build.key_pair(private, public)
        if gone:
            assert not gone.exists()
            gone.write_bytes(kept)
    assert (private.read_bytes(), public.read_bytes()) == before


def test_a_key_pair_needs_two_places(tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match="two names"):
        build.key_pair(tmp_path / "k.pub", tmp_path / "k.pub")
    with pytest.raises(NotBuilt, match="No such file"):
        build.key_pair(tmp_path / "missing/k", tmp_path / "k.pub")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_key_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "k.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotBuilt):
        build.key_pair(tmp_path / "k.pem", tmp_path / "k.pub")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "break_it", [lambda path: path.mkdir(), lambda path: path.parent.chmod(0o500) if os.geteuid() else path.mkdir()]
)
def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path, break_it: Callable[[Path], object]) -> None:
    bundle = archive.Bundle(files={"x.rego": b"1"}, signatures=None)
    out = tmp_path / "deep/er/out.tar.gz"
    build.written(out, bundle)
    assert archive.read(out.read_bytes()) == bundle
    assert [path.name for path in out.parent.iterdir()] == ["out.tar.gz"]
    other = tmp_path / "other/out.tar.gz"
    other.parent.mkdir()
    break_it(other)
    with pytest.raises(NotBuilt, match=r"out\.tar\.gz"):
        build.written(other, bundle)
    assert [path.name for path in other.parent.iterdir()] in (["out.tar.gz"], [])


def test_the_library_is_found() -> None:
    assert (build.library() / ".manifest").is_file()


@pytest.mark.live
def test_what_is_built_is_what_opa_builds(place: Place, tmp_path: Path) -> None:
    """Both hash to the same where both hold the same."""
    bundle = place.build()
    out = tmp_path / "ours"
    for name, content in bundle.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    subprocess.run(
        [place.opa, "build", "-b", ".", "-o", tmp_path / "opa.tar.gz"],
        cwd=out,
        check=True,
        capture_output=True,
        timeout=60,
    )
    theirs = archive.read((tmp_path / "opa.tar.gz").read_bytes())
    assert {name: signature.digest(name, content) for name, content in theirs.files.items() if name != ".manifest"} == {
        name: signature.digest(name, content) for name, content in bundle.files.items() if name != ".manifest"
    }
