"""The order in which OPA is looked for, with stand-ins for OPA and Go, and downloads from a server on loopback."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sidecar.decision import install
from sidecar.errors import OperatorFault

OPA = b"#!/bin/sh\necho 'Version: 1.22.0'\n"
GO = """#!/bin/sh
echo "$@ GOBIN=$GOBIN GOROOT=$GOROOT GOTOOLCHAIN=$GOTOOLCHAIN CGO_ENABLED=$CGO_ENABLED GOFLAGS=$GOFLAGS" >> {log}
case $1 in
version) echo "go version {version} linux/amd64" ;;
install) {install} ;;
esac
"""
BUILDS = "printf \"#!/bin/sh\\necho 'Version: 1.22.0'\\n\" > $GOBIN/opa"


class Machine:
    """A machine that has nothing yet."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.log = root / "go.log"
        self.told: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.delenv("GOFLAGS", raising=False)
        monkeypatch.setattr(install.importlib.util, "find_spec", lambda _: None)

    def script(self, path: Path, text: str | bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(0o755)
        return path

    def go(self, version: str = "go1.26.6", builds: str = BUILDS, at: Path | None = None) -> Path:
        text = GO.format(version=version, install=builds, log=self.log)
        return self.script(at or self.bin / "go", text)

    def wheel(self, version: str = "go1.26.6", builds: str = BUILDS) -> Path:
        from importlib.machinery import ModuleSpec

        package = self.root / "site-packages/go"
        spec = ModuleSpec("go", None, origin=str(package / "__init__.py"))
        self._monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: spec if name == "go" else None)
        return self.go(version, builds, package / "bin/go")

    def install(self, **how: str) -> Path:
        return install.install(report=self.told.append, **how)

    def refused(self, code: str = "opa_not_installed", **how: str) -> str:
        with pytest.raises(OperatorFault) as caught:
            self.install(**how)
        assert caught.value.code == code
        assert install.find() is None
        left = [path.name for path in install.place().parent.iterdir() if path.name != ".lock"]
        assert left == []
        return str(caught.value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", ["1.22.0", "1.22.1", "1.30.0"])
def test_an_opa_on_path_comes_first(machine: Machine, version: str) -> None:
    there = machine.script(machine.bin / "opa", f"#!/bin/sh\necho 'Version: {version}'\n")
    machine.go()
    assert install.find() == there
    assert machine.install() == there
    assert not machine.log.exists()
    assert not (machine.root / "cache").exists()


@pytest.mark.parametrize("says", ["Version: 1.21.9", "Version: 2.0.0", "Version: 0.70.0", "hello", "Version: 1.22"])
def test_an_opa_on_path_that_is_too_old_or_no_opa_is_passed_over(machine: Machine, says: str) -> None:
    machine.script(machine.bin / "opa", f"#!/bin/sh\necho '{says}'\n")
    assert install.find() is None
    machine.go()
    assert machine.install() == install.place() == install.find()


def test_an_opa_that_cannot_run_is_none(machine: Machine) -> None:
    machine.script(machine.bin / "opa", b"\x7fELF not really")
    assert install.find() is None
    machine.script(machine.bin / "opa", "#!/bin/sh\necho 'Version: 1.22.0'\nexit 1\n")
    assert install.find() is None


def test_the_cache_is_kept_by_version_and_architecture(machine: Machine) -> None:
    machine.script(install.place("1.22.0"), OPA)
    assert machine.install() == install.place("1.22.0")
    assert install.find("1.23.0") is None
    assert install.place("1.22.0").parent.name.startswith("opa-1.22.0-")
    assert install.place("1.22.0").parent.parent == machine.root / "cache/policy-sidecar"


def test_without_a_cache_of_its_own_it_is_in_the_home_directory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(machine.root))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert install.place().is_relative_to(machine.root / ".cache/policy-sidecar")


# ── built ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_go_on_path_builds_it(machine: Machine) -> None:
    machine.go()
    machine.wheel()
    assert machine.install() == install.place()
    assert os.access(install.place(), os.X_OK)
    command = machine.log.read_text().splitlines()[-1]
    assert command.startswith("install github.com/open-policy-agent/opa@v1.22.0 ")
    assert "GOTOOLCHAIN=local CGO_ENABLED=0 GOFLAGS=-trimpath" in command
    assert "GOROOT= " in command
    assert any("building OPA 1.22.0" in line for line in machine.told)
    assert sorted(path.name for path in install.place().parent.iterdir()) == [".lock", "opa"]


