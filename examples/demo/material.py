"""What the demo is made of: addresses, identities, a signed bundle and two configurations, all made anew in one directory.

Everything lies under `work`: `a/` and `b/` belong to the two sidecars, `callers/` holds the SVIDs that curl shows when it
is a workload itself, `policy/` the bundle and the key that signed it. Nothing is started here.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.demo import bundle, kit
from examples.demo.rows import Place

HERE = Path(__file__).parent
POLICIES = HERE.parent.parent / "policies" / "rego"
DATA = HERE / "data.json"

HOSTS = {"a": "127.0.0.1", "b": "127.0.0.2"}
PATHS = {"a": "/ns/demo/sa/budget", "b": "/ns/demo/sa/backend"}
"""Of the SPIFFE IDs in example.org."""
KEY_ID = "demo-1"

_LIFE = 7 * 86400.0
"""Of every certificate, in seconds: as long as anybody leaves a demo running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An agent and its sidecar. Addresses are `host:port`."""

    name: str
    directory: Path
    agent: str
    stock: bool
    """Whether the agent is the demo's own, and not a server that stands in for it."""
    outbound: str
    inbound: Mapping[str, str]
    """By mode."""
    health: str

    @property
    def config(self) -> Path:
        return self.directory / "sidecar.yaml"

    @property
    def access_log(self) -> Path:
        return self.directory / "access.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    work: Path
    sides: Mapping[str, Side]

    def address(self, place: Place) -> str:
        side, _, listener = place.partition(".")
        return self.sides[side].outbound if listener == "outbound" else self.sides[side].inbound[listener]

    def svid(self, caller: str) -> kit.Written:
        directory = self.work / "callers" / caller
        return kit.Written(certificate=directory / "svid.pem", key=directory / "svid_key.pem", bundles={})


def make(
    work: Path, *, opa: Path, policies: Path = POLICIES, data: Path = DATA, backend: str | None = None
) -> Material:
    """Write everything; what an earlier demo left in `work` goes.

    `policies` holds Rego and its `.manifest`, `data` is their data document, `backend` the address of a server that
    stands in for agent B. Raises `bundle.NotBuilt`, `OSError`.
    """
    for old in ("a", "b", "callers", "policy"):
        shutil.rmtree(work / old, ignore_errors=True)
    material = Material(
        work=work,
        sides={
            "a": _side(work, "a", backend=None, modes=("strict",)),
            "b": _side(work, "b", backend=backend, modes=("strict", "permissive", "disabled")),
        },
    )
    _identities(material)
    private, _ = bundle.make_keys(work / "policy", KEY_ID)
    bundle.build(
        work / "policy", opa=opa, policy_dir=policies, data=json.loads(data.read_text()), serial=1, revision="demo-1",
        private_key_path=private, key_id=KEY_ID,
    )  # fmt: skip
    for side, other in (("a", "b"), ("b", "a")):
        material.sides[side].config.write_text(json.dumps(_config(material, side, other), indent=2) + "\n")
    return material


def _side(work: Path, name: str, *, backend: str | None, modes: tuple[str, ...]) -> Side:
    directory, host = work / name, HOSTS[name]
    directory.mkdir(parents=True)
    return Side(
        name=name, directory=directory, agent=backend or _free(host, 8000), stock=backend is None,
        outbound=_free(host, 8080), inbound={mode: _free(host, 8443 + number) for number, mode in enumerate(modes)},
        health=_free(host, 9091),
    )  # fmt: skip


def _free(host: str, port: int) -> str:
    """`port` if it is free, else one some thousands above it (below those that the kernel hands out)."""
    for candidate in range(port, 32768, 1000):
        try:
            with socket.create_server((host, candidate)):
                return f"{host}:{candidate}"
        except OSError as error:
            failure = error
    raise failure


def _identities(material: Material) -> None:
    ours, partner, unknown = (kit.CA(name, ttl=_LIFE) for name in ("example.org", "partner.org", "stranger.org"))
    trusted = {"example.org": ours.bundle_pem, "partner.org": partner.bundle_pem}
    for name, path in PATHS.items():
        kit.write(material.sides[name].directory, ours.svid(path, ttl=_LIFE), trusted)
    callers = {
        "console": ours.svid("/ns/demo/sa/console", ttl=_LIFE),
        "auditor": partner.svid("/ns/audit/sa/auditor", ttl=_LIFE),
        "visitor": partner.svid("/ns/audit/sa/visitor", ttl=_LIFE),
        "impostor": partner.svid(uris=[_id("a")], ttl=_LIFE),
        "stranger": unknown.svid(PATHS["a"], ttl=_LIFE),
    }
    for name, svid in callers.items():
        kit.write(material.work / "callers" / name, svid, {})


def _id(side: str) -> str:
    return f"spiffe://example.org{PATHS[side]}"


def _config(material: Material, name: str, peer: str) -> dict[str, object]:
    """The configuration of one sidecar, with paths relative to it. JSON is YAML too."""
    side, other = material.sides[name], material.sides[peer]
    return {
        "mtls_mode": "strict",
        "state_dir": "state",
        "identity": {
            "certificate": "svid.pem",
            "key": "svid_key.pem",
            "bundles": {domain: f"bundle-{domain}.pem" for domain in ("example.org", "partner.org")},
        },
        "inbound": [
            {"listen": address, "upstream": f"http://{side.agent}", "mtls_mode": mode}
            for mode, address in side.inbound.items()
        ],
        "outbound": {
            "listen": side.outbound,
            "routes": [
                {"target": other.inbound["strict"], "authority": f"{peer}.internal", "spiffe_ids": [_id(peer)]},
            ],
        },
        "policy": {
            "source": "../policy/bundle.tar.gz",
            "keys": {KEY_ID: {"algorithm": "ES256", "file": f"../policy/{KEY_ID}.pub"}},
        },
        "health": {"listen": side.health},
        "timeouts": {"drain": 5},
        "log": {"access": "access.log"},
    }  # fmt: skip
