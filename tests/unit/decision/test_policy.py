"""What OPA is told about its one bundle."""

from __future__ import annotations

from pathlib import Path

from sidecar.decision.policy import configuration
from sidecar.model import PolicyBundle


def test_opa_verifies_and_keeps_nothing() -> None:
    bundle = PolicyBundle(
        archive=b"", revision="r", serial=1, created=0.0, digest="", keys={"k": ("ES256", b"PEM")}, scope="prod"
    )
    told = configuration(bundle, Path("/private/bundle.tar.gz"))
    assert told["bundles"] == {
        "sidecar": {
            "resource": "file:///private/bundle.tar.gz", "persist": False, "size_limit_bytes": 256 << 20,
            "signing": {"scope": "prod"},
        }
    }  # fmt: skip
    assert told["keys"] == {"k": {"algorithm": "ES256", "key": "PEM"}}
