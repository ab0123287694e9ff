"""The policy library as a signed bundle: real OPA takes what was signed and nothing else."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from examples.demo import bundle
from sidecar.decision.policy import configuration
from sidecar.model import PolicyBundle
from support import live as sidecars

pytestmark = pytest.mark.live

POLICIES = Path(__file__).parents[2] / "policies/rego"
INPUT = json.loads((POLICIES / "schemas/input.json").read_text())
ANSWER = json.loads((POLICIES / "schemas/answer.json").read_text())
BUDGET = "spiffe://example.org/ns/demo/sa/budget"
DATA: dict[str, Any] = {
    "sidecar": {
        "rbac": {
            "roles": {"submitters": {"allow": [{"methods": ["POST"], "paths": ["/budget/*"]}]}},
            "bindings": {BUDGET: ["submitters"]},
        },
        "destinations": {"routes": {"backend": {"allow": [{"methods": ["GET"], "paths": ["/reports/**"]}]}}},
    }
}
FILES = {
    "/.manifest", "/.signatures.json", "/data.json",
    *(f"/sidecar/{name}/{name}.rego" for name in (
        "access", "batch", "callers", "egress", "fleet", "inbound", "lint", "match", "outbound", "teams")),
}  # fmt: skip


class Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("opa", timeout=5)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Opa:
    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, url: str, body: object = None) -> Any:
        connection = Unix(self.path)
        try:
            text = None if body is None else json.dumps(body)
            connection.request("GET" if text is None else "POST", url, text, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def bundle(self) -> dict[str, Any]:
        """The state of the bundle, once OPA has tried to load it."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                state = self.get("/v1/status")["result"].get("bundles", {}).get("sidecar", {})
            except (OSError, http.client.HTTPException):
                state = {}
            if state.get("active_revision") or state.get("code"):
                return state
            time.sleep(0.05)
        raise AssertionError("OPA neither took nor refused the bundle")

    def ask(self, question: dict[str, Any]) -> Any:
        return self.get(f"/v1/data/sidecar/{question['direction']}/decision?provenance=true", {"input": question})


@contextmanager
def running(opa: Path, configured: dict[str, object]) -> Iterator[Opa]:
    with tempfile.TemporaryDirectory() as place:  # a socket's path has 108 bytes at most
        Path(place, "config.json").write_text(json.dumps(configured))
        command = [
            opa, "run", "--server", "--addr", f"unix://{place}/opa.sock", "--config-file", f"{place}/config.json",
            "--skip-version-check", "--log-level", "error",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield Opa(Path(place, "opa.sock"))
            finally:
                process.kill()


class Release:
    """A key pair and what is built with it."""

    def __init__(self, opa: Path, work: Path) -> None:
        self.opa = opa
        self.work = work
        self.private, self.public = bundle.make_keys(work / "keys")

    def build(self, **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "opa": self.opa, "policy_dir": POLICIES, "data": DATA, "serial": 7, "revision": "r7",
            "private_key_path": self.private, **changes,
        }  # fmt: skip
        return bundle.build(self.work / "out", **arguments)

    def accepted_by(self, path: Path) -> dict[str, object]:
        keys = {"release-1": ("ES256", self.public.read_bytes())}
        handed = PolicyBundle(archive=b"", revision="r7", serial=7, created=0.0, digest="", keys=keys, scope="sidecar")
        return configuration(handed, path)


@pytest.fixture
def release(opa: Path, tmp_path: Path) -> Release:
    return Release(opa, tmp_path)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], *, extra: bytes | None = None) -> Path:
    """Pack the archive anew with `change` made to each file (None leaves it out)."""
    packed = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in old.getmembers():
            file = old.extractfile(member)
            assert file is not None
            content = change(member.name, file.read())
            if content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        if extra is not None:
            member = tarfile.TarInfo("/sidecar/extra.rego")
            member.size = len(extra)
            new.addfile(member, io.BytesIO(extra))
    path.write_bytes(gzip.compress(packed.getvalue()))
    return path


def flipped(name: str) -> Callable[[Path], Path]:
    """Change one byte of a file, so that it still means something."""
    old, new = {
        "/.manifest": (b'"serial":7', b'"serial":8'),
        "/data.json": (b"/budget/*", b"/badget/*"),
        "/sidecar/inbound/inbound.rego": (b'["granted", role]', b'["grunted", role]'),
    }[name]

    def change(found: str, content: bytes) -> bytes:
        if found != name:
            return content
        assert old in content
        return content.replace(old, new)

    return lambda path: rewrite(path, change)


