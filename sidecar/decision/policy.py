"""What OPA is told about the one bundle that it runs."""

from __future__ import annotations

from pathlib import Path

from sidecar.model import PolicyBundle

NAME = "sidecar"
"""What OPA calls our one bundle."""
_MAX_FILE_BYTES = 256 << 20


def configuration(bundle: PolicyBundle, archive: Path) -> dict[str, object]:
    """Return OPA's configuration. It is the `signing` block that makes it verify: keys alone would not."""
    return {
        "bundles": {
            NAME: {
                "resource": archive.as_uri(),
                "persist": False,
                "size_limit_bytes": _MAX_FILE_BYTES,
                "signing": {"scope": bundle.scope},
            }
        },
        "keys": {
            name: {"algorithm": kind, "key": pem.decode("ascii", "replace")}
            for name, (kind, pem) in bundle.keys.items()
        },
        "status": {"prometheus": True},  # without anything to do for it, /v1/status is not there
    }
