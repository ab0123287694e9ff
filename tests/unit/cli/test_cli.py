"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import sidecar
from sidecar import cli
from sidecar.config import Config
from sidecar.errors import OperatorFault

SOUND = "mtls_mode: disabled\ninbound: [{}]\nopa: {address: 'unix:///run/opa.sock'}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sidecar.yaml"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for the server, which a test of the command line must not start."""
    module = ModuleType("sidecar.process")
    monkeypatch.setitem(sys.modules, "sidecar.process", module)
    monkeypatch.setattr(sidecar, "process", module, raising=False)
    return module


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    room, module = ModuleType("sidecar.decision"), ModuleType("sidecar.decision.install")
    monkeypatch.setitem(sys.modules, "sidecar.decision", room)
    monkeypatch.setitem(sys.modules, "sidecar.decision.install", module)
    monkeypatch.setattr(room, "install", module, raising=False)
    monkeypatch.setattr(sidecar, "decision", room, raising=False)
    return module


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["check"],
        ["opa"],
        ["fly"],
        ["run", "--config"],
        ["run", "--config", "a", "b"],
        ["opa", "install", "--sha256", "abc"],
    ],
)
def test_what_is_not_a_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: sidecar" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("sidecar ")


def test_run_lets_the_app_read_the_file_and_hands_its_code_back(process: ModuleType, file: Path) -> None:
    read: list[Config] = []

    def run(load: Callable[[], Config]) -> int:
        file.write_text(SOUND)
        read.append(load())
        file.write_text(SOUND + "state_dir: elsewhere\n")
        read.append(load())
        return 7

    process.run = run  # type: ignore[attr-defined]
    assert cli.main(["run", "--config", str(file)]) == 7
    assert [one.state_dir for one in read] == [file.parent / "state", file.parent / "elsewhere"]


def test_run_tells_all_that_is_wrong(process: ModuleType, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SOUND + "zebra: 1\nmtls_mode: off\n")
    process.run = lambda load: load()  # type: ignore[attr-defined]
    assert cli.main(["run", "--config", str(file)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{file}:4: zebra: is not a known key",
        f"{file}:5: mtls_mode: is given twice, first on line 1",
    ]


def test_an_operators_mistake_has_no_traceback(process: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(load: Callable[[], Config]) -> int:
        raise OperatorFault("identity.key: k.pem: is encrypted")

    process.run = run  # type: ignore[attr-defined]
    assert cli.main(["run", "--config", "sidecar.yaml"]) == 1
    assert capsys.readouterr().err == "sidecar: identity.key: k.pem: is encrypted\n"


def test_our_own_mistake_has_one(process: ModuleType) -> None:
    def run(load: Callable[[], Config]) -> int:
        raise RuntimeError("bug")

    process.run = run  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        cli.main(["run", "--config", "sidecar.yaml"])


def test_an_interrupt_is_not_a_traceback(process: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(load: Callable[[], Config]) -> int:
        raise KeyboardInterrupt

    process.run = run  # type: ignore[attr-defined]
    assert cli.main(["run", "--config", "sidecar.yaml"]) == 1
    assert capsys.readouterr().err == "sidecar: interrupted\n"


@pytest.fixture(autouse=True)
def _no_mode_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTLS_MODE", raising=False)


def test_a_configuration_error_names_file_line_and_key(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SOUND + "zebra: 1\n")
    assert cli.main(["check", "--config", str(file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{file}:4: zebra: is not a known key\n")


def test_a_problem_without_line_or_key_is_told_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("")
    assert cli.main(["check", "--config", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}: the file is empty\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"a: \xff\n"), "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read(
    file: Path, make: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(file)
    assert cli.main(["check", "--config", str(file)]) == 1
    assert capsys.readouterr().err == f"sidecar: {file}: {message}\n"


def test_install_prints_the_path_alone(installer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, object] = {}

    def install(*, sha256: str | None, url: str | None, report: Callable[[str], None]) -> Path:
        asked.update(sha256=sha256, url=url)
        report("building")
        return Path("/cache/opa")

    installer.install = install  # type: ignore[attr-defined]
    assert cli.main(["opa", "install", "--sha256", "AB" * 32, "--from", "http://127.0.0.1/opa"]) == 0
    assert asked == {"sha256": "ab" * 32, "url": "http://127.0.0.1/opa"}
    assert capsys.readouterr() == ("/cache/opa\n", "building\n")


def test_a_refused_install_exits_with_1(installer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def install(**_: object) -> Path:
        raise OperatorFault("no Go, and no digest")

    installer.install = install  # type: ignore[attr-defined]
    assert cli.main(["opa", "install"]) == 1
    assert capsys.readouterr() == ("", "sidecar: no Go, and no digest\n")


def test_the_module_is_the_program(file: Path) -> None:
    file.write_text(SOUND + "zebra: 1\n")
    command = [sys.executable, "-m", "sidecar", "check", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"{file}:4: zebra: is not a known key\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_has_read_enough_is_no_defect(file: Path, unbuffered: str) -> None:
    """As `sidecar bundle diff … | head` has it."""
    file.write_text(SOUND)
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", "check", "--config", str(file)], stdout=closed, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False, timeout=60, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_told_in_a_sentence(file: Path, unbuffered: str) -> None:
    file.write_text(SOUND)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", "check", "--config", str(file)], stdout=full, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False, timeout=60, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == [
        "sidecar: No space left on device"
    ]


def test_what_a_server_says_cannot_play_with_the_terminal(
    installer: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(**_: object) -> Path:
        raise OperatorFault("one\n\ttwo\x1b[2J")

    installer.install = install  # type: ignore[attr-defined]
    assert cli.main(["opa", "install"]) == 1
    assert capsys.readouterr() == ("", "sidecar: one\n\ttwo\\x1b[2J\n")


def test_the_command_line_itself_brings_no_server() -> None:
    """`check` and `--version` must not pay for, or fail over, what only `run` needs."""
    heavy = ("trio", "ssl", "h2", "httptools", "cryptography", "tarfile", "httpx")
    program = f"import sys, sidecar.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
