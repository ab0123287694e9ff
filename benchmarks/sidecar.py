"""Our own peer, started as a user would: `sidecar run --config`, nothing tuned, one strict inbound listener."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from benchmarks.loopback import free_port, get
from benchmarks.material import SCOPE, TRUST_DOMAIN, Material
from benchmarks.opa import Opa, command_of
from benchmarks.peer import Peer
from benchmarks.processes import Broken, descendants, running, wait_until


@contextmanager
def sidecar(material: Material, agent_port: int, work: Path) -> Iterator[Peer]:
    """Start the sidecar of this environment with an OPA child; it is ready when this yields."""
    work.mkdir()
    port, health_port = free_port(), free_port()
    config, access_log, log = work / "sidecar.yaml", work / "access.log", work / "sidecar.log"
    access_log.touch()
    config.write_text(json.dumps(_config(material, port, health_port, agent_port, access_log), indent=1))
    with running([command(), "run", "--config", config], log=log, cwd=work, stop_timeout=30) as child:
        wait_until(lambda: get("/readyz", port=health_port)[0] == 200, "the sidecar", child, log)
        (opa,) = filter(_is_opa, descendants(child.pid))
        yield Peer(
            name="sidecar",
            version=_version(),
            port=port,
            proxy_pids=lambda: [child.pid, *(pid for pid in descendants(child.pid) if not _is_opa(pid))],
            opa=Opa(pid=opa, socket=command_of(opa).socket),
            access_log=access_log,
            metrics_port=health_port,
            metrics_path="/metrics",
        )


def command() -> Path:
    """The console script beside the interpreter that runs this."""
    script = Path(sys.executable).with_name("sidecar")
    if not script.exists():
        raise Broken(f"{script} is not there: install the project into this environment first")
    return script


def _is_opa(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "opa"


def _config(material: Material, port: int, health_port: int, agent_port: int, access_log: Path) -> dict[str, object]:
    """JSON is YAML too."""
    return {
        "mtls_mode": "strict",
        "state_dir": "state",
        "identity": {
            "source": "files",
            "certificate": str(material.server_chain),
            "key": str(material.server_key),
            "bundles": {TRUST_DOMAIN: str(material.anchors)},
        },
        "inbound": [{"listen": f"127.0.0.1:{port}", "upstream": f"http://127.0.0.1:{agent_port}"}],
        "opa": {},
        "policy": {
            "source": str(material.bundle),
            "keys": {material.key_id: {"algorithm": "ES256", "file": str(material.public_key)}},
            "scope": SCOPE,
        },
        "health": {"listen": f"127.0.0.1:{health_port}"},
        "log": {"access": str(access_log)},
    }


def _version() -> str:
    return f"{version('policy-sidecar')} on Python {sys.version.split()[0]}"
