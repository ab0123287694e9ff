"""What a running sidecar weighs: an import or a cache that costs too much is seen here first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.live import running

pytestmark = pytest.mark.live

MAX_IDLE_BYTES = 42 * 1024 * 1024


def test_an_idle_sidecar_stays_within_its_memory(tmp_path: Path, opa: Path) -> None:
    with running(tmp_path, opa) as live:
        time.sleep(1)  # for what the start leaves behind to be done
        assert (size := live.rss()) <= MAX_IDLE_BYTES, f"{size / 2**20:.1f} MiB"
