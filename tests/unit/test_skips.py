"""A skip counts as a skip: named, and in CI a failure unless it is on the list."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("listed", "code"), [(False, 1), (True, 0)])
def test_a_skip_in_ci_fails_unless_it_is_listed(tmp_path: Path, listed: bool, code: int) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tests / "test_it.py").write_text(
        "import pytest\n@pytest.mark.skip(reason='why')\ndef test_one(): ...\ndef test_two(): ...\n"
    )
    (tests / "skips.txt").write_text("tests/test_it.py::test_one  # no such tool\n" if listed else "# none\n")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "CI": "true", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert ("NOT ON tests/skips.txt: tests/test_it.py::test_one" in done.stdout) is not listed
