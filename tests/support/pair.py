"""Two real sidecars with real OPA, each a process of its own: what enters at A's outbound listener leaves B to the agent.

    client ──http──▶ sidecar A ══ mTLS ══▶ sidecar B ──http──▶ the agent of the test

The agent is a server that the test itself runs, on the address that it is told. Everything listens on loopback addresses
that nothing else uses, so that no port is taken by somebody's outgoing connection between its choice and its use.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo import bundle, kit, stage
from examples.demo.material import Material, Side
from support.live import client_context

HOST_A, HOST_B = "127.0.1.1", "127.0.1.2"
NAME_B = "b.internal"
"""The authority that A's routes ask for, and a DNS name in B's SVID for clients that insist on one."""
ID_A, ID_B = "spiffe://example.org/ns/demo/sa/a", "spiffe://example.org/ns/demo/sa/b"
PATIENCE = 5.0
"""Seconds that anything may take that should happen at once: a machine that is busy is not a failure."""

POLICY = """package sidecar.{direction}

decision := {{"allow": allow, "reason": "not for you", "rule": "test"}} if not "undecided" in input.segments

default allow := true

allow := false if "{forbidden}" in input.segments
"""
"""B denies what is under `/secret`, A what is under `/forbidden`; neither says anything of `/undecided`."""


@dataclass(slots=True)
class Pair:
    work: Path
    outbound: int
    """A's port for its agent, at `HOST_A`."""
    inbound: Mapping[str, int]
    """B's ports at `HOST_B`: `strict`, `plain` (no TLS), and `h2c` (strict, in front of an agent that speaks HTTP/2)."""
    agent: int
    """Where the test's server belongs, at `HOST_B`."""
    ca: kit.CA
    processes: Mapping[str, int]
    _read: dict[Path, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the whole way."""
        return f"http://{HOST_A}:{self.outbound}"

    def context(self, *alpn: str) -> ssl.SSLContext:
        """Of a caller that B knows."""
        return client_context(self.work / "caller", alpn)

    def connect(self, place: str = "outbound", *, alpn: str = "http/1.1", timeout: float = PATIENCE) -> socket.socket:
        """A connection to A's outbound listener, or one that has proven itself to one of B's."""
        if place == "outbound":
            return socket.create_connection((HOST_A, self.outbound), timeout=timeout)
        sock = socket.create_connection((HOST_B, self.inbound[place]), timeout=timeout)
        return sock if place == "plain" else self.context(alpn).wrap_socket(sock, server_hostname=NAME_B)

    def exchanges(self, side: str, path: str) -> list[dict[str, Any]]:
        """What the access log of a sidecar says about a path."""
        lines = (self.work / side / "access.log").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line)).get("path") == path]

    def exchange(self, side: str, path: str) -> dict[str, Any]:
        """The one record about a path, which may be about to be written."""
        wait_until(lambda: self.exchanges(side, path), f"{side} has no record of {path}")
        [record] = self.exchanges(side, path)
        return record

    def rss(self, side: str) -> int:
        """Resident bytes of a sidecar."""
        status = Path(f"/proc/{self.processes[side]}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def defects(self) -> list[str]:
        """What the sidecars have said of failures of their own since they were last asked."""
        found = []
        for side in ("a", "b"):
            for name in ("access.log", "sidecar.log"):
                path = self.work / side / name
                with path.open("rb") as log:
                    log.seek(self._read.get(path, 0))
                    lines = log.read().decode("utf-8", "backslashreplace").splitlines()
                    self._read[path] = log.tell()
                found += [f"{side}: {line}" for line in lines if "internal_error" in line or "Traceback" in line]
        return found


def wait_until(true: Callable[[], object], complaint: str, timeout: float = PATIENCE) -> None:
    """Wait for what another process or thread is about to do."""
    give_up_at = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < give_up_at, complaint
        time.sleep(0.01)


@contextmanager
def running(
    work: Path, opa: Path, *, routes: Sequence[Mapping[str, object]] = (), **settings: object
) -> Iterator[Pair]:
    """Start both, and end them. `routes` stand before A's own; `settings` go into both configurations.

    A's own lead to B over HTTP/2; for the host `h1.internal` over HTTP/1.1, for `h2c.internal` to the agent's h2c, and `/nowhere`
    to a port that nobody listens on.
    """
    ca = kit.CA("example.org")
    trusted = {"example.org": ca.bundle_pem}
    kit.write(work / "a", ca.svid("/ns/demo/sa/a"), trusted)
    kit.write(work / "b", ca.svid("/ns/demo/sa/b", dns=[NAME_B]), trusted)
    kit.write(work / "caller", ca.svid("/ns/demo/sa/caller"), trusted)
    _policy(work, opa)
    ports = {name: _free_port(HOST_B) for name in ("strict", "plain", "h2c", "agent", "closed")}
    outbound, agent = _free_port(HOST_A), f"http://{HOST_B}:{ports['agent']}"
    configs: dict[str, Mapping[str, object]] = {
        "a": {
            "outbound": {
                "listen": f"{HOST_A}:{outbound}",
                "routes": [
                    *routes,
                    _route(ports["closed"], path="/nowhere"),
                    _route(ports["h2c"], host="h2c.internal"),
                    _route(ports["strict"], host="h1.internal", protocol="h1"),
                    _route(ports["strict"]),
                ],
            }
        },
        "b": {
            "inbound": [
                {"listen": f"{HOST_B}:{ports['strict']}", "upstream": agent},
                {"listen": f"{HOST_B}:{ports['plain']}", "upstream": agent, "mtls_mode": "disabled"},
                {"listen": f"{HOST_B}:{ports['h2c']}", "upstream": {"url": agent, "protocol": "h2c"}},
            ]
        },
    }
    sides = {name: _side(work, name, config, settings) for name, config in configs.items()}
    with stage.claimed(work) as staged:
        staged.start(Material(work=work, sides=sides))
        processes = {name: staged.started[f"sidecar-{name}"][0] for name in sides}
        yield Pair(
            work=work, outbound=outbound, inbound={name: ports[name] for name in ("strict", "plain", "h2c")},
            agent=ports["agent"], ca=ca, processes=processes,
        )  # fmt: skip


def _route(port: int, **which: str) -> dict[str, object]:
    return {**which, "target": f"{HOST_B}:{port}", "authority": NAME_B, "spiffe_ids": [ID_B]}


def _policy(work: Path, opa: Path) -> None:
    rego = work / "rego"
    rego.mkdir()
    for direction, forbidden in (("inbound", "secret"), ("outbound", "forbidden")):
        (rego / f"{direction}.rego").write_text(POLICY.format(direction=direction, forbidden=forbidden))
    (rego / ".manifest").write_text('{"roots": ["sidecar"]}')
    private, _ = bundle.make_keys(work / "policy", "test-1")
    bundle.build(
        work / "policy", opa=opa, policy_dir=rego, data={"sidecar": {}}, serial=1, revision="test-1",
        private_key_path=private, key_id="test-1",
    )  # fmt: skip


def _side(work: Path, name: str, config: Mapping[str, object], settings: Mapping[str, object]) -> Side:
    directory, host = work / name, {"a": HOST_A, "b": HOST_B}[name]
    health = f"{host}:{_free_port(host)}"
    whole = {
        "mtls_mode": "strict",
        "state_dir": "state",
        "identity": {
            "certificate": "svid.pem", "key": "svid_key.pem", "bundles": {"example.org": "bundle-example.org.pem"},
        },
        "policy": {
            "source": "../policy/bundle.tar.gz",
            "keys": {"test-1": {"algorithm": "ES256", "file": "../policy/test-1.pub"}},
        },
        "health": {"listen": health},
        "log": {"access": "access.log"},
        **config,
        **settings,
    }  # fmt: skip
    side = Side(name=name, directory=directory, agent="", stock=False, outbound="", inbound={}, health=health)
    side.config.write_text(json.dumps(whole, indent=2))
    return side


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
