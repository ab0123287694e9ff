"""A fleet in miniature, all of it real: releases made on the command line, a bundle server, sidecars with OPA, and traffic on them.

    releases ──▶ bundle server ══ mTLS ══▶ sidecar one, two, three ◀══ mTLS ══ the caller, all the time
                                               │
                                             agent

The caller asks each sidecar for a path that policy allows and for one that it denies, over and over, and every answer that is
not the expected one is kept. Which revision decided stands in the access log of the sidecar.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from examples.demo import kit
from support.bundle_server import ROOT, SERVER, Site
from support.live import START_TIMEOUT, client_context, free_port

CALLER = "agent/caller"
ALLOWED, SEALED = "/budget/list", "/budget/sealed"
PAUSE = 0.2
"""Seconds between two requests to a sidecar, while nobody measures."""
BRISK = 0.01


def run(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`sidecar …`. Raises AssertionError with what it said where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 or not check, f"sidecar {' '.join(map(str, arguments))}: {done.stderr}"
    return done


# ── releases ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Releases:
    """Where bundles are made: a key pair `release-1` and one that nobody knows, rules of the library, data by hand."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.key, self.strange_key = directory / "release-1.key", directory / "strange.key"
        for key in (self.key, self.strange_key):
            run("bundle", "keygen", key)

    @property
    def public(self) -> Path:
        return self.key.with_suffix(".pub")

    def data(self, name: str, readers: Sequence[str]) -> Path:
        """Who may do what: the caller may GET these paths, and never what is sealed."""
        roles = {
            "readers": {
                "allow": [{"methods": ["GET"], "paths": list(readers)}],
                "deny": [{"methods": ["*"], "paths": [SEALED]}],
            }
        }
        rbac = {"roles": roles, "bindings": {f"spiffe://example.org/{CALLER}": ["readers"]}}
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps({"sidecar": {"rbac": rbac}}))
        return path

    def build(
        self, serial: int, readers: Sequence[str] = ("/budget/**",), *, returns: Sequence[int] = (),
        until: float | None = None, revision: str = "", name: str = "", **how: str | Path | None,
    ) -> Path:  # fmt: skip
        """Build and sign with one command. Raises AssertionError. `how`: key (None: unsigned), scope, created."""
        revision = revision or f"r{serial}"
        output = self.directory / f"{name or revision}.tar.gz"
        command: list[str | Path] = [
            "bundle", "build", "--data", self.data(revision, readers), "--revision", revision, "--serial", str(serial), "-o", output,
        ]  # fmt: skip
        if (key := how.pop("key", self.key)) is not None:
            command += ["--key", key, "--key-id", "release-1"]
        for one in returns:
            command += ["--may-return-to", str(one)]
        if returns:
            command += ["--return-until", datetime.fromtimestamp(until or time.time() + 3600, UTC).isoformat()]
        for option, value in how.items():
            command += [f"--{option}", str(value)]
        run(*command)
        return output


# ── the agent and who asks it ─────────────────────────────────────────────────────────────────────────────────────


