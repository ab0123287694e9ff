"""Work of threads, done in place: a mock clock that jumps while nothing happens does not know of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio


async def run_in_place(work: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*arguments)


@pytest.fixture(autouse=True)
def no_threads_beside_a_mock_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported by a test file, it is there for each of its tests that has `autojump_clock`."""
    if "autojump_clock" in request.fixturenames:
        monkeypatch.setattr(trio.to_thread, "run_sync", run_in_place)
