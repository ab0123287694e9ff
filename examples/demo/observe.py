"""Makes the calls with a real curl, and says what came of each. It does not read what was expected.

What curl saw, the agents' own logs and the access logs of both sidecars are put together by the X-Request-Id of the
call, or by curl's end of the connection where there was no request. The logs are read when the sidecars have ended: then
no line is still to come.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.material import Material
from examples.demo.rows import Answer, Opa, Row
from examples.demo.stage import START_TIMEOUT, Stage, Trouble, is_ready, opa_of

CALL_TIMEOUT = 8
_KILL_INTERVAL = 0.005
_IDENTITY_HEADERS = ("x-forwarded-spiffe-id", "x-spiffe-id")
_PROXIES = ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What curl saw."""

    status: int | None
    local: str
    """curl's end of the connection."""
    decision_id: str | None
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    answer: Answer
    reason: str | None
    decision_id: str | None
    logs: Mapping[str, str]
    """Side → id of the line in its access log: of the exchange, or of the connection where there was none."""


class Curl:
    """The real one. Raises `Trouble` where there is none."""

    def __init__(self) -> None:
        if shutil.which("curl") is None:
            raise Trouble("curl is needed and was not found: install it first (`apt-get install curl`)")
        said = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True, timeout=CALL_TIMEOUT)
        self.speaks_http2 = "HTTP2" in said.stdout.split()

    def can(self, row: Row) -> bool:
        return self.speaks_http2 or "--http2" not in row.curl

    def call(self, material: Material, row: Row) -> Call:
        with tempfile.TemporaryDirectory() as place:
            headers = Path(place) / "headers"
            wanted = ["-o", os.devnull, "-D", str(headers), "-w", "%{http_code} %{local_ip}:%{local_port}"]
            done = subprocess.run(
                ["curl", "-q", "-sS", "--max-time", str(CALL_TIMEOUT), *wanted, *arguments(material, row)],
                capture_output=True, text=True, check=False, timeout=CALL_TIMEOUT + 10,
            )  # fmt: skip
            head = headers.read_text(errors="replace") if headers.exists() else ""
        status, _, local = done.stdout.partition(" ")
        fields = dict(line.lower().split(": ", 1) for line in head.splitlines() if ": " in line)
        return Call(
            status=int(status) or None, local=local, decision_id=fields.get("x-decision-id"), error=done.stderr.strip()
        )


def arguments(material: Material, row: Row) -> list[str]:
    """curl's arguments for a call. `-k`: curl knows host names only, and an SVID holds none."""
    given = ["--noproxy", "*"] if any(name in os.environ for name in _PROXIES) else []
    given += ["-X", row.method] if row.method != "GET" else []
    given += ["-H", f"X-Request-Id: {row.name}", *row.curl]
    if row.tls:
        given.append("-k")
    if row.svid_of is not None:
        svid = material.svid(row.svid_of)
        given += ["--cert", shown(svid.certificate), "--key", shown(svid.key)]
    return [*given, f"{'https' if row.tls else 'http'}://{material.address(row.at)}{row.path}"]


def line(material: Material, row: Row) -> str:
    """The call as somebody would type it."""
    typed = shlex.join(["curl", "-i", *arguments(material, row)])
    if row.opa != "killed":
        return typed
    return f"kill -9 $(pgrep -P $(cat {shown(material.sides['b'].directory / 'sidecar.pid')}) -x opa); {typed}"


def shown(path: Path) -> str:
    """Relative to where we are, if it lies there."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def calls(stage: Stage, material: Material, rows: Sequence[Row], curl: Curl) -> dict[str, Call]:
    """Make them one after the other. Returns them by the rows' names."""
    made = {}
    for row in rows:
        with _opa(stage, material, row.opa):
            made[row.name] = curl.call(material, row)
    return made


@contextmanager
def _opa(stage: Stage, material: Material, state: Opa) -> Iterator[None]:
    side = material.sides["b"]
    if state == "back":
        stage.wait_ready("sidecar-b", side.health, side.directory / "sidecar.log")
    with _kept_dead(stage, side.health) if state == "killed" else nullcontext():
        yield


@contextmanager
def _kept_dead(stage: Stage, health: str) -> Iterator[None]:
    """Kill B's OPA, and each one that B starts instead, until the call has been made."""
    over = threading.Event()

    def kill() -> None:
        while not over.wait(_KILL_INTERVAL):
            for number in opa_of(stage.started["sidecar-b"][0]):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        give_up_at = time.monotonic() + START_TIMEOUT
        while is_ready(health):
            if time.monotonic() > give_up_at:
                raise Trouble("B is ready although its OPA was killed")
        yield
    finally:
        over.set()
        killer.join()


class Logs:
    """What agents and sidecars wrote, to be read when they have ended."""

    def __init__(self, material: Material) -> None:
        self._lines = {name: _lines(side.access_log) for name, side in material.sides.items()}
        self._agents = [said for side in material.sides.values() for said in _lines(side.directory / "agent.log")]

    def seen(self, row: Row, call: Call) -> Seen:
        found = [(name, said) for name, lines in self._lines.items() for said in lines if _belongs(said, row, call)]
        # The last sidecar is the inbound one where there are two; where there was no request, there is one connection.
        found.sort(key=lambda one: one[1].get("direction", one[1].get("listener")) == "inbound")
        last: Mapping[str, str | None] = found[-1][1] if found else {}
        agent = next((said for said in self._agents if said["headers"].get("x-request-id") == row.name), None)
        decision_id = last.get("decision_id")
        because = last.get("error") or last.get("rule") if "rule" in last else last.get("reason")
        if call.decision_id not in {None, decision_id}:
            because = f"{because}, though the caller was told of decision {call.decision_id}"
        told = [agent["headers"][name] for name in _IDENTITY_HEADERS if name in agent["headers"]] if agent else []
        return Seen(
            answer=Answer(
                status=call.status, because=because, agent=agent["agent"] if agent else None,
                caller=", ".join(told) or None, protocol=last.get("protocol"),
            ),
            reason=(last.get("reason") if "rule" in last else None) or last.get("detail") or call.error,
            decision_id=decision_id,
            logs={name: said.get("exchange_id") or said["connection_id"] for name, said in found},
        )  # fmt: skip


def _belongs(said: Mapping[str, object], row: Row, call: Call) -> bool:
    if said["event"] == "exchange.ended":
        return said["request_id"] == row.name
    return said["remote"] == call.local


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