class Agent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def agent() -> Iterator[int]:
    """An agent that answers everything; its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Agent) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class Traffic:
    """The caller at one sidecar, in a thread of its own. `amiss`: what was answered otherwise than it should have been."""

    def __init__(self, side: Side, context: ssl.SSLContext) -> None:
        self.pause = PAUSE
        self.answered = 0
        self.amiss: list[str] = []
        self._side = side
        self._context = context
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(START_TIMEOUT)

    def _run(self) -> None:
        way: http.client.HTTPSConnection | None = None
        while not self._stopping.is_set():
            way = way or http.client.HTTPSConnection("127.0.0.1", self._side.port, context=self._context, timeout=10)
            for path, expected in ((ALLOWED, 200), (SEALED, 403)):
                try:
                    way.request("GET", path)
                    answer = way.getresponse()
                    answer.read()
                except (OSError, http.client.HTTPException) as error:
                    self.amiss.append(f"{self._side.name}: {path}: {error!r}")
                    way.close()
                    way = None
                    break
                self.answered += 1
                if answer.status != expected:
                    self.amiss.append(f"{self._side.name}: {path}: {answer.status}, not {expected}")
            self._stopping.wait(self.pause)
        if way is not None:
            way.close()


# ── sidecars ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Side:
    """One sidecar, started and ended as often as wanted."""

    name: str
    directory: Path
    port: int
    health: int
    config: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    visits: list[Traffic] = field(default_factory=list)
    """The caller, once more after each restart; only the last of them may be asking."""
    _read: int = 0
    _decided: list[tuple[float, str, str, int]] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(visit.answered for visit in self.visits)

    def pace(self, pause: float) -> None:
        """So many seconds between two requests from now on."""
        for visit in self.visits:
            visit.pause = pause

    def write(self, **policy: Any) -> None:
        """Write the configuration, with these keys of `policy` changed; None leaves one out."""
        whole = {**self.config, "policy": {**self.config["policy"], **policy}}
        whole["policy"] = {name: value for name, value in whole["policy"].items() if value is not None}
        (self.directory / "sidecar.yaml").write_text(json.dumps(whole, indent=1))

    def start(self) -> None:
        with (self.directory / "sidecar.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "run", "--config", str(self.directory / "sidecar.yaml")],
                stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(START_TIMEOUT)

    def hush(self) -> None:
        """Let nobody ask any more."""
        for visit in self.visits:
            visit.stop()

    def close(self) -> None:
        self.hush()
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.end()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def ready(self) -> tuple[int, str]:
        way = http.client.HTTPConnection("127.0.0.1", self.health, timeout=5)
        try:
            way.request("GET", "/readyz")
            answer = way.getresponse()
            return answer.status, answer.read().decode().strip()
        except OSError:
            return 0, ""
        finally:
            way.close()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.directory / "sidecar.log").read_text().splitlines()
        return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]

    def decided(self) -> list[tuple[float, str, str, int]]:
        """Of each exchange that policy decided: when it ended, by which revision, the path and what was answered."""
        try:
            with (self.directory / "access.log").open("rb") as log:
                log.seek(self._read)
                lines = log.read().splitlines(keepends=True)
        except FileNotFoundError:
            return self._decided
        for line in lines:
            if line.endswith(b"\n"):
                self._read += len(line)
                said = json.loads(line)
                if said["event"] == "exchange.ended" and said["revision"] is not None:
                    at = datetime.fromisoformat(said["ts"]).timestamp()
                    self._decided.append((at, said["revision"], said["path"], said["status"]))
        return self._decided

    def first_by(self, revision: str, after: float) -> float | None:
        """When the first request after `after` (Unix seconds) was answered by this revision; None where none was yet."""
        return next((at for at, found, *_ in self.decided() if found == revision and at >= after), None)

    def runs(self) -> str | None:
        """The revision that decided last."""
        found = self.decided()
        return found[-1][1] if found else None


class SmallFleet:
    """The site of a bundle server, and sidecars that take their policy from it."""

    def __init__(self, directory: Path, opa: Path) -> None:
        self.directory = directory
        self.releases = Releases(directory / "releases")
        self.site = Site(directory, opa)
        key = {"algorithm": "ES256", "file": str(self.releases.public)}
        self.server = self.site.server(bundles={"sidecar": {"keys": {"release-1": key}}})
        self.sides: dict[str, Side] = {}

    def side(self, name: str, agent_port: int, labels: Mapping[str, str]) -> Side:
        """One more sidecar, not started; its configuration is written."""
        directory = self.directory / name
        kit.write(directory, self.site.ca.svid(f"/agent/{name}"), {"example.org": self.site.ca.bundle_pem})
        port, health = free_port(), free_port()
        config = {
            "mtls_mode": "strict",
            "identity": {
                "certificate": "svid.pem", "key": "svid_key.pem", "bundles": {"example.org": "bundle-example.org.pem"},
            },
            "inbound": [{"listen": f"127.0.0.1:{port}", "upstream": f"http://127.0.0.1:{agent_port}"}],
            "policy": {
                "source": f"https://127.0.0.1:{self.server.port}/v1/bundles/sidecar", "spiffe_ids": [SERVER],
                "keys": {"release-1": {"algorithm": "ES256", "file": str(self.releases.public)}},
                "shadow": {"sample": 1.0}, "report": True,
            },
            "labels": dict(labels),
            "health": {"listen": f"127.0.0.1:{health}"},
            "log": {"access": "access.log"},
        }  # fmt: skip
        side = Side(name=name, directory=directory, port=port, health=health, config=config)
        side.write()
        self.sides[name] = side
        return side

    def ask(self, side: Side) -> int:
        """What the caller is answered there, once."""
        context = client_context(self.site.caller(CALLER).certificate.parent)
        way = http.client.HTTPSConnection("127.0.0.1", side.port, context=context, timeout=10)
        try:
            way.request("GET", ALLOWED)
            return way.getresponse().status
        finally:
            way.close()

    def visit(self, side: Side) -> None:
        """Begin to put traffic on it."""
        side.visits.append(Traffic(side, client_context(self.site.caller(CALLER).certificate.parent)))

    def restart(self, side: Side, **policy: Any) -> None:
        """End it, and start it with these keys of `policy` changed; traffic pauses meanwhile."""
        side.hush()
        assert side.end() == 0
        side.write(**policy)
        side.start()
        until = time.monotonic() + START_TIMEOUT
        while side.ready()[0] != 200:
            assert time.monotonic() < until, f"{side.name} is not ready: {side.ready()[1]}"
            time.sleep(0.05)
        self.visit(side)

    @property
    def amiss(self) -> list[str]:
        """What was answered otherwise than it should have been."""
        return [one for side in self.sides.values() for visit in side.visits for one in visit.amiss]

    @property
    def answered(self) -> int:
        return sum(side.answered for side in self.sides.values())

    def defects(self) -> list[str]:
        """What server and sidecars have said of failures of their own."""
        logs = [self.server.directory / "server.log", *(side.directory / "sidecar.log" for side in self.sides.values())]
        return [
            f"{log.parent.name}: {line}"
            for log in logs
            if log.exists()
            for line in log.read_text("utf-8", "backslashreplace").splitlines()
            if "Traceback" in line or "internal_error" in line or "defect." in line
        ]

    def close(self) -> None:
        for side in self.sides.values():
            side.close()
        self.server.close()
