"""From a file to a fleet and back, the main path of `make rollout`: real server, real sidecars, real OPA, traffic throughout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lanes.rollout import MAIN_PATH, perform

pytestmark = pytest.mark.live


def test_policy_goes_from_a_file_to_a_fleet_and_back(opa: Path, tmp_path: Path) -> None:
    said: list[str] = []
    outcome = perform(tmp_path, opa, MAIN_PATH, say=said.append)
    assert outcome.complaints == [], "\n".join(said)
    assert outcome.steps == len(MAIN_PATH)
    assert len(outcome.enforced) >= 5
    assert outcome.answered > 0
