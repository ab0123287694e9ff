"""What all peers are given alike: SVIDs, trust bundle, signed policy. Made anew for each case, gone after it.

The bundle is made as users make theirs, by `sidecar bundle build`: so it carries whatever that proves of it and adds to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Broken
from examples.demo import kit

TRUST_DOMAIN = "example.org"
CLIENT, SERVER = f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/budget", f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/backend"
"""Whom the load generator (or the outbound sidecar) is, and whom the proxy that is measured."""
AUTHORITY = "backend.internal"
"""What an outbound route calls the target."""
SCOPE = "sidecar"
KEY_ID = "bench-1"
CLOCK = """package team.clock.inbound

deny contains "this is the past" if time.now_ns() < 1000000000000000000
"""
"""An overlay that refuses nothing, and reads the clock: nobody can prove that the answer will be the same again."""
_BUILD_TIMEOUT = 1800.0


READS_AND_WRITES = [
    {"methods": ["GET", "HEAD", "POST"], "paths": ["/budget/**"]},
    {"methods": ["POST"], "paths": ["/bench.Echo/*"]},
]
"""What the client may do: all that the cases ask for, and no more."""


def small_company() -> dict[str, Any]:
    """The client's role, and beside it twenty more for two hundred other callers."""
    roles: dict[str, Any] = {
        f"service-{number}": {"allow": [{"methods": ["GET", "POST"], "paths": [f"/service-{number}/**", "/status"]}]}
        for number in range(20)
    }
    bindings = {
        f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/caller-{number}": [f"service-{number % 20}"] for number in range(200)
    }
    return with_client(roles, bindings)


def with_client(roles: Mapping[str, Any], bindings: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the library in which the client may do what the cases ask for, as caller and as agent, and others these."""
    return {
        "sidecar": {
            "rbac": {
                "roles": {**roles, "budget": {"allow": READS_AND_WRITES}},
                "bindings": {**bindings, CLIENT: ["budget"]},
            },
            "destinations": {"ids": {SERVER: {"allow": READS_AND_WRITES}}},
        }
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The product's own library with this data. `compiled` as of `sidecar bundle build --compile-rbac`."""

    data: Mapping[str, Any] = field(default_factory=small_company)
    impure: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Svid:
    """PEM files, the chain leaf first."""

    chain: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    client: Svid
    server: Svid
    stranger: Svid
    """The client's ID, by an authority that nobody trusts."""
    anchors: Path
    bundle: Path
    key_id: str
    public_key: Path


def make(work: Path, policy: Policy | None = None) -> Material:
    """Write everything below `work`. Raises `Broken` where the bundle cannot be built."""
    authority, other = kit.CA(TRUST_DOMAIN), kit.CA(TRUST_DOMAIN)
    server = kit.write(work / "server", authority.svid(_path(SERVER)), {TRUST_DOMAIN: authority.bundle_pem})
    client = kit.write(work / "client", authority.svid(_path(CLIENT)), {})
    stranger = kit.write(work / "stranger", other.svid(_path(CLIENT)), {})
    bundle, public = _bundle(work / "policy", policy or Policy())
    return Material(
        client=Svid(chain=client.certificate, key=client.key),
        server=Svid(chain=server.certificate, key=server.key),
        stranger=Svid(chain=stranger.certificate, key=stranger.key),
        anchors=server.bundles[TRUST_DOMAIN],
        bundle=bundle,
        key_id=KEY_ID,
        public_key=public,
    )


def _path(spiffe_id: str) -> str:
    return spiffe_id.removeprefix(f"spiffe://{TRUST_DOMAIN}")


def _bundle(work: Path, policy: Policy) -> tuple[Path, Path]:
    """Write a signed bundle, and return its path and that of the key that verifies it."""
    work.mkdir(parents=True)
    private, output = work / "bench.key", work / "bundle.tar.gz"
    (work / "data.json").write_text(json.dumps(policy.data))
    _sidecar("bundle", "keygen", private)
    options: list[str | Path] = ["--data", work / "data.json", "--revision", "bench-1", "--serial", "1"]
    if policy.impure:
        (work / "clock").mkdir()
        (work / "clock" / "clock.rego").write_text(CLOCK)
        options.append(f"--overlay=clock={work / 'clock'}")
    if policy.compiled:
        options.append("--compile-rbac")
    _sidecar("bundle", "build", *options, "--key", private, "--key-id", KEY_ID, "--scope", SCOPE, "--output", output)
    return output, private.with_suffix(".pub")


def _sidecar(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments],
        capture_output=True,
        text=True,
        timeout=_BUILD_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise Broken(f"`sidecar {' '.join(map(str, arguments[:2]))}` failed: {done.stderr.strip()[-2000:]}")
