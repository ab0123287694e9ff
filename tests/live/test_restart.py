"""Restarts of the real thing: a successor under load, one that cannot start, and the old way with sockets held by somebody."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lanes.restart import perform, start
from support import live as stage
from support.live import Live, exchange, status

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
GOOD = b"GET /good HTTP/1.1\r\nHost: backend.internal\r\n\r\n"
PATIENCE = 40.0


def test_a_restart_under_load_loses_and_doubles_nothing(opa: Path, tmp_path: Path) -> None:
    outcome = perform(tmp_path, opa, restarts=1, calm=0.5, say=lambda _line: None)
    assert outcome.complaints == []
    assert outcome.restarts == 1
    for kind in ("kept", "new", "agent", "agentnew", "h2", "slow", "pausing"):
        assert outcome.tally.answered[kind] > 0, kind


@pytest.fixture
def live(opa: Path, tmp_path: Path) -> Iterator[Live]:
    with stage.running(tmp_path, opa, timeouts={"drain_idle": 0.5}) as running:
        yield running


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _serves(live: Live) -> bool:
    with live.connect() as sock:
        return status(exchange(sock, GOOD)) == 200


def _events(live: Live, name: str) -> list[dict[str, object]]:
    lines = (live.directory / "sidecar.log").read_text().splitlines()
    return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]


def test_the_command_of_the_guide_is_all_that_it_takes(live: Live) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/restart.md").read_text(), re.MULTILINE | re.DOTALL)
    [command] = blocks
    search = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (live.directory / "sidecar.log").open("ab") as log:
        successor = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=live.directory, env=search, stderr=log)
    with ended(successor):
        assert live.process.wait(PATIENCE) == 0
        assert _serves(live)
        assert successor.poll() is None
        assert _events(live, "handover.completed")[0]["pid"] == successor.pid
        assert _events(live, "handover.received")[0]["pid"] == live.process.pid
    assert successor.returncode == 0
    assert not list((live.directory / "state" / "handover").iterdir())


def test_a_successor_that_cannot_start_leaves_the_old_one_as_it_was(live: Live) -> None:
    bundle, last_good = live.directory / "policy/bundle.tar.gz", live.directory / "state/policy/last-good.tar.gz"
    good = bundle.read_bytes()
    bundle.write_bytes(good[:-40] + bytes(40))
    last_good.unlink()  # else it would start with that
    try:
        assert start(live.directory).wait(PATIENCE) == 1
    finally:
        bundle.write_bytes(good)
    assert live.process.poll() is None
    assert _serves(live)
    assert len(_events(live, "handover.abandoned")) == 1
    with ended(start(live.directory)):
        assert live.process.wait(PATIENCE) == 0
        assert _serves(live)


def test_a_successor_that_is_killed_while_it_starts_leaves_the_old_one_as_it_was(live: Live) -> None:
    successor = start(live.directory)
    until = time.monotonic() + PATIENCE
    while not _events(live, "handover.asked") and time.monotonic() < until:
        time.sleep(0.01)
    successor.kill()
    successor.wait(PATIENCE)
    while not _events(live, "handover.abandoned") and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(20):
        assert _serves(live)
    assert live.process.poll() is None


def test_two_successors_at_once_follow_each_other(live: Live) -> None:
    with ended(start(live.directory)) as one, ended(start(live.directory)) as other:
        assert live.process.wait(PATIENCE) == 0
        until = time.monotonic() + PATIENCE
        while one.poll() is None and other.poll() is None and time.monotonic() < until:
            assert _serves(live)
        assert {one.poll(), other.poll()} == {None, 0}
        assert _serves(live)


def test_another_state_dir_is_no_successor_and_is_told_so(live: Live) -> None:
    path = live.directory / "sidecar.yaml"
    path.write_text(path.read_text().replace('"state_dir": "state"', '"state_dir": "elsewhere"'))
    with (live.directory / "errors").open("wb") as errors:
        command = [Path(sys.executable).with_name("sidecar"), "run", "--config", path]
        assert subprocess.run(command, stderr=errors, check=False, timeout=PATIENCE).returncode == 1
    assert "same state_dir" in (live.directory / "errors").read_text()
    assert _serves(live)


def test_sockets_that_are_held_for_us_outlast_us(opa: Path, tmp_path: Path) -> None:
    """As a service manager does it: whoever comes while nobody runs waits in the queue."""
    with stage.running(tmp_path, opa) as live, ExitStack() as stack:
        live.process.terminate()
        assert live.process.wait(PATIENCE) == 0
        ports = [live.ports["strict"], live.ports["permissive"], live.ports["h2c"], live.ports["outbound"], live.health]
        held = [stack.enter_context(socket.create_server(("127.0.0.1", port))) for port in ports]
        descriptors = [one.fileno() for one in held]
        waiting = socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE)
        command = stage.handed(descriptors, tmp_path / "sidecar.yaml")
        for number in range(2):
            with (tmp_path / "sidecar.log").open("ab") as log:
                process = subprocess.Popen(command, stderr=log, pass_fds=descriptors)
            with ended(process):
                with live.context("http/1.1").wrap_socket(waiting, server_hostname=stage.HOST) as secured:
                    assert status(exchange(secured, GOOD)) == 200, number
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == 0
            waiting = socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE)
        waiting.close()