def torn(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def unsigned(path: Path) -> Path:
    return rewrite(path, lambda name, content: None if name == "/.signatures.json" else content)


def extended(path: Path) -> Path:
    return rewrite(path, lambda _, content: content, extra=b"package sidecar.extra\n")


def shortened(path: Path) -> Path:
    return rewrite(path, lambda name, content: None if name == "/data.json" else content)


def test_signed_library_decides_under_its_revision(release: Release) -> None:
    built = release.build()
    with running(release.opa, release.accepted_by(built)) as opa:
        assert opa.bundle()["active_revision"] == "r7"
        seen = {}
        for question in INPUT["examples"]:
            answer = opa.ask(question)
            assert answer["provenance"]["bundles"]["sidecar"]["revision"] == "r7"
            if "result" in answer:
                jsonschema.validate(answer["result"], ANSWER)
                seen[question["direction"], question["tls"]] = (answer["result"]["allow"], answer["result"]["rule"])
    assert seen == {
        ("inbound", True): (True, "rbac/submitters"),
        ("inbound", False): (False, "rbac/anonymous"),
        ("outbound", True): (True, "outbound/route/backend"),
        ("outbound", False): (False, "outbound/plaintext"),
        ("egress", True): (False, "egress/unbound"),
        ("fleet", True): (False, "fleet/unbound"),
    }


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (flipped("/.manifest"), "digest mismatch"),
        (flipped("/data.json"), "digest mismatch"),
        (flipped("/sidecar/inbound/inbound.rego"), "digest mismatch"),
        (torn, ""),
        (unsigned, "missing .signatures.json"),
        (extended, "not included in bundle signature"),
        (shortened, "specified in bundle signatures but not found"),
    ],
    ids=["manifest flipped", "data flipped", "rule flipped", "torn", "unsigned", "file added", "file removed"],
)
def test_changed_bundle_is_refused(release: Release, tamper: Callable[[Path], Path], complaint: str) -> None:
    refused(release, tamper(release.build()), complaint)


def test_bundle_signed_by_another_key_is_refused(release: Release, tmp_path: Path) -> None:
    stranger, _ = bundle.make_keys(tmp_path / "stranger")
    refused(release, release.build(private_key_path=stranger), "failed to verify JWT signature")


def test_bundle_of_an_unknown_key_id_is_refused(release: Release) -> None:
    refused(release, release.build(key_id="release-2"), "release-2")


def test_bundle_of_another_scope_is_refused(release: Release) -> None:
    refused(release, release.build(scope="elsewhere"), "scope mismatch")


def refused(release: Release, path: Path, complaint: str) -> None:
    with running(release.opa, release.accepted_by(path)) as opa:
        state = opa.bundle()
        assert not state.get("active_revision")
        assert complaint in json.dumps(state)
        assert "result" not in opa.ask(INPUT["examples"][0])


def test_bundle_holds_rules_and_data_without_tests_and_schemas(release: Release) -> None:
    with tarfile.open(release.build(serial=12, revision="r12")) as archive:
        assert set(archive.getnames()) == FILES
        manifest = json.load(archive.extractfile("/.manifest"))  # type: ignore[arg-type]
        assert json.load(archive.extractfile("/data.json")) == DATA  # type: ignore[arg-type]
    assert (manifest["revision"], manifest["roots"], manifest["metadata"]["serial"]) == ("r12", ["sidecar", "team"], 12)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": {"sidecar": {"rbac": {"patterns": {"spiffe://*/a": []}}}}}, "not a SPIFFE ID pattern: spiffe://*/a"),
        ({"data": {"elsewhere": 1}}, "elsewhere"),
        ({"private_key_path": Path("missing.key")}, "PEM"),
    ],
    ids=["malformed data", "outside the roots", "no key"],
)
def test_failed_build_leaves_the_old_bundle(release: Release, changes: dict[str, Any], complaint: str) -> None:
    built = release.build()
    before = built.read_bytes()
    with pytest.raises(bundle.NotBuilt) as caught:
        release.build(**changes)
    assert complaint in str(caught.value)
    assert built.read_bytes() == before
    assert [path.name for path in built.parent.iterdir()] == ["bundle.tar.gz"]


def test_rules_that_do_not_compile_are_not_signed(release: Release, tmp_path: Path) -> None:
    copy = shutil.copytree(POLICIES, tmp_path / "policies")
    (copy / "sidecar/inbound/extra.rego").write_text("package sidecar.inbound\n\nx := unknown_function(1)\n")
    with pytest.raises(bundle.NotBuilt, match="unknown_function"):
        release.build(policy_dir=copy)


def test_private_key_is_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    private, public = bundle.make_keys(tmp_path)
    before = private.read_bytes()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PUBLIC" in public.read_bytes()
    with pytest.raises(FileExistsError):
        bundle.make_keys(tmp_path)
    assert private.read_bytes() == before


def _break_the_source(live: sidecars.Live) -> Path:
    """One bit of its bundle; returns the configuration."""
    config = live.directory / "sidecar.yaml"
    source = live.directory / json.loads(config.read_text())["policy"]["source"]
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    return config


def test_a_refused_start_names_the_key_of_the_configuration(tmp_path: Path, opa: Path) -> None:
    """Through the program itself: exit code 1, one sentence, no traceback, and the dotted path."""
    with sidecars.running(tmp_path, opa) as live:
        pass
    config = _break_the_source(live)
    shutil.rmtree(live.directory / "state")
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "run", "--config", str(config)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "policy.source: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_restart_whose_source_is_broken_runs_the_last_good_bundle_and_says_so(tmp_path: Path, opa: Path) -> None:
    with sidecars.running(tmp_path, opa) as live:
        pass
    config = _break_the_source(live)
    process = subprocess.Popen(
        [sys.executable, "-m", "sidecar", "run", "--config", str(config)], stderr=subprocess.PIPE, text=True
    )
    seen: list[dict[str, Any]] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            seen.append(json.loads(line))
            if seen[-1]["event"] == "sidecar.started":
                break
    finally:
        process.terminate()
        process.communicate(timeout=60)
    events = {one["event"]: one for one in seen}
    assert "sidecar.started" in events, seen
    assert events["bundle.refused"]["code"] == "bundle_malformed"
    assert events["bundle.activated"]["serial"] == 1
