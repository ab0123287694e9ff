"""A real `sidecar bundle serve`: certificates, a policy of its own under a real OPA, one process or several, and who asks it."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from examples.demo import bundle as signed
from examples.demo import kit
from support import fleet
from support.fleet import Answered
from support.live import START_TIMEOUT, client_context, free_port

ROOT = Path(__file__).resolve().parents[2]
SERVER = "spiffe://example.org/fleet/server"
PATIENCE = 30.0
PEM = fleet.KEY.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
"""Of the key that signs what is served (`support.fleet.bundle`)."""
GRANTS = {
    "read": ["spiffe://example.org/agent/**"],
    "report": ["spiffe://example.org/agent/**"],
    "look": ["spiffe://example.org/ops/**"],
    "publish": ["spiffe://example.org/ops/release"],
    "promote": ["spiffe://example.org/ops/release"],
}
RINGS = ("canary:label=ring=canary", "all:percent=100")


class Site:
    """What all servers of one fleet share, in a directory, and the callers."""

    def __init__(self, directory: Path, opa: Path) -> None:
        self.directory = directory
        self.opa = opa
        self.ca = kit.CA("example.org")
        private, self._public = signed.make_keys(directory / "admin", "admin-1")
        signed.build(
            directory / "admin", opa=opa, policy_dir=ROOT / "policies" / "rego",
            data={"sidecar": {"bundles": {"sidecar": GRANTS}}}, serial=1, revision="admin-r1",
            private_key_path=private, key_id="admin-1",
        )  # fmt: skip
        (directory / "release-1.pub").write_bytes(PEM)
        self._number = 0

    def caller(self, name: str) -> kit.Written:
        """An SVID for `/name`, with the trust bundle beside it."""
        where = self.directory / "callers" / name.replace("/", "-")
        if not (where / "svid.pem").exists():
            kit.write(where, self.ca.svid(f"/{name}"), {"example.org": self.ca.bundle_pem})
        return kit.Written(
            certificate=where / "svid.pem",
            key=where / "svid_key.pem",
            bundles={"example.org": where / "bundle-example.org.pem"},
        )

    def server(self, **settings: Any) -> BundleServer:
        """The configuration of one more server; with `database` and `store` of another it is beside that."""
        self._number += 1
        where = self.directory / f"server{self._number}"
        kit.write(where, self.ca.svid("/fleet/server", dns=["localhost"]), {"example.org": self.ca.bundle_pem})
        port, health = free_port(), free_port()
        config = {
            "listen": f"127.0.0.1:{port}",
            "health": {"listen": f"127.0.0.1:{health}"},
            "identity": {
                "certificate": "svid.pem", "key": "svid_key.pem", "bundles": {"example.org": "bundle-example.org.pem"},
            },
            "policy": {
                "source": str(self.directory / "admin" / "bundle.tar.gz"),
                "keys": {"admin-1": {"algorithm": "ES256", "file": str(self._public)}},
            },
            "bundles": {"sidecar": {"keys": {"release-1": {"algorithm": "ES256", "file": str(self.directory / "release-1.pub")}}}},
            "log": {"access": "access.log"},
            **settings,
        }  # fmt: skip
        (where / "server.yaml").write_text(json.dumps(config))
        return BundleServer(self, where, port, health)

    def bundle(self, serial: int, **how: Any) -> Path:
        path = self.directory / f"bundle-{serial}.tar.gz"
        path.write_bytes(fleet.bundle(serial, **how))
        return path


class BundleServer:
    """One process, started and ended as often as wanted."""

    def __init__(self, site: Site, directory: Path, port: int, health: int) -> None:
        self.site = site
        self.directory = directory
        self.port = port
        self.health = health
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def log(self) -> str:
        return (self.directory / "server.log").read_text()

    @property
    def access(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "access.log").read_text().splitlines()]

    def start(self, *, ready: bool = True) -> None:
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "bundle", "serve", "--config", str(self.directory / "server.yaml")],
                stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=self.directory,
            )  # fmt: skip
        if ready:
            until(lambda: self.readiness() == (200, "ok"), self)

    def readiness(self) -> tuple[int, str]:
        request = f"http://127.0.0.1:{self.health}/readyz"
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode().strip()
        except OSError:
            return 0, ""

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.end()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────

    def context(self, by: str | None) -> ssl.SSLContext:
        return client_context(None if by is None else self.site.caller(by).certificate.parent)

    def ask(
        self,
        method: str,
        path: str,
        *,
        by: str = "ops/release",
        body: bytes | None = None,
        timeout: float = PATIENCE,
        **fields: str,
    ) -> Answered:
        way = HTTPSConnection("localhost", self.port, context=self.context(by), timeout=timeout)
        try:
            way.request(
                method, path, body=body, headers={name.replace("_", "-"): value for name, value in fields.items()}
            )
            answer = way.getresponse()
            return Answered(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            way.close()

    def get(self, by: str, *, tag: str = "", wait: int = 0, label: str = "") -> Answered:
        fields = {"if_none_match": tag} if tag else {}
        fields |= {"prefer": f"wait={wait}"} if wait else {}
        query = f"?label={label}" if label else ""
        return self.ask("GET", f"/v1/bundles/sidecar{query}", by=by, timeout=wait + PATIENCE, **fields)

    def report(self, by: str, **said: Any) -> Answered:
        return self.ask(
            "POST",
            "/v1/status",
            by=by,
            body=json.dumps({"bundle": "sidecar", **said}).encode(),
            content_type="application/json",
        )

    def command(self, *arguments: str, by: str = "ops/release", server_id: str = SERVER) -> list[str]:
        """`sidecar rollout …` as this caller."""
        who = self.site.caller(by)
        return [
            sys.executable, "-m", "sidecar", "rollout", *arguments, "--certificate", str(who.certificate), "--key",
            str(who.key), "--trust-bundle", f"example.org={who.bundles['example.org']}", "--server", self.url,
            "--server-id", server_id,
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}

    def cli(
        self, *arguments: str, by: str = "ops/release", server_id: str = SERVER
    ) -> subprocess.CompletedProcess[str]:
        """The same, run to its end."""
        return subprocess.run(
            self.command(*arguments, by=by, server_id=server_id), capture_output=True, text=True, timeout=60,
            check=False, env=self.environment,
        )  # fmt: skip

    def done(self, *arguments: str, by: str = "ops/release") -> str:
        """The same, where it has to succeed; what it said."""
        run = self.cli(*arguments, by=by)
        assert run.returncode == 0, run.stderr + self.log
        return run.stdout

    def settle(self, serial: int, **how: Any) -> None:
        """Publish, and bring to everybody."""
        self.done("publish", str(self.site.bundle(serial, **how)))
        self.done("start", str(serial), "--ring", "all:percent=100", "--why", "first")
        self.done("promote", "--gate", "max_behind=off", "--gate", "max_silent_seconds=off", "--why", "for all")


def until(condition: Any, server: BundleServer, patience: float = START_TIMEOUT) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert server.process is None or server.process.poll() is None, server.log
        assert time.monotonic() < end, server.log
        time.sleep(0.05)


@contextmanager
def serving(*servers: BundleServer) -> Iterator[Sequence[BundleServer]]:
    """These, started and at the end ended."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
            server.start()
        yield servers
