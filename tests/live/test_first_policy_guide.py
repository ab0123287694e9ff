"""`docs/guides/first-policy.md`, done word by word: data, tests, questions, a bundle, a sidecar that enforces it, a replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.guides import ROOT, follow
from support.live import free_port

pytestmark = pytest.mark.live

PORTS = ("8443", "8000", "9091")


def test_the_guide_does_what_it_says(opa: Path, tmp_path: Path) -> None:
    done = follow(ROOT / "docs/guides/first-policy.md", tmp_path, {port: free_port() for port in PORTS})
    for command in ("policy simulate", "policy test", "bundle build", "sidecar run", "policy replay"):
        assert any(command in one for one in done)
