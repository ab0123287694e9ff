"""The demo shows what it says: it passes with its own policy, and fails, naming the rows, with any other."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from examples.demo.rows import ROWS

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
ALL = """package sidecar.{direction}

decision := {{"allow": {allow}, "reason": "whoever asks", "rule": "rbac/readers"}}
"""


@pytest.fixture(autouse=True)
def _needs(opa: Path) -> None:
    if shutil.which("curl") is None:
        pytest.fail("the demo needs curl, which is not installed")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    def run(command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _command(command, tmp_path, *options), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )

    yield run
    run("down")


def test_every_row_is_as_expected_and_nothing_is_left_running(demo, tmp_path: Path) -> None:
    done = demo("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {len(ROWS)} rows are as expected" in done.stdout
    assert done.stdout.count(" ✓ ") == len(ROWS)
    assert not _left_over(tmp_path)


def test_allow_all_policy_fails_each_row_that_was_to_be_denied(demo, tmp_path: Path) -> None:
    done = demo("run", "--policies", str(_policies(tmp_path, allow="true")))
    assert done.returncode == 1, done.stdout + done.stderr
    assert _rows(status={403}) <= _named(done.stdout)
    assert done.stdout.count("status: expected 403, seen 200") == len(_rows(status={403}))
    assert not _named(done.stdout) & _rows(status={None, 426, 503}), "what needs no policy does not depend on it"


def test_deny_all_policy_fails_each_row_that_was_to_be_allowed(demo, tmp_path: Path) -> None:
    done = demo("run", "--policies", str(_policies(tmp_path, allow="false")))
    assert done.returncode == 1, done.stdout + done.stderr
    assert _rows(status={200}) <= _named(done.stdout)
    assert done.stdout.count("status: expected 200, seen 403") == len(_rows(status={200}))
    assert not _named(done.stdout) & _rows(status={None, 426}), "what needs no policy does not depend on it"


def test_data_without_bindings_fails_the_rows_that_they_allow(demo, tmp_path: Path) -> None:
    data = json.loads((ROOT / "examples/demo/data.json").read_text())
    data["sidecar"]["rbac"]["bindings"] = {}
    (tmp_path / "data.json").write_text(json.dumps(data))
    done = demo("run", "--data", str(tmp_path / "data.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert {row.what for row in ROWS if row.answer.because == "rbac/readers"} <= _named(done.stdout)


def test_broken_policy_is_told_and_starts_nothing(demo, tmp_path: Path) -> None:
    policies = _policies(tmp_path, allow="true")
    (policies / "inbound.rego").write_text("package sidecar.inbound\n\ndecision := {")
    done = demo("run", "--policies", str(policies))
    assert done.returncode == 1
    assert "demo: opa" in done.stderr
    assert "Traceback" not in done.stderr
    assert not _left_over(tmp_path)


def test_up_stays_until_down_and_its_curl_lines_repeat_the_rows(demo, tmp_path: Path) -> None:
    up = demo("up")
    assert up.returncode == 0, up.stdout + up.stderr
    again = demo("up")
    assert again.returncode == 1
    assert "make demo-down" in again.stderr
    lines = up.stdout.splitlines()
    said = dict(pairwise(lines))
    for row in ROWS:
        if row.opa == "running":
            line = next(said[head] for head in said if head.startswith(f"# {row.what}: "))
            done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
            status = re.match(r"HTTP/\S+ (\d+)", done.stdout)
            assert (int(status[1]) if status else None) == row.answer.status, line
    down = demo("down")
    assert (down.returncode, down.stdout) == (0, "demo: stopped\n"), down.stderr
    assert not _left_over(tmp_path)
    assert "nothing is running" in demo("down").stdout


def test_terminated_run_leaves_nothing_behind(tmp_path: Path) -> None:
    running = subprocess.Popen(_command("run", tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    give_up_at = time.monotonic() + 30
    while not (tmp_path / "demo/b/sidecar.pid").exists() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    sidecar = int((tmp_path / "demo/b/sidecar.pid").read_text())
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert b"told to stop" in errors
    assert not Path(f"/proc/{sidecar}").exists()
    assert not _left_over(tmp_path)


def _command(command: str, tmp_path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "examples.demo", command, "--work", str(tmp_path / "demo"), *options]


def _policies(tmp_path: Path, *, allow: str) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    (directory / ".manifest").write_text('{"roots": ["sidecar"]}')
    for direction in ("inbound", "outbound"):
        (directory / f"{direction}.rego").write_text(ALL.format(direction=direction, allow=allow))
    return directory


def _rows(*, status: set[int | None]) -> set[str]:
    return {row.what for row in ROWS if row.answer.status in status}


def _named(output: str) -> set[str]:
    return set(re.findall(r"^not as expected: (.*)$", output, re.MULTILINE))


def _left_over(tmp_path: Path) -> list[str]:
    """Processes that name this work directory, and its record."""
    found = [str(path) for path in (tmp_path / "demo").glob("running*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(tmp_path) in line:
            found.append(line)
    return found