@pytest.mark.parametrize("version", ["go1.25.9", "go1.9", "devel"])
def test_a_go_that_is_too_old_is_passed_over_for_the_wheel(machine: Machine, version: str) -> None:
    machine.go(version)
    go = machine.wheel()
    assert machine.install() == install.place()
    assert f"GOROOT={go.parent.parent} " in machine.log.read_text()


def test_a_build_that_fails_goes_on_to_the_wheel(machine: Machine) -> None:
    machine.go(builds="echo 'dial tcp: no network' >&2; exit 1")
    machine.wheel()
    assert machine.install() == install.place()
    assert any("dial tcp: no network" in line for line in machine.told)


@pytest.mark.parametrize("builds", [":", "printf '#!/bin/sh\\necho Version: 1.20.0\\n' > $GOBIN/opa"])
def test_what_was_built_has_to_be_what_was_asked_for(machine: Machine, builds: str) -> None:
    machine.go(builds=builds)
    machine.refused()


def test_without_any_way_each_reason_is_told_and_the_command_that_helps(machine: Machine) -> None:
    said = machine.refused()
    assert "no Go on PATH" in said
    assert "uv sync --group toolchain" in said
    assert "--sha256" in said


def test_a_wheel_without_its_go_is_not_used(machine: Machine) -> None:
    machine.wheel().unlink()
    assert "uv sync --group toolchain" in machine.refused()


def test_two_installs_at_once_build_once(machine: Machine) -> None:
    gate = machine.root / "gate"
    os.mkfifo(gate)
    machine.go(builds=f"read line < {gate}; {BUILDS}")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(machine.install())) for _ in range(2)]
    for thread in threads:
        thread.start()
    with gate.open("w") as file:  # waits until one of them builds
        file.write("go\n")
    for thread in threads:
        thread.join(timeout=30)
    assert found == [install.place()] * 2
    assert machine.log.read_text().count("install ") == 1


def test_a_version_is_a_version(machine: Machine) -> None:
    for version in ("latest", "1.22", "../../x", "1.22.0\n"):
        with pytest.raises(OperatorFault):
            machine.install(version=version)


# ── downloaded ────────────────────────────────────────────────────────────────────────────────────────────────────


class Release(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
        elif self.path in ("/whole", "/short"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(OPA) + (self.path == "/short")))
            self.end_headers()
            self.wfile.write(OPA)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def release() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Release,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


DIGEST = hashlib.sha256(OPA).hexdigest()


@pytest.mark.parametrize("path", ["/whole", "/moved"])
def test_a_download_with_the_right_digest_is_installed(
    machine: Machine, release: tuple[str, list[str]], path: str
) -> None:
    assert machine.install(sha256=DIGEST.upper(), url=release[0] + path) == install.place()
    assert install.place().read_bytes() == OPA
    assert install.place().stat().st_mode & 0o777 == 0o755
    assert install.find() == install.place()


def test_a_download_with_another_digest_is_removed(machine: Machine, release: tuple[str, list[str]]) -> None:
    said = machine.refused("opa_digest_differs", sha256="0" * 64, url=release[0] + "/whole")
    assert DIGEST in said


def test_a_download_that_ends_early_is_removed(machine: Machine, release: tuple[str, list[str]]) -> None:
    assert "ended after" in machine.refused(sha256=DIGEST, url=release[0] + "/short")


def test_a_release_that_is_not_there(machine: Machine, release: tuple[str, list[str]]) -> None:
    assert "404" in machine.refused(sha256=DIGEST, url=release[0] + "/none")


def test_nothing_is_downloaded_without_a_digest(machine: Machine, release: tuple[str, list[str]]) -> None:
    machine.refused(url=release[0] + "/whole")
    machine.refused(url=release[0] + "/whole", sha256="abc")
    assert release[1] == []


def test_nothing_is_taken_from_a_file(machine: Machine) -> None:
    local = machine.script(machine.root / "local", OPA)
    machine.refused(url=local.as_uri(), sha256=DIGEST)


def test_a_build_comes_before_a_download(machine: Machine, release: tuple[str, list[str]]) -> None:
    machine.go()
    assert machine.install(sha256=DIGEST, url=release[0] + "/whole") == install.place()
    assert release[1] == []


def test_every_pinned_digest_is_one() -> None:
    for (version, architecture), digest in install.DIGESTS.items():
        assert version.count(".") == 2
        assert architecture in ("amd64", "arm64")
        assert len(bytes.fromhex(digest)) == 32
