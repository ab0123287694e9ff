"""Questions to policy, for tests to which most of their fields do not matter."""

from __future__ import annotations

from typing import Any

from sidecar.model import Inquiry


def asking(path: str = "/", direction: Any = "inbound", caller: str | None = None) -> Inquiry:
    return Inquiry(
        direction=direction, caller=caller, caller_reason="plaintext", method="GET", path=path, segments=(path[1:],),
        query={}, headers={}, mtls_mode="permissive", tls=False, host="a.test", port=80, protocol="HTTP/1.1",
    )  # fmt: skip
