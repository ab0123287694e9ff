"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.decision import install


@pytest.fixture(scope="session")
def opa() -> Path:
    """The real OPA. Where tests must be whole (CI=true), a missing one is a failure and not a skip."""
    found = install.find()
    if found is None:
        missing = f"there is no OPA {install.VERSION} on PATH or in the cache: run `sidecar opa install`"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found
