"""Our own peer, started as a user would: `sidecar run --config`, nothing tuned, one strict listener."""

from __future__ import annotations

import json
import re
import ssl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.books import Own
from benchmarks.loopback import free_port, get
from benchmarks.material import AUTHORITY, SCOPE, SERVER, TRUST_DOMAIN, Material, Svid
from benchmarks.opa import Opa, command_of
from benchmarks.peer import Peer
from benchmarks.processes import Broken, descendants, running, wait_until

_SAMPLE = re.compile(r"^(sidecar_\w+?)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@contextmanager
def inbound(
    name: str,
    material: Material,
    agent_port: int,
    work: Path,
    *,
    workers: int = 1,
    extra: Mapping[str, Any] | None = None,
    start_timeout: float = 30.0,
) -> Iterator[Peer]:
    """Start the sidecar of this environment, in front of an agent; it is ready when this yields.

    `extra`: sections of the configuration beside the usual ones. `start_timeout`: seconds until it has to be ready.
    """
    port = free_port()
    config = {
        **_config(material, material.server, workers),
        "inbound": [{"listen": f"127.0.0.1:{port}", "upstream": f"http://127.0.0.1:{agent_port}"}],
        **(extra or {}),
    }
    with _running(name, config, port, work, start_timeout=start_timeout) as peer:
        yield peer


@contextmanager
def outbound(name: str, material: Material, target_port: int, work: Path) -> Iterator[Peer]:
    """Start one behind an agent, whose one route leads to the proxy on that port."""
    port = free_port()
    route = {"target": f"127.0.0.1:{target_port}", "authority": AUTHORITY, "spiffe_ids": [SERVER]}
    config = {
        **_config(material, material.client, 1),
        "outbound": {"listen": f"127.0.0.1:{port}", "routes": [route]},
    }
    with _running(name, config, port, work, tls=False) as peer:
        yield peer


@contextmanager
def _running(
    name: str, config: Mapping[str, Any], port: int, work: Path, *, tls: bool = True, start_timeout: float = 30.0
) -> Iterator[Peer]:
    work.mkdir()
    health_port = free_port()
    path, access_log, log = work / "sidecar.yaml", work / "access.log", work / "sidecar.log"
    access_log.touch()
    whole = {**config, "health": {"listen": f"127.0.0.1:{health_port}"}, "log": {"access": str(access_log)}}
    path.write_text(json.dumps(whole, indent=1))  # JSON is YAML too
    with running([command(), "run", "--config", path], log=log, cwd=work, stop_timeout=30) as child:
        wait_until(lambda: get("/readyz", port=health_port)[0] == 200, "the sidecar", child, log, start_timeout)
        (opa,) = filter(_is_opa, descendants(child.pid))
        yield Peer(
            name=name,
            version=_version(),
            port=port,
            tls=tls,
            proxy_pids=lambda: [child.pid, *(pid for pid in descendants(child.pid) if not _is_opa(pid))],
            opas=[Opa(pid=opa, socket=command_of(opa).socket)],
            access_logs=[access_log],
            metrics=[(health_port, "/metrics")],
            own=lambda: own(get("/metrics", port=health_port)[1]),
        )


def own(exposition: str) -> Own:
    """What a sidecar's metrics say of its decisions so far."""
    decided = repeated = 0
    for name, labels, value in _SAMPLE.findall(exposition):
        said = dict(_LABEL.findall(labels))
        if name == "sidecar_decisions_total" and said.get("result") != "error":
            decided += int(float(value))
        if name == "sidecar_decision_cache_total" and said.get("result") in {"hit", "shared"}:
            repeated += int(float(value))
    return Own(decided=decided, repeated=repeated)


def command() -> Path:
    """The console script beside the interpreter that runs this."""
    script = Path(sys.executable).with_name("sidecar")
    if not script.exists():
        raise Broken(f"{script} is not there: install the project into this environment first")
    return script


def _is_opa(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "opa"
    except OSError:  # it has ended since it was listed
        return False


def _config(material: Material, svid: Svid, workers: int) -> dict[str, Any]:
    config = {
        "mtls_mode": "strict",
        "state_dir": "state",
        "identity": {
            "source": "files",
            "certificate": str(svid.chain),
            "key": str(svid.key),
            "bundles": {TRUST_DOMAIN: str(material.anchors)},
        },
        "opa": {},
        "policy": {
            "source": str(material.bundle),
            "keys": {material.key_id: {"algorithm": "ES256", "file": str(material.public_key)}},
            "scope": SCOPE,
        },
    }
    return config if workers == 1 else {**config, "workers": workers}


def _version() -> str:
    return (
        f"{version('policy-sidecar')} on Python {sys.version.split()[0]}, {' '.join(ssl.OPENSSL_VERSION.split()[:2])}"
    )
