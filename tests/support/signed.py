"""Signed policy bundles, made by OPA's own commands with keys made on the spot."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.model import PolicyBundle

REGO = """package sidecar.inbound

decision := {"allow": true, "reason": "welcome", "rule": "allow"} if input.path == "/allow"
decision := {"allow": false, "reason": "not you", "rule": "deny", "status": 404} if input.path == "/deny"
decision := true if input.path == "/bare-true"
decision := false if input.path == "/bare-false"
decision := "yes" if input.path == "/string"
decision := {"allow": "true"} if input.path == "/truthy"
decision := {"allow": true, "color": "green"} if input.path == "/unknown-key"
decision := {"allow": true, "request_headers": {"x-spiffe-id": "spiffe://a.test/admin"}} if input.path == "/forged"
decision := {"allow": false, "reason": concat("", [x | some _ in numbers.range(1, 5000); x := "é"])} if input.path == "/long"
decision := {"allow": true} if input.path == "/conflict"
decision := {"allow": false} if input.path == "/conflict"
decision := {"allow": true, "reason": input.caller} if input.path == "/echo"
decision := {"allow": count([1 | some x in rows; some y in rows; x * y == 0]) == 0} if input.path == "/slow"

rows := numbers.range(1, 2000)
"""


class Signer:
    """Makes bundles under `work`, with the keys that vouch for them."""

    def __init__(self, opa: Path, work: Path, *, key_id: str = "release-1", scope: str = "sidecar") -> None:
        self.opa = opa
        self.work = work
        self.key_id = key_id
        self.scope = scope
        key = ec.generate_private_key(ec.SECP256R1())
        self.public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def handed(self, path: Path, *, revision: str = "r1") -> PolicyBundle:
        """The bundle at `path` as whoever fetched it would hand it on, with no look at what it is."""
        archive = path.read_bytes()
        return PolicyBundle(
            archive=archive, revision=revision, serial=1, created=0.0, digest=hashlib.sha256(archive).hexdigest(),
            keys={self.key_id: ("ES256", self.public)}, scope=self.scope,
        )  # fmt: skip

    def bundle(
        self, path: Path, *, revision: str = "r1", rego: str = REGO, serial: int = 1, signed: bool = True
    ) -> Path:
        """Write a bundle to `path` by renaming, so that no reader sees half of it."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "src").mkdir(exist_ok=True)
        (self.work / "src/policy.rego").write_text(rego)
        manifest = {"revision": revision, "roots": ["sidecar"], "metadata": {"serial": serial}}
        (self.work / "src/.manifest").write_text(json.dumps(manifest))
        (self.work / "key.pem").write_bytes(self._private)
        (self.work / "claims.json").write_text(json.dumps({"keyid": self.key_id, "scope": self.scope}))
        signing = ["--signing-key", "key.pem", "--signing-alg", "ES256", "--claims-file", "claims.json"]
        fresh = self.work / "fresh.tar.gz"
        command = [self.opa, "build", "-b", "src", "-r", revision, "-o", fresh, *(signing if signed else ())]
        subprocess.run(command, cwd=self.work, check=True, capture_output=True, timeout=60)
        fresh.replace(path)
        return path
