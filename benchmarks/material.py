"""What both peers are given alike: SVIDs, trust bundle, signed policy. Made anew for each run, gone after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRUST_DOMAIN = "example.org"
CLIENT = f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/budget"
SERVER = f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/backend"
SCOPE = "sidecar"


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
