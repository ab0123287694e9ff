"""What both peers are given alike: SVIDs, trust bundle, signed policy. Made anew for each run, gone after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Broken
from examples.demo import bundle, kit
from sidecar.decision import install

TRUST_DOMAIN = "example.org"
CLIENT, SERVER = "/ns/demo/sa/budget", "/ns/demo/sa/backend"
"""Paths of their SPIFFE IDs."""
SCOPE = "sidecar"
KEY_ID = "bench-1"
POLICIES = Path(__file__).parent.parent / "policies" / "rego"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Paths of PEM files (chains leaf first), of the signed bundle and of the public key that verifies it."""

    server_chain: Path
    server_key: Path
    client_chain: Path
    client_key: Path
    anchors: Path
    bundle: Path
    key_id: str
    public_key: Path


def make(work: Path) -> Material:
    """Write everything below `work`. The policy is the product's own library, with the data of a small company.

    Raises `Broken` where there is no OPA to build the bundle with.
    """
    opa = install.find()
    if opa is None:
        raise Broken("there is no OPA: `sidecar opa install` gets it")
    authority = kit.CA(TRUST_DOMAIN)
    server = kit.write(work / "server", authority.svid(SERVER), {TRUST_DOMAIN: authority.bundle_pem})
    client = kit.write(work / "client", authority.svid(CLIENT), {})
    private, public = bundle.make_keys(work / "policy", KEY_ID)
    made = bundle.build(
        work / "policy", opa=opa, policy_dir=POLICIES, data=_data(), serial=1, revision="bench-1",
        private_key_path=private, scope=SCOPE, key_id=KEY_ID,
    )  # fmt: skip
    return Material(
        server_chain=server.certificate,
        server_key=server.key,
        client_chain=client.certificate,
        client_key=client.key,
        anchors=server.bundles[TRUST_DOMAIN],
        bundle=made,
        key_id=KEY_ID,
        public_key=public,
    )


def _data() -> dict[str, object]:
    """The client's role, and beside it twenty more for two hundred other callers."""
    roles = {
        f"service-{number}": {"allow": [{"methods": ["GET", "POST"], "paths": [f"/service-{number}/**", "/status"]}]}
        for number in range(20)
    }
    roles["budget-readers"] = {"allow": [{"methods": ["GET", "HEAD"], "paths": ["/budget/**"]}]}
    bindings = {
        f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/caller-{number}": [f"service-{number % 20}"] for number in range(200)
    }
    bindings[f"spiffe://{TRUST_DOMAIN}{CLIENT}"] = ["budget-readers"]
    return {"sidecar": {"rbac": {"roles": roles, "bindings": bindings}}}
